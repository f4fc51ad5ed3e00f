//! The service `quire.v1.Quire`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures::Stream;
use futures::stream::{self, StreamExt};
use quire_proto::quire::v1 as wire;
use quire_proto::quire::v1::quire_server::Quire;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use super::convert::{self, Collector, pooling};
use super::start::start;
use crate::error::ApiError;
use crate::generation::{Generation, GenerationRequest, GenerationService};
use crate::lifecycle::Lifecycle;
use crate::served_models::Task;

type EventStream = Pin<Box<dyn Stream<Item = Result<wire::StreamEvent, Status>> + Send>>;

/// Turns calls into requests and events into messages. A call that is dropped drops its [`Generation`], and that
/// cancels the request.
pub(super) struct Handlers {
    lifecycle: Arc<Lifecycle>,
}

impl Handlers {
    pub(super) fn new(lifecycle: Arc<Lifecycle>) -> Self {
        Self { lifecycle }
    }

    async fn start(
        &self,
        metadata: &MetadataMap,
        given_id: String,
        build: impl FnOnce(String, Option<Instant>) -> Result<GenerationRequest, ApiError>,
    ) -> Result<(Generation, String), Status> {
        start(&self.lifecycle, metadata, given_id, build).await
    }

    /// The service of the model of this name, or of the first that generates.
    fn selected(&self, model: &str) -> Result<GenerationService, Status> {
        let service = self.lifecycle.service().map_err(|error| convert::status(&error, ""))?;
        match model {
            "" => Ok(service.clone()),
            name => service.select(Some(name), Task::Any).map_err(|error| convert::status(&error, "")),
        }
    }

    /// What a call that is answered at once begins with: its id, the service, and when to give up.
    fn begin(
        &self,
        metadata: &MetadataMap,
        given_id: String,
    ) -> Result<(String, GenerationService, Option<Instant>), Status> {
        let id = convert::request_id(given_id).map_err(|error| convert::status(&error, ""))?;
        let begun =
            self.lifecycle.service().and_then(|service| Ok((service, convert::deadline(metadata, Instant::now())?)));
        let (service, deadline) = begun.map_err(|error| convert::status(&error, &id))?;
        Ok((id, service.clone(), deadline))
    }

    fn answered<T>(answer: Result<T, ApiError>, id: &str) -> Result<Response<T>, Status> {
        let mut response = Response::new(answer.map_err(|error| convert::status(&error, id))?);
        convert::name_request(response.metadata_mut(), id);
        Ok(response)
    }

    async fn unary(started: (Generation, String)) -> Result<Response<wire::GenerateResponse>, Status> {
        let (mut generation, model) = started;
        let id = generation.request_id.clone();
        let mut collector = Collector::new(&generation, &model);
        while let Some(event) = generation.next().await {
            if let Some(answer) = collector.add(event).map_err(|error| convert::status(&error, &id))? {
                let mut response = Response::new(answer);
                convert::name_request(response.metadata_mut(), &id);
                return Ok(response);
            }
        }
        // A generation ends with `Done` or an error; one that just stops is a bug, and the caller is told so.
        tracing::error!(request_id = id, "a generation ended without its last event");
        Err(convert::status(&ApiError::Internal { request_id: id.clone() }, &id))
    }

    fn streamed(started: (Generation, String)) -> Response<EventStream> {
        let (generation, model) = started;
        let id = generation.request_id.clone();
        let first = convert::started(&generation, &model);
        let events = stream::unfold(generation, |mut generation| async move {
            loop {
                let event = generation.next().await?;
                let event = convert::stream_event(event, &generation.request_id).map_err(|status| *status);
                if let Some(event) = event.transpose() {
                    return Some((event, generation));
                }
            }
        });
        let events: EventStream = Box::pin(stream::once(async { Ok(first) }).chain(events));
        let mut response = Response::new(events);
        convert::name_request(response.metadata_mut(), &id);
        response
    }
}

#[tonic::async_trait]
impl Quire for Handlers {
    type GenerateStreamStream = EventStream;
    type ChatStreamStream = EventStream;

    async fn generate(
        &self,
        request: Request<wire::GenerateRequest>,
    ) -> Result<Response<wire::GenerateResponse>, Status> {
        // The extensions hold the body's share of memory until its text is tokens.
        let (metadata, share, mut message) = request.into_parts();
        let id = std::mem::take(&mut message.request_id);
        let build = |id, deadline| convert::generate_request(message, id, deadline);
        let started = self.start(&metadata, id, build).await?;
        drop(share);
        Self::unary(started).await
    }

    async fn generate_stream(&self, request: Request<wire::GenerateRequest>) -> Result<Response<EventStream>, Status> {
        // The extensions hold the body's share of memory until its text is tokens.
        let (metadata, share, mut message) = request.into_parts();
        let id = std::mem::take(&mut message.request_id);
        let build = |id, deadline| convert::generate_request(message, id, deadline);
        let started = self.start(&metadata, id, build).await?;
        drop(share);
        Ok(Self::streamed(started))
    }

    async fn chat(&self, request: Request<wire::ChatRequest>) -> Result<Response<wire::GenerateResponse>, Status> {
        // The extensions hold the body's share of memory until its text is tokens.
        let (metadata, share, mut message) = request.into_parts();
        let id = std::mem::take(&mut message.request_id);
        let build = |id, deadline| convert::chat_request(message, id, deadline);
        let started = self.start(&metadata, id, build).await?;
        drop(share);
        Self::unary(started).await
    }

    async fn chat_stream(&self, request: Request<wire::ChatRequest>) -> Result<Response<EventStream>, Status> {
        // The extensions hold the body's share of memory until its text is tokens.
        let (metadata, share, mut message) = request.into_parts();
        let id = std::mem::take(&mut message.request_id);
        let build = |id, deadline| convert::chat_request(message, id, deadline);
        let started = self.start(&metadata, id, build).await?;
        drop(share);
        Ok(Self::streamed(started))
    }

    async fn abort(&self, request: Request<wire::AbortRequest>) -> Result<Response<wire::AbortResponse>, Status> {
        let id = request.into_inner().request_id;
        let found = self.lifecycle.service().map_err(|error| convert::status(&error, ""))?.abort(&id);
        Ok(Response::new(wire::AbortResponse { found }))
    }

    async fn model_info(
        &self,
        request: Request<wire::ModelInfoRequest>,
    ) -> Result<Response<wire::ModelInfoResponse>, Status> {
        let service = self.selected(&request.into_inner().model)?;
        Ok(Response::new(convert::model_info(service.model())))
    }

    async fn list_models(
        &self,
        _: Request<wire::ListModelsRequest>,
    ) -> Result<Response<wire::ListModelsResponse>, Status> {
        let service = self.lifecycle.service().map_err(|error| convert::status(&error, ""))?;
        let models = service.models().iter().map(|served| convert::model_info(&served.model)).collect();
        Ok(Response::new(wire::ListModelsResponse { models }))
    }

    async fn embed(&self, request: Request<wire::EmbedRequest>) -> Result<Response<wire::EmbedResponse>, Status> {
        // The extensions hold the body's share of memory until the answer is there.
        let (metadata, _share, mut message) = request.into_parts();
        let id = std::mem::take(&mut message.request_id);
        let (id, service, deadline) = self.begin(&metadata, id)?;
        let answer = async {
            Ok(pooling::embedded(service.embed(pooling::embed_request(message, id.clone(), deadline)?).await?))
        };
        Self::answered(answer.await, &id)
    }

    async fn rerank(&self, request: Request<wire::RerankRequest>) -> Result<Response<wire::RerankResponse>, Status> {
        // The extensions hold the body's share of memory until the answer is there.
        let (metadata, _share, mut message) = request.into_parts();
        let id = std::mem::take(&mut message.request_id);
        let (id, service, deadline) = self.begin(&metadata, id)?;
        let top_n = message.top_n as usize;
        let answer = async {
            Ok(pooling::reranked(service.score(pooling::rerank_request(message, id.clone(), deadline)?).await?, top_n))
        };
        Self::answered(answer.await, &id)
    }

    async fn classify(
        &self,
        request: Request<wire::ClassifyRequest>,
    ) -> Result<Response<wire::ClassifyResponse>, Status> {
        // The extensions hold the body's share of memory until the answer is there.
        let (metadata, _share, mut message) = request.into_parts();
        let id = std::mem::take(&mut message.request_id);
        let (id, service, deadline) = self.begin(&metadata, id)?;
        let answer = async {
            let request = pooling::classify_request(message, id.clone(), deadline)?;
            Ok(pooling::classified(service.classify(request).await?))
        };
        Self::answered(answer.await, &id)
    }

    async fn stats(&self, request: Request<wire::StatsRequest>) -> Result<Response<wire::StatsResponse>, Status> {
        let service = self.selected(&request.into_inner().model)?;
        Ok(Response::new(convert::stats(service.num_inflight(), &service.stats())))
    }
}
