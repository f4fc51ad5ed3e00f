//! Hermes, Qwen 2.5 and 3: `<tool_call>` JSON `</tool_call>`, once for each call.

use super::TextParser;
use super::blocks::Blocks;
use super::json_stream::CallBlock;

pub(super) const BEGIN: &str = "<tool_call>";
pub(super) const END: &str = "</tool_call>";

pub(super) fn parser() -> impl TextParser {
    Blocks::new(BEGIN, END, || CallBlock::new(BEGIN.to_owned()))
}
