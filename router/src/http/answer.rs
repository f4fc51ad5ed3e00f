//! What both endpoints answer: the events of one or several generations in OpenAI's JSON, whole or in pieces.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::{Context, Poll};

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

use crate::error::ApiError;
use crate::generation::{CallHead, Generation, GenerationEvent, NamedLogprobs, StopCause, TokenInfo, ToolCall, Usage};

/// JSON has no infinity; a token that cannot be chosen is this unlikely.
const LEAST_LOGPROB: f32 = -9999.0;

/// Which endpoint answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Chat,
    Completions,
}

/// What is the same in every part of an answer.
pub(super) struct Head {
    pub(super) shape: Shape,
    /// With the endpoint's prefix.
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) fingerprint: String,
    pub(super) seed: i64,
    /// Choices of each prompt.
    pub(super) num_choices: u32,
    pub(super) wants_logprobs: bool,
    pub(super) wants_prompt_logprobs: bool,
    pub(super) return_token_ids: bool,
    pub(super) tokens_as_ids: bool,
    /// The generated text is left out.
    pub(super) echo_only: bool,
    /// One for each prompt: its text, where it is to be repeated, and its tokens.
    pub(super) prompts: Vec<PromptPart>,
}

/// A prompt, as far as an answer repeats it.
pub(super) struct PromptPart {
    pub(super) echo: Option<String>,
    pub(super) token_ids: Arc<[u32]>,
    /// Its first token, which nothing comes before and which so has no log probability.
    pub(super) first: Option<TokenInfo>,
    /// Characters of `echo` that each token completes, where its place is asked for.
    pub(super) num_chars: Vec<u32>,
}

/// One or several generations, as one stream of events.
pub(super) struct Generations {
    running: Vec<Option<Generation>>,
    /// Where to look next, so that none waits behind another.
    next: usize,
    usage: Usage,
}

/// An event and the prompt that it belongs to.
pub(super) enum Event {
    Of {
        prompt_index: usize,
        event: GenerationEvent,
    },
    /// All ended well. The last event.
    Done(Usage),
    /// One did not; the others were cancelled. The last event.
    Error(ApiError),
}

impl Generations {
    pub(super) fn new(generations: Vec<Generation>) -> Self {
        Self { running: generations.into_iter().map(Some).collect(), next: 0, usage: Usage::default() }
    }

    pub(super) async fn next(&mut self) -> Option<Event> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        let len = self.running.len();
        if len == 0 {
            return Poll::Ready(None);
        }
        let mut turn = 0;
        while turn < len {
            let prompt_index = (self.next + turn) % len;
            turn += 1;
            let Some(generation) = &mut self.running[prompt_index] else { continue };
            let event = match generation.poll_event(cx) {
                Poll::Pending => continue,
                Poll::Ready(event) => event,
            };
            match event {
                Some(GenerationEvent::Done { usage }) => {
                    self.running[prompt_index] = None;
                    self.usage += usage;
                    if self.running.iter().all(Option::is_none) {
                        self.running.clear();
                        return Poll::Ready(Some(Event::Done(self.usage)));
                    }
                }
                Some(GenerationEvent::Error(error)) => {
                    self.running.clear();
                    return Poll::Ready(Some(Event::Error(error)));
                }
                Some(event) => {
                    self.next = (prompt_index + 1) % len;
                    return Poll::Ready(Some(Event::Of { prompt_index, event }));
                }
                // A generation ends with `Done` or `Error`, after which it is not asked again.
                None => self.running[prompt_index] = None,
            }
        }
        Poll::Pending
    }
}

/// `usage` in OpenAI's shape.
#[derive(Serialize)]
pub(super) struct UsageJson {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptTokensDetails,
    /// Only where there was any reasoning.
    #[serde(skip_serializing_if = "Option::is_none")]
    completion_tokens_details: Option<CompletionTokensDetails>,
}

#[derive(Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
}

#[derive(Serialize)]
struct CompletionTokensDetails {
    reasoning_tokens: u32,
}

impl From<Usage> for UsageJson {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
            prompt_tokens_details: PromptTokensDetails { cached_tokens: usage.cached_tokens },
            completion_tokens_details: (usage.reasoning_tokens > 0)
                .then_some(CompletionTokensDetails { reasoning_tokens: usage.reasoning_tokens }),
        }
    }
}

/// `finish_reason`, and vLLM's `stop_reason` beside it.
#[derive(Serialize)]
pub(super) struct Finish {
    finish_reason: &'static str,
    stop_reason: Option<StopReason>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum StopReason {
    Token(u32),
    Text(String),
}

impl From<StopCause> for Finish {
    fn from(cause: StopCause) -> Self {
        let (finish_reason, stop_reason) = match cause {
            StopCause::EndOfSequence => ("stop", None),
            StopCause::StopToken(id) => ("stop", Some(StopReason::Token(id))),
            StopCause::StopString(text) => ("stop", Some(StopReason::Text(text))),
            StopCause::Length => ("length", None),
            StopCause::ToolCalls => ("tool_calls", None),
        };
        Self { finish_reason, stop_reason }
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_nan() { LEAST_LOGPROB } else { logprob.max(LEAST_LOGPROB) }
}

/// A token as text: bytes that are no whole characters are replaced, since JSON cannot hold them.
fn token_text(token_id: u32, bytes: &[u8], tokens_as_ids: bool) -> String {
    if tokens_as_ids { format!("token_id:{token_id}") } else { String::from_utf8_lossy(bytes).into_owned() }
}

/// Log probabilities in the shape of chat completions.
#[derive(Serialize)]
pub(super) struct ChatLogprobs {
    pub(super) content: Vec<ChatLogprob>,
    refusal: (),
}

#[derive(Serialize)]
pub(super) struct ChatLogprob {
    #[serde(flatten)]
    chosen: ChatToken,
    top_logprobs: Vec<ChatToken>,
}

#[derive(Serialize)]
struct ChatToken {
    token: String,
    logprob: f32,
    #[serde(serialize_with = "slice")]
    bytes: Arc<[u8]>,
}

/// A shared slice as a list.
pub(super) fn slice<T: Serialize, S: Serializer>(slice: &Arc<[T]>, serializer: S) -> Result<S::Ok, S::Error> {
    slice.as_ref().serialize(serializer)
}

impl ChatLogprobs {
    pub(super) fn new(tokens: &[TokenInfo], tokens_as_ids: bool) -> Self {
        let token = |id: u32, bytes: &Arc<[u8]>, logprob: f32| ChatToken {
            token: token_text(id, bytes, tokens_as_ids),
            logprob: finite(logprob),
            bytes: Arc::clone(bytes),
        };
        let content = tokens
            .iter()
            .filter_map(|info| {
                let NamedLogprobs { values, top_bytes } = info.logprobs.as_ref()?;
                let top = values.top.iter().zip(top_bytes);
                Some(ChatLogprob {
                    chosen: token(info.token_id, &info.bytes, values.logprob),
                    top_logprobs: top.map(|((id, logprob), bytes)| token(*id, bytes, *logprob)).collect(),
                })
            })
            .collect();
        Self { content, refusal: () }
    }
}

/// Log probabilities in the shape of completions.
#[derive(Default, Serialize)]
pub(super) struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<TopLogprobs>>,
}

/// The likeliest tokens, likeliest first.
struct TopLogprobs(Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, logprob) in &self.0 {
            map.serialize_entry(token, logprob)?;
        }
        map.end()
    }
}

impl CompletionLogprobs {
    /// Adds a token that completes `num_chars` characters. `offset` is where they start: the characters of the choice's
    /// text, an echoed prompt included, that the tokens before have completed. So a token that is no text (a special one
    /// that is left out) and one that ends within a character take none of it, and the next token starts where they do.
    /// Tokens of a stop string that was cut off start at the text's end or behind it.
    pub(super) fn push(&mut self, info: &TokenInfo, num_chars: u32, tokens_as_ids: bool, offset: &mut usize) {
        let text = token_text(info.token_id, &info.bytes, tokens_as_ids);
        self.text_offset.push(*offset);
        *offset += num_chars as usize;
        let named = info.logprobs.as_ref();
        self.token_logprobs.push(named.map(|named| finite(named.values.logprob)));
        self.top_logprobs.push(named.map(|NamedLogprobs { values, top_bytes }| {
            let mut top: Vec<(String, f32)> = Vec::new();
            // Different tokens can have the same text once they are made whole characters; the likelier one stays.
            let mut add = |token: String, logprob: f32| {
                if top.iter().all(|(known, _)| *known != token) {
                    top.push((token, finite(logprob)));
                }
            };
            for ((id, logprob), bytes) in values.top.iter().zip(top_bytes) {
                add(token_text(*id, bytes, tokens_as_ids), *logprob);
            }
            add(text.clone(), values.logprob);
            TopLogprobs(top)
        }));
        self.tokens.push(text);
    }
}

/// Log probabilities of a prompt, in vLLM's shape: one entry per token, null for the first.
#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct PromptLogprobs(Vec<Option<BTreeMap<u32, PromptLogprob>>>);

#[derive(Serialize)]
struct PromptLogprob {
    logprob: f32,
    rank: u32,
    decoded_token: String,
}

impl PromptLogprobs {
    pub(super) fn new(num_tokens: usize, infos: &[(u32, TokenInfo)]) -> Self {
        let mut positions: Vec<Option<BTreeMap<u32, PromptLogprob>>> = (0..num_tokens).map(|_| None).collect();
        for (position, info) in infos {
            let (Some(slot), Some(NamedLogprobs { values, top_bytes })) =
                (positions.get_mut(*position as usize), &info.logprobs)
            else {
                continue;
            };
            let entry = |bytes: &[u8], logprob: f32, rank: u32| PromptLogprob {
                logprob: finite(logprob),
                rank,
                decoded_token: String::from_utf8_lossy(bytes).into_owned(),
            };
            let mut tokens: BTreeMap<u32, PromptLogprob> = (1..)
                .zip(values.top.iter().zip(top_bytes))
                .map(|(rank, ((id, logprob), bytes))| (*id, entry(bytes, *logprob, rank)))
                .collect();
            tokens.insert(info.token_id, entry(&info.bytes, values.logprob, values.rank));
            *slot = Some(tokens);
        }
        Self(positions)
    }
}

/// What an echoed prompt's tokens are reported as: the first has no log probability.
pub(super) fn echoed_logprobs(
    prompt: &PromptPart,
    infos: &[(u32, TokenInfo)],
    tokens_as_ids: bool,
    offset: &mut usize,
) -> CompletionLogprobs {
    let mut logprobs = CompletionLogprobs::default();
    let first = prompt.first.iter().map(|info| (0, info));
    for (position, info) in first.chain(infos.iter().map(|(position, info)| (*position as usize, info))) {
        let num_chars = prompt.num_chars.get(position).copied().unwrap_or(0);
        logprobs.push(info, num_chars, tokens_as_ids, offset);
    }
    // A tokenizer that changes what it reads has tokens for another text than the one that is repeated.
    *offset = prompt.echo.as_ref().map_or(0, |echo| echo.chars().count());
    logprobs
}

/// A whole answer.
#[derive(Serialize)]
pub(super) struct Answer<'h> {
    id: &'h str,
    object: &'static str,
    created: u64,
    model: &'h str,
    system_fingerprint: &'h str,
    seed: i64,
    choices: Vec<ChoiceJson<'h>>,
    usage: UsageJson,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'h [u32]>,
}

#[derive(Serialize)]
struct ChoiceJson<'h> {
    index: usize,
    #[serde(flatten)]
    content: Content,
    logprobs: Option<LogprobsJson>,
    #[serde(flatten)]
    finish: Option<Finish>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'h [u32]>,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Content {
    Message {
        role: &'static str,
        /// Null where calls are all there is.
        content: Option<String>,
        refusal: (),
        #[serde(skip_serializing_if = "Option::is_none")]
        reasoning_content: Option<String>,
        /// The same under the other name that clients know.
        #[serde(skip_serializing_if = "Option::is_none")]
        reasoning: Option<String>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        tool_calls: Vec<ToolCallJson>,
    },
    Text(String),
}

#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum LogprobsJson {
    Chat(ChatLogprobs),
    Completions(CompletionLogprobs),
}

/// A call in OpenAI's shape; in a stream it says which of the choice's calls it is.
#[derive(Serialize)]
pub(super) struct ToolCallJson {
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    function: FunctionJson,
}

#[derive(Serialize)]
struct FunctionJson {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

impl ToolCallJson {
    pub(super) fn new(index: Option<u32>, call: ToolCall) -> Self {
        let ToolCall { id, name, arguments } = call;
        let function = FunctionJson { name: Some(name), arguments };
        Self { index, id: Some(id), r#type: Some("function"), function }
    }

    /// The next part of a call that is streamed: id and name first, then pieces of arguments.
    pub(super) fn piece(index: u32, head: Option<CallHead>, arguments: String) -> Self {
        match head {
            Some(CallHead { id, name }) => Self::new(Some(index), ToolCall { id, name, arguments }),
            None => {
                Self { index: Some(index), id: None, r#type: None, function: FunctionJson { name: None, arguments } }
            }
        }
    }
}

/// What has come of a choice so far.
#[derive(Default)]
struct Gathered {
    text: String,
    reasoning: String,
    tool_calls: Vec<ToolCallJson>,
    tokens: Vec<TokenInfo>,
    finish: Option<Finish>,
}

/// Waits for the last event and answers as a whole.
pub(super) async fn whole(head: &Head, mut generations: Generations) -> Result<Vec<u8>, ApiError> {
    let num_choices = head.num_choices as usize;
    let mut choices: Vec<Gathered> = (0..head.prompts.len() * num_choices).map(|_| Gathered::default()).collect();
    let mut prompt_logprobs: Vec<Vec<(u32, TokenInfo)>> = head.prompts.iter().map(|_| Vec::new()).collect();
    let usage = loop {
        match generations.next().await {
            Some(Event::Of { prompt_index, event }) => match event {
                GenerationEvent::PromptLogprobs { position, info } => {
                    prompt_logprobs[prompt_index].push((position, info))
                }
                GenerationEvent::Delta { choice_index, text, tokens } => {
                    if let Some(choice) = choices.get_mut(prompt_index * num_choices + choice_index as usize) {
                        choice.text.push_str(&text);
                        // Tokens are kept only for those who see them.
                        if head.wants_logprobs || head.return_token_ids {
                            choice.tokens.extend(tokens);
                        }
                    }
                }
                GenerationEvent::Reasoning { choice_index, text } => {
                    if let Some(choice) = choices.get_mut(prompt_index * num_choices + choice_index as usize) {
                        choice.reasoning.push_str(&text);
                    }
                }
                GenerationEvent::ToolCall { choice_index, call, .. } => {
                    if let Some(choice) = choices.get_mut(prompt_index * num_choices + choice_index as usize) {
                        choice.tool_calls.push(ToolCallJson::new(None, call));
                    }
                }
                GenerationEvent::ChoiceFinished { choice_index, cause } => {
                    if let Some(choice) = choices.get_mut(prompt_index * num_choices + choice_index as usize) {
                        choice.finish = Some(cause.into());
                    }
                }
                GenerationEvent::ToolCallPiece { .. } | GenerationEvent::Done { .. } | GenerationEvent::Error(_) => {}
            },
            Some(Event::Done(usage)) => break usage,
            Some(Event::Error(error)) => return Err(error),
            None => return Err(ApiError::Cancelled),
        }
    };
    let usage = if head.echo_only { Usage { completion_tokens: 0, ..usage } } else { usage };

    let mut answer = Answer {
        id: &head.id,
        object: match head.shape {
            Shape::Chat => "chat.completion",
            Shape::Completions => "text_completion",
        },
        created: head.created,
        model: &head.model,
        system_fingerprint: &head.fingerprint,
        seed: head.seed,
        choices: Vec::with_capacity(choices.len()),
        usage: usage.into(),
        prompt_logprobs: None,
        prompt_token_ids: None,
    };
    for (index, mut choice) in choices.into_iter().enumerate() {
        let prompt_index = index / num_choices;
        let prompt = &head.prompts[prompt_index];
        if head.echo_only {
            choice.text.clear();
            choice.tokens.clear();
        }
        let of_prompt = || PromptLogprobs::new(prompt.token_ids.len(), &prompt_logprobs[prompt_index]);
        let asked_of_prompt = head.wants_prompt_logprobs.then(of_prompt);
        let prompt_token_ids = head.return_token_ids.then_some(&*prompt.token_ids);
        let token_ids = head.return_token_ids.then(|| choice.tokens.iter().map(|info| info.token_id).collect());
        let (content, logprobs, asked_of_prompt, prompt_token_ids) = match head.shape {
            Shape::Chat => {
                let logprobs = head
                    .wants_logprobs
                    .then(|| LogprobsJson::Chat(ChatLogprobs::new(&choice.tokens, head.tokens_as_ids)));
                if index == 0 {
                    answer.prompt_logprobs = asked_of_prompt;
                    answer.prompt_token_ids = prompt_token_ids;
                }
                let reasoning = (!choice.reasoning.is_empty()).then_some(choice.reasoning);
                let message = Content::Message {
                    role: "assistant",
                    content: (choice.tool_calls.is_empty() || !choice.text.is_empty()).then_some(choice.text),
                    refusal: (),
                    reasoning_content: reasoning.clone(),
                    reasoning,
                    tool_calls: choice.tool_calls,
                };
                (message, logprobs, None, None)
            }
            Shape::Completions => {
                let logprobs = head.wants_logprobs.then(|| {
                    let mut offset = 0;
                    let mut logprobs = match &prompt.echo {
                        Some(_) => {
                            let infos = &prompt_logprobs[prompt_index];
                            echoed_logprobs(prompt, infos, head.tokens_as_ids, &mut offset)
                        }
                        None => CompletionLogprobs::default(),
                    };
                    for info in &choice.tokens {
                        logprobs.push(info, info.num_chars, head.tokens_as_ids, &mut offset);
                    }
                    LogprobsJson::Completions(logprobs)
                });
                let text = match &prompt.echo {
                    Some(echo) => format!("{echo}{}", choice.text),
                    None => choice.text,
                };
                (Content::Text(text), logprobs, asked_of_prompt, prompt_token_ids)
            }
        };
        answer.choices.push(ChoiceJson {
            index,
            content,
            logprobs,
            finish: choice.finish,
            token_ids,
            prompt_logprobs: asked_of_prompt,
            prompt_token_ids,
        });
    }
    Ok(json(&answer))
}

/// A value of ours as JSON; none of them can fail to be written to memory.
pub(super) fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_else(|_| b"{}".to_vec())
}
