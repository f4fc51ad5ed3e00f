//! Reasoning between `<think>` and `</think>` at the beginning of an answer.

use super::scan::Scanner;
use super::{Parts, TextParser};

pub(super) const BEGIN: &str = "<think>";
pub(super) const END: &str = "</think>";

/// Whether a prompt ends inside a thought: templates of some models open one.
pub(crate) fn is_in_thought(prompt: &str) -> bool {
    prompt.trim_end().ends_with(BEGIN)
}

/// Whether a prompt ends behind a thought: templates close an empty one where none is wanted.
pub(crate) fn is_behind_thought(prompt: &str) -> bool {
    prompt.trim_end().ends_with(END)
}

/// Reasoning, then content. White space around a thought belongs to nobody.
pub(super) struct ThinkSplitter {
    state: State,
    scanner: Scanner,
    /// White space that is said only if something follows.
    space: String,
    has_spoken: bool,
}

enum State {
    /// Nothing but white space so far.
    Before,
    Inside,
    /// Behind a thought; nothing but white space so far.
    Behind,
    Content,
}

impl ThinkSplitter {
    pub(super) fn new(in_thought: bool) -> Self {
        let state = if in_thought { State::Inside } else { State::Before };
        Self { state, scanner: Scanner::default(), space: String::new(), has_spoken: false }
    }

    fn reason(&mut self, text: &str, parts: &mut Parts) {
        let body = text.trim_end();
        if !body.is_empty() {
            let space = std::mem::take(&mut self.space);
            let body = if self.has_spoken { body } else { body.trim_start() };
            if self.has_spoken {
                parts.reasoning(&space);
            }
            parts.reasoning(body);
            self.has_spoken = true;
        }
        self.space.push_str(&text[text.trim_end().len()..]);
    }
}

impl TextParser for ThinkSplitter {
    fn push(&mut self, text: &str, parts: &mut Parts) {
        self.scanner.push(text);
        loop {
            match self.state {
                State::Before => {
                    let held = self.scanner.take();
                    let opening = held.trim_start();
                    self.space.push_str(&held[..held.len() - opening.len()]);
                    if let Some(rest) = opening.strip_prefix(BEGIN) {
                        self.space.clear();
                        self.scanner.push(rest);
                        self.state = State::Inside;
                    } else if BEGIN.starts_with(opening) {
                        self.scanner.push(opening);
                        return;
                    } else {
                        parts.content(&std::mem::take(&mut self.space));
                        self.scanner.push(opening);
                        self.state = State::Content;
                    }
                }
                State::Inside => {
                    let mut thought = String::new();
                    let found = self.scanner.next(&[END], |text| thought.push_str(text));
                    self.reason(&thought, parts);
                    if found.is_none() {
                        return;
                    }
                    self.state = State::Behind;
                }
                State::Behind => {
                    let held = self.scanner.take();
                    let rest = held.trim_start();
                    if rest.is_empty() {
                        return;
                    }
                    self.scanner.push(rest);
                    self.state = State::Content;
                }
                State::Content => {
                    parts.content(&self.scanner.take());
                    return;
                }
            }
        }
    }

    fn is_reasoning(&self) -> bool {
        matches!(self.state, State::Inside)
    }

    fn finish(&mut self, parts: &mut Parts) {
        let rest = self.scanner.take();
        match self.state {
            State::Inside => self.reason(&rest, parts),
            State::Before => {
                parts.content(&std::mem::take(&mut self.space));
                parts.content(&rest);
            }
            State::Content => parts.content(&rest),
            State::Behind => {}
        }
    }
}
