//! The response object, and the events of one that is streamed.

use serde_json::{Value, json};

use crate::error::ApiError;
use crate::generation::{ChatMessage, GenerationEvent, StopCause, TokenInfo, Usage};
use crate::http::answer::ChatLogprobs;
use crate::http::stream::{Framing, push_json, sse_named};

use super::store::Store;

/// How a response stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Queued,
    InProgress,
    Completed,
    Incomplete,
    Failed,
    Cancelled,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What is the same in every state of a response.
pub(super) struct Head {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) seed: i64,
    pub(super) background: bool,
    pub(super) store: bool,
    pub(super) instructions: Option<String>,
    pub(super) max_output_tokens: Option<u64>,
    pub(super) metadata: Value,
    pub(super) text: Value,
    pub(super) previous: Option<String>,
    pub(super) temperature: f64,
    pub(super) top_p: f64,
    pub(super) top_logprobs: u64,
    pub(super) wants_logprobs: bool,
}

impl Head {
    pub(super) fn response(&self, status: Status, output: Value, error: Value, usage: Value) -> Value {
        let incomplete = match status {
            Status::Incomplete => json!({"reason": "max_output_tokens"}),
            _ => Value::Null,
        };
        json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status.name(),
            "background": self.background,
            "error": error,
            "incomplete_details": incomplete,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "model": self.model,
            "output": output,
            "parallel_tool_calls": true,
            "previous_response_id": self.previous,
            "reasoning": {"effort": null, "summary": null},
            "seed": self.seed,
            "service_tier": "default",
            "store": self.store,
            "temperature": self.temperature,
            "text": self.text,
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": self.top_logprobs,
            "top_p": self.top_p,
            "truncation": "disabled",
            "usage": usage,
            "user": null,
            "metadata": self.metadata,
        })
    }

    /// Before anything was said.
    pub(super) fn begun(&self, status: Status) -> Value {
        self.response(status, json!([]), Value::Null, Value::Null)
    }

    pub(super) fn failed(&self, error: &ApiError) -> Value {
        let status = if *error == ApiError::Cancelled { Status::Cancelled } else { Status::Failed };
        let error = match status {
            Status::Cancelled => Value::Null,
            _ => json!({"code": error.names().1.unwrap_or("server_error"), "message": error.to_string()}),
        };
        self.response(status, json!([]), error, Value::Null)
    }

    /// With its one message.
    pub(super) fn ended(&self, text: &str, tokens: &[TokenInfo], cause: &StopCause, usage: Usage) -> Value {
        let status = if matches!(cause, StopCause::Length) { Status::Incomplete } else { Status::Completed };
        let item = self.item(status, json!([self.part(text, tokens)]));
        self.response(status, json!([item]), Value::Null, usage_json(usage))
    }

    fn item_id(&self) -> String {
        self.id.replacen("resp_", "msg_", 1)
    }

    fn item(&self, status: Status, content: Value) -> Value {
        json!({
            "id": self.item_id(),
            "type": "message",
            "status": status.name(),
            "role": "assistant",
            "content": content,
        })
    }

    fn part(&self, text: &str, tokens: &[TokenInfo]) -> Value {
        json!({"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs(tokens)})
    }

    fn logprobs(&self, tokens: &[TokenInfo]) -> Value {
        if !self.wants_logprobs {
            return json!([]);
        }
        serde_json::to_value(ChatLogprobs::new(tokens, false).content).unwrap_or_default()
    }
}

fn usage_json(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens.saturating_add(usage.completion_tokens),
    })
}

/// A kept response while it is being made. Let go of before its end, it was cancelled.
pub(super) struct Slot {
    pub(super) store: Store,
    pub(super) id: String,
    /// What the response is the answer to.
    pub(super) conversation: Vec<ChatMessage>,
    pub(super) cancelled: Value,
    pub(super) is_finished: bool,
}

impl Slot {
    /// The response's end; `text` is what it said, where there is something to go on from.
    pub(super) fn finish(&mut self, response: &Value, text: Option<&str>) {
        self.is_finished = true;
        let mut conversation = std::mem::take(&mut self.conversation);
        let conversation = text.map(|text| {
            conversation.push(ChatMessage {
                role: "assistant".to_owned(),
                content: text.to_owned(),
                ..ChatMessage::default()
            });
            conversation
        });
        self.store.finish(&self.id, response.clone(), conversation);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if !self.is_finished {
            self.store.finish(&self.id, self.cancelled.take(), None);
        }
    }
}

/// Events of a streamed response.
pub(super) struct ResponseStream {
    head: Head,
    slot: Option<Slot>,
    text: String,
    tokens: Vec<TokenInfo>,
    cause: StopCause,
    sequence: u64,
    /// What every piece of text begins with.
    delta: Vec<u8>,
}

impl ResponseStream {
    pub(super) fn new(head: Head, slot: Option<Slot>) -> Self {
        let mut delta =
            b"event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\"item_id\":".to_vec();
        push_json(&head.item_id(), &mut delta);
        delta.extend_from_slice(b",\"output_index\":0,\"content_index\":0,\"delta\":");
        Self { head, slot, text: String::new(), tokens: Vec::new(), cause: StopCause::Length, sequence: 0, delta }
    }

    fn say(&mut self, name: &str, mut event: Value, out: &mut Vec<u8>) {
        event["type"] = name.into();
        event["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        sse_named(name, &event, out);
    }
}

impl Framing for ResponseStream {
    fn begin(&mut self, out: &mut Vec<u8>) {
        let response = self.head.begun(Status::InProgress);
        self.say("response.created", json!({"response": response}), out);
        self.say("response.in_progress", json!({"response": response}), out);
        let item = self.head.item(Status::InProgress, json!([]));
        self.say("response.output_item.added", json!({"output_index": 0, "item": item}), out);
        let (item_id, part) = (self.head.item_id(), self.head.part("", &[]));
        let added = json!({"item_id": item_id, "output_index": 0, "content_index": 0, "part": part});
        self.say("response.content_part.added", added, out);
    }

    fn event(&mut self, _: usize, event: GenerationEvent, out: &mut Vec<u8>) {
        match event {
            GenerationEvent::Delta { text, tokens, .. } => {
                if !text.is_empty() {
                    out.extend_from_slice(&self.delta);
                    push_json(&text, out);
                    out.extend_from_slice(b",\"logprobs\":");
                    push_json(&self.head.logprobs(&tokens), out);
                    out.extend_from_slice(b",\"sequence_number\":");
                    push_json(&self.sequence, out);
                    out.extend_from_slice(b"}\n\n");
                    self.sequence += 1;
                }
                self.text.push_str(&text);
                if self.head.wants_logprobs {
                    self.tokens.extend(tokens);
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
        let (text, tokens) = (std::mem::take(&mut self.text), std::mem::take(&mut self.tokens));
        let item_id = self.head.item_id();
        let logprobs = self.head.logprobs(&tokens);
        let done = json!({
            "item_id": item_id, "output_index": 0, "content_index": 0, "text": text, "logprobs": logprobs
        });
        self.say("response.output_text.done", done, out);
        let part = self.head.part(&text, &tokens);
        let done = json!({"item_id": item_id, "output_index": 0, "content_index": 0, "part": part});
        self.say("response.content_part.done", done, out);
        let response = self.head.ended(&text, &tokens, &self.cause, usage);
        let done = json!({"output_index": 0, "item": response["output"][0]});
        self.say("response.output_item.done", done, out);
        if let Some(slot) = &mut self.slot {
            slot.finish(&response, Some(&text));
        }
        let name = if matches!(self.cause, StopCause::Length) { "response.incomplete" } else { "response.completed" };
        self.say(name, json!({"response": response}), out);
    }

    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        let response = self.head.failed(error);
        if let Some(slot) = &mut self.slot {
            slot.finish(&response, None);
        }
        self.say("response.failed", json!({"response": response}), out);
    }
}
