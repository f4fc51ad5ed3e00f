//! Ollama's dialect: `/api/chat`, `/api/generate` and the routes that say what there is.

mod about;
mod body;
mod embed;
mod wire;

use std::time::Instant;

use axum::extract::{Request, State};
use axum::response::Response;

use crate::body_budget::BodyShare;
use crate::generation::{Generation, GenerationService, invalid};
use crate::metrics::Endpoint;

use super::RequestId;
use super::answer::Generations;
use super::ask::{Ask, json_response, name_ignored, whole};
use super::failure::Failure;
use super::receive::{Parsed, receive};
use super::stream::{NDJSON, streamed};

use body::{ChatBody, GenerateBody, Wanted};
use wire::LineWriter;

pub(super) use about::{running, show, tags, version};
pub(super) use embed::embed;

/// `POST /api/chat`
pub(super) async fn chat(State(service): State<GenerationService>, request: Request) -> Result<Response, Failure> {
    let Parsed { service, id, body, share } = receive::<ChatBody>(&service, Endpoint::OllamaChat, request).await?;
    answer(service, Endpoint::OllamaChat, id, body.0, share).await
}

/// `POST /api/generate`
pub(super) async fn generate(State(service): State<GenerationService>, request: Request) -> Result<Response, Failure> {
    let Parsed { service, id, body, share } =
        receive::<GenerateBody>(&service, Endpoint::OllamaGenerate, request).await?;
    answer(service, Endpoint::OllamaGenerate, id, body.0, share).await
}

async fn answer(
    service: GenerationService,
    endpoint: Endpoint,
    id: RequestId,
    wanted: Wanted,
    share: BodyShare,
) -> Result<Response, Failure> {
    let begun = Instant::now();
    let Wanted { model, input, params, num_ctx, stream, ignored } = wanted;
    let max_model_len = service.model().info().max_model_len;
    if num_ctx.is_some_and(|len| len > u64::from(max_model_len)) {
        let must = format!("must be at most {max_model_len}, the model's length");
        return Err(invalid("options.num_ctx", must).into());
    }
    let writer = LineWriter::new(service.model().name().to_owned(), endpoint, begun);
    let Some(input) = input else {
        return Ok(json_response(writer.loaded(), &ignored));
    };
    let ask = Ask { endpoint, request_id: id.0.to_string(), model, input, params };
    let generation: Generation = ask.start(&service).await?;
    drop(share);
    if stream {
        let mut response = streamed(&service, Generations::new(vec![generation]), writer, NDJSON, 1).await?;
        name_ignored(&mut response, &ignored);
        return Ok(response);
    }
    Ok(json_response(writer.ended(whole(generation).await?), &ignored))
}
