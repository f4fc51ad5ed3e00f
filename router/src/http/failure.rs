//! Why a request has no answer, and how each dialect says so.
//!
//! A handler fails with a [`Failure`]. The response carries it along, so that one place ([`in_dialect`]) can put it into
//! the shape that the clients of its route read: a wrong method, a panic and a model that is still being loaded included.

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::metrics::Outcome;

use super::answer::json;

/// Whose shapes a route speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    OpenAi,
    Anthropic,
    Ollama,
    LlamaCpp,
    Mistral,
}

impl Dialect {
    fn of_path(path: &str) -> Self {
        let is = |prefix: &str| path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        if is("/v1/messages") {
            Self::Anthropic
        } else if is("/api") {
            Self::Ollama
        } else if is("/infill") {
            Self::LlamaCpp
        } else if is("/v1/fim") {
            Self::Mistral
        } else {
            Self::OpenAi
        }
    }
}

/// Why a request has no answer: one of the API's errors, or one that only HTTP knows.
#[derive(Clone, Debug)]
pub(super) enum Failure {
    Api(ApiError),
    Http { status: StatusCode, message: &'static str },
}

impl Failure {
    pub(super) fn new(status: StatusCode, message: &'static str) -> Self {
        Self::Http { status, message }
    }

    pub(super) fn outcome(&self) -> Outcome {
        match self {
            Self::Api(error) => Outcome::from(error),
            Self::Http { .. } => Outcome::Invalid,
        }
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::Api(error) => error.status().0,
            Self::Http { status, .. } => *status,
        }
    }

    /// The body in a dialect; `request_id` is empty where there is none yet.
    pub(super) fn body(&self, dialect: Dialect, request_id: &str) -> Vec<u8> {
        let status = self.status();
        let (message, kind, param, code) = match self {
            Self::Api(error) => {
                let (kind, code) = error.names();
                (error.to_string(), kind, error.param(), code)
            }
            Self::Http { message, .. } => ((*message).to_owned(), "invalid_request_error", None, None),
        };
        json(&match dialect {
            Dialect::OpenAi => json!({"error": {"message": message, "type": kind, "param": param, "code": code}}),
            Dialect::Anthropic => anthropic(status, &message, request_id),
            Dialect::Ollama => json!({"error": message}),
            Dialect::LlamaCpp => json!({"error": {"code": status.as_u16(), "message": message, "type": kind}}),
            Dialect::Mistral => {
                json!({"object": "error", "message": message, "type": kind, "param": param, "code": code})
            }
        })
    }
}

fn anthropic(status: StatusCode, message: &str, request_id: &str) -> Value {
    let kind = match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        504 => "timeout_error",
        400..500 => "invalid_request_error",
        _ => "api_error",
    };
    let id = (!request_id.is_empty()).then_some(request_id);
    json!({"type": "error", "error": {"type": kind, "message": message}, "request_id": id})
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self::Api(error)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        Failure::Api(self).into_response()
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let retry_after = match &self {
            Self::Api(error) => error.retry_after_seconds(),
            Self::Http { .. } => None,
        };
        let mut response = Response::new(Body::from(self.body(Dialect::OpenAi, "")));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response.extensions_mut().insert(self);
        response
    }
}

/// The response, and where it is a failure, in the shape of the path's dialect.
pub(crate) fn in_dialect(path: &str, request_id: &str, mut response: Response) -> Response {
    let dialect = Dialect::of_path(path);
    if let Some(failure) = response.extensions_mut().remove::<Failure>()
        && dialect != Dialect::OpenAi
    {
        *response.body_mut() = Body::from(failure.body(dialect, request_id));
    }
    response
}

/// An error inside a stream, as its dialect writes it.
pub(super) fn error_json(error: &ApiError, dialect: Dialect, request_id: &str) -> Vec<u8> {
    Failure::Api(error.clone()).body(dialect, request_id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shaped(path: &str) -> Value {
        let failure = Failure::from(ApiError::Overloaded { retry_after_seconds: 3 });
        serde_json::from_slice(&failure.body(Dialect::of_path(path), "r-1")).expect("JSON")
    }

    #[test]
    fn each_route_speaks_its_clients_shape() {
        assert_eq!(shaped("/v1/chat/completions")["error"]["code"], "overloaded");
        assert_eq!(shaped("/v1/messages")["error"]["type"], "rate_limit_error");
        assert_eq!(shaped("/v1/messages/count_tokens")["request_id"], "r-1");
        assert!(shaped("/api/chat")["error"].is_string());
        assert_eq!(shaped("/infill")["error"]["code"], 429);
        assert_eq!(shaped("/v1/fim/completions")["object"], "error");
        // A prefix is a whole segment.
        assert_eq!(Dialect::of_path("/v1/messagesx"), Dialect::OpenAi);
        assert_eq!(Dialect::of_path("/apis"), Dialect::OpenAi);
    }
}
