//! `/v1/embeddings`, and what routes of models that pool have in common.

use axum::extract::{Request, State};
use axum::response::Response;
use quire_engine::pooling::PoolingInfo;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::error::ApiError;
use crate::generation::{
    EmbedRequest, GenerationService, Limits, PoolingRequest, PoolingText, PoolingTruncation, invalid,
};
use crate::metrics::Endpoint;
use crate::random::is_request_id;
use crate::served_models::Task;

use super::answer::json;
use super::ask::json_response;
use super::failure::Failure;
use super::fields::{Fields, Ignored};
use super::receive::{Body, Parsed, receive};
use super::types::{Prompt, prompts};

/// What bodies of models that pool have in common.
pub(super) struct PoolingFields {
    pub(super) model: Option<String>,
    pub(super) request_id: Option<String>,
    pub(super) truncation: PoolingTruncation,
}

impl PoolingFields {
    /// Reads them. Some are understood and mean nothing where a text is computed once and kept nowhere.
    pub(super) fn read(fields: &mut Fields<'_>) -> Result<Self, ApiError> {
        let truncation = match fields.integer("truncate_prompt_tokens")? {
            None => PoolingTruncation::No,
            Some(-1) => PoolingTruncation::Fit,
            Some(tokens) => PoolingTruncation::Tokens(
                u64::try_from(tokens).map_err(|_| invalid("truncate_prompt_tokens", "must be at least 1, or -1"))?,
            ),
        };
        fields.refuse_unless("truncation_side", |raw| raw == "\"right\"")?;
        // Texts take turns: there is no order of their own to choose.
        fields.refuse_unless("priority", |raw| raw == "0")?;
        fields.refuse_unless("softmax", |raw| raw == "true")?;
        fields.refuse_unless("padding", |raw| raw == "\"do_not_pad\"")?;
        fields.refuse(&["mm_processor_kwargs", "messages", "instruction"])?;
        let _ = (fields.raw("user"), fields.raw("cache_salt"));
        let request_id = fields.string("request_id")?;
        if request_id.as_ref().is_some_and(|id| !is_request_id(id)) {
            return Err(invalid("request_id", "must have 1 to 128 letters, digits, dots, dashes or underscores"));
        }
        Ok(Self { model: fields.string("model")?, request_id, truncation })
    }

    pub(super) fn request(self, id: &str, endpoint: Endpoint) -> PoolingRequest {
        let Self { model, request_id, truncation } = self;
        let request_id = request_id.unwrap_or_else(|| id.to_owned());
        PoolingRequest { request_id, endpoint, model, truncation, deadline: None }
    }
}

/// A string, a list of strings, a list of token ids, or a list of such lists.
pub(super) fn texts(raw: &RawValue, name: &str, limits: &Limits) -> Result<Vec<PoolingText>, ApiError> {
    let text = |prompt| match prompt {
        Prompt::Text(text) => PoolingText::Text(text),
        Prompt::TokenIds(ids) => PoolingText::TokenIds(ids),
        Prompt::Fim(_) => unreachable!("a list of texts has no gaps"),
    };
    Ok(prompts(raw, name, limits.max_pooling_texts)?.into_iter().map(text).collect())
}

/// How numbers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    Float,
    /// Little-endian f32.
    Base64,
}

/// Texts, and what is wanted of their vectors.
pub(super) struct TextsBody {
    pub(super) common: PoolingFields,
    pub(super) inputs: Vec<PoolingText>,
    pub(super) encoding: Encoding,
    pub(super) dimensions: Option<u64>,
    pub(super) add_special_tokens: bool,
    pub(super) prompt_name: Option<String>,
    /// Whether vectors must have length 1, where that is asked for; other servers' name of it is `use_activation`.
    pub(super) normalize: Option<bool>,
    pub(super) use_activation: Option<bool>,
}

impl TextsBody {
    pub(super) fn read(fields: &mut Fields<'_>, limits: &Limits) -> Result<Self, ApiError> {
        let Some(raw) = fields.raw("input") else { return Err(invalid("input", "is needed")) };
        let inputs = texts(raw, "input", limits)?;
        let encoding = match fields.string("encoding_format")?.as_deref() {
            None | Some("float") => Encoding::Float,
            Some("base64") => Encoding::Base64,
            Some(_) => return Err(invalid("encoding_format", "must be float or base64")),
        };
        fields.refuse_unless("embed_dtype", |raw| raw == "\"float32\"")?;
        fields.refuse_unless("endianness", |raw| matches!(raw, "\"little\"" | "\"native\""))?;
        let (normalize, use_activation) = (fields.bool("normalize")?, fields.bool("use_activation")?);
        let common = PoolingFields::read(fields)?;
        let dimensions = fields.count("dimensions")?;
        let add_special_tokens = fields.bool("add_special_tokens")?.unwrap_or(true);
        let prompt_name = fields.string("prompt_name")?;
        Ok(Self { common, inputs, encoding, dimensions, add_special_tokens, prompt_name, normalize, use_activation })
    }

    /// Vectors have the length that the model's makers gave them; another is refused, not made up.
    pub(super) fn check_length(&self, pooling: &PoolingInfo) -> Result<(), ApiError> {
        let has = pooling.is_normalized;
        match [("normalize", self.normalize), ("use_activation", self.use_activation)]
            .into_iter()
            .find(|(_, wanted)| wanted.is_some_and(|wanted| wanted != has))
        {
            Some((param, _)) => Err(invalid(param, format_args!("must be {has}, as the model is"))),
            None => Ok(()),
        }
    }
}

struct EmbeddingsBody {
    texts: TextsBody,
    ignored: Ignored,
}

impl Body for EmbeddingsBody {
    const TASK: Task = Task::Embed;

    fn model(&self) -> Option<&str> {
        self.texts.common.model.as_deref()
    }

    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let texts = TextsBody::read(&mut fields, limits)?;
        let mut ignored = Ignored::default();
        fields.note_ignored(&mut ignored);
        Ok(Self { texts, ignored })
    }

    fn ignored(&self) -> &Ignored {
        &self.ignored
    }

    fn check_pooling(&mut self, pooling: &PoolingInfo) -> Result<(), ApiError> {
        self.texts.check_length(pooling)
    }
}

/// `POST /v1/embeddings`
pub(super) async fn create(State(service): State<GenerationService>, request: Request) -> Result<Response, Failure> {
    #[derive(Serialize)]
    struct Entry {
        object: &'static str,
        index: usize,
        embedding: Numbers,
    }
    let Parsed { service, id, body, share } =
        receive::<EmbeddingsBody>(&service, Endpoint::Embeddings, request).await?;
    let EmbeddingsBody { texts, ignored } = body;
    let TextsBody { common, inputs, encoding, dimensions, add_special_tokens, prompt_name, .. } = texts;
    let request = common.request(&id.0, Endpoint::Embeddings);
    let answer_id = format!("embd-{}", request.request_id);
    let embedded = service
        .embed(EmbedRequest { request, inputs, param: "input", add_special_tokens, dimensions, prompt_name })
        .await?;
    drop(share);
    let entry = |(index, vector)| Entry { object: "embedding", index, embedding: Numbers::of(vector, encoding) };
    let entries = embedded.vectors.into_iter().enumerate().map(entry);
    let answer = ListAnswer::of(answer_id, &embedded.model, entries, embedded.num_tokens);
    Ok(json_response(json(&answer), &ignored))
}

/// What is answered of each text, in order, in the shape that OpenAI's lists have.
#[derive(Serialize)]
pub(super) struct ListAnswer<'a, T> {
    id: String,
    object: &'static str,
    created: u64,
    model: &'a str,
    data: Vec<T>,
    usage: PoolingUsage,
}

impl<'a, T> ListAnswer<'a, T> {
    pub(super) fn of(id: String, model: &'a str, entries: impl Iterator<Item = T>, num_tokens: u64) -> Self {
        let (created, usage) = (now_seconds(), PoolingUsage::of(num_tokens));
        Self { id, object: "list", created, model, data: entries.collect(), usage }
    }
}

/// Tokens of an answer without output.
#[derive(Serialize)]
pub(super) struct PoolingUsage {
    prompt_tokens: u64,
    total_tokens: u64,
    completion_tokens: u64,
}

impl PoolingUsage {
    pub(super) fn of(num_tokens: u64) -> Self {
        Self { prompt_tokens: num_tokens, total_tokens: num_tokens, completion_tokens: 0 }
    }
}

#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Numbers {
    Float(Vec<f32>),
    Base64(String),
}

impl Numbers {
    pub(super) fn of(vector: Vec<f32>, encoding: Encoding) -> Self {
        match encoding {
            Encoding::Float => Self::Float(vector),
            Encoding::Base64 => Self::Base64(base64(&vector)),
        }
    }
}

/// Little-endian numbers in base64 (RFC 4648, sec. 4).
pub(super) fn base64(vector: &[f32]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for place in 0..4 {
            match place <= group.len() {
                true => text.push(char::from(DIGITS[(bits >> (18 - 6 * place) & 63) as usize])),
                false => text.push('='),
            }
        }
    }
    text
}

fn now_seconds() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_base64_of_their_bytes() {
        // 1.0 is 00 00 80 3f, -2.0 is 00 00 00 c0.
        assert_eq!(base64(&[1.0]), "AACAPw==");
        assert_eq!(base64(&[1.0, -2.0]), "AACAPwAAAMA=");
        assert_eq!(base64(&[1.0, -2.0, 0.0]), "AACAPwAAAMAAAAAA");
        assert_eq!(base64(&[]), "");
    }
}
