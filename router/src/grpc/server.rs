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

use super::convert::{self, Collector};
use super::start::start;
use crate::error::ApiError;
use crate::generation::{Generation, GenerationRequest};
use crate::lifecycle::Lifecycle;

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
            let event = generation.next().await?;
            let event = convert::stream_event(event, &generation.request_id).map_err(|status| *status);
            Some((event, generation))
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
        _: Request<wire::ModelInfoRequest>,
    ) -> Result<Response<wire::ModelInfoResponse>, Status> {
        let service = self.lifecycle.service().map_err(|error| convert::status(&error, ""))?;
        Ok(Response::new(convert::model_info(service.model().name(), service.model().info())))
    }

    async fn stats(&self, _: Request<wire::StatsRequest>) -> Result<Response<wire::StatsResponse>, Status> {
        let service = self.lifecycle.service().map_err(|error| convert::status(&error, ""))?;
        Ok(Response::new(convert::stats(service.num_inflight(), &service.worker().stats())))
    }
}
