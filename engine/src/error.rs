//! What can go wrong while a model is loaded, a request submitted, or a step computed.

use quire_kernels::KernelError;
use quire_scheduler::ConfigError;

/// Loading or running a model failed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A file of the model is absent, unreadable or not what it should be.
    #[error("{file}: {why}")]
    ModelFile { file: String, why: String },
    /// `config.json` asks for something that is not served.
    #[error("config.json: {field}: {why}")]
    Unsupported { field: String, why: String },
    /// A tensor is absent or has another shape than `config.json` says.
    #[error("tensor {name}: {why}")]
    Tensor { name: String, why: String },
    /// A setting cannot work for this model or device.
    #[error("{field}: {why}")]
    Config { field: String, why: String },
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error("the engine stopped")]
    Stopped,
}

impl From<ConfigError> for EngineError {
    fn from(error: ConfigError) -> Self {
        Self::Config { field: error.field.to_owned(), why: error.why }
    }
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// The scheduler refused it.
    #[error(transparent)]
    Scheduler(#[from] quire_scheduler::SubmitError),
    /// So many submissions, or tokens in them, wait for the next step boundary that no more are taken.
    #[error("the engine's command queue is full")]
    CommandQueueFull {
        /// When to come back, in microseconds from now: when what waits should have left, by the pace measured so far.
        retry_after_micros: u64,
    },
    /// The engine is stopping or has failed.
    #[error("the engine is stopped")]
    Stopped,
}
