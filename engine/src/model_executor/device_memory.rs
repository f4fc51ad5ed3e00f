//! Memory of a device that is not the host's: whether a model fits, and what is left for its cache.

use quire_kernels::{Backend, DeviceMemory};

use crate::error::EngineError;
use crate::handle::DeviceMemoryUse;
use crate::models::config::ModelConfig;
use crate::models::decoder::{Decoder, Output};
use crate::models::loader::WeightChoice;
use crate::weights::Weights;

/// Left to what is taken while steps run, the driver's own and recordings of steps: the smaller of so many bytes and this
/// part of the device.
const RUNNING_BYTES: u64 = 256 << 20;
const RUNNING_PART: u64 = 64;

/// Refuses a model whose weights alone are more than may be taken, before minutes of loading it.
pub(super) fn check_weights<B: Backend>(
    backend: &mut B,
    config: &ModelConfig,
    weights: &Weights,
    choice: WeightChoice,
) -> Result<(), EngineError> {
    let Some(memory) = backend.memory()? else { return Ok(()) };
    let weights = Decoder::expected_weight_bytes(backend, config, weights, choice, Output::Logits);
    match weights > memory.available_bytes {
        true => Err(does_not_fit(&format!("its weights take {}", gibibytes(weights)), memory)),
        false => Ok(()),
    }
}

/// What the cache may take of what is left. `None` where the host's memory counts.
pub(super) fn left_for_cache<B: Backend>(backend: &mut B) -> Result<Option<u64>, EngineError> {
    Ok(backend.memory()?.map(|memory| {
        let running = RUNNING_BYTES.min(memory.total_bytes / RUNNING_PART);
        memory.available_bytes.saturating_sub(running)
    }))
}

/// Where memory went, once all of it is taken; `before` is what there was.
pub(super) fn use_of<B: Backend>(
    backend: &mut B,
    before: Option<DeviceMemory>,
    weights: u64,
    cache: u64,
) -> Result<Option<DeviceMemoryUse>, EngineError> {
    let (Some(before), Some(now)) = (before, backend.memory()?) else { return Ok(None) };
    let taken = before.available_bytes.saturating_sub(now.available_bytes);
    let working = taken.saturating_sub(weights + cache);
    Ok(Some(DeviceMemoryUse { total: before.total_bytes, working, left: now.available_bytes }))
}

/// Says in numbers what is too large for the device, where memory ran out.
pub(super) fn explain<B: Backend>(backend: &mut B, before: Option<DeviceMemory>, error: EngineError) -> EngineError {
    match (&error, before) {
        (EngineError::Kernel(quire_kernels::KernelError::OutOfMemory { what, bytes }), Some(before)) => {
            let left = backend.memory().ok().flatten().map_or(0, |now| now.available_bytes);
            let what = format!("{what} takes {} more and {} are left", gibibytes(*bytes), gibibytes(left));
            does_not_fit(&what, before)
        }
        _ => error,
    }
}

/// Says so where what is `left` beside weights and tables is too little for a cache.
pub(super) fn explain_cache(before: Option<DeviceMemory>, left: u64, error: EngineError) -> EngineError {
    match (error, before) {
        (EngineError::Config { why, .. }, Some(before)) => {
            let what = format!("{} are left for its cache beside what the driver takes, and {why}", gibibytes(left));
            does_not_fit(&what, before)
        }
        (error, _) => error,
    }
}

fn does_not_fit(what: &str, memory: DeviceMemory) -> EngineError {
    let why = format!(
        "the model does not fit the device: {what}; {} of its {} could be taken, by this share and by what others hold",
        gibibytes(memory.available_bytes),
        gibibytes(memory.total_bytes)
    );
    EngineError::Config { field: "engine.memory_share".to_owned(), why }
}

fn gibibytes(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}
