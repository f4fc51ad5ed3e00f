//! `/v1/chat/completions/render` and `/v1/completions/render`, as vLLM names them: a request's prompt in tokens.

use axum::extract::{Request, State};
use axum::response::Response;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::generation::{GenerationParams, GenerationService, Input, Rendered};
use crate::metrics::Endpoint;

use super::RequestId;
use super::answer::json;
use super::ask::json_response;
use super::failure::Failure;
use super::receive::{Parsed, receive};
use super::types::{ChatBody, Common, CompletionsBody};

#[derive(Serialize)]
struct Prompt {
    request_id: String,
    model: String,
    token_ids: Vec<u32>,
    sampling_params: Map<String, Value>,
    stream: bool,
    cache_salt: Option<String>,
    priority: i32,
}

/// What the request says of sampling, under the names that it has there, and nothing else.
fn sampling_params(params: &GenerationParams, max_tokens: u32) -> Map<String, Value> {
    let GenerationParams { n, temperature, top_k, top_p, min_p, typical_p, seed, .. } = params;
    let mut named = Map::new();
    for (name, value) in [
        ("n", json!(n)),
        ("temperature", json!(temperature)),
        ("top_k", json!(top_k)),
        ("top_p", json!(top_p)),
        ("min_p", json!(min_p)),
        ("typical_p", json!(typical_p)),
        ("seed", json!(seed)),
        ("repetition_penalty", json!(params.repetition_penalty)),
        ("presence_penalty", json!(params.presence_penalty)),
        ("frequency_penalty", json!(params.frequency_penalty)),
        ("logit_bias", json!((!params.logit_bias.is_empty()).then_some(&params.logit_bias))),
        ("allowed_token_ids", json!(params.allowed_token_ids)),
        ("bad_words", json!((!params.bad_words.is_empty()).then_some(&params.bad_words))),
        ("stop", json!((!params.stop.is_empty()).then_some(&params.stop))),
        ("stop_token_ids", json!((!params.stop_token_ids.is_empty()).then_some(&params.stop_token_ids))),
        ("include_stop_str_in_output", json!(params.include_stop_str_in_output.then_some(true))),
        ("ignore_eos", json!(params.ignore_eos.then_some(true))),
        ("min_tokens", json!(params.min_tokens)),
        ("max_tokens", json!(max_tokens)),
        ("logprobs", json!(params.logprobs)),
        ("prompt_logprobs", json!(params.prompt_logprobs)),
        ("skip_special_tokens", json!(params.skip_special_tokens)),
    ] {
        if !value.is_null() {
            named.insert(name.to_owned(), value);
        }
    }
    named
}

async fn render(
    service: &GenerationService,
    id: &RequestId,
    common: &Common,
    input: Input,
) -> Result<Prompt, ApiError> {
    let Common { params, request_id, stream, .. } = common;
    let Rendered { token_ids, max_tokens } = service.render(input, params.clone()).await?;
    Ok(Prompt {
        request_id: request_id.clone().unwrap_or_else(|| id.0.to_string()),
        model: service.model().name().to_owned(),
        token_ids: token_ids.to_vec(),
        sampling_params: sampling_params(params, max_tokens),
        stream: stream.stream,
        cache_salt: params.cache_salt.clone(),
        priority: params.priority,
    })
}

/// `POST /v1/chat/completions/render`
pub(super) async fn chat(State(service): State<GenerationService>, request: Request) -> Result<Response, Failure> {
    let Parsed { service, id, body, share: _share } = receive::<ChatBody>(&service, Endpoint::Render, request).await?;
    let ChatBody { common, input } = body;
    let prompt = render(&service, &id, &common, Input::Chat(input)).await?;
    Ok(json_response(json(&prompt), &common.ignored))
}

/// `POST /v1/completions/render`: a list, of one for each prompt.
pub(super) async fn completions(
    State(service): State<GenerationService>,
    request: Request,
) -> Result<Response, Failure> {
    let Parsed { service, id, body, share: _share } =
        receive::<CompletionsBody>(&service, Endpoint::Render, request).await?;
    let CompletionsBody { common, prompts, add_special_tokens, .. } = body;
    let mut rendered = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        rendered.push(render(&service, &id, &common, prompt.into_input(add_special_tokens)).await?);
    }
    Ok(json_response(json(&rendered), &common.ignored))
}
