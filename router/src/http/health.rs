//! Probes and metrics: the routes that answer whatever else the process does.
//!
//! They allocate little, wait for nothing and need no model: a probe that queues behind requests says nothing.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::lifecycle::{Lifecycle, NotReady};
use crate::metrics;
use crate::served_models::Served;

/// Methods and paths of [`routes`].
pub(super) const ROUTES: [(&str, &str); 7] = [
    ("get", "/health"),
    ("get", "/health/live"),
    ("get", "/health/ready"),
    ("get", "/health/startup"),
    ("get", "/ping"),
    ("post", "/ping"),
    ("get", "/metrics"),
];

/// `/health/live`, `/health/ready`, `/health/startup`, `/health` and `/ping` (the same as ready) and `/metrics`.
pub fn routes(lifecycle: Arc<Lifecycle>) -> Router {
    Router::new()
        .route("/health/live", get(|State(lifecycle): State<Arc<Lifecycle>>| async move { answer(lifecycle.live()) }))
        .route("/health/ready", get(ready))
        .route("/health", get(ready))
        .route(
            "/health/startup",
            get(|State(lifecycle): State<Arc<Lifecycle>>| async move { answer(lifecycle.started()) }),
        )
        .route("/ping", get(ready).post(ready))
        .route("/metrics", get(scrape))
        .with_state(lifecycle)
}

async fn ready(State(lifecycle): State<Arc<Lifecycle>>) -> Response {
    answer(lifecycle.ready())
}

fn answer(state: Result<(), NotReady>) -> Response {
    let no_store = (header::CACHE_CONTROL, "no-store");
    let json = (header::CONTENT_TYPE, "application/json");
    match state {
        Ok(()) => (StatusCode::OK, [no_store, json], "{\"status\":\"ok\"}\n").into_response(),
        Err(reason) => {
            let body = format!("{{\"status\":\"unavailable\",\"reason\":\"{}\"}}\n", reason.why());
            (StatusCode::SERVICE_UNAVAILABLE, [no_store, json, (header::RETRY_AFTER, "1")], body).into_response()
        }
    }
}

async fn scrape(State(lifecycle): State<Arc<Lifecycle>>) -> Response {
    metrics::set_ready(lifecycle.ready().is_ok());
    if let Some(serving) = lifecycle.serving() {
        let stats: Vec<_> = serving.service.models().iter().map(Served::stats).collect();
        serving.metrics.update(&stats);
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics::render()).into_response()
}
