//! The gRPC face: the same handlers as HTTP's, over tonic.
//!
//! `server` (our own contract), `vllm` and `kserve` (those of others) receive calls and frame events, `convert` alone knows
//! both wire types and ours.

mod convert;
mod kserve;
mod server;
mod start;
mod vllm;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response};
use quire_proto::inference::grpc_inference_service_server::{self, GrpcInferenceServiceServer};
use quire_proto::quire::v1::quire_server::{self, QuireServer};
use quire_proto::vllm::grpc::engine::vllm_engine_server::{self, VllmEngineServer};
use tonic::service::Routes;
use tonic::{Code, Status};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tower::util::{MapRequestLayer, MapResponseLayer};
use tower_http::catch_panic::CatchPanicLayer;

use crate::body_budget::{BodyBudget, Counted, CountedBody, HeldShare};
use crate::error::ApiError;
use crate::lifecycle::Lifecycle;

const KSERVE: &str = grpc_inference_service_server::SERVICE_NAME;
/// The one method whose caller sends messages for as long as it likes.
const OPEN_ENDED: &str = "/inference.GRPCInferenceService/ModelStreamInfer";

/// How much a caller may send, and how slowly.
#[derive(Clone, Debug)]
pub struct GrpcLimits {
    pub max_message_bytes: usize,
    /// For all that a call sends.
    pub body_timeout: Duration,
    /// Shared with the HTTP face.
    pub bodies: BodyBudget,
}

/// `grpc.health.v1`, kept in step with readiness by [`Health::set_ready`].
#[derive(Clone)]
pub struct Health(HealthReporter);

impl Health {
    /// Says whether calls are served, for the whole server and for each service.
    pub async fn set_ready(&self, ready: bool) {
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in ["", quire_server::SERVICE_NAME, vllm_engine_server::SERVICE_NAME, KSERVE] {
            self.0.set_service_status(service, status).await;
        }
    }
}

/// All services of this face. Calls are answered from the start: with `UNAVAILABLE` until the model is loaded.
pub fn routes(
    lifecycle: Arc<Lifecycle>,
    limits: GrpcLimits,
) -> Result<(Router, Health), tonic_reflection::server::Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(quire_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let max = limits.max_message_bytes;
    let quire = QuireServer::new(server::Handlers::new(Arc::clone(&lifecycle))).max_decoding_message_size(max);
    let vllm = VllmEngineServer::new(vllm::Handlers::new(Arc::clone(&lifecycle))).max_decoding_message_size(max);
    let kserve = GrpcInferenceServiceServer::new(kserve::Handlers::new(lifecycle)).max_decoding_message_size(max);
    let routes = Routes::new(quire)
        .add_service(vllm)
        .add_service(kserve)
        .add_service(health)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?);
    let (bodies, body_timeout) = (limits.bodies.clone(), limits.body_timeout);
    let count_body = move |mut request: Request<Body>| {
        let share = HeldShare::new(&bodies);
        request.extensions_mut().insert(share.clone());
        let counted = if request.uri().path() == OPEN_ENDED { Counted::EachMessage } else { Counted::Together };
        let refusal = |error: &ApiError| convert::status(error, "");
        request.map(|body| Body::new(CountedBody::new(body, counted, share, body_timeout, refusal)))
    };
    // tonic calls a message that is too large OUT_OF_RANGE, which no handler here ever says; the one table has another
    // code for it.
    let too_large = ApiError::TooLarge { what: "the message", limit: limits.max_message_bytes };
    let name_too_large = move |response: Response<Body>| match Status::from_header_map(response.headers()) {
        Some(status) if status.code() == Code::OutOfRange => convert::status(&too_large, "").into_http(),
        _ => response,
    };
    let panicked = |_: Box<dyn std::any::Any + Send>| Status::internal("internal error").into_http::<Body>();
    let router = routes
        .prepare()
        .into_axum_router()
        .layer(MapRequestLayer::new(count_body))
        .layer(MapResponseLayer::new(name_too_large))
        .layer(CatchPanicLayer::custom(panicked));
    Ok((router, Health(reporter)))
}
