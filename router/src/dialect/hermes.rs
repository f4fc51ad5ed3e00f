//! Hermes, Qwen 2.5 and 3: `<tool_call>` JSON `</tool_call>`, once for each call.

use super::blocks::Blocks;
use super::{ParsedCall, TextParser, json_calls};

pub(super) const BEGIN: &str = "<tool_call>";
pub(super) const END: &str = "</tool_call>";

pub(super) fn parser() -> impl TextParser {
    Blocks::new(BEGIN, END, |block: &str| -> Option<Vec<ParsedCall>> { json_calls::one_or_list(block) })
}
