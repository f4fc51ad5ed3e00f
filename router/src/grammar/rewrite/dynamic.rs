//! References whose target depends on the way to them, where there is but one way.

use std::collections::BTreeSet;

use serde_json::Value;

use super::for_each_schema;

/// In a schema of one resource a dynamic reference leads where a plain one would: there is no other place for it to end.
pub(super) fn dynamic_references(schema: &mut Value) {
    let (mut names, mut is_single, mut num_ids) = (BTreeSet::new(), true, 0);
    for_each_schema(schema, &mut |fields| {
        num_ids += usize::from(fields.contains_key("$id"));
        for keyword in ["$anchor", "$dynamicAnchor"] {
            if let Some(name) = fields.get(keyword) {
                is_single &= name.as_str().is_some_and(|name| names.insert(name.to_owned()));
            }
        }
        if let Some(target) = fields.get("$dynamicRef") {
            // Beside a plain one both would have to hold.
            is_single &= target.as_str().is_some_and(|target| target.starts_with('#')) && !fields.contains_key("$ref");
        }
        if let Some(Value::String(target)) = fields.get("$ref") {
            is_single &= target.starts_with('#');
        }
    });
    let has_root_id = schema.get("$id").is_some();
    if !is_single || num_ids > usize::from(has_root_id) {
        return;
    }
    for_each_schema(schema, &mut |fields| {
        for (dynamic, plain) in [("$dynamicAnchor", "$anchor"), ("$dynamicRef", "$ref")] {
            if !fields.contains_key(plain)
                && let Some(value) = fields.remove(dynamic)
            {
                fields.insert(plain.to_owned(), value);
            }
        }
    });
}
