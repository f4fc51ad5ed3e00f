//! Bodies of Anthropic's dialect.

use serde_json::value::RawValue;

use crate::error::ApiError;
use crate::generation::{ChatInput, ChatMessage, GenerationParams, Limits, RequestedFormat, Tool, ToolChoice, invalid};
use crate::http::fields::{Fields, Ignored, raw_list};
use crate::http::format::flat_format;
use crate::http::items::note_unread_thinking;
use crate::http::receive::Body;
use crate::http::tools::{call_id, described, flat_call};
use crate::served_model::ServedModel;

/// Most blocks of one message.
const MAX_BLOCKS: usize = 1024;
/// Fields that are understood and not served.
const UNSUPPORTED: [&str; 3] = ["mcp_servers", "container", "context_management"];

/// What both endpoints read.
pub(super) struct Conversation {
    pub(super) model: Option<String>,
    pub(super) input: ChatInput,
    format: Option<RequestedFormat>,
}

pub(super) struct MessagesBody {
    pub(super) conversation: Conversation,
    pub(super) params: GenerationParams,
    pub(super) stream: bool,
    pub(super) ignored: Ignored,
}

pub(super) struct CountBody {
    pub(super) conversation: Conversation,
    pub(super) ignored: Ignored,
}

impl Body for MessagesBody {
    fn model(&self) -> Option<&str> {
        self.conversation.model.as_deref()
    }

    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let mut ignored = Ignored::default();
        let mut conversation = Conversation::parse(&mut fields, limits, &mut ignored)?;
        let Some(max_tokens) = fields.count("max_tokens")? else { return Err(invalid("max_tokens", "is needed")) };
        let params = GenerationParams {
            format: conversation.format.take(),
            max_tokens: Some(max_tokens),
            temperature: fields.number("temperature")?,
            top_p: fields.number("top_p")?,
            top_k: fields.integer("top_k")?,
            stop: fields.strings("stop_sequences", limits.max_stop)?,
            seed: fields.integer("seed")?,
            ..GenerationParams::default()
        };
        if let Some(raw) = fields.raw("metadata") {
            // A label without an effect, in Anthropic's API too.
            let _ = Fields::of_value(raw, "metadata")?.raw("user_id");
        }
        match fields.string("service_tier")?.as_deref() {
            None | Some("auto" | "standard_only") => {}
            Some(_) => return Err(invalid("service_tier", "must be auto or standard_only")),
        }
        let stream = fields.bool("stream")?.unwrap_or(false);
        fields.note_ignored(&mut ignored);
        Ok(Self { conversation, params, stream, ignored })
    }

    fn ignored(&self) -> &Ignored {
        &self.ignored
    }

    fn note_unread(&mut self, model: &ServedModel) {
        self.conversation.note_unread(model, &mut self.ignored);
    }
}

impl Body for CountBody {
    fn model(&self) -> Option<&str> {
        self.conversation.model.as_deref()
    }

    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let mut ignored = Ignored::default();
        let conversation = Conversation::parse(&mut fields, limits, &mut ignored)?;
        fields.note_ignored(&mut ignored);
        Ok(Self { conversation, ignored })
    }

    fn ignored(&self) -> &Ignored {
        &self.ignored
    }

    fn note_unread(&mut self, model: &ServedModel) {
        self.conversation.note_unread(model, &mut self.ignored);
    }
}

impl Conversation {
    fn parse(fields: &mut Fields<'_>, limits: &Limits, ignored: &mut Ignored) -> Result<Self, ApiError> {
        fields.refuse(&UNSUPPORTED)?;
        let mut input = ChatInput::default();
        let mut format = None;
        thinking(fields, &mut input, ignored)?;
        if let Some(raw) = fields.raw("output_config") {
            let mut config = Fields::of_value(raw, "output_config")?;
            if let Some(raw) = config.raw("format") {
                format = flat_format(raw, "output_config.format", ignored)?;
            }
            input.reasoning_effort = config.string("effort")?;
            config.note_ignored(ignored);
        }
        if let Some(raw) = fields.raw("output_format") {
            format = flat_format(raw, "output_format", ignored)?;
        }
        tools(fields, limits, ignored, &mut input)?;
        if let Some(raw) = fields.raw("system") {
            let content = text(raw, "system", ignored)?;
            input.messages.push(ChatMessage { role: "system".to_owned(), content, ..ChatMessage::default() });
        }
        let Some(raw) = fields.raw("messages") else { return Err(invalid("messages", "is needed")) };
        for (index, raw) in raw_list(raw, "messages", limits.max_messages)?.into_iter().enumerate() {
            message(raw, &format!("messages[{index}]"), ignored, &mut input.messages)?;
        }
        // An answer that was begun is gone on with.
        if let Some(last) = input.messages.last().filter(|last| last.role == "assistant") {
            if !last.tool_calls.is_empty() {
                return Err(invalid("messages", "must not end with `tool_use`: its `tool_result` is needed"));
            }
            input.add_generation_prompt = false;
            input.continue_final_message = true;
        }
        Ok(Self { model: fields.string("model")?, input, format })
    }

    fn note_unread(&self, model: &ServedModel, ignored: &mut Ignored) {
        if let Some(template) = model.chat_template() {
            note_unread_thinking(&self.input, template, "thinking", "output_config.effort", ignored);
        }
    }
}

fn thinking(fields: &mut Fields<'_>, input: &mut ChatInput, ignored: &mut Ignored) -> Result<(), ApiError> {
    let Some(raw) = fields.raw("thinking") else { return Ok(()) };
    let mut thinking = Fields::of_value(raw, "thinking")?;
    match thinking.string("type")?.as_deref() {
        Some("enabled") => input.enable_thinking = Some(true),
        Some("disabled") => input.enable_thinking = Some(false),
        // The model decides.
        Some("adaptive") => {}
        _ => return Err(invalid("thinking.type", "must be `enabled`, `disabled` or `adaptive`")),
    }
    // An aim that nothing here enforces: named, as what is not looked at.
    if thinking.count("budget_tokens")?.is_some() {
        ignored.add("thinking.budget_tokens");
    }
    match thinking.string("display")?.as_deref() {
        None => {}
        // Thoughts are given whole.
        Some("summarized") => ignored.add("thinking.display"),
        Some("omitted") => input.include_reasoning = false,
        Some(_) => return Err(invalid("thinking.display", "must be `summarized` or `omitted`")),
    }
    thinking.note_ignored(ignored);
    Ok(())
}

fn tools(
    fields: &mut Fields<'_>,
    limits: &Limits,
    ignored: &mut Ignored,
    input: &mut ChatInput,
) -> Result<(), ApiError> {
    if let Some(raw) = fields.raw("tools") {
        let raw = raw_list(raw, "tools", limits.max_tools)?.into_iter().enumerate();
        input.tools = raw.map(|(index, raw)| tool(raw, index, ignored)).collect::<Result<_, _>>()?;
    }
    let Some(raw) = fields.raw("tool_choice") else { return Ok(()) };
    let mut choice = Fields::of_value(raw, "tool_choice")?;
    input.tool_choice = match choice.string("type")?.as_deref() {
        Some("none") => ToolChoice::None,
        Some("auto") => ToolChoice::Auto,
        Some("any") => ToolChoice::Required,
        Some("tool") => match choice.string("name")? {
            Some(name) => ToolChoice::Named(name),
            None => return Err(invalid("tool_choice.name", "is needed")),
        },
        _ => return Err(invalid("tool_choice.type", "must be `none`, `auto`, `any` or `tool`")),
    };
    if input.tools.is_empty() && !matches!(input.tool_choice, ToolChoice::None | ToolChoice::Auto) {
        return Err(invalid("tool_choice", "needs `tools`"));
    }
    input.parallel_tool_calls = !choice.bool("disable_parallel_tool_use")?.unwrap_or(false);
    choice.note_ignored(ignored);
    Ok(())
}

fn tool(raw: &RawValue, index: usize, ignored: &mut Ignored) -> Result<Tool, ApiError> {
    let mut fields = Fields::of_value(raw, &format!("tools[{index}]"))?;
    if fields.string("type")?.is_some_and(|kind| kind != "custom") {
        return Err(invalid(&fields.name("type"), "must be `custom`: the server has no tools of its own"));
    }
    if fields.raw("input_schema").is_none() {
        return Err(invalid(&fields.name("input_schema"), "is needed"));
    }
    let tool = described(&mut fields, "input_schema")?;
    let _ = fields.raw("cache_control");
    note(fields, "tools[]", ignored);
    Ok(tool)
}

/// Notes what nobody asked for, under one name for all entries of a list.
fn note(fields: Fields<'_>, list: &str, ignored: &mut Ignored) {
    let mut unknown = Ignored::default();
    fields.without_path().note_ignored(&mut unknown);
    unknown.for_each(|name| ignored.add(&format!("{list}.{name}")));
}

/// Reads a message. The results of tools that it begins with become messages of their own.
fn message(raw: &RawValue, path: &str, ignored: &mut Ignored, messages: &mut Vec<ChatMessage>) -> Result<(), ApiError> {
    let mut fields = Fields::of_value(raw, path)?;
    let role = match fields.string("role")? {
        Some(role) if matches!(role.as_str(), "user" | "assistant" | "system") => role,
        _ => return Err(invalid(&fields.name("role"), "must be user or assistant")),
    };
    let name = fields.name("content");
    let Some(raw) = fields.raw("content") else { return Err(invalid(&name, "is needed")) };
    note(fields, "messages[]", ignored);
    let mut said = ChatMessage { role, ..ChatMessage::default() };
    if raw.get().starts_with('"') {
        said.content = text(raw, &name, ignored)?;
        messages.push(said);
        return Ok(());
    }
    let mut has_results = false;
    for (index, raw) in raw_list(raw, &name, MAX_BLOCKS)?.into_iter().enumerate() {
        let mut block = Fields::of_value(raw, &format!("{name}[{index}]"))?;
        match (block.string("type")?.as_deref(), said.role.as_str()) {
            (Some("text"), _) => said.content.push_str(&needed(&mut block, "text")?),
            (Some("thinking"), "assistant") => {
                said.reasoning.get_or_insert_default().push_str(&needed(&mut block, "thinking")?);
                // Nothing here signs thoughts, or trusts one more for its signature.
                let _ = block.raw("signature");
            }
            (Some("tool_use"), "assistant") => {
                if block.raw("input").is_some_and(|raw| !raw.get().starts_with('{')) {
                    return Err(invalid(&block.name("input"), "must be an object"));
                }
                said.tool_calls.push(flat_call(&mut block, "id", "input")?);
                let _ = block.raw("caller");
            }
            (Some("tool_result"), "user") => {
                has_results = true;
                if !said.content.is_empty() {
                    let content = std::mem::take(&mut said.content);
                    messages.push(ChatMessage { role: "user".to_owned(), content, ..ChatMessage::default() });
                }
                messages.push(result(&mut block, ignored)?);
            }
            (_, "assistant") => {
                return Err(invalid(&block.name("type"), "must be `text`, `thinking` or `tool_use`"));
            }
            (_, "user") => return Err(invalid(&block.name("type"), "must be `text` or `tool_result`")),
            _ => return Err(invalid(&block.name("type"), "must be `text`")),
        }
        // What its own cache keeps is its own business; ours keeps all prefixes.
        let _ = block.raw("cache_control");
        note(block, "content[]", ignored);
    }
    // A message of results says nothing itself.
    if !has_results || !said.content.is_empty() {
        messages.push(said);
    }
    Ok(())
}

/// A tool's result as a message.
fn result(block: &mut Fields<'_>, ignored: &mut Ignored) -> Result<ChatMessage, ApiError> {
    let id = call_id(block, "tool_use_id")?;
    let name = block.name("content");
    let content = match block.raw("content") {
        None => String::new(),
        Some(raw) => text(raw, &name, ignored)?,
    };
    // Models are told of a failure by what the result says.
    if block.bool("is_error")?.unwrap_or(false) {
        ignored.add("content[].is_error");
    }
    Ok(ChatMessage { role: "tool".to_owned(), content, tool_call_id: Some(id), ..ChatMessage::default() })
}

fn needed(block: &mut Fields<'_>, field: &str) -> Result<String, ApiError> {
    block.string(field)?.ok_or_else(|| invalid(&block.name(field), "is needed"))
}

/// A text, or text blocks one after the other.
fn text(raw: &RawValue, name: &str, ignored: &mut Ignored) -> Result<String, ApiError> {
    if raw.get().starts_with('"') {
        return serde_json::from_str(raw.get()).map_err(|_| invalid(name, "must be a string or a list of blocks"));
    }
    let mut text = String::new();
    for (index, raw) in raw_list(raw, name, MAX_BLOCKS)?.into_iter().enumerate() {
        let mut block = Fields::of_value(raw, &format!("{name}[{index}]"))?;
        if block.string("type")?.as_deref() != Some("text") {
            return Err(invalid(&block.name("type"), "must be `text`: nothing else is supported"));
        }
        text.push_str(&needed(&mut block, "text")?);
        let _ = block.raw("cache_control");
        note(block, "content[]", ignored);
    }
    Ok(text)
}
