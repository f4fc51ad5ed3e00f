//! What dialects with one choice for each request have in common: they begin a generation and gather what it says.

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;

use crate::error::ApiError;
use crate::generation::{
    Generation, GenerationEvent, GenerationParams, GenerationRequest, GenerationService, Input, StopCause, Usage,
    invalid,
};
use crate::metrics::Endpoint;

use super::fields::Ignored;
use super::items::Items;
use super::{IGNORED_PARAMS, TENANT};

/// A request of such a dialect, understood.
pub(super) struct Ask {
    pub(super) endpoint: Endpoint,
    pub(super) request_id: String,
    pub(super) model: Option<String>,
    pub(super) input: Input,
    pub(super) params: GenerationParams,
}

impl Ask {
    pub(super) async fn start(self, service: &GenerationService) -> Result<Generation, ApiError> {
        let Self { endpoint, request_id, model, input, params } = self;
        let request = GenerationRequest { request_id, endpoint, tenant: TENANT, model, input, params, deadline: None };
        service.generate(request).await
    }
}

/// A generation's answer as a whole.
pub(super) struct Whole {
    pub(super) items: Items,
    pub(super) cause: StopCause,
    pub(super) usage: Usage,
}

/// Waits for the last event.
pub(super) async fn whole(mut generation: Generation) -> Result<Whole, ApiError> {
    let (mut items, mut end) = (Items::default(), StopCause::Length);
    while let Some(event) = generation.next().await {
        match event {
            GenerationEvent::ChoiceFinished { cause, .. } => end = cause,
            GenerationEvent::Done { usage } => return Ok(Whole { items: items.ended(), cause: end, usage }),
            GenerationEvent::Error(error) => return Err(error),
            event => items.take(event),
        }
    }
    Err(ApiError::Cancelled)
}

/// Refuses sampling fields that these dialects have no answer for.
pub(super) fn one_choice(params: &GenerationParams) -> Result<(), ApiError> {
    for (param, is_asked) in
        [("n", params.n.is_some_and(|n| n != 1)), ("prompt_logprobs", params.prompt_logprobs.is_some())]
    {
        if is_asked {
            return Err(invalid(param, "is not supported by this endpoint"));
        }
    }
    Ok(())
}

/// A JSON answer that says which fields nobody looked at.
pub(super) fn json_response(body: Vec<u8>, ignored: &Ignored) -> Response {
    let mut response = Response::new(Body::from(Bytes::from(body)));
    *response.status_mut() = StatusCode::OK;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    name_ignored(&mut response, ignored);
    response
}

pub(super) fn name_ignored(response: &mut Response, ignored: &Ignored) {
    if let Some(value) = ignored.header().and_then(|names| HeaderValue::try_from(names).ok()) {
        response.headers_mut().insert(IGNORED_PARAMS, value);
    }
}
