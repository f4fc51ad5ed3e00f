//! Llama 3.1 and later: the whole answer is one JSON object, or several with semicolons between them, perhaps behind
//! `<|python_tag|>`.

use super::blocks::Block;
use super::json_stream::CallBlock;
use super::scan::Content;
use super::{Parts, TextParser};

pub(super) const PYTHON_TAG: &str = "<|python_tag|>";

/// See the module's text.
#[derive(Default)]
pub(super) struct Parser {
    opening: WholeAnswer,
    content: Content,
    calls: Option<CallBlock>,
}

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

    /// What was held, in two, once an object or `mark` begins it: the object, or what follows the mark, is the second.
    fn split(&mut self, mark: &str) -> Option<(String, String)> {
        if self.is_text {
            return None;
        }
        let opening = &self.held[self.space_len..];
        let at = if opening.starts_with('{') {
            self.space_len
        } else if opening.starts_with(mark) {
            self.space_len + mark.len()
        } else {
            return None;
        };
        let rest = self.held.split_off(at);
        Some((self.take(), rest))
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
        if let Some(calls) = &mut self.calls {
            return calls.push(text, &mut self.content, parts);
        }
        self.opening.push(text, |opening| may_begin(opening, "{") || may_begin(opening, PYTHON_TAG), parts);
        if let Some((begin, rest)) = self.opening.split(PYTHON_TAG) {
            let mut calls = CallBlock::new(begin);
            calls.push(&rest, &mut self.content, parts);
            self.calls = Some(calls);
        }
    }

    fn finish(&mut self, parts: &mut Parts) {
        match self.calls.take() {
            Some(calls) => calls.end("", &mut self.content, parts),
            None => parts.content(&self.opening.take()),
        }
        self.content.finish(|text| parts.content(text));
    }
}
