//! What a body asks its output to be: `response_format` as OpenAI has it, and `structured_outputs` as vLLM has it.

use std::sync::Arc;

use serde_json::value::RawValue;

use crate::error::ApiError;
use crate::generation::{Limits, RequestedFormat, invalid};
use crate::grammar::{OutputFormat, StructuralTag, TagStructure};

use super::fields::{Fields, Ignored, raw_list};

/// Names that a field had before it was called `structured_outputs`, or has elsewhere.
const RENAMED: [&str; 10] = [
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "grammar",
    "json_schema",
    "regex",
    "ebnf",
];

/// How constraints are worked out is not the caller's choice.
const UNSUPPORTED: [&str; 5] =
    ["disable_any_whitespace", "disable_fallback", "disable_additional_properties", "whitespace_pattern", "_backend"];

/// The format that a body asks for, where it asks for one.
pub(super) fn format(
    fields: &mut Fields<'_>,
    limits: &Limits,
    ignored: &mut Ignored,
) -> Result<Option<RequestedFormat>, ApiError> {
    for field in RENAMED {
        if fields.raw(field).is_some() {
            return Err(invalid(field, "is not supported; `structured_outputs` has its successors"));
        }
    }
    let response_format = match fields.raw("response_format") {
        Some(raw) => response_format(raw, limits, ignored)?,
        None => None,
    };
    let structured = match fields.raw("structured_outputs") {
        Some(raw) => structured_outputs(raw, limits, ignored)?,
        None => None,
    };
    match (response_format, structured) {
        (Some(_), Some(_)) => {
            Err(invalid("structured_outputs", "cannot be used together with `response_format`: an output has one form"))
        }
        (Some(format), None) => Ok(Some(RequestedFormat { param: "response_format", format })),
        (None, Some(format)) => Ok(Some(RequestedFormat { param: "structured_outputs", format })),
        (None, None) => Ok(None),
    }
}

fn response_format(raw: &RawValue, limits: &Limits, ignored: &mut Ignored) -> Result<Option<OutputFormat>, ApiError> {
    let mut fields = Fields::of_value(raw, "response_format")?;
    let format = match fields.string("type")?.as_deref() {
        Some("text") => None,
        Some("json_object") => Some(match fields.raw("schema") {
            Some(schema) => json_schema(schema),
            None => OutputFormat::JsonObject,
        }),
        Some("json_schema") => {
            let Some(raw) = fields.raw("json_schema") else {
                return Err(invalid("response_format.json_schema", "is needed"));
            };
            let mut described = Fields::of_value(raw, "response_format.json_schema")?;
            // Labels; what is enforced is enforced exactly, so `strict` asks for nothing more.
            described.string("name")?;
            described.string("description")?;
            described.bool("strict")?;
            let Some(schema) = described.raw("schema") else {
                return Err(invalid("response_format.json_schema.schema", "is needed"));
            };
            described.note_ignored(ignored);
            Some(json_schema(schema))
        }
        Some("structural_tag") => Some(OutputFormat::StructuralTag(structural_tag(&mut fields, limits)?)),
        _ => {
            let must = "must be `text`, `json_object`, `json_schema` or `structural_tag`";
            return Err(invalid("response_format.type", must));
        }
    };
    fields.note_ignored(ignored);
    Ok(format)
}

fn structured_outputs(
    raw: &RawValue,
    limits: &Limits,
    ignored: &mut Ignored,
) -> Result<Option<OutputFormat>, ApiError> {
    let mut fields = Fields::of_value(raw, "structured_outputs")?;
    fields.refuse(&UNSUPPORTED)?;
    let mut formats = Vec::new();
    if let Some(raw) = fields.raw("json") {
        // A schema, or a string that holds one.
        formats.push(match raw.get().starts_with('"') {
            true => OutputFormat::JsonSchema(fields.string("json")?.unwrap_or_default().into()),
            false => json_schema(raw),
        });
    }
    if let Some(regex) = fields.string("regex")? {
        formats.push(OutputFormat::Regex(regex.into()));
    }
    if let Some(choices) = fields.list("choice", limits.grammar.max_nodes, "hold strings")? {
        formats.push(OutputFormat::Choice(choices));
    }
    if let Some(grammar) = fields.string("grammar")? {
        formats.push(OutputFormat::Lark(grammar.into()));
    }
    if fields.bool("json_object")?.unwrap_or(false) {
        formats.push(OutputFormat::JsonObject);
    }
    if let Some(raw) = fields.raw("structural_tag") {
        let name = "structured_outputs.structural_tag";
        let text;
        let raw = match raw.get().starts_with('"') {
            true => {
                text = fields.string("structural_tag")?.unwrap_or_default();
                serde_json::from_str(&text)
                    .map_err(|_| invalid(name, "must be an object, or a string that holds one"))?
            }
            false => raw,
        };
        formats.push(OutputFormat::StructuralTag(structural_tag(&mut Fields::of_value(raw, name)?, limits)?));
    }
    fields.note_ignored(ignored);
    match formats.len() {
        0 => Ok(None),
        1 => Ok(formats.pop()),
        _ => Err(invalid("structured_outputs", "must hold one form alone")),
    }
}

fn json_schema(raw: &RawValue) -> OutputFormat {
    OutputFormat::JsonSchema(Arc::from(raw.get()))
}

/// The format of dialects that put the schema right into it: `{"type": "json_schema", "schema": {...}}`.
pub(super) fn flat_format(
    raw: &RawValue,
    param: &'static str,
    ignored: &mut Ignored,
) -> Result<Option<RequestedFormat>, ApiError> {
    let mut fields = Fields::of_value(raw, param)?;
    let format = match fields.string("type")?.as_deref() {
        Some("text") => None,
        Some("json_object") => Some(OutputFormat::JsonObject),
        Some("json_schema") => {
            // Labels; what is enforced is enforced exactly, so `strict` asks for nothing more.
            let _ = (fields.string("name")?, fields.string("description")?, fields.bool("strict")?);
            let name = fields.name("schema");
            let Some(schema) = fields.raw("schema") else { return Err(invalid(&name, "is needed")) };
            Some(json_schema(schema))
        }
        _ => return Err(invalid(&fields.name("type"), "must be `text`, `json_object` or `json_schema`")),
    };
    fields.note_ignored(ignored);
    Ok(format.map(|format| RequestedFormat { param, format }))
}

/// Ollama's: the word `json`, or a schema.
pub(super) fn schema_or_json(raw: &RawValue, param: &'static str) -> Result<Option<RequestedFormat>, ApiError> {
    let format = match raw.get() {
        "\"\"" => return Ok(None),
        "\"json\"" => OutputFormat::JsonObject,
        schema if schema.starts_with('{') => json_schema(raw),
        _ => return Err(invalid(param, "must be `json` or a schema")),
    };
    Ok(Some(RequestedFormat { param, format }))
}

fn structural_tag(fields: &mut Fields<'_>, limits: &Limits) -> Result<StructuralTag, ApiError> {
    let limit = limits.grammar.max_nodes;
    let triggers = fields.list("triggers", limit, "hold strings")?.unwrap_or_default();
    fields.string("type")?;
    let name = fields.name("structures");
    let Some(raw) = fields.raw("structures") else { return Err(invalid(&name, "is needed")) };
    let structures = raw_list(raw, &name, limit)?
        .into_iter()
        .enumerate()
        .map(|(index, raw)| {
            let path = format!("{name}[{index}]");
            let mut fields = Fields::of_value(raw, &path)?;
            let begin = fields.string("begin")?.ok_or_else(|| invalid(&fields.name("begin"), "is needed"))?;
            let end = fields.string("end")?.unwrap_or_default();
            let schema = fields.raw("schema").map_or_else(|| Arc::from("true"), |raw| Arc::from(raw.get()));
            Ok(TagStructure { begin, schema, end })
        })
        .collect::<Result<_, ApiError>>()?;
    Ok(StructuralTag { structures, triggers })
}
