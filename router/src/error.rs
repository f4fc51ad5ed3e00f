//! Every cause of a refused or failed request, and the one table that says how HTTP and gRPC report it.

use axum::http::StatusCode;
use tonic::Code;

/// What a client is told. Messages name the field and the limit; they never hold prompt text or an inner error.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ApiError {
    /// A field's value cannot be served. `param` is the field's name on the wire.
    #[error("{message}")]
    InvalidRequest { param: Option<String>, message: String },
    /// Prompt and `max_tokens` together exceed the model's length.
    #[error("{message}")]
    ContextTooLong { message: String },
    /// A grammar, allowed tokens and bad words together left nothing to choose, or following the grammar took more than its
    /// budget: the output would not have been what was asked for.
    #[error("the output's form and the other parameters leave no token to choose")]
    NothingAllowed,
    #[error("a valid API key is needed")]
    Unauthorized,
    #[error("the model `{model}` does not exist")]
    ModelNotFound { model: String },
    /// Something that is kept for a while (a response, say) and is not, or not any more.
    #[error("there is no such {what}")]
    NotFound { what: &'static str },
    /// Part of a contract, and not served.
    #[error("{what}")]
    NotImplemented { what: &'static str },
    /// The body, a header or a message is larger than its limit.
    #[error("{what} is larger than {limit} bytes")]
    TooLarge { what: &'static str, limit: usize },
    /// The queue is full.
    #[error("the server is overloaded; try again in {retry_after_seconds} s")]
    Overloaded { retry_after_seconds: u64 },
    /// The client left or cancelled.
    #[error("the request was cancelled")]
    Cancelled,
    /// A device failure or a bug; the log holds the cause under this request's id.
    #[error("internal error; quote request id {request_id}")]
    Internal { request_id: String },
    /// Starting, draining, or no worker.
    #[error("{why}")]
    Unavailable { why: &'static str },
    #[error("the deadline passed")]
    DeadlineExceeded,
}

impl ApiError {
    /// HTTP status and gRPC code: two columns of one table.
    pub fn status(&self) -> (StatusCode, Code) {
        match self {
            Self::InvalidRequest { .. } | Self::ContextTooLong { .. } | Self::NothingAllowed => {
                (StatusCode::BAD_REQUEST, Code::InvalidArgument)
            }
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, Code::Unauthenticated),
            Self::ModelNotFound { .. } | Self::NotFound { .. } => (StatusCode::NOT_FOUND, Code::NotFound),
            Self::NotImplemented { .. } => (StatusCode::NOT_IMPLEMENTED, Code::Unimplemented),
            Self::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, Code::ResourceExhausted),
            Self::Overloaded { .. } => (StatusCode::TOO_MANY_REQUESTS, Code::ResourceExhausted),
            // 499 is the field's own code for "client closed request"; the registry has no name for it.
            Self::Cancelled => (StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST), Code::Cancelled),
            Self::Internal { .. } => (StatusCode::INTERNAL_SERVER_ERROR, Code::Internal),
            Self::Unavailable { .. } => (StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable),
            Self::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, Code::DeadlineExceeded),
        }
    }

    /// `type` and `code` of an error in OpenAI's JSON shape.
    pub fn names(&self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::InvalidRequest { .. } => ("invalid_request_error", None),
            Self::ContextTooLong { .. } => ("invalid_request_error", Some("context_length_exceeded")),
            Self::NothingAllowed => ("invalid_request_error", Some("nothing_allowed")),
            Self::Unauthorized => ("invalid_request_error", Some("invalid_api_key")),
            Self::ModelNotFound { .. } => ("invalid_request_error", Some("model_not_found")),
            Self::NotFound { .. } => ("invalid_request_error", Some("not_found")),
            Self::NotImplemented { .. } => ("invalid_request_error", Some("not_implemented")),
            Self::TooLarge { .. } => ("invalid_request_error", Some("request_too_large")),
            Self::Overloaded { .. } => ("rate_limit_error", Some("overloaded")),
            Self::Cancelled => ("request_cancelled", Some("cancelled")),
            Self::Internal { .. } => ("server_error", Some("internal_error")),
            Self::Unavailable { .. } => ("server_error", Some("unavailable")),
            Self::DeadlineExceeded => ("server_error", Some("deadline_exceeded")),
        }
    }

    /// The field to blame, where there is one.
    pub fn param(&self) -> Option<&str> {
        match self {
            Self::InvalidRequest { param, .. } => param.as_deref(),
            Self::ModelNotFound { .. } => Some("model"),
            _ => None,
        }
    }

    /// When a client should try again, in seconds, where trying again can help.
    pub fn retry_after_seconds(&self) -> Option<u64> {
        match self {
            Self::Overloaded { retry_after_seconds } => Some(*retry_after_seconds),
            // Time for a load balancer to find another replica, or for this one to come up.
            Self::Unavailable { .. } => Some(5),
            _ => None,
        }
    }
}
