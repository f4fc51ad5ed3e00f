//! The one engine thread: take commands, plan, compute, apply, publish.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quire_scheduler::{Event, EventKind, IdleCheck, Request, RequestId, Scheduler, StepPlan, Time};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::error::{EngineError, SubmitError};
use crate::executor::Executor;
use crate::handle::{Commands, EngineHandle, ModelInfo, QueuedSubmission, Shared, TokenEvent, Wait, lock};
use crate::kv_events::{MAX_STEP_EVENTS, SnapshotQueue};
use crate::masks::STACK_BYTES;
use crate::observer::{StepObserver, StepReport};
use crate::places::RequestGrammar;

/// Submissions taken between two steps: what is left waits for the next boundary, so that a flood of them does not
/// hold up those who run.
const MAX_SUBMISSIONS_PER_STEP: usize = 64;

/// How often an idle engine looks at all of the scheduler's state.
const CHECK_EVERY: Duration = Duration::from_secs(10);
/// What it looks at before it asks again whether somebody came: some tens of microseconds.
const CHECK_ITEMS: usize = 1024;

/// Starts the thread. `pipeline_depth` is how many steps may be in flight while the next is planned: 0 or 1. Cached blocks are
/// copied for subscribers at most once in `snapshot_interval`.
pub(crate) fn spawn<E: Executor>(
    executor: E,
    scheduler: Scheduler,
    model: ModelInfo,
    pipeline_depth: u32,
    snapshot_interval: Duration,
    observer: Box<dyn StepObserver>,
) -> Result<EngineHandle, EngineError> {
    check_depth(pipeline_depth)?;
    let shared = Arc::new(Shared::new(model, scheduler.config()));
    *lock(&shared.stats) = scheduler.stats();
    let mut step_loop = StepLoop {
        told_events: false,
        snapshots: SnapshotQueue::new(snapshot_interval),
        check: IdleCheck::new(scheduler.config()),
        checked_at: None,
        known_lens: vec![0; scheduler.config().max_num_seqs as usize],
        scheduler,
        executor,
        shared: Arc::clone(&shared),
        observer,
        pipeline_depth: pipeline_depth as usize,
        live: HashMap::new(),
        in_flight: VecDeque::with_capacity(2),
        events: Vec::new(),
        commands: Commands::default(),
    };
    let run = move || {
        let end = catch_unwind(AssertUnwindSafe(|| step_loop.run()));
        let failure = match end {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(payload) => Some(format!("panic: {}", panic_message(&*payload))),
        };
        if let Some(cause) = &failure {
            // The observer may be what panicked.
            let _ = catch_unwind(AssertUnwindSafe(|| step_loop.observer.failed(cause)));
        }
        step_loop.shared.stop(failure);
        // Only now, so that whoever sees a stream fail sees an engine that stopped: the senders of all live streams go
        // with the loop.
        drop(step_loop);
    };
    let thread = std::thread::Builder::new().name("quire-engine".to_owned()).stack_size(STACK_BYTES);
    thread.spawn(run).map_err(|error| EngineError::Config {
        field: "engine".to_owned(),
        why: format!("no thread could be started: {error}"),
    })?;
    Ok(EngineHandle::new(shared))
}

/// Fails where so many steps cannot be in flight while the next is planned.
pub(crate) fn check_depth(pipeline_depth: u32) -> Result<(), EngineError> {
    if pipeline_depth > 1 {
        return Err(EngineError::Config {
            field: "engine.pipeline_depth".to_owned(),
            why: format!("{pipeline_depth} is not 0 or 1"),
        });
    }
    Ok(())
}

/// What a panic said.
pub(crate) fn panic_message(payload: &(dyn std::any::Any + Send)) -> &str {
    if let Some(message) = payload.downcast_ref::<&str>() {
        message
    } else {
        payload.downcast_ref::<String>().map_or("without a message", String::as_str)
    }
}

struct StepLoop<E: Executor> {
    scheduler: Scheduler,
    executor: E,
    shared: Arc<Shared>,
    observer: Box<dyn StepObserver>,
    pipeline_depth: usize,
    live: HashMap<RequestId, LiveRequest>,
    /// Oldest first.
    in_flight: VecDeque<LaunchedStep>,
    /// Per row: tokens that the sequence had when it was admitted. What is computed past them is decoding.
    known_lens: Vec<u32>,
    events: Vec<Event>,
    commands: Commands,
    /// Whether the scheduler writes down what happens to cached blocks.
    told_events: bool,
    snapshots: SnapshotQueue,
    check: IdleCheck,
    /// When a whole check was last done.
    checked_at: Option<Instant>,
}

/// A request that was taken and has not ended.
struct LiveRequest {
    events: mpsc::Sender<TokenEvent>,
    /// Choices that have not finished.
    num_open: u32,
    /// When a cancellation was first asked for.
    cancelled_at: Option<Instant>,
    grammar: Option<Arc<RequestGrammar>>,
}

struct LaunchedStep {
    plan: StepPlan,
    num_decodes: u32,
    plan_time: Duration,
    launch_time: Duration,
}

impl<E: Executor> StepLoop<E> {
    /// Until shutdown is asked for, or the device fails.
    fn run(&mut self) -> Result<(), EngineError> {
        loop {
            let wait = match self.snapshots.wait(self.now()) {
                _ if self.scheduler.has_work() => Wait::No,
                None => Wait::Yes,
                Some(time) => Wait::For(time),
            };
            if wait != Wait::No {
                self.note_stats();
                self.shared.clock.rest();
                self.check();
            }
            self.shared.take_commands(wait, MAX_SUBMISSIONS_PER_STEP, &mut self.commands);
            if self.commands.shutdown {
                return Ok(());
            }
            let now = self.now();
            self.shared.clock.begin(now);
            self.obey(now);
            self.publish();
            self.answer_cache_questions(now);
            if self.scheduler.has_work() {
                self.step()?;
            }
        }
    }

    /// Looks whether the idle scheduler is sound, now and then and only while nobody asks for anything.
    fn check(&mut self) {
        if self.checked_at.is_some_and(|at| at.elapsed() < CHECK_EVERY) {
            return;
        }
        self.check.restart();
        while !self.shared.has_commands() {
            if self.scheduler.check_idle(&mut self.check, CHECK_ITEMS) {
                self.checked_at = Some(Instant::now());
                return;
            }
        }
    }

    fn now(&self) -> Time {
        self.shared.clock.time(Instant::now())
    }

    /// Carries out what was asked since the last step.
    fn obey(&mut self, now: Time) {
        let mut commands = std::mem::take(&mut self.commands);
        for queued in commands.submissions.drain(..) {
            self.submit(queued, now);
        }
        for (id, asked_at) in commands.aborts.drain(..) {
            self.abort(id, asked_at);
        }
        for (id, choice_index) in commands.ended_choices.drain(..) {
            self.scheduler.abort_choice(id, choice_index);
        }
        self.commands = commands;
    }

    fn submit(&mut self, queued: QueuedSubmission, now: Time) {
        let QueuedSubmission { submission, mut stream, events, reply } = queued;
        if reply.is_closed() {
            // Nobody waits for the answer any more.
            stream.disarm();
            return;
        }
        let id = stream.id();
        let num_choices = submission.sampling.num_choices;
        let request = Request {
            id,
            tenant: submission.tenant,
            adapter: submission.adapter,
            priority: submission.priority,
            cache_salt: submission.cache_salt,
            prompt: submission.prompt,
            generated: submission.generated,
            choice_offset: submission.choice_offset,
            sampling: submission.sampling,
            max_tokens: submission.max_tokens,
            min_tokens: submission.min_tokens,
            stop_token_ids: submission.stop_token_ids,
            deadline: submission.deadline.map(|at| self.shared.clock.time(at)),
        };
        match self.scheduler.submit(request, now) {
            Ok(()) => {
                let grammar = submission.grammar.map(|grammar| Arc::new(RequestGrammar::new(grammar)));
                let live = LiveRequest { events, num_open: num_choices, cancelled_at: None, grammar };
                self.live.insert(id, live);
                self.note_stats();
                if let Err(Ok(mut stream)) = reply.send(Ok(stream)) {
                    // The caller left in this very moment.
                    stream.disarm();
                    self.abort(id, Instant::now());
                }
            }
            Err(error) => {
                stream.disarm();
                drop(reply.send(Err(SubmitError::Scheduler(error))));
            }
        }
    }

    fn abort(&mut self, id: RequestId, asked_at: Instant) {
        if let Some(live) = self.live.get_mut(&id) {
            live.cancelled_at.get_or_insert(asked_at);
            self.scheduler.abort(id);
        }
    }

    /// Plans and launches a step; takes in those that are due.
    fn step(&mut self) -> Result<(), EngineError> {
        let began = Instant::now();
        let plan = self.scheduler.plan(self.shared.clock.time(began));
        let planned = Instant::now();
        let num_decodes = self.count_decodes(&plan);
        for admission in &plan.admitted {
            if let Some(grammar) = self.live.get(&admission.request.id).and_then(|live| live.grammar.as_ref()) {
                self.executor.constrain(admission.row, grammar);
            }
        }
        self.executor.launch(&plan)?;
        // With nothing to compute there is nothing to overlap: what is in flight is all there is to wait for.
        let depth = if plan.is_empty() { 0 } else { self.pipeline_depth };
        let (plan_time, launch_time) = (planned - began, planned.elapsed());
        self.in_flight.push_back(LaunchedStep { plan, num_decodes, plan_time, launch_time });
        self.publish();
        while self.in_flight.len() > depth {
            self.finish_oldest()?;
        }
        Ok(())
    }

    fn count_decodes(&mut self, plan: &StepPlan) -> u32 {
        for admission in &plan.admitted {
            let len = admission.request.prompt.len() + admission.generated.len();
            self.known_lens[admission.row.0 as usize] = len as u32;
        }
        let decodes = |sequence: &&quire_scheduler::ScheduledSequence| {
            sequence.num_computed_tokens >= self.known_lens[sequence.row.0 as usize]
        };
        plan.sequences.iter().filter(decodes).count() as u32
    }

    /// Waits for the oldest step in flight, applies it and publishes what came of it.
    fn finish_oldest(&mut self) -> Result<(), EngineError> {
        let began = Instant::now();
        let LaunchedStep { plan, num_decodes, plan_time, launch_time } =
            self.in_flight.pop_front().expect("a step is in flight");
        let mut output = self.executor.collect()?;
        let collected = Instant::now();
        let is_empty = plan.is_empty();
        let num_prefill_tokens = plan.num_scheduled_tokens - num_decodes;
        let num_sampled_tokens = output.token_ids.len() as u32;
        self.scheduler.apply(plan, &mut output, self.shared.clock.time(collected));
        self.executor.recycle(output);
        self.publish();
        if !is_empty {
            let stats = self.scheduler.stats();
            self.observer.step(&StepReport {
                num_decodes,
                num_prefill_tokens,
                num_sampled_tokens,
                plan: plan_time,
                execute: launch_time + (collected - began),
                apply: collected.elapsed(),
                stats,
            });
        }
        Ok(())
    }

    fn note_stats(&self) {
        *lock(&self.shared.stats) = self.scheduler.stats();
    }

    /// Answers who asks about the prefix cache.
    fn answer_cache_questions(&mut self, now: Time) {
        let questions = &mut self.commands.cache_questions;
        for reply in questions.flushes.drain(..) {
            let report = self.scheduler.flush_cache();
            // Counters first: who has the answer sees its effect.
            *lock(&self.shared.stats) = self.scheduler.stats();
            let _ = reply.send(report);
        }
        self.snapshots.add(&mut questions.blocks);
        let replies = self.snapshots.take_due(now);
        if replies.is_empty() {
            self.publish_kv_events();
            return;
        }
        let hub = &self.shared.kv_events;
        if !std::mem::replace(&mut self.told_events, true) {
            self.scheduler.start_kv_events(MAX_STEP_EVENTS);
            hub.start();
        }
        if let Some(events) = self.scheduler.drain_kv_events() {
            hub.push(events);
        }
        let all = Arc::new(self.scheduler.kv_blocks());
        for reply in replies {
            drop(reply.send((Arc::clone(&all), hub.last_number())));
        }
    }

    /// Tells subscribers what happened to cached blocks, where there are any.
    fn publish_kv_events(&mut self) {
        if !self.told_events {
            return;
        }
        let hub = &self.shared.kv_events;
        if hub.stop_unless_wanted() {
            self.told_events = false;
            self.scheduler.stop_kv_events();
        } else if let Some(events) = self.scheduler.drain_kv_events() {
            hub.push(events);
        }
    }

    /// Forwards what happened to whoever waits for it. Counters first: who sees an end sees its blocks free.
    fn publish(&mut self) {
        self.note_stats();
        self.scheduler.drain_events(&mut self.events);
        let mut events = std::mem::take(&mut self.events);
        for event in events.drain(..) {
            self.forward(event);
        }
        self.events = events;
        self.publish_kv_events();
    }

    fn forward(&mut self, event: Event) {
        let Event { request: id, choice_index, kind } = event;
        let Some(live) = self.live.get_mut(&id) else { return };
        let event = match kind {
            EventKind::Preempted => return,
            EventKind::Scheduled { num_cached_tokens } => TokenEvent::Scheduled { choice_index, num_cached_tokens },
            EventKind::PromptLogprobs { position, logprobs } => {
                TokenEvent::PromptLogprobs { choice_index, position, logprobs }
            }
            EventKind::Token { token_id, logprobs } => TokenEvent::Token { choice_index, token_id, logprobs },
            EventKind::Finished { reason, num_generated_tokens } => {
                live.num_open -= 1;
                live.grammar.iter().for_each(|grammar| grammar.end(choice_index));
                TokenEvent::Finished { choice_index, reason, num_generated_tokens }
            }
        };
        let sent = live.events.try_send(event);
        let has_room = !matches!(sent, Err(TrySendError::Full(_)));
        assert!(has_room, "a request's channel has room for all its events");
        if live.num_open == 0 {
            let cancelled_at = live.cancelled_at;
            self.live.remove(&id);
            if let Some(asked_at) = cancelled_at {
                self.observer.cancel_to_free(asked_at.elapsed());
            }
        }
    }
}
