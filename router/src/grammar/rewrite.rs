//! Keywords of JSON schema that the compiler does not know, said by keywords that it knows. Every rewriting here means exactly
//! what was written; what has no such form stays as it is, and is refused by its name.

use serde_json::{Map, Value, json};

type Fields = Map<String, Value>;

/// All types; `integer` is part of `number`.
const TYPES: [&str; 6] = ["null", "boolean", "object", "array", "number", "string"];
/// Keywords whose value is a schema.
const SCHEMAS: [&str; 11] = [
    "additionalProperties",
    "items",
    "not",
    "if",
    "then",
    "else",
    "contains",
    "propertyNames",
    "unevaluatedProperties",
    "unevaluatedItems",
    "additionalItems",
];
/// Keywords whose value is a list of schemas, and those whose value maps names to schemas.
const LISTS: [&str; 4] = ["allOf", "anyOf", "oneOf", "prefixItems"];
const MAPS: [&str; 5] = ["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"];
/// Keywords that decide which properties and items count as evaluated, beside those that name them.
const APPLICATORS: [&str; 8] =
    ["$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "dependencies"];

/// The same schema in fewer kinds of keywords. Recurses as deep as the schema nests, which is bounded before.
pub(super) fn rewrite(schema: Value) -> Value {
    let Value::Object(mut fields) = schema else { return schema };
    for keyword in SCHEMAS {
        if let Some(inner) = fields.get_mut(keyword) {
            *inner = rewrite(inner.take());
        }
    }
    for keyword in LISTS {
        if let Some(Value::Array(items)) = fields.get_mut(keyword) {
            items.iter_mut().for_each(|item| *item = rewrite(item.take()));
        }
    }
    for keyword in MAPS {
        if let Some(Value::Object(of_names)) = fields.get_mut(keyword) {
            of_names.values_mut().for_each(|item| *item = rewrite(item.take()));
        }
    }
    unevaluated(&mut fields);
    contains(&mut fields);
    let mut also = Vec::new();
    conditional(&mut fields, &mut also);
    dependencies(&mut fields, &mut also);
    property_names(&mut fields, &mut also);
    if let Some(negated) = fields.get("not").and_then(negate) {
        fields.remove("not");
        also.push(negated);
    }
    if fields.get("uniqueItems") == Some(&Value::Bool(false))
        || fields.get("maxItems").and_then(Value::as_u64).is_some_and(|count| count <= 1)
    {
        fields.remove("uniqueItems");
    }
    if !also.is_empty() {
        match fields.get_mut("allOf") {
            Some(Value::Array(items)) => items.extend(also),
            _ => drop(fields.insert("allOf".to_owned(), also.into())),
        }
    }
    Value::Object(fields)
}

/// Whether a schema allows everything.
fn is_anything(schema: &Value) -> bool {
    schema == &Value::Bool(true) || schema.as_object().is_some_and(Map::is_empty)
}

/// Where nothing else evaluates, what is not evaluated is what is additional.
fn unevaluated(fields: &mut Fields) {
    let is_plain = !APPLICATORS.iter().any(|keyword| fields.contains_key(*keyword));
    for (keyword, named, plain) in [
        ("unevaluatedProperties", "additionalProperties", is_plain),
        ("unevaluatedItems", "items", is_plain && !fields.contains_key("contains")),
    ] {
        let Some(schema) = fields.get(keyword) else { continue };
        if is_anything(schema) || (plain && fields.contains_key(named)) {
            fields.remove(keyword);
        } else if plain && let Some(schema) = fields.remove(keyword) {
            fields.insert(named.to_owned(), schema);
        }
    }
}

fn contains(fields: &mut Fields) {
    let Some(schema) = fields.get("contains") else {
        fields.remove("minContains");
        fields.remove("maxContains");
        return;
    };
    let least = fields.get("minContains").map_or(Some(1), Value::as_u64);
    let most = fields.get("maxContains");
    if least == Some(0) && most.is_none() {
        fields.remove("contains");
        fields.remove("minContains");
    } else if is_anything(schema)
        && let Some(least) = least
        && most.is_none_or(Value::is_u64)
    {
        // Every item is one of those that are counted.
        let most = most.and_then(Value::as_u64);
        fields.remove("contains");
        fields.remove("minContains");
        fields.remove("maxContains");
        let at_least = fields.get("minItems").and_then(Value::as_u64).map_or(least, |count| count.max(least));
        fields.insert("minItems".to_owned(), at_least.into());
        if let Some(most) = most {
            let at_most = fields.get("maxItems").and_then(Value::as_u64).map_or(most, |count| count.min(most));
            fields.insert("maxItems".to_owned(), at_most.into());
        }
    }
}

fn conditional(fields: &mut Fields, also: &mut Vec<Value>) {
    let Some(condition) = fields.get("if") else {
        fields.remove("then");
        fields.remove("else");
        return;
    };
    let has_branches = fields.contains_key("then") || fields.contains_key("else");
    let negated = negate(condition);
    if has_branches && negated.is_none() {
        return;
    }
    let condition = fields.remove("if").unwrap_or_default();
    let (then, otherwise) = (fields.remove("then"), fields.remove("else"));
    if let (true, Some(negated)) = (has_branches, negated) {
        let both = |first: Value, second: Option<Value>| match second {
            Some(second) => json!({"allOf": [first, second]}),
            None => first,
        };
        also.push(json!({"anyOf": [both(condition, then), both(negated, otherwise)]}));
    }
}

fn dependencies(fields: &mut Fields, also: &mut Vec<Value>) {
    for keyword in ["dependentRequired", "dependentSchemas", "dependencies"] {
        let Some(Value::Object(of_names)) = fields.get(keyword) else { continue };
        let is_list = |value: &Value| value.as_array().is_some_and(|names| names.iter().all(Value::is_string));
        let is_schema = |value: &Value| value.is_object() || value.is_boolean();
        if !of_names.values().all(|value| is_list(value) || is_schema(value)) {
            continue;
        }
        for (name, needs) in of_names {
            let present = match needs {
                Value::Array(names) => {
                    let names: Vec<&Value> = names.iter().collect();
                    json!({"required": std::iter::once(&json!(name)).chain(names).collect::<Vec<_>>()})
                }
                schema => json!({"required": [name], "allOf": [schema]}),
            };
            also.push(json!({"anyOf": [{"properties": {name: false}}, present]}));
        }
        fields.remove(keyword);
    }
}

fn property_names(fields: &mut Fields, also: &mut Vec<Value>) {
    let Some(names) = fields.get("propertyNames") else { return };
    let only = |patterns: Value| json!({"patternProperties": patterns, "additionalProperties": false});
    let rewritten = match names {
        _ if is_anything(names) => None,
        Value::Bool(false) => Some(json!({"properties": {}, "additionalProperties": false})),
        Value::Object(keywords) if keywords.len() == 1 => match keywords.iter().next() {
            Some((keyword, Value::String(pattern))) if keyword == "pattern" => Some(only(json!({pattern: true}))),
            Some((keyword, Value::Array(values))) if keyword == "enum" => {
                let names = values.iter().filter_map(|value| Some((value.as_str()?.to_owned(), Value::Bool(true))));
                Some(json!({"properties": names.collect::<Fields>(), "additionalProperties": false}))
            }
            Some((keyword, Value::String(name))) if keyword == "const" => {
                Some(json!({"properties": {name: true}, "additionalProperties": false}))
            }
            _ => return,
        },
        _ => return,
    };
    fields.remove("propertyNames");
    also.extend(rewritten);
}

/// A schema that allows exactly what this one does not, where there is one of a few keywords.
fn negate(schema: &Value) -> Option<Value> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn check(written: Value, expected: Value) {
        assert_eq!(rewrite(written.clone()), expected, "{written}");
    }

    #[test]
    fn what_the_compiler_does_not_know_is_said_by_what_it_knows() {
        check(json!({"unevaluatedProperties": false}), json!({"additionalProperties": false}));
        check(
            json!({"properties": {"a": {}}, "additionalProperties": {"type": "string"}, "unevaluatedProperties": false}),
            json!({"properties": {"a": {}}, "additionalProperties": {"type": "string"}}),
        );
        check(
            json!({"prefixItems": [true], "unevaluatedItems": false}),
            json!({"prefixItems": [true], "items": false}),
        );
        check(json!({"contains": {"type": "integer"}, "minContains": 0}), json!({}));
        check(json!({"contains": true, "maxContains": 3, "minItems": 2}), json!({"minItems": 2, "maxItems": 3}));
        check(json!({"maxContains": 3}), json!({}));
        check(json!({"then": {"const": 1}, "else": false}), json!({}));
        check(json!({"if": {"const": 1}}), json!({}));
        check(
            json!({"if": true, "then": {"type": "null"}}),
            json!({"allOf": [{"anyOf": [{"allOf": [true, {"type": "null"}]}, false]}]}),
        );
        check(
            json!({"if": {"exclusiveMaximum": 0}, "then": {"minimum": -10}, "else": {"multipleOf": 2}}),
            json!({"allOf": [{"anyOf": [
                {"allOf": [{"exclusiveMaximum": 0}, {"minimum": -10}]},
                {"allOf": [{"type": "number", "minimum": 0}, {"multipleOf": 2}]}
            ]}]}),
        );
        check(
            json!({"dependentRequired": {"a": ["b"]}}),
            json!({"allOf": [{"anyOf": [{"properties": {"a": false}}, {"required": ["a", "b"]}]}]}),
        );
        check(
            json!({"dependentSchemas": {"a": {"minProperties": 2}}}),
            json!({"allOf": [{"anyOf": [{"properties": {"a": false}}, {"required": ["a"], "allOf": [{"minProperties": 2}]}]}]}),
        );
        check(
            json!({"propertyNames": {"pattern": "^a"}}),
            json!({"allOf": [{"patternProperties": {"^a": true}, "additionalProperties": false}]}),
        );
        check(
            json!({"not": {"type": ["string", "null"]}}),
            json!({"allOf": [{"type": ["boolean", "object", "array", "number"]}]}),
        );
        check(
            json!({"not": {"required": ["x"]}}),
            json!({"allOf": [{"anyOf": [{"type": "object", "properties": {"x": false}}]}]}),
        );
        check(json!({"not": {"minLength": 1}}), json!({"allOf": [{"type": "string", "maxLength": 0}]}));
        check(json!({"not": {"minLength": 0}}), json!({"allOf": [false]}));
        check(json!({"uniqueItems": false}), json!({}));
    }

    #[test]
    fn what_has_no_such_form_stays() {
        for schema in [
            json!({"unevaluatedProperties": false, "allOf": [{"properties": {"a": {}}}]}),
            json!({"not": {"pattern": "a"}}),
            json!({"not": {"type": "integer"}}),
            json!({"if": {"pattern": "a"}, "then": {"minLength": 2}}),
            json!({"contains": {"type": "integer"}}),
            json!({"uniqueItems": true}),
            json!({"propertyNames": {"maxLength": 3}}),
            json!({"dependentRequired": {"a": 1}}),
            json!({"enum": [{"not": {}}], "const": {"if": 1}, "default": {"then": 1}}),
        ] {
            check(schema.clone(), schema);
        }
    }
}
