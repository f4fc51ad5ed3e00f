//! The message that is answered, and the events of one that is streamed.

use serde_json::{Value, json};

use crate::error::ApiError;
use crate::generation::{CallHead, GenerationEvent, StopCause, ToolCall, Usage};
use crate::http::ask::Whole;
use crate::http::failure::{Dialect, error_json};
use crate::http::items::Item;
use crate::http::stream::{Framing, push_json, sse_named};

/// What is the same in every part of an answer.
pub(super) struct Head {
    pub(super) id: String,
    pub(super) request_id: String,
    pub(super) model: String,
    pub(super) prompt: Usage,
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

    /// The whole answer.
    pub(super) fn ended(&self, whole: &Whole) -> Value {
        let blocks = whole.items.as_slice().iter().map(|item| match item {
            Item::Text { text, .. } => text_block(text),
            Item::Reasoning(text) => thinking_block(text),
            Item::Call(call) => tool_block(call, arguments(call)),
        });
        let (reason, sequence) = stop(&whole.cause);
        self.message(blocks.collect(), json!(reason), sequence, whole.usage)
    }
}

fn text_block(text: &str) -> Value {
    json!({"type": "text", "text": text})
}

/// Thoughts are not signed: they may come back as they are.
fn thinking_block(text: &str) -> Value {
    json!({"type": "thinking", "thinking": text, "signature": ""})
}

fn tool_block(call: &ToolCall, input: Value) -> Value {
    json!({"type": "tool_use", "id": call.id, "name": call.name, "input": input})
}

/// What a model wrote as arguments is JSON, an object; where it was cut off its text is kept under a name for that.
fn arguments(call: &ToolCall) -> Value {
    serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({"INVALID_JSON": call.arguments}))
}

/// Tokens that were read from the cache are counted apart from those that were not.
fn usage_json(usage: Usage) -> Value {
    let mut said = json!({
        "input_tokens": usage.prompt_tokens.saturating_sub(usage.cached_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    });
    if usage.reasoning_tokens > 0 {
        said["output_tokens_details"] = json!({"thinking_tokens": usage.reasoning_tokens});
    }
    said
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

/// A block that comes in pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    Text,
    Thinking,
}

/// Events of a streamed answer: the message, its blocks in pieces, and how it ended.
pub(super) struct MessageStream {
    head: Head,
    cause: StopCause,
    open: Option<Block>,
    /// Blocks that are closed; the open one's index.
    num_closed: usize,
    /// What every piece of the open block begins with.
    delta: Vec<u8>,
}

impl MessageStream {
    pub(super) fn new(head: Head) -> Self {
        Self { head, cause: StopCause::Length, open: None, num_closed: 0, delta: Vec::new() }
    }

    fn start(&self, block: Value, out: &mut Vec<u8>) {
        let start = json!({"type": "content_block_start", "index": self.num_closed, "content_block": block});
        sse_named("content_block_start", &start, out);
    }

    fn stop(&mut self, out: &mut Vec<u8>) {
        sse_named("content_block_stop", &json!({"type": "content_block_stop", "index": self.num_closed}), out);
        self.num_closed += 1;
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        if self.open.take().is_some() {
            self.stop(out);
        }
    }

    fn open(&mut self, block: Block, out: &mut Vec<u8>) {
        if self.open == Some(block) {
            return;
        }
        self.close(out);
        let (empty, kind, field) = match block {
            Block::Text => (text_block(""), "text_delta", "text"),
            Block::Thinking => (thinking_block(""), "thinking_delta", "thinking"),
        };
        self.start(empty, out);
        let index = self.num_closed;
        self.delta = format!(
            "event: content_block_delta\ndata: {{\"type\":\"content_block_delta\",\"index\":{index},\"delta\":{{\"type\":\"{kind}\",\"{field}\":"
        )
        .into_bytes();
        self.open = Some(block);
    }

    fn say(&mut self, block: Block, text: &str, out: &mut Vec<u8>) {
        self.open(block, out);
        out.extend_from_slice(&self.delta);
        push_json(&text, out);
        out.extend_from_slice(b"}}\n\n");
    }

    fn call(&mut self, call: ToolCall, out: &mut Vec<u8>) {
        let ToolCall { id, name, arguments } = call;
        self.call_piece(Some(CallHead { id, name }), &arguments, out);
        self.stop(out);
    }

    /// A call begins, or more of its arguments comes.
    fn call_piece(&mut self, head: Option<CallHead>, arguments: &str, out: &mut Vec<u8>) {
        if let Some(CallHead { id, name }) = head {
            self.close(out);
            self.start(tool_block(&ToolCall { id, name, arguments: String::new() }, json!({})), out);
        }
        if !arguments.is_empty() {
            let delta = json!({"type": "input_json_delta", "partial_json": arguments});
            let delta = json!({"type": "content_block_delta", "index": self.num_closed, "delta": delta});
            sse_named("content_block_delta", &delta, out);
        }
    }
}

impl Framing for MessageStream {
    fn begin(&mut self, out: &mut Vec<u8>) {
        let message = self.head.message(json!([]), Value::Null, Value::Null, self.head.prompt);
        sse_named("message_start", &json!({"type": "message_start", "message": message}), out);
    }

    fn event(&mut self, _: usize, event: GenerationEvent, out: &mut Vec<u8>) {
        match event {
            GenerationEvent::Delta { text, .. } => {
                if !text.is_empty() {
                    self.say(Block::Text, &text, out);
                }
            }
            GenerationEvent::Reasoning { text, .. } => self.say(Block::Thinking, &text, out),
            GenerationEvent::ToolCallPiece { head, arguments, .. } => self.call_piece(head, &arguments, out),
            GenerationEvent::ToolCall { in_pieces: true, .. } => self.stop(out),
            GenerationEvent::ToolCall { call, .. } => self.call(call, out),
            GenerationEvent::ChoiceFinished { cause, .. } => self.cause = cause,
            // Not asked for by this dialect; ends are framed by the stream.
            GenerationEvent::PromptLogprobs { .. } | GenerationEvent::Done { .. } | GenerationEvent::Error(_) => {}
        }
    }

    fn done(&mut self, usage: Usage, out: &mut Vec<u8>) {
        if self.open.is_none() && self.num_closed == 0 {
            self.open(Block::Text, out);
        }
        self.close(out);
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
