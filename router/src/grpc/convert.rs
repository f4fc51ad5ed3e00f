//! Wire messages to domain types and back: the only place that knows both. Here `quire.v1`, and beside it the contracts of
//! others.

pub(super) mod kserve;
pub(super) mod kserve_embed;
pub(super) mod kv_events;
pub(super) mod pooling;
pub(super) mod vllm;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quire_engine::scheduler::{SchedulerStats, TenantId};
use quire_proto::quire::v1 as wire;
use tonic::Status;
use tonic::metadata::{MetadataMap, MetadataValue};

use crate::error::ApiError;
use crate::generation::{
    ChatInput, ChatMessage, Generation, GenerationEvent, GenerationParams, GenerationRequest, Input, Keep,
    RequestedFormat, Resume, StopCause, TokenInfo, Tool, ToolCall, ToolChoice, TruncateTo, Truncation, Usage,
};
use crate::grammar::{OutputFormat, StructuralTag, TagStructure};
use crate::metrics::Endpoint;
use crate::random;
use crate::served_model::ServedModel;

/// Metadata that names the request in every answer.
pub(super) const REQUEST_ID: &str = "quire-request-id";

fn invalid(param: &str, message: &str) -> ApiError {
    ApiError::InvalidRequest { param: Some(param.to_owned()), message: format!("{param} {message}") }
}

/// The caller's id, or a new one. Fails where the caller's cannot be used.
pub(super) fn request_id(given: String) -> Result<String, ApiError> {
    match given.as_str() {
        "" => Ok(random::request_id()),
        id if random::is_request_id(id) => Ok(given),
        _ => Err(invalid("request_id", "must match [A-Za-z0-9._-]{1,128}")),
    }
}

/// The call's deadline: `grpc-timeout`, up to eight digits and a unit (gRPC over HTTP/2, "Timeout").
pub(super) fn deadline(metadata: &MetadataMap, now: Instant) -> Result<Option<Instant>, ApiError> {
    let Some(value) = metadata.get("grpc-timeout") else { return Ok(None) };
    let bad = || invalid("grpc-timeout", "must be up to eight digits and one of H, M, S, m, u, n");
    let text = value.to_str().map_err(|_| bad())?;
    let (digits, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(bad)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let number: u64 = digits.parse().map_err(|_| bad())?;
    let timeout = match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return Err(bad()),
    };
    // A deadline past what the clock can say is none.
    Ok(now.checked_add(timeout))
}

/// A request to continue a prompt.
pub(super) fn generate_request(
    request: wire::GenerateRequest,
    request_id: String,
    deadline: Option<Instant>,
) -> Result<GenerationRequest, ApiError> {
    let wire::GenerateRequest {
        request_id: _,
        model,
        prompt,
        add_special_tokens,
        sampling,
        stopping,
        output,
        scheduling,
        resume,
        format,
    } = request;
    let input = match prompt {
        Some(wire::generate_request::Prompt::Text(text)) => {
            Input::Text { text, add_special_tokens: add_special_tokens.unwrap_or(true) }
        }
        Some(wire::generate_request::Prompt::TokenIds(wire::TokenIds { ids })) => {
            if add_special_tokens.is_some() {
                return Err(invalid("add_special_tokens", "needs a prompt in text"));
            }
            Input::TokenIds(ids)
        }
        None => return Err(invalid("prompt", "is needed: text or token_ids")),
    };
    Ok(GenerationRequest {
        request_id,
        endpoint: Endpoint::GrpcGenerate,
        tenant: TenantId::default(),
        model: (!model.is_empty()).then_some(model),
        input,
        params: GenerationParams {
            resume: resume.map(resumed),
            format: output_format(format)?,
            ..params(sampling, stopping, output, scheduling)
        },
        deadline,
    })
}

/// A request to answer a conversation.
pub(super) fn chat_request(
    request: wire::ChatRequest,
    request_id: String,
    deadline: Option<Instant>,
) -> Result<GenerationRequest, ApiError> {
    let wire::ChatRequest {
        request_id: _,
        model,
        messages,
        add_generation_prompt,
        continue_final_message,
        sampling,
        stopping,
        output,
        scheduling,
        resume,
        format,
        tools,
        tool_choice,
        parallel_tool_calls,
        enable_thinking,
        reasoning_effort,
        include_reasoning,
        documents_json,
    } = request;
    let tools: Vec<Tool> =
        tools.into_iter().enumerate().map(|(index, wire)| tool(wire, index)).collect::<Result<_, _>>()?;
    let documents = documents_json.iter().map(|text| {
        let document = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(text);
        document.map(serde_json::Value::Object).map_err(|_| invalid("documents_json", "must hold JSON objects"))
    });
    let tool_choice = choice_of_tools(tool_choice, tools.is_empty())?;
    let chat = ChatInput {
        messages: messages.into_iter().map(chat_message).collect(),
        add_generation_prompt: add_generation_prompt.unwrap_or(true),
        continue_final_message: continue_final_message.unwrap_or(false),
        add_special_tokens: false,
        enable_thinking,
        reasoning_effort,
        include_reasoning: include_reasoning.unwrap_or(true),
        documents: documents.collect::<Result<_, _>>()?,
        tool_choice,
        tools,
        parallel_tool_calls: parallel_tool_calls.unwrap_or(true),
    };
    Ok(GenerationRequest {
        request_id,
        endpoint: Endpoint::GrpcChat,
        tenant: TenantId::default(),
        model: (!model.is_empty()).then_some(model),
        input: Input::Chat(chat),
        params: GenerationParams {
            resume: resume.map(resumed),
            format: output_format(format)?,
            ..params(sampling, stopping, output, scheduling)
        },
        deadline,
    })
}

fn chat_message(message: wire::ChatMessage) -> ChatMessage {
    let wire::ChatMessage { role, content, name, tool_calls, tool_call_id, reasoning } = message;
    let call = |wire::ToolCall { id, name, arguments_json }| ToolCall { id, name, arguments: arguments_json };
    ChatMessage { role, content, name, tool_calls: tool_calls.into_iter().map(call).collect(), tool_call_id, reasoning }
}

fn tool(tool: wire::Tool, index: usize) -> Result<Tool, ApiError> {
    let wire::Tool { name, description, parameters_json } = tool;
    let parameters = match parameters_json {
        None => serde_json::json!({"type": "object", "properties": {}}),
        Some(text) => serde_json::from_str(&text)
            .map_err(|_| invalid(&format!("tools[{index}].parameters_json"), "must be a JSON object"))?,
    };
    Ok(Tool { name, description, parameters })
}

fn choice_of_tools(choice: Option<wire::ToolChoice>, has_none: bool) -> Result<ToolChoice, ApiError> {
    use wire::tool_choice::{Choice, Mode};
    Ok(match choice.and_then(|choice| choice.choice) {
        None if has_none => ToolChoice::None,
        None => ToolChoice::Auto,
        Some(Choice::Name(name)) => ToolChoice::Named(name),
        Some(Choice::Mode(mode)) => match Mode::try_from(mode) {
            Ok(Mode::None) => ToolChoice::None,
            Ok(Mode::Auto | Mode::Unspecified) => ToolChoice::Auto,
            Ok(Mode::Required) => ToolChoice::Required,
            Err(_) => return Err(invalid("tool_choice.mode", "is not known")),
        },
    })
}

fn call_on_wire(call: ToolCall) -> wire::ToolCall {
    let ToolCall { id, name, arguments } = call;
    wire::ToolCall { id, name, arguments_json: arguments }
}

fn resumed(resume: wire::Resume) -> Resume {
    let wire::Resume { generated_token_ids, choice_offset } = resume;
    Resume { generated: generated_token_ids, choice_offset }
}

fn params(
    sampling: Option<wire::SamplingParams>,
    stopping: Option<wire::StoppingParams>,
    output: Option<wire::OutputParams>,
    scheduling: Option<wire::SchedulingParams>,
) -> GenerationParams {
    // Taken apart by name, so that a field added to the contract is an error here until it is served.
    let wire::SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        typical_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        allowed_token_ids,
        bad_words,
        seed,
        n,
    } = sampling.unwrap_or_default();
    let wire::StoppingParams { max_tokens, min_tokens, stop, include_stop_str_in_output, stop_token_ids, ignore_eos } =
        stopping.unwrap_or_default();
    let wire::OutputParams { logprobs, prompt_logprobs, skip_special_tokens } = output.unwrap_or_default();
    let wire::SchedulingParams { priority, cache_salt, truncate_prompt_tokens } = scheduling.unwrap_or_default();
    GenerationParams {
        max_tokens,
        min_tokens,
        n,
        temperature,
        top_k,
        top_p,
        min_p,
        typical_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        allowed_token_ids: allowed_token_ids.map(|tokens| tokens.ids),
        bad_words,
        stop,
        include_stop_str_in_output: include_stop_str_in_output.unwrap_or(false),
        stop_token_ids,
        ignore_eos: ignore_eos.unwrap_or(false),
        seed,
        logprobs,
        prompt_logprobs,
        skip_special_tokens,
        priority: priority.unwrap_or(0),
        cache_salt,
        truncation: truncate_prompt_tokens.map(|count| Truncation { to: TruncateTo::Tokens(count), keep: Keep::Last }),
        resume: None,
        format: None,
    }
}

fn output_format(format: Option<wire::OutputFormat>) -> Result<Option<RequestedFormat>, ApiError> {
    use wire::output_format::Form;
    let Some(wire::OutputFormat { form }) = format else { return Ok(None) };
    let format = match form {
        None => return Err(invalid("format", "must hold a form")),
        Some(Form::JsonObject(true)) => OutputFormat::JsonObject,
        Some(Form::JsonObject(false)) => return Err(invalid("format.json_object", "must be true")),
        Some(Form::JsonSchema(schema)) => OutputFormat::JsonSchema(schema.into()),
        Some(Form::Regex(regex)) => OutputFormat::Regex(regex.into()),
        Some(Form::Choices(wire::Choices { choices })) => OutputFormat::Choice(choices),
        Some(Form::Lark(grammar)) => OutputFormat::Lark(grammar.into()),
        Some(Form::StructuralTag(wire::StructuralTag { structures, triggers })) => {
            let structure = |wire::TagStructure { begin, schema, end }| TagStructure {
                begin,
                schema: schema.map_or_else(|| Arc::from("true"), Arc::from),
                end,
            };
            let structures = structures.into_iter().map(structure).collect();
            OutputFormat::StructuralTag(StructuralTag { structures, triggers })
        }
    };
    Ok(Some(RequestedFormat { param: "format", format }))
}

/// A stream's first event.
pub(super) fn started(generation: &Generation, model: &str) -> wire::StreamEvent {
    event(wire::stream_event::Event::Started(wire::Started {
        request_id: generation.request_id.clone(),
        model: model.to_owned(),
        seed: Some(generation.seed as i64),
    }))
}

/// Every other event, where it is one of this contract; an error is the stream's status.
pub(super) fn stream_event(from: GenerationEvent, request_id: &str) -> Result<Option<wire::StreamEvent>, Box<Status>> {
    use wire::stream_event::Event;
    Ok(Some(event(match from {
        // Calls come whole.
        GenerationEvent::ToolCallPiece { .. } => return Ok(None),
        GenerationEvent::PromptLogprobs { position, info } => Event::PromptLogprobs(prompt_token(position, info)),
        GenerationEvent::Delta { choice_index, text, tokens } => {
            let tokens = tokens.into_iter().map(token).collect();
            Event::Delta(wire::Delta { choice_index, text, tokens })
        }
        GenerationEvent::Reasoning { choice_index, text } => {
            Event::Reasoning(wire::ReasoningDelta { choice_index, text })
        }
        GenerationEvent::ToolCall { choice_index, call_index, call, .. } => {
            Event::ToolCall(wire::ToolCallEvent { choice_index, call_index, call: Some(call_on_wire(call)) })
        }
        GenerationEvent::ChoiceFinished { choice_index, cause } => {
            Event::Finished(wire::ChoiceFinished { choice_index, finish: Some(finish(cause)) })
        }
        GenerationEvent::Done { usage: total } => Event::Done(wire::Done { usage: Some(usage(total)) }),
        GenerationEvent::Error(error) => return Err(Box::new(status(&error, request_id))),
    })))
}

fn event(event: wire::stream_event::Event) -> wire::StreamEvent {
    wire::StreamEvent { event: Some(event) }
}

/// Gathers the events of a unary call.
pub(super) struct Collector {
    response: wire::GenerateResponse,
    choices: BTreeMap<u32, wire::Choice>,
}

impl Collector {
    pub(super) fn new(generation: &Generation, model: &str) -> Self {
        let response = wire::GenerateResponse {
            request_id: generation.request_id.clone(),
            model: model.to_owned(),
            seed: Some(generation.seed as i64),
            ..Default::default()
        };
        Self { response, choices: BTreeMap::new() }
    }

    /// Takes the next event in; the answer when it was the last one.
    pub(super) fn add(&mut self, event: GenerationEvent) -> Result<Option<wire::GenerateResponse>, ApiError> {
        match event {
            GenerationEvent::PromptLogprobs { position, info } => {
                self.response.prompt_logprobs.push(prompt_token(position, info));
            }
            GenerationEvent::Delta { choice_index, text, tokens } => {
                let choice = self.choice(choice_index);
                choice.text.push_str(&text);
                choice.tokens.extend(tokens.into_iter().map(token));
            }
            GenerationEvent::Reasoning { choice_index, text } => self.choice(choice_index).reasoning.push_str(&text),
            GenerationEvent::ToolCallPiece { .. } => {}
            GenerationEvent::ToolCall { choice_index, call, .. } => {
                self.choice(choice_index).tool_calls.push(call_on_wire(call));
            }
            GenerationEvent::ChoiceFinished { choice_index, cause } => {
                self.choice(choice_index).finish = Some(finish(cause));
            }
            GenerationEvent::Done { usage: total } => {
                self.response.usage = Some(usage(total));
                self.response.choices = std::mem::take(&mut self.choices).into_values().collect();
                return Ok(Some(std::mem::take(&mut self.response)));
            }
            GenerationEvent::Error(error) => return Err(error),
        }
        Ok(None)
    }

    fn choice(&mut self, index: u32) -> &mut wire::Choice {
        self.choices.entry(index).or_insert_with(|| wire::Choice { index, ..Default::default() })
    }
}

fn token(info: TokenInfo) -> wire::Token {
    let TokenInfo { token_id, bytes, num_chars: _, logprobs } = info;
    let logprobs = logprobs.map(|named| {
        let top = named.values.top.iter().zip(&named.top_bytes);
        wire::Logprobs {
            logprob: named.values.logprob,
            rank: named.values.rank,
            top: top.map(|(&(id, logprob), bytes)| wire::TopLogprob { id, bytes: bytes.to_vec(), logprob }).collect(),
        }
    });
    wire::Token { id: token_id, bytes: bytes.to_vec(), logprobs }
}

fn prompt_token(position: u32, info: TokenInfo) -> wire::PromptToken {
    wire::PromptToken { position, token: Some(token(info)) }
}

fn finish(cause: StopCause) -> wire::Finish {
    use wire::finish::Matched;
    let (reason, matched) = match cause {
        StopCause::EndOfSequence => (wire::FinishReason::EndOfSequence, None),
        StopCause::StopToken(id) => (wire::FinishReason::StopToken, Some(Matched::StopTokenId(id))),
        StopCause::StopString(text) => (wire::FinishReason::StopString, Some(Matched::StopString(text))),
        StopCause::Length => (wire::FinishReason::Length, None),
        StopCause::ToolCalls => (wire::FinishReason::ToolCalls, None),
    };
    wire::Finish { reason: reason.into(), matched }
}

fn usage(usage: Usage) -> wire::Usage {
    let Usage { prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens } = usage;
    wire::Usage { prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens }
}

/// What is served.
pub(super) fn model_info(model: &ServedModel) -> wire::ModelInfoResponse {
    let info = model.info();
    wire::ModelInfoResponse {
        name: model.name().to_owned(),
        architecture: info.architecture.clone(),
        num_parameters: info.num_parameters,
        vocab_size: info.vocab_size,
        max_model_len: info.max_model_len,
        eos_token_ids: info.eos_token_ids.clone(),
        dtype: info.dtype.to_owned(),
        device: info.device.name.clone(),
        weight_bytes: info.weight_bytes,
        kv_cache_bytes: info.kv_cache_bytes,
        block_size: info.block_size,
        num_blocks: info.num_blocks,
        max_num_seqs: info.max_num_seqs,
        max_num_batched_tokens: info.max_num_batched_tokens,
        prefix_cache: info.prefix_cache,
        digest: info.digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        server_version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// How busy the server is.
pub(super) fn stats(num_inflight: usize, stats: &SchedulerStats) -> wire::StatsResponse {
    let mut response = wire::StatsResponse {
        num_requests_in_flight: num_inflight as u64,
        num_waiting: stats.num_waiting.into(),
        num_waiting_tokens: stats.waiting_tokens,
        num_running: stats.num_running.into(),
        num_preemptions: stats.num_preemptions,
        num_prefix_queried_tokens: stats.prefix_query_tokens,
        num_prefix_hit_tokens: stats.prefix_hit_tokens,
        ..Default::default()
    };
    for group in stats.kv_groups() {
        response.num_used_blocks += u64::from(group.num_used);
        response.num_cached_blocks += u64::from(group.num_cached);
        response.num_free_blocks += u64::from(group.num_free);
        response.num_blocks += u64::from(group.num_total);
    }
    response
}

/// Puts the request's id into an answer.
pub(super) fn name_request(metadata: &mut MetadataMap, request_id: &str) {
    // Ids are ASCII by their definition; an id that is not was refused and has no place here.
    if !request_id.is_empty()
        && let Ok(id) = MetadataValue::try_from(request_id)
    {
        metadata.insert(REQUEST_ID, id);
    }
}

/// An error as a status: the code from the one table, the sentence, and what to do with it as metadata.
pub(super) fn status(error: &ApiError, request_id: &str) -> Status {
    let (_, code) = error.status();
    let mut status = Status::new(code, error.to_string());
    name_request(status.metadata_mut(), request_id);
    let retry_after = match error {
        ApiError::Overloaded { retry_after_seconds } => Some(*retry_after_seconds),
        ApiError::Unavailable { .. } => Some(1),
        _ => None,
    };
    if let Some(seconds) = retry_after {
        status.metadata_mut().insert("retry-after", seconds.into());
    }
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_read_as_grpc_writes_them() {
        let now = Instant::now();
        let read = |text: &'static str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", MetadataValue::from_static(text));
            deadline(&metadata, now)
        };
        for (text, timeout) in [
            ("1H", Duration::from_secs(3600)),
            ("2M", Duration::from_secs(120)),
            ("3S", Duration::from_secs(3)),
            ("0m", Duration::ZERO),
            ("99999999u", Duration::from_micros(99_999_999)),
            ("7n", Duration::from_nanos(7)),
        ] {
            assert_eq!(read(text), Ok(Some(now + timeout)), "{text}");
        }
        for text in ["", "S", "1", "1s", "-1S", "+1S", "123456789S", "1.5S"] {
            assert!(read(text).is_err(), "{text}");
        }
        assert_eq!(deadline(&MetadataMap::new(), now), Ok(None));
    }

    #[test]
    fn absent_stays_absent() {
        assert_eq!(params(None, None, None, None), GenerationParams::default());
        let sampling = wire::SamplingParams { temperature: Some(0.0), seed: Some(-1), ..Default::default() };
        let given = params(Some(sampling), None, None, None);
        assert_eq!((given.temperature, given.seed), (Some(0.0), Some(-1)));
    }

    #[test]
    fn errors_carry_code_id_and_when_to_try_again() {
        let overloaded = status(&ApiError::Overloaded { retry_after_seconds: 7 }, "r-1");
        assert_eq!(overloaded.code(), tonic::Code::ResourceExhausted);
        assert_eq!(overloaded.metadata().get("retry-after").unwrap(), "7");
        assert_eq!(overloaded.metadata().get(REQUEST_ID).unwrap(), "r-1");
        let cancelled = status(&ApiError::Cancelled, "r-1");
        assert_eq!(cancelled.code(), tonic::Code::Cancelled);
        assert!(cancelled.metadata().get("retry-after").is_none());
    }

    #[test]
    fn a_prompt_is_needed_and_ids_are_checked() {
        let request = wire::GenerateRequest::default();
        let error = generate_request(request, "r".to_owned(), None).unwrap_err();
        assert!(error.to_string().contains("prompt"));
        let resume = Some(wire::Resume { generated_token_ids: vec![1, 2], choice_offset: 3 });
        let resumed = chat_request(wire::ChatRequest { resume, ..Default::default() }, "r".to_owned(), None).unwrap();
        assert_eq!(resumed.params.resume, Some(Resume { generated: vec![1, 2], choice_offset: 3 }));
        assert!(request_id("bad id\n".to_owned()).is_err());
        assert!(request_id("x".repeat(129)).is_err());
        assert_eq!(request_id("x".repeat(128)), Ok("x".repeat(128)));
        assert!(!request_id(String::new()).unwrap().is_empty());
    }
}
