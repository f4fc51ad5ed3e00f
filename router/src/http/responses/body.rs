//! A body of `/v1/responses`.

use serde_json::Value;
use serde_json::value::RawValue;

use crate::error::ApiError;
use crate::generation::{ChatInput, ChatMessage, GenerationParams, Limits, Tool, ToolChoice, invalid};
use crate::http::ask::one_choice;
use crate::http::fields::{Fields, Ignored, raw_list};
use crate::http::format::flat_format;
use crate::http::items::{Turns, note_unread_thinking};
use crate::http::receive::Body;
use crate::http::tools::{call_id, described, flat_call};
use crate::http::types;
use crate::served_model::ServedModel;

/// Most parts of one item.
const MAX_PARTS: usize = 1024;
/// Entries, and bytes of a key and a value, of `metadata`.
const MAX_METADATA: usize = 16;
const MAX_METADATA_KEY: usize = 64;
const MAX_METADATA_VALUE: usize = 512;

/// Fields that are understood and not served.
const UNSUPPORTED: [&str; 4] = ["prompt", "conversation", "context_management", "structured_outputs"];

pub(super) struct ResponsesBody {
    pub(super) model: Option<String>,
    /// Without what went before and without `instructions`.
    pub(super) input: ChatInput,
    pub(super) instructions: Option<String>,
    pub(super) previous: Option<String>,
    pub(super) params: GenerationParams,
    pub(super) top_logprobs: u64,
    pub(super) max_output_tokens: Option<u64>,
    pub(super) metadata: Value,
    /// As they came, to be said again.
    pub(super) said: Said,
    pub(super) store: bool,
    pub(super) background: bool,
    pub(super) stream: bool,
    pub(super) ignored: Ignored,
}

/// Fields of a request that its response says again.
pub(super) struct Said {
    pub(super) text: Value,
    pub(super) tools: Value,
    pub(super) tool_choice: Value,
    pub(super) parallel_tool_calls: bool,
    pub(super) effort: Option<String>,
}

impl Body for ResponsesBody {
    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let mut ignored = Ignored::default();
        fields.refuse(&UNSUPPORTED)?;
        fields.refuse_unless("truncation", |raw| raw == "\"disabled\"")?;
        let mut input = ChatInput::default();
        if let Some(raw) = fields.raw("reasoning") {
            let mut reasoning = Fields::of_value(raw, "reasoning")?;
            input.reasoning_effort = reasoning.string("effort")?;
            // The least effort is none, which templates have another switch for.
            input.enable_thinking = (input.reasoning_effort.as_deref() == Some("none")).then_some(false);
            // Thoughts are given whole: fields that ask for summaries are named with the rest.
            reasoning.note_ignored(&mut ignored);
        }
        let (tools, tool_choice) = tools(&mut fields, limits, &mut ignored, &mut input)?;
        let mut format = None;
        let mut said = serde_json::json!({"type": "text"});
        if let Some(raw) = fields.raw("text") {
            let mut text = Fields::of_value(raw, "text")?;
            let _ = text.raw("verbosity");
            if let Some(raw) = text.raw("format") {
                format = flat_format(raw, "text.format", &mut ignored)?;
                said = serde_json::from_str(raw.get()).unwrap_or_default();
            }
        }
        let mut params = types::params(&mut fields, limits)?;
        one_choice(&params)?;
        params.format = format;
        let max_output_tokens = fields.count("max_output_tokens")?;
        params.max_tokens = max_output_tokens;
        let top_logprobs = fields.count("top_logprobs")?.unwrap_or(0);
        for name in fields.list::<String>("include", MAX_PARTS, "hold strings")?.unwrap_or_default() {
            match name.as_str() {
                "message.output_text.logprobs" => params.logprobs = Some(top_logprobs),
                // Thoughts are given in the clear, and read again as such.
                "reasoning.encrypted_content" => ignored.add("include.reasoning.encrypted_content"),
                _ => return Err(invalid("include", "may only hold `message.output_text.logprobs`")),
            }
        }
        if top_logprobs > 0 && params.logprobs.is_none() {
            params.logprobs = Some(top_logprobs);
        }
        let Some(raw) = fields.raw("input") else { return Err(invalid("input", "is needed")) };
        input.messages = items(raw, limits, &mut ignored)?;
        // Labels without an effect, in OpenAI's API too, and a limit on calls of tools that the server would run itself.
        for label in ["user", "safety_identifier", "prompt_cache_key"] {
            fields.string(label)?;
        }
        fields.count("max_tool_calls")?;
        let stream = fields.bool("stream")?.unwrap_or(false);
        if let Some(raw) = fields.raw("stream_options") {
            let _ = Fields::of_value(raw, "stream_options")?.raw("include_obfuscation");
        }
        let (store, background) = (fields.bool("store")?.unwrap_or(true), fields.bool("background")?.unwrap_or(false));
        if background && !store {
            return Err(invalid("background", "needs `store` to be true"));
        }
        if background && stream {
            return Err(invalid("background", "cannot be used together with `stream`"));
        }
        let said = Said {
            text: serde_json::json!({"format": said}),
            tools,
            tool_choice,
            parallel_tool_calls: input.parallel_tool_calls,
            effort: input.reasoning_effort.clone(),
        };
        let body = Self {
            model: fields.string("model")?,
            input,
            instructions: fields.string("instructions")?,
            previous: fields.string("previous_response_id")?,
            params,
            top_logprobs,
            max_output_tokens,
            metadata: metadata(&mut fields)?,
            said,
            store,
            background,
            stream,
            ignored: Ignored::default(),
        };
        fields.note_ignored(&mut ignored);
        Ok(Self { ignored, ..body })
    }

    fn ignored(&self) -> &Ignored {
        &self.ignored
    }

    fn note_unread(&mut self, model: &ServedModel) {
        if let Some(template) = model.chat_template() {
            let effort = "reasoning.effort";
            note_unread_thinking(&self.input, template, effort, effort, &mut self.ignored);
        }
    }
}

/// Reads `tools`, `tool_choice` and `parallel_tool_calls`, and gives the first two back as they came.
fn tools(
    fields: &mut Fields<'_>,
    limits: &Limits,
    ignored: &mut Ignored,
    input: &mut ChatInput,
) -> Result<(Value, Value), ApiError> {
    let (mut said, mut said_choice) = (serde_json::json!([]), Value::from("auto"));
    if let Some(raw) = fields.raw("tools") {
        said = serde_json::from_str(raw.get()).unwrap_or_default();
        let raw = raw_list(raw, "tools", limits.max_tools)?.into_iter().enumerate();
        input.tools = raw.map(|(index, raw)| tool(raw, index, ignored)).collect::<Result<_, _>>()?;
    }
    if let Some(raw) = fields.raw("tool_choice") {
        said_choice = serde_json::from_str(raw.get()).unwrap_or_default();
        input.tool_choice = tool_choice(raw, &mut input.tools, limits)?;
        if input.tools.is_empty() && !matches!(input.tool_choice, ToolChoice::None | ToolChoice::Auto) {
            return Err(invalid("tool_choice", "needs `tools`"));
        }
    }
    input.parallel_tool_calls = fields.bool("parallel_tool_calls")?.unwrap_or(true);
    Ok((said, said_choice))
}

fn tool(raw: &RawValue, index: usize, ignored: &mut Ignored) -> Result<Tool, ApiError> {
    let mut fields = Fields::of_value(raw, &format!("tools[{index}]"))?;
    if fields.string("type")?.as_deref() != Some("function") {
        return Err(invalid(&fields.name("type"), "must be `function`: the server has no tools of its own"));
    }
    let tool = described(&mut fields, "parameters")?;
    note(fields, "tools[]", ignored);
    Ok(tool)
}

/// `tools` keeps those that may be called.
fn tool_choice(raw: &RawValue, tools: &mut Vec<Tool>, limits: &Limits) -> Result<ToolChoice, ApiError> {
    match raw.get() {
        "\"none\"" => return Ok(ToolChoice::None),
        "\"auto\"" => return Ok(ToolChoice::Auto),
        "\"required\"" => return Ok(ToolChoice::Required),
        text if text.starts_with('{') => {
            let mut choice = Fields::of_value(raw, "tool_choice")?;
            match choice.string("type")?.as_deref() {
                Some("function") => {
                    if let Some(name) = choice.string("name")? {
                        return Ok(ToolChoice::Named(name));
                    }
                }
                Some("allowed_tools") => return allowed_tools(&mut choice, tools, limits),
                _ => {}
            }
        }
        _ => {}
    }
    let must = "must be `none`, `auto`, `required`, or an object of type `function` with a name or `allowed_tools`";
    Err(invalid("tool_choice", must))
}

/// Some of the tools may be called, the others are as if they were not there.
fn allowed_tools(choice: &mut Fields<'_>, tools: &mut Vec<Tool>, limits: &Limits) -> Result<ToolChoice, ApiError> {
    let mode = match choice.string("mode")?.as_deref() {
        Some("auto") => ToolChoice::Auto,
        Some("required") => ToolChoice::Required,
        _ => return Err(invalid("tool_choice.mode", "must be `auto` or `required`")),
    };
    let Some(raw) = choice.raw("tools") else { return Err(invalid("tool_choice.tools", "is needed")) };
    let mut allowed = Vec::new();
    for (index, raw) in raw_list(raw, "tool_choice.tools", limits.max_tools)?.into_iter().enumerate() {
        let mut tool = Fields::of_value(raw, &format!("tool_choice.tools[{index}]"))?;
        let is_function = tool.string("type")?.as_deref() == Some("function");
        let name = tool.string("name")?.filter(|name| is_function && tools.iter().any(|tool| tool.name == *name));
        allowed.push(name.ok_or_else(|| invalid(&tool.name("name"), "must be that of a function in `tools`"))?);
    }
    if allowed.is_empty() {
        return Err(invalid("tool_choice.tools", "must not be empty"));
    }
    tools.retain(|tool| allowed.contains(&tool.name));
    Ok(mode)
}

/// Notes what nobody asked for, under one name for all entries of a list.
fn note(fields: Fields<'_>, list: &str, ignored: &mut Ignored) {
    let mut unknown = Ignored::default();
    fields.without_path().note_ignored(&mut unknown);
    unknown.for_each(|name| ignored.add(&format!("{list}.{name}")));
}

/// Labels that come back with the response.
fn metadata(fields: &mut Fields<'_>) -> Result<Value, ApiError> {
    let wrong = || {
        invalid(
            "metadata",
            format_args!(
                "must map at most {MAX_METADATA} strings of {MAX_METADATA_KEY} bytes to strings of {MAX_METADATA_VALUE}"
            ),
        )
    };
    let Some(raw) = fields.raw("metadata") else { return Ok(Value::Object(Default::default())) };
    let labels: std::collections::BTreeMap<String, String> = serde_json::from_str(raw.get()).map_err(|_| wrong())?;
    let is_small =
        |(key, value): (&String, &String)| key.len() <= MAX_METADATA_KEY && value.len() <= MAX_METADATA_VALUE;
    if labels.len() > MAX_METADATA || !labels.iter().all(is_small) {
        return Err(wrong());
    }
    serde_json::to_value(labels).map_err(|_| wrong())
}

/// A text, or a list of items: messages, thoughts, calls and their results.
fn items(raw: &RawValue, limits: &Limits, ignored: &mut Ignored) -> Result<Vec<ChatMessage>, ApiError> {
    let mut turns = Turns::default();
    if raw.get().starts_with('"') {
        let content = serde_json::from_str(raw.get()).map_err(|_| invalid("input", "must be a string or a list"))?;
        turns.message("user".to_owned(), content);
        return Ok(turns.into_messages());
    }
    for (index, raw) in raw_list(raw, "input", limits.max_messages)?.into_iter().enumerate() {
        let mut item = Fields::of_value(raw, &format!("input[{index}]"))?;
        match item.string("type")?.as_deref() {
            None | Some("message") => {
                let Some(role) = item.string("role")? else { return Err(invalid(&item.name("role"), "is needed")) };
                let content = content(&mut item, "content", ignored)?;
                turns.message(role, content);
                let _ = item.raw("phase");
            }
            Some("reasoning") => {
                if item.raw("encrypted_content").is_some() {
                    return Err(invalid(
                        &item.name("encrypted_content"),
                        "cannot be read: no such content comes from here",
                    ));
                }
                let thought = thought(&mut item)?;
                turns.reasoning(&thought);
            }
            Some("function_call") => turns.call(flat_call(&mut item, "call_id", "arguments")?),
            Some("function_call_output") => {
                let id = call_id(&mut item, "call_id")?;
                let output = content(&mut item, "output", ignored)?;
                turns.result(id, output);
            }
            Some(_) => {
                let must = "must be `message`, `reasoning`, `function_call` or `function_call_output`";
                return Err(invalid(&item.name("type"), must));
            }
        }
        // What an output item has when it comes back.
        let _ = (item.raw("id"), item.raw("status"));
        note(item, "input[]", ignored);
    }
    Ok(turns.into_messages())
}

/// A string, or parts that are texts.
fn content(item: &mut Fields<'_>, field: &str, ignored: &mut Ignored) -> Result<String, ApiError> {
    let name = item.name(field);
    match item.raw(field) {
        None => Err(invalid(&name, "is needed")),
        Some(raw) if raw.get().starts_with('[') => {
            parts(raw, &name, "`input_text` or `output_text`", &["input_text", "output_text", "text"], ignored)
        }
        Some(raw) => serde_json::from_str(raw.get()).map_err(|_| invalid(&name, "must be a string or a list of parts")),
    }
}

/// What a reasoning item holds: the thought itself, or where that was left out its summary.
fn thought(item: &mut Fields<'_>) -> Result<String, ApiError> {
    let mut unknown = Ignored::default();
    let mut thought = String::new();
    for (field, kind) in [("content", "reasoning_text"), ("summary", "summary_text")] {
        let name = item.name(field);
        if let Some(raw) = item.raw(field)
            && thought.is_empty()
        {
            thought = parts(raw, &name, &format!("`{kind}`"), &[kind], &mut unknown)?;
        }
    }
    Ok(thought)
}

fn parts(raw: &RawValue, name: &str, must_be: &str, kinds: &[&str], ignored: &mut Ignored) -> Result<String, ApiError> {
    let mut content = String::new();
    for (index, raw) in raw_list(raw, name, MAX_PARTS)?.into_iter().enumerate() {
        let mut part = Fields::of_value(raw, &format!("{name}[{index}]"))?;
        if part.string("type")?.is_none_or(|kind| !kinds.contains(&kind.as_str())) {
            return Err(invalid(&part.name("type"), format_args!("must be {must_be}")));
        }
        let Some(text) = part.string("text")? else { return Err(invalid(&part.name("text"), "is needed")) };
        content.push_str(&text);
        let _ = (part.raw("annotations"), part.raw("logprobs"));
        note(part, "input[].content[]", ignored);
    }
    Ok(content)
}
