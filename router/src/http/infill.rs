//! Fill-in-the-middle for editors: llama.cpp's `/infill` and Mistral's `/v1/fim/completions`.

use std::time::Instant;

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::fim::{FimFile, FimInput};
use crate::generation::{
    GenerationEvent, GenerationParams, GenerationService, Input, Limits, RequestedFormat, StopCause, Usage, invalid,
};
use crate::grammar::OutputFormat;
use crate::metrics::Endpoint;

use super::answer::{Generations, json as to_json};
use super::ask::{Ask, json_response, name_ignored, one_choice, whole};
use super::failure::{Dialect, Failure, error_json};
use super::fields::{Fields, Ignored, raw_list};
use super::receive::{Body, Parsed, receive};
use super::stream::{Framing, SSE, push_json, sse_data, streamed};
use super::types;

/// Most other files of a request.
const MAX_FILES: usize = 128;
/// Samplers and switches of llama.cpp that are understood and not served, and what asks for nothing.
const UNSUPPORTED: [(&str, &[&str]); 13] = [
    ("mirostat", &["0"]),
    ("dynatemp_range", &["0", "0.0"]),
    ("dry_multiplier", &["0", "0.0"]),
    ("xtc_probability", &["0", "0.0"]),
    ("top_n_sigma", &["-1", "-1.0"]),
    ("n_probs", &["0"]),
    ("n_keep", &["0", "-1"]),
    ("n_indent", &["0"]),
    ("repeat_last_n", &["-1"]),
    ("lora", &["[]"]),
    ("n_cmpl", &["1"]),
    ("response_fields", &["[]"]),
    ("t_max_predict_ms", &["0", "-1"]),
];

struct InfillBody {
    model: Option<String>,
    input: FimInput,
    params: GenerationParams,
    stream: bool,
    ignored: Ignored,
}

impl Body for InfillBody {
    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        for (field, nothing) in UNSUPPORTED {
            fields.refuse_unless(field, |raw| nothing.contains(&raw))?;
        }
        let mut params = types::params(&mut fields, limits)?;
        one_choice(&params)?;
        if let Some(penalty) = fields.number("repeat_penalty")? {
            params.repetition_penalty = Some(penalty);
        }
        // -1 is until the end.
        let n_predict = match fields.integer("n_predict")? {
            Some(-1) => None,
            Some(count) => Some(u64::try_from(count).map_err(|_| invalid("n_predict", "must be at least 1, or -1"))?),
            None => fields.count("max_tokens")?,
        };
        params.max_tokens = n_predict;
        params.format = form(&mut fields)?;
        let mut files = Vec::new();
        if let Some(raw) = fields.raw("input_extra") {
            for (index, raw) in raw_list(raw, "input_extra", MAX_FILES)?.into_iter().enumerate() {
                let mut file = Fields::of_value(raw, &format!("input_extra[{index}]"))?;
                let Some(text) = file.string("text")? else { return Err(invalid(&file.name("text"), "is needed")) };
                let name = file.string("filename")?.unwrap_or_else(|| "tmp".to_owned());
                files.push(FimFile { name, text });
            }
        }
        let needed = |text: Option<String>, field| text.ok_or_else(|| invalid(field, "is needed"));
        let input = FimInput {
            prefix: needed(fields.string("input_prefix")?, "input_prefix")?,
            suffix: needed(fields.string("input_suffix")?, "input_suffix")?,
            middle: fields.string("prompt")?.unwrap_or_default(),
            files,
            param: "input_suffix",
        };
        // Prefixes are always cached, and which slot runs a request changes nothing here.
        let _ = (fields.raw("cache_prompt"), fields.raw("id_slot"));
        let stream = fields.bool("stream")?.unwrap_or(false);
        let model = fields.string("model")?;
        let mut ignored = Ignored::default();
        fields.note_ignored(&mut ignored);
        Ok(Self { model, input, params, stream, ignored })
    }

    fn ignored(&self) -> &Ignored {
        &self.ignored
    }
}

/// The form of what fills the gap, where one is asked for: a grammar in llama.cpp's own form, or a schema.
fn form(fields: &mut Fields<'_>) -> Result<Option<RequestedFormat>, ApiError> {
    let grammar = fields.string("grammar")?.filter(|grammar| !grammar.is_empty());
    let schema = fields.raw("json_schema").filter(|raw| raw.get() != "{}");
    match (grammar, schema) {
        (Some(_), Some(_)) => {
            Err(invalid("json_schema", "cannot be used together with `grammar`: an output has one form"))
        }
        (Some(grammar), None) => {
            Ok(Some(RequestedFormat { param: "grammar", format: OutputFormat::Gbnf(grammar.into()) }))
        }
        (None, Some(raw)) => {
            Ok(Some(RequestedFormat { param: "json_schema", format: OutputFormat::JsonSchema(raw.get().into()) }))
        }
        (None, None) => Ok(None),
    }
}

/// `POST /infill`
pub(super) async fn infill(State(service): State<GenerationService>, request: Request) -> Result<Response, Failure> {
    let begun = Instant::now();
    let Parsed { service, id, body, share } = receive::<InfillBody>(&service, Endpoint::Infill, request).await?;
    let InfillBody { model, input, params, stream, ignored } = body;
    let input = Input::Fim(input);
    let ask = Ask { endpoint: Endpoint::Infill, request_id: id.0.to_string(), model, input, params };
    let generation = ask.start(&service).await?;
    drop(share);
    let mut writer =
        PieceWriter { model: service.model().name().to_owned(), begun, first: None, cause: StopCause::Length };
    if stream {
        let mut response = streamed(&service, Generations::new(vec![generation]), writer, SSE, 1).await?;
        name_ignored(&mut response, &ignored);
        return Ok(response);
    }
    let whole = whole(generation).await?;
    writer.cause = whole.cause;
    Ok(json_response(to_json(&writer.last(&whole.items.all_text(), whole.usage)), &ignored))
}

/// Pieces of a streamed answer; the last one has `stop`.
struct PieceWriter {
    model: String,
    begun: Instant,
    first: Option<Instant>,
    cause: StopCause,
}

impl PieceWriter {
    fn last(&self, text: &str, usage: Usage) -> Value {
        let now = Instant::now();
        let first = self.first.unwrap_or(now);
        let (stop_type, word) = match &self.cause {
            StopCause::EndOfSequence | StopCause::StopToken(_) | StopCause::ToolCalls => ("eos", ""),
            StopCause::StopString(text) => ("word", text.as_str()),
            StopCause::Length => ("limit", ""),
        };
        json!({
            "index": 0,
            "content": text,
            "tokens": [],
            "stop": true,
            "model": self.model,
            "tokens_predicted": usage.completion_tokens,
            "tokens_evaluated": usage.prompt_tokens,
            "tokens_cached": usage.cached_tokens,
            "truncated": false,
            "stop_type": stop_type,
            "stopping_word": word,
            "timings": {
                "prompt_n": usage.prompt_tokens.saturating_sub(usage.cached_tokens),
                "prompt_ms": first.saturating_duration_since(self.begun).as_secs_f64() * 1000.0,
                "predicted_n": usage.completion_tokens,
                "predicted_ms": now.saturating_duration_since(first).as_secs_f64() * 1000.0,
            },
        })
    }
}

impl Framing for PieceWriter {
    fn event(&mut self, _: usize, event: GenerationEvent, out: &mut Vec<u8>) {
        match event {
            GenerationEvent::Delta { text, .. } => {
                self.first.get_or_insert_with(Instant::now);
                if !text.is_empty() {
                    out.extend_from_slice(b"data: {\"index\":0,\"content\":");
                    push_json(&text, out);
                    out.extend_from_slice(b",\"tokens\":[],\"stop\":false}\n\n");
                }
            }
            GenerationEvent::ChoiceFinished { cause, .. } => self.cause = cause,
            // A gap has neither calls nor reasoning, and ends are framed by the stream.
            GenerationEvent::Reasoning { .. }
            | GenerationEvent::ToolCallPiece { .. }
            | GenerationEvent::ToolCall { .. }
            | GenerationEvent::PromptLogprobs { .. }
            | GenerationEvent::Done { .. }
            | GenerationEvent::Error(_) => {}
        }
    }

    fn done(&mut self, usage: Usage, out: &mut Vec<u8>) {
        sse_data(&to_json(&self.last("", usage)), out);
    }

    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        sse_data(&error_json(error, Dialect::LlamaCpp, ""), out);
    }
}

/// A body of `/v1/fim/completions`.
pub(super) struct FimBody {
    pub(super) common: types::Common,
    pub(super) input: FimInput,
}

impl Body for FimBody {
    fn model(&self) -> Option<&str> {
        self.common.model.as_deref()
    }

    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let mut params = types::params(&mut fields, limits)?;
        one_choice(&params)?;
        // Mistral's names.
        params.max_tokens = fields.count("max_tokens")?;
        if let Some(seed) = fields.integer("random_seed")? {
            params.seed = Some(seed);
        }
        let Some(prefix) = fields.string("prompt")? else { return Err(invalid("prompt", "is needed")) };
        let suffix = fields.string("suffix")?.unwrap_or_default();
        let input = FimInput { prefix, suffix, param: "prompt", ..FimInput::default() };
        Ok(Self { common: types::common(&mut fields, params, limits, Ignored::default())?, input })
    }

    fn ignored(&self) -> &Ignored {
        &self.common.ignored
    }
}
