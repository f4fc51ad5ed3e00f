//! Values as JSON, in the words that models were trained on.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

use super::MAX_RECURSION;

/// `tojson` as transformers has it: Python's `json.dumps` with `ensure_ascii=False`, and nothing escaped for HTML.
pub(super) fn to_json(state: &State, value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Accepted because templates pass them; these are the only values that they can have here.
    let _: (Option<Value>, Option<Value>, Option<Value>) =
        (options.get("ensure_ascii")?, options.get("separators")?, options.get("sort_keys")?);
    options.assert_all_used()?;
    let mut text = String::new();
    write_json(state, value, indent.map(|indent| indent.min(16)), 0, &mut text)?;
    Ok(text)
}

fn write_json(
    state: &State,
    value: &Value,
    indent: Option<usize>,
    depth: usize,
    text: &mut String,
) -> Result<(), Error> {
    if depth > MAX_RECURSION {
        return Err(Error::new(ErrorKind::InvalidOperation, "the value is nested too deeply"));
    }
    state.consume_fuel(1)?;
    let new_line = |text: &mut String, depth: usize| {
        if let Some(indent) = indent {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    let separator = if indent.is_some() { "," } else { ", " };
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => text.push_str("null"),
        ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => {
            let _ = write!(text, "{value}");
        }
        ValueKind::String => push_json_string(value.as_str().unwrap_or_default(), text),
        ValueKind::Map => {
            text.push('{');
            let mut empty = true;
            for key in value.try_iter()? {
                text.push_str(if empty { "" } else { separator });
                empty = false;
                new_line(text, depth + 1);
                match key.as_str() {
                    Some(key) => push_json_string(key, text),
                    None => push_json_string(&key.to_string(), text),
                }
                text.push_str(": ");
                write_json(state, &value.get_item(&key)?, indent, depth + 1, text)?;
            }
            if !empty {
                new_line(text, depth);
            }
            text.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            text.push('[');
            let mut empty = true;
            for item in value.try_iter()? {
                text.push_str(if empty { "" } else { separator });
                empty = false;
                new_line(text, depth + 1);
                write_json(state, &item, indent, depth + 1, text)?;
            }
            if !empty {
                new_line(text, depth);
            }
            text.push(']');
        }
        _ => return Err(Error::new(ErrorKind::InvalidOperation, "the value has no JSON form")),
    }
    Ok(())
}

fn push_json_string(value: &str, text: &mut String) {
    text.push_str(&serde_json::Value::from(value).to_string());
}
