//! The events of a streamed response: each item begins, comes in pieces, and ends.

use serde_json::{Value, json};

use crate::error::ApiError;
use crate::generation::{CallHead, GenerationEvent, StopCause, ToolCall, Usage};
use crate::http::items::{Item, Items};
use crate::http::stream::{Framing, push_json, sse_named};

use super::wire::{Head, Slot, Status};

/// What is told as it comes; what was said so far is kept for the response at the end.
pub(super) struct ResponseStream {
    head: Head,
    slot: Option<Slot>,
    items: Items,
    /// Whether the last item has begun and not ended.
    is_open: bool,
    cause: StopCause,
    sequence: u64,
    /// What every piece of the open item begins with.
    delta: Vec<u8>,
}

impl ResponseStream {
    pub(super) fn new(head: Head, slot: Option<Slot>) -> Self {
        Self {
            head,
            slot,
            items: Items::default(),
            is_open: false,
            cause: StopCause::Length,
            sequence: 0,
            delta: Vec::new(),
        }
    }

    fn say(&mut self, name: &str, mut event: Value, out: &mut Vec<u8>) {
        event["type"] = name.into();
        event["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        sse_named(name, &event, out);
    }

    /// The last item and its place.
    fn last(&self) -> Option<(usize, &Item)> {
        let items = self.items.as_slice();
        items.last().map(|item| (items.len() - 1, item))
    }

    fn added(&mut self, out: &mut Vec<u8>) {
        let Some((index, item)) = self.last() else { return };
        let added = json!({"output_index": index, "item": self.head.item(index, item, Status::InProgress)});
        self.say("response.output_item.added", added, out);
    }

    /// The last item, which is a text or a thought, begins.
    fn open(&mut self, kind: &str, out: &mut Vec<u8>) {
        self.added(out);
        let Some((index, item)) = self.last() else { return };
        let (id, part) = (self.head.item_id(index, item), self.head.empty_part(item));
        let delta = format!("event: response.{kind}.delta\ndata: {{\"type\":\"response.{kind}.delta\",\"item_id\":");
        self.delta = delta.into_bytes();
        push_json(&id, &mut self.delta);
        self.delta.extend_from_slice(format!(",\"output_index\":{index},\"content_index\":0,\"delta\":").as_bytes());
        self.is_open = true;
        let added = json!({"item_id": id, "output_index": index, "content_index": 0, "part": part});
        self.say("response.content_part.added", added, out);
    }

    /// The last item ends, where it is open: no more of it comes.
    fn close(&mut self, status: Status, out: &mut Vec<u8>) {
        if !std::mem::take(&mut self.is_open) {
            return;
        }
        let Some((index, item)) = self.last() else { return };
        let id = self.head.item_id(index, item);
        let part = self.head.part(item);
        let whole = self.head.item(index, item, status);
        let at = json!({"item_id": id, "output_index": index, "content_index": 0});
        let mut done = at.clone();
        done["text"] = part["text"].clone();
        let name = match item {
            Item::Reasoning(_) => "response.reasoning_text.done",
            Item::Text { .. } | Item::Call(_) => {
                done["logprobs"] = part["logprobs"].clone();
                "response.output_text.done"
            }
        };
        self.say(name, done, out);
        let mut done = at;
        done["part"] = part;
        self.say("response.content_part.done", done, out);
        self.say("response.output_item.done", json!({"output_index": index, "item": whole}), out);
    }

    fn piece(&mut self, text: &str, logprobs: Option<Value>, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.delta);
        push_json(&text, out);
        if let Some(logprobs) = logprobs {
            out.extend_from_slice(b",\"logprobs\":");
            push_json(&logprobs, out);
        }
        out.extend_from_slice(b",\"sequence_number\":");
        push_json(&self.sequence, out);
        out.extend_from_slice(b"}\n\n");
        self.sequence += 1;
    }

    fn call(&mut self, call: ToolCall, out: &mut Vec<u8>) {
        let ToolCall { id, name, arguments } = call.clone();
        self.call_piece(Some(CallHead { id, name }), "", out);
        self.call_piece(None, &arguments, out);
        self.end_call(call, out);
    }

    /// A call begins, or more of its arguments comes.
    fn call_piece(&mut self, head: Option<CallHead>, arguments: &str, out: &mut Vec<u8>) {
        if let Some(CallHead { id, name }) = head {
            self.close(Status::Completed, out);
            self.items.call(ToolCall { id, name, arguments: String::new() });
            self.added(out);
            return;
        }
        let Some((index, item)) = self.last() else { return };
        let delta = json!({"item_id": self.head.item_id(index, item), "output_index": index, "delta": arguments});
        self.say("response.function_call_arguments.delta", delta, out);
    }

    fn end_call(&mut self, call: ToolCall, out: &mut Vec<u8>) {
        let (name, arguments) = (call.name.clone(), call.arguments.clone());
        self.items.end_call(call);
        let Some((index, item)) = self.last() else { return };
        let (id, whole) = (self.head.item_id(index, item), self.head.item(index, item, Status::Completed));
        let done = json!({"item_id": id, "output_index": index, "name": name, "arguments": arguments});
        self.say("response.function_call_arguments.done", done, out);
        self.say("response.output_item.done", json!({"output_index": index, "item": whole}), out);
    }
}

impl Framing for ResponseStream {
    fn begin(&mut self, out: &mut Vec<u8>) {
        let response = self.head.begun(Status::InProgress);
        self.say("response.created", json!({"response": response}), out);
        self.say("response.in_progress", json!({"response": response}), out);
    }

    fn event(&mut self, _: usize, event: GenerationEvent, out: &mut Vec<u8>) {
        match event {
            GenerationEvent::Delta { text, tokens, .. } => {
                if text.is_empty() {
                    self.items.text("", tokens);
                    return;
                }
                let goes_on = self.is_open && matches!(self.last(), Some((_, Item::Text { .. })));
                if !goes_on {
                    self.close(Status::Completed, out);
                }
                let logprobs = self.head.logprobs(&tokens);
                self.items.text(&text, tokens);
                if !goes_on {
                    self.open("output_text", out);
                }
                self.piece(&text, Some(logprobs), out);
            }
            GenerationEvent::Reasoning { text, .. } => {
                let goes_on = self.is_open && matches!(self.last(), Some((_, Item::Reasoning(_))));
                if !goes_on {
                    self.close(Status::Completed, out);
                }
                self.items.reasoning(&text);
                if !goes_on {
                    self.open("reasoning_text", out);
                }
                self.piece(&text, None, out);
            }
            GenerationEvent::ToolCallPiece { head, arguments, .. } => self.call_piece(head, &arguments, out),
            GenerationEvent::ToolCall { call, in_pieces: true, .. } => self.end_call(call, out),
            GenerationEvent::ToolCall { call, .. } => self.call(call, out),
            GenerationEvent::ChoiceFinished { cause, .. } => self.cause = cause,
            // Not asked for by this dialect; ends are framed by the stream.
            GenerationEvent::PromptLogprobs { .. } | GenerationEvent::Done { .. } | GenerationEvent::Error(_) => {}
        }
    }

    fn done(&mut self, usage: Usage, out: &mut Vec<u8>) {
        if self.items.as_slice().is_empty() {
            self.items = std::mem::take(&mut self.items).ended();
            self.open("output_text", out);
        }
        let is_whole = !matches!(self.cause, StopCause::Length);
        self.close(if is_whole { Status::Completed } else { Status::Incomplete }, out);
        let response = self.head.ended(&self.items, &self.cause, usage);
        if let Some(slot) = &mut self.slot {
            slot.finish(&response, Some(&self.items));
        }
        let name = if is_whole { "response.completed" } else { "response.incomplete" };
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
