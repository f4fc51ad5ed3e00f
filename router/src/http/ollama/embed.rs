//! Ollama's `/api/embed`.

use std::time::Instant;

use axum::extract::{Request, State};
use axum::response::Response;
use serde::Serialize;

use crate::error::ApiError;
use crate::generation::{
    EmbedRequest, GenerationService, Limits, PoolingRequest, PoolingText, PoolingTruncation, invalid,
};
use crate::http::answer::json as to_json;
use crate::http::ask::json_response;
use crate::http::embeddings::texts;
use crate::http::failure::Failure;
use crate::http::fields::{Fields, Ignored};
use crate::http::receive::{Body, Parsed, receive};
use crate::metrics::Endpoint;
use crate::served_models::Task;

use super::body::without_tag;

struct EmbedBody {
    model: String,
    inputs: Vec<PoolingText>,
    truncation: PoolingTruncation,
    dimensions: Option<u64>,
    ignored: Ignored,
}

impl Body for EmbedBody {
    const TASK: Task = Task::Embed;

    fn model(&self) -> Option<&str> {
        Some(&self.model)
    }

    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let Some(model) = fields.string("model")?.map(without_tag) else { return Err(invalid("model", "is needed")) };
        let inputs = match fields.raw("input") {
            Some(raw) => texts(raw, "input", limits)?,
            None => return Err(invalid("input", "is needed")),
        };
        let truncation = match fields.bool("truncate")?.unwrap_or(true) {
            true => PoolingTruncation::Fit,
            false => PoolingTruncation::No,
        };
        let dimensions = fields.count("dimensions")?;
        // A served model stays, and the machine is the operator's.
        let _ = (fields.raw("keep_alive"), fields.raw("options"));
        let mut ignored = Ignored::default();
        fields.note_ignored(&mut ignored);
        Ok(Self { model, inputs, truncation, dimensions, ignored })
    }

    fn ignored(&self) -> &Ignored {
        &self.ignored
    }
}

/// `POST /api/embed`
pub(in crate::http) async fn embed(
    State(service): State<GenerationService>,
    request: Request,
) -> Result<Response, Failure> {
    #[derive(Serialize)]
    struct Answer {
        model: String,
        embeddings: Vec<Vec<f32>>,
        /// Nanoseconds.
        total_duration: u64,
        load_duration: u64,
        prompt_eval_count: u64,
    }
    let begun = Instant::now();
    let Parsed { service, id, body, share } = receive::<EmbedBody>(&service, Endpoint::OllamaEmbed, request).await?;
    let EmbedBody { model, inputs, truncation, dimensions, ignored } = body;
    let request = PoolingRequest {
        request_id: id.0.to_string(),
        endpoint: Endpoint::OllamaEmbed,
        model: Some(model),
        truncation,
        deadline: None,
    };
    let embedded = service
        .embed(EmbedRequest {
            request,
            inputs,
            param: "input",
            add_special_tokens: true,
            dimensions,
            prompt_name: None,
        })
        .await?;
    drop(share);
    let answer = Answer {
        model: embedded.model,
        embeddings: embedded.vectors,
        total_duration: u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX),
        load_duration: 0,
        prompt_eval_count: embedded.num_tokens,
    };
    Ok(json_response(to_json(&answer), &ignored))
}
