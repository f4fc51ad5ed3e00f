//! The OpenAI-compatible bodies, with the extras that vLLM made common: which fields there are and what they hold.
//!
//! A field is served, or refused by name because it is understood and not served, or named in the response's
//! `x-quire-ignored-params`. Ranges are for [`crate::generation`] to check.

use serde_json::value::RawValue;

use crate::error::ApiError;
use crate::fim::FimInput;
use crate::generation::{
    ChatInput, ChatMessage, GenerationParams, Input, Keep, Limits, TruncateTo, Truncation, invalid,
};
use crate::random::is_request_id;
use crate::served_model::ServedModel;
use crate::served_models::Task;

use super::fields::{Fields, Ignored, list, raw_list};
use super::format::format;
use super::items::note_unread_thinking;
use super::receive::Body;
use super::tools::{calls, tools};

/// Most parts of one message.
const MAX_PARTS: usize = 1024;
/// Default of `max_tokens` for completions, as OpenAI documents it.
const DEFAULT_COMPLETION_TOKENS: u64 = 16;

/// Most tokens between two chunks of a stream.
const MAX_STREAM_INTERVAL: u32 = 4096;

/// Fields of both endpoints that are understood and not served.
const UNSUPPORTED: [&str; 22] = [
    "logits_processors",
    "logit_processors",
    "custom_logit_processor",
    "use_beam_search",
    "prompt_embeds",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "lora_request",
    "lora_path",
    "thinking_token_budget",
    "repetition_detection",
    "logprob_token_ids",
    "watermarking",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "return_mm_kwargs",
    "return_prompt_text",
    "return_token_offsets",
    "routed_experts_prompt_start",
    "background",
    "previous_response_id",
];

/// Fields of chat requests that are understood and not served.
const UNSUPPORTED_IN_CHAT: [&str; 6] = ["audio", "web_search_options", "prediction", "chat_template", "echo", "suffix"];

/// How a response is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct StreamOptions {
    pub(super) stream: bool,
    /// Tokens of a choice between two chunks; 0 and 1 are the same.
    pub(super) interval: u32,
    pub(super) include_usage: bool,
    pub(super) continuous_usage: bool,
}

/// What both endpoints have in common.
pub(super) struct Common {
    pub(super) model: Option<String>,
    pub(super) request_id: Option<String>,
    pub(super) params: GenerationParams,
    pub(super) stream: StreamOptions,
    pub(super) return_token_ids: bool,
    pub(super) tokens_as_ids: bool,
    pub(super) ignored: Ignored,
}

/// A body of `/v1/chat/completions`.
pub(super) struct ChatBody {
    pub(super) common: Common,
    pub(super) input: ChatInput,
}

/// A body of `/v1/completions`.
pub(super) struct CompletionsBody {
    pub(super) common: Common,
    pub(super) prompts: Vec<Prompt>,
    pub(super) add_special_tokens: bool,
    pub(super) echo: bool,
    /// `max_tokens` is 0: the prompt alone is wanted back.
    pub(super) echo_only: bool,
    /// Whether the field itself was given; `echo` with `logprobs` needs the values too.
    pub(super) wants_prompt_logprobs: bool,
}

/// One prompt of a completions request.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Prompt {
    Text(String),
    TokenIds(Vec<u32>),
    Fim(FimInput),
}

impl Prompt {
    /// The gap between a prompt and a text behind it.
    fn before(self, suffix: &str) -> Result<Self, ApiError> {
        match self {
            Self::Text(prefix) => {
                Ok(Self::Fim(FimInput { prefix, suffix: suffix.to_owned(), param: "suffix", ..FimInput::default() }))
            }
            _ => Err(invalid("suffix", "needs prompts in text")),
        }
    }

    pub(super) fn into_input(self, add_special_tokens: bool) -> Input {
        match self {
            Self::Text(text) => Input::Text { text, add_special_tokens },
            Self::TokenIds(ids) => Input::TokenIds(ids),
            Self::Fim(fim) => Input::Fim(fim),
        }
    }
}

impl Body for ChatBody {
    fn model(&self) -> Option<&str> {
        self.common.model.as_deref()
    }

    fn ignored(&self) -> &Ignored {
        &self.common.ignored
    }

    fn note_unread(&mut self, model: &ServedModel) {
        let Some(template) = model.chat_template() else { return };
        let ignored = &mut self.common.ignored;
        let switch = "chat_template_kwargs.enable_thinking";
        note_unread_thinking(&self.input, template, switch, "reasoning_effort", ignored);
        if !self.input.documents.is_empty() && !template.mentions("documents") {
            ignored.add("documents");
        }
    }

    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let mut ignored = Ignored::default();
        fields.refuse(&UNSUPPORTED_IN_CHAT)?;
        fields.refuse_unless("modalities", |raw| raw.split_whitespace().collect::<String>() == "[\"text\"]")?;
        let mut params = params(&mut fields, limits)?;
        params.max_tokens = match fields.count("max_completion_tokens")? {
            Some(count) => Some(count),
            None => fields.count("max_tokens")?,
        };
        let top_logprobs = fields.count("top_logprobs")?;
        params.logprobs = match (fields.bool("logprobs")?.unwrap_or(false), top_logprobs) {
            (true, top) => Some(top.unwrap_or(0)),
            (false, None | Some(0)) => None,
            (false, Some(_)) => return Err(invalid("top_logprobs", "needs `logprobs` to be true")),
        };
        let input = chat_input(&mut fields, limits, &mut ignored)?;
        let common = common(&mut fields, params, limits, ignored)?;
        if common.stream.stream && common.params.prompt_logprobs.is_some() {
            return Err(invalid("prompt_logprobs", "cannot be streamed"));
        }
        Ok(Self { common, input })
    }
}

impl Body for CompletionsBody {
    fn model(&self) -> Option<&str> {
        self.common.model.as_deref()
    }

    fn ignored(&self) -> &Ignored {
        &self.common.ignored
    }

    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        // An empty suffix is none, as in OpenAI's API.
        let suffix = fields.string("suffix")?.filter(|suffix| !suffix.is_empty());
        let mut params = params(&mut fields, limits)?;
        let echo = fields.bool("echo")?.unwrap_or(false);
        let max_tokens = fields.count("max_tokens")?.unwrap_or(DEFAULT_COMPLETION_TOKENS);
        let echo_only = echo && max_tokens == 0;
        // The engine generates at least one token; the answer leaves it out.
        params.max_tokens = Some(if echo_only { 1 } else { max_tokens });
        params.logprobs = match fields.raw("logprobs").map(RawValue::get) {
            None | Some("false") => None,
            Some(_) => fields.count("logprobs")?,
        };
        let wants_prompt_logprobs = params.prompt_logprobs.is_some();
        if echo && params.prompt_logprobs.is_none() {
            params.prompt_logprobs = params.logprobs;
        }
        let n = params.n.unwrap_or(1);
        if fields.count("best_of")?.is_some_and(|best_of| best_of != n) {
            return Err(invalid("best_of", "is only supported where it equals `n`"));
        }
        let prompts = match fields.raw("prompt") {
            Some(raw) => prompts(raw, "prompt", limits.max_prompts)?,
            None => return Err(invalid("prompt", "is needed")),
        };
        let prompts = match suffix {
            None => prompts,
            Some(_) if echo => return Err(invalid("echo", "cannot be used together with `suffix`")),
            Some(suffix) => prompts.into_iter().map(|prompt| prompt.before(&suffix)).collect::<Result<_, _>>()?,
        };
        let add_special_tokens = fields.bool("add_special_tokens")?.unwrap_or(true);
        let common = common(&mut fields, params, limits, Ignored::default())?;
        if common.stream.stream && wants_prompt_logprobs {
            return Err(invalid("prompt_logprobs", "cannot be streamed"));
        }
        Ok(Self { common, prompts, add_special_tokens, echo, echo_only, wants_prompt_logprobs })
    }
}

/// A body of `/tokenize`.
pub(super) struct TokenizeBody {
    pub(super) model: Option<String>,
    pub(super) input: Input,
    pub(super) return_token_strs: bool,
    pub(super) ignored: Ignored,
}

impl Body for TokenizeBody {
    const TASK: Task = Task::Any;

    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn ignored(&self) -> &Ignored {
        &self.ignored
    }

    fn parse(body: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let mut ignored = Ignored::default();
        fields.refuse(&["chat_template", "mm_processor_kwargs"])?;
        let prompt = fields.string("prompt")?;
        let has_messages = fields.raw("messages").is_some();
        let input = match prompt {
            Some(_) if has_messages => return Err(invalid("prompt", "and `messages` cannot be used together")),
            Some(text) => Input::Text { text, add_special_tokens: fields.bool("add_special_tokens")?.unwrap_or(true) },
            None if has_messages => Input::Chat(chat_input(&mut fields, limits, &mut ignored)?),
            None => return Err(invalid("prompt", "or `messages` is needed")),
        };
        let model = fields.string("model")?;
        let return_token_strs = fields.bool("return_token_strs")?.unwrap_or(false);
        fields.note_ignored(&mut ignored);
        Ok(Self { model, input, return_token_strs, ignored })
    }
}

/// A body of `/detokenize`.
pub(super) struct DetokenizeBody {
    pub(super) model: Option<String>,
    pub(super) tokens: Vec<u32>,
    pub(super) ignored: Ignored,
}

impl Body for DetokenizeBody {
    const TASK: Task = Task::Any;

    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn ignored(&self) -> &Ignored {
        &self.ignored
    }

    fn parse(body: &[u8], _: &Limits) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let mut ignored = Ignored::default();
        let Some(tokens) = fields.list("tokens", usize::MAX, "hold token ids")? else {
            return Err(invalid("tokens", "is needed"));
        };
        let model = fields.string("model")?;
        fields.note_ignored(&mut ignored);
        Ok(Self { model, tokens, ignored })
    }
}

/// Sampling and limits, but for `max_tokens` and `logprobs`, which the endpoints spell differently.
pub(super) fn params(fields: &mut Fields<'_>, limits: &Limits) -> Result<GenerationParams, ApiError> {
    let priority = match fields.integer("priority")? {
        Some(priority) => priority,
        None => tier_priority(fields)?,
    };
    Ok(GenerationParams {
        max_tokens: None,
        min_tokens: fields.count("min_tokens")?,
        n: fields.count("n")?,
        temperature: fields.number("temperature")?,
        top_k: fields.integer("top_k")?,
        top_p: fields.number("top_p")?,
        min_p: fields.number("min_p")?,
        typical_p: fields.number("typical_p")?,
        repetition_penalty: fields.number("repetition_penalty")?,
        presence_penalty: fields.number("presence_penalty")?,
        frequency_penalty: fields.number("frequency_penalty")?,
        logit_bias: fields.numbers_by_token("logit_bias", limits.max_logit_bias)?,
        // No list of distinct tokens is longer than the vocabulary; the body's size bounds it before that is known.
        allowed_token_ids: fields.list("allowed_token_ids", usize::MAX, "hold token ids")?,
        bad_words: fields.list("bad_words", limits.max_bad_words, "hold strings")?.unwrap_or_default(),
        stop: fields.strings("stop", limits.max_stop)?,
        include_stop_str_in_output: fields.bool("include_stop_str_in_output")?.unwrap_or(false),
        stop_token_ids: fields.list("stop_token_ids", limits.max_stop_token_ids, "hold token ids")?.unwrap_or_default(),
        ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
        seed: fields.integer("seed")?,
        logprobs: None,
        prompt_logprobs: fields.count("prompt_logprobs")?,
        skip_special_tokens: fields.bool("skip_special_tokens")?,
        priority: i32::try_from(priority).map_err(|_| invalid("priority", "must be a whole number of 32 bits"))?,
        cache_salt: fields.string("cache_salt")?,
        truncation: truncation(fields)?,
        // Its tokens would have to be told apart from text: gRPC has the field.
        resume: None,
        // Both endpoints have it, beside what they have in common.
        format: None,
    })
}

/// OpenAI's tiers as priorities, for requests that give none: lower is admitted earlier.
fn tier_priority(fields: &mut Fields<'_>) -> Result<i64, ApiError> {
    match fields.string("service_tier")?.as_deref() {
        None | Some("auto" | "default" | "standard_only") => Ok(0),
        Some("priority") => Ok(-1),
        Some("flex") => Ok(1),
        Some(_) => Err(invalid("service_tier", "must be auto, default, flex or priority")),
    }
}

/// What becomes of a prompt that is too long.
fn truncation(fields: &mut Fields<'_>) -> Result<Option<Truncation>, ApiError> {
    let keep = match fields.string("truncation_side")?.as_deref() {
        None | Some("left") => Keep::Last,
        Some("right") => Keep::First,
        Some(_) => return Err(invalid("truncation_side", "must be left or right")),
    };
    let to = match fields.integer("truncate_prompt_tokens")? {
        None => return Ok(None),
        Some(-1) => TruncateTo::Fit,
        Some(count) => {
            let count = u64::try_from(count)
                .map_err(|_| invalid("truncate_prompt_tokens", "must be at least 1, or -1 for what fits"))?;
            TruncateTo::Tokens(count)
        }
    };
    Ok(Some(Truncation { to, keep }))
}

/// Sampling fields alone, as other contracts than OpenAI's carry them: any other field is refused.
pub(crate) fn sampling_of_json(json: &[u8], limits: &Limits) -> Result<GenerationParams, ApiError> {
    let mut fields = Fields::of_body(json)?;
    fields.refuse(&UNSUPPORTED)?;
    let mut params = params(&mut fields, limits)?;
    params.max_tokens = fields.count("max_tokens")?;
    let mut unknown = Ignored::default();
    params.format = format(&mut fields, limits, &mut unknown)?;
    fields.note_ignored(&mut unknown);
    match unknown.first() {
        Some(name) => Err(invalid(name, "is not known")),
        None => Ok(params),
    }
}

pub(super) fn common(
    fields: &mut Fields<'_>,
    mut params: GenerationParams,
    limits: &Limits,
    mut ignored: Ignored,
) -> Result<Common, ApiError> {
    fields.refuse(&UNSUPPORTED)?;
    fields.refuse_unless("length_penalty", |raw| raw.parse() == Ok(1.0))?;
    fields.refuse_unless("spaces_between_special_tokens", |raw| raw == "true")?;
    params.format = format(fields, limits, &mut ignored)?;
    // Labels without an effect, in OpenAI's API too.
    fields.string("user")?;
    if let Some(raw) = fields.raw("metadata") {
        Fields::of_value(raw, "metadata")?;
    }
    let stream = fields.bool("stream")?.unwrap_or(false);
    let interval = fields.count("stream_interval")?.unwrap_or(1);
    let interval = u32::try_from(interval).ok().filter(|interval| (1..=MAX_STREAM_INTERVAL).contains(interval));
    let Some(interval) = interval else {
        return Err(invalid("stream_interval", format_args!("must be between 1 and {MAX_STREAM_INTERVAL}")));
    };
    let mut options = StreamOptions { stream, interval, ..StreamOptions::default() };
    if let Some(raw) = fields.raw("stream_options") {
        if !stream {
            return Err(invalid("stream_options", "needs `stream` to be true"));
        }
        let mut stream_options = Fields::of_value(raw, "stream_options")?;
        options.include_usage = stream_options.bool("include_usage")?.unwrap_or(false);
        options.continuous_usage = stream_options.bool("continuous_usage_stats")?.unwrap_or(false);
        stream_options.note_ignored(&mut ignored);
    }
    let request_id = fields.string("request_id")?;
    if request_id.as_deref().is_some_and(|id| !is_request_id(id)) {
        return Err(invalid("request_id", "must have 1 to 128 letters, digits, dots, dashes or underscores"));
    }
    let common = Common {
        model: fields.string("model")?,
        request_id,
        params,
        stream: options,
        return_token_ids: fields.bool("return_token_ids")?.unwrap_or(false),
        tokens_as_ids: fields.bool("return_tokens_as_token_ids")?.unwrap_or(false),
        ignored: {
            fields.note_ignored(&mut ignored);
            ignored
        },
    };
    Ok(common)
}

fn chat_input(fields: &mut Fields<'_>, limits: &Limits, ignored: &mut Ignored) -> Result<ChatInput, ApiError> {
    let Some(raw) = fields.raw("messages") else { return Err(invalid("messages", "is needed")) };
    let messages = raw_list(raw, "messages", limits.max_messages)?
        .into_iter()
        .enumerate()
        .map(|(index, raw)| message(raw, index, ignored))
        .collect::<Result<_, _>>()?;
    let continue_final_message = fields.bool("continue_final_message")?.unwrap_or(false);
    let mut input = ChatInput {
        messages,
        add_generation_prompt: fields.bool("add_generation_prompt")?.unwrap_or(!continue_final_message),
        continue_final_message,
        add_special_tokens: fields.bool("add_special_tokens")?.unwrap_or(false),
        reasoning_effort: fields.string("reasoning_effort")?,
        include_reasoning: fields.bool("include_reasoning")?.unwrap_or(true),
        documents: fields.list("documents", limits.max_documents, "hold objects")?.unwrap_or_default(),
        ..ChatInput::default()
    };
    tools(fields, limits, ignored, &mut input)?;
    if let Some(raw) = fields.raw("chat_template_kwargs") {
        // A list of what may be passed on, not of what may not: a template's variables decide what it does.
        let mut kwargs = Fields::of_value(raw, "chat_template_kwargs")?;
        input.enable_thinking = match kwargs.bool("enable_thinking")? {
            Some(enable) => Some(enable),
            None => kwargs.bool("thinking")?,
        };
        if let Some(effort) = kwargs.string("reasoning_effort")? {
            input.reasoning_effort = Some(effort);
        }
        let mut unknown = Ignored::default();
        kwargs.note_ignored(&mut unknown);
        if unknown.header().is_some() {
            let must = "may only hold `enable_thinking`, `thinking` or `reasoning_effort`";
            return Err(invalid("chat_template_kwargs", must));
        }
    }
    // The least effort is none, which templates have another switch for.
    if input.reasoning_effort.as_deref() == Some("none") && input.enable_thinking.is_none() {
        input.enable_thinking = Some(false);
    }
    Ok(input)
}

fn message(raw: &RawValue, index: usize, ignored: &mut Ignored) -> Result<ChatMessage, ApiError> {
    let path = format!("messages[{index}]");
    let mut fields = Fields::of_value(raw, &path)?;
    let Some(role) = fields.string("role")? else { return Err(invalid(&fields.name("role"), "is needed")) };
    fields.refuse(&["function_call", "audio"])?;
    let tool_calls = calls(&mut fields)?;
    let name = fields.name("content");
    let content = match fields.raw("content") {
        // An assistant that called tools need not have said anything.
        None if !tool_calls.is_empty() => String::new(),
        None => return Err(invalid(&name, "is needed")),
        Some(raw) if raw.get().starts_with('[') => parts(raw, &name, ignored)?,
        Some(_) => fields.typed_content()?,
    };
    let reasoning = match fields.string("reasoning_content")? {
        Some(reasoning) => Some(reasoning),
        None => fields.string("reasoning")?,
    };
    let message = ChatMessage {
        role,
        content,
        name: fields.string("name")?,
        tool_calls,
        tool_call_id: fields.string("tool_call_id")?,
        reasoning,
    };
    let _ = fields.raw("refusal");
    // One name for all messages.
    let mut unknown = Ignored::default();
    fields.without_path().note_ignored(&mut unknown);
    unknown.for_each(|name| ignored.add(&format!("messages[].{name}")));
    Ok(message)
}

/// The text of a message's parts, one after the other.
fn parts(raw: &RawValue, name: &str, ignored: &mut Ignored) -> Result<String, ApiError> {
    let mut content = String::new();
    for (index, raw) in raw_list(raw, name, MAX_PARTS)?.into_iter().enumerate() {
        let path = format!("{name}[{index}]");
        let mut part = Fields::of_value(raw, &path)?;
        match part.string("type")?.as_deref() {
            Some("text" | "input_text") | None => {}
            Some(_) => return Err(invalid(&part.name("type"), "must be `text`: the model reads nothing else")),
        }
        match part.string("text")? {
            Some(text) => content.push_str(&text),
            None => return Err(invalid(&part.name("text"), "is needed")),
        }
        let mut unknown = Ignored::default();
        part.without_path().note_ignored(&mut unknown);
        unknown.for_each(|name| ignored.add(&format!("messages[].content[].{name}")));
    }
    Ok(content)
}

/// A string, a list of strings, a list of token ids, or a list of such lists.
pub(super) fn prompts(raw: &RawValue, name: &str, limit: usize) -> Result<Vec<Prompt>, ApiError> {
    const MUST: &str = "be a string, a list of token ids, or a list of either";
    let text = raw.get();
    let first = text.strip_prefix('[').map(str::trim_start);
    let prompts: Vec<Prompt> = match (first, first.and_then(|items| items.bytes().next())) {
        (None, _) if text.starts_with('"') => {
            vec![Prompt::Text(serde_json::from_str(text).map_err(|_| invalid(name, format_args!("must {MUST}")))?)]
        }
        (Some(_), Some(b'"')) => list(raw, name, limit, MUST)?.into_iter().map(Prompt::Text).collect(),
        (Some(_), Some(b'[')) => list(raw, name, limit, MUST)?.into_iter().map(Prompt::TokenIds).collect(),
        (Some(_), Some(b'0'..=b'9')) => vec![Prompt::TokenIds(list(raw, name, usize::MAX, MUST)?)],
        (Some(_), Some(b']')) => return Err(invalid(name, "must not be empty")),
        _ => return Err(invalid(name, format_args!("must {MUST}"))),
    };
    Ok(prompts)
}
