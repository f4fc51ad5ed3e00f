//! `/rerank` in the shape that Jina and Cohere made common, and `/score`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::error::ApiError;
use crate::generation::{GenerationService, Limits, ScoreRequest, TextPair, invalid};
use crate::metrics::Endpoint;
use crate::served_models::Task;

use super::answer::json;
use super::ask::json_response;
use super::embeddings::{ListAnswer, PoolingFields, PoolingUsage};
use super::failure::Failure;
use super::fields::{Fields, Ignored, raw_list};
use super::receive::{Body, Parsed, receive};

struct RerankBody {
    common: PoolingFields,
    query: Arc<str>,
    documents: Vec<Arc<str>>,
    /// So many of the best come back; 0 is all.
    top_n: usize,
    return_documents: bool,
    ignored: Ignored,
}

impl Body for RerankBody {
    const TASK: Task = Task::Score;

    fn model(&self) -> Option<&str> {
        self.common.model.as_deref()
    }

    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let Some(query) = fields.string("query")? else { return Err(invalid("query", "is needed")) };
        let Some(raw) = fields.raw("documents") else { return Err(invalid("documents", "is needed")) };
        let documents = raw_list(raw, "documents", limits.max_pooling_texts)?;
        let documents =
            documents.into_iter().enumerate().map(|(index, raw)| document(raw, index)).collect::<Result<_, _>>()?;
        let top_n = fields.count("top_n")?.map_or(0, |count| usize::try_from(count).unwrap_or(usize::MAX));
        let return_documents = fields.bool("return_documents")?.unwrap_or(true);
        // Cohere's names of what models of other makers have.
        fields.refuse(&["rank_fields", "max_chunks_per_doc", "max_tokens_per_doc"])?;
        let common = PoolingFields::read(&mut fields)?;
        let mut ignored = Ignored::default();
        fields.note_ignored(&mut ignored);
        Ok(Self { common, query: query.into(), documents, top_n, return_documents, ignored })
    }

    fn ignored(&self) -> &Ignored {
        &self.ignored
    }
}

/// A text, or an object of one.
fn document(raw: &RawValue, index: usize) -> Result<Arc<str>, ApiError> {
    let name = format!("documents[{index}]");
    let text = match raw.get().starts_with('{') {
        true => Fields::of_value(raw, &name)?.string("text")?,
        false => serde_json::from_str::<String>(raw.get()).ok(),
    };
    text.map(Arc::from).ok_or_else(|| invalid(&name, "must be a string, or an object with a `text`"))
}

/// `POST /v1/rerank`, `/v2/rerank` and `/rerank`
pub(super) async fn rerank(State(service): State<GenerationService>, request: Request) -> Result<Response, Failure> {
    #[derive(Serialize)]
    struct Answer {
        id: String,
        model: String,
        usage: PoolingUsage,
        results: Vec<Ranked>,
    }
    #[derive(Serialize)]
    struct Ranked {
        index: usize,
        #[serde(skip_serializing_if = "Option::is_none")]
        document: Option<Document>,
        relevance_score: f32,
    }
    #[derive(Serialize)]
    struct Document {
        #[serde(serialize_with = "text")]
        text: Arc<str>,
    }
    let Parsed { service, id, body, share } = receive::<RerankBody>(&service, Endpoint::Rerank, request).await?;
    let RerankBody { common, query, documents, top_n, return_documents, ignored } = body;
    let pair = |document: &Arc<str>| TextPair { first: Arc::clone(&query), second: Arc::clone(document) };
    let pairs = documents.iter().map(pair).collect();
    let request = common.request(&id.0, Endpoint::Rerank);
    let answer_id = format!("rerank-{}", request.request_id);
    let scored = service.score(ScoreRequest { request, pairs, param: "documents" }).await?;
    drop(share);
    let ranked = ranked(&scored.scores, top_n).into_iter().map(|index| Ranked {
        index,
        document: return_documents.then(|| Document { text: Arc::clone(&documents[index]) }),
        relevance_score: scored.scores[index],
    });
    let usage = PoolingUsage::of(scored.num_tokens);
    let answer = Answer { id: answer_id, model: scored.model, usage, results: ranked.collect() };
    Ok(json_response(json(&answer), &ignored))
}

fn text<S: serde::Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(text)
}

/// Places of the best scores, the best first; of equal ones the earlier. 0 is all.
pub(crate) fn ranked(scores: &[f32], top_n: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..scores.len()).collect();
    places.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    if top_n > 0 {
        places.truncate(top_n);
    }
    places
}

struct ScoreBody {
    common: PoolingFields,
    pairs: Vec<TextPair>,
    ignored: Ignored,
}

impl Body for ScoreBody {
    const TASK: Task = Task::Score;

    fn model(&self) -> Option<&str> {
        self.common.model.as_deref()
    }

    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let mut either = |names: [&'static str; 3]| -> Result<Vec<Arc<str>>, ApiError> {
            for name in names {
                let texts = fields.strings(name, limits.max_pooling_texts)?;
                if !texts.is_empty() {
                    return Ok(texts.into_iter().map(Arc::from).collect());
                }
            }
            Err(invalid(names[0], "is needed"))
        };
        let firsts = either(["text_1", "queries", "data_1"])?;
        let seconds = either(["text_2", "documents", "data_2"])?;
        let pair =
            |(first, second): (&Arc<str>, &Arc<str>)| TextPair { first: Arc::clone(first), second: Arc::clone(second) };
        let pairs = match firsts.len() {
            1 => seconds.iter().map(|second| pair((&firsts[0], second))).collect(),
            count if count == seconds.len() => firsts.iter().zip(&seconds).map(pair).collect(),
            _ => return Err(invalid("text_1", "must hold one text, or as many as `text_2`")),
        };
        let common = PoolingFields::read(&mut fields)?;
        let mut ignored = Ignored::default();
        fields.note_ignored(&mut ignored);
        Ok(Self { common, pairs, ignored })
    }

    fn ignored(&self) -> &Ignored {
        &self.ignored
    }
}

/// `POST /v1/score` and `/score`
pub(super) async fn score(State(service): State<GenerationService>, request: Request) -> Result<Response, Failure> {
    #[derive(Serialize)]
    struct Entry {
        index: usize,
        object: &'static str,
        score: f32,
    }
    let Parsed { service, id, body, share } = receive::<ScoreBody>(&service, Endpoint::Score, request).await?;
    let ScoreBody { common, pairs, ignored } = body;
    let request = common.request(&id.0, Endpoint::Score);
    let answer_id = format!("score-{}", request.request_id);
    let scored = service.score(ScoreRequest { request, pairs, param: "text_2" }).await?;
    drop(share);
    let entry = |(index, score)| Entry { index, object: "score", score };
    let entries = scored.scores.into_iter().enumerate().map(entry);
    let answer = ListAnswer::of(answer_id, &scored.model, entries, scored.num_tokens);
    Ok(json_response(json(&answer), &ignored))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_come_first_and_equals_keep_their_order() {
        assert_eq!(ranked(&[0.1, 0.9, 0.5, 0.9], 0), [1, 3, 2, 0]);
        assert_eq!(ranked(&[0.1, 0.9, 0.5, 0.9], 2), [1, 3]);
        assert_eq!(ranked(&[0.1], 9), [0]);
    }
}
