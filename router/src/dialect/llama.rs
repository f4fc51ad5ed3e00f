//! Llama 3.1 and later: the whole answer is one JSON object, or several with semicolons between them, perhaps behind
//! `<|python_tag|>`.

use super::{Parts, TextParser, json_calls};

pub(super) const PYTHON_TAG: &str = "<|python_tag|>";

/// See the module's text.
#[derive(Default)]
pub(super) struct Parser(WholeAnswer);

/// An answer that is held back as long as it may be calls.
#[derive(Default)]
pub(super) struct WholeAnswer {
    held: String,
    /// White space at its beginning.
    space_len: usize,
    /// It is text, and goes by.
    is_text: bool,
}

impl WholeAnswer {
    /// `begins` says whether what came so far, white space before it left out, may begin calls.
    pub(super) fn push(&mut self, text: &str, begins: impl Fn(&str) -> bool, parts: &mut Parts) {
        if self.is_text {
            return parts.content(text);
        }
        if self.space_len == self.held.len() {
            self.space_len += text.len() - text.trim_start().len();
        }
        // Only the first bytes decide: later ones are not looked at again.
        let decided = self.held.len() > self.space_len + MAX_OPENING_BYTES;
        self.held.push_str(text);
        let opening = &self.held[self.space_len..];
        if !decided && !opening.is_empty() && !begins(opening) {
            self.is_text = true;
            parts.content(&std::mem::take(&mut self.held));
        }
    }

    pub(super) fn take(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// More than any opening has.
const MAX_OPENING_BYTES: usize = 64;

/// Whether `text` begins with `mark`, or may once more of it has come.
pub(super) fn may_begin(text: &str, mark: &str) -> bool {
    text.starts_with(mark) || mark.starts_with(text)
}

impl TextParser for Parser {
    fn push(&mut self, text: &str, parts: &mut Parts) {
        self.0.push(text, |opening| may_begin(opening, "{") || may_begin(opening, PYTHON_TAG), parts);
    }

    fn finish(&mut self, parts: &mut Parts) {
        let held = self.0.take();
        let body = held.trim_start();
        match json_calls::sequence(body.strip_prefix(PYTHON_TAG).unwrap_or(body)) {
            Some(calls) => calls.into_iter().for_each(|call| parts.call(call)),
            None => parts.content(&held),
        }
    }
}
