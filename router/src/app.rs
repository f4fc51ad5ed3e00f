//! Build, start, drain, stop.
//!
//! Listeners are bound first, so that a port that is taken fails at once and probes are answered while the model loads;
//! everything else gets 503 with Retry-After until then.

mod models;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use quire_engine::ModelInfo;
use tower::ServiceExt;
use tower_http::catch_panic::CatchPanicLayer;

use crate::body_budget::BodyBudget;
use crate::config::{Config, Loaded};
use crate::error::ApiError;
use crate::generation::{GenerationService, ServiceParts};
use crate::grpc::{self, GrpcLimits};
use crate::http;
use crate::inflight::Inflight;
use crate::lifecycle::{Lifecycle, NotReady, Serving};
use crate::listener::Listener;
use crate::metrics::{self, Listener as Kind, ModelMetrics};
use crate::shutdown::{self, Shutdown, Signals};
use crate::telemetry;

use models::Engine;
pub(crate) use models::find;

/// How often the process looks at itself: readiness for gRPC's health service, an engine that ended.
const WATCH: Duration = Duration::from_millis(250);
/// How often recorded values are moved to their buckets, in looks.
const UPKEEP_EVERY: u32 = 20;
/// What a thread that cannot be interrupted (loading a model) is given at the end.
const LEAVE_BEHIND: Duration = Duration::from_millis(100);

/// Why the server did not start, or did not go on.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    #[error("cannot listen on {address} ({key}): {why}")]
    Bind { key: &'static str, address: SocketAddr, why: String },
    #[error("{0}")]
    Model(String),
    #[error("the engine stopped: {0}")]
    EngineStopped(String),
    #[error("{0}")]
    System(String),
}

/// Serves until a signal says otherwise. The exit code is 0 after a drain, 1 after a failure.
pub fn run(loaded: Loaded) -> ExitCode {
    let start = Instant::now();
    telemetry::init(&loaded.config.log);
    telemetry::log_panics();
    for name in &loaded.ignored_variables {
        tracing::warn!(name = name.as_str(), "passed over a variable that Kubernetes sets for a service");
    }
    let served = metrics::install().map_err(AppError::System).and_then(|()| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .thread_name("quire-io")
            .enable_all()
            .build()
            .map_err(|error| AppError::System(format!("cannot start threads: {error}")))?;
        let served = runtime.block_on(serve(loaded, start));
        runtime.shutdown_timeout(LEAVE_BEHIND);
        served
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(loaded: Loaded, start: Instant) -> Result<(), AppError> {
    let Loaded { config, environment, .. } = loaded;
    let mut signals = Signals::catch().map_err(|error| AppError::System(error.to_string()))?;
    let lifecycle = Arc::new(Lifecycle::new(Duration::from_secs(config.server.stall_seconds)));
    let shutdown = Shutdown::default();
    let bodies = BodyBudget::new(config.limits.max_buffered_bytes);
    let health = listen(&config, &lifecycle, &shutdown, &bodies).await?;
    let drain_limit = Duration::from_secs(config.server.drain_timeout_seconds);

    let load = {
        let config = config.clone();
        tokio::task::spawn_blocking(move || models::load(&config, &environment))
    };
    let (engines, models) = tokio::select! {
        loaded = load => loaded.map_err(|_| AppError::Model("loading the model failed".to_owned()))??,
        name = signals.next() => {
            tracing::info!(signal = name, "stopping before the model is loaded");
            shutdown::drain(&shutdown, &lifecycle, &mut signals, drain_limit).await;
            return Ok(());
        }
    };
    let metrics = {
        let described: Vec<(&str, &ModelInfo)> =
            models.iter().map(|served| (served.model.name(), served.model.info())).collect();
        ModelMetrics::new(&described)
    };
    let service = GenerationService::new(ServiceParts {
        models,
        limits: config.limits.clone(),
        inflight: Arc::new(Inflight::default()),
        bodies,
    });
    lifecycle.begin_serving(Serving { http: http::routes(service.clone()), service, metrics });
    health.set_ready(lifecycle.ready().is_ok()).await;
    tracing::info!(seconds = start.elapsed().as_secs_f64(), "ready");

    let ended = tokio::select! {
        name = signals.next() => {
            tracing::info!(signal = name, "stopping");
            Ok(())
        }
        () = watch(&lifecycle, &health) => {
            let failure = engines.iter().find_map(Engine::failure);
            Err(AppError::EngineStopped(failure.unwrap_or_else(|| "for no known reason".to_owned())))
        }
    };
    health.set_ready(false).await;
    // A dead engine ends its streams itself; there is nothing to wait for.
    let limit = if ended.is_ok() { drain_limit } else { Duration::ZERO };
    shutdown::drain(&shutdown, &lifecycle, &mut signals, limit).await;
    engines.iter().for_each(Engine::shutdown);
    tracing::info!("stopped");
    ended
}

/// Binds both addresses and begins to answer on them.
async fn listen(
    config: &Config,
    lifecycle: &Arc<Lifecycle>,
    shutdown: &Shutdown,
    bodies: &BodyBudget,
) -> Result<grpc::Health, AppError> {
    let server = &config.server;
    let bind = async |key, kind, address: SocketAddr| {
        let fail = |error: std::io::Error| AppError::Bind { key, address, why: error.to_string() };
        let listener = Listener::bind(kind, address, server).await.map_err(fail)?;
        let address = listener.address().map_err(fail)?;
        Ok::<_, AppError>((listener, address))
    };
    let (http, http_address) = bind("server.http", Kind::Http, server.http).await?;
    let (grpc, grpc_address) = bind("server.grpc", Kind::Grpc, server.grpc).await?;
    let limits = GrpcLimits {
        max_message_bytes: server.grpc_max_message_bytes,
        body_timeout: Duration::from_secs(config.limits.body_timeout_seconds),
        bodies: bodies.clone(),
    };
    let (grpc_app, health) =
        grpc::routes(Arc::clone(lifecycle), limits).map_err(|error| AppError::System(error.to_string()))?;
    health.set_ready(false).await;
    tokio::spawn(http.serve(http_app(Arc::clone(lifecycle)), shutdown.clone()));
    tokio::spawn(grpc.serve(grpc_app, shutdown.clone()));
    tracing::info!("HTTP on http://{http_address}");
    tracing::info!("gRPC on {grpc_address}");
    if server.allow_unauthenticated {
        tracing::warn!("anyone who reaches these addresses can use the server: it asks for no keys");
    }
    Ok(health)
}

/// Probes and metrics at once; everything else once the model is loaded.
fn http_app(lifecycle: Arc<Lifecycle>) -> Router {
    async fn forward(State(lifecycle): State<Arc<Lifecycle>>, request: Request) -> Response {
        match lifecycle.serving() {
            // Cannot fail: a router answers every request.
            Some(serving) => serving.http.clone().oneshot(request).await.unwrap_or_else(|never| match never {}),
            None => {
                let response = ApiError::from(NotReady::Starting).into_response();
                http::in_dialect(request.uri().path(), "", response)
            }
        }
    }
    let panicked = |_: Box<dyn std::any::Any + Send>| -> axum::http::Response<Body> {
        ApiError::Internal { request_id: crate::random::request_id() }.into_response()
    };
    Router::new()
        .fallback(forward)
        .with_state(Arc::clone(&lifecycle))
        .merge(http::health::routes(lifecycle))
        .layer(CatchPanicLayer::custom(panicked))
}

/// Keeps gRPC's health in step with readiness and says so in the log; ends when the engine has.
async fn watch(lifecycle: &Lifecycle, health: &grpc::Health) {
    let mut ticks = tokio::time::interval(WATCH);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut was = Ok(());
    for tick in 0u32.. {
        ticks.tick().await;
        let ready = lifecycle.ready();
        if ready != was {
            match ready {
                Ok(()) => tracing::info!("ready again"),
                Err(reason) => tracing::error!("not ready: {}", reason.why()),
            }
            health.set_ready(ready.is_ok()).await;
            was = ready;
        }
        if ready == Err(NotReady::Stopped) {
            break;
        }
        if tick % UPKEEP_EVERY == 0 {
            metrics::upkeep();
        }
    }
}
