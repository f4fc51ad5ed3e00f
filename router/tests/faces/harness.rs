//! Both faces in this process, over an engine without a model.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Request, StatusCode};
use quire_engine::testing::{FakeExecutor, Recorder, fake_model, start_with};
use quire_engine::{EngineConfig, EngineHandle, ModelSource, SchedulerSettings, pooling};
use quire_proto::quire::v1::quire_client::QuireClient;
use quire_router::body_budget::BodyBudget;
use quire_router::dialect::{ReasoningParserChoice, ToolParserChoice};
use quire_router::generation::{GenerationService, Limits, ServiceParts};
use quire_router::grpc::{self, GrpcLimits};
use quire_router::http::routes;
use quire_router::inflight::Inflight;
use quire_router::lifecycle::{Lifecycle, Serving};
use quire_router::metrics::ModelMetrics;
use quire_router::served_model::ServedModel;
use quire_router::served_models::{Runner, Served, ServedModels};
use quire_router::worker::LocalWorker;
use serde_json::{Value, json};
use tower::ServiceExt;

pub(crate) const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/demo");
const EMBEDDERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/embedders");
pub(crate) const VOCAB: u32 = 3072;
pub(crate) const EOS: u32 = 2;

/// A server in this process.
pub(crate) struct Server {
    pub(crate) router: Router,
    pub(crate) grpc: Router,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) service: GenerationService,
    pub(crate) engine: EngineHandle,
}

pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {:?}", self.body))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("ASCII"))
    }

    /// `data:` lines of an event stream.
    pub(crate) fn events(&self) -> Vec<String> {
        let text = std::str::from_utf8(&self.body).expect("UTF-8");
        text.split("\n\n")
            .filter(|event| !event.is_empty())
            .map(|event| event.strip_prefix("data: ").expect("an event is a data line").to_owned())
            .collect()
    }

    pub(crate) fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).expect("a chunk is JSON")).collect()
    }
}

impl Server {
    pub(crate) fn new(executor: FakeExecutor) -> Self {
        Self::with(executor, Limits::default(), &SchedulerSettings::default())
    }

    /// A model that writes calls and reasoning in this way.
    pub(crate) fn speaking(executor: FakeExecutor, tools: ToolParserChoice, reasoning: ReasoningParserChoice) -> Self {
        Self::of_model(executor, Limits::default(), &SchedulerSettings::default(), |model| {
            model.speaking(tools, reasoning)
        })
    }

    pub(crate) fn with(executor: FakeExecutor, limits: Limits, settings: &SchedulerSettings) -> Self {
        Self::of_model(executor, limits, settings, |model| model)
    }

    /// The demo model, and embedders and rerankers of `tests/fixtures/embedders` beside it.
    pub(crate) fn beside(executor: FakeExecutor, pooling: &[&str]) -> Self {
        Self::of_models(executor, Limits::default(), &SchedulerSettings::default(), |model| model, pooling)
    }

    fn of_model(
        executor: FakeExecutor,
        limits: Limits,
        settings: &SchedulerSettings,
        change: impl FnOnce(ServedModel) -> ServedModel,
    ) -> Self {
        Self::of_models(executor, limits, settings, change, &[])
    }

    fn of_models(
        executor: FakeExecutor,
        limits: Limits,
        settings: &SchedulerSettings,
        change: impl FnOnce(ServedModel) -> ServedModel,
        pooling: &[&str],
    ) -> Self {
        let engine =
            start_with(executor, fake_model(VOCAB), settings, 0, Box::new(Recorder::default())).expect("starts");
        let source = ModelSource::Directory(DEMO.into());
        let model = change(ServedModel::load(&source, "demo".to_owned(), engine.model()).expect("loads"));
        let runner = Runner::Generates(Arc::new(LocalWorker::new(engine.clone())));
        let mut models = vec![Served { model: Arc::new(model), runner, pace: Arc::default() }];
        models.extend(pooling.iter().map(|name| embedder(name)));
        let described: Vec<_> =
            models.iter().map(|served| (served.model.name().to_owned(), served.model.info().clone())).collect();
        let bodies = BodyBudget::new(limits.max_buffered_bytes);
        let service = GenerationService::new(ServiceParts {
            models: ServedModels::new(models),
            bodies: bodies.clone(),
            limits: limits.clone(),
            inflight: Arc::new(Inflight::default()),
        });
        let router = routes(service.clone());
        let lifecycle = Lifecycle::new(Duration::from_secs(60));
        let metrics =
            ModelMetrics::new(&described.iter().map(|(name, info)| (name.as_str(), info)).collect::<Vec<_>>());
        lifecycle.begin_serving(Serving { service: service.clone(), metrics, http: router.clone() });
        let body_timeout = Duration::from_secs(limits.body_timeout_seconds);
        let limits = GrpcLimits { max_message_bytes: limits.max_body_bytes, body_timeout, bodies };
        let lifecycle = Arc::new(lifecycle);
        let (grpc, _) = grpc::routes(Arc::clone(&lifecycle), limits).expect("routes");
        Self { router, grpc, lifecycle, service, engine }
    }

    /// An engine that answers every request with `text` and then the end of the sequence.
    pub(crate) fn saying(text: &str) -> Self {
        Self::new(saying(text))
    }

    /// A client of the other face.
    pub(crate) fn quire(&self) -> QuireClient<Router> {
        QuireClient::with_origin(self.grpc.clone(), "http://quire".parse().expect("an address"))
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.expect("answers");
        let (parts, body) = response.into_parts();
        let body = axum::body::to_bytes(body, usize::MAX).await.expect("a body");
        assert!(!parts.headers["x-request-id"].is_empty());
        Answer { status: parts.status, headers: parts.headers, body }
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(post(path, body.to_string())).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).expect("a request")).await
    }

    pub(crate) async fn idle(&self) {
        for _ in 0..2000 {
            let stats = self.engine.stats();
            if self.service.num_inflight() == 0 && stats.num_running == 0 && stats.num_waiting == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("the engine still works: {:?}", self.engine.stats());
    }
}

/// A model of `tests/fixtures/embedders`.
fn embedder(name: &str) -> Served {
    let source = ModelSource::Directory(PathBuf::from(EMBEDDERS).join(name));
    let engine = EngineConfig { num_threads: 1, ..EngineConfig::default() };
    let settings = SchedulerSettings::default();
    let engine = pooling::start(&source, &engine, &settings, Box::new(Recorder::default()), 0).expect("starts");
    let model = ServedModel::load(&source, name.to_owned(), engine.model()).expect("loads");
    Served { model: Arc::new(model), runner: Runner::Pools(engine), pace: Arc::default() }
}

/// What transformers answers with such a model.
pub(crate) fn expected(name: &str) -> Value {
    let file = PathBuf::from(EMBEDDERS).join(name).join("expected.json");
    serde_json::from_slice(&std::fs::read(file).expect("a fixture")).expect("JSON")
}

pub(crate) fn post(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path).header("content-type", "application/json").body(body.into()).expect("a request")
}

pub(crate) fn demo_ids(text: &str) -> Vec<u32> {
    let tokenizer = tokenizers::Tokenizer::from_file(format!("{DEMO}/tokenizer.json")).expect("loads");
    tokenizer.encode_fast(text, false).expect("encodes").get_ids().to_vec()
}

pub(crate) fn saying(text: &str) -> FakeExecutor {
    let ids = demo_ids(text);
    FakeExecutor::new(VOCAB)
        .next_token(move |request, _, tokens| ids.get(tokens.len() - request.prompt.len()).copied().unwrap_or(EOS))
}

pub(crate) fn chat(content: &str) -> Value {
    json!({"model": "demo", "messages": [{"role": "user", "content": content}]})
}

pub(crate) fn with(mut body: Value, extra: Value) -> Value {
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

/// What most models of these tests say.
pub(crate) const SAID: &str = "a fox and a crow";

/// A conversation of one message.
pub(crate) fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

/// Names and data of an event stream whose events have names.
pub(crate) fn named(answer: &Answer) -> Vec<(String, Value)> {
    let text = std::str::from_utf8(&answer.body).expect("UTF-8");
    text.split("\n\n")
        .filter(|event| !event.is_empty())
        .map(|event| {
            let (name, data) = event.split_once('\n').expect("two lines");
            let name = name.strip_prefix("event: ").expect("a name").to_owned();
            let data = data.strip_prefix("data: ").expect("data");
            (name, serde_json::from_str(data).expect("JSON"))
        })
        .collect()
}

/// Objects of an answer of one a line.
pub(crate) fn lines(answer: &Answer) -> Vec<Value> {
    let text = std::str::from_utf8(&answer.body).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// Objects of an event stream whose events have no names.
pub(crate) fn data(answer: &Answer) -> Vec<Value> {
    answer.events().iter().map(|event| serde_json::from_str(event).expect("JSON")).collect()
}
