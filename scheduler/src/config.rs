//! Budgets and policy of the scheduler.

use crate::ConfigError;
use crate::block::num_blocks_for;

/// Most KV groups a model may have: one per kind of layer.
pub const MAX_KV_GROUPS: usize = 4;

/// Layers that share one layout of blocks and one table per sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvGroupKind {
    /// Every token sees all tokens before it: blocks are kept as long as the sequence runs.
    Full,
    /// A token at position p sees p - window + 1 to p: blocks that fell out of every window are given back early.
    SlidingWindow {
        /// Tokens that a token sees, itself counted; at least 1.
        window: u32,
    },
}

/// One KV group: its kind and how many physical blocks it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvGroup {
    /// What a token of these layers sees.
    pub kind: KvGroupKind,
    /// Physical blocks that the device reserved for the group.
    pub num_blocks: u32,
}

/// Which waiting request is next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Order of arrival within each tenant; `priority` is ignored.
    Fcfs,
    /// Lower `priority` first, then order of arrival, within each tenant: tenants take turns whatever priorities they give.
    #[default]
    Priority,
}

/// Budgets and policy. [`SchedulerConfig::validate`] says what the limits are.
#[derive(Clone, Debug, PartialEq)]
pub struct SchedulerConfig {
    /// Most sequences in a step, and rows of the device's tables. More rows raise throughput until a step's time
    /// grows with them.
    pub max_num_seqs: u32,
    /// Most tokens in a step. It bounds how long a prompt's chunk delays the decodes beside it; at least
    /// `max_num_seqs`, so that every running sequence can decode.
    pub max_num_batched_tokens: u32,
    /// Most tokens of prompt and output together.
    pub max_model_len: u32,
    /// Tokens in a block.
    pub block_size: u32,
    /// One to [`MAX_KV_GROUPS`]; each with room for one sequence of `max_model_len`
    /// ([`SchedulerConfig::min_num_blocks`]).
    pub kv_groups: Vec<KvGroup>,
    /// Reuse blocks of equal prefixes.
    pub enable_prefix_cache: bool,
    /// Keep the tokens of cached blocks, so that what the prefix cache holds can be told
    /// ([`Scheduler::start_kv_events`](crate::Scheduler::start_kv_events)).
    pub kv_events: bool,
    /// Most prompt tokens waiting; past that `submit` refuses. While one tenant fills the queue, the others are still
    /// taken up to their equal share of this number; at twice this number nobody is. At least `max_model_len`.
    pub max_waiting_tokens: u64,
    /// Longest predicted wait in the queue, in microseconds; past that `submit` refuses. `None` is no bound.
    pub max_waiting_micros: Option<u64>,
    /// Which waiting request is next.
    pub policy: Policy,
}

impl Default for SchedulerConfig {
    /// A small server: 256 sequences, 2,048 tokens a step, 4,096 blocks of 16 tokens in one full-attention group.
    fn default() -> Self {
        Self {
            max_num_seqs: 256,
            max_num_batched_tokens: 2048,
            max_model_len: 8192,
            block_size: 16,
            kv_groups: vec![KvGroup { kind: KvGroupKind::Full, num_blocks: 4096 }],
            enable_prefix_cache: true,
            kv_events: false,
            max_waiting_tokens: 1 << 20,
            max_waiting_micros: None,
            policy: Policy::Priority,
        }
    }
}

impl SchedulerConfig {
    /// Fails with the first setting that cannot work.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let fail = |field, why: &str| Err(ConfigError { field, why: why.to_owned() });
        if self.max_num_seqs == 0 || self.max_num_seqs > 1 << 20 {
            return fail("max_num_seqs", "must be 1 to 1048576");
        }
        if self.max_num_batched_tokens < self.max_num_seqs {
            return fail("max_num_batched_tokens", "must be at least max_num_seqs, so that every sequence can decode");
        }
        if self.max_model_len < 2 || self.max_model_len > 1 << 30 {
            return fail("max_model_len", "must be 2 to 2^30: one token of prompt and one of output at least");
        }
        if self.block_size == 0 || self.block_size > 1 << 16 {
            return fail("block_size", "must be 1 to 65536");
        }
        if self.kv_groups.is_empty() || self.kv_groups.len() > MAX_KV_GROUPS {
            return fail("kv_groups", &format!("there must be 1 to {MAX_KV_GROUPS}"));
        }
        if self.max_waiting_tokens < u64::from(self.max_model_len) {
            return fail("max_waiting_tokens", "must be at least max_model_len, or a long prompt could never wait");
        }
        for group in &self.kv_groups {
            if group.kind == (KvGroupKind::SlidingWindow { window: 0 }) {
                return fail("kv_groups", "a window must hold one token at least");
            }
            if group.num_blocks > 1 << 30 {
                return fail("kv_groups", "a group may have 2^30 blocks at most");
            }
            let min = self.min_num_blocks(group.kind);
            if group.num_blocks < min {
                let why = format!("{} blocks cannot hold one sequence of max_model_len: {min} can", group.num_blocks);
                return fail("kv_groups", &why);
            }
        }
        Ok(())
    }

    /// Blocks with which one sequence of `max_model_len` can always run alone in a group of this kind.
    #[must_use]
    pub fn min_num_blocks(&self, kind: KvGroupKind) -> u32 {
        self.max_live_blocks(kind).min(num_blocks_for(self.max_model_len, self.block_size))
    }

    /// Blocks of a group that one sequence holds at most at any time, however long it is.
    ///
    /// In a sliding window: the window before the oldest step in flight, the chunks of two steps, and three blocks: for
    /// a start inside a block, for giving back at block boundaries only, and for forks (see `KvGroups::slide`).
    pub(crate) fn max_live_blocks(&self, kind: KvGroupKind) -> u32 {
        match kind {
            KvGroupKind::Full => u32::MAX,
            KvGroupKind::SlidingWindow { window } => {
                let block_size = u64::from(self.block_size);
                let span = u64::from(window) + 2 * u64::from(self.max_num_batched_tokens) + 3 * block_size;
                u32::try_from(span.div_ceil(block_size)).unwrap_or(u32::MAX)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_works() {
        SchedulerConfig::default().validate().unwrap();
    }

    #[test]
    fn settings_that_cannot_work_are_named() {
        type Change = fn(&mut SchedulerConfig);
        let cases: [(&str, Change); 11] = [
            ("max_num_seqs", |c| c.max_num_seqs = 0),
            ("max_num_batched_tokens", |c| c.max_num_batched_tokens = 255),
            ("max_model_len", |c| c.max_model_len = 1),
            ("max_model_len", |c| c.max_model_len = u32::MAX),
            ("block_size", |c| c.block_size = 0),
            ("kv_groups", |c| c.kv_groups.clear()),
            ("kv_groups", |c| c.kv_groups = vec![c.kv_groups[0]; 5]),
            ("kv_groups", |c| c.kv_groups[0].num_blocks = 511),
            ("kv_groups", |c| c.kv_groups[0].num_blocks = u32::MAX),
            ("kv_groups", |c| c.kv_groups[0].kind = KvGroupKind::SlidingWindow { window: 0 }),
            ("max_waiting_tokens", |c| c.max_waiting_tokens = 8191),
        ];
        for (field, change) in cases {
            let mut config = SchedulerConfig::default();
            change(&mut config);
            assert_eq!(config.validate().unwrap_err().field, field);
        }
    }

    #[test]
    fn a_window_needs_fewer_blocks_than_the_model_is_long() {
        let config = SchedulerConfig { max_model_len: 1 << 20, ..SchedulerConfig::default() };
        assert_eq!(config.min_num_blocks(KvGroupKind::Full), 1 << 16);
        assert_eq!(config.min_num_blocks(KvGroupKind::SlidingWindow { window: 1024 }), 64 + 256 + 3);
    }
}
