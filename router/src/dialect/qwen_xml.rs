//! Qwen3-Coder: `<tool_call>` around `<function=name>` around `<parameter=name>`; values are text, typed by the tool's schema.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::blocks::{Block, Blocks};
use super::hermes::{BEGIN, END};
use super::scan::Content;
use super::{ParsedCall, Parts, TextParser};
use crate::generation::Tool;

pub(super) const FUNCTION: &str = "<function=";
const FUNCTION_END: &str = "</function>";
const PARAMETER: &str = "<parameter=";
const PARAMETER_END: &str = "</parameter>";

pub(super) fn parser(tools: Arc<[Tool]>) -> impl TextParser {
    Blocks::new(BEGIN, END, move || WholeBlock {
        text: String::new(),
        looked_at: 0,
        in_value: false,
        tools: Arc::clone(&tools),
    })
}

/// Read when it is whole: values are typed by what is behind them. One that cannot be read is content, marks and all.
struct WholeBlock {
    text: String,
    /// How much of it was looked at for where values begin and end.
    looked_at: usize,
    in_value: bool,
    tools: Arc<[Tool]>,
}

impl Block for WholeBlock {
    fn push(&mut self, text: &str, _: &mut Content, _: &mut Parts) {
        self.text.push_str(text);
    }

    fn is_in_value(&mut self) -> bool {
        let mut scanned = &self.text[self.looked_at..];
        loop {
            let mark = if self.in_value { PARAMETER_END } else { PARAMETER };
            let Some(at) = scanned.find(mark) else { break };
            scanned = &scanned[at + mark.len()..];
            self.in_value = !self.in_value;
        }
        // A call ends at the first mark of its end: behind it the end of the value was forgotten.
        let is_broken = self.in_value && scanned.contains(FUNCTION_END);
        // The mark that comes next is part of none of these.
        self.looked_at = self.text.len();
        self.in_value && !is_broken
    }

    fn end(self, end: &str, content: &mut Content, parts: &mut Parts) {
        let calls: Option<Vec<_>> = self.text.split(FUNCTION).skip(1).map(|text| call(text, &self.tools)).collect();
        match calls {
            Some(calls) if !calls.is_empty() => {
                content.call();
                calls.into_iter().for_each(|call| parts.call(call));
            }
            _ => {
                for text in [BEGIN, &self.text, end] {
                    content.push(text, |text| parts.content(text));
                }
            }
        }
    }
}

fn call(text: &str, tools: &[Tool]) -> Option<ParsedCall> {
    let (name, body) = text.split_once('>')?;
    let name = name.trim();
    // Without its end it was cut off.
    let (body, _) = body.split_once(FUNCTION_END)?;
    let schema = tools.iter().find(|tool| tool.name == name).map(|tool| &tool.parameters);
    let mut arguments = Map::new();
    for parameter in body.split(PARAMETER).skip(1) {
        let (key, value) = parameter.split_once('>')?;
        let (value, _) = value.split_once(PARAMETER_END)?;
        // One line break on either side is the dialect's, not the value's.
        let value = value.strip_prefix('\n').unwrap_or(value);
        let value = value.strip_suffix('\n').unwrap_or(value);
        let of_key = schema.and_then(|schema| schema.get("properties")?.get(key.trim()));
        arguments.insert(key.trim().to_owned(), typed(value, of_key));
    }
    (!name.is_empty()).then(|| ParsedCall { name: name.to_owned(), arguments: Value::Object(arguments).to_string() })
}

/// Whether the schema says that a value is text.
pub(super) fn is_text(schema: Option<&Value>) -> bool {
    schema.and_then(|schema| schema.get("type")).and_then(Value::as_str) == Some("string")
}

/// Text stays text where the schema says so; elsewhere it is JSON where it can be read as such.
fn typed(value: &str, schema: Option<&Value>) -> Value {
    if is_text(schema) {
        return Value::from(value);
    }
    match value.trim() {
        "True" => Value::Bool(true),
        "False" => Value::Bool(false),
        "None" => Value::Null,
        trimmed => serde_json::from_str(trimmed).unwrap_or_else(|_| Value::from(value)),
    }
}
