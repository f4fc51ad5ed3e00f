//! The HTTP face: OpenAI's dialect, and those of others beside it.
//!
//! A file speaks one dialect: it reads bodies and writes answers. What a request means, and what it can be refused for, is for
//! [`crate::generation`].

mod answer;
mod ask;
mod cohere;
mod embeddings;
mod failure;
mod fields;
mod format;
pub mod health;
mod infill;
mod items;
mod messages;
mod ollama;
mod openai;
mod openapi;
mod pooling;
mod receive;
mod render;
mod rerank;
mod responses;
mod routes;
mod sse;
mod stream;
mod tools;
mod types;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use futures::FutureExt;
use quire_engine::scheduler::TenantId;

use crate::error::ApiError;
use crate::generation::GenerationService;
use crate::random::{is_request_id, request_id};

use failure::Failure;

pub use routes::listed;

pub(crate) use failure::in_dialect;
pub(crate) use rerank::ranked;
pub(crate) use types::sampling_of_json;

/// Fields of the request that nobody looked at.
const IGNORED_PARAMS: HeaderName = HeaderName::from_static("x-quire-ignored-params");
/// Identity of the request, given by the client or made here.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The tenant of a server without keys.
const TENANT: TenantId = TenantId(0);

/// Every route of this face, with its errors and headers. Health and metrics routes are merged into it.
pub fn routes(service: GenerationService) -> Router {
    routes::all()
        .into_router()
        .method_not_allowed_fallback(async || {
            Failure::new(StatusCode::METHOD_NOT_ALLOWED, "this route has no such method")
        })
        .fallback(async || Failure::new(StatusCode::NOT_FOUND, "there is no such route"))
        .layer(middleware::from_fn(identify))
        .with_state(responses::Responses::new(service))
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
    let path = request.uri().path().to_owned();
    let response = match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(_) => {
            tracing::error!(request_id = &*id, "a handler panicked");
            Failure::from(ApiError::Internal { request_id: id.to_string() }).into_response()
        }
    };
    let mut response = in_dialect(&path, &id, response);
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}
