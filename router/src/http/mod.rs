//! The OpenAI-compatible HTTP face.

mod answer;
mod fields;
pub mod health;
mod openai;
mod sse;
mod types;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, BodyDataStream};
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::{FutureExt, StreamExt};

use crate::body_budget::BodyShare;
use crate::error::ApiError;
use crate::generation::GenerationService;
use crate::metrics::Outcome;
use crate::random::{is_request_id, request_id};

use answer::{ErrorBody, ErrorJson, json};

/// Fields of the request that nobody looked at.
const IGNORED_PARAMS: HeaderName = HeaderName::from_static("x-quire-ignored-params");
/// Identity of the request, given by the client or made here.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Every route of this face, with its errors and headers. Health and metrics routes are merged into it.
pub fn routes(service: GenerationService) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(openai::chat))
        .route("/v1/completions", post(openai::completions))
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{*id}", get(openai::model))
        .route("/tokenize", post(openai::tokenize))
        .route("/detokenize", post(openai::detokenize))
        .route("/version", get(openai::version))
        .method_not_allowed_fallback(async || {
            Failure::new(StatusCode::METHOD_NOT_ALLOWED, "this route has no such method")
        })
        .fallback(async || Failure::new(StatusCode::NOT_FOUND, "there is no such route"))
        .layer(middleware::from_fn(identify))
        .with_state(service)
}

/// The id that a response carries and the log knows.
#[derive(Clone, Debug)]
struct RequestId(Arc<str>);

impl RequestId {
    fn of(request: &Request) -> Self {
        request.extensions().get().cloned().unwrap_or_else(|| Self(request_id().into()))
    }
}

/// Gives each request an id and each response its header. A bug in a handler ends its own request alone.
async fn identify(mut request: Request, next: Next) -> Response {
    let given = request.headers().get(&REQUEST_ID).and_then(|id| id.to_str().ok()).filter(|id| is_request_id(id));
    let id: Arc<str> = given.map_or_else(|| request_id().into(), Arc::from);
    request.extensions_mut().insert(RequestId(Arc::clone(&id)));
    let mut response = match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(_) => {
            tracing::error!(request_id = &*id, "a handler panicked");
            Failure::from(ApiError::Internal { request_id: id.to_string() }).into_response()
        }
    };
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

/// Why a request has no answer: one of the API's errors, or one that only HTTP knows.
enum Failure {
    Api(ApiError),
    Http { status: StatusCode, message: &'static str },
}

impl Failure {
    fn new(status: StatusCode, message: &'static str) -> Self {
        Self::Http { status, message }
    }

    fn outcome(&self) -> Outcome {
        match self {
            Self::Api(error) => Outcome::from(error),
            Self::Http { .. } => Outcome::Invalid,
        }
    }
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
        let (status, body, retry_after) = match self {
            Self::Api(error) => (error.status().0, ErrorBody::from(&error), error.retry_after_seconds()),
            Self::Http { status, message } => {
                let error = ErrorJson {
                    message: message.to_owned(),
                    r#type: "invalid_request_error".to_owned(),
                    param: None,
                    code: None,
                };
                (status, ErrorBody { error }, None)
            }
        };
        let mut response = Response::new(Body::from(json(&body)));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// A body, and its share of the memory that all bodies have.
struct Received {
    body: Vec<u8>,
    share: BodyShare,
}

/// Reads a JSON body within its limits of size and time.
async fn read_json_body(request: Request, service: &GenerationService) -> Result<Received, Failure> {
    let limits = service.limits();
    let headers = request.headers();
    if !is_json(headers) {
        return Err(Failure::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "the content type must be application/json"));
    }
    // A small body can unpack to a very large one.
    if headers.get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        return Err(Failure::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "compressed bodies are not accepted"));
    }
    let limit = limits.max_body_bytes;
    let too_large = || Failure::Api(ApiError::TooLarge { what: "the body", limit });
    let length = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let read = async {
        let (mut body, mut share) = (Vec::new(), service.bodies().share());
        let mut stream = request.into_body().into_data_stream();
        if length.is_some_and(|length| length > limit as u64) {
            discard(&mut stream, limit).await;
            return Err(too_large());
        }
        while let Some(data) = stream.next().await {
            let data = data.map_err(|_| Failure::new(StatusCode::BAD_REQUEST, "the body could not be read"))?;
            // A body without a length, or with more than it said.
            if body.len() + data.len() > limit {
                discard(&mut stream, limit).await;
                return Err(too_large());
            }
            share.grow(body.len() + data.len())?;
            body.extend_from_slice(&data);
        }
        Ok(Received { body, share })
    };
    match tokio::time::timeout(Duration::from_secs(limits.body_timeout_seconds), read).await {
        Ok(received) => received,
        Err(_) => Err(Failure::new(StatusCode::REQUEST_TIMEOUT, "the body took too long")),
    }
}

/// Reads and drops what is left of a refused body, at most twice the `limit` of one: a client that is still writing when the
/// connection closes would see a broken pipe and not the answer.
async fn discard(stream: &mut BodyDataStream, limit: usize) {
    let mut dropped = 0;
    while let Some(Ok(data)) = stream.next().await {
        dropped += data.len();
        if dropped > limit.saturating_mul(2) {
            return;
        }
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return false };
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}
