//! Dialects that put calls between two marks.

use super::scan::{Content, Scanner};
use super::{Parts, TextParser};

/// What is between the marks, as it comes.
pub(super) trait Block: Send {
    fn push(&mut self, text: &str, content: &mut Content, parts: &mut Parts);

    /// Whether what came so far ends inside a value: a mark there is part of the value, and ends nothing.
    fn is_in_value(&mut self) -> bool;

    /// The block ends with this mark, or, where that is empty, with the answer: some models end one in place of the mark.
    fn end(self, end: &str, content: &mut Content, parts: &mut Parts);
}

/// Content, and blocks between `begin` and `end`, each of which `open` begins.
pub(super) struct Blocks<B, F> {
    begin: &'static str,
    end: &'static str,
    open: F,
    scanner: Scanner,
    content: Content,
    /// Inside a block.
    block: Option<B>,
}

impl<B: Block, F: Fn() -> B + Send> Blocks<B, F> {
    pub(super) fn new(begin: &'static str, end: &'static str, open: F) -> Self {
        Self { begin, end, open, scanner: Scanner::default(), content: Content::default(), block: None }
    }
}

impl<B: Block, F: Fn() -> B + Send> TextParser for Blocks<B, F> {
    fn push(&mut self, text: &str, parts: &mut Parts) {
        let Self { begin, end, open, scanner, content, block } = self;
        scanner.push(text);
        loop {
            match block {
                None => {
                    if scanner.next(&[*begin], |text| content.push(text, |text| parts.content(text))).is_none() {
                        return;
                    }
                    *block = Some(open());
                }
                Some(inside) => {
                    if scanner.next(&[*end], |text| inside.push(text, content, parts)).is_none() {
                        return;
                    }
                    if inside.is_in_value() {
                        inside.push(end, content, parts);
                    } else if let Some(inside) = block.take() {
                        inside.end(end, content, parts);
                    }
                }
            }
        }
    }

    fn finish(&mut self, parts: &mut Parts) {
        let rest = self.scanner.take();
        match self.block.take() {
            Some(mut block) => {
                block.push(&rest, &mut self.content, parts);
                block.end("", &mut self.content, parts);
            }
            None => self.content.push(&rest, |text| parts.content(text)),
        }
        self.content.finish(|text| parts.content(text));
    }
}
