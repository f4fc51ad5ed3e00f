//! gpt-oss: messages on channels. `analysis` is reasoning, `final` is content, and a message to `functions.NAME` is a call.

use super::json_stream::opens_object;
use super::scan::Scanner;
use super::{Dialects, ParsedCall, Parts, ReasoningDialect, TextParser};

pub(super) const CHANNEL: &str = "<|channel|>";
pub(super) const MESSAGE: &str = "<|message|>";
pub(super) const START: &str = "<|start|>";
pub(super) const END: &str = "<|end|>";
pub(super) const CONSTRAIN: &str = "<|constrain|>";
const CALL: &str = "<|call|>";
const RETURN: &str = "<|return|>";
pub(super) const MARKS: [&str; 7] = [CHANNEL, MESSAGE, START, END, CONSTRAIN, CALL, RETURN];
/// What ends a message; the next one's header follows.
const ENDS: [&str; 5] = [END, CALL, RETURN, START, CHANNEL];
pub(super) const FUNCTIONS: &str = "to=functions.";

/// See the module's text.
pub(super) struct Parser {
    scanner: Scanner,
    state: State,
    splits_reasoning: bool,
    finds_calls: bool,
}

enum State {
    /// Before `<|message|>`: channel and recipient, as far as they came.
    Header(String),
    Analysis,
    Final,
    Call {
        header: String,
        name: String,
        /// What was not said yet: all of it until an object begins, then white space at its end.
        arguments: String,
        has_begun: bool,
    },
}

impl Parser {
    pub(super) fn new(dialects: Dialects, finds_calls: bool) -> Self {
        Self {
            scanner: Scanner::default(),
            state: State::Header(String::new()),
            splits_reasoning: dialects.reasoning == Some(ReasoningDialect::Harmony),
            finds_calls,
        }
    }

    fn message(&self, header: String) -> State {
        let channel = header.rsplit(CHANNEL).next().unwrap_or_default().trim_start();
        let name = header.split_once(FUNCTIONS).map(|(_, rest)| {
            let end = rest.find(|character: char| character.is_whitespace() || character == '<').unwrap_or(rest.len());
            rest[..end].to_owned()
        });
        match name {
            Some(name) if self.finds_calls && !name.is_empty() => {
                State::Call { header, name, arguments: String::new(), has_begun: false }
            }
            _ if channel.starts_with("analysis") && self.splits_reasoning => State::Analysis,
            _ => State::Final,
        }
    }

    fn end_message(&mut self, parts: &mut Parts) {
        let state = std::mem::replace(&mut self.state, State::Header(String::new()));
        if let State::Call { has_begun: true, .. } = state {
            parts.end_call();
        } else if let State::Call { header, name, arguments, .. } = state {
            let arguments = if arguments.trim().is_empty() { "{}" } else { arguments.trim() };
            if serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(arguments).is_ok() {
                parts.call(ParsedCall { name, arguments: arguments.to_owned() });
            } else {
                parts.content(&header);
                parts.content(MESSAGE);
                parts.content(arguments);
            }
        }
    }
}

/// Says arguments as they come, once an object begins. White space around it belongs to nobody.
fn push_arguments(text: &str, name: &str, held: &mut String, has_begun: &mut bool, parts: &mut Parts) {
    held.push_str(text);
    if !*has_begun {
        if opens_object(held) != Some(true) {
            return;
        }
        *has_begun = true;
        parts.begin_call(name.to_owned());
        held.drain(..held.len() - held.trim_start().len());
    }
    let space = held.split_off(held.trim_end().len());
    parts.arguments(held);
    *held = space;
}

impl TextParser for Parser {
    fn push(&mut self, text: &str, parts: &mut Parts) {
        self.scanner.push(text);
        loop {
            match &mut self.state {
                State::Header(header) => {
                    if self.scanner.next(&[MESSAGE], |text| header.push_str(text)).is_none() {
                        return;
                    }
                    let header = std::mem::take(header);
                    self.state = self.message(header);
                }
                state => {
                    let found = self.scanner.next(&ENDS, |text| match state {
                        State::Analysis => parts.reasoning(text),
                        State::Call { name, arguments, has_begun, .. } => {
                            push_arguments(text, name, arguments, has_begun, parts);
                        }
                        State::Final | State::Header(_) => parts.content(text),
                    });
                    let Some(found) = found else { return };
                    self.end_message(parts);
                    if let State::Header(header) = &mut self.state
                        && ENDS[found.mark] == CHANNEL
                    {
                        header.push_str(CHANNEL);
                    }
                }
            }
        }
    }

    fn is_reasoning(&self) -> bool {
        matches!(self.state, State::Analysis)
    }

    fn finish(&mut self, parts: &mut Parts) {
        let rest = self.scanner.take();
        match &mut self.state {
            // A model that does not keep to the dialect: its words are not lost.
            State::Header(header) => {
                let header = std::mem::take(header) + &rest;
                if !header.trim_start().starts_with('<') {
                    parts.content(&header);
                }
            }
            State::Analysis => parts.reasoning(&rest),
            State::Final => parts.content(&rest),
            State::Call { name, arguments, has_begun, .. } => {
                push_arguments(&rest, name, arguments, has_begun, parts);
            }
        }
        self.end_message(parts);
    }
}
