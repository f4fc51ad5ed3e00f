//! What models will take of the host's memory, known from their files' headers before any of them is loaded.

use quire_kernels::cpu::{CpuBackend, CpuConfig};
use quire_kernels::{Backend, DType};

use crate::config::{EngineConfig, SchedulerSettings};
use crate::error::EngineError;
use crate::kv_cache::{Budget, KvPlan, wanted_model_len};
use crate::memory;
use crate::model_executor::{dtype, kv_dtype};
use crate::model_files::ModelFiles;
use crate::models::decoder::{Decoder, EMBEDDING, Output};
use crate::models::loader::WeightChoice;
use crate::opened_model::OpenedModel;

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

impl OpenedModel {
    /// What the model will take of the host's memory, computed on the CPU.
    pub fn memory_need(&self, engine: &EngineConfig, settings: &SchedulerSettings) -> Result<MemoryNeed, EngineError> {
        let backend = CpuBackend::new(CpuConfig { num_threads: 1, isa: None })?;
        match self {
            Self::Pools(files) => {
                let (weight_bytes, working_bytes) = files.expected_bytes(&backend, engine, settings)?;
                Ok(MemoryNeed { weight_bytes, cache_bytes: 0, working_bytes })
            }
            Self::Generates(files) => of_generator(&backend, files, engine, settings),
        }
    }
}

fn of_generator(
    backend: &CpuBackend,
    files: &ModelFiles,
    engine: &EngineConfig,
    settings: &SchedulerSettings,
) -> Result<MemoryNeed, EngineError> {
    let ModelFiles { config, weights, .. } = files;
    let mut config = config.clone();
    let dtype = dtype(engine.dtype, weights.dtype_of(EMBEDDING).or(config.dtype));
    config.drop_long_windows(wanted_model_len(&config, settings)?);
    let budget = match engine.kv_cache_memory {
        0 => Budget::Default { free: u64::MAX, weights: 0 },
        bytes => Budget::Exact(bytes),
    };
    let cache = KvPlan::new(&config, kv_dtype(engine.kv_dtype, dtype), settings, budget)?;
    let choice = WeightChoice { dtype, quantize: engine.quantize };
    let weight_bytes = Decoder::expected_weight_bytes(backend, &config, weights, choice, Output::Logits);
    let logits = (backend.logits_tile() * config.vocab_size * DType::F32.size()) as u64;
    let buffers = Decoder::<CpuBackend>::expected_buffer_bytes(&config, settings.max_num_batched_tokens as usize);
    Ok(MemoryNeed { weight_bytes, cache_bytes: cache.total_bytes(), working_bytes: buffers + logits })
}
