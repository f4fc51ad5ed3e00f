//! The service `vllm.grpc.engine.VllmEngine`: what gateways drive engines by.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::Stream;
use futures::stream;
use quire_proto::smg::grpc::common;
use quire_proto::vllm::grpc::engine as wire;
use quire_proto::vllm::grpc::engine::vllm_engine_server::VllmEngine;
use sha2::{Digest, Sha256};
use tonic::{Request, Response, Status};

use crate::error::ApiError;
use crate::generation::GenerationService;
use crate::lifecycle::Lifecycle;
use crate::served_models::Task;
use crate::zip;

use super::convert::vllm::Writer;
use super::convert::{self, kv_events as convert_kv, vllm as convert_vllm};
use super::start::start;

type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Bytes of a piece of the tokenizer's archive: well below what clients take in a message.
const ARCHIVE_PIECE: usize = 1 << 20;

/// How often it is asked whether the engine is idle, by who wants its cache flushed then.
const FLUSH_POLL: Duration = Duration::from_millis(5);

pub(super) struct Handlers {
    lifecycle: Arc<Lifecycle>,
    started: Instant,
    /// Milliseconds since 1970 of the last request; 0 before the first.
    last_receive: AtomicU64,
}

impl Handlers {
    pub(super) fn new(lifecycle: Arc<Lifecycle>) -> Self {
        Self { lifecycle, started: Instant::now(), last_receive: AtomicU64::new(0) }
    }

    fn note_receipt(&self) {
        self.last_receive.store(u64::try_from(since_1970().as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn service(&self) -> Result<&GenerationService, Status> {
        self.lifecycle.service().map_err(|error| convert::status(&error, ""))
    }
}

fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn not_implemented(what: &'static str) -> Status {
    convert::status(&ApiError::NotImplemented { what }, "")
}

#[tonic::async_trait]
impl VllmEngine for Handlers {
    type GenerateStream = Boxed<wire::GenerateResponse>;
    type GetTokenizerStream = Boxed<common::GetTokenizerChunk>;
    type SubscribeKvEventsStream = Boxed<common::KvEventBatch>;

    async fn generate(
        &self,
        request: Request<wire::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        self.note_receipt();
        // The extensions hold the body's share of memory until its text is tokens.
        let (metadata, share, mut message) = request.into_parts();
        let id = std::mem::take(&mut message.request_id);
        let streams = message.stream;
        let wants_prompt_logprobs =
            message.sampling_params.as_ref().is_some_and(|sampling| sampling.prompt_logprobs.is_some());
        let build = |id, deadline| convert_vllm::generate_request(message, id, deadline);
        let (generation, _) = start(&self.lifecycle, &metadata, id, build).await?;
        drop(share);
        let id = generation.request_id.clone();
        let writer = Writer::new(streams, wants_prompt_logprobs, Arc::clone(&generation.prompt_token_ids));
        let messages = stream::unfold((generation, writer), |(mut generation, mut writer)| async move {
            loop {
                let event = generation.next().await?;
                let message = match writer.message(event, generation.usage()) {
                    Ok(None) => continue,
                    Ok(Some(message)) => Ok(message),
                    Err(error) => Err(convert::status(&error, &generation.request_id)),
                };
                return Some((message, (generation, writer)));
            }
        });
        let mut response = Response::new(Box::pin(messages) as Self::GenerateStream);
        convert::name_request(response.metadata_mut(), &id);
        Ok(response)
    }

    async fn embed(&self, request: Request<wire::EmbedRequest>) -> Result<Response<wire::EmbedResponse>, Status> {
        self.note_receipt();
        let service = self.service()?;
        if service.select(None, Task::Embed).is_err() {
            return Err(not_implemented("no model of this server makes embeddings"));
        }
        // The extensions hold the body's share of memory until the answer is there.
        let (metadata, _share, mut message) = request.into_parts();
        let id = convert::request_id(std::mem::take(&mut message.request_id))
            .map_err(|error| convert::status(&error, ""))?;
        let answer = async {
            let deadline = convert::deadline(&metadata, Instant::now())?;
            service.embed(convert_vllm::embed_request(message, id.clone(), deadline)?).await
        };
        let embedded = answer.await.map_err(|error| convert::status(&error, &id))?;
        let mut response = Response::new(convert_vllm::embedded(embedded));
        convert::name_request(response.metadata_mut(), &id);
        Ok(response)
    }

    async fn health_check(
        &self,
        _: Request<wire::HealthCheckRequest>,
    ) -> Result<Response<wire::HealthCheckResponse>, Status> {
        // While the model is loaded nothing of it can be told yet: a gateway asks again later.
        self.service()?;
        let (healthy, message) = match self.lifecycle.ready() {
            Ok(()) => (true, String::new()),
            Err(reason) => (false, reason.why().to_owned()),
        };
        Ok(Response::new(wire::HealthCheckResponse { healthy, message }))
    }

    async fn flush_cache(
        &self,
        request: Request<common::FlushCacheRequest>,
    ) -> Result<Response<common::FlushCacheResponse>, Status> {
        let service = self.service()?;
        let limit = convert_kv::flush_timeout(&request.into_inner()).map_err(|error| convert::status(&error, ""))?;
        let deadline = Instant::now() + limit;
        let is_busy = || {
            let stats = service.stats();
            stats.num_running > 0 || stats.num_waiting > 0
        };
        while is_busy() && Instant::now() < deadline && !service.is_draining() {
            tokio::time::sleep(FLUSH_POLL).await;
        }
        let report = service.flush_cache().await.map_err(|error| convert::status(&error, ""))?;
        Ok(Response::new(convert_kv::flushed(report)))
    }

    async fn abort(&self, request: Request<wire::AbortRequest>) -> Result<Response<wire::AbortResponse>, Status> {
        let service = self.service()?;
        for id in request.into_inner().request_ids {
            service.abort(&id);
        }
        Ok(Response::new(wire::AbortResponse {}))
    }

    async fn get_model_info(
        &self,
        _: Request<wire::GetModelInfoRequest>,
    ) -> Result<Response<wire::GetModelInfoResponse>, Status> {
        Ok(Response::new(convert_vllm::model_info(self.service()?)))
    }

    async fn get_server_info(
        &self,
        _: Request<wire::GetServerInfoRequest>,
    ) -> Result<Response<wire::GetServerInfoResponse>, Status> {
        let service = self.service()?;
        let uptime = self.started.elapsed().as_secs_f64();
        let last_receive = self.last_receive.load(Ordering::Relaxed) as f64 / 1000.0;
        let info = convert_vllm::server_info(service.model().info(), service.num_inflight(), uptime, last_receive);
        Ok(Response::new(info))
    }

    async fn get_loads(
        &self,
        request: Request<wire::GetLoadsRequest>,
    ) -> Result<Response<wire::GetLoadsResponse>, Status> {
        let service = self.service()?;
        if request.into_inner().dp_rank.is_some_and(|rank| rank != 0) {
            let message = "`dp_rank` must be 0: there is one rank".to_owned();
            return Err(convert::status(&ApiError::InvalidRequest { param: Some("dp_rank".into()), message }, ""));
        }
        let (info, stats) = (service.model().info(), service.stats());
        Ok(Response::new(convert_vllm::loads(info, &stats, since_1970().as_secs())))
    }

    async fn get_tokenizer(
        &self,
        _: Request<common::GetTokenizerRequest>,
    ) -> Result<Response<Self::GetTokenizerStream>, Status> {
        let service = self.service()?.clone();
        let archive =
            tokio::task::spawn_blocking(move || service.model().tokenizer_files().map(|files| zip::store(&files)));
        let archive = match archive.await {
            Ok(Ok(archive)) => archive,
            failed => {
                let request_id = crate::random::request_id();
                tracing::error!(request_id, failed = ?failed.map(|read| read.map(|_| ())), "cannot read the tokenizer");
                return Err(convert::status(&ApiError::Internal { request_id: request_id.clone() }, &request_id));
            }
        };
        let sha256: String = Sha256::digest(&archive).iter().map(|byte| format!("{byte:02x}")).collect();
        let last = archive.len().saturating_sub(1) / ARCHIVE_PIECE;
        let archive = axum::body::Bytes::from(archive);
        let pieces = stream::iter((0..=last).map(move |index| {
            let (from, to) = (index * ARCHIVE_PIECE, ((index + 1) * ARCHIVE_PIECE).min(archive.len()));
            let sha256 = if index == last { sha256.clone() } else { String::new() };
            Ok(common::GetTokenizerChunk { data: archive.slice(from..to).to_vec(), sha256 })
        }));
        Ok(Response::new(Box::pin(pieces)))
    }

    async fn subscribe_kv_events(
        &self,
        request: Request<common::SubscribeKvEventsRequest>,
    ) -> Result<Response<Self::SubscribeKvEventsStream>, Status> {
        let service = self.service()?.clone();
        let start = request.into_inner().start_sequence_number;
        let events = service.subscribe_kv_events(start).await.map_err(|error| convert::status(&error, ""))?;
        let words = convert_kv::Words::new(service.model().info().block_size, events.groups(), &service.plain_salt());
        let batches = stream::unfold(Some((service, events, words)), |state| async move {
            let (service, mut events, words) = state?;
            let batch = tokio::select! {
                batch = events.next() => batch,
                // It has no end of its own: a drain would wait for it in vain.
                () = service.drain_begins() => None,
            };
            match batch {
                Some(batch) => Some((Ok(words.batch(&batch)), Some((service, events, words)))),
                None => {
                    let error = ApiError::Unavailable { why: "the server is shutting down" };
                    Some((Err(convert::status(&error, "")), None))
                }
            }
        });
        Ok(Response::new(Box::pin(batches)))
    }
}
