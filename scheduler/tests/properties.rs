//! Random configurations, requests, aborts and faults. [`simulate`] checks on the way: every choice ends exactly once and
//! generates what it must, budgets hold, a block that is written has one owner, reference counts are the numbers of
//! tables, `free + used + cached = total`, and an aborted request is gone when what was in flight is applied.

use std::collections::VecDeque;

use proptest::prelude::*;
use quire_scheduler::testing::{
    BlockOperation, FaultRates, RequestMix, Rng, Simulation, Workload, compare_blocks, request, simulate,
};
use quire_scheduler::{
    EventKind, FinishReason, KvGroup, KvGroupKind, Policy, Request, RequestId, SamplingParams, Scheduler,
    SchedulerConfig, StepOutput, StepPlan, Time,
};

fn kv_group_kind() -> impl Strategy<Value = KvGroupKind> {
    prop_oneof![
        2 => Just(KvGroupKind::Full),
        1 => (1_u32..40).prop_map(|window| KvGroupKind::SlidingWindow { window }),
    ]
}

prop_compose! {
    /// Servers with hardly more blocks than one sequence needs, up to four times as many.
    fn scheduler_config()(
        max_num_seqs in 1_u32..12,
        spare_tokens in 0_u32..64,
        max_model_len in 16_u32..160,
        block_size in prop::sample::select(vec![1_u32, 2, 3, 4, 8, 16]),
        kinds in prop::collection::vec((kv_group_kind(), 0_u32..300), 1..4),
        enable_prefix_cache in prop::bool::weighted(0.7),
        kv_events in any::<bool>(),
        waiting in 1_u64..20,
        max_waiting_micros in prop::option::weighted(0.2, 1_000_u64..200_000),
        policy in prop::sample::select(vec![Policy::Priority, Policy::Fcfs]),
    ) -> SchedulerConfig {
        let mut config = SchedulerConfig {
            max_num_seqs,
            max_num_batched_tokens: max_num_seqs + spare_tokens,
            max_model_len,
            block_size,
            kv_groups: Vec::new(),
            enable_prefix_cache,
            kv_events,
            max_waiting_tokens: u64::from(max_model_len) * waiting,
            max_waiting_micros,
            policy,
        };
        config.kv_groups = kinds.into_iter().map(|(kind, spare_percent)| {
            let min = config.min_num_blocks(kind);
            KvGroup { kind, num_blocks: min + min * spare_percent / 100 }
        }).collect();
        config
    }
}

prop_compose! {
    fn simulation()(
        scheduler in scheduler_config(),
        depth in 0_usize..2,
        seed in any::<u64>(),
        max_choices in 1_u32..8,
        num_prefixes in 0_u32..6,
        vocab_size in 4_u32..200,
        fault_rates in prop::option::of((0_u32..100, 0_u32..100, 0_u32..20)),
        arrivals_per_mille in 20_u32..700,
        aborts_per_mille in 0_u32..100,
        flushes_per_mille in 0_u32..60,
    ) -> Simulation {
        let (several_tokens, taken_back, non_finite) = fault_rates.unwrap_or_default();
        Simulation {
            depth,
            mix: RequestMix { max_choices, num_prefixes, vocab_size, ..RequestMix::default() },
            fault_rates: FaultRates { several_tokens, taken_back, non_finite },
            num_requests: 60,
            arrivals_per_mille,
            aborts_per_mille,
            flushes_per_mille,
            check_every: 4,
            ..Simulation::new(scheduler, seed)
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn every_promise_holds(simulation in simulation()) {
        simulate(&simulation);
    }

    #[test]
    fn the_same_seed_gives_the_same_plans(simulation in simulation()) {
        let simulation = Simulation { num_requests: 20, ..simulation };
        prop_assert_eq!(simulate(&simulation), simulate(&simulation));
    }

    #[test]
    fn depth_does_not_show_in_the_output(simulation in simulation()) {
        // Without what depends on the time, every request generates all it can.
        let mut simulation = Simulation {
            mix: RequestMix { deadline_per_mille: 0, ..simulation.mix.clone() },
            fault_rates: FaultRates { non_finite: 0, ..simulation.fault_rates },
            aborts_per_mille: 0,
            num_requests: 30,
            ..simulation
        };
        simulation.scheduler.max_waiting_tokens = 1 << 40;
        simulation.scheduler.max_waiting_micros = None;
        let shallow = simulate(&Simulation { depth: 0, ..simulation.clone() });
        let deep = simulate(&Simulation { depth: 1, ..simulation });
        prop_assert_eq!(shallow.outcomes, deep.outcomes);
    }

    #[test]
    fn allocator_and_naive_twin_agree(num_blocks in 1_u32..40, num_hashes in 1_u32..60, seed in any::<u64>()) {
        let mut rng = Rng::new(seed);
        let operations = (0..2_000).map(|_| BlockOperation::random(&mut rng, num_hashes));
        prop_assert_eq!(compare_blocks(num_blocks, operations), Ok(()));
    }

    /// First come, first served: whoever is first of those alive is never held up for more than a few steps, however
    /// scarce blocks are.
    #[test]
    fn the_oldest_always_proceeds(config in scheduler_config(), depth in 0_usize..2, seed in any::<u64>()) {
        let config = SchedulerConfig { policy: Policy::Fcfs, max_waiting_tokens: 1 << 40, max_waiting_micros: None, ..config };
        let mix = RequestMix { max_tenant: 0, max_choices: 1, num_stop_tokens: 0, ..RequestMix::default() };
        let mut workload = Workload::new(mix, seed);
        let mut rig = Rig::new(config.clone(), depth);
        for _ in 0..30 {
            let request = workload.next_request(Time(0), config.max_model_len);
            let request = Request { deadline: None, generated: Vec::new(), choice_offset: 0, ..request };
            rig.scheduler.submit(request, Time(0)).unwrap();
        }
        let max_pause = config.max_num_seqs + 4;
        let (mut oldest, mut num_paused) = (RequestId(0), 0);
        while rig.scheduler.has_work() && rig.ended.len() < 30 {
            let rows = rig.step();
            let first = (0..30).map(RequestId).find(|id| !rig.ended.contains(id)).unwrap_or(RequestId(30));
            num_paused = if first != oldest || rows.contains(&oldest) { 0 } else { num_paused + 1 };
            oldest = first;
            prop_assert!(num_paused <= max_pause, "{:?} pauses for {} steps", oldest, num_paused);
        }
    }
}

/// A scheduler whose device yields token 1 wherever one is due.
struct Rig {
    scheduler: Scheduler,
    depth: usize,
    in_flight: VecDeque<StepPlan>,
    rows: Vec<RequestId>,
    output: StepOutput,
    ended: Vec<RequestId>,
    num_preempted: u32,
    num_steps: u64,
}

impl Rig {
    fn new(config: SchedulerConfig, depth: usize) -> Self {
        Self {
            rows: vec![RequestId(u64::MAX); config.max_num_seqs as usize],
            scheduler: Scheduler::new(config).unwrap(),
            depth,
            in_flight: VecDeque::new(),
            output: StepOutput::default(),
            ended: Vec::new(),
            num_preempted: 0,
            num_steps: 0,
        }
    }

    /// Plans one step and applies the one that is due; returns who was planned.
    fn step(&mut self) -> Vec<RequestId> {
        let now = Time(self.num_steps * 1000);
        let plan = self.scheduler.plan(now);
        for admission in &plan.admitted {
            self.rows[admission.row.0 as usize] = admission.request.id;
        }
        let planned = plan.sequences.iter().map(|sequence| self.rows[sequence.row.0 as usize]).collect();
        self.in_flight.push_back(plan);
        if self.in_flight.len() > self.depth {
            self.apply();
        }
        self.num_steps += 1;
        self.take_events();
        planned
    }

    fn apply(&mut self) {
        let Some(plan) = self.in_flight.pop_front() else { return };
        self.output.reset(plan.step_id);
        for sequence in &plan.sequences {
            self.output.push_computed(sequence.num_scheduled_tokens, if sequence.samples { &[1] } else { &[] });
        }
        self.scheduler.apply(plan, &mut self.output, Time(self.num_steps * 1000));
    }

    fn take_events(&mut self) -> Vec<FinishReason> {
        let mut events = Vec::new();
        self.scheduler.drain_events(&mut events);
        let mut reasons = Vec::new();
        for event in events {
            match event.kind {
                EventKind::Finished { reason, .. } => {
                    self.ended.push(event.request);
                    reasons.push(reason);
                }
                EventKind::Preempted => self.num_preempted += 1,
                _ => {}
            }
        }
        reasons
    }
}

/// 2,000 times: a few requests get somewhere, all are cancelled, and with the plans that were in flight all blocks come
/// back.
#[test]
fn cancelling_in_every_state_frees_all_blocks_at_the_step_boundary() {
    let mut num_seen = [0; 4];
    for depth in [0, 1] {
        let config = SchedulerConfig {
            max_num_seqs: 4,
            max_num_batched_tokens: 16,
            max_model_len: 64,
            block_size: 4,
            kv_groups: vec![
                KvGroup { kind: KvGroupKind::Full, num_blocks: 18 },
                KvGroup { kind: KvGroupKind::SlidingWindow { window: 9 }, num_blocks: 20 },
            ],
            ..SchedulerConfig::default()
        };
        let mut rig = Rig::new(config, depth);
        let mut rng = Rng::new(depth as u64);
        let mut next_id = 0;
        for round in 0..1_000 {
            let mut ids = Vec::new();
            let mut num_choices = 0;
            for _ in 0..1 + rng.below(4) {
                let prompt: Vec<u32> = (0..1 + rng.below(30)).map(|_| rng.below(2)).collect();
                let sampling = SamplingParams { num_choices: 1 + rng.below(3), ..SamplingParams::default() };
                num_choices += sampling.num_choices as usize;
                let request = Request { sampling, ..request(next_id, &prompt, 34) };
                ids.push(request.id);
                rig.scheduler.submit(request, Time(0)).unwrap();
                next_id += 1;
                for _ in 0..rng.below(8) {
                    rig.step();
                }
            }
            let stats = rig.scheduler.stats();
            num_seen[0] += u32::from(stats.num_waiting > 0);
            num_seen[1] += u32::from(stats.num_running > 0);
            num_seen[2] += u32::from(!rig.in_flight.is_empty());
            while !ids.is_empty() {
                let id = ids.swap_remove(rng.below(ids.len() as u32) as usize);
                let was_alive = rig.ended.iter().filter(|&&ended| ended == id).count() == 0;
                assert!(rig.scheduler.abort(id) || !was_alive || rig.depth == 1);
                assert!(!rig.scheduler.abort(id));
            }
            while !rig.in_flight.is_empty() {
                rig.apply();
            }
            rig.take_events();
            let stats = rig.scheduler.stats();
            for blocks in stats.kv_groups() {
                assert_eq!(
                    (blocks.num_used, blocks.num_free + blocks.num_cached),
                    (0, blocks.num_total),
                    "round {round}"
                );
            }
            assert_eq!((stats.num_waiting, stats.num_running, rig.scheduler.has_work()), (0, 0, false));
            assert_eq!(rig.ended.len(), num_choices, "each choice ends once");
            rig.scheduler.check_invariants();
            rig.ended.clear();
        }
        num_seen[3] += rig.num_preempted;
    }
    assert!(num_seen.iter().all(|&count| count > 100), "{num_seen:?}");
}
