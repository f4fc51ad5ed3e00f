//! DeepSeek V3 and R1: calls between marks of their own; a call is `function<sep>NAME` and fenced JSON, or since V3.1
//! `NAME<sep>` and JSON.

use super::blocks::Blocks;
use super::{ParsedCall, TextParser};

pub(super) const CALLS_BEGIN: &str = "<｜tool▁calls▁begin｜>";
pub(super) const CALLS_END: &str = "<｜tool▁calls▁end｜>";
pub(super) const CALL_BEGIN: &str = "<｜tool▁call▁begin｜>";
pub(super) const CALL_END: &str = "<｜tool▁call▁end｜>";
pub(super) const SEP: &str = "<｜tool▁sep｜>";
pub(super) const MARKS: [&str; 5] = [CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEP];

pub(super) fn parser() -> impl TextParser {
    Blocks::new(CALLS_BEGIN, CALLS_END, |block: &str| -> Option<Vec<ParsedCall>> {
        block.split(CALL_BEGIN).skip(1).map(call).collect()
    })
}

fn call(text: &str) -> Option<ParsedCall> {
    let text = text.split(CALL_END).next()?;
    let (kind, rest) = text.split_once(SEP)?;
    let (name, arguments) = match rest.split_once("```json") {
        Some((name, fenced)) => (name, fenced.trim().strip_suffix("```")?),
        None => (kind, rest),
    };
    let (name, arguments) = (name.trim(), arguments.trim());
    serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(arguments).ok()?;
    (!name.is_empty()).then(|| ParsedCall { name: name.to_owned(), arguments: arguments.to_owned() })
}
