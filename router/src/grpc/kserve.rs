//! The service `inference.GRPCInferenceService`: KServe's and Triton's clients, text in and text or vectors out.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures::future::try_join_all;
use futures::{Stream, StreamExt, stream};
use quire_engine::scheduler::TenantId;
use quire_proto::inference as wire;
use quire_proto::inference::grpc_inference_service_server::GrpcInferenceService;
use tonic::{Request, Response, Status, Streaming};

use crate::error::ApiError;
use crate::generation::{
    Generation, GenerationEvent, GenerationParams, GenerationRequest, GenerationService, Input, StopCause, Usage,
};
use crate::lifecycle::Lifecycle;
use crate::metrics::Endpoint;
use crate::random::{is_request_id, random_seed, request_id};
use crate::served_models::Task;

use super::convert::kserve::{Form, Infer};
use super::convert::{self, kserve as convert_kserve, kserve_embed};

/// Requests of one stream that are worked on at once; the others wait in the stream.
const MAX_AT_ONCE: usize = 16;

type Responses = Pin<Box<dyn Stream<Item = wire::ModelStreamInferResponse> + Send>>;

pub(super) struct Handlers {
    lifecycle: Arc<Lifecycle>,
}

impl Handlers {
    pub(super) fn new(lifecycle: Arc<Lifecycle>) -> Self {
        Self { lifecycle }
    }

    fn service(&self) -> Result<&GenerationService, Status> {
        self.lifecycle.service().map_err(|error| convert::status(&error, ""))
    }

    /// Of the model that a call names.
    fn served(&self, name: &str, version: &str) -> Result<GenerationService, Status> {
        let found = self.service()?.select(Some(name), Task::Any).and_then(|service| {
            let is_there = convert_kserve::is_version(version);
            if is_there { Ok(service) } else { Err(ApiError::NotFound { what: "version of the model" }) }
        });
        found.map_err(|error| convert::status(&error, ""))
    }
}

/// A client's own id where it can be one.
fn id_of(given: &str) -> String {
    if is_request_id(given) { given.to_owned() } else { request_id() }
}

/// Starts a generation for each prompt. The first draws from the seed, each further one from the next.
async fn start(
    service: &GenerationService,
    request: wire::ModelInferRequest,
    deadline: Option<Instant>,
) -> Result<(Vec<(Generation, String)>, i64, Form), ApiError> {
    let model = Some(request.model_name.clone());
    let request_id = id_of(&request.id);
    let service = &service.select(model.as_deref(), Task::Generate)?;
    let Infer { texts, params, form } = convert_kserve::infer(request, service.limits())?;
    let seed = params.seed.filter(|seed| *seed != -1).unwrap_or_else(|| random_seed() as i64);
    let started = texts.into_iter().enumerate().map(|(index, text)| {
        let seed = match seed.wrapping_add(index as i64) {
            // -1 asks for any seed.
            -1 => i64::MIN,
            seed => seed,
        };
        let request = GenerationRequest {
            request_id: request_id.clone(),
            endpoint: Endpoint::GrpcModelInfer,
            tenant: TenantId::default(),
            model: model.clone(),
            input: Input::Text { text: text.clone(), add_special_tokens: true },
            params: GenerationParams { seed: Some(seed), ..params.clone() },
            deadline,
        };
        let with_prompt = if form.with_prompt { text } else { String::new() };
        async move { Ok::<_, ApiError>((service.generate(request).await?, with_prompt)) }
    });
    Ok((try_join_all(started).await?, seed, form))
}

/// A generation's whole text, behind what it begins with.
async fn text_of((mut generation, mut text): (Generation, String)) -> Result<(String, StopCause, Usage), ApiError> {
    let mut end = StopCause::Length;
    while let Some(event) = generation.next().await {
        match event {
            GenerationEvent::Delta { text: new, .. } => text.push_str(&new),
            GenerationEvent::ChoiceFinished { cause, .. } => end = cause,
            GenerationEvent::Done { usage } => return Ok((text, end, usage)),
            GenerationEvent::Error(error) => return Err(error),
            // Of conversations, which this contract has none of.
            GenerationEvent::PromptLogprobs { .. }
            | GenerationEvent::Reasoning { .. }
            | GenerationEvent::ToolCallPiece { .. }
            | GenerationEvent::ToolCall { .. } => {}
        }
    }
    // A generation ends with `Done` or an error; one that just stops is a bug, and the caller is told so.
    Err(ApiError::Internal { request_id: generation.request_id.clone() })
}

/// All responses to one request of a stream.
async fn responses(
    service: GenerationService,
    request: wire::ModelInferRequest,
    deadline: Option<Instant>,
) -> Responses {
    let id = request.id.clone();
    let started = async {
        let (mut generations, seed, form) = start(&service, request, deadline).await?;
        match (generations.pop(), generations.is_empty()) {
            (Some(generation), true) => Ok((generation, seed, form)),
            _ => Err(ApiError::InvalidRequest {
                param: Some("text_input".into()),
                message: "`text_input` must have one element in a stream".to_owned(),
            }),
        }
    };
    let ((generation, prompt), seed, form) = match started.await {
        Ok(started) => started,
        Err(error) => return Box::pin(stream::once(async move { convert_kserve::failed(id, &error) })),
    };
    let begin = (!prompt.is_empty()).then(|| form.piece(prompt));
    let state = (generation, StopCause::Length, form, id);
    let pieces = stream::unfold(state, move |(mut generation, mut end, form, id)| async move {
        loop {
            let response = match generation.next().await? {
                GenerationEvent::Delta { text, .. } if !text.is_empty() => form.piece(text),
                GenerationEvent::Delta { .. }
                | GenerationEvent::PromptLogprobs { .. }
                | GenerationEvent::Reasoning { .. }
                | GenerationEvent::ToolCallPiece { .. }
                | GenerationEvent::ToolCall { .. } => continue,
                GenerationEvent::ChoiceFinished { cause, .. } => {
                    end = cause;
                    continue;
                }
                GenerationEvent::Done { usage } => form.last(&end, seed, usage),
                GenerationEvent::Error(error) => convert_kserve::failed(id.clone(), &error),
            };
            return Some((response, (generation, end, form, id)));
        }
    });
    Box::pin(stream::iter(begin).chain(pieces))
}

#[tonic::async_trait]
impl GrpcInferenceService for Handlers {
    type ModelStreamInferStream = Pin<Box<dyn Stream<Item = Result<wire::ModelStreamInferResponse, Status>> + Send>>;

    async fn server_live(
        &self,
        _: Request<wire::ServerLiveRequest>,
    ) -> Result<Response<wire::ServerLiveResponse>, Status> {
        Ok(Response::new(wire::ServerLiveResponse { live: self.lifecycle.live().is_ok() }))
    }

    async fn server_ready(
        &self,
        _: Request<wire::ServerReadyRequest>,
    ) -> Result<Response<wire::ServerReadyResponse>, Status> {
        Ok(Response::new(wire::ServerReadyResponse { ready: self.lifecycle.ready().is_ok() }))
    }

    async fn model_ready(
        &self,
        request: Request<wire::ModelReadyRequest>,
    ) -> Result<Response<wire::ModelReadyResponse>, Status> {
        let wire::ModelReadyRequest { name, version } = request.into_inner();
        let ready = self.lifecycle.ready().is_ok() && self.served(&name, &version).is_ok();
        Ok(Response::new(wire::ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        _: Request<wire::ServerMetadataRequest>,
    ) -> Result<Response<wire::ServerMetadataResponse>, Status> {
        Ok(Response::new(convert_kserve::server_metadata()))
    }

    async fn model_metadata(
        &self,
        request: Request<wire::ModelMetadataRequest>,
    ) -> Result<Response<wire::ModelMetadataResponse>, Status> {
        let wire::ModelMetadataRequest { name, version } = request.into_inner();
        let service = self.served(&name, &version)?;
        Ok(Response::new(convert_kserve::model_metadata(service.model(), service.runner())))
    }

    async fn model_infer(
        &self,
        request: Request<wire::ModelInferRequest>,
    ) -> Result<Response<wire::ModelInferResponse>, Status> {
        let service = self.service()?;
        // The extensions hold the body's share of memory until its text is tokens.
        let (metadata, share, message) = request.into_parts();
        let answer = async {
            let deadline = convert::deadline(&metadata, Instant::now())?;
            if service.select(Some(&message.model_name), Task::Embed).is_ok() {
                let id = id_of(&message.id);
                let limits = service.limits();
                let (request, form) = kserve_embed::embed_request(message, id.clone(), deadline, limits)?;
                return Ok((form.answer(service.embed(request).await?), id));
            }
            let (generations, seed, form) = start(service, message, deadline).await?;
            drop(share);
            let id = generations.first().map(|(generation, _)| generation.request_id.clone()).unwrap_or_default();
            let ended = try_join_all(generations.into_iter().map(text_of)).await?;
            let (mut texts, mut causes, mut total) = (Vec::new(), Vec::new(), Usage::default());
            for (text, cause, usage) in ended {
                texts.push(text);
                causes.push(cause);
                total += usage;
            }
            Ok((form.whole(texts, &causes, seed, total), id))
        };
        let (answer, id) = answer.await.map_err(|error: ApiError| convert::status(&error, ""))?;
        let mut response = Response::new(answer);
        convert::name_request(response.metadata_mut(), &id);
        Ok(response)
    }

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<wire::ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        let service = self.service()?.clone();
        let (metadata, _, requests) = request.into_parts();
        let deadline = convert::deadline(&metadata, Instant::now()).map_err(|error| convert::status(&error, ""))?;
        let answers = requests.map(move |request| -> Self::ModelStreamInferStream {
            match request {
                Ok(request) => {
                    let service = service.clone();
                    Box::pin(stream::once(responses(service, request, deadline)).flatten().map(Ok))
                }
                // What cannot be read ends the whole stream.
                Err(status) => Box::pin(stream::once(async move { Err(status) })),
            }
        });
        Ok(Response::new(Box::pin(answers.flatten_unordered(MAX_AT_ONCE))))
    }

    async fn model_config(
        &self,
        request: Request<wire::ModelConfigRequest>,
    ) -> Result<Response<wire::ModelConfigResponse>, Status> {
        let wire::ModelConfigRequest { name, version } = request.into_inner();
        let service = self.served(&name, &version)?;
        Ok(Response::new(convert_kserve::model_config(service.model(), service.runner())))
    }

    async fn repository_index(
        &self,
        request: Request<wire::RepositoryIndexRequest>,
    ) -> Result<Response<wire::RepositoryIndexResponse>, Status> {
        let not_ready = self.lifecycle.ready().err().map(|reason| reason.why());
        if request.into_inner().ready && not_ready.is_some() {
            return Ok(Response::new(wire::RepositoryIndexResponse::default()));
        }
        Ok(Response::new(convert_kserve::index(self.service()?.models(), not_ready)))
    }
}
