//! Keywords of arrays that count or compare items.

use serde_json::{Value, json};

use super::{Fields, TYPES, is_anything, is_nothing};

/// Most arrays that are written out one by one, and items of the longest.
const MAX_WRITTEN_OUT: usize = 512;
const MAX_PLACES: u64 = 8;

/// Counts of items that must be of a kind.
pub(super) fn contains(fields: &mut Fields, also: &mut Vec<Value>) {
    let Some(schema) = fields.get("contains") else {
        fields.remove("minContains");
        fields.remove("maxContains");
        return;
    };
    let least = match fields.get("minContains") {
        None => 1,
        Some(count) => match count.as_u64() {
            Some(count) => count,
            None => return,
        },
    };
    let most = match fields.get("maxContains") {
        None => None,
        Some(count) => match count.as_u64() {
            Some(count) => Some(count),
            None => return,
        },
    };
    let bounds = |name: &str, fields: &Fields| fields.get(name).and_then(Value::as_u64);
    let replaced = if least == 0 && (most.is_none() || is_nothing(schema)) {
        None
    } else if most.is_some_and(|most| most < least) || is_nothing(schema) {
        // No array can be right; what is no array is.
        let others: Vec<&str> = TYPES.into_iter().filter(|name| *name != "array").collect();
        Some(json!({"type": others}))
    } else if is_anything(schema) {
        // Every item is one of those that are counted.
        let at_least = bounds("minItems", fields).map_or(least, |count| count.max(least));
        fields.insert("minItems".to_owned(), at_least.into());
        if let Some(most) = most {
            let at_most = bounds("maxItems", fields).map_or(most, |count| count.min(most));
            fields.insert("maxItems".to_owned(), at_most.into());
        }
        None
    } else if least == 1
        && most.is_none()
        && let Some(len) = bounds("maxItems", fields).filter(|len| *len <= MAX_PLACES)
    {
        // It is in one of so few places.
        let at = |place: u64| {
            let mut items = vec![Value::Bool(true); place as usize];
            items.push(schema.clone());
            json!({"prefixItems": items, "minItems": place + 1})
        };
        let others: Vec<&str> = TYPES.into_iter().filter(|name| *name != "array").collect();
        let mut places: Vec<Value> = (0..len).map(at).collect();
        if fields.get("type") != Some(&json!("array")) {
            places.push(json!({"type": others}));
        }
        Some(json!({"anyOf": places}))
    } else {
        return;
    };
    for keyword in ["contains", "minContains", "maxContains"] {
        fields.remove(keyword);
    }
    also.extend(replaced);
}

/// Items that must differ: nothing to ask of at most one, and where items can be few things, arrays of them are written out.
pub(super) fn unique(fields: &mut Fields) {
    if fields.get("uniqueItems") == Some(&Value::Bool(false))
        || fields.get("maxItems").and_then(Value::as_u64).is_some_and(|count| count <= 1)
    {
        fields.remove("uniqueItems");
        return;
    }
    const READ: [&str; 11] = [
        "type",
        "items",
        "prefixItems",
        "uniqueItems",
        "minItems",
        "maxItems",
        "$schema",
        "$comment",
        "title",
        "description",
        "examples",
    ];
    let is_read = fields.keys().all(|keyword| READ.contains(&keyword.as_str()));
    if fields.get("uniqueItems") != Some(&Value::Bool(true)) || !is_read {
        return;
    }
    let is_array = match fields.get("type") {
        None => false,
        Some(kind) if kind == "array" => true,
        Some(_) => return,
    };
    let Some(arrays) = differing(fields) else { return };
    for keyword in ["type", "items", "prefixItems", "uniqueItems", "minItems", "maxItems"] {
        fields.remove(keyword);
    }
    let arrays = json!({"enum": arrays});
    if is_array {
        fields.extend([("enum".to_owned(), arrays["enum"].clone())]);
    } else {
        let others: Vec<&str> = TYPES.into_iter().filter(|name| *name != "array").collect();
        fields.insert("anyOf".to_owned(), json!([{"type": others}, arrays]));
    }
}

/// All arrays of different items that the fields allow, shorter ones first, where there are few.
fn differing(fields: &Fields) -> Option<Vec<Value>> {
    let first = match fields.get("prefixItems") {
        None => Vec::new(),
        Some(items) => items.as_array()?.iter().map(values_of).collect::<Option<Vec<_>>>()?,
    };
    let rest = match fields.get("items") {
        Some(items) => values_of(items)?,
        None => return None,
    };
    let count = |name: &str| fields.get(name).map_or(Some(None), |count| count.as_u64().map(Some));
    let (least, most) = (count("minItems")?.unwrap_or(0), count("maxItems")?);
    let (mut all, mut longest): (Vec<Value>, Vec<Vec<Value>>) = (Vec::new(), vec![Vec::new()]);
    let mut len = 0u64;
    while !longest.is_empty() && most.is_none_or(|most| len <= most) {
        if len >= least {
            all.extend(longest.iter().map(|array| Value::from(array.clone())));
        }
        let choices = first.get(len as usize).unwrap_or(&rest);
        let longer = |array: &Vec<Value>| {
            let new = choices.iter().filter(|value| !array.contains(value));
            new.map(|value| array.iter().chain([value]).cloned().collect::<Vec<_>>()).collect::<Vec<_>>()
        };
        longest = longest.iter().flat_map(longer).collect();
        if all.len() + longest.len() > MAX_WRITTEN_OUT {
            return None;
        }
        len += 1;
    }
    (!all.is_empty()).then_some(all)
}

/// The values that a schema allows, where it says no more than which they are. Numbers are left out: one can be written in
/// several ways.
fn values_of(schema: &Value) -> Option<Vec<Value>> {
    let is_plain = |value: &Value| value.is_string() || value.is_boolean() || value.is_null();
    let fields = match schema {
        Value::Bool(false) => return Some(Vec::new()),
        Value::Object(fields) if fields.len() == 1 => fields,
        _ => return None,
    };
    let values = match fields.iter().next()? {
        (keyword, Value::Array(values)) if keyword == "enum" => values.clone(),
        (keyword, value) if keyword == "const" => vec![value.clone()],
        (keyword, Value::String(kind)) if keyword == "type" && kind == "boolean" => vec![false.into(), true.into()],
        (keyword, Value::String(kind)) if keyword == "type" && kind == "null" => vec![Value::Null],
        _ => return None,
    };
    let differ = values.iter().enumerate().all(|(index, value)| !values[..index].contains(value));
    (differ && values.len() <= MAX_WRITTEN_OUT && values.iter().all(is_plain)).then_some(values)
}
