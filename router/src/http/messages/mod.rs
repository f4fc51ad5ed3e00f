//! Anthropic's dialect: `/v1/messages` and `/v1/messages/count_tokens`.

mod body;
mod wire;

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::json;

use crate::generation::{GenerationService, Input, Usage};
use crate::metrics::Endpoint;
use crate::random::random_u64;

use super::answer::{Generations, json as to_json};
use super::ask::{Ask, json_response, name_ignored, whole};
use super::failure::Failure;
use super::receive::{Parsed, receive};
use super::stream::{SSE, streamed};

use body::{CountBody, MessagesBody};
use wire::{Head, MessageStream};

/// `POST /v1/messages`
pub(super) async fn create(State(service): State<GenerationService>, request: Request) -> Result<Response, Failure> {
    let Parsed { service, id, body, share } = receive::<MessagesBody>(&service, Endpoint::Messages, request).await?;
    let MessagesBody { conversation, params, stream, ignored } = body;
    let ask = Ask {
        endpoint: Endpoint::Messages,
        request_id: id.0.to_string(),
        model: conversation.model,
        input: Input::Chat(conversation.input),
        params,
    };
    let generation = ask.start(&service).await?;
    drop(share);
    let head = Head {
        id: format!("msg_{:016x}{:016x}", random_u64(), random_u64()),
        request_id: id.0.to_string(),
        model: service.model().name().to_owned(),
        prompt: Usage { prompt_tokens: generation.prompt_token_ids.len() as u32, ..Usage::default() },
    };
    if stream {
        let generations = Generations::new(vec![generation]);
        let mut response = streamed(&service, generations, MessageStream::new(head), SSE, 1).await?;
        name_ignored(&mut response, &ignored);
        return Ok(response);
    }
    let whole = whole(generation).await?;
    Ok(json_response(to_json(&head.ended(&whole)), &ignored))
}

/// `POST /v1/messages/count_tokens`
pub(super) async fn count_tokens(
    State(service): State<GenerationService>,
    request: Request,
) -> Result<Response, Failure> {
    let Parsed { service, body, share: _share, .. } =
        receive::<CountBody>(&service, Endpoint::CountTokens, request).await?;
    let tokens = service.tokenize(Input::Chat(body.conversation.input)).await?;
    Ok(json_response(to_json(&json!({"input_tokens": tokens.len()})), &body.ignored))
}
