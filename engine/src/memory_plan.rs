//! What models will take of the host's memory, known from their files' headers before any of them is loaded.

use quire_kernels::cpu::{CpuBackend, CpuConfig};
use quire_kernels::{Backend, DType};

use crate::config::{EngineConfig, SchedulerSettings};
use crate::error::EngineError;
use crate::kv_cache::{Budget, KvPlan, wanted_model_len};
use crate::memory;
use crate::model_executor::{dtype, kv_dtype};
use crate::model_files::ModelFiles;
use crate::models::decoder::{Decoder, EMBEDDING};
use crate::models::loader::WeightChoice;
use crate::pooling::{self, ModelKind};
use crate::source::ModelSource;

/// Bytes that a model takes at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryNeed {
    pub weight_bytes: u64,
    /// The KV cache: as configured, or one sequence of the longest length and 64 MiB.
    pub cache_bytes: u64,
    /// Buffers of a step.
    pub working_bytes: u64,
}

impl MemoryNeed {
    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        self.weight_bytes + self.cache_bytes + self.working_bytes
    }
}

/// Bytes that this process could still take.
pub fn free_memory() -> u64 {
    memory::free_memory()
}

/// What a model will take of the host's memory, computed on the CPU. Fails as [`crate::start`] would with its files.
pub fn memory_need(
    source: &ModelSource,
    engine: &EngineConfig,
    settings: &SchedulerSettings,
) -> Result<MemoryNeed, EngineError> {
    let backend = CpuBackend::new(CpuConfig { num_threads: 1, isa: None })?;
    match pooling::kind_of(source)? {
        ModelKind::Pools => {
            let (weight_bytes, working_bytes) = pooling::expected_bytes(&backend, source, engine, settings)?;
            Ok(MemoryNeed { weight_bytes, cache_bytes: 0, working_bytes })
        }
        ModelKind::Generates => of_generator(&backend, source, engine, settings),
    }
}

fn of_generator(
    backend: &CpuBackend,
    source: &ModelSource,
    engine: &EngineConfig,
    settings: &SchedulerSettings,
) -> Result<MemoryNeed, EngineError> {
    let ModelFiles { mut config, weights, .. } = ModelFiles::open(source, engine)?;
    let stored = weights.dtype_of(EMBEDDING);
    let dtype = dtype(engine.dtype, stored.or(config.dtype));
    config.drop_long_windows(wanted_model_len(&config, settings)?);
    let budget = match engine.kv_cache_memory {
        0 => Budget::Default { free: u64::MAX, weights: 0 },
        bytes => Budget::Exact(bytes),
    };
    let cache = KvPlan::new(&config, kv_dtype(engine.kv_dtype, dtype), settings, budget)?;
    let weight_bytes = match (source, stored) {
        // Blocks of few bits stay about as long as they are.
        (ModelSource::Gguf(_), None) => weights.file_bytes(),
        _ => Decoder::expected_weight_bytes(backend, &config, WeightChoice { dtype, quantize: engine.quantize }),
    };
    let logits = (backend.logits_tile() * config.vocab_size * DType::F32.size()) as u64;
    let buffers = Decoder::<CpuBackend>::expected_buffer_bytes(&config, settings.max_num_batched_tokens as usize);
    Ok(MemoryNeed { weight_bytes, cache_bytes: cache.total_bytes(), working_bytes: buffers + logits })
}
