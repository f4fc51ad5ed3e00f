//! Runs models: one step loop over scheduler and kernels, and a handle to submit requests to it.
//!
//! [`start`] loads a model and gives an [`EngineHandle`]; [`EngineHandle::submit`] gives a [`TokenStream`] per request.
//! Models that answer with vectors, scores or labels have a smaller engine of their own: [`pooling`].
//! Between the two borders one thread owns all state:
//!
//! ```text
//!  async callers            the engine's thread                                     device
//!  submit, abort ──inbox──> scheduler.submit/abort ─> plan ──StepPlan──> Executor ──> Backend
//!  TokenStream <──channel── events <───────────────── apply <─StepOutput─┘
//! ```
//! A request's channel has room for everything it can ever be sent, so the thread never waits for a reader. A stream
//! that is dropped ends its request at the next step boundary. What the device computed for a request depends on the
//! request alone: see [`quire_kernels::Backend`] for what makes that so, and `tests/reproducible.rs` for the proof.

pub mod bench;
mod config;
mod constraint;
mod error;
mod executor;
pub mod gguf;
mod handle;
mod input_batch;
mod kv_cache;
mod kv_events;
mod masks;
mod memory;
mod memory_plan;
mod model_executor;
mod model_files;
mod models;
mod observer;
mod opened_model;
mod places;
pub mod pooling;
mod sampler;
mod source;
mod step_clock;
mod step_loop;
#[cfg(feature = "testing")]
pub mod testing;
mod weights;

pub use config::{
    DTypeChoice, DeviceChoice, EngineConfig, KvDTypeChoice, LoadFormat, PolicyChoice, QuantizeChoice, SchedulerSettings,
};
pub use constraint::{Grammar, NotAllowed, TokenConstraint};
pub use error::{EngineError, SubmitError};
pub use executor::Executor;
pub use handle::{
    DeviceMemoryUse, EngineHandle, EngineHealth, MAX_LOGPROBS, ModelInfo, Submission, TokenEvent, TokenStream,
};
pub use kv_events::{KvEventBatch, KvEventStream, MAX_KV_SUBSCRIBERS, Snapshot, SubscribeError};
pub use memory_plan::{MemoryNeed, free_memory};
pub use model_files::ModelFiles;
pub use observer::{StepObserver, StepReport};
pub use opened_model::OpenedModel;
pub use places::RequestGrammar;
pub use quire_kernels::DeviceInfo;
pub use quire_scheduler as scheduler;
pub use source::{EmbeddedModel, ModelSource};

use executor::Device;
use model_executor::{Loaded, ModelExecutor};
use quire_kernels::Backend;
use quire_scheduler::{KvGroup, Policy, Scheduler, SchedulerConfig};

/// Loads a model and starts its engine thread. Returns when the model is ready to serve: all memory is taken.
///
/// Fails with what is wrong with the files, the settings or the device; nothing is left behind then.
pub fn start(
    source: &ModelSource,
    engine: &EngineConfig,
    scheduler: &SchedulerSettings,
    observer: Box<dyn StepObserver>,
) -> Result<EngineHandle, EngineError> {
    // Before files are looked at, whose errors would hide it.
    step_loop::check_depth(engine.pipeline_depth)?;
    start_beside(ModelFiles::open(source, engine)?, engine, scheduler, observer, 0)
}

/// As [`start`], of files that were opened, where `reserved_bytes` of the host's free memory are for other models of this
/// process.
pub fn start_beside(
    files: ModelFiles,
    engine: &EngineConfig,
    scheduler: &SchedulerSettings,
    observer: Box<dyn StepObserver>,
    reserved_bytes: u64,
) -> Result<EngineHandle, EngineError> {
    // What needs no model is refused before minutes of loading one.
    step_loop::check_depth(engine.pipeline_depth)?;
    let (device, note) = executor::open_device(engine)?;
    match device {
        Device::Cpu(backend) => start_on(*backend, files, engine, scheduler, observer, note, reserved_bytes),
        Device::Cuda(backend) => start_on(*backend, files, engine, scheduler, observer, note, reserved_bytes),
    }
}

fn start_on<B: Backend>(
    backend: B,
    files: ModelFiles,
    engine: &EngineConfig,
    settings: &SchedulerSettings,
    observer: Box<dyn StepObserver>,
    device_note: Option<String>,
    reserved_bytes: u64,
) -> Result<EngineHandle, EngineError> {
    let pipeline_depth = if backend.computes_beside_the_host() { 1 } else { engine.pipeline_depth };
    let loaded = ModelExecutor::load(backend, files, engine, settings, device_note, reserved_bytes)?;
    let Loaded { executor, info, kv_plan } = loaded;
    let scheduler = Scheduler::new(scheduler_config(info.max_model_len, settings, kv_plan.groups))?;
    step_loop::spawn(executor, scheduler, info, pipeline_depth, kv_events::SNAPSHOT_INTERVAL, observer)
}

/// The scheduler's budgets, where settings that are 0 follow from the model.
fn scheduler_config(max_model_len: u32, settings: &SchedulerSettings, kv_groups: Vec<KvGroup>) -> SchedulerConfig {
    let max_waiting_tokens = match settings.max_waiting_tokens {
        0 => 16 * u64::from(max_model_len),
        tokens => tokens,
    };
    SchedulerConfig {
        max_num_seqs: settings.max_num_seqs,
        max_num_batched_tokens: settings.max_num_batched_tokens,
        max_model_len,
        block_size: settings.block_size,
        kv_groups,
        enable_prefix_cache: settings.prefix_cache,
        kv_events: settings.kv_events,
        max_waiting_tokens,
        max_waiting_micros: match settings.max_waiting_seconds {
            0 => None,
            seconds => Some(u64::from(seconds) * 1_000_000),
        },
        policy: match settings.policy {
            PolicyChoice::Fcfs => Policy::Fcfs,
            PolicyChoice::Priority => Policy::Priority,
        },
    }
}
