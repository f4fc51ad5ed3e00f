//! Bodies on their way in: read within their limits of size and time, parsed, and strict where that is asked for.

use std::time::Duration;

use axum::body::BodyDataStream;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use futures::StreamExt;
use quire_engine::pooling::PoolingInfo;

use crate::body_budget::BodyShare;
use crate::error::ApiError;
use crate::generation::{GenerationService, Limits, invalid};
use crate::metrics::{Endpoint, RequestMetrics};
use crate::served_model::ServedModel;
use crate::served_models::{Runner, Task};

use super::RequestId;
use super::failure::Failure;
use super::fields::Ignored;

/// Asks for a refusal where a field is not known, whatever the server's `limits.strict` says; `false` asks for none.
const STRICT: HeaderName = HeaderName::from_static("x-quire-strict");

/// A body that was understood.
pub(super) trait Body: Sized {
    /// Reads the fields. Fails with the first that cannot be served.
    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError>;

    /// What the route wants of the model.
    const TASK: Task = Task::Generate;

    /// What this body wants of it.
    fn task(&self) -> Task {
        Self::TASK
    }

    /// The model that it names.
    fn model(&self) -> Option<&str>;

    /// Names of fields that nobody looked at.
    fn ignored(&self) -> &Ignored;

    /// Adds fields that this model does not read.
    fn note_unread(&mut self, _model: &ServedModel) {}

    /// Checks what depends on what a model that pools makes of texts, and adds fields that it does not read.
    fn check_pooling(&mut self, _pooling: &PoolingInfo) -> Result<(), ApiError> {
        Ok(())
    }
}

/// A body that was understood. What it holds takes about the memory of its bytes.
pub(super) struct Parsed<T> {
    /// Of the model that the body asks for.
    pub(super) service: GenerationService,
    pub(super) id: RequestId,
    pub(super) body: T,
    /// Held until its text is tokens.
    pub(super) share: BodyShare,
}

/// Reads a body, parses it and finds its model; a refusal is counted under its endpoint.
pub(super) async fn receive<T: Body>(
    service: &GenerationService,
    endpoint: Endpoint,
    request: Request,
) -> Result<Parsed<T>, Failure> {
    let id = RequestId::of(&request);
    let parsed = async {
        let limits = service.limits();
        let strict = is_strict(request.headers(), limits)?;
        let Received { body, share } = read_json_body(request, service).await?;
        let mut body = T::parse(&body, limits)?;
        let service = service.select(body.model(), body.task())?;
        body.note_unread(service.model());
        if let Runner::Pools(engine) = service.runner() {
            body.check_pooling(engine.pooling())?;
        }
        match body.ignored().first() {
            Some(name) if strict => Err(invalid(name, "is not known, and the request is strict").into()),
            _ => Ok(Parsed { service, id, body, share }),
        }
    };
    parsed.await.inspect_err(|failure: &Failure| RequestMetrics::start(endpoint).finish(failure.outcome()))
}

fn is_strict(headers: &HeaderMap, limits: &Limits) -> Result<bool, ApiError> {
    match headers.get(&STRICT).map(|value| value.as_bytes()) {
        None => Ok(limits.strict),
        Some(b"true" | b"1") => Ok(true),
        Some(b"false" | b"0") => Ok(false),
        Some(_) => Err(invalid("x-quire-strict", "must be true or false")),
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
