//! What a schema does not allow, as a schema.

use serde_json::{Value, json};

use super::TYPES;

/// A schema that allows exactly what this one does not, where there is one of a few keywords.
pub(super) fn negate(schema: &Value) -> Option<Value> {
    let fields = match schema {
        Value::Bool(allows) => return Some(Value::Bool(!allows)),
        Value::Object(fields) => fields,
        _ => return None,
    };
    // All keywords must hold, so it is enough that one does not.
    let mut alternatives = Vec::new();
    for (keyword, value) in fields {
        alternatives.push(negate_keyword(keyword, value)?);
    }
    Some(match alternatives.len() {
        0 => Value::Bool(false),
        1 => alternatives.remove(0),
        _ => json!({"anyOf": alternatives}),
    })
}

fn negate_keyword(keyword: &str, value: &Value) -> Option<Value> {
    let one_more = |count: &Value| count.as_u64().and_then(|count| count.checked_add(1));
    let one_less = |count: &Value| count.as_u64().map(|count| count.checked_sub(1));
    // What is of another type is allowed by the keyword, and so is not by its negation.
    let fewer = |kind: &str, most: &str, count: Option<u64>| match count {
        Some(count) => json!({"type": kind, most: count}),
        None => Value::Bool(false),
    };
    Some(match keyword {
        "type" => {
            let named: Vec<&str> = match value {
                Value::String(name) => vec![name],
                Value::Array(names) => names.iter().map(Value::as_str).collect::<Option<_>>()?,
                _ => return None,
            };
            if named.contains(&"integer") && !named.contains(&"number") {
                return None;
            }
            let others: Vec<&str> = TYPES.into_iter().filter(|name| !named.contains(name)).collect();
            if others.is_empty() { Value::Bool(false) } else { json!({"type": others}) }
        }
        "required" => {
            let absent = |name: &Value| Some(json!({"type": "object", "properties": {name.as_str()?: false}}));
            json!({"anyOf": value.as_array()?.iter().map(absent).collect::<Option<Vec<_>>>()?})
        }
        "properties" => {
            let differs = |(name, schema): (&String, &Value)| {
                Some(json!({"type": "object", "required": [name], "properties": {name: negate(schema)?}}))
            };
            json!({"anyOf": value.as_object()?.iter().map(differs).collect::<Option<Vec<_>>>()?})
        }
        "anyOf" => json!({"allOf": value.as_array()?.iter().map(negate).collect::<Option<Vec<_>>>()?}),
        "allOf" => json!({"anyOf": value.as_array()?.iter().map(negate).collect::<Option<Vec<_>>>()?}),
        "not" => value.clone(),
        "minimum" => json!({"type": "number", "exclusiveMaximum": value}),
        "maximum" => json!({"type": "number", "exclusiveMinimum": value}),
        "exclusiveMinimum" => json!({"type": "number", "maximum": value}),
        "exclusiveMaximum" => json!({"type": "number", "minimum": value}),
        "maxLength" => json!({"type": "string", "minLength": one_more(value)?}),
        "maxItems" => json!({"type": "array", "minItems": one_more(value)?}),
        "minLength" => fewer("string", "maxLength", one_less(value)?),
        "minItems" => fewer("array", "maxItems", one_less(value)?),
        "$comment" | "title" | "description" | "default" | "examples" => Value::Bool(false),
        _ => return None,
    })
}
