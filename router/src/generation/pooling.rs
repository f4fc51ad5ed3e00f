//! Vectors, scores and labels of texts: from what a request holds to numbers, for every face.

use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use futures::future::poll_fn;
use quire_engine::pooling::{PairPrompt, PoolingError, PoolingHandle, PoolingInput, PoolingTask};
use tracing::Instrument;

use crate::error::ApiError;
use crate::inflight::Entered;
use crate::metrics::{Endpoint, Outcome, RequestMetrics};
use crate::served_models::{Runner, Task};
use crate::tokenizer::{EncodeError, SpecialTokens, TextTokenizer};

use super::length_fields::LengthFields;
use super::service::GenerationService;
use super::text::TextPool;
use super::validate::{self, invalid};

/// A text to be embedded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PoolingText {
    Text(String),
    /// Special tokens included.
    TokenIds(Vec<u32>),
}

/// How long a text may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolingTruncation {
    /// A longer one is refused.
    No,
    /// So many tokens of it stay, special tokens included; of a pair the second text loses its end.
    Tokens(u64),
    /// The model's length.
    Fit,
}

/// What every request of a model that pools has.
#[derive(Clone, Debug)]
pub struct PoolingRequest {
    /// Of the form `[A-Za-z0-9._-]{1,128}`; made by the face where the client gave none.
    pub request_id: String,
    /// Where it came in, for the metrics.
    pub endpoint: Endpoint,
    /// `None` takes the first model that does it.
    pub model: Option<String>,
    pub truncation: PoolingTruncation,
    pub deadline: Option<Instant>,
}

/// Texts whose vectors are wanted.
#[derive(Clone, Debug)]
pub struct EmbedRequest {
    pub request: PoolingRequest,
    pub inputs: Vec<PoolingText>,
    /// Named where something is wrong with one.
    pub param: &'static str,
    /// Whether the tokenizer adds its own to texts.
    pub add_special_tokens: bool,
    /// The first so many numbers of each vector, made as long as 1 again where the model's are.
    pub dimensions: Option<u64>,
    /// Which of the model's prompts stands before each text; `None` is its default.
    pub prompt_name: Option<String>,
}

/// Pairs of texts whose scores are wanted.
#[derive(Clone, Debug)]
pub struct ScoreRequest {
    pub request: PoolingRequest,
    pub pairs: Vec<TextPair>,
    /// Named where something is wrong with a pair.
    pub param: &'static str,
}

/// A question and what may answer it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextPair {
    pub first: Arc<str>,
    pub second: Arc<str>,
}

/// Vectors in the order of the texts.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedded {
    pub model: String,
    pub vectors: Vec<Vec<f32>>,
    pub num_tokens: u64,
}

/// Scores in the order of the pairs.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    pub model: String,
    pub scores: Vec<f32>,
    pub num_tokens: u64,
}

impl GenerationService {
    /// A vector of each text. Dropping the future cancels the request.
    pub async fn embed(&self, request: EmbedRequest) -> Result<Embedded, ApiError> {
        let metrics = RequestMetrics::start(request.request.endpoint);
        let span = tracing::debug_span!("request", request_id = request.request.request_id);
        let (embedded, metrics) = self.embed_as(request, metrics).instrument(span).await?;
        metrics.finish(Outcome::Finished);
        Ok(embedded)
    }

    async fn embed_as(
        &self,
        request: EmbedRequest,
        metrics: RequestMetrics,
    ) -> Result<(Embedded, RequestMetrics), ApiError> {
        let EmbedRequest { request, inputs, param, add_special_tokens, dimensions, prompt_name } = request;
        let done = async {
            let running = Running::begin(self, &request, Task::Embed)?;
            let pooling = running.engine.pooling();
            let fields = LengthFields::of(request.endpoint);
            let dimensions = dimensions_of(dimensions, pooling.num_dimensions, fields.dimensions)?;
            self.check_count(param, inputs.len())?;
            let prompt = match &prompt_name {
                None => pooling.default_prompt.clone(),
                Some(name) => {
                    let prompt = pooling.prompts.get(name);
                    Some(prompt.ok_or_else(|| invalid("prompt_name", "is none of the model's prompts"))?.clone())
                }
            };
            let encoder = running.encoder(&request, param)?;
            let encode = move || {
                let encode = |text| encoder.text(text, prompt.as_deref(), add_special_tokens);
                inputs.into_iter().map(encode).collect::<Result<Vec<_>, _>>()
            };
            let inputs = running.encode(&request.request_id, encode).await?;
            let num_tokens = num_tokens(&inputs);
            let mut vectors = running.compute(inputs, &request.request_id, param).await?;
            if let Some(len) = dimensions {
                vectors.iter_mut().for_each(|vector| shorten(vector, len, pooling.is_normalized));
            }
            Ok(Embedded { model: running.service.model().name().to_owned(), vectors, num_tokens })
        };
        counted(done.await, metrics, |embedded| embedded.num_tokens)
    }

    /// A score of each pair. Dropping the future cancels the request.
    pub async fn score(&self, request: ScoreRequest) -> Result<Scored, ApiError> {
        let metrics = RequestMetrics::start(request.request.endpoint);
        let span = tracing::debug_span!("request", request_id = request.request.request_id);
        let (scored, metrics) = self.score_as(request, metrics).instrument(span).await?;
        metrics.finish(Outcome::Finished);
        Ok(scored)
    }

    async fn score_as(
        &self,
        request: ScoreRequest,
        metrics: RequestMetrics,
    ) -> Result<(Scored, RequestMetrics), ApiError> {
        let ScoreRequest { request, pairs, param } = request;
        let done = async {
            let running = Running::begin(self, &request, Task::Score)?;
            self.check_count(param, pairs.len())?;
            let encoder = running.encoder(&request, param)?;
            let is_reranker = running.engine.pooling().task == PoolingTask::Score;
            let pair_prompt = running.engine.pooling().pair_prompt;
            let prompt = running.engine.pooling().default_prompt.clone();
            let encode = move || -> Result<(Vec<PoolingInput>, Vec<[usize; 2]>), ApiError> {
                if is_reranker {
                    let encode = |pair| match &pair_prompt {
                        Some(prompt) => encoder.question(prompt, pair),
                        None => encoder.pair(pair),
                    };
                    let inputs = pairs.iter().map(encode).collect::<Result<_, _>>()?;
                    return Ok((inputs, Vec::new()));
                }
                encoder.each_text_once(&pairs, prompt.as_deref())
            };
            let (inputs, places) = running.encode(&request.request_id, encode).await?;
            let num_tokens = num_tokens(&inputs);
            let vectors = running.compute(inputs, &request.request_id, param).await?;
            let scores = match is_reranker {
                true => vectors.into_iter().map(|score| score[0]).collect(),
                false => places.iter().map(|[a, b]| cosine(&vectors[*a], &vectors[*b])).collect(),
            };
            Ok(Scored { model: running.service.model().name().to_owned(), scores, num_tokens })
        };
        counted(done.await, metrics, |scored| scored.num_tokens)
    }

    pub(super) fn check_count(&self, param: &str, count: usize) -> Result<(), ApiError> {
        let limit = self.limits().max_pooling_texts;
        match count {
            0 => Err(invalid(param, "must not be empty")),
            count if count > limit => Err(invalid(param, format_args!("must have at most {limit} entries"))),
            _ => Ok(()),
        }
    }
}

/// Counts a request's tokens, or its failure.
pub(super) fn counted<T>(
    done: Result<T, ApiError>,
    mut metrics: RequestMetrics,
    num_tokens: impl FnOnce(&T) -> u64,
) -> Result<(T, RequestMetrics), ApiError> {
    match done {
        Ok(done) => {
            metrics.prompt_tokens(u32::try_from(num_tokens(&done)).unwrap_or(u32::MAX), 0);
            Ok((done, metrics))
        }
        Err(error) => {
            metrics.finish(Outcome::from(&error));
            Err(error)
        }
    }
}

pub(super) fn num_tokens(inputs: &[PoolingInput]) -> u64 {
    inputs.iter().map(|input| input.token_ids.len() as u64).sum()
}

fn dimensions_of(wanted: Option<u64>, has: u32, param: &str) -> Result<Option<usize>, ApiError> {
    match wanted {
        None => Ok(None),
        Some(len) if (1..=u64::from(has)).contains(&len) => Ok(Some(len as usize)),
        Some(_) => Err(invalid(param, format_args!("must be from 1 to {has}"))),
    }
}

fn shorten(vector: &mut Vec<f32>, len: usize, is_normalized: bool) {
    vector.truncate(len);
    if is_normalized {
        let length = length(vector).max(1e-12);
        vector.iter_mut().for_each(|number| *number = (f64::from(*number) / length) as f32);
    }
}

fn length(vector: &[f32]) -> f64 {
    vector.iter().map(|number| f64::from(*number).powi(2)).sum::<f64>().sqrt()
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let product: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    (product / (length(a) * length(b)).max(1e-12)) as f32
}

/// A request that was let in.
pub(super) struct Running {
    pub(super) service: GenerationService,
    pub(super) engine: PoolingHandle,
    entered: Entered,
    deadline: Option<Instant>,
}

impl Running {
    pub(super) fn begin(service: &GenerationService, request: &PoolingRequest, task: Task) -> Result<Self, ApiError> {
        let entered = service.inflight().enter(&request.request_id)?;
        let service = service.select(request.model.as_deref(), task)?;
        let Runner::Pools(engine) = service.runner() else {
            return Err(invalid("model", "names a model that generates text"));
        };
        let engine = engine.clone();
        let deadline = match service.limits().request_timeout_seconds {
            0 => request.deadline,
            seconds => {
                let latest = Instant::now() + Duration::from_secs(seconds);
                Some(request.deadline.map_or(latest, |deadline| deadline.min(latest)))
            }
        };
        Ok(Self { service, engine, entered, deadline })
    }

    pub(super) fn encoder(&self, request: &PoolingRequest, param: &'static str) -> Result<TextEncoder, ApiError> {
        let fields = LengthFields::of(request.endpoint);
        let max_len = self.engine.model().max_model_len as usize;
        let limit = match request.truncation {
            PoolingTruncation::No => None,
            PoolingTruncation::Fit => Some(max_len),
            PoolingTruncation::Tokens(tokens) if (1..=max_len as u64).contains(&tokens) => Some(tokens as usize),
            PoolingTruncation::Tokens(_) => return Err(fields.refused_tokens(max_len)),
        };
        let special_tokens = match self.service.limits().special_tokens_in_prompts {
            true => SpecialTokens::Parsed,
            false => SpecialTokens::AsText,
        };
        let tokenizer = Arc::clone(self.service.model().tokenizer());
        Ok(TextEncoder { tokenizer, special_tokens, limit, max_len, param, fields })
    }

    pub(super) async fn encode<T: Send + 'static>(
        &self,
        request_id: &str,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let span = tracing::debug_span!("tokenize");
        let work = self.service.pool().run(request_id, TextPool::MANY, work);
        super::service::before(self.deadline, work.instrument(span)).await
    }

    /// The engine's answer, or why the request is ended before it.
    pub(super) async fn compute(
        &self,
        inputs: Vec<PoolingInput>,
        request_id: &str,
        param: &'static str,
    ) -> Result<Vec<Vec<f32>>, ApiError> {
        let mut answer = std::pin::pin!(self.engine.compute(inputs, self.deadline));
        let answer = poll_fn(|cx| {
            if let Poll::Ready(error) = self.entered.poll_end(cx) {
                return Poll::Ready(Err(error));
            }
            answer.as_mut().poll(cx).map(|answer| answer.map_err(|error| refusal(error, request_id, param)))
        });
        super::service::before(self.deadline, answer).await
    }
}

fn refusal(error: PoolingError, request_id: &str, param: &str) -> ApiError {
    match error {
        PoolingError::Invalid { index, why } => invalid(&format!("{param}[{index}]"), why),
        PoolingError::QueueFull { retry_after_micros } => {
            ApiError::Overloaded { retry_after_seconds: validate::whole_seconds(retry_after_micros) }
        }
        PoolingError::DeadlineExceeded => ApiError::DeadlineExceeded,
        PoolingError::NonFinite => {
            tracing::error!(request_id, "the device computed numbers that are not finite");
            ApiError::Internal { request_id: request_id.to_owned() }
        }
        PoolingError::Stopped => ApiError::Unavailable { why: "the engine is stopped" },
    }
}

/// Texts to tokens, within the model's length.
pub(super) struct TextEncoder {
    tokenizer: Arc<TextTokenizer>,
    special_tokens: SpecialTokens,
    /// Longer texts are cut to it; `None` refuses them.
    limit: Option<usize>,
    max_len: usize,
    param: &'static str,
    fields: LengthFields,
}

impl TextEncoder {
    pub(super) fn text(
        &self,
        text: PoolingText,
        prompt: Option<&str>,
        add_special_tokens: bool,
    ) -> Result<PoolingInput, ApiError> {
        let token_ids = match text {
            PoolingText::TokenIds(mut ids) => {
                ids.truncate(self.limit.unwrap_or(usize::MAX));
                ids
            }
            PoolingText::Text(text) => {
                let text = prompt.map_or(text.clone(), |prompt| format!("{prompt}{text}"));
                let mut ids = self.plain(&text)?;
                if add_special_tokens {
                    let (prefix, suffix) = (self.tokenizer.prefix(), self.tokenizer.suffix());
                    self.cut(&mut ids, prefix.len() + suffix.len());
                    ids = [prefix, &ids, suffix].concat();
                } else {
                    self.cut(&mut ids, 0);
                }
                ids
            }
        };
        self.checked(PoolingInput { token_ids, second_from: None })
    }

    fn pair(&self, pair: &TextPair) -> Result<PoolingInput, ApiError> {
        let Some(template) = self.tokenizer.pair_template() else {
            return Err(invalid("model", "names a model whose tokenizer makes no pairs"));
        };
        let (first, mut second) = (self.plain(&pair.first)?, self.plain(&pair.second)?);
        self.cut(&mut second, first.len() + template.num_tokens());
        let (token_ids, second_from) = template.join(&first, &second);
        self.checked(PoolingInput { token_ids, second_from: Some(second_from) })
    }

    /// A pair as it is put to a model that judges: its own words, and texts that are nothing but text.
    fn question(&self, prompt: &PairPrompt, pair: &TextPair) -> Result<PoolingInput, ApiError> {
        let own = |text| self.encoded(text, SpecialTokens::Parsed);
        let (head, tail) = (own(prompt.head)?, own(prompt.tail)?);
        let body = [prompt.lead, &pair.first, prompt.between, &pair.second].concat();
        let mut body = self.plain(&body)?;
        self.cut(&mut body, head.len() + tail.len());
        self.checked(PoolingInput { token_ids: [head, body, tail].concat(), second_from: None })
    }

    /// Texts of pairs, those that are there more than once once, and where each pair's are.
    fn each_text_once(
        &self,
        pairs: &[TextPair],
        prompt: Option<&str>,
    ) -> Result<(Vec<PoolingInput>, Vec<[usize; 2]>), ApiError> {
        let mut inputs = Vec::new();
        let mut places = std::collections::HashMap::<Arc<str>, usize>::new();
        let mut place_of = |text: &Arc<str>| -> Result<usize, ApiError> {
            if let Some(place) = places.get(text) {
                return Ok(*place);
            }
            inputs.push(self.text(PoolingText::Text(text.to_string()), prompt, true)?);
            places.insert(Arc::clone(text), inputs.len() - 1);
            Ok(inputs.len() - 1)
        };
        let mut of_pairs = Vec::with_capacity(pairs.len());
        for pair in pairs {
            of_pairs.push([place_of(&pair.first)?, place_of(&pair.second)?]);
        }
        Ok((inputs, of_pairs))
    }

    fn plain(&self, text: &str) -> Result<Vec<u32>, ApiError> {
        self.encoded(text, self.special_tokens)
    }

    fn encoded(&self, text: &str, special_tokens: SpecialTokens) -> Result<Vec<u32>, ApiError> {
        self.tokenizer.encode(text, special_tokens, false).map_err(|error: EncodeError| ApiError::InvalidRequest {
            param: Some(self.param.to_owned()),
            message: format!("`{}`: {error}", self.param),
        })
    }

    /// Cuts tokens off the end, where so many others go with them.
    fn cut(&self, ids: &mut Vec<u32>, num_others: usize) {
        if let Some(limit) = self.limit {
            ids.truncate(limit.saturating_sub(num_others));
        }
    }

    fn checked(&self, input: PoolingInput) -> Result<PoolingInput, ApiError> {
        let len = input.token_ids.len();
        if len > self.max_len {
            return Err(ApiError::ContextTooLong { message: self.fields.too_long(len, self.max_len) });
        }
        Ok(input)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shorter_vectors_are_as_long_as_they_were() {
        let mut vector = vec![0.6, 0.0, 0.8];
        shorten(&mut vector, 1, true);
        assert_eq!(vector, [1.0]);
        let mut raw = vec![3.0, 4.0];
        shorten(&mut raw, 1, false);
        assert_eq!(raw, [3.0]);
        assert!([0, 4].into_iter().all(|len| dimensions_of(Some(len), 3, "dimensions").is_err()));
        assert!((cosine(&[1.0, 1.0], &[2.0, 0.0]) - 0.5_f32.sqrt()).abs() < 1e-6);
        assert_eq!(cosine(&[0.0], &[1.0]), 0.0);
    }
}
