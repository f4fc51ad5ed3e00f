//! Mistral: behind `[TOOL_CALLS]` a list of JSON objects, or `name[ARGS]{...}` once for each call.

use super::blocks::Block;
use super::json_stream::{Behind, CallBlock, ObjectEnd, behind_space, opens_object};
use super::scan::{Content, Scanner};
use super::{Parts, TextParser};

pub(super) const MARK: &str = "[TOOL_CALLS]";
const ARGS: &str = "[ARGS]";
const CALL_ID: &str = "[CALL_ID]";
pub(super) const MARKS: [&str; 3] = [MARK, ARGS, CALL_ID];

/// See the module's text. What follows the first mark is calls to its end, or is given back as it was.
#[derive(Default)]
pub(super) struct Parser {
    scanner: Scanner,
    content: Content,
    calls: Option<Calls>,
}

/// What follows the first mark.
enum Calls {
    /// Nothing but white space so far.
    Undecided(String),
    Json(CallBlock),
    /// A mark, and a name up to its arguments; how much of it was looked at for where they begin.
    Name {
        text: String,
        looked_at: usize,
    },
    Arguments(ObjectEnd),
    /// Behind arguments: nothing but white space and a part of a mark so far.
    Behind(String),
    /// Something could not be read: the rest is content.
    Content,
}

impl Calls {
    fn name(text: &str) -> Self {
        Self::Name { text: text.to_owned(), looked_at: 0 }
    }

    /// Takes some of `text` in, and gives back what the next state is to take.
    fn push(&mut self, text: &str, content: &mut Content, parts: &mut Parts) -> Option<String> {
        match self {
            Self::Undecided(space) => {
                space.push_str(text);
                let first = behind_space(space);
                let text = std::mem::take(space);
                match first {
                    Behind::Unknown => *space = text,
                    Behind::First(_, '[' | '{') => {
                        *self = Self::Json(CallBlock::new(MARK.to_owned()));
                        return Some(text);
                    }
                    Behind::First(..) => {
                        *self = Self::name(MARK);
                        return Some(text);
                    }
                    Behind::Space => {
                        *self = Self::Content;
                        return Some(MARK.to_owned() + &text);
                    }
                }
                None
            }
            Self::Json(block) => {
                block.push(text, content, parts);
                None
            }
            Self::Name { text: header, looked_at } => {
                header.push_str(text);
                let Some(at) = header[*looked_at..].find('{') else {
                    *looked_at = header.len();
                    return None;
                };
                let at = *looked_at + at;
                *looked_at = at;
                let opens = opens_object(&header[at..])?;
                let name = header[MARK.len()..at].trim();
                let name = name.strip_suffix(ARGS).unwrap_or(name);
                // An identity of its own, in some versions.
                let name = name.split(CALL_ID).next().unwrap_or(name).trim();
                if !opens || name.is_empty() || name.contains(char::is_whitespace) {
                    let text = std::mem::take(header);
                    *self = Self::Content;
                    return Some(text);
                }
                content.call();
                parts.begin_call(name.to_owned());
                let rest = header.split_off(at);
                *self = Self::Arguments(ObjectEnd::default());
                Some(rest)
            }
            Self::Arguments(end) => {
                let (piece, behind) = end.cut(text);
                parts.arguments(piece);
                let behind = behind?.to_owned();
                parts.end_call();
                *self = Self::Behind(String::new());
                Some(behind)
            }
            Self::Behind(held) => {
                held.push_str(text);
                match behind_space(held) {
                    Behind::Unknown => return None,
                    Behind::First(at, _) => {
                        if let Some(rest) = held[at..].strip_prefix(MARK) {
                            let rest = rest.to_owned();
                            *self = Self::name(MARK);
                            return Some(rest);
                        }
                        if MARK.starts_with(&held[at..]) {
                            return None;
                        }
                    }
                    Behind::Space => {}
                }
                let text = std::mem::take(held);
                *self = Self::Content;
                Some(text)
            }
            Self::Content => {
                content.push(text, |text| parts.content(text));
                None
            }
        }
    }

    fn finish(self, content: &mut Content, parts: &mut Parts) {
        let mut give_back = |texts: [&str; 2]| {
            for text in texts {
                content.push(text, |text| parts.content(text));
            }
        };
        match self {
            Self::Undecided(space) => give_back([MARK, &space]),
            Self::Name { text, .. } => give_back([&text, ""]),
            Self::Behind(held) if !held.trim().is_empty() => give_back([&held, ""]),
            Self::Behind(_) | Self::Content => {}
            Self::Json(block) => block.end("", content, parts),
            // It was cut off.
            Self::Arguments(_) => parts.end_call(),
        }
    }
}

impl TextParser for Parser {
    fn push(&mut self, text: &str, parts: &mut Parts) {
        let Self { scanner, content, calls } = self;
        let mut rest = match calls {
            Some(_) => text.to_owned(),
            None => {
                scanner.push(text);
                if scanner.next(&[MARK], |text| content.push(text, |text| parts.content(text))).is_none() {
                    return;
                }
                *calls = Some(Calls::Undecided(String::new()));
                scanner.take()
            }
        };
        while let Some(calls) = calls
            && let Some(next) = calls.push(&rest, content, parts)
        {
            rest = next;
        }
    }

    fn finish(&mut self, parts: &mut Parts) {
        match self.calls.take() {
            Some(calls) => calls.finish(&mut self.content, parts),
            None => {
                let rest = self.scanner.take();
                self.content.push(&rest, |text| parts.content(text));
            }
        }
        self.content.finish(|text| parts.content(text));
    }
}
