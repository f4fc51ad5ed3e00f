//! Dialects that put calls between two marks.

use super::scan::{Content, Scanner};
use super::{ParsedCall, Parts, TextParser};

/// Content, and blocks between `begin` and `end` that `parse` reads. A block that it cannot read is content, marks and all.
pub(super) struct Blocks<P> {
    begin: &'static str,
    end: &'static str,
    parse: P,
    scanner: Scanner,
    content: Content,
    /// Inside a block: what it holds so far.
    block: Option<String>,
}

impl<P: Fn(&str) -> Option<Vec<ParsedCall>> + Send> Blocks<P> {
    pub(super) fn new(begin: &'static str, end: &'static str, parse: P) -> Self {
        Self { begin, end, parse, scanner: Scanner::default(), content: Content::default(), block: None }
    }

    fn end_block(&mut self, block: &str, is_closed: bool, parts: &mut Parts) {
        match (self.parse)(block) {
            Some(calls) if !calls.is_empty() => {
                self.content.call();
                calls.into_iter().for_each(|call| parts.call(call));
            }
            _ => {
                let end = if is_closed { self.end } else { "" };
                for text in [self.begin, block, end] {
                    self.content.push(text, |text| parts.content(text));
                }
            }
        }
    }
}

impl<P: Fn(&str) -> Option<Vec<ParsedCall>> + Send> TextParser for Blocks<P> {
    fn push(&mut self, text: &str, parts: &mut Parts) {
        self.scanner.push(text);
        loop {
            match self.block.take() {
                None => {
                    let content = &mut self.content;
                    let found = self.scanner.next(&[self.begin], |text| content.push(text, |text| parts.content(text)));
                    if found.is_none() {
                        return;
                    }
                    self.block = Some(String::new());
                }
                Some(mut block) => {
                    if self.scanner.next(&[self.end], |text| block.push_str(text)).is_none() {
                        self.block = Some(block);
                        return;
                    }
                    self.end_block(&block, true, parts);
                }
            }
        }
    }

    fn finish(&mut self, parts: &mut Parts) {
        let rest = self.scanner.take();
        match self.block.take() {
            // Some models end their answer in place of the last mark.
            Some(block) => self.end_block(&(block + &rest), false, parts),
            None => self.content.push(&rest, |text| parts.content(text)),
        }
        self.content.finish(|text| parts.content(text));
    }
}
