//! Server-sent events in OpenAI's shape: generation events as chunks.
//!
//! What is the same in every chunk of an answer is written once; a chunk is that, its choice, and a fixed end.

use serde::Serialize;

use crate::error::ApiError;
use crate::generation::{GenerationEvent, TokenInfo, Usage};

use super::answer::{
    ChatLogprobs, CompletionLogprobs, Finish, Head, LogprobsJson, Shape, ToolCallJson, UsageJson, echoed_logprobs,
};
use super::failure::{Dialect, error_json};
use super::stream::{Framing, push_json, sse_data};
use super::types::StreamOptions;

const DONE: &[u8] = b"data: [DONE]\n\n";

/// Writes the chunks of one answer.
pub(super) struct ChunkWriter {
    head: Head,
    options: StreamOptions,
    /// `data: {"id":...,"choices":[`
    prefix: Vec<u8>,
    choices: Vec<ChoiceState>,
    /// Log probabilities of each prompt, until they are echoed.
    prompt_logprobs: Vec<Vec<(u32, TokenInfo)>>,
    usage: Usage,
}

#[derive(Default)]
struct ChoiceState {
    started: bool,
    text_offset: usize,
}

/// Everything that one chunk says of a choice.
#[derive(Default)]
struct Piece<'p> {
    text: Option<&'p str>,
    reasoning: Option<&'p str>,
    tool_call: Option<ToolCallJson>,
    role: bool,
    logprobs: Option<LogprobsJson>,
    token_ids: Option<Vec<u32>>,
    prompt_token_ids: Option<&'p [u32]>,
    finish: Option<Finish>,
}

impl Framing for ChunkWriter {
    fn event(&mut self, prompt_index: usize, event: GenerationEvent, out: &mut Vec<u8>) {
        match event {
            GenerationEvent::PromptLogprobs { position, info } => {
                if let Some(infos) = self.prompt_logprobs.get_mut(prompt_index) {
                    infos.push((position, info));
                }
            }
            GenerationEvent::Delta { choice_index, text, tokens } => {
                let index = self.index(prompt_index, choice_index);
                self.start(prompt_index, index, out);
                self.usage.completion_tokens += tokens.len() as u32;
                let tells_tokens = (self.head.wants_logprobs || self.head.return_token_ids) && !tokens.is_empty();
                if self.head.echo_only || (text.is_empty() && !tells_tokens) {
                    return;
                }
                let piece = Piece {
                    text: Some(&text),
                    logprobs: self.logprobs(index, &tokens),
                    token_ids: self.head.return_token_ids.then(|| tokens.iter().map(|info| info.token_id).collect()),
                    ..Piece::default()
                };
                self.chunk(index, piece, out);
            }
            GenerationEvent::Reasoning { choice_index, text } => {
                let index = self.index(prompt_index, choice_index);
                self.start(prompt_index, index, out);
                self.chunk(index, Piece { reasoning: Some(&text), ..Piece::default() }, out);
            }
            GenerationEvent::ToolCallPiece { choice_index, call_index, head, arguments } => {
                let index = self.index(prompt_index, choice_index);
                self.start(prompt_index, index, out);
                let tool_call = Some(ToolCallJson::piece(call_index, head, arguments));
                self.chunk(index, Piece { tool_call, ..Piece::default() }, out);
            }
            GenerationEvent::ToolCall { in_pieces: true, .. } => {}
            GenerationEvent::ToolCall { choice_index, call_index, call, .. } => {
                let index = self.index(prompt_index, choice_index);
                self.start(prompt_index, index, out);
                let tool_call = Some(ToolCallJson::new(Some(call_index), call));
                self.chunk(index, Piece { tool_call, ..Piece::default() }, out);
            }
            GenerationEvent::ChoiceFinished { choice_index, cause } => {
                let index = self.index(prompt_index, choice_index);
                self.start(prompt_index, index, out);
                self.chunk(index, Piece { finish: Some(cause.into()), ..Piece::default() }, out);
            }
            GenerationEvent::Done { .. } | GenerationEvent::Error(_) => {}
        }
    }

    fn done(&mut self, usage: Usage, out: &mut Vec<u8>) {
        if self.options.include_usage {
            let usage = if self.head.echo_only { Usage { completion_tokens: 0, ..usage } } else { usage };
            out.extend_from_slice(&self.prefix);
            out.extend_from_slice(b"],\"usage\":");
            push_json(&UsageJson::from(usage), out);
            out.extend_from_slice(b"}\n\n");
        }
        out.extend_from_slice(DONE);
    }

    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        sse_data(&error_json(error, Dialect::OpenAi, ""), out);
    }
}

impl ChunkWriter {
    pub(super) fn new(head: Head, options: StreamOptions) -> Self {
        #[derive(Serialize)]
        struct Prefix<'h> {
            id: &'h str,
            object: &'static str,
            created: u64,
            model: &'h str,
            system_fingerprint: &'h str,
            seed: i64,
        }
        let mut prefix = b"data: ".to_vec();
        push_json(
            &Prefix {
                id: &head.id,
                object: match head.shape {
                    Shape::Chat => "chat.completion.chunk",
                    Shape::Completions => "text_completion",
                },
                created: head.created,
                model: &head.model,
                system_fingerprint: &head.fingerprint,
                seed: head.seed,
            },
            &mut prefix,
        );
        // Open the object again: its last field is each chunk's own.
        prefix.pop();
        prefix.extend_from_slice(b",\"choices\":[");
        let num_choices = head.prompts.len() * head.num_choices as usize;
        Self {
            prefix,
            choices: (0..num_choices).map(|_| ChoiceState::default()).collect(),
            prompt_logprobs: head.prompts.iter().map(|_| Vec::new()).collect(),
            usage: Usage {
                prompt_tokens: head.prompts.iter().map(|prompt| prompt.token_ids.len() as u32).sum(),
                ..Usage::default()
            },
            head,
            options,
        }
    }

    fn index(&self, prompt_index: usize, choice_index: u32) -> usize {
        prompt_index * self.head.num_choices as usize + choice_index as usize
    }

    /// A choice's first chunk: the role, or the echoed prompt.
    fn start(&mut self, prompt_index: usize, index: usize, out: &mut Vec<u8>) {
        let Some(state) = self.choices.get_mut(index) else { return };
        if std::mem::replace(&mut state.started, true) {
            return;
        }
        let Some(prompt) = self.head.prompts.get(prompt_index) else { return };
        let prompt_token_ids = self.head.return_token_ids.then_some(&*prompt.token_ids);
        let piece = match self.head.shape {
            Shape::Chat => Piece { role: true, text: Some(""), prompt_token_ids, ..Piece::default() },
            Shape::Completions if prompt.echo.is_some() || prompt_token_ids.is_some() => {
                let logprobs = (self.head.wants_logprobs && prompt.echo.is_some()).then(|| {
                    let infos = self.prompt_logprobs.get(prompt_index).map_or(&[][..], Vec::as_slice);
                    LogprobsJson::Completions(echoed_logprobs(
                        prompt,
                        infos,
                        self.head.tokens_as_ids,
                        &mut state.text_offset,
                    ))
                });
                Piece {
                    text: Some(prompt.echo.as_deref().unwrap_or_default()),
                    logprobs,
                    prompt_token_ids,
                    ..Piece::default()
                }
            }
            Shape::Completions => return,
        };
        self.chunk(index, piece, out);
    }

    fn logprobs(&mut self, index: usize, tokens: &[TokenInfo]) -> Option<LogprobsJson> {
        if !self.head.wants_logprobs || tokens.is_empty() {
            return None;
        }
        Some(match self.head.shape {
            Shape::Chat => LogprobsJson::Chat(ChatLogprobs::new(tokens, self.head.tokens_as_ids)),
            Shape::Completions => {
                let mut logprobs = CompletionLogprobs::default();
                let state = self.choices.get_mut(index)?;
                for info in tokens {
                    logprobs.push(info, info.num_chars, self.head.tokens_as_ids, &mut state.text_offset);
                }
                LogprobsJson::Completions(logprobs)
            }
        })
    }

    fn chunk(&self, index: usize, piece: Piece<'_>, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.prefix);
        out.extend_from_slice(b"{\"index\":");
        push_json(&index, out);
        match self.head.shape {
            Shape::Chat => {
                out.extend_from_slice(b",\"delta\":{");
                if piece.role {
                    out.extend_from_slice(b"\"role\":\"assistant\",");
                }
                if let Some(text) = piece.text {
                    out.extend_from_slice(b"\"content\":");
                    push_json(&text, out);
                }
                if let Some(text) = piece.reasoning {
                    out.extend_from_slice(b"\"reasoning_content\":");
                    push_json(&text, out);
                    out.extend_from_slice(b",\"reasoning\":");
                    push_json(&text, out);
                }
                if let Some(call) = piece.tool_call {
                    out.extend_from_slice(b"\"tool_calls\":");
                    push_json(&[call], out);
                }
                out.extend_from_slice(b"}");
            }
            Shape::Completions => {
                out.extend_from_slice(b",\"text\":");
                push_json(&piece.text.unwrap_or_default(), out);
            }
        }
        out.extend_from_slice(b",\"logprobs\":");
        push_json(&piece.logprobs, out);
        match piece.finish {
            None => out.extend_from_slice(b",\"finish_reason\":null"),
            Some(finish) => {
                let at = out.len();
                push_json(&finish, out);
                // Its two fields go into the choice's object.
                out.pop();
                if let Some(brace) = out.get_mut(at) {
                    *brace = b',';
                }
            }
        }
        if let Some(ids) = piece.token_ids {
            out.extend_from_slice(b",\"token_ids\":");
            push_json(&ids, out);
        }
        if let (Shape::Completions, Some(ids)) = (self.head.shape, piece.prompt_token_ids) {
            out.extend_from_slice(b",\"prompt_token_ids\":");
            push_json(&ids, out);
        }
        out.extend_from_slice(b"}]");
        if let (Shape::Chat, Some(ids)) = (self.head.shape, piece.prompt_token_ids) {
            out.extend_from_slice(b",\"prompt_token_ids\":");
            push_json(&ids, out);
        }
        if self.options.continuous_usage {
            out.extend_from_slice(b",\"usage\":");
            push_json(&UsageJson::from(self.usage), out);
        } else if self.options.include_usage {
            out.extend_from_slice(b",\"usage\":null");
        }
        out.extend_from_slice(b"}\n\n");
    }
}
