//! Streamed answers: events of generations, framed by a dialect, in as few writes as there are moments to write.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures::Stream;
use serde::Serialize;
use tokio::time::{Instant, Interval, MissedTickBehavior};

use crate::error::ApiError;
use crate::generation::{GenerationEvent, GenerationService, TokenInfo, Usage};

use super::answer::{Event, Generations};
use super::failure::Failure;

pub(super) const SSE: &str = "text/event-stream; charset=utf-8";
pub(super) const NDJSON: &str = "application/x-ndjson";

/// Bytes after which what is ready is sent before more is looked for.
const FULL: usize = 16 << 10;

/// How a dialect writes events. What is the same in every part of an answer is written once, by whoever makes it.
pub(super) trait Framing: Send + Unpin + 'static {
    /// What is said before any event is there.
    fn begin(&mut self, _out: &mut Vec<u8>) {}
    /// One event of one prompt's generation; its last one comes to [`Self::done`] or [`Self::error`].
    fn event(&mut self, prompt_index: usize, event: GenerationEvent, out: &mut Vec<u8>);
    /// All ended well.
    fn done(&mut self, usage: Usage, out: &mut Vec<u8>);
    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>);
    /// A sign of life that changes nothing: by default a comment, which readers of the stream pass over.
    fn waiting(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(b": waiting\n\n");
    }
}

/// The response that streams `generations`. An error before the first event is a response of its own.
pub(super) async fn streamed(
    service: &GenerationService,
    mut generations: Generations,
    framing: impl Framing,
    content_type: &'static str,
    interval: u32,
) -> Result<Response, Failure> {
    // What goes wrong before the first event still has a status of its own, unless that takes so long that the client
    // must hear something.
    let keepalive = match service.limits().sse_keepalive_seconds {
        0 => None,
        seconds => Some(Duration::from_secs(seconds)),
    };
    let first = match keepalive {
        None => generations.next().await,
        Some(limit) => tokio::time::timeout(limit, generations.next()).await.unwrap_or(None),
    };
    if let Some(Event::Error(error)) = first {
        return Err(error.into());
    }
    let events = EventStream::new(framing, Merger::new(interval), first, generations, keepalive);
    let mut response = Response::new(Body::from_stream(events));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that buffer answers would undo the streaming.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// The body of a streamed answer.
struct EventStream<F> {
    generations: Generations,
    /// The event that was awaited before the answer began.
    first: Option<Event>,
    framing: F,
    merger: Merger,
    keepalive: Option<Interval>,
    /// Something was said since the last tick.
    has_spoken: bool,
    has_begun: bool,
    ended: bool,
}

impl<F: Framing> EventStream<F> {
    /// `keepalive`: how often something is said at least.
    fn new(
        framing: F,
        merger: Merger,
        first: Option<Event>,
        generations: Generations,
        keepalive: Option<Duration>,
    ) -> Self {
        let keepalive = keepalive.map(|period| {
            // Where the first event is not there yet, that long has passed already.
            let start = if first.is_none() { Instant::now() } else { Instant::now() + period };
            let mut ticks = tokio::time::interval_at(start, period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        });
        Self { generations, first, framing, merger, keepalive, has_spoken: false, has_begun: false, ended: false }
    }

    /// Whether it is time for a sign of life.
    fn is_quiet(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(ticks) = &mut self.keepalive else { return false };
        while ticks.poll_tick(cx).is_ready() {
            if !std::mem::take(&mut self.has_spoken) {
                return true;
            }
        }
        false
    }
}

impl<F: Framing> Stream for EventStream<F> {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let mut out = Vec::new();
        while !this.ended && out.len() < FULL {
            let event = match this.first.take() {
                Some(event) => Some(event),
                None => match this.generations.poll_next(cx) {
                    Poll::Ready(event) => event,
                    Poll::Pending if out.is_empty() && this.is_quiet(cx) => {
                        this.framing.waiting(&mut out);
                        return Poll::Ready(Some(Ok(out.into())));
                    }
                    Poll::Pending if out.is_empty() => return Poll::Pending,
                    Poll::Pending => break,
                },
            };
            if !std::mem::replace(&mut this.has_begun, true) {
                this.framing.begin(&mut out);
            }
            let framing = &mut this.framing;
            match event {
                Some(Event::Of { prompt_index, event }) => {
                    this.merger.pass(prompt_index, event, |event| framing.event(prompt_index, event, &mut out));
                }
                Some(Event::Done(usage)) => {
                    framing.done(usage, &mut out);
                    this.ended = true;
                }
                Some(Event::Error(error)) => {
                    framing.error(&error, &mut out);
                    this.ended = true;
                }
                None => this.ended = true,
            }
        }
        this.has_spoken = true;
        if out.is_empty() { Poll::Ready(None) } else { Poll::Ready(Some(Ok(out.into()))) }
    }
}

/// Holds tokens of a choice back until there are so many (`stream_interval`), but for its first, which comes at once.
struct Merger {
    interval: u32,
    held: BTreeMap<(usize, u32), Held>,
}

#[derive(Default)]
struct Held {
    has_spoken: bool,
    text: String,
    tokens: Vec<TokenInfo>,
}

impl Merger {
    /// An interval of 1 holds nothing back.
    fn new(interval: u32) -> Self {
        Self { interval, held: BTreeMap::new() }
    }

    /// `event`, or what is to be said in its place: nothing yet, or what was held back before it.
    fn pass(&mut self, prompt_index: usize, event: GenerationEvent, mut emit: impl FnMut(GenerationEvent)) {
        if self.interval <= 1 {
            return emit(event);
        }
        match event {
            GenerationEvent::Delta { choice_index, text, tokens } => {
                let held = self.held.entry((prompt_index, choice_index)).or_default();
                held.text.push_str(&text);
                held.tokens.extend(tokens);
                let is_first = !std::mem::replace(&mut held.has_spoken, true);
                if is_first || held.tokens.len() >= self.interval as usize {
                    let (text, tokens) = (std::mem::take(&mut held.text), std::mem::take(&mut held.tokens));
                    emit(GenerationEvent::Delta { choice_index, text, tokens });
                }
            }
            // In order: what comes before is said before.
            GenerationEvent::Reasoning { choice_index, .. }
            | GenerationEvent::ToolCall { choice_index, .. }
            | GenerationEvent::ChoiceFinished { choice_index, .. } => {
                if let Some(held) = self.held.get_mut(&(prompt_index, choice_index)) {
                    let (text, tokens) = (std::mem::take(&mut held.text), std::mem::take(&mut held.tokens));
                    if !(text.is_empty() && tokens.is_empty()) {
                        emit(GenerationEvent::Delta { choice_index, text, tokens });
                    }
                }
                emit(event);
            }
            other => emit(other),
        }
    }
}

/// `data: ` and a value of ours as one event.
pub(super) fn sse_data(json: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(json);
    out.extend_from_slice(b"\n\n");
}

/// An event with a name.
pub(super) fn sse_named(name: &str, value: &impl Serialize, out: &mut Vec<u8>) {
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\ndata: ");
    push_json(value, out);
    out.extend_from_slice(b"\n\n");
}

/// Appends a value of ours as JSON; none of them can fail to be written to memory.
pub(super) fn push_json(value: &impl Serialize, out: &mut Vec<u8>) {
    let _ = serde_json::to_writer(out, value);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generation::StopCause;

    #[test]
    fn tokens_are_held_back_and_none_is_lost() {
        let token = |id| TokenInfo { token_id: id, bytes: [0][..].into(), num_chars: 1, logprobs: None };
        let mut merger = Merger::new(3);
        let mut said = Vec::new();
        for id in 0..6 {
            let delta = GenerationEvent::Delta { choice_index: 0, text: id.to_string(), tokens: vec![token(id)] };
            merger.pass(0, delta, |event| said.push(event));
        }
        let end = GenerationEvent::ChoiceFinished { choice_index: 0, cause: StopCause::Length };
        merger.pass(0, end.clone(), |event| said.push(event));
        let texts: Vec<&str> = said
            .iter()
            .filter_map(|event| match event {
                GenerationEvent::Delta { text, .. } => Some(text.as_str()),
                _ => None,
            })
            .collect();
        assert_eq!(texts, ["0", "123", "45"]);
        assert_eq!(said.last(), Some(&end));
    }
}
