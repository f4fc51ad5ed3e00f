//! The response object, and its place among those that are kept.

use serde_json::{Value, json};

use crate::error::ApiError;
use crate::generation::{ChatMessage, StopCause, TokenInfo, ToolCall, Usage};
use crate::http::answer::ChatLogprobs;
use crate::http::items::{Item, Items};

use super::body::Said;
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
    pub(super) said: Said,
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
            "parallel_tool_calls": self.said.parallel_tool_calls,
            "previous_response_id": self.previous,
            "reasoning": {"effort": self.said.effort, "summary": null},
            "seed": self.seed,
            "service_tier": "default",
            "store": self.store,
            "temperature": self.temperature,
            "text": self.said.text,
            "tool_choice": self.said.tool_choice,
            "tools": self.said.tools,
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

    /// With all that it said. Where it ran out of tokens, its last item is not whole; a call always is.
    pub(super) fn ended(&self, items: &Items, cause: &StopCause, usage: Usage) -> Value {
        let status = if matches!(cause, StopCause::Length) { Status::Incomplete } else { Status::Completed };
        let items = items.as_slice();
        let output = items.iter().enumerate().map(|(index, item)| {
            let is_last = index + 1 == items.len();
            self.item(index, item, if is_last { status } else { Status::Completed })
        });
        self.response(status, output.collect(), Value::Null, usage_json(usage))
    }

    pub(super) fn item_id(&self, index: usize, item: &Item) -> String {
        let prefix = match item {
            Item::Text { .. } => "msg",
            Item::Reasoning(_) => "rs",
            Item::Call(_) => "fc",
        };
        format!("{prefix}_{}_{index}", self.id.trim_start_matches("resp_"))
    }

    pub(super) fn item(&self, index: usize, item: &Item, status: Status) -> Value {
        let id = self.item_id(index, item);
        match item {
            Item::Text { .. } => json!({
                "id": id,
                "type": "message",
                "status": status.name(),
                "role": "assistant",
                "content": self.parts(item, status),
            }),
            Item::Reasoning(_) => json!({
                "id": id,
                "type": "reasoning",
                "status": status.name(),
                "summary": [],
                "content": self.parts(item, status),
                "encrypted_content": null,
            }),
            Item::Call(ToolCall { id: call_id, name, arguments }) => json!({
                "id": id,
                "type": "function_call",
                "status": match status {
                    Status::InProgress => status.name(),
                    _ => Status::Completed.name(),
                },
                "call_id": call_id,
                "name": name,
                "arguments": match status {
                    Status::InProgress => "",
                    _ => arguments,
                },
            }),
        }
    }

    /// The one part of an item, where it has begun.
    fn parts(&self, item: &Item, status: Status) -> Value {
        match status {
            Status::InProgress => json!([]),
            _ => json!([self.part(item)]),
        }
    }

    pub(super) fn part(&self, item: &Item) -> Value {
        match item {
            Item::Text { text, tokens } => {
                json!({"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs(tokens)})
            }
            Item::Reasoning(text) => json!({"type": "reasoning_text", "text": text}),
            Item::Call(_) => Value::Null,
        }
    }

    /// A part of which nothing has come yet.
    pub(super) fn empty_part(&self, item: &Item) -> Value {
        match item {
            Item::Reasoning(_) => self.part(&Item::Reasoning(String::new())),
            _ => self.part(&Item::Text { text: String::new(), tokens: Vec::new() }),
        }
    }

    pub(super) fn logprobs(&self, tokens: &[TokenInfo]) -> Value {
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
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
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
    /// The response's end; `items` are what it said, where there is something to go on from.
    pub(super) fn finish(&mut self, response: &Value, items: Option<&Items>) {
        self.is_finished = true;
        let mut conversation = std::mem::take(&mut self.conversation);
        let conversation = items.map(|items| {
            conversation.push(items.message());
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
