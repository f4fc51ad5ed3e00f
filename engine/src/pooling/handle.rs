//! The border between async callers and the thread that pools.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use quire_scheduler::SchedulerStats;
use tokio::sync::oneshot;

use super::spec::PoolingInfo;
use crate::handle::{EngineHealth, ModelInfo, lock};
use crate::step_clock::StepClock;

/// Most requests that wait, whatever they hold.
const MAX_WAITING_JOBS: usize = 4096;
/// What a refused caller is told when nothing was measured, and the bounds of what it is told, in microseconds.
const UNKNOWN_RETRY_MICROS: u64 = 1_000_000;
const RETRY_MICROS: std::ops::RangeInclusive<u64> = 1_000..=600_000_000;

/// One text, or a pair of them, as tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolingInput {
    /// At least one, at most the model's length; special tokens included.
    pub token_ids: Vec<u32>,
    /// Where the second text of a pair begins, for models that tell the two apart.
    pub second_from: Option<u32>,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PoolingError {
    /// A text that cannot be computed; the index is of the request's texts.
    #[error("text {index} {why}")]
    Invalid { index: usize, why: &'static str },
    /// So many tokens wait already that these find no room.
    #[error("the queue is full")]
    QueueFull {
        /// When to come back, in microseconds from now, by the pace measured so far.
        retry_after_micros: u64,
    },
    #[error("the deadline passed")]
    DeadlineExceeded,
    /// The model computed numbers that are not finite.
    #[error("the result is not finite")]
    NonFinite,
    /// The thread is stopping or has failed.
    #[error("the engine is stopped")]
    Stopped,
}

/// A request's texts, and what came of them so far.
pub(super) struct Job {
    pub inputs: Vec<PoolingInput>,
    /// Of the first inputs.
    pub results: Vec<Vec<f32>>,
    /// Inputs that are in results or in the batch.
    pub num_taken: usize,
    pub deadline: Option<Instant>,
    pub reply: oneshot::Sender<Result<Vec<Vec<f32>>, PoolingError>>,
}

impl Job {
    /// Tokens that wait.
    pub(super) fn num_waiting_tokens(&self) -> u64 {
        self.inputs[self.num_taken..].iter().map(|input| input.token_ids.len() as u64).sum()
    }
}

pub(super) struct Inbox {
    pub jobs: VecDeque<Job>,
    /// Of all jobs here.
    pub waiting_tokens: u64,
    pub shutdown: bool,
    pub is_open: bool,
}

/// What handles and the thread have in common.
pub(super) struct Shared {
    pub model: ModelInfo,
    pub pooling: PoolingInfo,
    /// Most tokens that wait, in the inbox and with the thread.
    pub max_waiting_tokens: u64,
    /// Taken before `state` where both are.
    pub inbox: Mutex<Inbox>,
    pub wake: Condvar,
    pub clock: StepClock,
    pub state: Mutex<State>,
}

/// What the thread says of itself.
#[derive(Default)]
pub(super) struct State {
    pub stats: SchedulerStats,
    /// Of the last batches: tokens computed and the time that they took.
    pub pace: (u64, Duration),
    pub failure: Option<String>,
}

impl Shared {
    pub(super) fn new(model: ModelInfo, pooling: PoolingInfo, max_waiting_tokens: u64) -> Self {
        Self {
            model,
            pooling,
            max_waiting_tokens,
            inbox: Mutex::new(Inbox { jobs: VecDeque::new(), waiting_tokens: 0, shutdown: false, is_open: true }),
            wake: Condvar::new(),
            clock: StepClock::new(),
            state: Mutex::default(),
        }
    }

    fn enqueue(&self, job: Job) -> Result<(), PoolingError> {
        let added = job.num_waiting_tokens();
        let mut inbox = lock(&self.inbox);
        if !inbox.is_open {
            return Err(PoolingError::Stopped);
        }
        let (with_thread, pace) = {
            let state = lock(&self.state);
            (state.stats.waiting_tokens, state.pace)
        };
        let waiting = with_thread + inbox.waiting_tokens;
        // One that is larger than the whole queue is taken where nothing waits.
        if waiting > 0 && (waiting + added > self.max_waiting_tokens || inbox.jobs.len() >= MAX_WAITING_JOBS) {
            return Err(PoolingError::QueueFull { retry_after_micros: retry_after(waiting, pace) });
        }
        inbox.jobs.push_back(job);
        inbox.waiting_tokens += added;
        drop(inbox);
        self.wake.notify_one();
        Ok(())
    }

    pub(super) fn shutdown(&self) {
        lock(&self.inbox).shutdown = true;
        self.wake.notify_one();
    }

    /// What came since the last call; waits for something where `idle`. `None` once shutdown was asked for.
    pub(super) fn take(&self, idle: bool) -> Option<VecDeque<Job>> {
        let mut inbox = lock(&self.inbox);
        while idle && inbox.jobs.is_empty() && !inbox.shutdown {
            inbox = self.wake.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        }
        if inbox.shutdown {
            return None;
        }
        // Before the inbox is let go of, so that no caller finds these tokens in neither place.
        lock(&self.state).stats.waiting_tokens += std::mem::take(&mut inbox.waiting_tokens);
        Some(std::mem::take(&mut inbox.jobs))
    }

    /// The thread ends; whoever waits is told by its channel, which goes with the job.
    pub(super) fn stop(&self, failure: Option<String>) {
        lock(&self.state).failure = failure;
        let waiting = {
            let mut inbox = lock(&self.inbox);
            inbox.is_open = false;
            std::mem::take(&mut inbox.jobs)
        };
        self.clock.stop();
        drop(waiting);
    }
}

fn retry_after(num_tokens: u64, (tokens, time): (u64, Duration)) -> u64 {
    if tokens == 0 || time.is_zero() {
        return UNKNOWN_RETRY_MICROS;
    }
    let micros = u128::from(num_tokens) * time.as_micros() / u128::from(tokens);
    u64::try_from(micros).unwrap_or(u64::MAX).clamp(*RETRY_MICROS.start(), *RETRY_MICROS.end())
}

/// A running model that pools, to be cloned freely. Its thread stops when the last clone is dropped or `shutdown` is called.
#[derive(Clone)]
pub struct PoolingHandle {
    guard: Arc<Guard>,
}

struct Guard {
    shared: Arc<Shared>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.shared.shutdown();
    }
}

impl PoolingHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { guard: Arc::new(Guard { shared }) }
    }

    fn shared(&self) -> &Shared {
        &self.guard.shared
    }

    /// `[num_dimensions]` numbers of each text or pair, in order. Dropping the future ends the request
    /// before the next batch.
    pub async fn compute(
        &self,
        inputs: Vec<PoolingInput>,
        deadline: Option<Instant>,
    ) -> Result<Vec<Vec<f32>>, PoolingError> {
        let model = self.model();
        for (index, input) in inputs.iter().enumerate() {
            let len = input.token_ids.len();
            let why = match () {
                () if len == 0 => "has no tokens",
                () if len > model.max_model_len as usize => "has more tokens than the model's length",
                () if input.token_ids.iter().any(|id| *id >= model.vocab_size) => {
                    "holds a token id that the model does not have"
                }
                () if input.second_from.is_some_and(|from| from as usize > len) => "ends before its second part",
                () => continue,
            };
            return Err(PoolingError::Invalid { index, why });
        }
        if inputs.is_empty() {
            return Ok(Vec::new());
        }
        let (reply, answer) = oneshot::channel();
        let results = Vec::with_capacity(inputs.len());
        self.shared().enqueue(Job { inputs, results, num_taken: 0, deadline, reply })?;
        answer.await.unwrap_or(Err(PoolingError::Stopped))
    }

    /// The served model. What only generation has (a KV cache, ends of sequences) is 0 or empty.
    pub fn model(&self) -> &ModelInfo {
        &self.shared().model
    }

    /// What it answers with.
    pub fn pooling(&self) -> &PoolingInfo {
        &self.shared().pooling
    }

    /// Texts that wait and run, as of the last batch, and counters.
    pub fn stats(&self) -> SchedulerStats {
        lock(&self.shared().state).stats
    }

    /// What the step clock says; `stall_after` is how long a batch may take.
    pub fn health(&self, stall_after: Duration) -> EngineHealth {
        self.shared().clock.health(stall_after)
    }

    /// Why the thread stopped, where that was not asked for.
    pub fn failure(&self) -> Option<String> {
        lock(&self.shared().state).failure.clone()
    }

    /// Ends all requests and the thread, before the next batch.
    pub fn shutdown(&self) {
        self.shared().shutdown();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::pooling::PoolingTask;
    use crate::testing::fake_model;

    #[test]
    fn texts_that_the_thread_took_still_wait() {
        let pooling = PoolingInfo {
            task: PoolingTask::Embed,
            num_dimensions: 4,
            is_normalized: true,
            prompts: BTreeMap::new(),
            default_prompt: None,
            pair_prompt: None,
            labels: Arc::default(),
        };
        let shared = Shared::new(fake_model(100), pooling, 10);
        let job = |len| {
            let inputs = vec![PoolingInput { token_ids: vec![1; len], second_from: None }];
            Job { inputs, results: Vec::new(), num_taken: 0, deadline: None, reply: oneshot::channel().0 }
        };
        shared.enqueue(job(4)).expect("room for 10");
        shared.enqueue(job(4)).expect("room for 6");
        assert!(matches!(shared.enqueue(job(4)), Err(PoolingError::QueueFull { .. })));
        assert_eq!(shared.take(true).map(|jobs| jobs.len()), Some(2));
        assert!(matches!(shared.enqueue(job(4)), Err(PoolingError::QueueFull { .. })), "they are not computed yet");
        shared.enqueue(job(2)).expect("room for 2");
    }

    #[test]
    fn who_is_refused_is_told_by_the_pace() {
        assert_eq!(retry_after(1000, (0, Duration::ZERO)), UNKNOWN_RETRY_MICROS);
        assert_eq!(retry_after(1000, (100, Duration::from_millis(50))), 500_000);
        assert_eq!(retry_after(1, (u64::MAX, Duration::from_secs(1))), *RETRY_MICROS.start());
    }
}
