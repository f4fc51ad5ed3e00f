//! Ollama's dialect: `/api/chat`, `/api/generate` and the routes that say what there is.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::fim::FimInput;
use crate::generation::{
    ChatInput, ChatMessage, Generation, GenerationEvent, GenerationParams, GenerationService, Input, Limits, StopCause,
    Usage, invalid,
};
use crate::metrics::Endpoint;
use crate::served_model::ServedModel;
use crate::telemetry::format_time;

use super::RequestId;
use super::answer::{Generations, json as to_json};
use super::ask::{Ask, json_response, name_ignored, whole};
use super::failure::{Dialect, Failure, error_json};
use super::fields::{Fields, Ignored, raw_list};
use super::format::schema_or_json;
use super::receive::{Body, Parsed, receive};
use super::stream::{Framing, NDJSON, push_json, streamed};

/// Options that say how a machine runs a model, which is the operator's to say here: named as ignored.
const MACHINE: [&str; 9] =
    ["num_gpu", "main_gpu", "num_thread", "num_batch", "num_keep", "numa", "low_vram", "use_mmap", "use_mlock"];

/// What a request asks of the model.
struct Wanted {
    model: Option<String>,
    /// `None` asks for the model to be loaded, which it is.
    input: Option<Input>,
    params: GenerationParams,
    num_ctx: Option<u64>,
    stream: bool,
    ignored: Ignored,
}

struct ChatBody(Wanted);
struct GenerateBody(Wanted);

struct ShowBody {
    model: String,
    ignored: Ignored,
}

/// The fields of both that are not their own.
fn wanted(fields: &mut Fields<'_>, limits: &Limits, mut ignored: Ignored) -> Result<Wanted, ApiError> {
    fields.refuse(&["logprobs", "top_logprobs"])?;
    let mut params = GenerationParams::default();
    let mut num_ctx = None;
    if let Some(raw) = fields.raw("options") {
        let mut options = Fields::of_value(raw, "options")?;
        params = GenerationParams {
            // -1 and -2 are "until the end".
            max_tokens: match options.integer("num_predict")? {
                None | Some(-2 | -1) => None,
                Some(count) => Some(
                    u64::try_from(count).map_err(|_| invalid("options.num_predict", "must be at least 1, or -1"))?,
                ),
            },
            temperature: options.number("temperature")?,
            top_k: options.integer("top_k")?,
            top_p: options.number("top_p")?,
            min_p: options.number("min_p")?,
            typical_p: options.number("typical_p")?,
            repetition_penalty: options.number("repeat_penalty")?,
            presence_penalty: options.number("presence_penalty")?,
            frequency_penalty: options.number("frequency_penalty")?,
            seed: options.integer("seed")?,
            stop: options.strings("stop", limits.max_stop)?,
            ..GenerationParams::default()
        };
        num_ctx = options.count("num_ctx")?;
        options.refuse_unless("mirostat", |raw| raw == "0")?;
        options.refuse_unless("tfs_z", |raw| raw.parse() == Ok(1.0))?;
        // Penalties look at all that was said.
        options.refuse_unless("repeat_last_n", |raw| raw == "-1")?;
        options.refuse_unless("penalize_newline", |raw| raw == "true")?;
        let mut unknown = Ignored::default();
        options.note_ignored(&mut unknown);
        let is_machines = |name: &str| MACHINE.iter().any(|option| name == format!("options.{option}"));
        unknown.for_each(|name| {
            // Its effects are nobody's but the machine's: not something to refuse under `strict`.
            if !is_machines(name) {
                ignored.add(name);
            }
        });
    }
    if let Some(raw) = fields.raw("format") {
        params.format = schema_or_json(raw, "format")?;
    }
    // A served model stays.
    let _ = fields.raw("keep_alive");
    let model = fields.string("model")?;
    let stream = fields.bool("stream")?.unwrap_or(true);
    fields.note_ignored(&mut ignored);
    Ok(Wanted { model, input: None, params, num_ctx, stream, ignored })
}

fn think(fields: &mut Fields<'_>) -> Result<Option<bool>, ApiError> {
    match fields.bool("think") {
        Ok(Some(true)) | Err(_) => Err(invalid("think", "must be false: thinking apart from text is not supported")),
        Ok(other) => Ok(other),
    }
}

impl Body for ChatBody {
    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        fields.refuse(&["tools"])?;
        let mut ignored = Ignored::default();
        let enable_thinking = think(&mut fields)?;
        let messages = match fields.raw("messages") {
            None => Vec::new(),
            Some(raw) => raw_list(raw, "messages", limits.max_messages)?
                .into_iter()
                .enumerate()
                .map(|(index, raw)| message(raw, index, &mut ignored))
                .collect::<Result<Vec<_>, _>>()?,
        };
        let mut wanted = wanted(&mut fields, limits, ignored)?;
        if !messages.is_empty() {
            wanted.input = Some(Input::Chat(ChatInput {
                messages,
                enable_thinking,
                include_reasoning: false,
                ..ChatInput::default()
            }));
        }
        Ok(Self(wanted))
    }

    fn ignored(&self) -> &Ignored {
        &self.0.ignored
    }
}

fn message(raw: &RawValue, index: usize, ignored: &mut Ignored) -> Result<ChatMessage, ApiError> {
    let path = format!("messages[{index}]");
    let mut fields = Fields::of_value(raw, &path)?;
    fields.refuse(&["images", "tool_calls", "tool_name", "thinking"])?;
    let Some(role) = fields.string("role")? else { return Err(invalid(&fields.name("role"), "is needed")) };
    let content = fields.string("content")?.unwrap_or_default();
    let mut unknown = Ignored::default();
    fields.without_path().note_ignored(&mut unknown);
    unknown.for_each(|name| ignored.add(&format!("messages[].{name}")));
    Ok(ChatMessage { role, content, ..ChatMessage::default() })
}

impl Body for GenerateBody {
    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        fields.refuse(&["images", "template", "context"])?;
        let prompt = fields.string("prompt")?.unwrap_or_default();
        let suffix = fields.string("suffix")?.unwrap_or_default();
        let system = fields.string("system")?.unwrap_or_default();
        let raw = fields.bool("raw")?.unwrap_or(false);
        let enable_thinking = think(&mut fields)?;
        let mut wanted = wanted(&mut fields, limits, Ignored::default())?;
        wanted.input = if !suffix.is_empty() {
            if !system.is_empty() {
                return Err(invalid("system", "cannot be used together with `suffix`"));
            }
            Some(Input::Fim(FimInput { prefix: prompt, suffix, param: "suffix", ..FimInput::default() }))
        } else if prompt.is_empty() {
            None
        } else if raw {
            Some(Input::Text { text: prompt, add_special_tokens: true })
        } else {
            let say = |role: &str, content| ChatMessage { role: role.to_owned(), content, ..ChatMessage::default() };
            let mut messages = Vec::new();
            if !system.is_empty() {
                messages.push(say("system", system));
            }
            messages.push(say("user", prompt));
            Some(Input::Chat(ChatInput { messages, enable_thinking, include_reasoning: false, ..ChatInput::default() }))
        };
        Ok(Self(wanted))
    }

    fn ignored(&self) -> &Ignored {
        &self.0.ignored
    }
}

impl Body for ShowBody {
    fn parse(body: &[u8], _: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let model = match fields.string("model")? {
            Some(model) => Some(model),
            None => fields.string("name")?,
        };
        let Some(model) = model else { return Err(invalid("model", "is needed")) };
        let _ = (fields.raw("verbose"), fields.raw("name"));
        let mut ignored = Ignored::default();
        fields.note_ignored(&mut ignored);
        Ok(Self { model, ignored })
    }

    fn ignored(&self) -> &Ignored {
        &self.ignored
    }
}

/// Ollama's clients may put a tag behind a name; there is one of each model.
fn without_tag(name: String) -> String {
    name.strip_suffix(":latest").map_or(name.clone(), str::to_owned)
}

/// `POST /api/chat`
pub(super) async fn chat(State(service): State<GenerationService>, request: Request) -> Result<Response, Failure> {
    let Parsed { id, body, share } = receive::<ChatBody>(&service, Endpoint::OllamaChat, request).await?;
    answer(service, Endpoint::OllamaChat, id, body.0, share).await
}

/// `POST /api/generate`
pub(super) async fn generate(State(service): State<GenerationService>, request: Request) -> Result<Response, Failure> {
    let Parsed { id, body, share } = receive::<GenerateBody>(&service, Endpoint::OllamaGenerate, request).await?;
    answer(service, Endpoint::OllamaGenerate, id, body.0, share).await
}

async fn answer(
    service: GenerationService,
    endpoint: Endpoint,
    id: RequestId,
    wanted: Wanted,
    share: crate::body_budget::BodyShare,
) -> Result<Response, Failure> {
    let begun = Instant::now();
    let Wanted { model, input, params, num_ctx, stream, ignored } = wanted;
    let max_model_len = service.model().info().max_model_len;
    if num_ctx.is_some_and(|len| len > u64::from(max_model_len)) {
        let must = format!("must be at most {max_model_len}, the model's length");
        return Err(invalid("options.num_ctx", must).into());
    }
    let model = model.map(without_tag);
    let mut writer = LineWriter { model: service.model().name().to_owned(), endpoint, begun, first: None, cause: None };
    let Some(input) = input else {
        service.check_model(model)?;
        let mut body = Vec::new();
        writer.line("", Some(json!({"done_reason": "load"})), &mut body);
        return Ok(json_response(body, &ignored));
    };
    let ask = Ask { endpoint, request_id: id.0.to_string(), model, input, params };
    let generation: Generation = ask.start(&service).await?;
    drop(share);
    if stream {
        let mut response = streamed(&service, Generations::new(vec![generation]), writer, NDJSON, 1).await?;
        name_ignored(&mut response, &ignored);
        return Ok(response);
    }
    let whole = whole(generation).await?;
    writer.cause = Some(whole.cause);
    let mut body = Vec::new();
    let last = writer.last(whole.usage);
    writer.line(&whole.text, Some(last), &mut body);
    Ok(json_response(body, &ignored))
}

fn now() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format_time(now.as_secs(), now.subsec_millis())
}

/// One JSON object a line; the last one says `done`.
struct LineWriter {
    model: String,
    endpoint: Endpoint,
    begun: Instant,
    first: Option<Instant>,
    cause: Option<StopCause>,
}

impl LineWriter {
    fn line(&self, text: &str, last: Option<Value>, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"model\":");
        push_json(&self.model, out);
        out.extend_from_slice(b",\"created_at\":\"");
        out.extend_from_slice(now().as_bytes());
        match self.endpoint {
            Endpoint::OllamaChat => {
                out.extend_from_slice(b"\",\"message\":{\"role\":\"assistant\",\"content\":");
                push_json(&text, out);
                out.push(b'}');
            }
            _ => {
                out.extend_from_slice(b"\",\"response\":");
                push_json(&text, out);
            }
        }
        match last {
            None => out.extend_from_slice(b",\"done\":false}\n"),
            Some(last) => {
                out.extend_from_slice(b",\"done\":true,");
                // The fields of an object, without its first brace.
                out.extend_from_slice(to_json(&last).get(1..).unwrap_or_default());
                out.push(b'\n');
            }
        }
    }

    /// What the last line says beside the text. Durations are in nanoseconds.
    fn last(&self, usage: Usage) -> Value {
        let now = Instant::now();
        let first = self.first.unwrap_or(now);
        let nanos = |from: Instant, to: Instant| {
            u64::try_from(to.saturating_duration_since(from).as_nanos()).unwrap_or(u64::MAX)
        };
        json!({
            "done_reason": if matches!(self.cause, Some(StopCause::Length)) { "length" } else { "stop" },
            "total_duration": nanos(self.begun, now),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": nanos(self.begun, first),
            "eval_count": usage.completion_tokens,
            "eval_duration": nanos(first, now),
        })
    }
}

impl Framing for LineWriter {
    fn event(&mut self, _: usize, event: GenerationEvent, out: &mut Vec<u8>) {
        match event {
            GenerationEvent::Delta { text, .. } => {
                self.first.get_or_insert_with(Instant::now);
                if !text.is_empty() {
                    self.line(&text, None, out);
                }
            }
            GenerationEvent::ChoiceFinished { cause, .. } => self.cause = Some(cause),
            // Neither tools nor reasoning are asked for by this dialect, and ends are framed by the stream.
            GenerationEvent::Reasoning { .. }
            | GenerationEvent::ToolCall { .. }
            | GenerationEvent::PromptLogprobs { .. }
            | GenerationEvent::Done { .. }
            | GenerationEvent::Error(_) => {}
        }
    }

    fn done(&mut self, usage: Usage, out: &mut Vec<u8>) {
        self.line("", Some(self.last(usage)), out);
    }

    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        out.extend_from_slice(&error_json(error, Dialect::Ollama, ""));
        out.push(b'\n');
    }

    fn waiting(&mut self, out: &mut Vec<u8>) {
        // Every line is read as an object; there are no comments.
        self.line("", None, out);
    }
}

fn details(model: &ServedModel) -> Value {
    let info = model.info();
    let family = info.architecture.split("For").next().unwrap_or_default().to_ascii_lowercase();
    json!({
        "parent_model": "",
        "format": "quire",
        "family": family,
        "families": [family],
        "parameter_size": format!("{:.1}M", info.num_parameters as f64 / 1e6),
        "quantization_level": info.weight_format,
    })
}

fn entry(model: &ServedModel) -> Value {
    let info = model.info();
    json!({
        "name": model.name(),
        "model": model.name(),
        "modified_at": format_time(model.created(), 0),
        "size": info.weight_bytes,
        "digest": info.digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>(),
        "details": details(model),
    })
}

/// `GET /api/tags`
pub(super) async fn tags(State(service): State<GenerationService>) -> Response {
    json_response(to_json(&json!({"models": [entry(service.model())]})), &Ignored::default())
}

/// `GET /api/ps`
pub(super) async fn running(State(service): State<GenerationService>) -> Response {
    let mut running = entry(service.model());
    // It is never unloaded.
    running["expires_at"] = json!("9999-12-31T23:59:59Z");
    running["size_vram"] = json!(0);
    running["context_length"] = json!(service.model().info().max_model_len);
    json_response(to_json(&json!({"models": [running]})), &Ignored::default())
}

/// `POST /api/show`
pub(super) async fn show(State(service): State<GenerationService>, request: Request) -> Result<Response, Failure> {
    let Parsed { body, .. } = receive::<ShowBody>(&service, Endpoint::OllamaGenerate, request).await?;
    service.check_model(Some(without_tag(body.model)))?;
    let model = service.model();
    let mut capabilities = vec!["completion"];
    if model.fim().is_some() {
        capabilities.push("insert");
    }
    let defaults = serde_json::to_value(model.defaults()).unwrap_or_default();
    let parameters: Vec<String> = defaults
        .as_object()
        .map(|defaults| defaults.iter().map(|(name, value)| format!("{name} {value}")).collect())
        .unwrap_or_default();
    let info = model.info();
    let answer = json!({
        "modelfile": "",
        "parameters": parameters.join("\n"),
        "template": "",
        "details": details(model),
        "model_info": {
            "general.architecture": info.architecture,
            "general.parameter_count": info.num_parameters,
            "quire.context_length": info.max_model_len,
            "quire.vocab_size": info.vocab_size,
        },
        "capabilities": capabilities,
        "modified_at": format_time(model.created(), 0),
    });
    Ok(json_response(to_json(&answer), &body.ignored))
}

/// `GET /api/version`
pub(super) async fn version() -> Response {
    json_response(to_json(&json!({"version": env!("CARGO_PKG_VERSION")})), &Ignored::default())
}
