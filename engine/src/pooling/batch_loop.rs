//! The one thread that pools: take requests, fill a batch, compute it, answer.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::handle::{Job, PoolingError, PoolingHandle, PoolingInput, Shared};
use super::{Loaded, Pooler};
use crate::config::SchedulerSettings;
use crate::error::EngineError;
use crate::handle::lock;
use crate::models::encoder::BatchLimits;
use crate::observer::{StepObserver, StepReport};
use crate::step_loop::panic_message;

/// Texts of the model's length that may wait where no bound is configured: the most that one request holds.
const DEFAULT_WAITING_TEXTS: u64 = 2048;
/// Measured time after which old batches count less.
const PACE_MEMORY: Duration = Duration::from_secs(8);

/// Starts the thread.
pub(super) fn spawn<P: Pooler>(
    loaded: Loaded<P>,
    settings: &SchedulerSettings,
    observer: Box<dyn StepObserver>,
) -> Result<PoolingHandle, EngineError> {
    let Loaded { pooler, info, pooling, limits } = loaded;
    let max_waiting_tokens = match settings.max_waiting_tokens {
        0 => DEFAULT_WAITING_TEXTS * u64::from(info.max_model_len),
        tokens => tokens,
    };
    let shared = Arc::new(Shared::new(info, pooling, max_waiting_tokens));
    let mut batch_loop = BatchLoop {
        pooler,
        limits,
        shared: Arc::clone(&shared),
        observer,
        jobs: VecDeque::new(),
        batch: Vec::with_capacity(limits.num_seqs),
    };
    let run = move || {
        let failure = match catch_unwind(AssertUnwindSafe(|| batch_loop.run())) {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(payload) => Some(format!("panic: {}", panic_message(&*payload))),
        };
        if let Some(cause) = &failure {
            // The observer may be what panicked.
            let _ = catch_unwind(AssertUnwindSafe(|| batch_loop.observer.failed(cause)));
        }
        // First, so that whoever is told finds an engine that stopped; its jobs' channels go with the loop.
        batch_loop.shared.stop(failure);
        drop(batch_loop);
    };
    std::thread::Builder::new().name("quire-pooling".to_owned()).spawn(run).map_err(|error| EngineError::Config {
        field: "engine".to_owned(),
        why: format!("no thread could be started: {error}"),
    })?;
    Ok(PoolingHandle::new(shared))
}

struct BatchLoop<P> {
    pooler: P,
    limits: BatchLimits,
    shared: Arc<Shared>,
    observer: Box<dyn StepObserver>,
    /// Whose turn it is comes first.
    jobs: VecDeque<Job>,
    /// Places in `jobs`, and of the texts in them.
    batch: Vec<(usize, usize)>,
}

impl<P: Pooler> BatchLoop<P> {
    /// Until shutdown is asked for, or the device fails.
    fn run(&mut self) -> Result<(), EngineError> {
        loop {
            if self.jobs.is_empty() {
                self.shared.clock.rest();
            }
            let Some(mut new) = self.shared.take(self.jobs.is_empty()) else { return Ok(()) };
            let began = Instant::now();
            self.shared.clock.begin(self.shared.clock.time(began));
            self.jobs.append(&mut new);
            self.drop_ended(began);
            self.fill_batch();
            self.note_waiting(self.batch.len() as u32);
            if !self.batch.is_empty() {
                self.step(began)?;
            }
            self.note_waiting(0);
        }
    }

    /// Forgets requests that nobody waits for, and those that are too late.
    fn drop_ended(&mut self, now: Instant) {
        let (live, ended): (VecDeque<Job>, VecDeque<Job>) = std::mem::take(&mut self.jobs)
            .into_iter()
            .partition(|job| !job.reply.is_closed() && job.deadline.is_none_or(|deadline| deadline > now));
        self.jobs = live;
        for job in ended {
            let _ = job.reply.send(Err(PoolingError::DeadlineExceeded));
        }
    }

    /// Requests take turns, a text each, while the next text fits. A text longer than a batch is one of its own.
    fn fill_batch(&mut self) {
        self.batch.clear();
        let mut num_tokens = 0;
        let mut place = 0;
        while self.batch.len() < self.limits.num_seqs
            && let Some(next) = (place..self.jobs.len()).chain(0..place).find(|place| self.has_next(*place))
        {
            let job = &mut self.jobs[next];
            let len = job.inputs[job.num_taken].token_ids.len();
            if num_tokens > 0 && num_tokens + len > self.limits.num_tokens {
                break;
            }
            num_tokens += len;
            self.batch.push((next, job.num_taken));
            job.num_taken += 1;
            place = next + 1;
        }
    }

    fn has_next(&self, place: usize) -> bool {
        self.jobs[place].num_taken < self.jobs[place].inputs.len()
    }

    /// Computes the batch and answers whoever has all texts.
    fn step(&mut self, began: Instant) -> Result<(), EngineError> {
        let inputs: Vec<&PoolingInput> =
            self.batch.iter().map(|(place, text)| &self.jobs[*place].inputs[*text]).collect();
        let num_tokens: usize = inputs.iter().map(|input| input.token_ids.len()).sum();
        let planned = Instant::now();
        let results = self.pooler.compute(&inputs)?;
        let computed = Instant::now();
        // In the order of the batch, in which each request's texts ascend.
        for ((place, _), result) in self.batch.iter().zip(results) {
            self.jobs[*place].results.push(result);
        }
        // Whoever had a turn comes behind who had none.
        let turns = self.batch.last().map_or(0, |(place, _)| place + 1);
        self.jobs.rotate_left(turns % self.jobs.len().max(1));
        let (finished, open): (VecDeque<Job>, VecDeque<Job>) =
            std::mem::take(&mut self.jobs).into_iter().partition(|job| job.results.len() == job.inputs.len());
        self.jobs = open;
        {
            let state = &mut *lock(&self.shared.state);
            state.stats.num_steps += 1;
            state.stats.num_scheduled_tokens += num_tokens as u64;
            let (tokens, time) = &mut state.pace;
            *tokens += num_tokens as u64;
            *time += computed - planned;
            if *time > PACE_MEMORY {
                (*tokens, *time) = (*tokens / 2, *time / 2);
            }
        }
        for job in finished {
            let is_finite = job.results.iter().flatten().all(|number| number.is_finite());
            let _ = job.reply.send(if is_finite { Ok(job.results) } else { Err(PoolingError::NonFinite) });
        }
        self.observer.step(&StepReport {
            num_decodes: 0,
            num_prefill_tokens: num_tokens as u32,
            num_sampled_tokens: 0,
            plan: planned - began,
            execute: computed - planned,
            apply: computed.elapsed(),
            stats: lock(&self.shared.state).stats,
        });
        Ok(())
    }

    /// Writes down what waits with this thread; what is in the inbox counts itself.
    fn note_waiting(&self, num_running: u32) {
        let waiting = self.jobs.iter().map(|job| (job.inputs.len() - job.num_taken) as u32).sum();
        let tokens = self.jobs.iter().map(Job::num_waiting_tokens).sum();
        let mut state = lock(&self.shared.state);
        let stats = &mut state.stats;
        (stats.num_waiting, stats.num_running, stats.waiting_tokens) = (waiting, num_running, tokens);
    }
}
