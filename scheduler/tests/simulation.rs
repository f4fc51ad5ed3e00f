//! Seeded runs of a scheduler on a fake device.

use quire_scheduler::testing::{Simulation, simulate};
use quire_scheduler::{KvGroup, KvGroupKind, SchedulerConfig};

#[test]
fn smoke() {
    for seed in 0..50 {
        for depth in [0, 1] {
            let config = SchedulerConfig {
                max_num_seqs: 8,
                max_num_batched_tokens: 64,
                max_model_len: 128,
                block_size: 4,
                kv_groups: vec![KvGroup { kind: KvGroupKind::Full, num_blocks: 64 }],
                max_waiting_tokens: 2000,
                ..SchedulerConfig::default()
            };
            let report = simulate(&Simulation { depth, ..Simulation::new(config, seed) });
            println!(
                "{seed} {depth}: steps {} refused {} preemptions {} hits {} scheduled {}",
                report.num_steps,
                report.num_refused,
                report.num_preemptions,
                report.prefix_hit_tokens,
                report.num_scheduled_tokens
            );
        }
    }
}
