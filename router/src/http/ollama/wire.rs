//! What is answered: one JSON object a line, or one alone.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::error::ApiError;
use crate::generation::{GenerationEvent, StopCause, ToolCall, Usage};
use crate::http::answer::json as to_json;
use crate::http::ask::Whole;
use crate::http::failure::{Dialect, error_json};
use crate::http::stream::{Framing, push_json};
use crate::metrics::Endpoint;
use crate::telemetry::format_time;

fn now() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format_time(now.as_secs(), now.subsec_millis())
}

/// What one line says.
#[derive(Default)]
struct Line<'l> {
    text: &'l str,
    thinking: &'l str,
    calls: Vec<Value>,
}

/// One JSON object a line; the last one says `done`.
pub(super) struct LineWriter {
    model: String,
    endpoint: Endpoint,
    begun: Instant,
    first: Option<Instant>,
    cause: Option<StopCause>,
}

impl LineWriter {
    pub(super) fn new(model: String, endpoint: Endpoint, begun: Instant) -> Self {
        Self { model, endpoint, begun, first: None, cause: None }
    }

    fn line(&self, line: &Line<'_>, last: Option<Value>, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"model\":");
        push_json(&self.model, out);
        out.extend_from_slice(b",\"created_at\":\"");
        out.extend_from_slice(now().as_bytes());
        let is_chat = self.endpoint == Endpoint::OllamaChat;
        out.extend_from_slice(match is_chat {
            true => b"\",\"message\":{\"role\":\"assistant\",\"content\":",
            false => b"\",\"response\":",
        });
        push_json(&line.text, out);
        if !line.thinking.is_empty() {
            out.extend_from_slice(b",\"thinking\":");
            push_json(&line.thinking, out);
        }
        if !line.calls.is_empty() {
            out.extend_from_slice(b",\"tool_calls\":");
            push_json(&line.calls, out);
        }
        if is_chat {
            out.push(b'}');
        }
        match last {
            None => out.extend_from_slice(b",\"done\":false}\n"),
            Some(last) => {
                out.extend_from_slice(b",\"done\":true,");
                // The fields of an object, without its first brace.
                out.extend_from_slice(to_json(&last).get(1..).unwrap_or_default());
                out.push(b'\n');
            }
        }
    }

    /// The answer to a request of nothing: the model is there.
    pub(super) fn loaded(&self) -> Vec<u8> {
        let mut body = Vec::new();
        self.line(&Line::default(), Some(json!({"done_reason": "load"})), &mut body);
        body
    }

    /// The whole answer.
    pub(super) fn ended(mut self, whole: Whole) -> Vec<u8> {
        self.cause = Some(whole.cause);
        let (text, thinking) = (whole.items.all_text(), whole.items.all_reasoning());
        let calls = whole.items.calls().zip(0..).map(|(call, index)| call_json(call, index)).collect();
        let mut body = Vec::new();
        self.line(&Line { text: &text, thinking: &thinking, calls }, Some(self.last(whole.usage)), &mut body);
        body
    }

    /// What the last line says beside the text. Durations are in nanoseconds.
    fn last(&self, usage: Usage) -> Value {
        let now = Instant::now();
        let first = self.first.unwrap_or(now);
        let nanos = |from: Instant, to: Instant| {
            u64::try_from(to.saturating_duration_since(from).as_nanos()).unwrap_or(u64::MAX)
        };
        json!({
            "done_reason": if matches!(self.cause, Some(StopCause::Length)) { "length" } else { "stop" },
            "total_duration": nanos(self.begun, now),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": nanos(self.begun, first),
            "eval_count": usage.completion_tokens,
            "eval_duration": nanos(first, now),
        })
    }
}

/// A call; its arguments are an object in this dialect, and where they were cut off their text is kept in one.
fn call_json(call: &ToolCall, index: u32) -> Value {
    let arguments: Value =
        serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({"INVALID_JSON": call.arguments}));
    json!({"id": call.id, "function": {"index": index, "name": call.name, "arguments": arguments}})
}

impl Framing for LineWriter {
    fn event(&mut self, _: usize, event: GenerationEvent, out: &mut Vec<u8>) {
        match event {
            GenerationEvent::Delta { text, .. } => {
                self.first.get_or_insert_with(Instant::now);
                if !text.is_empty() {
                    self.line(&Line { text: &text, ..Line::default() }, None, out);
                }
            }
            GenerationEvent::Reasoning { text, .. } => {
                self.first.get_or_insert_with(Instant::now);
                self.line(&Line { thinking: &text, ..Line::default() }, None, out);
            }
            GenerationEvent::ToolCall { call_index, call, .. } => {
                self.line(&Line { calls: vec![call_json(&call, call_index)], ..Line::default() }, None, out);
            }
            GenerationEvent::ChoiceFinished { cause, .. } => self.cause = Some(cause),
            // Not asked for by this dialect; ends are framed by the stream.
            GenerationEvent::PromptLogprobs { .. }
            | GenerationEvent::ToolCallPiece { .. }
            | GenerationEvent::Done { .. }
            | GenerationEvent::Error(_) => {}
        }
    }

    fn done(&mut self, usage: Usage, out: &mut Vec<u8>) {
        self.line(&Line::default(), Some(self.last(usage)), out);
    }

    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        out.extend_from_slice(&error_json(error, Dialect::Ollama, ""));
        out.push(b'\n');
    }

    fn waiting(&mut self, out: &mut Vec<u8>) {
        // Every line is read as an object; there are no comments.
        self.line(&Line::default(), None, out);
    }
}
