//! A body of `/v1/responses`.

use serde_json::Value;
use serde_json::value::RawValue;

use crate::error::ApiError;
use crate::generation::{ChatMessage, GenerationParams, Limits, invalid};
use crate::http::ask::one_choice;
use crate::http::fields::{Fields, Ignored, raw_list};
use crate::http::format::flat_format;
use crate::http::receive::Body;
use crate::http::types;

/// Most parts of one item.
const MAX_PARTS: usize = 1024;
/// Entries, and bytes of a key and a value, of `metadata`.
const MAX_METADATA: usize = 16;
const MAX_METADATA_KEY: usize = 64;
const MAX_METADATA_VALUE: usize = 512;

/// Fields that are understood and not served.
const UNSUPPORTED: [&str; 5] = ["tools", "prompt", "conversation", "context_management", "structured_outputs"];

pub(super) struct ResponsesBody {
    pub(super) model: Option<String>,
    /// Without what went before and without `instructions`.
    pub(super) input: Vec<ChatMessage>,
    pub(super) instructions: Option<String>,
    pub(super) previous: Option<String>,
    pub(super) params: GenerationParams,
    pub(super) top_logprobs: u64,
    pub(super) max_output_tokens: Option<u64>,
    pub(super) metadata: Value,
    /// As it came, to be said again.
    pub(super) text: Value,
    pub(super) store: bool,
    pub(super) background: bool,
    pub(super) stream: bool,
    pub(super) ignored: Ignored,
}

impl Body for ResponsesBody {
    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let mut ignored = Ignored::default();
        fields.refuse(&UNSUPPORTED)?;
        fields.refuse_unless("tool_choice", |raw| matches!(raw, "\"none\"" | "\"auto\""))?;
        fields.refuse_unless("truncation", |raw| raw == "\"disabled\"")?;
        if let Some(raw) = fields.raw("reasoning") {
            let mut reasoning = Fields::of_value(raw, "reasoning")?;
            reasoning.refuse_unless("effort", |raw| raw == "\"none\"")?;
            let _ = (reasoning.raw("summary"), reasoning.raw("generate_summary"));
        }
        let mut format = None;
        let mut said = serde_json::json!({"type": "text"});
        if let Some(raw) = fields.raw("text") {
            let mut text = Fields::of_value(raw, "text")?;
            let _ = text.raw("verbosity");
            if let Some(raw) = text.raw("format") {
                format = flat_format(raw, "text.format", &mut ignored)?;
                said = serde_json::from_str(raw.get()).unwrap_or_default();
            }
        }
        let mut params = types::params(&mut fields, limits)?;
        one_choice(&params)?;
        params.format = format;
        let max_output_tokens = fields.count("max_output_tokens")?;
        params.max_tokens = max_output_tokens;
        let top_logprobs = fields.count("top_logprobs")?.unwrap_or(0);
        for name in fields.list::<String>("include", MAX_PARTS, "hold strings")?.unwrap_or_default() {
            match name.as_str() {
                "message.output_text.logprobs" => params.logprobs = Some(top_logprobs),
                // There is never any to include.
                "reasoning.encrypted_content" => {}
                _ => return Err(invalid("include", "may only hold `message.output_text.logprobs`")),
            }
        }
        if top_logprobs > 0 && params.logprobs.is_none() {
            params.logprobs = Some(top_logprobs);
        }
        let Some(raw) = fields.raw("input") else { return Err(invalid("input", "is needed")) };
        let input = input(raw, limits, &mut ignored)?;
        // Labels without an effect, in OpenAI's API too, and limits on calls that are never made.
        for label in ["user", "safety_identifier", "prompt_cache_key", "parallel_tool_calls", "max_tool_calls"] {
            let _ = fields.raw(label);
        }
        let stream = fields.bool("stream")?.unwrap_or(false);
        if let Some(raw) = fields.raw("stream_options") {
            let _ = Fields::of_value(raw, "stream_options")?.raw("include_obfuscation");
        }
        let (store, background) = (fields.bool("store")?.unwrap_or(true), fields.bool("background")?.unwrap_or(false));
        if background && !store {
            return Err(invalid("background", "needs `store` to be true"));
        }
        if background && stream {
            return Err(invalid("background", "cannot be used together with `stream`"));
        }
        let body = Self {
            model: fields.string("model")?,
            input,
            instructions: fields.string("instructions")?,
            previous: fields.string("previous_response_id")?,
            params,
            top_logprobs,
            max_output_tokens,
            metadata: metadata(&mut fields)?,
            text: serde_json::json!({"format": said}),
            store,
            background,
            stream,
            ignored: Ignored::default(),
        };
        fields.note_ignored(&mut ignored);
        Ok(Self { ignored, ..body })
    }

    fn ignored(&self) -> &Ignored {
        &self.ignored
    }
}

/// Labels that come back with the response.
fn metadata(fields: &mut Fields<'_>) -> Result<Value, ApiError> {
    let wrong = || {
        invalid(
            "metadata",
            format_args!(
                "must map at most {MAX_METADATA} strings of {MAX_METADATA_KEY} bytes to strings of {MAX_METADATA_VALUE}"
            ),
        )
    };
    let Some(raw) = fields.raw("metadata") else { return Ok(Value::Object(Default::default())) };
    let labels: std::collections::BTreeMap<String, String> = serde_json::from_str(raw.get()).map_err(|_| wrong())?;
    let is_small =
        |(key, value): (&String, &String)| key.len() <= MAX_METADATA_KEY && value.len() <= MAX_METADATA_VALUE;
    if labels.len() > MAX_METADATA || !labels.iter().all(is_small) {
        return Err(wrong());
    }
    serde_json::to_value(labels).map_err(|_| wrong())
}

/// A text, or a list of messages.
fn input(raw: &RawValue, limits: &Limits, ignored: &mut Ignored) -> Result<Vec<ChatMessage>, ApiError> {
    if raw.get().starts_with('"') {
        let content = serde_json::from_str(raw.get()).map_err(|_| invalid("input", "must be a string or a list"))?;
        return Ok(vec![ChatMessage { role: "user".to_owned(), content, ..ChatMessage::default() }]);
    }
    raw_list(raw, "input", limits.max_messages)?
        .into_iter()
        .enumerate()
        .map(|(index, raw)| {
            let mut item = Fields::of_value(raw, &format!("input[{index}]"))?;
            if item.string("type")?.is_some_and(|kind| kind != "message") {
                return Err(invalid(&item.name("type"), "must be `message`: nothing else is supported"));
            }
            let Some(role) = item.string("role")? else { return Err(invalid(&item.name("role"), "is needed")) };
            let name = item.name("content");
            let content = match item.raw("content") {
                None => return Err(invalid(&name, "is needed")),
                Some(raw) if raw.get().starts_with('[') => parts(raw, &name, ignored)?,
                Some(_) => item.typed_content()?,
            };
            // What an output item has when it comes back.
            let _ = (item.raw("id"), item.raw("status"), item.raw("phase"));
            let mut unknown = Ignored::default();
            item.without_path().note_ignored(&mut unknown);
            unknown.for_each(|name| ignored.add(&format!("input[].{name}")));
            Ok(ChatMessage { role, content, ..ChatMessage::default() })
        })
        .collect()
}

fn parts(raw: &RawValue, name: &str, ignored: &mut Ignored) -> Result<String, ApiError> {
    let mut content = String::new();
    for (index, raw) in raw_list(raw, name, MAX_PARTS)?.into_iter().enumerate() {
        let mut part = Fields::of_value(raw, &format!("{name}[{index}]"))?;
        match part.string("type")?.as_deref() {
            Some("input_text" | "output_text" | "text") => {}
            _ => return Err(invalid(&part.name("type"), "must be `input_text` or `output_text`")),
        }
        let Some(text) = part.string("text")? else { return Err(invalid(&part.name("text"), "is needed")) };
        content.push_str(&text);
        let _ = (part.raw("annotations"), part.raw("logprobs"));
        let mut unknown = Ignored::default();
        part.without_path().note_ignored(&mut unknown);
        unknown.for_each(|name| ignored.add(&format!("input[].content[].{name}")));
    }
    Ok(content)
}
