//! A request that runs: from what the engine says to what clients are told.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::Stream;
use quire_engine::TokenEvent;
use quire_scheduler::FinishReason;

use crate::error::ApiError;
use crate::inflight::Entered;
use crate::metrics::{Outcome, RequestMetrics};
use crate::worker::TokenSource;

use super::choice::{Choice, ChoiceRules};
use super::{GenerationEvent, Usage};

/// A request that the engine took.
pub(super) struct Started {
    pub(super) request_id: String,
    pub(super) seed: u64,
    pub(super) prompt: Arc<[u32]>,
    pub(super) created: u64,
    pub(super) source: Box<dyn TokenSource>,
    pub(super) entered: Entered,
    pub(super) rules: ChoiceRules,
    pub(super) choices: Vec<Choice>,
    pub(super) events: VecDeque<GenerationEvent>,
}

impl Started {
    pub(super) fn into_generation(self, metrics: RequestMetrics) -> Generation {
        // A prompt is never longer than `max_model_len`, which is a u32.
        let prompt_tokens = self.prompt.len() as u32;
        let mut generation = Generation {
            request_id: self.request_id,
            seed: self.seed,
            prompt_token_ids: self.prompt,
            created: self.created,
            rules: self.rules,
            choices: self.choices,
            events: self.events,
            usage: Usage { prompt_tokens, ..Usage::default() },
            running: Some(Running { source: self.source, entered: self.entered, metrics, scheduled: false }),
        };
        // What was generated elsewhere can hold a whole stop string.
        generation.finish_if_done();
        generation
    }
}

/// A running request: a stream of events. Dropping it before its last event cancels it.
pub struct Generation {
    pub request_id: String,
    /// What the draws came from; the same request with this seed gives the same tokens.
    pub seed: u64,
    pub prompt_token_ids: Arc<[u32]>,
    /// Seconds since 1970.
    pub created: u64,
    rules: ChoiceRules,
    choices: Vec<Choice>,
    /// Events of the last token that were not taken yet; a handful at most.
    events: VecDeque<GenerationEvent>,
    usage: Usage,
    /// `None` once the last event is in `events`.
    running: Option<Running>,
}

/// What is given back when a request ends.
struct Running {
    source: Box<dyn TokenSource>,
    entered: Entered,
    metrics: RequestMetrics,
    scheduled: bool,
}

impl Generation {
    /// Tokens so far; those of the output are counted with the last event.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// The next event; `None` after the last one, which is `Done` or `Error`.
    pub async fn next(&mut self) -> Option<GenerationEvent> {
        std::future::poll_fn(|cx| self.poll_event(cx)).await
    }

    /// [`Self::next`] for those who poll.
    pub(crate) fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<GenerationEvent>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Poll::Ready(Some(event));
            }
            let Some(running) = &mut self.running else { return Poll::Ready(None) };
            if let Poll::Ready(error) = running.entered.poll_end(cx) {
                self.fail(error);
                continue;
            }
            match running.source.poll_next(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(event)) => self.take(event),
                Poll::Ready(None) => {
                    tracing::error!(request_id = self.request_id, "the worker's stream ended before the request did");
                    self.fail(ApiError::Internal { request_id: self.request_id.clone() });
                }
            }
        }
    }

    fn take(&mut self, event: TokenEvent) {
        let Some(running) = &mut self.running else { return };
        let events = &mut self.events;
        match event {
            TokenEvent::Scheduled { num_cached_tokens, .. } => {
                if !std::mem::replace(&mut running.scheduled, true) {
                    // Tokens that another server generated can be in the cache too.
                    let num_cached_tokens = num_cached_tokens.min(self.usage.prompt_tokens);
                    self.usage.cached_tokens = num_cached_tokens;
                    running.metrics.scheduled();
                    running.metrics.prompt_tokens(self.usage.prompt_tokens, num_cached_tokens);
                }
            }
            TokenEvent::PromptLogprobs { choice_index, position, logprobs } => {
                if self.choices.first().is_some_and(|choice| choice.index() == choice_index)
                    && let Some(token_id) = self.prompt_token_ids.get(position as usize)
                {
                    let info = self.rules.info(*token_id, Some(logprobs), 0);
                    events.push_back(GenerationEvent::PromptLogprobs { position, info });
                }
            }
            TokenEvent::Token { choice_index, token_id, logprobs } => {
                if let Some((place, choice)) = choice_of(&mut self.choices, choice_index)
                    && !choice.is_finished()
                {
                    running.metrics.token(place);
                    choice.token(token_id, logprobs, &self.rules, |event| events.push_back(event));
                    // A stop string, which the engine does not know: it would go on to the end of the request.
                    if choice.is_finished() {
                        running.source.end_choice(choice_index);
                    }
                }
            }
            TokenEvent::Finished { choice_index, reason, .. } => {
                if let Some((_, choice)) = choice_of(&mut self.choices, choice_index) {
                    let ended_before = choice.is_finished();
                    match reason {
                        _ if ended_before => {}
                        FinishReason::Stop { .. } | FinishReason::Length => {
                            choice.end(reason, &self.rules, |event| events.push_back(event));
                        }
                        FinishReason::Cancelled => return self.fail(ApiError::Cancelled),
                        FinishReason::DeadlineExceeded => return self.fail(ApiError::DeadlineExceeded),
                        FinishReason::NothingAllowed => return self.fail(ApiError::NothingAllowed),
                        FinishReason::NonFinite => {
                            tracing::error!(
                                request_id = self.request_id,
                                "the device computed logits that are not finite"
                            );
                            return self.fail(ApiError::Internal { request_id: self.request_id.clone() });
                        }
                    }
                }
            }
            TokenEvent::Failed => {
                tracing::error!(request_id = self.request_id, "the engine failed or stopped");
                return self.fail(ApiError::Internal { request_id: self.request_id.clone() });
            }
        }
        self.finish_if_done();
    }

    fn finish_if_done(&mut self) {
        if self.choices.iter().all(Choice::is_finished) {
            self.usage.completion_tokens = self.choices.iter().map(Choice::num_tokens).sum();
            self.usage.reasoning_tokens = self.choices.iter().map(Choice::num_reasoning_tokens).sum();
            self.events.push_back(GenerationEvent::Done { usage: self.usage });
            self.end(Outcome::Finished);
        }
    }

    /// Ends the request with an error; nothing comes after it.
    fn fail(&mut self, error: ApiError) {
        let outcome = Outcome::from(&error);
        self.events.push_back(GenerationEvent::Error(error));
        self.end(outcome);
    }

    /// Gives everything back. Dropping the source cancels what the engine still works on.
    fn end(&mut self, outcome: Outcome) {
        if let Some(Running { source, entered, metrics, .. }) = self.running.take() {
            drop(source);
            drop(entered);
            metrics.finish(outcome);
        }
    }
}

impl Stream for Generation {
    type Item = GenerationEvent;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<GenerationEvent>> {
        self.poll_event(cx)
    }
}

/// The choice of this index, and its place among the request's.
fn choice_of(choices: &mut [Choice], index: u32) -> Option<(usize, &mut Choice)> {
    choices.iter_mut().enumerate().find(|(_, choice)| choice.index() == index)
}
