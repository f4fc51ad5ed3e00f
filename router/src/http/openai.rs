//! OpenAI-compatible handlers.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::response::Response;
use futures::future::try_join_all;
use serde::Serialize;

use crate::body_budget::BodyShare;
use crate::detokenizer::{SpecialTokenText, TokenTable};
use crate::error::ApiError;
use crate::generation::{GenerationParams, GenerationRequest, GenerationService, Input, TokenInfo};
use crate::metrics::{Endpoint, Outcome, RequestMetrics};
use crate::random::{random_seed, request_id};
use crate::served_model::ServedModel;
use crate::served_models::Task;

use super::answer::{Generations, Head, PromptPart, Shape, json, slice, whole};
use super::ask::{json_response, name_ignored};
use super::failure::Failure;
use super::fields::Ignored;
use super::infill::FimBody;
use super::receive::{Parsed, receive};
use super::sse::ChunkWriter;
use super::stream::{SSE, streamed};
use super::types::{ChatBody, Common, CompletionsBody, DetokenizeBody, Prompt, TokenizeBody};
use super::{RequestId, TENANT};

/// `POST /v1/chat/completions`
pub(super) async fn chat(State(service): State<GenerationService>, request: Request) -> Result<Response, Failure> {
    let Parsed { service, id, body, share } = receive::<ChatBody>(&service, Endpoint::Chat, request).await?;
    let job = Job { service, endpoint: Endpoint::Chat, shape: Shape::Chat, id, share, common: body.common };
    let prompt = JobPrompt { input: Input::Chat(body.input), echo: None };
    let wants_prompt_logprobs = job.common.params.prompt_logprobs.is_some();
    job.answer(vec![prompt], AnswerOptions { wants_prompt_logprobs, echo_only: false }).await
}

/// `POST /v1/completions`
pub(super) async fn completions(
    State(service): State<GenerationService>,
    request: Request,
) -> Result<Response, Failure> {
    let Parsed { service, id, body, share } =
        receive::<CompletionsBody>(&service, Endpoint::Completions, request).await?;
    let CompletionsBody { common, prompts, add_special_tokens, echo, echo_only, wants_prompt_logprobs } = body;
    let prompts = prompts
        .into_iter()
        .map(|prompt| JobPrompt {
            echo: match &prompt {
                _ if !echo => None,
                Prompt::Fim(_) => None,
                Prompt::Text(text) => Some(text.clone()),
                // A longer prompt is refused; its text is not worth the time.
                Prompt::TokenIds(ids) if ids.len() > service.model().info().max_model_len as usize => None,
                Prompt::TokenIds(ids) => Some(service.model().table().decode(ids, SpecialTokenText::Written)),
            },
            input: prompt.into_input(add_special_tokens),
        })
        .collect();
    let job = Job { service, endpoint: Endpoint::Completions, shape: Shape::Completions, id, share, common };
    job.answer(prompts, AnswerOptions { wants_prompt_logprobs, echo_only }).await
}

/// `POST /v1/fim/completions`: Mistral's, answered in the shape of a chat.
pub(super) async fn fim(State(service): State<GenerationService>, request: Request) -> Result<Response, Failure> {
    let Parsed { service, id, body, share } = receive::<FimBody>(&service, Endpoint::FimCompletions, request).await?;
    let endpoint = Endpoint::FimCompletions;
    let job = Job { service, endpoint, shape: Shape::Chat, id, share, common: body.common };
    let prompt = JobPrompt { input: Input::Fim(body.input), echo: None };
    job.answer(vec![prompt], AnswerOptions { wants_prompt_logprobs: false, echo_only: false }).await
}

/// `GET /load`: requests alive now, under vLLM's name.
pub(super) async fn load(State(service): State<GenerationService>) -> Response {
    #[derive(Serialize)]
    struct Answer {
        server_load: usize,
    }
    json_response(json(&Answer { server_load: service.num_inflight() }), &Ignored::default())
}

/// A request of either endpoint, understood.
struct Job {
    service: GenerationService,
    endpoint: Endpoint,
    shape: Shape,
    id: RequestId,
    /// Held until the prompts are tokens.
    share: BodyShare,
    common: Common,
}

struct JobPrompt {
    input: Input,
    /// Its text, where it is to be repeated.
    echo: Option<String>,
}

struct AnswerOptions {
    wants_prompt_logprobs: bool,
    echo_only: bool,
}

impl Job {
    async fn answer(self, prompts: Vec<JobPrompt>, options: AnswerOptions) -> Result<Response, Failure> {
        let Self { service, endpoint, shape, id, share, common } = self;
        let Common { model, request_id, params, stream, return_token_ids, tokens_as_ids, ignored } = common;
        let request_id = request_id.unwrap_or_else(|| id.0.to_string());
        // One seed for the whole answer, so that the answer can name it; each prompt draws from its own, so that equal
        // prompts do not get equal texts.
        let seed = match params.seed {
            Some(seed) if seed != -1 => seed,
            _ => random_seed() as i64,
        };
        let seed_of = |index: usize| match seed.wrapping_add(index as i64) {
            // -1 asks for any seed.
            -1 => i64::MIN,
            seed => seed,
        };

        // Checked before the list is copied for each prompt.
        let vocab_size = service.model().info().vocab_size as usize;
        if params.allowed_token_ids.as_ref().is_some_and(|ids| ids.len() > vocab_size) {
            let message = format!("`allowed_token_ids` must hold at most {vocab_size} token ids");
            let error = ApiError::InvalidRequest { param: Some("allowed_token_ids".into()), message };
            RequestMetrics::start(endpoint).finish(Outcome::from(&error));
            return Err(error.into());
        }
        let num_choices = params.n.unwrap_or(1);
        let max_choices = service.limits().max_prompts as u64;
        if num_choices.saturating_mul(prompts.len() as u64) > max_choices && prompts.len() > 1 {
            let message = format!("`n` times the number of prompts must be at most {max_choices}");
            let error = ApiError::InvalidRequest { param: Some("n".into()), message };
            RequestMetrics::start(endpoint).finish(Outcome::from(&error));
            return Err(error.into());
        }
        let wants_logprobs = params.logprobs.is_some();
        let (inputs, echoes): (Vec<Input>, Vec<Option<String>>) =
            prompts.into_iter().map(|prompt| (prompt.input, prompt.echo)).unzip();
        let started = inputs.into_iter().enumerate().map(|(index, input)| {
            service.generate(GenerationRequest {
                request_id: request_id.clone(),
                endpoint,
                tenant: TENANT,
                model: model.clone(),
                input,
                params: GenerationParams { seed: Some(seed_of(index)), ..params.clone() },
                deadline: None,
            })
        });
        let generations = try_join_all(started).await?;
        drop(share);

        let table = service.model().table();
        let prompts = generations
            .iter()
            .zip(echoes)
            .map(|(generation, echo)| PromptPart {
                token_ids: Arc::clone(&generation.prompt_token_ids),
                first: generation.prompt_token_ids.first().map(|id| TokenInfo {
                    token_id: *id,
                    bytes: table.bytes(*id),
                    num_chars: 0,
                    logprobs: None,
                }),
                num_chars: match &echo {
                    Some(echo) if wants_logprobs => echoed_chars(table, &generation.prompt_token_ids, echo),
                    _ => Vec::new(),
                },
                echo,
            })
            .collect();
        let prefix = match shape {
            Shape::Chat => "chatcmpl",
            Shape::Completions => "cmpl",
        };
        let head = Head {
            shape,
            id: format!("{prefix}-{request_id}"),
            created: generations.first().map_or(0, |generation| generation.created),
            model: service.model().name().to_owned(),
            fingerprint: service.model().fingerprint().to_owned(),
            seed,
            // `generate` refused what does not fit.
            num_choices: num_choices as u32,
            wants_logprobs,
            wants_prompt_logprobs: options.wants_prompt_logprobs,
            return_token_ids,
            tokens_as_ids,
            echo_only: options.echo_only,
            prompts,
        };
        let generations = Generations::new(generations);
        if !stream.stream {
            let body = whole(&head, generations).await?;
            return Ok(json_response(body, &ignored));
        }
        let writer = ChunkWriter::new(head, stream);
        let mut response = streamed(&service, generations, writer, SSE, stream.interval).await?;
        name_ignored(&mut response, &ignored);
        Ok(response)
    }
}

/// How many characters of `echo` each token of the prompt completes. Special tokens are part of an echoed prompt where the
/// request named them, and not where the tokenizer added them.
fn echoed_chars(table: &Arc<TokenTable>, token_ids: &[u32], echo: &str) -> Vec<u32> {
    let written = table.num_chars(token_ids, SpecialTokenText::Written);
    if written.iter().map(|count| *count as usize).sum::<usize>() == echo.chars().count() {
        return written;
    }
    table.num_chars(token_ids, SpecialTokenText::Skipped)
}

/// `POST /tokenize`
pub(super) async fn tokenize(State(service): State<GenerationService>, request: Request) -> Result<Response, Failure> {
    #[derive(Serialize)]
    struct Answer {
        count: usize,
        max_model_len: u32,
        #[serde(serialize_with = "slice")]
        tokens: Arc<[u32]>,
        token_strs: Option<Vec<String>>,
    }
    let Parsed { service, body, share: _share, .. } =
        receive::<TokenizeBody>(&service, Endpoint::Tokenize, request).await?;
    let tokens = service.tokenize(body.input).await?;
    let table = service.model().table();
    let token_strs = body
        .return_token_strs
        .then(|| tokens.iter().map(|id| String::from_utf8_lossy(&table.bytes(*id)).into_owned()).collect());
    let max_model_len = service.model().info().max_model_len;
    let answer = Answer { count: tokens.len(), max_model_len, tokens, token_strs };
    Ok(json_response(json(&answer), &body.ignored))
}

/// `POST /detokenize`
pub(super) async fn detokenize(
    State(service): State<GenerationService>,
    request: Request,
) -> Result<Response, Failure> {
    #[derive(Serialize)]
    struct Answer {
        prompt: String,
    }
    let Parsed { service, body, share: _share, .. } =
        receive::<DetokenizeBody>(&service, Endpoint::Detokenize, request).await?;
    let prompt = service.detokenize(body.tokens).await?;
    Ok(json_response(json(&Answer { prompt }), &body.ignored))
}

/// `GET /tokenizer_info`
pub(super) async fn tokenizer_info(State(service): State<GenerationService>) -> Result<Response, Failure> {
    let model = service.clone();
    let read = tokio::task::spawn_blocking(move || model.model().tokenizer_config()).await;
    match read {
        Ok(Ok(config)) => Ok(json_response(json(&config), &Ignored::default())),
        failed => {
            let request_id = request_id();
            tracing::error!(request_id, failed = ?failed.map(|read| read.map(|_| ())), "cannot read the tokenizer");
            Err(ApiError::Internal { request_id }.into())
        }
    }
}

#[derive(Serialize)]
struct ModelJson<'m> {
    id: &'m str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: &'m str,
    parent: (),
    max_model_len: u32,
}

impl<'m> ModelJson<'m> {
    fn of(model: &'m ServedModel) -> Self {
        Self {
            id: model.name(),
            object: "model",
            created: model.created(),
            owned_by: "quire",
            root: model.name(),
            parent: (),
            max_model_len: model.info().max_model_len,
        }
    }
}

/// `GET /v1/models`
pub(super) async fn models(State(service): State<GenerationService>) -> Response {
    #[derive(Serialize)]
    struct Answer<'m> {
        object: &'static str,
        data: Vec<ModelJson<'m>>,
    }
    let data = service.models().iter().map(|served| ModelJson::of(&served.model)).collect();
    json_response(json(&Answer { object: "list", data }), &Ignored::default())
}

/// `GET /v1/models/{id}`
pub(super) async fn model(
    State(service): State<GenerationService>,
    Path(id): Path<String>,
) -> Result<Response, Failure> {
    let service = service.select(Some(&id), Task::Any)?;
    Ok(json_response(json(&ModelJson::of(service.model())), &Ignored::default()))
}

/// `GET /version`
pub(super) async fn version() -> Response {
    #[derive(Serialize)]
    struct Answer {
        version: &'static str,
    }
    json_response(json(&Answer { version: env!("CARGO_PKG_VERSION") }), &Ignored::default())
}
