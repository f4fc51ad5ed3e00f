//! Calls written as JSON objects.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::ParsedCall;

/// A call in any of the spellings that models have: `arguments` or `parameters`, as an object or as a string that holds one.
#[derive(Deserialize)]
struct JsonCall {
    name: String,
    #[serde(default)]
    arguments: Option<Box<RawValue>>,
    #[serde(default)]
    parameters: Option<Box<RawValue>>,
}

impl JsonCall {
    fn into_call(self) -> Option<ParsedCall> {
        let raw = self.arguments.or(self.parameters);
        let arguments = match raw.as_deref().map(RawValue::get) {
            None | Some("null") => "{}".to_owned(),
            Some(object) if object.starts_with('{') => object.to_owned(),
            Some(text) => {
                let inner: String = serde_json::from_str(text).ok()?;
                serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&inner).ok()?;
                inner
            }
        };
        (!self.name.is_empty()).then_some(ParsedCall { name: self.name, arguments })
    }
}

/// One object.
pub(super) fn one(text: &str) -> Option<ParsedCall> {
    serde_json::from_str::<JsonCall>(text.trim()).ok()?.into_call()
}

/// One object, or a list of them.
pub(super) fn one_or_list(text: &str) -> Option<Vec<ParsedCall>> {
    let text = text.trim();
    if text.starts_with('[') {
        let calls: Vec<JsonCall> = serde_json::from_str(text).ok()?;
        return calls.into_iter().map(JsonCall::into_call).collect();
    }
    Some(vec![one(text)?])
}

/// Objects one after the other, with nothing but white space and semicolons between them.
pub(super) fn sequence(text: &str) -> Option<Vec<ParsedCall>> {
    let mut calls = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let mut stream = serde_json::Deserializer::from_str(rest).into_iter::<JsonCall>();
        calls.push(stream.next()?.ok()?.into_call()?);
        rest = rest[stream.byte_offset()..].trim_start().trim_start_matches(';').trim_start();
    }
    (!calls.is_empty()).then_some(calls)
}
