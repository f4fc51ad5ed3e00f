//! How much KV cache there is: blocks per group, and the length that they allow.

use quire_kernels::{DType, KvLayout};
use quire_scheduler::{KvGroup, KvGroupKind, SchedulerConfig};

use crate::config::SchedulerSettings;
use crate::error::EngineError;
use crate::models::config::ModelConfig;

/// Most of the free memory that the cache takes where nobody says how much, in percent.
const FREE_MEMORY_PERCENT: u64 = 60;
/// The cache is as large as the weights where nobody says how much, and at least this: clearing more of it before the
/// server is ready would take longer than loading the model.
const MIN_DEFAULT_BYTES: u64 = 64 << 20;
/// Slots are `u32` on the device.
const MAX_SLOTS: u64 = 1 << 31;

/// How many bytes the cache may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Budget {
    /// As configured: all of it.
    Exact(u64),
    /// As much as the weights take, or one sequence of the longest length where that is more; within a share of what is
    /// free, and no more than the configured sequences can use.
    Default { free: u64, weights: u64 },
    /// So many bytes, or what the configured sequences can use where that is less.
    UpTo(u64),
}

/// The cache as it will be allocated.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct KvPlan {
    pub max_model_len: u32,
    pub groups: Vec<KvGroup>,
    /// One per group.
    pub layouts: Vec<KvLayout>,
    /// The window of each group.
    pub windows: Vec<Option<u32>>,
}

impl KvPlan {
    /// Plans the cache of `config`, stored as `dtype`.
    pub(crate) fn new(
        config: &ModelConfig,
        dtype: DType,
        settings: &SchedulerSettings,
        budget: Budget,
    ) -> Result<Self, EngineError> {
        let block_size = settings.block_size;
        if block_size == 0 || !block_size.is_multiple_of(16) || block_size > 1024 {
            return Err(config_error(
                "scheduler.block_size",
                format!("{block_size} is not a multiple of 16 up to 1024"),
            ));
        }
        let wanted = wanted_model_len(config, settings)?;
        let windows = config.kv_groups();
        let shape = config.attention_shape();
        let layout_of = |window: &Option<u32>, num_blocks: usize| KvLayout {
            num_layers: config.facts.windows.iter().filter(|layer| *layer == window).count(),
            num_blocks,
            block_size: block_size as usize,
            num_kv_heads: shape.num_kv_heads,
            head_dim: shape.head_dim,
            dtype,
        };
        let block_bytes: u64 = windows.iter().map(|window| layout_of(window, 1).block_bytes() as u64).sum();

        // What one sequence of `len` tokens needs in the group that needs the most. All groups get as many blocks.
        let kinds: Vec<KvGroupKind> = windows
            .iter()
            .map(|window| window.map_or(KvGroupKind::Full, |window| KvGroupKind::SlidingWindow { window }))
            .collect();
        let blocks_for = |len: u32| {
            let sizes = SchedulerConfig {
                max_model_len: len,
                block_size,
                max_num_batched_tokens: settings.max_num_batched_tokens,
                ..SchedulerConfig::default()
            };
            kinds.iter().map(|kind| sizes.min_num_blocks(*kind)).max().expect("a model has layers")
        };
        let useful = u64::from(settings.max_num_seqs) * u64::from(blocks_for(wanted));
        let (bytes, most_blocks) = match budget {
            Budget::Exact(bytes) => (bytes, u64::MAX),
            Budget::UpTo(bytes) => (bytes, useful),
            Budget::Default { free, weights } => {
                let longest = u64::from(blocks_for(wanted));
                let plenty = weights.max(MIN_DEFAULT_BYTES).max(longest.saturating_mul(block_bytes));
                (plenty.min(free / 100 * FREE_MEMORY_PERCENT), useful)
            }
        };
        let limit = most_blocks.min(MAX_SLOTS / u64::from(block_size));
        let num_blocks = (bytes / block_bytes).min(limit) as u32;

        let room = num_blocks.saturating_mul(block_size);
        let max_model_len = match settings.max_model_len {
            _ if num_blocks >= blocks_for(wanted) => wanted,
            0 if room >= 2 => wanted.min(room),
            _ => {
                let needed = u64::from(if settings.max_model_len == 0 { 1 } else { blocks_for(wanted) });
                let why = format!(
                    "{bytes} bytes are {num_blocks} blocks of {block_bytes} bytes ({block_size} tokens each); one sequence \
                     of max_model_len {wanted} needs {needed} blocks, which are {} bytes",
                    needed * block_bytes
                );
                return Err(config_error("engine.kv_cache_memory", why));
            }
        };
        Ok(Self {
            max_model_len,
            groups: kinds.into_iter().map(|kind| KvGroup { kind, num_blocks }).collect(),
            layouts: windows.iter().map(|window| layout_of(window, num_blocks as usize)).collect(),
            windows,
        })
    }

    pub(crate) fn total_bytes(&self) -> u64 {
        self.layouts.iter().map(|layout| layout.total_bytes() as u64).sum()
    }
}

/// The length that is served if memory allows: the configured one, or the model's own.
pub(crate) fn wanted_model_len(config: &ModelConfig, settings: &SchedulerSettings) -> Result<u32, EngineError> {
    let longest = config.rope.max_len;
    match settings.max_model_len {
        0 => Ok(longest),
        len if len <= longest => Ok(len),
        len => {
            let why = format!("{len} is more than the model's own {longest}");
            Err(config_error("scheduler.max_model_len", why))
        }
    }
}

fn config_error(field: &str, why: String) -> EngineError {
    EngineError::Config { field: field.to_owned(), why }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &str = r#"{"architectures":["MistralForCausalLM"],"hidden_size":64,"intermediate_size":96,
        "num_hidden_layers":3,"num_attention_heads":4,"num_key_value_heads":2,"vocab_size":160,
        "max_position_embeddings":256,"sliding_window":24,
        "layer_types":["full_attention","sliding_attention","full_attention"]}"#;
    /// Of one block of all three layers, in f32: K and V of 2 heads, 16 tokens, 16 dimensions.
    const BLOCK_BYTES: u64 = 3 * 2 * 2 * 16 * 16 * 4;

    fn plan(max_model_len: u32, budget: Budget) -> Result<KvPlan, EngineError> {
        plan_of(DType::F32, max_model_len, budget)
    }

    fn plan_of(dtype: DType, max_model_len: u32, budget: Budget) -> Result<KvPlan, EngineError> {
        let mut config = ModelConfig::parse(JSON.as_bytes()).unwrap();
        let settings = SchedulerSettings {
            max_num_seqs: 4,
            max_num_batched_tokens: 16,
            max_model_len,
            ..SchedulerSettings::default()
        };
        config.drop_long_windows(wanted_model_len(&config, &settings)?);
        KvPlan::new(&config, dtype, &settings, budget)
    }

    #[test]
    fn layers_of_one_kind_share_a_group() {
        let plan = plan(0, Budget::Exact(40 * BLOCK_BYTES + 5)).unwrap();
        assert_eq!(plan.windows, [None, Some(24)]);
        assert_eq!(plan.layouts.iter().map(|layout| layout.num_layers).collect::<Vec<_>>(), [2, 1]);
        assert_eq!(plan.groups.iter().map(|group| group.num_blocks).collect::<Vec<_>>(), [40, 40]);
        assert_eq!(plan.total_bytes(), 40 * BLOCK_BYTES);
        assert_eq!(plan.max_model_len, 256);
    }

    #[test]
    fn a_quantized_cache_holds_scales_too() {
        // K and V of 2 heads, 16 tokens: 16 bytes and a scale of 4 each, where f32 takes 64.
        let plan = plan_of(DType::I8, 0, Budget::Exact(40 * BLOCK_BYTES)).unwrap();
        assert_eq!(plan.groups[0].num_blocks, 40 * 64 / 20);
        assert_eq!(plan.total_bytes(), 40 * BLOCK_BYTES);
    }

    #[test]
    fn a_window_as_long_as_the_model_is_none() {
        let plan = plan(24, Budget::Exact(40 * BLOCK_BYTES)).unwrap();
        assert_eq!(plan.windows, [None]);
    }

    #[test]
    fn the_length_shrinks_to_what_has_room() {
        assert_eq!(plan(0, Budget::Exact(10 * BLOCK_BYTES)).unwrap().max_model_len, 160);
        assert_eq!(plan(100, Budget::Exact(10 * BLOCK_BYTES)).unwrap().max_model_len, 100);
    }

    #[test]
    fn a_share_is_capped_by_what_the_sequences_can_use() {
        let plan_of = |free, weights| plan(0, Budget::Default { free, weights }).unwrap().groups[0].num_blocks;
        assert_eq!(plan_of(1 << 40, 1 << 40), 4 * 16);
        assert_eq!(u64::from(plan_of(100 * BLOCK_BYTES, 1 << 40)), FREE_MEMORY_PERCENT);
    }

    #[test]
    fn the_default_follows_the_weights_and_holds_the_longest_sequence() {
        let blocks_of = |max_num_seqs, weights| {
            let config = ModelConfig::parse(
                JSON.replace("\"max_position_embeddings\":256", "\"max_position_embeddings\":32768").as_bytes(),
            )
            .unwrap();
            let settings = SchedulerSettings { max_num_seqs, ..SchedulerSettings::default() };
            let budget = Budget::Default { free: 1 << 40, weights };
            u64::from(KvPlan::new(&config, DType::F32, &settings, budget).unwrap().groups[0].num_blocks)
        };
        assert_eq!(blocks_of(64, 100 << 20), (100 << 20) / BLOCK_BYTES);
        assert_eq!(blocks_of(64, 1 << 20), MIN_DEFAULT_BYTES / BLOCK_BYTES);
        let longest = 32768 / 16;
        assert_eq!(blocks_of(1, 100 << 20), longest);
    }

    #[test]
    fn numbers_say_why_nothing_fits() {
        let error = plan(200, Budget::Exact(10 * BLOCK_BYTES)).unwrap_err().to_string();
        assert!(error.contains("10 blocks") && error.contains("needs 13 blocks"), "{error}");
        let error = plan(0, Budget::Exact(1000)).unwrap_err().to_string();
        assert!(error.contains("0 blocks"), "{error}");
        let error = plan(257, Budget::Exact(1 << 30)).unwrap_err().to_string();
        assert!(error.contains("max_model_len") && error.contains("256"), "{error}");
    }
}
