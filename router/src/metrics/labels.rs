//! Labels and what they can be: closed sets, so that nobody can make series.

/// Where a request came in; the `endpoint` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Chat,
    Completions,
    FimCompletions,
    Infill,
    Responses,
    Messages,
    CountTokens,
    OllamaChat,
    OllamaGenerate,
    OllamaEmbed,
    Embeddings,
    Rerank,
    Score,
    Pooling,
    Classify,
    CohereEmbed,
    Tokenize,
    Detokenize,
    Render,
    GrpcGenerate,
    GrpcChat,
    GrpcEmbed,
    GrpcRerank,
    GrpcClassify,
    GrpcVllmGenerate,
    GrpcVllmEmbed,
    GrpcModelInfer,
}

impl Endpoint {
    pub(super) const ALL: [Self; 27] = [
        Self::Chat,
        Self::Completions,
        Self::FimCompletions,
        Self::Infill,
        Self::Responses,
        Self::Messages,
        Self::CountTokens,
        Self::OllamaChat,
        Self::OllamaGenerate,
        Self::OllamaEmbed,
        Self::Embeddings,
        Self::Rerank,
        Self::Score,
        Self::Pooling,
        Self::Classify,
        Self::CohereEmbed,
        Self::Tokenize,
        Self::Detokenize,
        Self::Render,
        Self::GrpcGenerate,
        Self::GrpcChat,
        Self::GrpcEmbed,
        Self::GrpcRerank,
        Self::GrpcClassify,
        Self::GrpcVllmGenerate,
        Self::GrpcVllmEmbed,
        Self::GrpcModelInfer,
    ];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "completions",
            Self::FimCompletions => "fim_completions",
            Self::Infill => "infill",
            Self::Responses => "responses",
            Self::Messages => "messages",
            Self::CountTokens => "count_tokens",
            Self::OllamaChat => "ollama_chat",
            Self::OllamaGenerate => "ollama_generate",
            Self::OllamaEmbed => "ollama_embed",
            Self::Embeddings => "embeddings",
            Self::Rerank => "rerank",
            Self::Score => "score",
            Self::Pooling => "pooling",
            Self::Classify => "classify",
            Self::CohereEmbed => "cohere_embed",
            Self::Tokenize => "tokenize",
            Self::Detokenize => "detokenize",
            Self::Render => "render",
            Self::GrpcGenerate => "grpc_generate",
            Self::GrpcChat => "grpc_chat",
            Self::GrpcEmbed => "grpc_embed",
            Self::GrpcRerank => "grpc_rerank",
            Self::GrpcClassify => "grpc_classify",
            Self::GrpcVllmGenerate => "grpc_vllm_generate",
            Self::GrpcVllmEmbed => "grpc_vllm_embed",
            Self::GrpcModelInfer => "grpc_model_infer",
        }
    }
}

/// How a request ended; the `outcome` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All choices ended by themselves.
    Finished,
    /// A field could not be served, or the model is unknown.
    Invalid,
    /// No valid key.
    Unauthorized,
    /// The queue was full.
    Overloaded,
    /// Starting or draining.
    Unavailable,
    /// The client left or cancelled.
    Cancelled,
    DeadlineExceeded,
    /// A device failure or a bug.
    Failed,
}

impl Outcome {
    pub(super) const ALL: [Self; 8] = [
        Self::Finished,
        Self::Invalid,
        Self::Unauthorized,
        Self::Overloaded,
        Self::Unavailable,
        Self::Cancelled,
        Self::DeadlineExceeded,
        Self::Failed,
    ];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Invalid => "invalid",
            Self::Unauthorized => "unauthorized",
            Self::Overloaded => "overloaded",
            Self::Unavailable => "unavailable",
            Self::Cancelled => "cancelled",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::Failed => "failed",
        }
    }
}

impl From<&crate::error::ApiError> for Outcome {
    fn from(error: &crate::error::ApiError) -> Self {
        use crate::error::ApiError;
        match error {
            ApiError::Unauthorized => Self::Unauthorized,
            ApiError::Overloaded { .. } => Self::Overloaded,
            ApiError::Cancelled => Self::Cancelled,
            ApiError::Internal { .. } => Self::Failed,
            ApiError::Unavailable { .. } => Self::Unavailable,
            ApiError::DeadlineExceeded => Self::DeadlineExceeded,
            ApiError::InvalidRequest { .. }
            | ApiError::ContextTooLong { .. }
            | ApiError::ModelNotFound { .. }
            | ApiError::NotFound { .. }
            | ApiError::NotImplemented { .. }
            | ApiError::TooLarge { .. } => Self::Invalid,
            #[allow(unreachable_patterns, reason = "errors are added beside the table that maps them")]
            _ => Self::Invalid,
        }
    }
}

/// Which listener a connection came to; the `listener` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    Http,
    Grpc,
}

impl Listener {
    pub(super) const ALL: [Self; 2] = [Self::Http, Self::Grpc];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Grpc => "grpc",
        }
    }
}
