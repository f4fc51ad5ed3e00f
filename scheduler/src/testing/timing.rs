//! How long plan and apply take, by a clock that the caller brings.

use super::request;
use crate::{KvGroup, KvGroupKind, Scheduler, SchedulerConfig, StepOutput, StepPlan, Time};

/// What to time: sequences that only decode, all in every step.
#[derive(Clone, Copy, Debug)]
pub struct TimingOptions {
    /// Running sequences.
    pub num_seqs: u32,
    /// Steps to time.
    pub num_steps: u32,
    /// Of each sequence, in tokens.
    pub prompt_len: u32,
    /// Steps in flight while the next one is planned: 0 or 1.
    pub depth: u32,
    /// Publish full blocks, which hashes them.
    pub enable_prefix_cache: bool,
}

impl Default for TimingOptions {
    fn default() -> Self {
        Self { num_seqs: 256, num_steps: 1000, prompt_len: 512, depth: 1, enable_prefix_cache: true }
    }
}

/// Nanoseconds of one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTiming {
    /// `Scheduler::plan`.
    pub plan_nanos: u64,
    /// `Scheduler::apply` and `Scheduler::drain_events`.
    pub apply_nanos: u64,
}

/// Times decode steps of sequences that run on and on. `clock` returns nanoseconds since any origin; it is read three
/// times a step.
///
/// The device's part is left out: outputs are one fixed token for each sequence. Prompts differ in length, so that
/// every step has its share of sequences that fill a block.
pub fn time_decode_steps(options: &TimingOptions, clock: &mut dyn FnMut() -> u64) -> Vec<StepTiming> {
    let block_size = 16;
    let warm_up = 64;
    let max_tokens = options.num_steps + warm_up + 8;
    let max_model_len = options.prompt_len + block_size + max_tokens;
    let config = SchedulerConfig {
        max_num_seqs: options.num_seqs,
        max_num_batched_tokens: options.num_seqs + 8192,
        max_model_len,
        block_size,
        kv_groups: vec![KvGroup {
            kind: KvGroupKind::Full,
            num_blocks: options.num_seqs * (max_model_len / block_size + 2),
        }],
        enable_prefix_cache: options.enable_prefix_cache,
        max_waiting_tokens: u64::from(max_model_len) * u64::from(options.num_seqs),
        ..SchedulerConfig::default()
    };
    let mut scheduler = Scheduler::new(config).expect("the configuration works");
    for id in 0..options.num_seqs {
        let len = options.prompt_len.max(1) + id % block_size;
        let prompt: Vec<u32> = (0..len).map(|position| id * 31 + position).collect();
        scheduler.submit(request(u64::from(id), &prompt, max_tokens), Time(0)).expect("there is room");
    }
    let mut timings = Vec::with_capacity(options.num_steps as usize);
    let mut events = Vec::new();
    let mut in_flight: Option<StepPlan> = None;
    let mut output = StepOutput::default();
    let mut num_warm = 0;
    while (timings.len() as u32) < options.num_steps {
        let start = clock();
        let plan = scheduler.plan(Time(0));
        let planned = clock();
        let is_full = plan.num_decodes() as u32 == options.num_seqs;
        let Some(plan) = (if options.depth == 0 { Some(plan) } else { in_flight.replace(plan) }) else { continue };
        compute(&plan, &mut output);
        let computed = clock();
        scheduler.apply(plan, &mut output, Time(0));
        events.clear();
        scheduler.drain_events(&mut events);
        let end = clock();
        num_warm += u32::from(is_full);
        if num_warm > warm_up / 2 {
            timings.push(StepTiming { plan_nanos: planned - start, apply_nanos: end - computed });
        }
    }
    if let Some(plan) = in_flight {
        compute(&plan, &mut output);
        scheduler.apply(plan, &mut output, Time(0));
    }
    timings
}

/// All ranges computed, one token wherever one is due.
fn compute(plan: &StepPlan, output: &mut StepOutput) {
    output.reset(plan.step_id);
    for sequence in &plan.sequences {
        let tokens: &[u32] = if sequence.samples { &[7] } else { &[] };
        output.push_computed(sequence.num_scheduled_tokens, tokens);
    }
}
