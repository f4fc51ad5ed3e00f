//! Anthropic's dialect: `/v1/messages` and `/v1/messages/count_tokens`.

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::generation::{
    ChatInput, ChatMessage, GenerationEvent, GenerationParams, GenerationService, Input, Limits, StopCause, Usage,
    invalid,
};
use crate::metrics::Endpoint;
use crate::random::random_u64;

use super::answer::{Generations, json as to_json};
use super::ask::{Ask, json_response, name_ignored, whole};
use super::failure::{Dialect, Failure, error_json};
use super::fields::{Fields, Ignored, raw_list};
use super::format::flat_format;
use super::receive::{Body, Parsed, receive};
use super::stream::{Framing, SSE, push_json, sse_named, streamed};

/// Most blocks of one message.
const MAX_BLOCKS: usize = 1024;
/// Fields that are understood and not served.
const UNSUPPORTED: [&str; 4] = ["tools", "mcp_servers", "container", "context_management"];

/// What both endpoints read.
struct Conversation {
    model: Option<String>,
    input: ChatInput,
}

struct MessagesBody {
    conversation: Conversation,
    params: GenerationParams,
    stream: bool,
    ignored: Ignored,
}

struct CountBody {
    conversation: Conversation,
    ignored: Ignored,
}

fn conversation(fields: &mut Fields<'_>, limits: &Limits, ignored: &mut Ignored) -> Result<Conversation, ApiError> {
    fields.refuse(&UNSUPPORTED)?;
    if let Some(raw) = fields.raw("tool_choice") {
        let mut choice = Fields::of_value(raw, "tool_choice")?;
        if choice.string("type")?.is_none_or(|kind| !matches!(kind.as_str(), "none" | "auto")) {
            return Err(invalid("tool_choice", "needs `tools`, which are not supported"));
        }
    }
    let mut enable_thinking = None;
    if let Some(raw) = fields.raw("thinking") {
        let mut thinking = Fields::of_value(raw, "thinking")?;
        match thinking.string("type")?.as_deref() {
            Some("disabled") => enable_thinking = Some(false),
            _ => {
                return Err(invalid(
                    "thinking",
                    "must be of type `disabled`: thinking apart from text is not supported",
                ));
            }
        }
    }
    let mut messages = Vec::new();
    if let Some(raw) = fields.raw("system") {
        messages.push(ChatMessage {
            role: "system".to_owned(),
            content: content(raw, "system", ignored)?,
            ..ChatMessage::default()
        });
    }
    let Some(raw) = fields.raw("messages") else { return Err(invalid("messages", "is needed")) };
    for (index, raw) in raw_list(raw, "messages", limits.max_messages)?.into_iter().enumerate() {
        let path = format!("messages[{index}]");
        let mut message = Fields::of_value(raw, &path)?;
        let role = match message.string("role")?.as_deref() {
            Some("user") => "user",
            Some("assistant") => "assistant",
            Some("system") => "system",
            _ => return Err(invalid(&message.name("role"), "must be user or assistant")),
        };
        let name = message.name("content");
        let Some(raw) = message.raw("content") else { return Err(invalid(&name, "is needed")) };
        messages.push(ChatMessage {
            role: role.to_owned(),
            content: content(raw, &name, ignored)?,
            ..ChatMessage::default()
        });
        let mut unknown = Ignored::default();
        message.without_path().note_ignored(&mut unknown);
        unknown.for_each(|name| ignored.add(&format!("messages[].{name}")));
    }
    // An answer that was begun is gone on with.
    let continues = messages.last().is_some_and(|message| message.role == "assistant");
    let input = ChatInput {
        messages,
        add_generation_prompt: !continues,
        continue_final_message: continues,
        enable_thinking,
        include_reasoning: false,
        ..ChatInput::default()
    };
    Ok(Conversation { model: fields.string("model")?, input })
}

/// A text, or text blocks one after the other.
fn content(raw: &RawValue, name: &str, ignored: &mut Ignored) -> Result<String, ApiError> {
    if raw.get().starts_with('"') {
        return serde_json::from_str(raw.get()).map_err(|_| invalid(name, "must be a string or a list of blocks"));
    }
    let mut text = String::new();
    for (index, raw) in raw_list(raw, name, MAX_BLOCKS)?.into_iter().enumerate() {
        let mut block = Fields::of_value(raw, &format!("{name}[{index}]"))?;
        match block.string("type")?.as_deref() {
            Some("text") => {}
            _ => return Err(invalid(&block.name("type"), "must be `text`: nothing else is supported")),
        }
        let Some(part) = block.string("text")? else { return Err(invalid(&block.name("text"), "is needed")) };
        text.push_str(&part);
        // What its own cache keeps is its own business; ours keeps all prefixes.
        let _ = block.raw("cache_control");
        let mut unknown = Ignored::default();
        block.without_path().note_ignored(&mut unknown);
        unknown.for_each(|name| ignored.add(&format!("content[].{name}")));
    }
    Ok(text)
}

impl Body for MessagesBody {
    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let mut ignored = Ignored::default();
        let conversation = conversation(&mut fields, limits, &mut ignored)?;
        let Some(max_tokens) = fields.count("max_tokens")? else { return Err(invalid("max_tokens", "is needed")) };
        let mut format = None;
        if let Some(raw) = fields.raw("output_config") {
            let mut config = Fields::of_value(raw, "output_config")?;
            if let Some(raw) = config.raw("format") {
                format = flat_format(raw, "output_config.format", &mut ignored)?;
            }
            config.note_ignored(&mut ignored);
        }
        if let Some(raw) = fields.raw("output_format") {
            format = flat_format(raw, "output_format", &mut ignored)?;
        }
        let params = GenerationParams {
            format,
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
}

impl Body for CountBody {
    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let mut ignored = Ignored::default();
        let conversation = conversation(&mut fields, limits, &mut ignored)?;
        fields.note_ignored(&mut ignored);
        Ok(Self { conversation, ignored })
    }

    fn ignored(&self) -> &Ignored {
        &self.ignored
    }
}

/// `POST /v1/messages`
pub(super) async fn create(State(service): State<GenerationService>, request: Request) -> Result<Response, Failure> {
    let Parsed { id, body, share } = receive::<MessagesBody>(&service, Endpoint::Messages, request).await?;
    let MessagesBody { conversation, params, stream, ignored } = body;
    let ask = Ask {
        endpoint: Endpoint::Messages,
        request_id: id.0.to_string(),
        model: conversation.model,
        input: Input::Chat(conversation.input),
        params,
    };
    let generation = ask.start(&service).await?;
    drop(share);
    let head = Head {
        id: format!("msg_{:016x}{:016x}", random_u64(), random_u64()),
        request_id: id.0.to_string(),
        model: service.model().name().to_owned(),
        prompt: Usage { prompt_tokens: generation.prompt_token_ids.len() as u32, ..Usage::default() },
    };
    if stream {
        let generations = Generations::new(vec![generation]);
        let mut response = streamed(&service, generations, MessageStream::new(head), SSE, 1).await?;
        name_ignored(&mut response, &ignored);
        return Ok(response);
    }
    let whole = whole(generation).await?;
    let (reason, sequence) = stop(&whole.cause);
    let answer = head.message(json!([{"type": "text", "text": whole.text}]), json!(reason), sequence, whole.usage);
    Ok(json_response(to_json(&answer), &ignored))
}

/// `POST /v1/messages/count_tokens`
pub(super) async fn count_tokens(
    State(service): State<GenerationService>,
    request: Request,
) -> Result<Response, Failure> {
    let Parsed { body, share: _share, .. } = receive::<CountBody>(&service, Endpoint::CountTokens, request).await?;
    service.check_model(body.conversation.model)?;
    let tokens = service.tokenize(Input::Chat(body.conversation.input)).await?;
    Ok(json_response(to_json(&json!({"input_tokens": tokens.len()})), &body.ignored))
}

/// What is the same in every part of an answer.
struct Head {
    id: String,
    request_id: String,
    model: String,
    prompt: Usage,
}

impl Head {
    fn message(&self, content: Value, reason: Value, sequence: Value, usage: Usage) -> Value {
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": usage_json(usage),
        })
    }
}

/// Tokens that were read from the cache are counted apart from those that were not.
fn usage_json(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens.saturating_sub(usage.cached_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    })
}

/// `stop_reason` and `stop_sequence`.
fn stop(cause: &StopCause) -> (&'static str, Value) {
    match cause {
        StopCause::EndOfSequence | StopCause::StopToken(_) => ("end_turn", Value::Null),
        StopCause::StopString(text) => ("stop_sequence", json!(text)),
        StopCause::Length => ("max_tokens", Value::Null),
        StopCause::ToolCalls => ("tool_use", Value::Null),
    }
}

/// Events of a streamed answer: the message, its one block in pieces, and how it ended.
struct MessageStream {
    head: Head,
    cause: StopCause,
    num_tokens: u32,
}

const DELTA: &[u8] = b"event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":";

impl MessageStream {
    fn new(head: Head) -> Self {
        Self { head, cause: StopCause::Length, num_tokens: 0 }
    }
}

impl Framing for MessageStream {
    fn begin(&mut self, out: &mut Vec<u8>) {
        let message = self.head.message(json!([]), Value::Null, Value::Null, self.head.prompt);
        sse_named("message_start", &json!({"type": "message_start", "message": message}), out);
        let block = json!({"type": "text", "text": ""});
        let start = json!({"type": "content_block_start", "index": 0, "content_block": block});
        sse_named("content_block_start", &start, out);
    }

    fn event(&mut self, _: usize, event: GenerationEvent, out: &mut Vec<u8>) {
        match event {
            GenerationEvent::Delta { text, tokens, .. } => {
                self.num_tokens += tokens.len() as u32;
                if !text.is_empty() {
                    out.extend_from_slice(DELTA);
                    push_json(&text, out);
                    out.extend_from_slice(b"}}\n\n");
                }
            }
            GenerationEvent::ChoiceFinished { cause, .. } => self.cause = cause,
            // Neither tools nor reasoning are asked for by this dialect, and ends are framed by the stream.
            GenerationEvent::Reasoning { .. }
            | GenerationEvent::ToolCall { .. }
            | GenerationEvent::PromptLogprobs { .. }
            | GenerationEvent::Done { .. }
            | GenerationEvent::Error(_) => {}
        }
    }

    fn done(&mut self, usage: Usage, out: &mut Vec<u8>) {
        sse_named("content_block_stop", &json!({"type": "content_block_stop", "index": 0}), out);
        let (reason, sequence) = stop(&self.cause);
        let delta = json!({"stop_reason": reason, "stop_sequence": sequence});
        let delta = json!({"type": "message_delta", "delta": delta, "usage": usage_json(usage)});
        sse_named("message_delta", &delta, out);
        sse_named("message_stop", &json!({"type": "message_stop"}), out);
    }

    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        out.extend_from_slice(b"event: error\ndata: ");
        out.extend_from_slice(&error_json(error, Dialect::Anthropic, &self.head.request_id));
        out.extend_from_slice(b"\n\n");
    }

    fn waiting(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"event: ping\ndata: {\"type\":\"ping\"}\n\n");
    }
}
