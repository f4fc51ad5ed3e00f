//! How much a request may ask for.

use serde::{Deserialize, Serialize};

use crate::grammar::GrammarLimits;

/// What one request may hold. A request over a limit is refused before anything is allocated for it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes of an HTTP body. A long context in JSON takes about 5 bytes a token.
    pub max_body_bytes: usize,
    /// Bytes of all bodies, HTTP's and gRPC's, that were received and not turned into tokens yet; past it callers get
    /// 429. At least `max_body_bytes`.
    pub max_buffered_bytes: usize,
    /// Seconds that a client may take to send a whole body, or all messages of a gRPC call.
    pub body_timeout_seconds: u64,
    /// Seconds from accepting a request to its last token, over either face; 0 is no limit. A gRPC call's own deadline counts
    /// where it is sooner.
    pub request_timeout_seconds: u64,
    /// Seconds after which a streamed answer that has nothing to say yet says so in a comment, so that nobody in between
    /// takes it for dead while a long prompt is computed; 0 is never.
    pub sse_keepalive_seconds: u64,
    /// Messages of a conversation.
    pub max_messages: usize,
    /// Tools that a conversation may offer.
    pub max_tools: usize,
    /// Documents that it may bring.
    pub max_documents: usize,
    /// Prompts of one completions request; with `n` choices each.
    pub max_prompts: usize,
    /// Texts of an embeddings request, and documents or pairs of one that scores them.
    pub max_pooling_texts: usize,
    /// Choices (`n`) of a request. Each takes one of `max_num_seqs` places.
    pub max_choices: u64,
    /// Most likely tokens reported beside the chosen one (`top_logprobs`, `logprobs`, `prompt_logprobs`).
    pub max_top_logprobs: u64,
    /// Stop strings.
    pub max_stop: usize,
    /// Bytes of a stop string or a bad word.
    pub max_stop_bytes: usize,
    /// Entries of `stop_token_ids`.
    pub max_stop_token_ids: usize,
    /// Entries of `logit_bias`.
    pub max_logit_bias: usize,
    /// Entries of `bad_words`.
    pub max_bad_words: usize,
    /// Prompt bytes per token of the model's length: past `max_model_len` times this a text cannot fit, and is not
    /// tokenised.
    pub max_prompt_bytes_per_token: usize,
    /// Texts that are tokenised at once; 0 is one per core.
    pub max_concurrent_tokenizations: usize,
    /// Requests that may wait to be tokenised; past it callers get 429.
    pub max_waiting_tokenizations: usize,
    /// Instructions that a chat template may run for one request; every 64 bytes that it makes count as one more.
    pub template_fuel: u64,
    /// Bytes that a chat template may write beyond 16 times its input.
    pub template_output_bytes: usize,
    /// Responses that are kept to be read again or gone on with, the bytes that they take together, and the seconds that
    /// each is kept for; the oldest go first.
    pub max_stored_responses: usize,
    pub max_stored_response_bytes: usize,
    pub stored_response_seconds: u64,
    /// Whether `<|im_start|>` and its like in the prompt of a completions request are the model's special tokens. Off,
    /// because a caller that builds prompts from its users' words would let them forge turns; callers that render chat
    /// templates themselves can send token ids, or switch this on where every caller is trusted.
    pub special_tokens_in_prompts: bool,
    /// Whether a request with a field that is not known is refused. Off, such fields are named in the answer's header
    /// `x-quire-ignored-params`; a request can choose for itself by the header `x-quire-strict`.
    pub strict: bool,
    /// What a grammar that an output must obey may cost.
    pub grammar: GrammarLimits,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_body_bytes: 8 << 20,
            max_buffered_bytes: 128 << 20,
            body_timeout_seconds: 30,
            request_timeout_seconds: 0,
            sse_keepalive_seconds: 15,
            max_messages: 2048,
            max_tools: 128,
            max_documents: 256,
            max_prompts: 128,
            max_pooling_texts: 2048,
            max_choices: 8,
            max_top_logprobs: 20,
            max_stop: 16,
            max_stop_bytes: 1024,
            max_stop_token_ids: 128,
            max_logit_bias: 1024,
            max_bad_words: 128,
            max_prompt_bytes_per_token: 8,
            max_concurrent_tokenizations: 0,
            max_waiting_tokenizations: 1024,
            template_fuel: 1_000_000,
            template_output_bytes: 1 << 20,
            max_stored_responses: 1024,
            max_stored_response_bytes: 64 << 20,
            stored_response_seconds: 3600,
            special_tokens_in_prompts: false,
            strict: false,
            grammar: GrammarLimits::default(),
        }
    }
}

impl Limits {
    /// Fails with the first setting that cannot work and why.
    pub fn validate(&self) -> Result<(), (&'static str, &'static str)> {
        let at_least_one = [
            ("max_body_bytes", self.max_body_bytes as u64),
            ("body_timeout_seconds", self.body_timeout_seconds),
            ("max_messages", self.max_messages as u64),
            ("max_prompts", self.max_prompts as u64),
            ("max_pooling_texts", self.max_pooling_texts as u64),
            ("max_choices", self.max_choices),
            ("max_prompt_bytes_per_token", self.max_prompt_bytes_per_token as u64),
            ("max_waiting_tokenizations", self.max_waiting_tokenizations as u64),
            ("template_fuel", self.template_fuel),
        ];
        match at_least_one.into_iter().find(|(_, value)| *value == 0) {
            Some((field, _)) => Err((field, "must be at least 1")),
            // More than a day and a half is no limit, and keeps sums of times in range.
            None if self.request_timeout_seconds > 131_072 => {
                Err(("request_timeout_seconds", "must be at most 131072"))
            }
            None if self.stored_response_seconds > 131_072 => {
                Err(("stored_response_seconds", "must be at most 131072"))
            }
            None if self.sse_keepalive_seconds > 131_072 => Err(("sse_keepalive_seconds", "must be at most 131072")),
            None if self.max_buffered_bytes < self.max_body_bytes => {
                Err(("max_buffered_bytes", "must be at least max_body_bytes"))
            }
            None => Ok(()),
        }
    }
}
