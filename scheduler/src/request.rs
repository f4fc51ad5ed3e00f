//! What was asked, in tokens. A [`Request`] never changes after it was submitted; its progress lives in `Sequence`.

use std::sync::Arc;

/// Identity of a request inside one engine. The engine hands them out in order; they are never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Who asks. Tenants have their own share of the queue; 0 is the tenant of a server without keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TenantId(pub u32);

/// A LoRA adapter loaded beside the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId(pub u32);

/// A point in time in microseconds since an origin that the caller chose; the scheduler has no clock of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Time(pub u64);

/// First link of a request's chain of block hashes. Two requests share cached blocks only when their salts are equal,
/// so the salt is derived from everything that must separate them: tenant, adapter, model digest, the caller's own salt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CacheSalt(pub [u8; 32]);

/// How tokens are chosen. The scheduler reads `num_choices` and the logprob counts; the rest is for the sampler.
///
/// Defaults choose from the model's unchanged distribution (`temperature` 1, no filter, no penalty).
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; otherwise logits are divided by it. At least 0, at most 2.
    pub temperature: f32,
    /// Keep the k most likely tokens; `None` keeps all.
    pub top_k: Option<u32>,
    /// Keep the smallest set of most likely tokens whose mass reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Keep the tokens closest to the distribution's entropy until this mass; 1 keeps all (Meister et al. 2023).
    pub typical_p: f32,
    /// Over 1 makes tokens of prompt and output less likely, under 1 more (Keskar et al. 2019). 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of each token that the output holds. 0 is off.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit for each time that the output holds it. 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// If given, no other token can be chosen.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Token runs that must not appear in the output.
    pub bad_words: Vec<Vec<u32>>,
    /// Key of the counter-based generator; with the choice's index and the position it decides every draw.
    pub seed: u64,
    /// Sequences generated for the one prompt (`n`); at least 1.
    pub num_choices: u32,
    /// Report the chosen token's log probability and those of this many most likely tokens.
    pub logprobs: Option<u32>,
    /// The same for the tokens of the prompt.
    pub prompt_logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            allowed_token_ids: None,
            bad_words: Vec::new(),
            seed: 0,
            num_choices: 1,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

/// What a client asked for, in tokens.
#[derive(Clone, Debug)]
pub struct Request {
    /// Not in use by a request that still lives.
    pub id: RequestId,
    /// Whose share of the queue it takes.
    pub tenant: TenantId,
    /// Weights beside the model's; part of the block hashes.
    pub adapter: Option<AdapterId>,
    /// Lower is admitted earlier among the tenant's own requests; those of one priority in order of arrival.
    pub priority: i32,
    /// First link of its chain of block hashes.
    pub cache_salt: CacheSalt,
    /// At least one token.
    pub prompt: Arc<[u32]>,
    /// Tokens that were generated elsewhere already (another replica, before it died). The sequence goes on behind
    /// them; they count towards `max_tokens` and `min_tokens` and are not reported again. Needs `num_choices == 1`;
    /// `choice_offset` says which choice this is. Where they complete the output already, the request finishes at once.
    pub generated: Vec<u32>,
    /// Index of this request's first choice, for a request that continues one choice of several.
    pub choice_offset: u32,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Most tokens to generate, those in `generated` counted in; at least 1.
    pub max_tokens: u32,
    /// Stop tokens cannot be chosen before this many tokens were generated.
    pub min_tokens: u32,
    /// A generated token in this list ends the sequence. Holds the model's end-of-sequence tokens too, unless the
    /// request ignores them.
    pub stop_token_ids: Vec<u32>,
    /// When to give up, by the clock that `now` is read from.
    pub deadline: Option<Time>,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// A stop token was generated; it is the last token reported.
    Stop {
        /// The stop token.
        token_id: u32,
    },
    /// `max_tokens` or the model's length was reached.
    Length,
    /// The caller ended it ([`crate::Scheduler::abort`]).
    Cancelled,
    /// Its deadline passed.
    DeadlineExceeded,
    /// The device computed logits that are not finite numbers for this sequence.
    NonFinite,
    /// What the request allows left no token to choose.
    NothingAllowed,
}
