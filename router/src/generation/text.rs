//! From what a request holds to the tokens of its prompt: everything that runs on the blocking pool.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Semaphore;

use crate::chat_template::{ChatTemplate, RenderOptions, TemplateError};
use crate::error::ApiError;
use crate::fim::{FimInput, FimTokens};
use crate::random::random_u64;
use crate::served_model::ServedModel;
use crate::tokenizer::{EncodeError, SpecialTokens, TextTokenizer};

use super::validate::invalid;
use super::{ChatInput, ChatMessage, Input, Limits};

/// Who can speak in a conversation. Closed, because templates write roles between special tokens.
const ROLES: [&str; 4] = ["system", "developer", "user", "assistant"];
/// Bytes of a message's `name`.
const MAX_NAME_BYTES: usize = 64;

/// Runs text work beside the async threads: so many at once, so many waiting, and no more.
pub(super) struct TextPool {
    permits: Arc<Semaphore>,
    waiting: AtomicUsize,
    max_waiting: usize,
}

impl TextPool {
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

    /// Runs `work` when its turn comes. Refuses at once where too many wait already.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        request_id: &str,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        struct Waiting<'p>(&'p AtomicUsize);
        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
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
        let internal = || {
            tracing::error!(request_id, "text work ended without a result");
            ApiError::Internal { request_id: request_id.to_owned() }
        };
        let Ok(permit) = permit else { return Err(internal()) };
        let result = tokio::task::spawn_blocking(move || {
            let result = work();
            drop(permit);
            result
        });
        // A panic of the tokenizer ends this request alone.
        result.await.unwrap_or_else(|_| Err(internal()))
    }
}

/// A request's text, and what is needed to turn it into tokens.
pub(super) struct TextWork {
    tokenizer: Arc<TextTokenizer>,
    template: Option<Arc<ChatTemplate>>,
    fim: Option<Arc<FimTokens>>,
    special_tokens: SpecialTokens,
    now_seconds: u64,
}

impl TextWork {
    pub(super) fn new(model: &ServedModel, limits: &Limits, now_seconds: u64) -> Self {
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
        }
    }

    /// The prompt's tokens.
    pub(super) fn encode(&self, input: Input) -> Result<Vec<u32>, ApiError> {
        match input {
            Input::TokenIds(ids) => Ok(ids),
            Input::Text { text, add_special_tokens } => self
                .tokenizer
                .encode(&text, self.special_tokens, add_special_tokens)
                .map_err(|error| refused("prompt", error)),
            Input::Chat(chat) => self.encode_chat(chat),
            Input::Fim(fim) => match &self.fim {
                Some(tokens) => tokens.encode(&fim, &self.tokenizer).map_err(|error| refused(fim.param, error)),
                None => Err(no_fim(&fim)),
            },
        }
    }

    fn encode_chat(&self, chat: ChatInput) -> Result<Vec<u32>, ApiError> {
        let Some(template) = &self.template else {
            return Err(invalid("messages", "cannot be used: the model has no chat template"));
        };
        // Private-use characters and digits: white space rules, changes of case and JSON leave them alone.
        let mark = || format!("\u{f5f0}{:020}{:020}\u{f5f1}", random_u64(), random_u64());
        let (guard, end) = (mark(), mark());
        let mut messages: Vec<ChatMessage> = chat
            .messages
            .into_iter()
            .map(|message| ChatMessage {
                content: self.tokenizer.guard(&message.content, &guard).into_owned(),
                role: message.role,
                name: message.name.map(|name| self.tokenizer.guard(&name, &guard).into_owned()),
            })
            .collect();
        if chat.continue_final_message
            && let Some(last) = messages.last_mut()
        {
            last.content.push_str(&end);
        }
        let options = RenderOptions {
            add_generation_prompt: chat.add_generation_prompt,
            enable_thinking: chat.enable_thinking,
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
        self.tokenizer
            .encode_guarded(&text, &guard, chat.add_special_tokens)
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

/// Checks what can be checked before any text is looked at.
pub(super) fn check_input(input: &Input, model: &ServedModel, limits: &Limits) -> Result<(), ApiError> {
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
        Ok(())
    };
    match input {
        Input::Text { text, .. } => check_bytes(text.len()),
        Input::Fim(fim) if model.fim().is_none() => Err(no_fim(fim)),
        Input::Fim(fim) => check_bytes(fim.num_bytes()),
        Input::TokenIds(ids) => {
            if ids.iter().any(|id| *id >= info.vocab_size) {
                return Err(invalid("prompt", format_args!("must hold token ids below {}", info.vocab_size)));
            }
            Ok(())
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
                if message.name.as_ref().is_some_and(|name| name.len() > MAX_NAME_BYTES) {
                    return Err(invalid(
                        &format!("messages[{index}].name"),
                        format_args!("must have at most {MAX_NAME_BYTES} bytes"),
                    ));
                }
            }
            check_bytes(chat.messages.iter().map(|message| message.content.len()).sum())
        }
    }
}
