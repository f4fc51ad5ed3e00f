//! Build, start, drain, stop.
//!
//! Listeners are bound first, so that a port that is taken fails at once and probes are answered while the model loads;
//! everything else gets 503 with Retry-After until then.

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use quire_engine::{EngineHandle, ModelInfo, ModelSource, StepObserver, StepReport};
use tower::ServiceExt;
use tower_http::catch_panic::CatchPanicLayer;

use crate::body_budget::BodyBudget;
use crate::config::{Config, Environment, Loaded};
use crate::error::ApiError;
use crate::generation::{GenerationService, ServiceParts};
use crate::grpc::{self, GrpcLimits};
use crate::http;
use crate::inflight::Inflight;
use crate::lifecycle::{Lifecycle, NotReady, Serving, StepPace};
use crate::listener::Listener;
use crate::metrics::{self, Listener as Kind, ModelMetrics, StepMetrics};
use crate::served_model::{ServedModel, TextSide};
use crate::shutdown::{self, Shutdown, Signals};
use crate::worker::LocalWorker;
use crate::{demo, gguf, hub, telemetry};

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
        let (config, pace) = (config.clone(), Arc::clone(&lifecycle.pace));
        tokio::task::spawn_blocking(move || load(&config, &environment, pace))
    };
    let (engine, model) = tokio::select! {
        loaded = load => loaded.map_err(|_| AppError::Model("loading the model failed".to_owned()))??,
        name = signals.next() => {
            tracing::info!(signal = name, "stopping before the model is loaded");
            shutdown::drain(&shutdown, &lifecycle, &mut signals, drain_limit).await;
            return Ok(());
        }
    };
    let info = engine.model().clone();
    let name = model.name().to_owned();
    let service = GenerationService::new(ServiceParts {
        worker: Arc::new(LocalWorker::new(engine.clone())),
        model: Arc::new(model),
        limits: config.limits.clone(),
        inflight: Arc::new(Inflight::default()),
        bodies,
    });
    let metrics = ModelMetrics::new(&name, &info);
    lifecycle.begin_serving(Serving { http: http::routes(service.clone()), service, metrics });
    health.set_ready(lifecycle.ready().is_ok()).await;
    tracing::info!(seconds = start.elapsed().as_secs_f64(), "ready");

    let ended = tokio::select! {
        name = signals.next() => {
            tracing::info!(signal = name, "stopping");
            Ok(())
        }
        () = watch(&lifecycle, &health) => {
            Err(AppError::EngineStopped(engine.failure().unwrap_or_else(|| "for no known reason".to_owned())))
        }
    };
    health.set_ready(false).await;
    // A dead engine ends its streams itself; there is nothing to wait for.
    let limit = if ended.is_ok() { drain_limit } else { Duration::ZERO };
    shutdown::drain(&shutdown, &lifecycle, &mut signals, limit).await;
    engine.shutdown();
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

/// Feeds metrics and the step clock.
struct Observer {
    metrics: StepMetrics,
    pace: Arc<StepPace>,
}

impl StepObserver for Observer {
    fn step(&mut self, report: &StepReport) {
        self.pace.observe(report.execute);
        self.metrics.step(report);
    }

    fn cancel_to_free(&mut self, elapsed: Duration) {
        self.metrics.cancel_to_free(elapsed);
    }
}

/// Finds the model's files, starts its engine and reads its text side. Takes its time: for a thread of its own.
fn load(
    config: &Config,
    environment: &Environment,
    pace: Arc<StepPace>,
) -> Result<(EngineHandle, ServedModel), AppError> {
    let (source, own_name) = find(config, environment)?;
    let name = config.server.model_name.clone().unwrap_or(own_name);
    let start = Instant::now();
    let observer = Box::new(Observer { metrics: StepMetrics::new(), pace });
    // A large vocabulary takes as long to read as the weights of a small model: both at once.
    let (engine, text) = std::thread::scope(|scope| {
        let text = scope.spawn(|| {
            let text = TextSide::load(&source, &config.limits);
            tracing::debug!(seconds = start.elapsed().as_secs_f64(), "read the tokenizer");
            text
        });
        let engine = quire_engine::start(&source, &config.engine_for(environment), &config.scheduler, observer);
        tracing::debug!(seconds = start.elapsed().as_secs_f64(), "loaded the weights and took all memory");
        (engine, text.join())
    });
    let engine = engine.map_err(|error| AppError::Model(format!("cannot serve {name}: {error}")))?;
    let text = text
        .map_err(|_| AppError::Model("reading the tokenizer failed".to_owned()))?
        .map_err(|error| AppError::Model(format!("cannot serve the model: {error}")))?;
    let model =
        ServedModel::new(text, name, engine.model()).speaking(config.model.tool_parser, config.model.reasoning_parser);
    say_what_is_served(&source, model.name(), engine.model(), start.elapsed());
    Ok((engine, model))
}

/// A directory, a GGUF file, a name to be pulled, or the model that is compiled in; and the name that it goes by.
pub(crate) fn find(config: &Config, environment: &Environment) -> Result<(ModelSource, String), AppError> {
    let Some(wanted) = &config.model.path else {
        return Ok((ModelSource::Embedded(&demo::MODEL), demo::MODEL.name.to_owned()));
    };
    let path = Path::new(wanted);
    if path.is_dir() {
        let name = path.canonicalize().ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
        return Ok((ModelSource::Directory(path.to_owned()), name.unwrap_or_else(|| "model".to_owned())));
    }
    if path.exists() {
        let metadata = quire_engine::gguf::read_metadata(path)
            .map_err(|error| AppError::Model(format!("cannot serve {wanted}: {error}")))?;
        return Ok((ModelSource::Gguf(path.to_owned()), gguf::model_name(&metadata, path)));
    }
    let Some(name) = hub::ModelName::parse(wanted) else {
        return Err(AppError::Model(format!(
            "{wanted} is neither a directory, nor a file, nor a hub name such as owner/name"
        )));
    };
    let directory = hub::pull(&name, &config.hub, environment)
        .map_err(|error| AppError::Model(format!("cannot pull {wanted}: {error}")))?;
    Ok((ModelSource::Directory(directory), name.repository().to_owned()))
}

/// One line for each fact that an operator looks for first.
fn say_what_is_served(source: &ModelSource, name: &str, info: &ModelInfo, elapsed: Duration) {
    match source {
        ModelSource::Embedded(_) => tracing::info!(
            "model {name}: the demo model that comes with this program. It is tiny, shows that the server works, and \
             is no assistant: do not rely on what it says"
        ),
        ModelSource::Directory(path) | ModelSource::Gguf(path) => {
            tracing::info!("model {name} from {}", path.display());
        }
    }
    let mebibytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    tracing::info!(
        "{}, {} parameters, {:.1} MiB of {}, loaded in {:.2} s",
        info.architecture,
        info.num_parameters,
        mebibytes(info.weight_bytes),
        info.weight_format,
        elapsed.as_secs_f64()
    );
    let device = &info.device;
    tracing::info!("device {}: {}, {}, {} units", device.kind, device.name, device.isa, device.num_units);
    if let Some(note) = &info.device_note {
        tracing::info!("{note}");
    }
    tracing::info!(
        "KV cache of {:.1} MiB of {}: {} blocks of {} tokens, prefix cache {}",
        mebibytes(info.kv_cache_bytes),
        info.kv_dtype,
        info.num_blocks,
        info.block_size,
        if info.prefix_cache { "on" } else { "off" }
    );
    if let Some(memory) = info.device_memory {
        tracing::info!(
            "device memory of {:.1} MiB: weights {:.1}, KV cache {:.1}, working memory {:.1}, left {:.1}",
            mebibytes(memory.total),
            mebibytes(info.weight_bytes),
            mebibytes(info.kv_cache_bytes),
            mebibytes(memory.working),
            mebibytes(memory.left)
        );
    }
    tracing::info!(
        "up to {} tokens a request, {} sequences and {} tokens a step",
        info.max_model_len,
        info.max_num_seqs,
        info.max_num_batched_tokens
    );
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
