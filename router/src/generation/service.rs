//! The handlers themselves.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use quire_engine::scheduler::{FlushReport, SchedulerStats};
use quire_engine::{Grammar, KvEventStream, Submission, SubmitError, SubscribeError};
use quire_scheduler::{AdapterId, CacheSalt, TenantId};
use sha2::{Digest, Sha256};
use tracing::Instrument;

use crate::body_budget::BodyBudget;
use crate::detokenizer::SpecialTokenText;
use crate::error::ApiError;
use crate::fim::FimTokens;
use crate::inflight::{Entered, Inflight};
use crate::metrics::{Endpoint, Outcome, RequestMetrics};
use crate::random::{random_seed, request_id};
use crate::served_model::ServedModel;
use crate::served_models::{Runner, Served, ServedModels, Task};

use super::choice::{Choice, ChoiceRules};
use super::form::{ChatRules, grammar_of};
use super::running::{Generation, Started};
use super::text::{Encoded, TextPool, TextWork, Thought, check_input};
use super::validate::{self, Checked, invalid};
use super::{GenerationParams, GenerationRequest, Input, Keep, Limits, Resume};

/// What a [`GenerationService`] is made of.
pub struct ServiceParts {
    pub models: ServedModels,
    pub limits: Limits,
    pub inflight: Arc<Inflight>,
    /// Shared with the gRPC face.
    pub bodies: BodyBudget,
}

struct Shared {
    models: ServedModels,
    limits: Limits,
    inflight: Arc<Inflight>,
    pool: TextPool,
    bodies: BodyBudget,
}

/// The one set of handlers behind both faces. A clone is another handle to the same service; one that was
/// [selected](Self::select) speaks of one of its models.
#[derive(Clone)]
pub struct GenerationService {
    shared: Arc<Shared>,
    /// Place of the model that it speaks of.
    chosen: usize,
}

impl GenerationService {
    pub fn new(parts: ServiceParts) -> Self {
        let ServiceParts { models, limits, inflight, bodies } = parts;
        let pool = TextPool::new(&limits);
        let chosen = models.find(None, Task::Generate).unwrap_or(0);
        Self { shared: Arc::new(Shared { models, limits, inflight, pool, bodies }), chosen }
    }

    /// The service of the model that a request is for: the one that it names, or the first that does `task`. Fails where there is
    /// none of that name, or it does something else.
    pub fn select(&self, name: Option<&str>, task: Task) -> Result<Self, ApiError> {
        let chosen = self.shared.models.find(name, task)?;
        Ok(Self { shared: Arc::clone(&self.shared), chosen })
    }

    /// Validates, tokenizes and submits a request. An error here means that nothing was started.
    pub async fn generate(&self, request: GenerationRequest) -> Result<Generation, ApiError> {
        let metrics = RequestMetrics::start(request.endpoint);
        let span = tracing::debug_span!("request", request_id = request.request_id);
        let started = async {
            // Before its model is looked for: a server that is going tells nothing else.
            let entered = self.shared.inflight.enter(&request.request_id)?;
            self.select(request.model.as_deref(), Task::Generate)?.start(request, entered).await
        };
        match started.instrument(span).await {
            Ok(started) => Ok(started.into_generation(metrics)),
            Err(error) => {
                metrics.finish(Outcome::from(&error));
                Err(error)
            }
        }
    }

    async fn start(&self, request: GenerationRequest, entered: Entered) -> Result<Started, ApiError> {
        let Shared { limits, pool, .. } = &*self.shared;
        let Served { model, runner: Runner::Generates(worker), .. } = self.chosen() else {
            return Err(invalid("model", "names a model that does not generate text"));
        };
        let GenerationRequest { request_id, endpoint: _, tenant, model: _, input, mut params, deadline } = request;
        let latest = Instant::now() + Duration::from_secs(limits.request_timeout_seconds);
        let deadline = match limits.request_timeout_seconds {
            0 => deadline,
            _ => Some(deadline.map_or(latest, |deadline| deadline.min(latest))),
        };
        let priority = params.priority;
        let cache_salt = params.cache_salt.clone();
        let ignore_eos = params.ignore_eos;
        let resume = params.resume.clone();
        let format = params.format.take();
        let (mut checked, num_bytes) = self.check(&input, params)?;
        let mut eos_token_ids = if ignore_eos { Vec::new() } else { model.info().eos_token_ids.clone() };
        if matches!(input, Input::Fim(_)) && !ignore_eos {
            let ends = model.fim().map(FimTokens::ends).unwrap_or_default();
            eos_token_ids.extend(ends);
            checked.stop_token_ids.extend(ends);
            checked.stop_token_ids.sort_unstable();
            checked.stop_token_ids.dedup();
        }

        let created = now_seconds();
        let cache_salt = derive_cache_salt(tenant, None, &model.info().digest, cache_salt.as_deref());
        let chat = match &input {
            Input::Chat(chat) => Some(ChatRules::of(chat)),
            _ => None,
        };
        let (prompt, bad_words) = match input {
            Input::TokenIds(ids) if checked.bad_words.is_empty() => {
                (Encoded { ids, thought: Thought::None }, Vec::new())
            }
            input => {
                let work = TextWork::new(model, limits, created, Some(cache_salt));
                let bad_words = std::mem::take(&mut checked.bad_words);
                let vocab_size = model.info().vocab_size;
                let encode = pool.run(&request_id, num_bytes, move || {
                    Ok((work.encode(input)?, work.encode_bad_words(&bad_words, vocab_size)?))
                });
                before(deadline, encode.instrument(tracing::debug_span!("tokenize"))).await?
            }
        };
        let Encoded { ids, thought } = prompt;
        let prompt = self.fitted(ids, checked.truncation)?;
        let grammar = match grammar_of(model, limits, chat.as_ref(), format.as_ref(), thought)? {
            Some((param, source)) => {
                Some(before(deadline, model.grammars().compile(param, &request_id, source)).await?)
            }
            None => None,
        };
        let max_tokens = validate::output_len(prompt.len(), &checked, model.info())?;
        if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(ApiError::DeadlineExceeded);
        }
        if let Some(end) = entered.end() {
            return Err(end);
        }

        let seed = checked.seed.unwrap_or_else(random_seed);
        checked.sampling.seed = seed;
        checked.sampling.bad_words = bad_words;
        let num_choices = checked.sampling.num_choices;
        let Resume { generated, choice_offset } = resume.unwrap_or_default();
        let submission = Submission {
            tenant,
            adapter: None,
            priority,
            cache_salt,
            prompt: Arc::clone(&prompt),
            generated,
            choice_offset,
            sampling: checked.sampling,
            max_tokens,
            min_tokens: checked.min_tokens,
            stop_token_ids: checked.stop_token_ids.clone(),
            deadline,
            grammar: grammar.map(|grammar| grammar as Arc<dyn Grammar>),
        };
        let rules = ChoiceRules {
            table: Arc::clone(model.table()),
            stops: checked.stops,
            include_stop: checked.include_stop,
            min_tokens: checked.min_tokens,
            stop_token_ids: checked.stop_token_ids,
            eos_token_ids,
            special_tokens: checked.special_tokens,
            answer: chat.map(|chat| chat.into_answer(model, thought)),
        };
        let mut events = VecDeque::new();
        let mut choices: Vec<Choice> =
            (choice_offset..choice_offset + num_choices).map(|index| Choice::new(index, &rules)).collect();
        for choice in &mut choices {
            choice.replay(&submission.generated, &rules, |event| events.push_back(event));
        }
        let source = worker.submit(submission).await.map_err(submit_error)?;
        Ok(Started { request_id, seed, prompt, created, source, entered, rules, choices, events })
    }

    /// Checks what can be checked before the prompt is tokens, and counts the bytes of text that are to be encoded.
    pub(super) fn check(&self, input: &Input, params: GenerationParams) -> Result<(Checked, usize), ApiError> {
        let (model, limits) = (self.model(), self.limits());
        let checked = validate::check(params, model.defaults(), limits, model.info())?;
        let num_bytes = check_input(input, model, limits)?;
        if matches!(input, Input::Fim(_)) && checked.truncation.is_some() {
            return Err(invalid("truncate_prompt_tokens", "cannot be used for fill-in-the-middle"));
        }
        let num_bytes = num_bytes + checked.bad_words.iter().map(String::len).sum::<usize>();
        Ok((checked, num_bytes))
    }

    /// The tokens that `input` would be served as.
    pub async fn tokenize(&self, input: Input) -> Result<Arc<[u32]>, ApiError> {
        let metrics = RequestMetrics::start(Endpoint::Tokenize);
        let Shared { limits, pool, inflight, .. } = &*self.shared;
        let model = &self.chosen().model;
        let id = request_id();
        let tokens = async {
            let _entered = inflight.enter(&id)?;
            let num_bytes = check_input(&input, model, limits)?;
            let work = TextWork::new(model, limits, now_seconds(), None);
            pool.run(&id, num_bytes, move || Ok(work.encode(input)?.ids)).await
        };
        let tokens = tokens.await;
        metrics.finish(tokens.as_ref().map_or_else(Outcome::from, |_| Outcome::Finished));
        Ok(tokens?.into())
    }

    /// The text of tokens, special tokens included.
    pub async fn detokenize(&self, token_ids: Vec<u32>) -> Result<String, ApiError> {
        let metrics = RequestMetrics::start(Endpoint::Detokenize);
        let Shared { pool, inflight, .. } = &*self.shared;
        let model = &self.chosen().model;
        let id = request_id();
        let (vocab_size, max_len) = (model.info().vocab_size, model.info().max_model_len as usize);
        let text = async {
            let _entered = inflight.enter(&id)?;
            if token_ids.len() > max_len {
                return Err(invalid("tokens", format_args!("must hold at most {max_len} token ids")));
            }
            if token_ids.iter().any(|id| *id >= vocab_size) {
                return Err(invalid("tokens", format_args!("must hold token ids below {vocab_size}")));
            }
            let table = Arc::clone(model.table());
            pool.run(&id, TextPool::MANY, move || Ok(table.decode(&token_ids, SpecialTokenText::Written))).await
        };
        let text = text.await;
        metrics.finish(text.as_ref().map_or_else(Outcome::from, |_| Outcome::Finished));
        text
    }

    /// All models of the server.
    pub fn models(&self) -> &ServedModels {
        &self.shared.models
    }

    fn chosen(&self) -> &Served {
        self.shared.models.get(self.chosen)
    }

    /// The text side of the model that was selected; of the first that generates, where none was.
    pub fn model(&self) -> &ServedModel {
        &self.chosen().model
    }

    /// What runs its requests.
    pub fn runner(&self) -> &Runner {
        &self.chosen().runner
    }

    /// Counters of its engine, as of the last step.
    pub fn stats(&self) -> SchedulerStats {
        self.chosen().stats()
    }

    /// Lets go of all cached blocks of the selected model that no request holds.
    pub(crate) async fn flush_cache(&self) -> Result<FlushReport, ApiError> {
        match self.runner() {
            Runner::Generates(worker) => worker.flush_cache().await.map_err(submit_error),
            Runner::Pools(_) => Ok(FlushReport::default()),
        }
    }

    /// What happens to cached blocks of the selected model; see [`quire_engine::EngineHandle::subscribe_kv_events`].
    pub(crate) async fn subscribe_kv_events(&self, start: u64) -> Result<KvEventStream, ApiError> {
        let not_published = "events of the KV cache are not published: scheduler.kv_events turns them on";
        let Runner::Generates(worker) = self.runner() else {
            return Err(ApiError::NotImplemented { what: not_published });
        };
        worker.subscribe_kv_events(start).await.map_err(|error| match error {
            SubscribeError::NotPublished => ApiError::NotImplemented { what: not_published },
            SubscribeError::TooMany => ApiError::Overloaded { retry_after_seconds: 60 },
            SubscribeError::Stopped => submit_error(SubmitError::Stopped),
        })
    }

    /// The salt of a request that brings none and has no tenant.
    pub(crate) fn plain_salt(&self) -> CacheSalt {
        derive_cache_salt(TenantId::default(), None, &self.model().info().digest, None)
    }

    /// Ready once no request is taken any more.
    pub(crate) async fn drain_begins(&self) {
        self.shared.inflight.drain_begins().await;
    }

    pub(super) fn inflight(&self) -> &Arc<Inflight> {
        &self.shared.inflight
    }

    pub(super) fn pool(&self) -> &TextPool {
        &self.shared.pool
    }

    pub fn limits(&self) -> &Limits {
        &self.shared.limits
    }

    /// Memory for bodies that were received and not turned into tokens yet.
    pub(crate) fn bodies(&self) -> &BodyBudget {
        &self.shared.bodies
    }

    /// Ends a request: its stream's last event is [`ApiError::Cancelled`]. Says whether there was one.
    pub fn abort(&self, request_id: &str) -> bool {
        self.shared.inflight.abort(request_id)
    }

    /// From now on new requests get [`ApiError::Unavailable`]; running ones go on.
    pub fn begin_drain(&self) {
        self.shared.inflight.begin_drain();
    }

    pub fn is_draining(&self) -> bool {
        self.shared.inflight.is_draining()
    }

    /// Requests alive now.
    pub fn num_inflight(&self) -> usize {
        self.shared.inflight.len()
    }

    /// Ends every open stream with [`ApiError::Unavailable`].
    pub fn fail_all(&self, why: &'static str) {
        self.shared.inflight.fail_all(why);
    }

    /// So many of a prompt's tokens, all of them known to the model.
    pub(super) fn fitted(&self, mut prompt: Vec<u32>, limit: Option<(usize, Keep)>) -> Result<Arc<[u32]>, ApiError> {
        match limit {
            Some((limit, Keep::First)) => prompt.truncate(limit),
            Some((limit, Keep::Last)) => drop(prompt.drain(..prompt.len().saturating_sub(limit))),
            None => {}
        }
        // A tokenizer can have more tokens than its model has rows.
        let vocab_size = self.model().info().vocab_size;
        if prompt.iter().any(|id| *id >= vocab_size) {
            return Err(invalid("prompt", "has text whose tokens the model does not know"));
        }
        Ok(prompt.into())
    }
}

/// Awaits `work`, at most until the deadline.
pub(super) async fn before<T>(
    deadline: Option<Instant>,
    work: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    match deadline {
        None => work.await,
        Some(deadline) => {
            tokio::time::timeout_at(deadline.into(), work).await.unwrap_or(Err(ApiError::DeadlineExceeded))
        }
    }
}

fn submit_error(error: SubmitError) -> ApiError {
    match error {
        SubmitError::Scheduler(refusal) => validate::refusal(refusal),
        SubmitError::CommandQueueFull { retry_after_micros } => {
            ApiError::Overloaded { retry_after_seconds: validate::whole_seconds(retry_after_micros) }
        }
        SubmitError::Stopped => ApiError::Unavailable { why: "the engine is stopped" },
    }
}

/// Two requests share cached blocks only where all of these are equal.
fn derive_cache_salt(
    tenant: TenantId,
    adapter: Option<AdapterId>,
    model_digest: &[u8; 32],
    caller_salt: Option<&str>,
) -> CacheSalt {
    let mut hash = Sha256::new();
    hash.update(b"quire cache salt\0");
    hash.update(tenant.0.to_le_bytes());
    hash.update([u8::from(adapter.is_some())]);
    hash.update(adapter.map_or(0, |adapter| adapter.0).to_le_bytes());
    hash.update(model_digest);
    hash.update([u8::from(caller_salt.is_some())]);
    hash.update(caller_salt.unwrap_or_default());
    CacheSalt(hash.finalize().into())
}

pub(super) fn now_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn salts_separate_tenants_adapters_models_and_callers() {
        let salt = |tenant, adapter: Option<u32>, digest, caller| {
            derive_cache_salt(TenantId(tenant), adapter.map(AdapterId), &[digest; 32], caller).0
        };
        let salts = [
            salt(0, None, 0, None),
            salt(1, None, 0, None),
            salt(0, Some(0), 0, None),
            salt(0, Some(1), 0, None),
            salt(0, None, 1, None),
            salt(0, None, 0, Some("")),
            salt(0, None, 0, Some("a")),
        ];
        for (index, one) in salts.iter().enumerate() {
            assert!(salts[index + 1..].iter().all(|other| other != one), "salt {index}");
        }
        assert_eq!(salt(3, Some(4), 5, Some("x")), salt(3, Some(4), 5, Some("x")));
    }
}
