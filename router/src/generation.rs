//! The one set of handlers behind HTTP and gRPC: from text or tokens and parameters to a stream of text and tokens.
//!
//! Both faces parse their own wire form into [`GenerationRequest`], call [`GenerationService::generate`], and frame the
//! [`GenerationEvent`]s that come back. Everything that a request can be refused for is decided here, once.

mod chat;
mod choice;
mod classification;
mod form;
mod length_fields;
mod limits;
mod plain;
mod pooling;
mod render;
mod running;
mod service;
mod text;
mod validate;

use std::collections::BTreeMap;
use std::ops::AddAssign;
use std::sync::Arc;
use std::time::Instant;

use quire_scheduler::{TenantId, TokenLogprobs};

use crate::error::ApiError;
use crate::fim::FimInput;
use crate::grammar::OutputFormat;
use crate::metrics::Endpoint;

pub use chat::{CallHead, ChatInput, ChatMessage, Tool, ToolCall, ToolChoice};
pub use classification::{Classified, ClassifyRequest};
pub use limits::Limits;
pub use pooling::{
    EmbedRequest, Embedded, PoolingRequest, PoolingText, PoolingTruncation, ScoreRequest, Scored, TextPair,
};
pub use render::Rendered;
pub use running::Generation;
pub use service::{GenerationService, ServiceParts};
pub(crate) use text::{MAX_CALL_ID_BYTES, TOOL_NAME, is_tool_name};
pub(crate) use validate::invalid;

/// What to continue.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    Text {
        text: String,
        add_special_tokens: bool,
    },
    TokenIds(Vec<u32>),
    Chat(ChatInput),
    /// A gap between two texts.
    Fim(FimInput),
}

/// What becomes of a prompt that is longer than wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Truncation {
    pub to: TruncateTo,
    pub keep: Keep,
}

/// How long a prompt may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TruncateTo {
    Tokens(u64),
    /// What `max_tokens` leaves of the model's length, or all but one token.
    Fit,
}

/// Which end of a prompt stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    First,
    Last,
}

/// Sampling and limits as a client gave them; what is absent takes the model's default from `generation_config.json`,
/// then the server's. Ranges are checked by [`GenerationService::generate`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationParams {
    pub max_tokens: Option<u64>,
    pub min_tokens: Option<u64>,
    pub n: Option<u64>,
    pub temperature: Option<f64>,
    pub top_k: Option<i64>,
    pub top_p: Option<f64>,
    pub min_p: Option<f64>,
    pub typical_p: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub presence_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub logit_bias: BTreeMap<u32, f64>,
    pub allowed_token_ids: Option<Vec<u32>>,
    pub bad_words: Vec<String>,
    pub stop: Vec<String>,
    pub include_stop_str_in_output: bool,
    pub stop_token_ids: Vec<u32>,
    pub ignore_eos: bool,
    pub seed: Option<i64>,
    /// Most likely tokens to report beside the chosen one; `None` reports nothing.
    pub logprobs: Option<u64>,
    pub prompt_logprobs: Option<u64>,
    pub skip_special_tokens: Option<bool>,
    pub priority: i32,
    pub cache_salt: Option<String>,
    pub truncation: Option<Truncation>,
    /// Go on with what another server began.
    pub resume: Option<Resume>,
    /// What the output must be; `None` is free text.
    pub format: Option<RequestedFormat>,
}

/// A form that an output must have, and the field that asks for it.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestedFormat {
    /// Named where it is refused.
    pub param: &'static str,
    pub format: OutputFormat,
}

/// One choice of a request, as far as another server generated it. The other parameters are those of the request that the
/// other server was sent, and the seed is the one that its answer named.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Resume {
    /// Generated and delivered.
    pub generated: Vec<u32>,
    /// Which of the request's choices it is.
    pub choice_offset: u32,
}

/// A request of either face.
#[derive(Clone, Debug)]
pub struct GenerationRequest {
    /// Of the form `[A-Za-z0-9._-]{1,128}`; made by the face where the client gave none.
    pub request_id: String,
    /// Where it came in, for the metrics.
    pub endpoint: Endpoint,
    pub tenant: TenantId,
    /// `None` takes the server's model.
    pub model: Option<String>,
    pub input: Input,
    pub params: GenerationParams,
    pub deadline: Option<Instant>,
}

/// Text of a token and its log probability, for one reported token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenInfo {
    pub token_id: u32,
    /// The token's own bytes; not always whole UTF-8.
    pub bytes: Arc<[u8]>,
    /// Characters of its choice's text that the token completes; for a token of the prompt 0.
    pub num_chars: u32,
    pub logprobs: Option<NamedLogprobs>,
}

/// [`TokenLogprobs`] with the bytes of the tokens named.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedLogprobs {
    pub values: TokenLogprobs,
    /// Beside `values.top`.
    pub top_bytes: Vec<Arc<[u8]>>,
}

/// Why a choice ended, as clients see it.
#[derive(Clone, Debug, PartialEq)]
pub enum StopCause {
    /// The model's end of sequence.
    EndOfSequence,
    /// A stop token that the request named.
    StopToken(u32),
    /// A stop string that the request named.
    StopString(String),
    /// `max_tokens` or the model's length.
    Length,
    /// The model called tools, and waits for their results.
    ToolCalls,
}

/// Tokens in and out of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
    /// Prompt tokens that came from the prefix cache.
    pub cached_tokens: u32,
    /// Of `completion_tokens`, those of reasoning, with the marks around it.
    pub reasoning_tokens: u32,
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
        self.cached_tokens += other.cached_tokens;
        self.reasoning_tokens += other.reasoning_tokens;
    }
}

/// What a [`Generation`] yields, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum GenerationEvent {
    /// Log probabilities of a prompt token (the first has none and is not reported).
    PromptLogprobs { position: u32, info: TokenInfo },
    /// New text of a choice and the tokens it came from. Text can lag behind tokens while a character or a possible
    /// stop string is not complete; either can be empty.
    Delta { choice_index: u32, text: String, tokens: Vec<TokenInfo> },
    /// New reasoning of a choice; what is reasoning is not in the text of a delta.
    Reasoning { choice_index: u32, text: String },
    /// A part of a call as it comes: first its id and name (`head`), then pieces of its arguments. [`Self::ToolCall`] follows.
    ToolCallPiece { choice_index: u32, call_index: u32, head: Option<CallHead>, arguments: String },
    /// A call that a choice makes, whole; `in_pieces` where all of it was said already. `call_index` counts the choice's calls
    /// from 0.
    ToolCall { choice_index: u32, call_index: u32, call: ToolCall, in_pieces: bool },
    /// The choice's last event.
    ChoiceFinished { choice_index: u32, cause: StopCause },
    /// The last event of a request that ended well.
    Done { usage: Usage },
    /// The last event of one that did not.
    Error(ApiError),
}
