//! What can go wrong when a request is submitted or a scheduler is made.

/// Why a request was not taken. The scheduler's state is as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// There is nothing to continue from.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The output might not fit behind the prompt.
    #[error("{num_tokens} tokens of prompt and output exceed max_model_len {max_model_len}")]
    TooLong {
        /// Tokens of the prompt and `max_tokens`.
        num_tokens: u64,
        /// The limit.
        max_model_len: u32,
    },
    /// The queue is full; `retry_after_micros` is when it should have room again, by the pace measured so far.
    #[error("{waiting_tokens} tokens wait already, {limit} may")]
    QueueFull {
        /// Tokens in the queue.
        waiting_tokens: u64,
        /// [`crate::SchedulerConfig::max_waiting_tokens`].
        limit: u64,
        /// When to come back, in microseconds from now.
        retry_after_micros: u64,
    },
    /// By the pace measured so far it would wait too long.
    #[error("predicted wait of {wait_micros} us exceeds {limit_micros} us")]
    WaitTooLong {
        /// How long it would wait for its first step.
        wait_micros: u64,
        /// [`crate::SchedulerConfig::max_waiting_micros`].
        limit_micros: u64,
        /// When to come back, in microseconds from now.
        retry_after_micros: u64,
    },
    /// A field has a value that cannot work.
    #[error("{field}: {why}")]
    Invalid {
        /// Name of the field of [`crate::Request`] or [`crate::SamplingParams`].
        field: &'static str,
        /// What it must be.
        why: &'static str,
    },
}

/// A setting that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {why}")]
pub struct ConfigError {
    /// Name of the field of [`crate::SchedulerConfig`].
    pub field: &'static str,
    /// What it must be.
    pub why: String,
}
