//! Scenarios as data: what is done before each step, and the plan and events that must follow.
//!
//! A plan is written as `-1 +0 | 0:5+1* 2:0+8 | A.0 stop`: row 1 is released, row 0 admitted; row 0 computes one token
//! behind 5 and samples, row 2 computes 8 tokens; then what ended or was preempted while the step was planned or its
//! predecessor applied. Blocks have 4 tokens, a step has 16 at most, there are 4 rows.

use std::collections::VecDeque;
use std::fmt::Write;

use quire_scheduler::testing::request;
use quire_scheduler::{
    EventKind, FinishReason, KvGroup, KvGroupKind, Request, RequestId, SamplingParams, Scheduler, SchedulerConfig,
    SequenceOutput, StepOutput, StepPlan, SubmitError, TenantId, Time,
};

/// What is done before a step.
#[expect(clippy::large_enum_variant, reason = "a handful of them, and boxes would clutter the scenarios")]
enum Action {
    Submit(Request),
    Abort(u64),
    /// The next step to be computed yields this token in all rows.
    Yield(u32),
    /// The next step to be computed is not finite in this row.
    NonFinite(u32),
    /// The next step to be computed finds nothing to choose in this row.
    NothingAllowed(u32),
    /// The next step to be computed yields so many tokens in rows that sample, and keeps one computed token less when
    /// it yields none.
    YieldCount(usize),
    /// How many blocks of the first KV group are used and cached now.
    Blocks {
        used: u32,
        cached: u32,
    },
}
use Action::{Abort, Blocks, NonFinite, NothingAllowed, Submit, Yield, YieldCount};

/// Token that ends a request of these scenarios.
const STOP: u32 = 99;

fn config(num_blocks: u32) -> SchedulerConfig {
    SchedulerConfig {
        max_num_seqs: 4,
        max_num_batched_tokens: 16,
        max_model_len: 64,
        block_size: 4,
        kv_groups: vec![KvGroup { kind: KvGroupKind::Full, num_blocks }],
        max_waiting_tokens: 256,
        ..SchedulerConfig::default()
    }
}

/// A request of `len` tokens of prompt, all different from those of other ids.
fn ask(id: u64, len: u32, max_tokens: u32) -> Request {
    let prompt: Vec<u32> = (0..len).map(|position| 1000 * id as u32 + position).collect();
    Request { stop_token_ids: vec![STOP], ..request(id, &prompt, max_tokens) }
}

/// A request with the prompt of request 0.
fn ask_same(id: u64, len: u32, max_tokens: u32) -> Request {
    Request { prompt: ask(0, len, 1).prompt, ..ask(id, len, max_tokens) }
}

fn with_choices(request: Request, num_choices: u32) -> Request {
    Request { sampling: SamplingParams { num_choices, ..request.sampling }, ..request }
}

struct Rig {
    scheduler: Scheduler,
    depth: usize,
    in_flight: VecDeque<StepPlan>,
    now: Time,
    token: u32,
    count: usize,
    refused: Option<(u32, SequenceOutput)>,
}

impl Rig {
    fn new(config: SchedulerConfig, depth: usize) -> Self {
        let scheduler = Scheduler::new(config).unwrap();
        Self { scheduler, depth, in_flight: VecDeque::new(), now: Time(0), token: 7, count: 1, refused: None }
    }

    fn act(&mut self, action: Action) {
        match action {
            Submit(request) => self.scheduler.submit(request, self.now).unwrap(),
            Abort(id) => assert!(self.scheduler.abort(RequestId(id))),
            Yield(token) => self.token = token,
            NonFinite(row) => self.refused = Some((row, SequenceOutput::NonFinite)),
            NothingAllowed(row) => self.refused = Some((row, SequenceOutput::NothingAllowed)),
            YieldCount(count) => self.count = count,
            Blocks { used, cached } => {
                let blocks = self.scheduler.stats().kv_groups()[0];
                assert_eq!((blocks.num_used, blocks.num_cached), (used, cached));
            }
        }
    }

    fn step(&mut self) -> String {
        let plan = self.scheduler.plan(self.now);
        let mut text = String::new();
        for row in &plan.released {
            write!(text, "-{} ", row.0).unwrap();
        }
        for admission in &plan.admitted {
            write!(text, "+{} ", admission.row.0).unwrap();
        }
        text += "|";
        for sequence in &plan.sequences {
            let (start, count) = (sequence.num_computed_tokens, sequence.num_scheduled_tokens);
            let mark = if sequence.samples { "*" } else { "" };
            write!(text, " {}:{start}+{count}{mark}", sequence.row.0).unwrap();
        }
        text += " |";
        let mut events = Vec::new();
        self.scheduler.drain_events(&mut events);
        for event in events {
            let what = match event.kind {
                EventKind::Preempted => "preempted",
                EventKind::Finished { reason: FinishReason::Stop { .. }, .. } => "stop",
                EventKind::Finished { reason: FinishReason::Length, .. } => "length",
                EventKind::Finished { reason: FinishReason::Cancelled, .. } => "cancelled",
                EventKind::Finished { reason: FinishReason::DeadlineExceeded, .. } => "late",
                EventKind::Finished { reason: FinishReason::NonFinite, .. } => "non-finite",
                EventKind::Finished { reason: FinishReason::NothingAllowed, .. } => "nothing-allowed",
                _ => continue,
            };
            write!(text, " {}.{} {what}", (b'A' + event.request.0 as u8) as char, event.choice_index).unwrap();
        }
        self.in_flight.push_back(plan);
        if self.in_flight.len() > self.depth {
            let plan = self.in_flight.pop_front().unwrap();
            self.apply(plan);
        }
        self.scheduler.check_invariants();
        text.trim().to_owned()
    }

    fn apply(&mut self, plan: StepPlan) {
        let mut output = StepOutput::new(plan.step_id);
        for sequence in &plan.sequences {
            if let Some((row, refusal)) = &self.refused
                && *row == sequence.row.0
            {
                output.sequences.push(refusal.clone());
            } else {
                let tokens = vec![self.token; if sequence.samples { self.count } else { 0 }];
                let num_taken_back = u32::from(self.count == 0);
                output.push_computed(sequence.num_scheduled_tokens - num_taken_back, &tokens);
            }
        }
        self.token = 7;
        self.count = 1;
        self.refused = None;
        self.now.0 += 1000;
        self.scheduler.apply(plan, &mut output, self.now);
    }
}

fn check(config: SchedulerConfig, depth: usize, steps: Vec<(Vec<Action>, &str)>) {
    let mut rig = Rig::new(config, depth);
    for (index, (actions, expected)) in steps.into_iter().enumerate() {
        for action in actions {
            rig.act(action);
        }
        assert_eq!(rig.step(), expected, "step {index}");
    }
}

#[test]
fn decodes_come_first_and_prompts_share_what_is_left() {
    let steps = vec![
        (vec![Submit(ask(0, 3, 9)), Submit(ask(1, 20, 9))], "+0 +1 | 0:0+3* 1:0+13 |"),
        (vec![Submit(ask(2, 30, 9))], "+2 | 0:3+1* 1:13+7* 2:0+8 |"),
        (vec![], "| 0:4+1* 1:20+1* 2:8+14 |"),
        (vec![], "| 0:5+1* 1:21+1* 2:22+8* |"),
        (vec![], "| 0:6+1* 1:22+1* 2:30+1* |"),
    ];
    check(config(64), 0, steps);
}

#[test]
fn a_prefix_hit_leaves_one_token_to_compute() {
    // Of 12 equal tokens two blocks are hit, of 13 three.
    let steps = vec![
        (vec![Submit(ask(0, 12, 3))], "+0 | 0:0+12* |"),
        (vec![Submit(ask_same(1, 12, 2)), Submit(ask_same(2, 13, 2))], "+1 +2 | 0:12+1* 2:12+1* 1:8+4* |"),
        (vec![Blocks { used: 6, cached: 0 }], "| 0:13+1* 1:12+1* 2:13+1* |"),
        (vec![Blocks { used: 0, cached: 3 }], "-0 -1 -2 | | A.0 length B.0 length C.0 length"),
    ];
    check(config(64), 0, steps);
}

#[test]
fn prompt_logprobs_are_computed_not_hit() {
    let sampling = SamplingParams { prompt_logprobs: Some(1), ..SamplingParams::default() };
    let steps = vec![
        (vec![Submit(ask(0, 12, 1))], "+0 | 0:0+12* |"),
        (vec![Submit(Request { sampling, ..ask_same(1, 12, 2) })], "-0 +0 | 0:0+12* | A.0 length"),
        (vec![Blocks { used: 3, cached: 3 }], "| 0:12+1* |"),
    ];
    check(config(64), 0, steps);
}

#[test]
fn generated_tokens_are_hit_too() {
    let follow_up = |id| {
        let mut prompt = ask(0, 4, 1).prompt.to_vec();
        prompt.extend([7; 5]);
        Request { prompt: prompt.into(), ..ask(id, 9, 1) }
    };
    let steps = vec![
        (vec![Submit(ask(0, 4, 5))], "+0 | 0:0+4* |"),
        (vec![], "| 0:4+1* |"),
        (vec![], "| 0:5+1* |"),
        (vec![], "| 0:6+1* |"),
        (vec![], "| 0:7+1* |"),
        (vec![Submit(follow_up(1))], "-0 +0 | 0:8+1* | A.0 length"),
    ];
    check(config(64), 0, steps);
}

#[test]
fn the_newest_is_preempted_and_finds_its_blocks_again() {
    let steps = vec![
        (vec![Submit(ask(0, 16, 20)), Submit(ask(1, 15, 20))], "+0 | 0:0+16* |"),
        (vec![], "+1 | 0:16+1* 1:0+15* |"),
        (vec![], "| 0:17+1* 1:15+1* |"),
        (vec![], "| 0:18+1* 1:16+1* |"),
        (vec![Blocks { used: 10, cached: 0 }, Submit(ask(2, 18, 9))], "+2 | 0:19+1* 1:17+1* 2:0+14 |"),
        (vec![Blocks { used: 14, cached: 0 }], "| 0:20+1* 1:18+1* 2:14+4* |"),
        (vec![Blocks { used: 16, cached: 0 }], "| 0:21+1* 1:19+1* 2:18+1* |"),
        (vec![], "| 0:22+1* 1:20+1* 2:19+1* |"),
        // All 17 blocks are used. The third needs one more and waits: those before it may end.
        (vec![Blocks { used: 17, cached: 0 }], "| 0:23+1* 1:21+1* |"),
        // But the first needs one too: the third goes back to waiting.
        (vec![], "-2 | 0:24+1* 1:22+1* | C.0 preempted"),
        (vec![Blocks { used: 13, cached: 4 }], "| 0:25+1* 1:23+1* |"),
        // Of its five blocks the last was given away; the other four are hit.
        (vec![Abort(0)], "-0 +0 | 1:24+1* 0:16+5* | A.0 cancelled"),
    ];
    check(config(17), 0, steps);
}

#[test]
fn with_a_plan_in_flight_a_preemption_waits_for_it() {
    let steps = vec![
        (vec![Submit(ask(0, 16, 30)), Submit(ask(1, 15, 20))], "+0 | 0:0+16* |"),
        (vec![], "+1 | 0:16+1* 1:0+15* |"),
        (vec![], "| 0:17+1* 1:15+1* |"),
        (vec![], "| 0:18+1* 1:16+1* |"),
        (vec![], "| 0:19+1* 1:17+1* |"),
        (vec![], "| 0:20+1* 1:18+1* |"),
        (vec![], "| 0:21+1* 1:19+1* |"),
        (vec![], "| 0:22+1* 1:20+1* |"),
        (vec![Blocks { used: 12, cached: 0 }], "| 0:23+1* 1:21+1* |"),
        // The first needs a block of the second, which the step in flight still uses: both pause.
        (vec![Blocks { used: 12, cached: 0 }], "| |"),
        (vec![Blocks { used: 6, cached: 5 }], "-1 | 0:24+1* | B.0 preempted"),
    ];
    check(SchedulerConfig { max_model_len: 48, ..config(12) }, 1, steps);
}

#[test]
fn choices_share_the_full_blocks_of_the_prompt() {
    let uncached = SchedulerConfig { enable_prefix_cache: false, ..config(64) };
    let steps = vec![
        (vec![Submit(with_choices(ask(0, 18, 3), 3))], "+0 | 0:0+16 |"),
        (vec![Blocks { used: 4, cached: 0 }], "+1 +2 | 0:16+2* 1:16+2* 2:16+2* |"),
        (vec![Blocks { used: 7, cached: 0 }], "| 0:18+1* 1:18+1* 2:18+1* |"),
        (vec![], "| 0:19+1* 1:19+1* 2:19+1* |"),
        (vec![Blocks { used: 0, cached: 0 }], "-0 -1 -2 | | A.0 length A.1 length A.2 length"),
    ];
    check(uncached, 0, steps);
}

#[test]
fn another_choice_takes_over_from_a_leader_that_failed() {
    let steps = vec![
        (vec![Submit(with_choices(ask(0, 18, 2), 3)), NonFinite(0)], "+0 | 0:0+16 |"),
        (vec![Blocks { used: 0, cached: 0 }], "-0 +0 | 0:0+16 | A.0 non-finite"),
        (vec![], "+1 | 0:16+2* 1:16+2* |"),
        (vec![], "| 0:18+1* 1:18+1* |"),
        (vec![], "-0 -1 | | A.1 length A.2 length"),
    ];
    check(config(64), 0, steps);
}

#[test]
fn a_sequence_with_nothing_to_choose_ends_and_its_blocks_stay() {
    let steps = vec![
        (vec![Submit(ask(0, 5, 9)), Submit(ask(1, 3, 3))], "+0 +1 | 0:0+5* 1:0+3* |"),
        (vec![NothingAllowed(0)], "| 0:5+1* 1:3+1* |"),
        (vec![], "-0 | 1:4+1* | A.0 nothing-allowed"),
    ];
    check(config(64), 0, steps);
}

#[test]
fn a_stop_that_is_found_late_costs_one_step_and_no_block() {
    let steps = vec![
        (vec![Submit(ask(0, 5, 9)), Submit(ask(1, 3, 3))], "+0 +1 | 0:0+5* 1:0+3* |"),
        (vec![], "| 0:5+1* 1:3+1* |"),
        (vec![Yield(STOP)], "| 0:6+1* 1:4+1* |"),
        // Both have stopped with the step in flight: it drops out, and nothing is planned.
        (vec![], "| |"),
        (vec![Blocks { used: 0, cached: 2 }], "-0 -1 | | A.0 stop B.0 stop"),
    ];
    check(config(64), 1, steps);
}

#[test]
fn an_end_that_is_certain_is_not_run_past() {
    let steps = vec![
        (vec![Submit(ask(0, 5, 2))], "+0 | 0:0+5* |"),
        (vec![], "| 0:5+1* |"),
        (vec![], "| |"),
        (vec![], "-0 | | A.0 length"),
    ];
    check(config(64), 1, steps);
}

#[test]
fn an_aborted_request_is_gone_when_the_step_in_flight_is_applied() {
    let steps = vec![
        (vec![Submit(ask(0, 5, 9)), Submit(ask(1, 3, 9))], "+0 +1 | 0:0+5* 1:0+3* |"),
        (vec![], "| 0:5+1* 1:3+1* |"),
        (vec![Abort(0)], "| 1:4+1* |"),
        (vec![Blocks { used: 2, cached: 1 }], "-0 | 1:5+1* | A.0 cancelled"),
    ];
    check(config(64), 1, steps);
}

#[test]
fn several_tokens_are_computed_together_in_the_next_step() {
    let steps = vec![
        (vec![Submit(ask(0, 5, 9)), YieldCount(3)], "+0 | 0:0+5* |"),
        (vec![], "| 0:5+3* |"),
        (vec![YieldCount(0)], "| 0:8+1* |"),
        (vec![], "| 0:8+1* |"),
        (vec![], "| 0:9+1* |"),
    ];
    check(config(64), 0, steps);
}

#[test]
fn a_surprise_voids_the_plan_in_flight_and_the_row_starts_anew() {
    let steps = vec![
        (vec![Submit(ask(0, 5, 9))], "+0 | 0:0+5* |"),
        (vec![YieldCount(3)], "| 0:5+1* |"),
        // The second step counts on one token; three have come. It is void, and its row is waited for.
        (vec![], "| |"),
        (vec![], "-0 +0 | 0:5+3* |"),
        (vec![], "| 0:8+1* |"),
    ];
    check(config(64), 1, steps);
}

#[test]
fn deadlines_end_what_waits_and_what_runs() {
    let one_row = SchedulerConfig { max_num_seqs: 1, ..config(64) };
    let late = |id, micros| Request { deadline: Some(Time(micros)), ..ask(id, 5, 9) };
    let steps = vec![
        (vec![Submit(late(0, 2500)), Submit(late(1, 1500))], "+0 | 0:0+5* |"),
        (vec![], "| 0:5+1* |"),
        (vec![], "| 0:6+1* | B.0 late"),
        (vec![], "-0 | | A.0 late"),
    ];
    check(one_row, 0, steps);
}

#[test]
fn a_request_can_start_in_the_middle_or_at_its_end() {
    let resumed = |id, generated: &[u32], max_tokens| Request { generated: generated.into(), ..ask(id, 5, max_tokens) };
    let requests =
        vec![Submit(resumed(0, &[1, 2, 3], 5)), Submit(resumed(1, &[1, STOP], 5)), Submit(resumed(2, &[1, 2], 2))];
    let steps =
        vec![(requests, "+0 | 0:0+8* | B.0 stop C.0 length"), (vec![], "| 0:8+1* |"), (vec![], "-0 | | A.0 length")];
    check(config(64), 0, steps);
}

#[test]
fn stop_tokens_count_from_min_tokens_on() {
    let steps = vec![
        (vec![Submit(Request { min_tokens: 3, ..ask(0, 5, 9) }), Yield(STOP)], "+0 | 0:0+5* |"),
        (vec![Yield(STOP)], "| 0:5+1* |"),
        (vec![Yield(STOP)], "| 0:6+1* |"),
        (vec![], "-0 | | A.0 stop"),
    ];
    check(config(64), 0, steps);
}

#[test]
fn better_priorities_run_first() {
    let one_row = SchedulerConfig { max_num_seqs: 1, ..config(64) };
    let prior = |id, priority| Submit(Request { priority, ..ask(id, 3, 1) });
    let steps = vec![
        (vec![prior(0, 0), prior(1, 1), prior(2, -1), prior(3, 0)], "+0 | 0:0+3* |"),
        (vec![], "-0 +0 | 0:0+3* | C.0 length"),
        (vec![], "-0 +0 | 0:0+3* | A.0 length"),
        (vec![], "-0 +0 | 0:0+3* | D.0 length"),
        (vec![], "-0 | | B.0 length"),
    ];
    check(one_row, 0, steps);
}

#[test]
fn a_tenant_cannot_push_others_aside_with_priorities() {
    let one_row = SchedulerConfig { max_num_seqs: 1, ..config(64) };
    let of = |id, tenant, priority| Submit(Request { tenant: TenantId(tenant), priority, ..ask(id, 3, 1) });
    let steps = vec![
        (vec![of(0, 1, -9), of(1, 1, -9), of(2, 1, -9), of(3, 2, 0)], "+0 | 0:0+3* |"),
        (vec![of(4, 1, i32::MIN)], "-0 +0 | 0:0+3* | A.0 length"),
        (vec![], "-0 +0 | 0:0+3* | D.0 length"),
        (vec![], "-0 +0 | 0:0+3* | E.0 length"),
        (vec![], "-0 +0 | 0:0+3* | B.0 length"),
    ];
    check(one_row, 0, steps);
}

#[test]
fn whoever_runs_loses_no_blocks_to_a_newcomer_of_better_priority() {
    let mut rig = Rig::new(SchedulerConfig { max_model_len: 48, ..config(12) }, 0);
    rig.act(Submit(Request { tenant: TenantId(1), ..ask(0, 16, 30) }));
    rig.step();
    rig.act(Submit(Request { tenant: TenantId(2), priority: -100, ..ask(1, 16, 30) }));
    let preempted = (0..40).map(|_| rig.step()).find(|step| step.contains("preempted"));
    assert!(preempted.as_ref().is_some_and(|step| step.contains("B.0 preempted")), "{preempted:?}");
}

#[test]
fn a_large_request_is_not_passed_by_small_ones() {
    let steps = vec![
        (vec![Submit(ask(0, 16, 30))], "+0 | 0:0+16* |"),
        (vec![Submit(ask(1, 50, 4)), Submit(ask(2, 3, 4))], "| 0:16+1* |"),
        (vec![], "| 0:17+1* |"),
        (vec![Abort(0)], "-0 +0 | 0:0+16 | A.0 cancelled"),
        (vec![], "| 0:16+16 |"),
    ];
    check(config(16), 0, steps);
}

#[test]
fn a_window_gives_its_blocks_back() {
    let kv_groups = vec![KvGroup { kind: KvGroupKind::SlidingWindow { window: 6 }, num_blocks: 16 }];
    let steps = vec![
        (vec![Submit(ask(0, 30, 9))], "+0 | 0:0+16 |"),
        (vec![Blocks { used: 2, cached: 2 }], "| 0:16+14* |"),
        (vec![Blocks { used: 2, cached: 6 }], "| 0:30+1* |"),
    ];
    check(SchedulerConfig { kv_groups, ..config(16) }, 0, steps);
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let mut rig = Rig::new(SchedulerConfig { max_num_seqs: 1, max_waiting_tokens: 64, ..config(16) }, 0);
    rig.act(Submit(ask(0, 4, 60)));
    rig.step();
    for id in 1..=4 {
        rig.act(Submit(ask(id, 16, 1)));
    }
    let refusal = rig.scheduler.submit(ask(5, 16, 1), rig.now).unwrap_err();
    assert_eq!(refusal, SubmitError::QueueFull { waiting_tokens: 64, limit: 64, retry_after_micros: 1_000_000 });
    // Another tenant still has its share, and no more.
    let other = |id| Request { tenant: TenantId(1), ..ask(id, 16, 1) };
    rig.act(Submit(other(6)));
    rig.act(Submit(other(7)));
    assert!(matches!(rig.scheduler.submit(other(8), rig.now), Err(SubmitError::QueueFull { .. })));
    for _ in 0..62 {
        rig.step();
    }
    // In 60 ms nothing left the queue, in the last 2 ms a request each. Fill it up again.
    let refusal = (9..).find_map(|id| rig.scheduler.submit(ask(id, 16, 1), rig.now).err());
    let Some(SubmitError::QueueFull { retry_after_micros, .. }) = refusal else { panic!("{refusal:?}") };
    assert!((10_000..40_000).contains(&retry_after_micros), "{retry_after_micros}");
}

#[test]
fn a_wait_that_would_be_too_long_is_refused() {
    let mut rig = Rig::new(SchedulerConfig { max_num_seqs: 1, max_waiting_micros: Some(40_000), ..config(16) }, 0);
    for id in 0..4 {
        rig.act(Submit(ask(id, 8, 40)));
    }
    for _ in 0..100 {
        rig.step();
    }
    // 8 tokens wait. In 100 ms two requests of 8 tokens have left the queue.
    let refusal = rig.scheduler.submit(ask(4, 8, 1), rig.now);
    let Err(SubmitError::WaitTooLong { wait_micros, limit_micros, retry_after_micros }) = refusal else {
        panic!("{refusal:?}")
    };
    assert!((45_000..55_000).contains(&wait_micros), "{wait_micros}");
    assert_eq!((limit_micros, retry_after_micros), (40_000, wait_micros - 40_000));
    // With a better priority it would be next.
    rig.act(Submit(Request { priority: -1, ..ask(5, 8, 1) }));
}

#[test]
fn what_cannot_work_is_refused() {
    let mut scheduler = Scheduler::new(config(16)).unwrap();
    let cases = [
        (ask(0, 0, 1), SubmitError::EmptyPrompt),
        (ask(0, 60, 5), SubmitError::TooLong { num_tokens: 65, max_model_len: 64 }),
        (ask(0, 1, u32::MAX), SubmitError::TooLong { num_tokens: 1 << 32, max_model_len: 64 }),
        (ask(0, 1, 0), SubmitError::Invalid { field: "max_tokens", why: "must be at least 1" }),
        (with_choices(ask(0, 1, 1), 0), SubmitError::Invalid { field: "num_choices", why: "must be at least 1" }),
        (
            with_choices(ask(0, 50, 1), 1 << 30),
            SubmitError::Invalid { field: "num_choices", why: "must fit into the queue all together" },
        ),
        (
            Request { choice_offset: u32::MAX, ..ask(0, 1, 1) },
            SubmitError::Invalid { field: "choice_offset", why: "must leave room for num_choices" },
        ),
        (
            Request { generated: vec![1, 2], ..ask(0, 1, 1) },
            SubmitError::Invalid { field: "generated", why: "must not be longer than max_tokens" },
        ),
        (
            with_choices(Request { generated: vec![1], ..ask(0, 1, 2) }, 2),
            SubmitError::Invalid { field: "num_choices", why: "must be 1 for a request that continues one choice" },
        ),
    ];
    for (request, expected) in cases {
        assert_eq!(scheduler.submit(request, Time(0)), Err(expected));
        assert!(!scheduler.has_work());
    }
    scheduler.submit(ask(0, 1, 1), Time(0)).unwrap();
    let in_use = SubmitError::Invalid { field: "id", why: "is in use by a live request" };
    assert_eq!(scheduler.submit(ask(0, 1, 1), Time(0)), Err(in_use));
    assert!(!scheduler.abort(RequestId(1)));
}

#[test]
#[should_panic(expected = "two plans are in flight")]
fn a_third_plan_in_flight_ends_the_process() {
    let mut scheduler = Scheduler::new(config(16)).unwrap();
    let _plans = [scheduler.plan(Time(0)), scheduler.plan(Time(0)), scheduler.plan(Time(0))];
}

#[test]
#[should_panic(expected = "is not the oldest in flight")]
fn plans_are_applied_in_order() {
    let mut scheduler = Scheduler::new(config(16)).unwrap();
    let _first = scheduler.plan(Time(0));
    let second = scheduler.plan(Time(0));
    let mut output = StepOutput::new(second.step_id);
    scheduler.apply(second, &mut output, Time(0));
}
