//! Plain numbers about a scheduler, for whoever watches. Their names as metrics are given elsewhere.

use crate::config::MAX_KV_GROUPS;
use crate::pace::QueuePace;

/// Blocks of one KV group by state; `num_used + num_cached + num_free = num_total`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockStats {
    /// All blocks.
    pub num_total: u32,
    /// Held by a sequence.
    pub num_used: u32,
    /// Held by nobody, but their content may be hit; given away when no free block is left.
    pub num_cached: u32,
    /// Held by nobody, without content worth keeping.
    pub num_free: u32,
}

/// State and counters of a [`crate::Scheduler`]; the counters count from its making.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Sequences that wait: new, preempted, or until another choice has computed their prompt.
    pub num_waiting: u32,
    /// Sequences that have a row.
    pub num_running: u32,
    /// Tokens that the waiting sequences bring.
    pub waiting_tokens: u64,
    /// How fast they leave the queue, by what was measured of late.
    pub queue_pace: QueuePace,
    /// Tenants with a live sequence.
    pub num_tenants: u32,
    /// Blocks per KV group; see [`SchedulerStats::kv_groups`].
    pub blocks: [BlockStats; MAX_KV_GROUPS],
    /// How many entries of `blocks` are groups.
    pub num_kv_groups: u32,
    /// Counter: plans made.
    pub num_steps: u64,
    /// Counter: tokens in all plans.
    pub num_scheduled_tokens: u64,
    /// Counter: tokens that were generated and reported.
    pub num_generated_tokens: u64,
    /// Counter: times that a running sequence was put back.
    pub num_preemptions: u64,
    /// Counter: tokens looked up in the prefix cache, and how many of them were found.
    pub prefix_query_tokens: u64,
    /// Counter: see `prefix_query_tokens`.
    pub prefix_hit_tokens: u64,
}

impl SchedulerStats {
    /// Blocks of each KV group, in the order of the configuration.
    #[must_use]
    pub fn kv_groups(&self) -> &[BlockStats] {
        &self.blocks[..self.num_kv_groups as usize]
    }
}
