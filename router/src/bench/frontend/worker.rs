//! A model that takes no time: a thread that gives each running request a token in each step, as an engine's thread would.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, mpsc as threads};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use quire_engine::scheduler::{FinishReason, FlushReport, SchedulerStats};
use quire_engine::{
    DeviceInfo, EngineHealth, KvEventStream, ModelInfo, Submission, SubmitError, SubscribeError, TokenEvent,
};
use tokio::sync::mpsc;

use crate::worker::{TokenSource, Worker};

/// How soon the next step begins.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pace {
    /// As soon as the front end took about as many tokens as a step makes.
    Saturating,
    /// After so long.
    Every(Duration),
}

/// Wait for a front end that is behind.
const BEHIND: Duration = Duration::from_micros(50);

pub(super) struct IdleWorker {
    info: ModelInfo,
    submit: threads::Sender<Running>,
    /// Tokens that were made and not taken yet.
    untaken: Arc<AtomicI64>,
}

struct Running {
    events: mpsc::Sender<TokenEvent>,
    num_left: u32,
    num_made: u32,
}

impl Running {
    /// Makes a token. Says whether there are more to come.
    fn step(&mut self, token_id: u32, untaken: &AtomicI64) -> bool {
        let token = TokenEvent::Token { choice_index: 0, token_id, logprobs: None };
        // Channels have room for all of a request; one that is closed has lost its caller.
        if self.events.try_send(token).is_err() {
            return false;
        }
        untaken.fetch_add(1, Ordering::Relaxed);
        self.num_left -= 1;
        self.num_made += 1;
        if self.num_left == 0 {
            let (reason, num_generated_tokens) = (FinishReason::Length, self.num_made);
            let _ = self.events.try_send(TokenEvent::Finished { choice_index: 0, reason, num_generated_tokens });
        }
        self.num_left > 0
    }
}

impl IdleWorker {
    /// Its thread ends when the worker is dropped. `token_id` is what every request is answered with.
    pub(super) fn start(vocab_size: u32, token_id: u32, pace: Pace) -> Self {
        let (submit, submitted) = threads::channel();
        let untaken = Arc::new(AtomicI64::new(0));
        let made = Arc::clone(&untaken);
        std::thread::spawn(move || step(&submitted, &made, token_id, pace));
        let info = ModelInfo {
            device_memory: None,
            architecture: "NoneForCausalLM".to_owned(),
            vocab_size,
            max_model_len: 4096,
            digest: [0; 32],
            eos_token_ids: Vec::new(),
            num_parameters: 0,
            weight_bytes: 0,
            kv_cache_bytes: 0,
            weight_format: "none",
            dtype: "none",
            kv_dtype: "none",
            device: DeviceInfo { kind: "none", name: "none".to_owned(), isa: "none".to_owned(), num_units: 0 },
            device_note: None,
            block_size: 16,
            num_blocks: 0,
            max_num_seqs: 4096,
            max_num_batched_tokens: 4096,
            prefix_cache: false,
            kv_events: false,
        };
        Self { info, submit, untaken }
    }
}

fn step(submitted: &threads::Receiver<Running>, untaken: &AtomicI64, token_id: u32, pace: Pace) {
    let mut running: Vec<Running> = Vec::new();
    loop {
        if running.is_empty() {
            match submitted.recv() {
                Ok(first) => running.push(first),
                Err(_) => return,
            }
        }
        running.extend(submitted.try_iter());
        running.retain_mut(|request| request.step(token_id, untaken));
        match pace {
            Pace::Every(period) => {
                let next = Instant::now() + period;
                // Whoever comes between two steps has its first token at once: no part of the time to it is the model's.
                while let Ok(mut request) = submitted.recv_timeout(next.saturating_duration_since(Instant::now())) {
                    if request.step(token_id, untaken) {
                        running.push(request);
                    }
                }
            }
            Pace::Saturating => {
                while untaken.load(Ordering::Relaxed) > running.len() as i64 {
                    std::thread::sleep(BEHIND);
                }
            }
        }
    }
}

impl Worker for IdleWorker {
    fn submit(&self, submission: Submission) -> BoxFuture<'_, Result<Box<dyn TokenSource>, SubmitError>> {
        let num_left = submission.max_tokens;
        // Scheduled, the tokens and the end.
        let (events, receiver) = mpsc::channel(num_left as usize + 2);
        let _ = events.try_send(TokenEvent::Scheduled { choice_index: 0, num_cached_tokens: 0 });
        let submitted = self.submit.send(Running { events, num_left, num_made: 0 });
        let source = Source { receiver, untaken: Arc::clone(&self.untaken) };
        Box::pin(async move {
            submitted.map_err(|_| SubmitError::Stopped)?;
            Ok(Box::new(source) as Box<dyn TokenSource>)
        })
    }

    fn flush_cache(&self) -> BoxFuture<'_, Result<FlushReport, SubmitError>> {
        Box::pin(std::future::ready(Ok(FlushReport::default())))
    }

    fn subscribe_kv_events(&self, _: u64) -> BoxFuture<'_, Result<KvEventStream, SubscribeError>> {
        Box::pin(std::future::ready(Err(SubscribeError::NotPublished)))
    }

    fn model(&self) -> &ModelInfo {
        &self.info
    }

    fn stats(&self) -> SchedulerStats {
        SchedulerStats::default()
    }

    fn health(&self, _: Duration) -> EngineHealth {
        EngineHealth::Alive
    }
}

struct Source {
    receiver: mpsc::Receiver<TokenEvent>,
    untaken: Arc<AtomicI64>,
}

impl TokenSource for Source {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<TokenEvent>> {
        let event = self.receiver.poll_recv(cx);
        if let Poll::Ready(Some(TokenEvent::Token { .. })) = &event {
            self.untaken.fetch_sub(1, Ordering::Relaxed);
        }
        event
    }

    fn end_choice(&mut self, _: u32) {}
}
