//! Plays a workload against a scheduler and a fake device, and checks everything that was promised on the way.

use std::collections::{BTreeMap, VecDeque};

use super::kv_replay::KvReplay;
use super::rng::mix;
use super::{FakeDevice, FaultRates, RequestMix, Rng, Workload, expected_output};
use crate::{
    Event, EventKind, FinishReason, Request, RequestId, Scheduler, SchedulerConfig, StepOutput, StepPlan, SubmitError,
    Time,
};

/// What to play. The same values give the same run, step by step.
#[derive(Clone, Debug)]
pub struct Simulation {
    /// Of the scheduler and the device.
    pub scheduler: SchedulerConfig,
    /// Steps in flight while the next one is planned: 0 or 1.
    pub depth: usize,
    /// What requests look like.
    pub mix: RequestMix,
    /// How often the device does something uncommon.
    pub fault_rates: FaultRates,
    /// Of workload, arrivals, aborts and faults.
    pub seed: u64,
    /// How many requests arrive.
    pub num_requests: u32,
    /// Steps in a thousand before which a request arrives.
    pub arrivals_per_mille: u32,
    /// Steps in a thousand before which a request, any that ever was, is aborted.
    pub aborts_per_mille: u32,
    /// Steps in a thousand before which the prefix cache is flushed, where what it holds is told.
    pub flushes_per_mille: u32,
    /// Time between two steps, in microseconds.
    pub step_micros: u64,
    /// All state is checked every so many steps.
    pub check_every: u64,
    /// Compare outputs with what each request must generate. It takes longer than generating them.
    pub check_outputs: bool,
    /// Break something on purpose, to see that it is noticed.
    pub sabotage: Sabotage,
}

/// What a test breaks on purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sabotage {
    /// Nothing.
    #[default]
    None,
    /// An event that reports an end is lost.
    LoseEnd,
    /// Aborts do nothing, so that requests keep their blocks.
    LeakRequest,
    /// A block's content on the device changes.
    CorruptCache,
}

impl Simulation {
    /// A small server under a varied load.
    #[must_use]
    pub fn new(scheduler: SchedulerConfig, seed: u64) -> Self {
        Self {
            scheduler,
            depth: 1,
            mix: RequestMix::default(),
            fault_rates: FaultRates::default(),
            seed,
            num_requests: 100,
            arrivals_per_mille: 300,
            aborts_per_mille: 20,
            flushes_per_mille: 5,
            step_micros: 1_000,
            check_every: 16,
            check_outputs: true,
            sabotage: Sabotage::None,
        }
    }
}

/// How one choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Generated tokens, those left out that the request came with.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub reason: FinishReason,
}

/// What a run came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// All choices that were taken.
    pub outcomes: BTreeMap<(RequestId, u32), Outcome>,
    /// Steps applied.
    pub num_steps: u64,
    /// Requests that were refused because the queue was full.
    pub num_refused: u32,
    /// Hash of all plans: equal for equal runs.
    pub digest: u64,
    /// The scheduler's counters at the end.
    pub num_preemptions: u64,
    /// See [`crate::SchedulerStats::prefix_hit_tokens`].
    pub prefix_hit_tokens: u64,
    /// See [`crate::SchedulerStats::num_scheduled_tokens`].
    pub num_scheduled_tokens: u64,
}

/// A live or ended choice, as its events tell.
#[derive(Debug, Default)]
struct Choice {
    tokens: Vec<u32>,
    is_scheduled: bool,
    next_prompt_logprob: u32,
    finish: Option<FinishReason>,
}

struct Run<'a> {
    simulation: &'a Simulation,
    scheduler: Scheduler,
    /// Follows what the prefix cache is said to hold, where it is told.
    replay: Option<KvReplay>,
    requests: BTreeMap<RequestId, Request>,
    choices: BTreeMap<(RequestId, u32), Choice>,
    num_open: usize,
    events: Vec<Event>,
    lost_one: bool,
    num_steps: u64,
    /// Requests and the steps before which they were aborted.
    aborted: VecDeque<(RequestId, u64)>,
}

/// Plays a simulation to its end. Panics at the first broken promise.
pub fn simulate(simulation: &Simulation) -> Report {
    let config = &simulation.scheduler;
    let mut rng = Rng::new(simulation.seed ^ 0x5eed);
    let mut workload = Workload::new(simulation.mix.clone(), simulation.seed);
    let mut device = FakeDevice::new(config, simulation.mix.vocab_size, simulation.fault_rates, simulation.seed);
    let mut run = Run {
        simulation,
        scheduler: Scheduler::new(config.clone()).expect("the configuration works"),
        replay: config.kv_events.then(|| KvReplay::new(config)),
        requests: BTreeMap::new(),
        choices: BTreeMap::new(),
        num_open: 0,
        events: Vec::new(),
        lost_one: false,
        num_steps: 0,
        aborted: VecDeque::new(),
    };
    let mut in_flight: VecDeque<(StepPlan, StepOutput)> = VecDeque::new();
    let mut spare_outputs = Vec::new();
    if run.replay.is_some() {
        run.scheduler.start_kv_events(usize::MAX);
    }
    let (mut num_arrived, mut num_refused, mut digest) = (0, 0, 0);
    let mut num_idle = 0;
    while num_arrived < simulation.num_requests || run.num_open > 0 {
        let now = Time(run.num_steps * simulation.step_micros);
        while num_arrived < simulation.num_requests && (run.num_open == 0 || rng.chance(simulation.arrivals_per_mille))
        {
            num_arrived += 1;
            num_refused += u32::from(!run.submit(workload.next_request(now, config.max_model_len), now));
        }
        if rng.chance(simulation.aborts_per_mille) {
            run.abort(RequestId(u64::from(rng.below(num_arrived + 1))));
        }
        if simulation.scheduler.kv_events && rng.chance(simulation.flushes_per_mille) {
            run.scheduler.flush_cache();
        }
        let plan = run.scheduler.plan(now);
        num_idle = if plan.is_empty() { num_idle + 1 } else { 0 };
        assert!(run.num_open == 0 || num_idle < 4, "{} choices are alive and nothing runs", run.num_open);
        for sequence in &plan.sequences {
            let place = u64::from(sequence.row.0) << 32 | u64::from(sequence.num_computed_tokens);
            digest = mix(mix(digest, place), u64::from(sequence.num_scheduled_tokens));
        }
        digest = plan.new_blocks.iter().fold(digest, |digest, block| mix(digest, u64::from(block.0)));
        let mut output = spare_outputs.pop().unwrap_or_default();
        if simulation.sabotage == Sabotage::CorruptCache && run.num_steps == 20 {
            device.corrupt();
        }
        device.execute(&plan, &mut output);
        in_flight.push_back((plan, output));
        if in_flight.len() > simulation.depth {
            let (plan, mut output) = in_flight.pop_front().expect("just pushed");
            run.scheduler.apply(plan, &mut output, now);
            spare_outputs.push(output);
        }
        run.num_steps += 1;
        run.take_events();
        run.check_aborted();
        if run.num_steps.is_multiple_of(simulation.check_every) {
            run.scheduler.check_invariants();
            if let Some(replay) = &mut run.replay {
                replay.follow(&mut run.scheduler);
            }
        }
    }
    for (plan, mut output) in in_flight {
        run.scheduler.apply(plan, &mut output, Time(run.num_steps * simulation.step_micros));
    }
    run.finish(num_refused, digest)
}

impl Run<'_> {
    /// False when there is no room for it to wait.
    fn submit(&mut self, request: Request, now: Time) -> bool {
        match self.scheduler.submit(request.clone(), now) {
            Ok(()) => {}
            Err(SubmitError::QueueFull { .. } | SubmitError::WaitTooLong { .. }) => return false,
            // Its choices could not wait together even in an empty queue.
            Err(SubmitError::Invalid { field: "num_choices", .. }) => return false,
            Err(error) => panic!("{error}"),
        }
        for choice in 0..request.sampling.num_choices {
            let key = (request.id, request.choice_offset + choice);
            self.choices.insert(key, Choice { next_prompt_logprob: 1, ..Choice::default() });
            self.num_open += 1;
        }
        if let Some(replay) = &mut self.replay {
            replay.know_root(&request);
        }
        self.requests.insert(request.id, request);
        true
    }

    fn abort(&mut self, id: RequestId) {
        // Ends that are not reported yet are known to the scheduler already.
        self.take_events();
        let open = |(_, choice): &(_, &Choice)| choice.finish.is_none();
        let num_open = self.choices.range((id, 0)..=(id, u32::MAX)).filter(open).count();
        let is_leaked = self.simulation.sabotage == Sabotage::LeakRequest && num_open > 0;
        let has_ended = !is_leaked && self.scheduler.abort(id);
        assert!(num_open > 0 || !has_ended, "an ended request was ended again");
        assert!(is_leaked || !self.scheduler.abort(id), "a request was aborted twice");
        if num_open > 0 {
            self.aborted.push_back((id, self.num_steps));
        }
    }

    /// What was aborted is gone when all plans are applied that were in flight then.
    fn check_aborted(&mut self) {
        while let Some(&(id, step)) = self.aborted.front() {
            if self.num_steps <= step + self.simulation.depth as u64 + 1 {
                return;
            }
            let is_open = self.choices.range((id, 0)..=(id, u32::MAX)).any(|(_, choice)| choice.finish.is_none());
            assert!(!is_open, "{id:?} was aborted and still alive");
            self.aborted.pop_front();
        }
    }

    fn take_events(&mut self) {
        let mut events = std::mem::take(&mut self.events);
        self.scheduler.drain_events(&mut events);
        for event in events.drain(..) {
            let key = (event.request, event.choice_index);
            let choice = self.choices.get_mut(&key).expect("events are about what was taken");
            assert_eq!(choice.finish, None, "{key:?}: {:?} after the end", event.kind);
            match event.kind {
                EventKind::Scheduled { num_cached_tokens } => {
                    assert!(!std::mem::replace(&mut choice.is_scheduled, true), "{key:?} was scheduled first twice");
                    let request = &self.requests[&event.request];
                    let num_tokens = request.prompt.len() + request.generated.len();
                    assert!((num_cached_tokens as usize) < num_tokens);
                }
                EventKind::Preempted => assert!(choice.is_scheduled),
                EventKind::PromptLogprobs { position, logprobs } => {
                    assert!(choice.tokens.is_empty(), "{key:?}: the prompt after a token");
                    assert_eq!((position, logprobs.logprob), (choice.next_prompt_logprob, -(position as f32)));
                    choice.next_prompt_logprob += 1;
                }
                EventKind::Token { token_id, .. } => {
                    assert!(choice.is_scheduled);
                    choice.tokens.push(token_id);
                }
                EventKind::Finished { reason, num_generated_tokens } => {
                    let num_before = self.requests[&event.request].generated.len();
                    assert_eq!(num_generated_tokens as usize, num_before + choice.tokens.len());
                    if self.simulation.sabotage == Sabotage::LoseEnd && !self.lost_one {
                        self.lost_one = true;
                        continue;
                    }
                    choice.finish = Some(reason);
                    self.num_open -= 1;
                }
            }
        }
        self.events = events;
    }

    fn finish(mut self, num_refused: u32, digest: u64) -> Report {
        self.scheduler.check_invariants();
        if let Some(replay) = &mut self.replay {
            replay.follow(&mut self.scheduler);
        }
        assert!(!self.scheduler.has_work());
        let stats = self.scheduler.stats();
        assert_eq!((stats.num_waiting, stats.num_running, stats.waiting_tokens, stats.num_tenants), (0, 0, 0, 0));
        for blocks in stats.kv_groups() {
            assert_eq!((blocks.num_used, blocks.num_free + blocks.num_cached), (0, blocks.num_total));
        }
        let mut outcomes = BTreeMap::new();
        for (key, choice) in self.choices {
            let reason = choice.finish.expect("every choice ends");
            let request = &self.requests[&key.0];
            if self.simulation.check_outputs {
                self.simulation.check_output(request, key.1, &choice.tokens, reason);
            }
            let reports_prompt = request.sampling.prompt_logprobs.is_some() && key.1 == request.choice_offset;
            if reports_prompt && request.generated.is_empty() && !choice.tokens.is_empty() {
                assert_eq!(choice.next_prompt_logprob as usize, request.prompt.len(), "{key:?}: prompt logprobs");
            }
            outcomes.insert(key, Outcome { tokens: choice.tokens, reason });
        }
        Report {
            outcomes,
            num_steps: self.num_steps,
            num_refused,
            digest,
            num_preemptions: stats.num_preemptions,
            prefix_hit_tokens: stats.prefix_hit_tokens,
            num_scheduled_tokens: stats.num_scheduled_tokens,
        }
    }
}

impl Simulation {
    fn check_output(&self, request: &Request, choice_index: u32, tokens: &[u32], reason: FinishReason) {
        let (expected, expected_reason) = expected_output(request, choice_index, &self.scheduler, self.mix.vocab_size);
        match reason {
            FinishReason::Stop { .. } | FinishReason::Length => {
                assert_eq!((tokens, reason), (&expected[..], expected_reason), "{:?} {choice_index}", request.id);
            }
            FinishReason::Cancelled
            | FinishReason::DeadlineExceeded
            | FinishReason::NonFinite
            | FinishReason::NothingAllowed => {
                assert!(expected.starts_with(tokens), "{:?} {choice_index}", request.id);
            }
        }
    }
}
