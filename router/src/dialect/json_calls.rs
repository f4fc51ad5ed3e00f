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
