//! From what a request holds to the tokens of its prompt: everything that runs on the blocking pool, or where it came in if it
//! is little.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use quire_scheduler::CacheSalt;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::chat_template::{ChatTemplate, RenderOptions, TemplateError};
use crate::dialect::{is_behind_thought, is_in_thought};
use crate::error::ApiError;
use crate::fim::{FimInput, FimTokens};
use crate::random::random_u64;
use crate::served_model::ServedModel;
use crate::tokenizer::{EncodeError, Guarded, SpecialTokens, TextTokenizer};

use super::validate::invalid;
use super::{ChatInput, ChatMessage, Input, Limits, Tool, ToolChoice, plain};

/// Who can speak in a conversation. Closed, because templates write roles between special tokens.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];
/// Bytes of text that are worked on where they came in: another thread would take longer to begin than that takes.
const MAX_BYTES_AT_ONCE: usize = 512;
/// Bytes of text that a message takes the time of, beside its own.
const BYTES_OF_MESSAGE: usize = 64;
/// Bytes of a message's `name`.
const MAX_NAME_BYTES: usize = 64;
/// Bytes of the identity of a call.
pub(crate) const MAX_CALL_ID_BYTES: usize = 256;
/// Bytes of `reasoning_effort`.
const MAX_EFFORT_BYTES: usize = 16;

/// Runs text work beside the async threads: so many at once, so many waiting, and no more.
pub(super) struct TextPool {
    permits: Arc<Semaphore>,
    waiting: AtomicUsize,
    max_waiting: usize,
}

impl TextPool {
    /// Bytes of text that may be many.
    pub(super) const MANY: usize = usize::MAX;

    pub(super) fn new(limits: &Limits) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let at_once =
            if limits.max_concurrent_tokenizations == 0 { cores } else { limits.max_concurrent_tokenizations };
        Self {
            permits: Arc::new(Semaphore::new(at_once.min(Semaphore::MAX_PERMITS))),
            waiting: AtomicUsize::new(0),
            max_waiting: limits.max_waiting_tokenizations,
        }
    }

    /// Runs `work` on about `num_bytes` of text when its turn comes, and where that is little at once. Refuses at once where
    /// too many wait already.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        request_id: &str,
        num_bytes: usize,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        struct Waiting<'p>(&'p AtomicUsize);
        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let internal = || {
            tracing::error!(request_id, "text work ended without a result");
            ApiError::Internal { request_id: request_id.to_owned() }
        };
        // A panic of the tokenizer ends this request alone, here and there.
        if num_bytes <= MAX_BYTES_AT_ONCE {
            return catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(internal()));
        }
        let permit = {
            let waiting = Waiting(&self.waiting);
            if self.waiting.fetch_add(1, Ordering::Relaxed) >= self.max_waiting {
                return Err(ApiError::Overloaded { retry_after_seconds: 1 });
            }
            let permit = Arc::clone(&self.permits).acquire_owned().await;
            drop(waiting);
            permit
        };
        let Ok(permit) = permit else { return Err(internal()) };
        let result = tokio::task::spawn_blocking(move || {
            let result = work();
            drop(permit);
            result
        });
        result.await.unwrap_or_else(|_| Err(internal()))
    }
}

/// A prompt as tokens, and how its text ends.
pub(super) struct Encoded {
    pub(super) ids: Vec<u32>,
    pub(super) thought: Thought,
}

/// What a prompt says of the model's reasoning at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Thought {
    None,
    /// It opened a thought: the answer begins inside.
    Open,
    /// It closed one: the answer begins behind it.
    Closed,
}

/// A tool in OpenAI's shape.
fn tool_json(tool: &Tool) -> Value {
    let mut function = serde_json::Map::new();
    function.insert("name".to_owned(), tool.name.as_str().into());
    if let Some(description) = &tool.description {
        function.insert("description".to_owned(), description.as_str().into());
    }
    function.insert("parameters".to_owned(), tool.parameters.clone());
    json!({"type": "function", "function": function})
}

/// Every text in a value, names of fields too, as `guarded` makes it. Values nest no deeper than bodies do.
fn guard_json(value: Value, guarded: &impl Fn(&str) -> String) -> Value {
    match value {
        Value::String(text) => Value::String(guarded(&text)),
        Value::Array(items) => items.into_iter().map(|item| guard_json(item, guarded)).collect(),
        Value::Object(fields) => {
            let fields = fields.into_iter().map(|(name, value)| (guarded(&name), guard_json(value, guarded)));
            Value::Object(fields.collect())
        }
        other => other,
    }
}

/// A request's text, and what is needed to turn it into tokens.
pub(super) struct TextWork {
    tokenizer: Arc<TextTokenizer>,
    template: Option<Arc<ChatTemplate>>,
    fim: Option<Arc<FimTokens>>,
    special_tokens: SpecialTokens,
    now_seconds: u64,
    /// Of the caller's cached blocks, and so of the texts whose tokens are known; `None` knows none.
    salt: Option<CacheSalt>,
}

impl TextWork {
    pub(super) fn new(model: &ServedModel, limits: &Limits, now_seconds: u64, salt: Option<CacheSalt>) -> Self {
        Self {
            tokenizer: Arc::clone(model.tokenizer()),
            template: model.chat_template().cloned(),
            fim: model.fim_tokens().cloned(),
            special_tokens: if limits.special_tokens_in_prompts {
                SpecialTokens::Parsed
            } else {
                SpecialTokens::AsText
            },
            now_seconds,
            salt,
        }
    }

    /// The prompt's tokens.
    pub(super) fn encode(&self, input: Input) -> Result<Encoded, ApiError> {
        match input {
            Input::TokenIds(ids) => Ok(Encoded { ids, thought: Thought::None }),
            Input::Text { text, add_special_tokens } => self
                .tokenizer
                .encode(&text, self.special_tokens, add_special_tokens)
                .map(|ids| Encoded { ids, thought: Thought::None })
                .map_err(|error| refused("prompt", error)),
            Input::Chat(chat) => self.encode_chat(chat),
            Input::Fim(fim) => match &self.fim {
                Some(tokens) => tokens
                    .encode(&fim, &self.tokenizer)
                    .map(|ids| Encoded { ids, thought: Thought::None })
                    .map_err(|error| refused(fim.param, error)),
                None => Err(no_fim(&fim)),
            },
        }
    }

    fn encode_chat(&self, mut chat: ChatInput) -> Result<Encoded, ApiError> {
        let Some(template) = &self.template else {
            return Err(invalid("messages", "cannot be used: the model has no chat template"));
        };
        // Private-use characters and digits: white space rules, changes of case and JSON leave them alone.
        let mark = || format!("\u{f5f0}{:020}{:020}\u{f5f1}", random_u64(), random_u64());
        let (guard, end) = (mark(), mark());
        let guarded = |text: &str| self.tokenizer.guard(text, &guard).into_owned();
        let mut tools: Vec<Value> =
            chat.offered_tools().iter().map(|tool| guard_json(tool_json(tool), &guarded)).collect();
        let mut messages = std::mem::take(&mut chat.messages);
        if !template.mentions("tools") {
            plain::write_out(&mut messages, std::mem::take(&mut tools));
        }
        for message in &mut messages {
            message.content = guarded(&message.content);
            message.name = message.name.take().map(|name| guarded(&name));
            message.tool_call_id = message.tool_call_id.take().map(|id| guarded(&id));
            message.reasoning = message.reasoning.take().map(|reasoning| guarded(&reasoning));
            for call in &mut message.tool_calls {
                call.id = guarded(&call.id);
                call.name = guarded(&call.name);
                call.arguments = match serde_json::from_str(&call.arguments) {
                    Ok(arguments) => guard_json(arguments, &guarded).to_string(),
                    Err(_) => guarded(&call.arguments),
                };
            }
        }
        if chat.continue_final_message
            && let Some(last) = messages.last_mut()
        {
            last.content.push_str(&end);
        }
        let options = RenderOptions {
            add_generation_prompt: chat.add_generation_prompt,
            enable_thinking: chat.enable_thinking,
            reasoning_effort: chat.reasoning_effort.map(|effort| guarded(&effort)),
            tools,
            documents: chat.documents.into_iter().map(|document| guard_json(document, &guarded)).collect(),
            now_seconds: self.now_seconds,
        };
        let mut text = template.render(&messages, options).map_err(|error: TemplateError| {
            ApiError::InvalidRequest { param: Some("messages".into()), message: error.to_string() }
        })?;
        if chat.continue_final_message {
            let at = text.rfind(&end).ok_or_else(|| {
                invalid("continue_final_message", "cannot be used: the chat template leaves the final message out")
            })?;
            text.truncate(at);
        }
        let thought = match () {
            () if is_in_thought(&text) => Thought::Open,
            () if is_behind_thought(&text) => Thought::Closed,
            () => Thought::None,
        };
        self.tokenizer
            .encode_guarded(&text, Guarded { mark: &guard, salt: self.salt }, chat.add_special_tokens)
            .map(|ids| Encoded { ids, thought })
            .map_err(|error| refused("messages", error))
    }

    /// Words that must not appear, with and without a space before them, since a vocabulary has both. Tokens that the
    /// model has no row for cannot appear anyway.
    pub(super) fn encode_bad_words(&self, words: &[String], vocab_size: u32) -> Result<Vec<Vec<u32>>, ApiError> {
        let mut runs = Vec::new();
        for word in words {
            let word = word.trim_start();
            for spelled in [word.to_owned(), format!(" {word}")] {
                let run = self
                    .tokenizer
                    .encode(&spelled, SpecialTokens::AsText, false)
                    .map_err(|error| refused("bad_words", error))?;
                if !run.is_empty() && run.iter().all(|id| *id < vocab_size) && !runs.contains(&run) {
                    runs.push(run);
                }
            }
        }
        Ok(runs)
    }
}

fn refused(param: &str, error: EncodeError) -> ApiError {
    ApiError::InvalidRequest { param: Some(param.to_owned()), message: format!("`{param}`: {error}") }
}

fn no_fim(input: &FimInput) -> ApiError {
    invalid(input.param, "cannot be used: the model's vocabulary has no fill-in-the-middle tokens")
}

/// Checks what can be checked before any text is looked at. Returns how much work it is, in bytes of text.
pub(super) fn check_input(input: &Input, model: &ServedModel, limits: &Limits) -> Result<usize, ApiError> {
    let info = model.info();
    let check_bytes = |bytes: usize| {
        let limit = limits.max_prompt_bytes_per_token.saturating_mul(info.max_model_len as usize);
        if bytes > limit {
            return Err(ApiError::ContextTooLong {
                message: format!(
                    "the prompt is longer than {limit} bytes, which cannot fit the model's length of {} tokens",
                    info.max_model_len
                ),
            });
        }
        Ok(bytes)
    };
    match input {
        Input::Text { text, .. } => check_bytes(text.len()),
        Input::Fim(fim) if model.fim().is_none() => Err(no_fim(fim)),
        Input::Fim(fim) => check_bytes(fim.num_bytes()),
        Input::TokenIds(ids) => {
            if ids.iter().any(|id| *id >= info.vocab_size) {
                return Err(invalid("prompt", format_args!("must hold token ids below {}", info.vocab_size)));
            }
            Ok(0)
        }
        Input::Chat(chat) => {
            if chat.messages.is_empty() {
                return Err(invalid("messages", "must not be empty"));
            }
            if chat.messages.len() > limits.max_messages {
                return Err(invalid("messages", format_args!("must have at most {} entries", limits.max_messages)));
            }
            if chat.add_generation_prompt && chat.continue_final_message {
                return Err(invalid("continue_final_message", "cannot be used together with `add_generation_prompt`"));
            }
            for (index, message) in chat.messages.iter().enumerate() {
                if !ROLES.contains(&message.role.as_str()) {
                    return Err(invalid(
                        &format!("messages[{index}].role"),
                        format_args!("must be one of {}", ROLES.join(", ")),
                    ));
                }
                check_calls(message, index)?;
                if message.name.as_ref().is_some_and(|name| name.len() > MAX_NAME_BYTES) {
                    return Err(invalid(
                        &format!("messages[{index}].name"),
                        format_args!("must have at most {MAX_NAME_BYTES} bytes"),
                    ));
                }
            }
            check_tools(chat, limits)?;
            let of_message = |message: &ChatMessage| {
                let calls = message.tool_calls.iter().map(|call| call.name.len() + call.arguments.len()).sum::<usize>();
                message.content.len() + message.reasoning.as_ref().map_or(0, String::len) + calls
            };
            let of_tool = |tool: &Tool| {
                tool.name.len() + tool.description.as_ref().map_or(0, String::len) + tool.parameters.to_string().len()
            };
            let tools = chat.offered_tools().iter().map(of_tool).sum::<usize>();
            let documents = chat.documents.iter().map(|document| document.to_string().len()).sum::<usize>();
            let num_bytes = check_bytes(chat.messages.iter().map(of_message).sum::<usize>() + tools + documents)?;
            // What the template writes for each message, and the names in it, are work too.
            let of_names = |message: &ChatMessage| {
                let calls = message.tool_calls.iter().map(|call| call.id.len()).sum::<usize>();
                message.name.as_ref().map_or(0, String::len)
                    + message.tool_call_id.as_ref().map_or(0, String::len)
                    + calls
            };
            let names = chat.messages.iter().map(of_names).sum::<usize>();
            Ok(num_bytes + names + BYTES_OF_MESSAGE * chat.messages.len())
        }
    }
}

/// What a tool's name must be.
pub(crate) const TOOL_NAME: &str = "must have 1 to 64 letters, digits, dots, dashes or underscores";

/// Names of tools go into prompts and grammars, and come back to whoever calls them.
pub(crate) fn is_tool_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'))
}

fn check_calls(message: &ChatMessage, index: usize) -> Result<(), ApiError> {
    let at = |field: &str| format!("messages[{index}].{field}");
    if !message.tool_calls.is_empty() && message.role != "assistant" {
        return Err(invalid(&at("tool_calls"), "can only be in a message of the assistant"));
    }
    if message.role == "tool" && message.tool_call_id.is_none() {
        return Err(invalid(&at("tool_call_id"), "is needed in a message of a tool"));
    }
    if message.tool_call_id.as_ref().is_some_and(|id| id.len() > MAX_CALL_ID_BYTES) {
        return Err(invalid(&at("tool_call_id"), format_args!("must have at most {MAX_CALL_ID_BYTES} bytes")));
    }
    for (call_index, call) in message.tool_calls.iter().enumerate() {
        if !is_tool_name(&call.name) {
            let field = at(&format!("tool_calls[{call_index}].function.name"));
            return Err(invalid(&field, TOOL_NAME));
        }
        if call.id.len() > MAX_CALL_ID_BYTES {
            let field = at(&format!("tool_calls[{call_index}].id"));
            return Err(invalid(&field, format_args!("must have at most {MAX_CALL_ID_BYTES} bytes")));
        }
    }
    Ok(())
}

fn check_tools(chat: &ChatInput, limits: &Limits) -> Result<(), ApiError> {
    if chat.tools.len() > limits.max_tools {
        return Err(invalid("tools", format_args!("must have at most {} entries", limits.max_tools)));
    }
    if chat.documents.len() > limits.max_documents {
        return Err(invalid("documents", format_args!("must have at most {} entries", limits.max_documents)));
    }
    for (index, tool) in chat.tools.iter().enumerate() {
        if !is_tool_name(&tool.name) {
            let field = format!("tools[{index}].function.name");
            return Err(invalid(&field, TOOL_NAME));
        }
        if chat.tools[..index].iter().any(|other| other.name == tool.name) {
            return Err(invalid(&format!("tools[{index}].function.name"), "is another tool's name too"));
        }
        if !tool.parameters.is_object() {
            return Err(invalid(&format!("tools[{index}].function.parameters"), "must be an object"));
        }
    }
    match &chat.tool_choice {
        ToolChoice::Required if chat.tools.is_empty() => Err(invalid("tool_choice", "needs `tools`")),
        ToolChoice::Named(name) if chat.tools.iter().all(|tool| tool.name != *name) => {
            Err(invalid("tool_choice", "must name one of `tools`"))
        }
        _ if chat.reasoning_effort.as_ref().is_some_and(|effort| effort.len() > MAX_EFFORT_BYTES) => {
            Err(invalid("reasoning_effort", format_args!("must have at most {MAX_EFFORT_BYTES} bytes")))
        }
        _ => Ok(()),
    }
}
