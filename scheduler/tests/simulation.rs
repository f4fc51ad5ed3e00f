//! Seeded runs of a scheduler on a fake device whose every output is known beforehand.

use quire_scheduler::testing::{
    BlockOperation, FaultRates, RequestMix, Rng, Sabotage, Simulation, compare_blocks, simulate,
};
use quire_scheduler::{KvGroup, KvGroupKind, Policy, SchedulerConfig};

/// Steps that `cargo test` plays, over all configurations; a few seconds in an optimised build.
const NUM_STEPS: u64 = 60_000;

/// A server so small that everything runs short.
fn small(kinds: &[KvGroupKind], num_blocks: u32) -> SchedulerConfig {
    SchedulerConfig {
        max_num_seqs: 8,
        max_num_batched_tokens: 48,
        max_model_len: 128,
        block_size: 4,
        kv_groups: kinds.iter().map(|&kind| KvGroup { kind, num_blocks }).collect(),
        max_waiting_tokens: 1000,
        ..SchedulerConfig::default()
    }
}

fn configurations() -> Vec<SchedulerConfig> {
    let window = |window| KvGroupKind::SlidingWindow { window };
    let full = small(&[KvGroupKind::Full], 48);
    vec![
        full.clone(),
        SchedulerConfig { enable_prefix_cache: false, ..full.clone() },
        SchedulerConfig { policy: Policy::Fcfs, block_size: 16, ..full.clone() },
        SchedulerConfig { max_num_batched_tokens: 8, max_waiting_micros: Some(50_000), ..full },
        small(&[KvGroupKind::Full, window(10)], 48),
        small(&[window(1), KvGroupKind::Full, window(33)], 64),
        SchedulerConfig { enable_prefix_cache: false, max_num_batched_tokens: 16, ..small(&[window(7)], 24) },
        SchedulerConfig { block_size: 1, ..small(&[KvGroupKind::Full, window(5)], 160) },
    ]
}

#[test]
fn every_output_is_the_expected_one_whatever_happens() {
    let faults = FaultRates { several_tokens: 30, taken_back: 30, non_finite: 5 };
    let mut num_steps = 0;
    let mut num_preemptions = 0;
    let mut seed = 0;
    while num_steps < NUM_STEPS {
        for scheduler in configurations() {
            for depth in [0, 1] {
                for fault_rates in [FaultRates::default(), faults] {
                    let simulation = Simulation { depth, fault_rates, ..Simulation::new(scheduler.clone(), seed) };
                    let report = simulate(&simulation);
                    num_steps += report.num_steps;
                    num_preemptions += report.num_preemptions;
                    seed += 1;
                }
            }
        }
    }
    assert!(num_preemptions > num_steps / 200, "{num_preemptions} preemptions in {num_steps} steps");
}

#[test]
fn equal_seeds_give_equal_plans_and_others_do_not() {
    for scheduler in configurations() {
        let simulation = Simulation::new(scheduler, 7);
        let report = simulate(&simulation);
        assert_eq!(report, simulate(&simulation));
        assert_ne!(report.digest, simulate(&Simulation { seed: 8, ..simulation }).digest);
    }
}

/// Chunk size, prefix cache, depth, preemption and batch change when tokens are computed, never which.
#[test]
fn outputs_do_not_depend_on_how_they_were_scheduled() {
    let mix = RequestMix { deadline_per_mille: 0, ..RequestMix::default() };
    let plain = SchedulerConfig { max_waiting_tokens: 1 << 30, ..small(&[KvGroupKind::Full], 4096) };
    let reference = Simulation { mix, aborts_per_mille: 0, ..Simulation::new(plain.clone(), 3) };
    let expected = simulate(&reference);
    assert_eq!((expected.num_refused, expected.num_preemptions), (0, 0));
    let tight = SchedulerConfig { kv_groups: small(&[KvGroupKind::Full], 40).kv_groups, ..plain.clone() };
    let variants = [
        SchedulerConfig { enable_prefix_cache: false, ..plain.clone() },
        SchedulerConfig { max_num_batched_tokens: 8, ..plain.clone() },
        SchedulerConfig { max_num_batched_tokens: 4096, max_num_seqs: 64, ..plain.clone() },
        SchedulerConfig { max_num_seqs: 1, ..plain.clone() },
        SchedulerConfig { block_size: 1, ..plain.clone() },
        tight.clone(),
        SchedulerConfig { enable_prefix_cache: false, ..tight },
    ];
    let mut num_preemptions = 0;
    for scheduler in variants {
        for depth in [0, 1] {
            let report = simulate(&Simulation { scheduler: scheduler.clone(), depth, ..reference.clone() });
            assert_eq!(report.outcomes, expected.outcomes, "depth {depth}, {scheduler:?}");
            num_preemptions += report.num_preemptions;
        }
    }
    assert!(num_preemptions > 0);
}

#[test]
fn the_prefix_cache_saves_work() {
    let plain = SchedulerConfig { max_waiting_tokens: 1 << 30, ..small(&[KvGroupKind::Full], 256) };
    let with = simulate(&Simulation::new(plain.clone(), 5));
    let without = simulate(&Simulation::new(SchedulerConfig { enable_prefix_cache: false, ..plain }, 5));
    assert!(with.prefix_hit_tokens > 1000, "{with:?}");
    assert!(with.num_scheduled_tokens + 1000 < without.num_scheduled_tokens);
    assert_eq!(without.prefix_hit_tokens, 0);
}

#[test]
fn the_block_bookkeeping_does_what_its_naive_twin_does() {
    let mut rng = Rng::new(11);
    for num_blocks in [1, 2, 7, 32, 100] {
        let num_hashes = 1 + rng.below(2 * num_blocks);
        let operations = (0..20_000).map(|_| BlockOperation::random(&mut rng, num_hashes));
        compare_blocks(num_blocks, operations).unwrap();
    }
}

fn sabotaged(sabotage: Sabotage, aborts_per_mille: u32) {
    let scheduler = small(&[KvGroupKind::Full], 48);
    simulate(&Simulation { sabotage, aborts_per_mille, ..Simulation::new(scheduler, 1) });
}

// The checks above are worth something only if they fail when something is wrong.

#[test]
#[should_panic(expected = "and nothing runs")]
fn a_lost_end_is_noticed() {
    sabotaged(Sabotage::LoseEnd, 0);
}

#[test]
#[should_panic(expected = "aborted and still alive")]
fn a_leaked_request_is_noticed() {
    sabotaged(Sabotage::LeakRequest, 300);
}

#[test]
#[should_panic(expected = "holds something else")]
fn a_corrupt_cache_is_noticed() {
    sabotaged(Sabotage::CorruptCache, 0);
}
