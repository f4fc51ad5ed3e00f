//! Tools of a chat body, and the calls of its messages, in OpenAI's shape.

use serde_json::Value;
use serde_json::value::RawValue;

use crate::error::ApiError;
use crate::generation::{ChatInput, Limits, Tool, ToolCall, ToolChoice, invalid};

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
    let Some(tool_name) = function.string("name")? else { return Err(invalid(&function.name("name"), "is needed")) };
    // Where a call is enforced its arguments are exactly what the schema allows: there is nothing more to ask for.
    function.bool("strict")?;
    let parameters = function.name("parameters");
    let tool = Tool {
        name: tool_name,
        description: function.string("description")?,
        parameters: match function.raw("parameters") {
            None => serde_json::json!({"type": "object", "properties": {}}),
            Some(raw) => {
                serde_json::from_str::<Value>(raw.get()).map_err(|_| invalid(&parameters, "must be an object"))?
            }
        },
    };
    let mut unknown = Ignored::default();
    function.without_path().note_ignored(&mut unknown);
    unknown.for_each(|name| ignored.add(&format!("tools[].function.{name}")));
    let mut unknown = Ignored::default();
    fields.without_path().note_ignored(&mut unknown);
    unknown.for_each(|name| ignored.add(&format!("tools[].{name}")));
    Ok(tool)
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
            let Some(function_name) = function.string("name")? else {
                return Err(invalid(&function.name("name"), "is needed"));
            };
            let arguments = match function.raw("arguments") {
                None => "{}".to_owned(),
                // Some clients send the object itself.
                Some(raw) if raw.get().starts_with('{') => raw.get().to_owned(),
                Some(_) => function.string("arguments")?.unwrap_or_default(),
            };
            Ok(ToolCall { id: call.string("id")?.unwrap_or_default(), name: function_name, arguments })
        })
        .collect()
}
