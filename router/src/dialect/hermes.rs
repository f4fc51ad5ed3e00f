//! Hermes, Qwen 2.5 and 3: `<tool_call>` JSON `</tool_call>`, once for each call.

use super::json_stream::CallBlock;
use super::scan::{Content, Scanner};
use super::{Parts, TextParser};

pub(super) const BEGIN: &str = "<tool_call>";
pub(super) const END: &str = "</tool_call>";

/// See the module's text.
#[derive(Default)]
pub(super) struct Parser {
    scanner: Scanner,
    content: Content,
    block: Option<CallBlock>,
}

impl TextParser for Parser {
    fn push(&mut self, text: &str, parts: &mut Parts) {
        let Self { scanner, content, block } = self;
        scanner.push(text);
        loop {
            match block {
                None => {
                    if scanner.next(&[BEGIN], |text| content.push(text, |text| parts.content(text))).is_none() {
                        return;
                    }
                    *block = Some(CallBlock::new(BEGIN.to_owned()));
                }
                Some(open) => {
                    if scanner.next(&[END], |text| open.push(text, content, parts)).is_none() {
                        return;
                    }
                    if let Some(open) = block.take() {
                        open.end(END, content, parts);
                    }
                }
            }
        }
    }

    fn finish(&mut self, parts: &mut Parts) {
        let rest = self.scanner.take();
        match self.block.take() {
            // Some models end their answer in place of the last mark.
            Some(mut block) => {
                block.push(&rest, &mut self.content, parts);
                block.end("", &mut self.content, parts);
            }
            None => self.content.push(&rest, |text| parts.content(text)),
        }
        self.content.finish(|text| parts.content(text));
    }
}
