//! Vectors, scores and labels, between our contract's messages and the service's types.

use std::sync::Arc;
use std::time::Instant;

use quire_proto::quire::v1 as wire;

use crate::error::ApiError;
use crate::generation::{
    Classified, ClassifyRequest, EmbedRequest, Embedded, PoolingRequest, PoolingText, PoolingTruncation, ScoreRequest,
    Scored, TextPair,
};
use crate::http::ranked;
use crate::metrics::Endpoint;

use super::invalid;

fn request(
    request_id: String,
    endpoint: Endpoint,
    model: String,
    truncation: Option<wire::TextTruncation>,
    deadline: Option<Instant>,
) -> Result<PoolingRequest, ApiError> {
    use wire::text_truncation::To;
    let truncation = match truncation.map(|truncation| truncation.to) {
        None => PoolingTruncation::No,
        Some(Some(To::Tokens(tokens))) => PoolingTruncation::Tokens(u64::from(tokens)),
        Some(Some(To::Fit(true))) => PoolingTruncation::Fit,
        Some(Some(To::Fit(false)) | None) => return Err(invalid("truncation", "must say how long a text may be")),
    };
    let model = (!model.is_empty()).then_some(model);
    Ok(PoolingRequest { request_id, endpoint, model, truncation, deadline })
}

/// Texts in one of two forms, and the name of its field.
fn inputs(texts: Vec<String>, token_ids: Vec<wire::TokenIds>) -> Result<(Vec<PoolingText>, &'static str), ApiError> {
    match (texts.is_empty(), token_ids.is_empty()) {
        (false, false) => Err(invalid("token_ids", "and `texts` cannot be used together")),
        (true, false) => Ok((token_ids.into_iter().map(|list| PoolingText::TokenIds(list.ids)).collect(), "token_ids")),
        _ => Ok((texts.into_iter().map(PoolingText::Text).collect(), "texts")),
    }
}

pub(in crate::grpc) fn embed_request(
    message: wire::EmbedRequest,
    id: String,
    deadline: Option<Instant>,
) -> Result<EmbedRequest, ApiError> {
    let wire::EmbedRequest {
        request_id: _,
        model,
        texts,
        token_ids,
        add_special_tokens,
        dimensions,
        prompt_name,
        truncation,
    } = message;
    let (inputs, param) = inputs(texts, token_ids)?;
    Ok(EmbedRequest {
        request: request(id, Endpoint::GrpcEmbed, model, truncation, deadline)?,
        inputs,
        param,
        add_special_tokens: add_special_tokens.unwrap_or(true),
        dimensions: dimensions.map(u64::from),
        prompt_name: (!prompt_name.is_empty()).then_some(prompt_name),
    })
}

pub(in crate::grpc) fn embedded(embedded: Embedded) -> wire::EmbedResponse {
    let Embedded { model, vectors, num_tokens } = embedded;
    let embeddings = vectors.into_iter().map(|values| wire::Embedding { values }).collect();
    wire::EmbedResponse { embeddings, model, prompt_tokens: num_tokens }
}

pub(in crate::grpc) fn rerank_request(
    message: wire::RerankRequest,
    id: String,
    deadline: Option<Instant>,
) -> Result<ScoreRequest, ApiError> {
    let wire::RerankRequest { request_id: _, model, query, documents, top_n: _, truncation } = message;
    let query: Arc<str> = query.into();
    let pair = |document: String| TextPair { first: Arc::clone(&query), second: document.into() };
    Ok(ScoreRequest {
        request: request(id, Endpoint::GrpcRerank, model, truncation, deadline)?,
        pairs: documents.into_iter().map(pair).collect(),
        param: "documents",
    })
}

pub(in crate::grpc) fn reranked(scored: Scored, top_n: usize) -> wire::RerankResponse {
    let Scored { model, scores, num_tokens } = scored;
    let result = |index: usize| wire::RankedDocument { index: index as u32, relevance_score: scores[index] };
    let results = ranked(&scores, top_n).into_iter().map(result).collect();
    wire::RerankResponse { results, model, prompt_tokens: num_tokens }
}

pub(in crate::grpc) fn classify_request(
    message: wire::ClassifyRequest,
    id: String,
    deadline: Option<Instant>,
) -> Result<ClassifyRequest, ApiError> {
    let wire::ClassifyRequest { request_id: _, model, texts, token_ids, add_special_tokens, truncation } = message;
    let (inputs, param) = inputs(texts, token_ids)?;
    Ok(ClassifyRequest {
        request: request(id, Endpoint::GrpcClassify, model, truncation, deadline)?,
        inputs,
        param,
        add_special_tokens: add_special_tokens.unwrap_or(true),
    })
}

pub(in crate::grpc) fn classified(classified: Classified) -> wire::ClassifyResponse {
    let classification = |probs: &Vec<f32>| wire::Classification {
        label: classified.label(probs).unwrap_or_default().to_owned(),
        probabilities: probs.clone(),
    };
    wire::ClassifyResponse {
        classifications: classified.probs.iter().map(classification).collect(),
        labels: classified.labels.to_vec(),
        model: classified.model,
        prompt_tokens: classified.num_tokens,
    }
}
