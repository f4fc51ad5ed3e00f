//! Keywords of JSON schema that the compiler does not know, said by keywords that it knows. Every rewriting here means exactly
//! what was written; what has no such form stays as it is, and is refused by its name.

mod arrays;
mod dynamic;
mod negate;

use serde_json::{Map, Value, json};

use arrays::{contains, unique};
use dynamic::dynamic_references;
use negate::negate;

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
/// Keywords whose value is a count.
const COUNTS: [&str; 8] =
    ["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains"];
/// Keywords that decide which properties and items count as evaluated, beside those that name them.
const APPLICATORS: [&str; 8] =
    ["$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "dependencies"];

/// The same schema in fewer kinds of keywords. Recurses as deep as the schema nests, which is bounded before.
pub(super) fn rewrite(mut schema: Value) -> Value {
    dynamic_references(&mut schema);
    rewrite_one(schema)
}

/// Looks at a schema and at all that it is made of, which nests no deeper than is bounded before.
pub(super) fn for_each_schema(schema: &mut Value, each: &mut impl FnMut(&mut Fields)) {
    let Value::Object(fields) = schema else { return };
    each(fields);
    for keyword in SCHEMAS {
        if let Some(inner) = fields.get_mut(keyword) {
            for_each_schema(inner, each);
        }
    }
    for keyword in LISTS {
        if let Some(Value::Array(items)) = fields.get_mut(keyword) {
            items.iter_mut().for_each(|item| for_each_schema(item, each));
        }
    }
    for keyword in MAPS {
        if let Some(Value::Object(of_names)) = fields.get_mut(keyword) {
            of_names.values_mut().for_each(|item| for_each_schema(item, each));
        }
    }
}

/// Whether no value can be right, as far as shows at once; and the keyword that says so.
pub(super) fn why_nothing(schema: &Value) -> Option<&'static str> {
    let fields = match schema {
        Value::Bool(allows) => return (!allows).then_some("false"),
        Value::Object(fields) => fields,
        _ => return None,
    };
    let list = |keyword: &str| fields.get(keyword).and_then(Value::as_array);
    if list("enum").is_some_and(Vec::is_empty) {
        return Some("enum");
    }
    if fields.get("not").is_some_and(is_anything) {
        return Some("not");
    }
    if list("allOf").is_some_and(|items| items.iter().any(is_nothing)) {
        return Some("allOf");
    }
    ["anyOf", "oneOf"].into_iter().find(|keyword| list(keyword).is_some_and(|items| items.iter().all(is_nothing)))
}

fn is_nothing(schema: &Value) -> bool {
    why_nothing(schema).is_some()
}

/// Counts written with a point are counts.
fn counts(fields: &mut Fields) {
    for keyword in COUNTS {
        if let Some(count) = fields.get_mut(keyword)
            && !count.is_u64()
            && let Some(number) = count.as_f64()
            && number.fract() == 0.0
            && (0.0..=f64::from(u32::MAX)).contains(&number)
        {
            *count = (number as u64).into();
        }
    }
}

fn rewrite_one(schema: Value) -> Value {
    let Value::Object(mut fields) = schema else { return schema };
    for keyword in SCHEMAS {
        if let Some(inner) = fields.get_mut(keyword) {
            *inner = rewrite_one(inner.take());
        }
    }
    for keyword in LISTS {
        if let Some(Value::Array(items)) = fields.get_mut(keyword) {
            items.iter_mut().for_each(|item| *item = rewrite_one(item.take()));
        }
    }
    for keyword in MAPS {
        if let Some(Value::Object(of_names)) = fields.get_mut(keyword) {
            of_names.values_mut().for_each(|item| *item = rewrite_one(item.take()));
        }
    }
    counts(&mut fields);
    unevaluated(&mut fields);
    let mut also = Vec::new();
    contains(&mut fields, &mut also);
    conditional(&mut fields, &mut also);
    dependencies(&mut fields, &mut also);
    property_names(&mut fields, &mut also);
    if let Some(negated) = fields.get("not").and_then(negate) {
        fields.remove("not");
        also.push(negated);
    }
    unique(&mut fields);
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
        check(json!({"minLength": 2.0, "maxItems": 1.5}), json!({"minLength": 2, "maxItems": 1.5}));
        let no_array = json!({"type": ["null", "boolean", "object", "number", "string"]});
        check(json!({"contains": false}), json!({"allOf": [no_array]}));
        check(json!({"contains": {"const": 1}, "minContains": 3, "maxContains": 2}), json!({"allOf": [no_array]}));
        check(json!({"contains": {"enum": []}, "minContains": 0, "maxContains": 0}), json!({}));
        check(
            json!({"type": "array", "contains": {"const": 1}, "maxItems": 2}),
            json!({"type": "array", "maxItems": 2, "allOf": [{"anyOf": [
                {"prefixItems": [{"const": 1}], "minItems": 1}, {"prefixItems": [true, {"const": 1}], "minItems": 2}
            ]}]}),
        );
        check(
            json!({"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": true, "minItems": 1}),
            json!({"enum": [["a"], ["b"], ["a", "b"], ["b", "a"]]}),
        );
        check(
            json!({"prefixItems": [{"type": "boolean"}], "items": false, "uniqueItems": true}),
            json!({"anyOf": [no_array, {"enum": [[], [false], [true]]}]}),
        );
        check(
            json!({"$dynamicAnchor": "node", "properties": {"next": {"$dynamicRef": "#node"}}}),
            json!({"$anchor": "node", "properties": {"next": {"$ref": "#node"}}}),
        );
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
            json!({"items": {"enum": [1, 1.0]}, "uniqueItems": true}),
            json!({"items": {"enum": ["a", "b", "c", "d", "e", "f", "g"]}, "uniqueItems": true}),
            json!({"items": {"type": "string"}, "uniqueItems": true}),
            json!({"contains": {"type": "integer"}, "minContains": 2, "maxItems": 3}),
            json!({"$dynamicAnchor": "a", "$defs": {"b": {"$id": "x", "$dynamicAnchor": "a"}}, "$dynamicRef": "#a"}),
            json!({"$dynamicAnchor": "a", "$dynamicRef": "other#a"}),
            json!({"propertyNames": {"maxLength": 3}}),
            json!({"dependentRequired": {"a": 1}}),
            json!({"enum": [{"not": {}}], "const": {"if": 1}, "default": {"then": 1}}),
        ] {
            check(schema.clone(), schema);
        }
    }
}
