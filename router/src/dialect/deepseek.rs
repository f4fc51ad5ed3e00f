//! DeepSeek V3 and R1: calls between marks of their own; a call is `function<sep>NAME` and fenced JSON, or since V3.1
//! `NAME<sep>` and JSON.

use super::blocks::{Block, Blocks};
use super::json_stream::{ObjectEnd, opens_object};
use super::scan::Content;
use super::{Parts, TextParser};

pub(super) const CALLS_BEGIN: &str = "<｜tool▁calls▁begin｜>";
pub(super) const CALLS_END: &str = "<｜tool▁calls▁end｜>";
pub(super) const CALL_BEGIN: &str = "<｜tool▁call▁begin｜>";
pub(super) const CALL_END: &str = "<｜tool▁call▁end｜>";
pub(super) const SEP: &str = "<｜tool▁sep｜>";
pub(super) const MARKS: [&str; 5] = [CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEP];
const FENCE: &str = "```json";

pub(super) fn parser() -> impl TextParser {
    Blocks::new(CALLS_BEGIN, CALLS_END, || CallsBlock { begin: CALLS_BEGIN, state: State::header("") })
}

/// What is between the outer marks.
struct CallsBlock {
    /// What it began with, until a call was found in it.
    begin: &'static str,
    state: State,
}

enum State {
    /// Up to the arguments of a call; how much of it was looked at for where they may begin.
    Header {
        text: String,
        looked_at: usize,
    },
    Arguments(ObjectEnd),
    /// Something could not be read: the rest is content.
    Content,
}

impl State {
    fn header(text: &str) -> Self {
        Self::Header { text: text.to_owned(), looked_at: 0 }
    }
}

/// The name in what comes before a call's arguments.
fn name(header: &str) -> Option<&str> {
    let (_, call) = header.rsplit_once(CALL_BEGIN)?;
    let (kind, rest) = call.split_once(SEP)?;
    let name = match rest.split_once(FENCE) {
        Some((name, space)) => space.trim().is_empty().then_some(name)?,
        None => rest.trim().is_empty().then_some(kind)?,
    };
    Some(name.trim()).filter(|name| !name.is_empty())
}

impl Block for CallsBlock {
    fn push(&mut self, text: &str, content: &mut Content, parts: &mut Parts) {
        let mut rest = text.to_owned();
        loop {
            match &mut self.state {
                State::Content => return content.push(&rest, |text| parts.content(text)),
                State::Header { text, looked_at } => {
                    text.push_str(&rest);
                    let Some(at) = text[*looked_at..].find('{') else {
                        *looked_at = text.len();
                        return;
                    };
                    let at = *looked_at + at;
                    *looked_at = at;
                    let Some(opens) = opens_object(&text[at..]) else { return };
                    match name(&text[..at]).filter(|_| opens) {
                        None => {
                            let text = std::mem::take(text);
                            self.state = State::Content;
                            content.push(std::mem::take(&mut self.begin), |text| parts.content(text));
                            rest = text;
                        }
                        Some(name) => {
                            content.call();
                            self.begin = "";
                            parts.begin_call(name.to_owned());
                            rest = text.split_off(at);
                            self.state = State::Arguments(ObjectEnd::default());
                        }
                    }
                }
                State::Arguments(end) => {
                    let (piece, behind) = end.cut(&rest);
                    parts.arguments(piece);
                    let Some(behind) = behind else { return };
                    parts.end_call();
                    self.state = State::header("");
                    rest = behind.to_owned();
                }
            }
        }
    }

    fn is_in_value(&mut self) -> bool {
        matches!(&self.state, State::Arguments(end) if end.is_in_string())
    }

    fn end(self, end: &str, content: &mut Content, parts: &mut Parts) {
        match self.state {
            // It was cut off.
            State::Arguments(_) => parts.end_call(),
            // Behind the last call, with nothing that begins another.
            State::Header { text, .. } if self.begin.is_empty() && !text.contains(CALL_BEGIN) => {}
            State::Header { text, .. } => {
                for text in [self.begin, &text, end] {
                    content.push(text, |text| parts.content(text));
                }
            }
            State::Content => content.push(end, |text| parts.content(text)),
        }
    }
}
