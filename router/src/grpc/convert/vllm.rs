//! `vllm.grpc.engine` and our types. The wire has tokens and no text: whoever calls has the tokenizer.

use std::time::Instant;

use quire_engine::ModelInfo;
use quire_engine::scheduler::{SchedulerStats, TenantId};
use quire_proto::vllm::grpc::engine as wire;
use quire_proto::vllm::grpc::engine::generate_response::Response;
use quire_proto::vllm::grpc::engine::sampling_params::Constraint;

use crate::error::ApiError;
use crate::generation::{
    EmbedRequest, Embedded, GenerationEvent, GenerationParams, GenerationRequest, GenerationService, Input, Keep,
    NamedLogprobs, PoolingRequest, PoolingText, PoolingTruncation, RequestedFormat, StopCause, TokenInfo, TruncateTo,
    Truncation, Usage,
};
use crate::grammar::OutputFormat;
use crate::metrics::Endpoint;
use crate::served_models::Runner;
use crate::telemetry::format_time;

use super::invalid;

/// A request to continue a prompt.
pub(in crate::grpc) fn generate_request(
    request: wire::GenerateRequest,
    request_id: String,
    deadline: Option<Instant>,
) -> Result<GenerationRequest, ApiError> {
    let wire::GenerateRequest {
        request_id: _,
        input,
        sampling_params,
        stream: _,
        kv_transfer_params,
        mm_inputs,
        kv_transfer_params_json,
        media_refs,
        extra_mm_inputs,
        data_parallel_rank,
    } = request;
    for (param, is_set) in [
        ("kv_transfer_params", kv_transfer_params.is_some()),
        ("kv_transfer_params_json", kv_transfer_params_json.is_some()),
        ("mm_inputs", mm_inputs.is_some()),
        ("extra_mm_inputs", !extra_mm_inputs.is_empty()),
        ("media_refs", media_refs.is_some()),
    ] {
        if is_set {
            return Err(invalid(param, "is not supported"));
        }
    }
    if data_parallel_rank.is_some_and(|rank| rank != 0) {
        return Err(invalid("data_parallel_rank", "must be 0: there is one rank"));
    }
    let input = match input {
        Some(wire::generate_request::Input::Tokenized(tokens)) => Input::TokenIds(tokens.input_ids),
        Some(wire::generate_request::Input::Text(text)) => Input::Text { text, add_special_tokens: true },
        None => return Err(invalid("input", "is needed: tokenized or text")),
    };
    Ok(GenerationRequest {
        request_id,
        endpoint: Endpoint::GrpcVllmGenerate,
        tenant: TenantId::default(),
        model: None,
        input,
        params: params(sampling_params.unwrap_or_default())?,
        deadline,
    })
}

/// The gateway has put defaults in place; what is absent is neutral, so that the server's own do not come on top.
fn params(sampling: wire::SamplingParams) -> Result<GenerationParams, ApiError> {
    // Taken apart by name, so that a field added to the contract is an error here until it is served.
    let wire::SamplingParams {
        temperature,
        top_p,
        top_k,
        min_p,
        frequency_penalty,
        presence_penalty,
        repetition_penalty,
        max_tokens,
        min_tokens,
        stop,
        stop_token_ids,
        skip_special_tokens,
        spaces_between_special_tokens: _,
        ignore_eos,
        n,
        logprobs,
        prompt_logprobs,
        seed,
        include_stop_str_in_output,
        logit_bias,
        truncate_prompt_tokens,
        grammar_from_first_token: _,
        constraint,
    } = sampling;
    let format = match constraint {
        None | Some(Constraint::JsonObject(false)) => None,
        Some(Constraint::JsonObject(true)) => Some(OutputFormat::JsonObject),
        Some(Constraint::JsonSchema(schema)) => Some(OutputFormat::JsonSchema(schema.into())),
        Some(Constraint::Regex(regex)) => Some(OutputFormat::Regex(regex.into())),
        Some(Constraint::Choice(wire::ChoiceConstraint { choices })) => Some(OutputFormat::Choice(choices)),
        Some(Constraint::Grammar(grammar)) => Some(OutputFormat::Lark(grammar.into())),
        Some(Constraint::StructuralTag(_)) => {
            return Err(invalid("sampling_params.structural_tag", "is not supported over this contract"));
        }
    };
    let count = |param: &str, count: Option<i32>| match count.map(u64::try_from) {
        None => Ok(None),
        Some(Ok(count)) => Ok(Some(count)),
        Some(Err(_)) => Err(invalid(param, "must be at least 0; -1 (all tokens) is not supported")),
    };
    let neutral = |value: f32| if value == 0.0 { 1.0 } else { f64::from(value) };
    let logit_bias = logit_bias.into_iter().map(|(id, bias)| match u32::try_from(id) {
        Ok(id) => Ok((id, f64::from(bias))),
        Err(_) => Err(invalid("sampling_params.logit_bias", "must name token ids from 0 on")),
    });
    let truncation = match truncate_prompt_tokens {
        None => None,
        Some(-1) => Some(TruncateTo::Fit),
        Some(count) => {
            let count =
                u64::try_from(count).map_err(|_| invalid("truncate_prompt_tokens", "must be at least 1, or -1"))?;
            Some(TruncateTo::Tokens(count))
        }
    };
    Ok(GenerationParams {
        max_tokens: max_tokens.map(u64::from),
        min_tokens: Some(min_tokens.into()),
        n: Some(n.max(1).into()),
        temperature: Some(temperature.map_or(1.0, f64::from)),
        top_k: Some(top_k.into()),
        top_p: Some(neutral(top_p)),
        min_p: Some(min_p.into()),
        typical_p: Some(1.0),
        repetition_penalty: Some(neutral(repetition_penalty)),
        presence_penalty: Some(presence_penalty.into()),
        frequency_penalty: Some(frequency_penalty.into()),
        logit_bias: logit_bias.collect::<Result<_, _>>()?,
        stop,
        include_stop_str_in_output,
        stop_token_ids,
        ignore_eos,
        seed: seed.map(i64::from),
        logprobs: count("logprobs", logprobs)?,
        prompt_logprobs: count("prompt_logprobs", prompt_logprobs)?,
        skip_special_tokens: Some(skip_special_tokens),
        format: format.map(|format| RequestedFormat { param: "sampling_params.constraint", format }),
        truncation: truncation.map(|to| Truncation { to, keep: Keep::Last }),
        ..GenerationParams::default()
    })
}

/// Turns a request's events into messages.
pub(in crate::grpc) struct Writer {
    stream: bool,
    prompt_token_ids: std::sync::Arc<[u32]>,
    prompt_logprobs: Vec<(u32, TokenInfo)>,
    wants_prompt_logprobs: bool,
    has_spoken: bool,
    choices: Vec<Gathered>,
}

/// What came of a choice so far.
#[derive(Clone, Default)]
struct Gathered {
    token_ids: Vec<u32>,
    logprobs: Option<wire::OutputLogProbs>,
}

impl Writer {
    pub(in crate::grpc) fn new(
        stream: bool,
        wants_prompt_logprobs: bool,
        prompt_token_ids: std::sync::Arc<[u32]>,
    ) -> Self {
        Self {
            stream,
            prompt_token_ids,
            prompt_logprobs: Vec::new(),
            wants_prompt_logprobs,
            has_spoken: false,
            choices: Vec::new(),
        }
    }

    /// The message that an event becomes, if any. `usage` is the request's so far.
    pub(in crate::grpc) fn message(
        &mut self,
        event: GenerationEvent,
        usage: Usage,
    ) -> Result<Option<wire::GenerateResponse>, ApiError> {
        let response = match event {
            GenerationEvent::PromptLogprobs { position, info } => {
                self.prompt_logprobs.push((position, info));
                return Ok(None);
            }
            GenerationEvent::Delta { choice_index, tokens, .. } => {
                let new: Vec<u32> = tokens.iter().map(|info| info.token_id).collect();
                let logprobs = output_logprobs(&tokens);
                let choice = self.choice(choice_index);
                choice.token_ids.extend_from_slice(&new);
                if let Some(new) = &logprobs {
                    let all = choice.logprobs.get_or_insert_default();
                    all.token_logprobs.extend_from_slice(&new.token_logprobs);
                    all.token_ids.extend_from_slice(&new.token_ids);
                    all.top_logprobs.extend_from_slice(&new.top_logprobs);
                }
                let completion_tokens = choice.token_ids.len() as u32;
                // Text that was held back brings no tokens.
                if !self.stream || new.is_empty() {
                    return Ok(None);
                }
                Response::Chunk(wire::GenerateStreamChunk {
                    token_ids: new,
                    prompt_tokens: usage.prompt_tokens,
                    completion_tokens,
                    cached_tokens: usage.cached_tokens,
                    output_logprobs: logprobs,
                    input_logprobs: if self.has_spoken { None } else { self.input_logprobs() },
                    index: choice_index,
                })
            }
            GenerationEvent::ChoiceFinished { choice_index, cause } => {
                use wire::generate_complete::MatchedStop;
                let Gathered { token_ids, logprobs } = std::mem::take(self.choice(choice_index));
                let (finish_reason, matched_stop) = match cause {
                    StopCause::EndOfSequence | StopCause::ToolCalls => ("stop", None),
                    StopCause::StopToken(id) => ("stop", Some(MatchedStop::MatchedTokenId(id))),
                    StopCause::StopString(text) => ("stop", Some(MatchedStop::MatchedStopStr(text))),
                    StopCause::Length => ("length", None),
                };
                Response::Complete(wire::GenerateComplete {
                    completion_tokens: token_ids.len() as u32,
                    output_ids: token_ids,
                    finish_reason: finish_reason.to_owned(),
                    prompt_tokens: usage.prompt_tokens,
                    cached_tokens: usage.cached_tokens,
                    output_logprobs: logprobs,
                    input_logprobs: if self.stream && self.has_spoken { None } else { self.input_logprobs() },
                    index: choice_index,
                    matched_stop,
                })
            }
            // Of conversations, which this contract has none of.
            GenerationEvent::Reasoning { .. }
            | GenerationEvent::ToolCallPiece { .. }
            | GenerationEvent::ToolCall { .. }
            | GenerationEvent::Done { .. } => return Ok(None),
            GenerationEvent::Error(error) => return Err(error),
        };
        self.has_spoken = true;
        Ok(Some(wire::GenerateResponse { response: Some(response) }))
    }

    /// Choices are few: `limits.max_choices` bounds them.
    fn choice(&mut self, index: u32) -> &mut Gathered {
        let index = index as usize;
        if self.choices.len() <= index {
            self.choices.resize(index + 1, Gathered::default());
        }
        &mut self.choices[index]
    }

    fn input_logprobs(&self) -> Option<wire::InputLogProbs> {
        if !self.wants_prompt_logprobs {
            return None;
        }
        let len = self.prompt_token_ids.len();
        let mut logprobs = wire::InputLogProbs {
            token_logprobs: vec![wire::InputTokenLogProb::default(); len],
            token_ids: self.prompt_token_ids.to_vec(),
            top_logprobs: vec![wire::TopLogProbs::default(); len],
        };
        for (position, info) in &self.prompt_logprobs {
            let position = *position as usize;
            if let (Some(named), true) = (&info.logprobs, position < len) {
                logprobs.token_logprobs[position].value = Some(named.values.logprob);
                logprobs.top_logprobs[position] = top(named);
            }
        }
        Some(logprobs)
    }
}

fn output_logprobs(tokens: &[TokenInfo]) -> Option<wire::OutputLogProbs> {
    let mut logprobs = wire::OutputLogProbs::default();
    for info in tokens {
        let named = info.logprobs.as_ref()?;
        logprobs.token_logprobs.push(named.values.logprob);
        logprobs.token_ids.push(info.token_id);
        logprobs.top_logprobs.push(top(named));
    }
    (!tokens.is_empty()).then_some(logprobs)
}

fn top(named: &NamedLogprobs) -> wire::TopLogProbs {
    let (token_ids, values) = named.values.top.iter().copied().unzip();
    wire::TopLogProbs { values, token_ids }
}

/// Ids and counts that the wire has as i32.
fn small(value: impl TryInto<i32>) -> i32 {
    value.try_into().unwrap_or(i32::MAX)
}

/// What is served.
pub(in crate::grpc) fn model_info(service: &GenerationService) -> wire::GetModelInfoResponse {
    let (model, info) = (service.model(), service.model().info());
    let family = info.architecture.split("For").next().unwrap_or_default().to_ascii_lowercase();
    wire::GetModelInfoResponse {
        model_path: model.name().to_owned(),
        is_generation: matches!(service.runner(), Runner::Generates(_)),
        max_context_length: info.max_model_len,
        vocab_size: info.vocab_size,
        supports_vision: false,
        served_model_name: model.name().to_owned(),
        tokenizer_path: String::new(),
        model_type: family,
        architectures: vec![info.architecture.clone()],
        eos_token_ids: info.eos_token_ids.iter().map(|id| small(*id)).collect(),
        pad_token_id: 0,
        bos_token_id: model.tokenizer().prefix().first().map_or(0, |id| small(*id)),
        max_req_input_len: small(info.max_model_len.saturating_sub(1)),
        default_sampling_params_json: serde_json::to_string(model.defaults()).unwrap_or_default(),
    }
}

pub(in crate::grpc) fn embed_request(
    message: wire::EmbedRequest,
    request_id: String,
    deadline: Option<Instant>,
) -> Result<EmbedRequest, ApiError> {
    let wire::EmbedRequest { request_id: _, tokenized } = message;
    let tokenized = tokenized.ok_or_else(|| invalid("tokenized", "is needed"))?;
    let truncation = PoolingTruncation::No;
    let request = PoolingRequest { request_id, endpoint: Endpoint::GrpcVllmEmbed, model: None, truncation, deadline };
    Ok(EmbedRequest {
        request,
        inputs: vec![PoolingText::TokenIds(tokenized.input_ids)],
        param: "tokenized.input_ids",
        add_special_tokens: false,
        dimensions: None,
        prompt_name: None,
    })
}

pub(in crate::grpc) fn embedded(embedded: Embedded) -> wire::EmbedResponse {
    let embedding = embedded.vectors.into_iter().next().unwrap_or_default();
    let embedding_dim = embedding.len() as u32;
    let prompt_tokens = u32::try_from(embedded.num_tokens).unwrap_or(u32::MAX);
    wire::EmbedResponse { embedding, prompt_tokens, embedding_dim }
}

/// What the server is; `uptime` and `last_receive` in seconds, the latter since 1970.
pub(in crate::grpc) fn server_info(
    info: &ModelInfo,
    num_inflight: usize,
    uptime: f64,
    last_receive: f64,
) -> wire::GetServerInfoResponse {
    wire::GetServerInfoResponse {
        active_requests: u32::try_from(num_inflight).unwrap_or(u32::MAX),
        is_paused: false,
        last_receive_timestamp: last_receive,
        uptime_seconds: uptime,
        server_type: "vllm-grpc".to_owned(),
        data_parallel_size: 1,
        kv_cache_dtype: info.kv_dtype.to_owned(),
        block_size: small(info.block_size),
        model_dtype: info.dtype.to_owned(),
        max_num_seqs: small(info.max_num_seqs),
    }
}

/// How busy the engine is; `now` in seconds since 1970.
pub(in crate::grpc) fn loads(info: &ModelInfo, stats: &SchedulerStats, now: u64) -> wire::GetLoadsResponse {
    let ratio = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
    let blocks = |count: fn(&quire_engine::scheduler::BlockStats) -> u32| -> u64 {
        stats.kv_groups().iter().map(|group| u64::from(count(group))).sum()
    };
    let (used, total) = (blocks(|group| group.num_used), blocks(|group| group.num_total));
    let block_size = u64::from(info.block_size);
    let load = wire::SchedulerLoad {
        dp_rank: 0,
        num_running_reqs: small(stats.num_running),
        num_waiting_reqs: small(stats.num_waiting),
        num_total_reqs: small(stats.num_running.saturating_add(stats.num_waiting)),
        num_used_tokens: small(used * block_size),
        max_total_num_tokens: small(total * block_size),
        token_usage: ratio(used, total),
        cache_hit_rate: ratio(stats.prefix_hit_tokens, stats.prefix_query_tokens),
        utilization: ratio(stats.num_running.into(), info.max_num_seqs.into()),
        max_running_requests: small(info.max_num_seqs),
    };
    wire::GetLoadsResponse {
        timestamp: format_time(now, 0),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        dp_rank_count: 1,
        loads: vec![load],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_absent_is_neutral_and_not_the_models_default() {
        let given = params(wire::SamplingParams::default()).expect("fine");
        assert_eq!((given.temperature, given.top_p, given.top_k, given.n), (Some(1.0), Some(1.0), Some(0), Some(1)));
        assert_eq!((given.repetition_penalty, given.max_tokens, given.seed), (Some(1.0), None, None));
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        let refused = |request: wire::GenerateRequest| {
            generate_request(request, "r".to_owned(), None).unwrap_err().param().expect("a field").to_owned()
        };
        let tokens = wire::TokenizedInput { input_ids: vec![1], ..Default::default() };
        let good = wire::GenerateRequest {
            input: Some(wire::generate_request::Input::Tokenized(tokens)),
            ..Default::default()
        };
        assert!(generate_request(good.clone(), "r".to_owned(), None).is_ok());
        assert_eq!(refused(wire::GenerateRequest::default()), "input");
        assert_eq!(refused(wire::GenerateRequest { mm_inputs: Some(Default::default()), ..good.clone() }), "mm_inputs");
        assert_eq!(
            refused(wire::GenerateRequest { data_parallel_rank: Some(1), ..good.clone() }),
            "data_parallel_rank"
        );
        let with =
            |sampling: wire::SamplingParams| wire::GenerateRequest { sampling_params: Some(sampling), ..good.clone() };
        assert_eq!(refused(with(wire::SamplingParams { logprobs: Some(-1), ..Default::default() })), "logprobs");
        let bias = [(-1, 1.0)].into_iter().collect();
        let param = refused(with(wire::SamplingParams { logit_bias: bias, ..Default::default() }));
        assert_eq!(param, "sampling_params.logit_bias");
        let constraint = Some(Constraint::StructuralTag("a".to_owned()));
        let param = refused(with(wire::SamplingParams { constraint, ..Default::default() }));
        assert_eq!(param, "sampling_params.structural_tag");
    }
}
