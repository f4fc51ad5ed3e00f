//! The border between async callers and the engine's thread.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use quire_scheduler::{
    AdapterId, CacheSalt, FinishReason, FlushReport, KvGroupKind, RequestId, SamplingParams, SchedulerConfig,
    SchedulerStats, TenantId, TokenLogprobs,
};
use tokio::sync::{mpsc, oneshot};

use crate::constraint::Grammar;
use crate::error::SubmitError;
use crate::kv_events::{AllBlocks, KvEventHub, KvEventStream, SubscribeError};
use crate::sampler;
use crate::step_clock::StepClock;

/// Most tokens whose log probability is reported beside the chosen one.
pub const MAX_LOGPROBS: u32 = 128;
/// Most submissions that wait for the next step boundary; with several tenants at most twice as many, see [`has_room`].
const MAX_QUEUED_SUBMISSIONS: usize = 1024;
/// Most questions to drop cached blocks that wait for it.
const MAX_QUEUED_FLUSHES: usize = 64;

/// What a caller asks the engine for; the engine gives it an id. Fields as in [`quire_scheduler::Request`].
#[derive(Clone, Debug)]
pub struct Submission {
    /// Who asks.
    pub tenant: TenantId,
    /// The adapter to run with.
    pub adapter: Option<AdapterId>,
    /// Lower is admitted earlier, among the tenant's own.
    pub priority: i32,
    /// What separates its cached blocks from others'.
    pub cache_salt: CacheSalt,
    /// At least one token.
    pub prompt: Arc<[u32]>,
    /// Tokens that were generated elsewhere already.
    pub generated: Vec<u32>,
    /// Index of the first choice.
    pub choice_offset: u32,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Most tokens to generate, those in `generated` counted in.
    pub max_tokens: u32,
    /// Stop tokens cannot be chosen before this many.
    pub min_tokens: u32,
    /// Tokens that end a choice.
    pub stop_token_ids: Vec<u32>,
    /// When to give up.
    pub deadline: Option<Instant>,
    /// What every choice obeys.
    pub grammar: Option<Arc<dyn Grammar>>,
}

/// What a [`TokenStream`] yields. Each choice ends with exactly one `Finished`, unless `Failed` ends all of them.
#[derive(Clone, Debug, PartialEq)]
pub enum TokenEvent {
    /// A choice runs for the first time; so many tokens of its prompt were in the prefix cache.
    Scheduled { choice_index: u32, num_cached_tokens: u32 },
    /// Log probabilities of a prompt token, in order of position.
    PromptLogprobs { choice_index: u32, position: u32, logprobs: TokenLogprobs },
    /// A generated token.
    Token { choice_index: u32, token_id: u32, logprobs: Option<TokenLogprobs> },
    /// The choice ended.
    Finished { choice_index: u32, reason: FinishReason, num_generated_tokens: u32 },
    /// The device failed or the engine stopped: every choice that was not finished ends here.
    Failed,
}

/// The served model, as far as callers need to know it.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// As `config.json` names it.
    pub architecture: String,
    /// Token ids are below it.
    pub vocab_size: u32,
    /// Most tokens of prompt and output together.
    pub max_model_len: u32,
    /// SHA-256 over the model's configuration, its weight files' headers, and up to 12 KiB of each tensor (all of it, or its
    /// start, middle and end): part of every cache salt.
    pub digest: [u8; 32],
    /// From `generation_config.json` and `config.json`.
    pub eos_token_ids: Vec<u32>,
    /// Weights and biases, those that are shared counted once.
    pub num_parameters: u64,
    /// Bytes that they take on the device.
    pub weight_bytes: u64,
    /// Bytes of the whole KV cache.
    pub kv_cache_bytes: u64,
    /// Of a device with memory of its own.
    pub device_memory: Option<DeviceMemoryUse>,
    /// What most weights are stored as: `f32`, `bf16`, `fp8`, `int8`, `int4`.
    pub weight_format: &'static str,
    /// What weights that are not quantized are stored as.
    pub dtype: &'static str,
    /// What the KV cache is stored as.
    pub kv_dtype: &'static str,
    /// Where the model computes.
    pub device: quire_kernels::DeviceInfo,
    /// Why the device is not the one that `auto` prefers.
    pub device_note: Option<String>,
    /// Tokens in a KV block.
    pub block_size: u32,
    /// KV blocks of each group.
    pub num_blocks: u32,
    /// Most sequences in a step.
    pub max_num_seqs: u32,
    /// Most tokens in a step.
    pub max_num_batched_tokens: u32,
    /// Whether blocks of equal prefixes are reused.
    pub prefix_cache: bool,
    /// Whether what the prefix cache holds can be subscribed to.
    pub kv_events: bool,
}

/// Where a device's own memory went, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemoryUse {
    pub total: u64,
    /// Activations, tables, the sampler, and what operations need beside.
    pub working: u64,
    /// That may still be taken: recordings of steps take some.
    pub left: u64,
}

/// What the step clock says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineHealth {
    /// No work, or the running step is within the time that a step should take.
    Alive,
    /// A step runs longer than it should: so long already.
    Stalled { since: Duration },
    /// The engine's thread ended.
    Stopped,
}

/// The events of one request. Ends the request when dropped before its last event.
pub struct TokenStream {
    id: RequestId,
    events: mpsc::Receiver<TokenEvent>,
    shared: Arc<Shared>,
    /// Choices that have not finished.
    num_open: u32,
}

impl TokenStream {
    /// The request's identity in this engine.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// The next event; `None` after the last one. Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Option<TokenEvent> {
        if self.num_open == 0 {
            return None;
        }
        // The engine lets go of the other end when it stops.
        let event = self.events.recv().await.unwrap_or(TokenEvent::Failed);
        match event {
            TokenEvent::Finished { .. } => self.num_open -= 1,
            TokenEvent::Failed => self.num_open = 0,
            _ => {}
        }
        Some(event)
    }

    /// Ends one choice, whose caller has all it wants of it: its blocks are free at the next step boundary, and its
    /// `Finished` says `Cancelled`. The others go on.
    pub fn end_choice(&self, choice_index: u32) {
        self.shared.end_choice(self.id, choice_index);
    }

    /// Forgets the request: it was not taken.
    pub(crate) fn disarm(&mut self) {
        self.num_open = 0;
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        if self.num_open > 0 {
            self.shared.abort(self.id);
        }
    }
}

/// A running engine, to be cloned freely. The engine stops when the last clone is dropped or `shutdown` is called.
#[derive(Clone)]
pub struct EngineHandle {
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

impl EngineHandle {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { guard: Arc::new(Guard { shared }) }
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.guard.shared
    }

    /// Hands a request to the engine and waits for its answer, at most until the next step boundary. Dropping the
    /// future ends the request.
    pub async fn submit(&self, submission: Submission) -> Result<TokenStream, SubmitError> {
        check(&submission, self.model())?;
        let (reply, answer) = oneshot::channel();
        self.shared().enqueue(submission, reply)?;
        answer.await.unwrap_or(Err(SubmitError::Stopped))
    }

    /// Ends a request: its unfinished choices get `Finished` with `Cancelled` once their blocks are free. Unknown ids
    /// are ignored.
    pub fn abort(&self, id: RequestId) {
        self.shared().abort(id);
    }

    /// Lets go of all cached blocks that no sequence holds, at the next step boundary.
    pub async fn flush_cache(&self) -> Result<FlushReport, SubmitError> {
        let (reply, answer) = oneshot::channel();
        self.shared().ask_for_flush(reply)?;
        answer.await.map_err(|_| SubmitError::Stopped)
    }

    /// What happens to the blocks that can be hit: from batch `start` on where that is still there, from a snapshot of now
    /// on otherwise.
    pub async fn subscribe_kv_events(&self, start: u64) -> Result<KvEventStream, SubscribeError> {
        KvEventStream::subscribe(self.shared(), start).await
    }

    /// The served model.
    pub fn model(&self) -> &ModelInfo {
        &self.shared().model
    }

    /// Counters as of the last step boundary.
    pub fn stats(&self) -> SchedulerStats {
        *lock(&self.shared().stats)
    }

    /// What the step clock says; `stall_after` is how long a step may take.
    pub fn health(&self, stall_after: Duration) -> EngineHealth {
        self.shared().clock.health(stall_after)
    }

    /// Why the engine stopped, where that was not asked for.
    pub fn failure(&self) -> Option<String> {
        lock(&self.shared().failure).clone()
    }

    /// Ends all requests with [`TokenEvent::Failed`] and the engine's thread, at the next step boundary.
    pub fn shutdown(&self) {
        self.shared().shutdown();
    }
}

/// Refuses what the device could not compute. Everything else is the scheduler's to judge.
fn check(submission: &Submission, model: &ModelInfo) -> Result<(), SubmitError> {
    let refuse = |field| {
        let why = "holds a token id that the model does not have";
        Err(quire_scheduler::SubmitError::Invalid { field, why }.into())
    };
    let past_vocab = |ids: &[u32]| ids.iter().any(|id| *id >= model.vocab_size);
    if past_vocab(&submission.prompt) {
        return refuse("prompt");
    }
    if past_vocab(&submission.generated) {
        return refuse("generated");
    }
    Ok(sampler::check(&submission.sampling, &submission.stop_token_ids, model.vocab_size)?)
}

/// What handles, streams and the engine's thread have in common.
pub(crate) struct Shared {
    pub(crate) model: ModelInfo,
    /// Most tokens that wait in the inbox: as many as may wait in the scheduler's queue.
    max_queued_tokens: u64,
    inbox: Mutex<Inbox>,
    wake: Condvar,
    pub(crate) stats: Mutex<SchedulerStats>,
    failure: Mutex<Option<String>>,
    pub(crate) clock: StepClock,
    pub(crate) kv_events: KvEventHub,
    /// What a token of each KV group sees.
    pub(crate) kv_groups: Arc<[KvGroupKind]>,
}

/// What waits for the next step boundary.
struct Inbox {
    /// Bounded in number and in tokens.
    submissions: VecDeque<QueuedSubmission>,
    /// That they bring.
    num_tokens: u64,
    /// When each was asked for. At most one per request that was ever taken, and emptied at every boundary.
    aborts: BTreeMap<RequestId, Instant>,
    /// Choices that end before their request. At most one per choice that was ever taken, and emptied likewise.
    ended_choices: BTreeSet<(RequestId, u32)>,
    cache_questions: CacheQuestions,
    next_id: u64,
    shutdown: bool,
    is_open: bool,
}

/// Tokens that a submission brings.
fn num_tokens(submission: &Submission) -> u64 {
    (submission.prompt.len() + submission.generated.len()) as u64
}

/// Whether something bounded by `limit` has room for `added` more of one of `num_tenants` tenants, which has `own` of the
/// `total` in it: while one tenant fills it, the others are still taken up to their equal share; at twice the limit
/// nobody is.
fn has_room(total: u64, own: u64, added: u64, num_tenants: u64, limit: u64) -> bool {
    let all = total.saturating_add(added);
    all <= limit || (own + added <= limit / num_tenants && all <= limit.saturating_mul(2))
}

impl Inbox {
    fn has_room(&self, submission: &Submission, max_tokens: u64) -> bool {
        let (count, added) = (self.submissions.len() as u64, num_tokens(submission));
        // One that could never be taken is the scheduler's to refuse, with the reason.
        if count == 0 || (count < MAX_QUEUED_SUBMISSIONS as u64 && self.num_tokens + added <= max_tokens) {
            return true;
        }
        let (mut tenants, mut own_count, mut own_tokens) = (BTreeSet::from([submission.tenant]), 0, 0);
        for QueuedSubmission { submission: queued, .. } in &self.submissions {
            tenants.insert(queued.tenant);
            if queued.tenant == submission.tenant {
                own_count += 1;
                own_tokens += num_tokens(queued);
            }
        }
        let num_tenants = tenants.len() as u64;
        has_room(count, own_count, 1, num_tenants, MAX_QUEUED_SUBMISSIONS as u64)
            && has_room(self.num_tokens, own_tokens, added, num_tenants, max_tokens)
    }

    fn is_empty(&self) -> bool {
        self.submissions.is_empty()
            && self.aborts.is_empty()
            && self.ended_choices.is_empty()
            && self.cache_questions.is_empty()
    }
}

/// A submission and whom to tell whether it was taken.
pub(crate) struct QueuedSubmission {
    pub submission: Submission,
    pub stream: TokenStream,
    pub events: mpsc::Sender<TokenEvent>,
    pub reply: oneshot::Sender<Result<TokenStream, SubmitError>>,
}

/// Who asks about the prefix cache. Bounded: subscribers by their number, flushes by [`MAX_QUEUED_FLUSHES`].
#[derive(Default)]
pub(crate) struct CacheQuestions {
    /// Wants all cached blocks dropped that nobody holds.
    pub flushes: Vec<oneshot::Sender<FlushReport>>,
    /// Wants to know all blocks that can be hit, and changes from then on.
    pub blocks: Vec<oneshot::Sender<AllBlocks>>,
}

impl CacheQuestions {
    pub(crate) fn is_empty(&self) -> bool {
        self.flushes.is_empty() && self.blocks.is_empty()
    }
}

/// What the engine's thread found in the inbox.
#[derive(Default)]
pub(crate) struct Commands {
    pub submissions: Vec<QueuedSubmission>,
    pub aborts: Vec<(RequestId, Instant)>,
    pub ended_choices: Vec<(RequestId, u32)>,
    pub cache_questions: CacheQuestions,
    pub shutdown: bool,
}

/// Whether to wait for a command where there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    No,
    /// Not longer than this.
    For(Duration),
    Yes,
}

impl Shared {
    pub(crate) fn new(model: ModelInfo, scheduler: &SchedulerConfig) -> Self {
        let kv_groups = scheduler.kv_groups.iter().map(|group| group.kind).collect();
        let inbox = Inbox {
            submissions: VecDeque::new(),
            num_tokens: 0,
            aborts: BTreeMap::new(),
            ended_choices: BTreeSet::new(),
            cache_questions: CacheQuestions::default(),
            next_id: 0,
            shutdown: false,
            is_open: true,
        };
        Self {
            model,
            max_queued_tokens: scheduler.max_waiting_tokens,
            inbox: Mutex::new(inbox),
            wake: Condvar::new(),
            stats: Mutex::new(SchedulerStats::default()),
            failure: Mutex::new(None),
            clock: StepClock::new(),
            kv_events: KvEventHub::new(),
            kv_groups,
        }
    }

    fn enqueue(
        self: &Arc<Self>,
        submission: Submission,
        reply: oneshot::Sender<Result<TokenStream, SubmitError>>,
    ) -> Result<(), SubmitError> {
        let (sender, receiver) = mpsc::channel(num_events(&submission, self.model.max_model_len));
        let mut inbox = lock(&self.inbox);
        if !inbox.is_open {
            return Err(SubmitError::Stopped);
        }
        if !inbox.has_room(&submission, self.max_queued_tokens) {
            let num_tokens = inbox.num_tokens;
            drop(inbox);
            let stats = lock(&self.stats);
            let retry_after_micros = stats.queue_pace.retry_after_micros(stats.waiting_tokens + num_tokens);
            return Err(SubmitError::CommandQueueFull { retry_after_micros });
        }
        inbox.num_tokens += num_tokens(&submission);
        let id = RequestId(inbox.next_id);
        inbox.next_id += 1;
        let num_open = submission.sampling.num_choices;
        let stream = TokenStream { id, events: receiver, shared: Arc::clone(self), num_open };
        inbox.submissions.push_back(QueuedSubmission { submission, stream, events: sender, reply });
        drop(inbox);
        self.wake.notify_one();
        Ok(())
    }

    fn abort(&self, id: RequestId) {
        let mut inbox = lock(&self.inbox);
        if inbox.is_open && id.0 < inbox.next_id {
            inbox.aborts.entry(id).or_insert_with(Instant::now);
            drop(inbox);
            self.wake.notify_one();
        }
    }

    fn end_choice(&self, id: RequestId, choice_index: u32) {
        let mut inbox = lock(&self.inbox);
        if inbox.is_open && inbox.ended_choices.insert((id, choice_index)) {
            drop(inbox);
            self.wake.notify_one();
        }
    }

    fn ask_for_flush(&self, reply: oneshot::Sender<FlushReport>) -> Result<(), SubmitError> {
        let mut inbox = lock(&self.inbox);
        if !inbox.is_open {
            return Err(SubmitError::Stopped);
        }
        if inbox.cache_questions.flushes.len() >= MAX_QUEUED_FLUSHES {
            return Err(SubmitError::CommandQueueFull { retry_after_micros: 0 });
        }
        inbox.cache_questions.flushes.push(reply);
        drop(inbox);
        self.wake.notify_one();
        Ok(())
    }

    pub(crate) fn ask_for_blocks(&self, reply: oneshot::Sender<AllBlocks>) -> Result<(), SubscribeError> {
        let mut inbox = lock(&self.inbox);
        if !inbox.is_open {
            return Err(SubscribeError::Stopped);
        }
        // Those who left while they waited count no more.
        inbox.cache_questions.blocks.retain(|reply| !reply.is_closed());
        inbox.cache_questions.blocks.push(reply);
        drop(inbox);
        self.wake.notify_one();
        Ok(())
    }

    fn shutdown(&self) {
        lock(&self.inbox).shutdown = true;
        self.wake.notify_one();
    }

    /// Whether there is something to take.
    pub(crate) fn has_commands(&self) -> bool {
        let inbox = lock(&self.inbox);
        !inbox.is_empty() || inbox.shutdown
    }

    /// Takes all aborts and at most `max_submissions`, so that a flood of them delays a step by so much only.
    pub(crate) fn take_commands(&self, wait: Wait, max_submissions: usize, commands: &mut Commands) {
        commands.submissions.clear();
        commands.aborts.clear();
        commands.ended_choices.clear();
        let mut inbox = lock(&self.inbox);
        let has_nothing = |inbox: &mut Inbox| inbox.is_empty() && !inbox.shutdown;
        inbox = match wait {
            Wait::No => inbox,
            Wait::For(time) => {
                let waited = self.wake.wait_timeout_while(inbox, time, has_nothing);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            Wait::Yes => self.wake.wait_while(inbox, has_nothing).unwrap_or_else(PoisonError::into_inner),
        };
        let num_taken = inbox.submissions.len().min(max_submissions);
        commands.submissions.extend(inbox.submissions.drain(..num_taken));
        let taken_tokens: u64 = commands.submissions.iter().map(|queued| num_tokens(&queued.submission)).sum();
        inbox.num_tokens -= taken_tokens;
        while let Some(abort) = inbox.aborts.pop_first() {
            commands.aborts.push(abort);
        }
        while let Some(choice) = inbox.ended_choices.pop_first() {
            commands.ended_choices.push(choice);
        }
        std::mem::swap(&mut commands.cache_questions, &mut inbox.cache_questions);
        commands.shutdown = inbox.shutdown;
    }

    /// The engine's thread ends: nothing is taken any more, and what waits is answered.
    pub(crate) fn stop(&self, failure: Option<String>) {
        *lock(&self.failure) = failure;
        let waiting = {
            let mut inbox = lock(&self.inbox);
            inbox.is_open = false;
            inbox.num_tokens = 0;
            inbox.aborts.clear();
            inbox.ended_choices.clear();
            inbox.cache_questions = CacheQuestions::default();
            std::mem::take(&mut inbox.submissions)
        };
        self.clock.stop();
        self.kv_events.close();
        // Without the lock: each stream that ends here asks for it.
        for mut queued in waiting {
            queued.stream.disarm();
        }
    }
}

/// Most events that a request can get, so that the engine never waits for its reader.
fn num_events(submission: &Submission, max_model_len: u32) -> usize {
    let sampling = &submission.sampling;
    let prompt = if sampling.prompt_logprobs.is_some() { submission.prompt.len() } else { 0 };
    let per_choice = submission.max_tokens.min(max_model_len) as usize + prompt + 4;
    // The channel takes memory for events that are in it, not for those that could be.
    per_choice.saturating_mul(sampling.num_choices as usize).clamp(1, tokio::sync::Semaphore::MAX_PERMITS)
}

/// State behind these locks is whole at every moment, so a panic elsewhere does not spoil it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
