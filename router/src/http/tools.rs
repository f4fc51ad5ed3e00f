//! Tools of a chat body, and the calls of its messages, in OpenAI's shape.

use serde_json::Value;
use serde_json::value::RawValue;

use crate::error::ApiError;
use crate::generation::{
    ChatInput, Limits, MAX_CALL_ID_BYTES, TOOL_NAME, Tool, ToolCall, ToolChoice, invalid, is_tool_name,
};

use super::fields::{Fields, Ignored, raw_list};

/// Calls of one message.
const MAX_CALLS: usize = 128;

/// Reads `tools`, `tool_choice` and `parallel_tool_calls`.
pub(super) fn tools(
    fields: &mut Fields<'_>,
    limits: &Limits,
    ignored: &mut Ignored,
    input: &mut ChatInput,
) -> Result<(), ApiError> {
    if fields.raw("functions").is_some_and(|raw| raw.get() != "[]") {
        return Err(invalid("functions", "is not supported; `tools` is its successor"));
    }
    fields.refuse_unless("function_call", |raw| raw == "\"none\"")?;
    if let Some(raw) = fields.raw("tools") {
        input.tools = raw_list(raw, "tools", limits.max_tools)?
            .into_iter()
            .enumerate()
            .map(|(index, raw)| tool(raw, index, ignored))
            .collect::<Result<_, _>>()?;
    }
    // As OpenAI has it: without tools none can be called.
    let default = if input.tools.is_empty() { ToolChoice::None } else { ToolChoice::Auto };
    input.tool_choice = match fields.raw("tool_choice") {
        None => default,
        Some(raw) => tool_choice(raw)?,
    };
    if input.tools.is_empty() && input.tool_choice != ToolChoice::None {
        return Err(invalid("tool_choice", "needs `tools`"));
    }
    input.parallel_tool_calls = fields.bool("parallel_tool_calls")?.unwrap_or(true);
    Ok(())
}

fn tool(raw: &RawValue, index: usize, ignored: &mut Ignored) -> Result<Tool, ApiError> {
    let path = format!("tools[{index}]");
    let mut fields = Fields::of_value(raw, &path)?;
    if fields.string("type")?.is_none_or(|kind| kind != "function") {
        return Err(invalid(&fields.name("type"), "must be `function`"));
    }
    let name = fields.name("function");
    let Some(raw) = fields.raw("function") else { return Err(invalid(&name, "is needed")) };
    let mut function = Fields::of_value(raw, &name)?;
    let tool = described(&mut function, "parameters")?;
    let mut unknown = Ignored::default();
    function.without_path().note_ignored(&mut unknown);
    unknown.for_each(|name| ignored.add(&format!("tools[].function.{name}")));
    let mut unknown = Ignored::default();
    fields.without_path().note_ignored(&mut unknown);
    unknown.for_each(|name| ignored.add(&format!("tools[].{name}")));
    Ok(tool)
}

/// A tool of the fields that describe it in every dialect; the schema's field has several names.
pub(super) fn described(fields: &mut Fields<'_>, schema_field: &str) -> Result<Tool, ApiError> {
    let name = function_name(fields)?;
    // Where a call is enforced its arguments are exactly what the schema allows: there is nothing more to ask for.
    fields.bool("strict")?;
    let schema_name = fields.name(schema_field);
    let parameters = match fields.raw(schema_field) {
        None => serde_json::json!({"type": "object", "properties": {}}),
        Some(raw) => serde_json::from_str(raw.get())
            .ok()
            .filter(Value::is_object)
            .ok_or_else(|| invalid(&schema_name, "must be an object"))?,
    };
    Ok(Tool { name, description: fields.string("description")?, parameters })
}

/// The name of a tool or of one that is called.
fn function_name(fields: &mut Fields<'_>) -> Result<String, ApiError> {
    let Some(name) = fields.string("name")? else { return Err(invalid(&fields.name("name"), "is needed")) };
    if !is_tool_name(&name) {
        return Err(invalid(&fields.name("name"), TOOL_NAME));
    }
    Ok(name)
}

/// A call of the fields that hold it in dialects where it is an item of its own.
pub(super) fn flat_call(fields: &mut Fields<'_>, id_field: &str, arguments_field: &str) -> Result<ToolCall, ApiError> {
    Ok(ToolCall {
        id: call_id(fields, id_field)?,
        name: function_name(fields)?,
        arguments: arguments(fields, arguments_field)?,
    })
}

/// The identity of a call, which is needed.
pub(super) fn call_id(fields: &mut Fields<'_>, field: &str) -> Result<String, ApiError> {
    match fields.string(field)? {
        None => Err(invalid(&fields.name(field), "is needed")),
        Some(id) if id.len() > MAX_CALL_ID_BYTES => {
            Err(invalid(&fields.name(field), format_args!("must have at most {MAX_CALL_ID_BYTES} bytes")))
        }
        Some(id) => Ok(id),
    }
}

/// JSON in a string, or the object itself; nothing is no arguments.
fn arguments(fields: &mut Fields<'_>, field: &str) -> Result<String, ApiError> {
    match fields.raw(field) {
        None => Ok("{}".to_owned()),
        Some(raw) if raw.get().starts_with('{') => Ok(raw.get().to_owned()),
        Some(_) => fields
            .string(field)
            .map_err(|_| invalid(&fields.name(field), "must be an object, or a string that holds one"))
            .map(Option::unwrap_or_default),
    }
}

fn tool_choice(raw: &RawValue) -> Result<ToolChoice, ApiError> {
    let must = "must be `none`, `auto`, `required`, or an object that names a function";
    match raw.get() {
        "\"none\"" => Ok(ToolChoice::None),
        "\"auto\"" => Ok(ToolChoice::Auto),
        "\"required\"" => Ok(ToolChoice::Required),
        text if text.starts_with('{') => {
            let mut fields = Fields::of_value(raw, "tool_choice")?;
            if fields.string("type")?.is_some_and(|kind| kind != "function") {
                return Err(invalid("tool_choice", must));
            }
            let Some(raw) = fields.raw("function") else { return Err(invalid("tool_choice", must)) };
            let mut function = Fields::of_value(raw, "tool_choice.function")?;
            match function.string("name")? {
                Some(name) => Ok(ToolChoice::Named(name)),
                None => Err(invalid("tool_choice.function.name", "is needed")),
            }
        }
        _ => Err(invalid("tool_choice", must)),
    }
}

/// The calls of an assistant's message.
pub(super) fn calls(fields: &mut Fields<'_>) -> Result<Vec<ToolCall>, ApiError> {
    let name = fields.name("tool_calls");
    let Some(raw) = fields.raw("tool_calls") else { return Ok(Vec::new()) };
    raw_list(raw, &name, MAX_CALLS)?
        .into_iter()
        .enumerate()
        .map(|(index, raw)| {
            let mut call = Fields::of_value(raw, &format!("{name}[{index}]"))?;
            if call.string("type")?.is_some_and(|kind| kind != "function") {
                return Err(invalid(&call.name("type"), "must be `function`"));
            }
            let of_function = call.name("function");
            let Some(raw) = call.raw("function") else { return Err(invalid(&of_function, "is needed")) };
            let mut function = Fields::of_value(raw, &of_function)?;
            Ok(ToolCall {
                id: call.string("id")?.unwrap_or_default(),
                name: function_name(&mut function)?,
                arguments: arguments(&mut function, "arguments")?,
            })
        })
        .collect()
}
