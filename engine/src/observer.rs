//! What the engine tells whoever watches: plain numbers, once per step. Names and units of metrics are the router's.

use std::time::Duration;

use quire_scheduler::SchedulerStats;

/// One step, after it was applied.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Sequences that decoded one token, and prompt tokens computed, in this step.
    pub num_decodes: u32,
    pub num_prefill_tokens: u32,
    pub num_sampled_tokens: u32,
    /// Making the plan; computing; applying the result and publishing events.
    pub plan: Duration,
    pub execute: Duration,
    pub apply: Duration,
    pub stats: SchedulerStats,
}

/// Receives reports on the engine's thread; must return quickly and never block.
pub trait StepObserver: Send + 'static {
    /// After each step.
    fn step(&mut self, report: &StepReport);
    /// A cancelled request's blocks are free, so long after the cancellation was asked for.
    fn cancel_to_free(&mut self, elapsed: Duration);
    /// The engine stops because its device failed or something in it broke; all its requests fail. Called once, last.
    fn failed(&mut self, cause: &str) {
        let _ = cause;
    }
}
