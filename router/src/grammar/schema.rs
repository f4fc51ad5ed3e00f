//! What can be said of a JSON schema before it is compiled: its size, its depth, and keywords that are not enforced.

use serde_json::Value;

use super::rewrite::{for_each_schema, rewrite, why_nothing};
use super::source::check_regex;
use super::{GrammarError, GrammarLimits};

/// A schema's text, parsed and within its limits.
pub(super) fn parse_schema(text: &str, limits: &GrammarLimits) -> Result<Value, GrammarError> {
    if text.len() > limits.max_bytes {
        return Err(GrammarError::TooLarge { what: "its bytes", limit: limits.max_bytes as u64 });
    }
    let schema: Value =
        serde_json::from_str(text).map_err(|_| GrammarError::Invalid { why: "is not JSON".to_owned() })?;
    check_schema(&schema, limits)?;
    if let Some(keyword) = why_nothing(&schema) {
        return Err(GrammarError::Invalid {
            why: format!("allows nothing: `{keyword}` leaves no value that could be right"),
        });
    }
    Ok(rewrite(schema))
}

/// Most keywords that one refusal names.
const MAX_NAMED: usize = 6;
/// Keywords that can make a schema costly to enforce, the costliest first; and those that can make one that nothing satisfies.
const COSTLY: [&str; 16] = [
    "multipleOf",
    "pattern",
    "patternProperties",
    "maxLength",
    "minLength",
    "maxItems",
    "minItems",
    "maxProperties",
    "minProperties",
    "format",
    "oneOf",
    "anyOf",
    "allOf",
    "enum",
    "properties",
    "$ref",
];
const LIMITING: [&str; 11] = [
    "not",
    "type",
    "const",
    "required",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "additionalProperties",
    "items",
    "prefixItems",
];

/// The keywords that a refusal is about where the compiler names none: those of the schema that can be at fault, in words to be
/// put behind it.
pub(super) fn at_fault(schema: &Value) -> String {
    let mut used = std::collections::BTreeSet::new();
    let known = || COSTLY.into_iter().chain(LIMITING);
    for_each_schema(&mut schema.clone(), &mut |fields| {
        used.extend(known().filter(|keyword| fields.contains_key(*keyword)));
    });
    let names: Vec<String> = known()
        .filter(|keyword| used.contains(keyword))
        .take(MAX_NAMED)
        .map(|keyword| format!("`{keyword}`"))
        .collect();
    if names.is_empty() { String::new() } else { format!(" (look at {})", names.join(", ")) }
}

/// Fails where a schema is too large, or holds options that are not the caller's.
pub(super) fn check_schema(schema: &Value, limits: &GrammarLimits) -> Result<(), GrammarError> {
    if !schema.is_object() && !schema.is_boolean() {
        return Err(GrammarError::Invalid { why: "must be an object or a boolean".to_owned() });
    }
    // Without recursion: the depth is the caller's.
    let mut num_nodes = 0;
    let mut open = vec![(schema, 1)];
    while let Some((value, depth)) = open.pop() {
        num_nodes += 1;
        if depth > limits.max_depth {
            return Err(GrammarError::TooLarge { what: "its depth", limit: limits.max_depth as u64 });
        }
        if num_nodes > limits.max_nodes {
            return Err(GrammarError::TooLarge { what: "the number of its values", limit: limits.max_nodes as u64 });
        }
        match value {
            Value::Array(items) => open.extend(items.iter().map(|item| (item, depth + 1))),
            Value::Object(fields) => {
                for (name, value) in fields {
                    check_keyword(name, value, limits)?;
                    open.push((value, depth + 1));
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Numbers of repetitions are counted out by an automaton.
fn check_keyword(name: &str, value: &Value, limits: &GrammarLimits) -> Result<(), GrammarError> {
    match name {
        "pattern" => value.as_str().map_or(Ok(()), |regex| check_regex(regex, limits)),
        "patternProperties" => match value {
            Value::Object(patterns) => patterns.keys().try_for_each(|regex| check_regex(regex, limits)),
            _ => Ok(()),
        },
        "x-guidance" => Err(GrammarError::Unsupported { keyword: name.to_owned(), why: "" }),
        "minItems" | "maxItems" | "minLength" | "maxLength" | "minProperties" | "maxProperties" => {
            match value.as_f64() {
                Some(count) if count > limits.max_repeats as f64 => {
                    let what = match name {
                        "minItems" => "`minItems`",
                        "maxItems" => "`maxItems`",
                        "minLength" => "`minLength`",
                        "maxLength" => "`maxLength`",
                        "minProperties" => "`minProperties`",
                        _ => "`maxProperties`",
                    };
                    Err(GrammarError::TooLarge { what, limit: limits.max_repeats })
                }
                _ => Ok(()),
            }
        }
        _ => Ok(()),
    }
}
