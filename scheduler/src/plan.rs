//! The border between deciding and computing: what to run in a step, and what came back.
//!
//! A plan names ranges and blocks only. Token ids travel once, when a sequence is admitted to a row; from then on the
//! device keeps each row's tokens and appends what it samples. So the plan of step N+1 can be made while step N still
//! runs: the token that it continues from is on the device, known to the scheduler or not.

use std::ops::Range;
use std::sync::Arc;

use crate::{BlockId, Request, RequestId};

/// Number of a step; they count up from 0 without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StepId(pub u64);

/// Row of the device's per-sequence tables (tokens, blocks): stable while a sequence runs, below `max_num_seqs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowId(pub u32);

/// A sequence enters a row: newly arrived, or back after preemption.
#[derive(Clone, Debug)]
pub struct Admission {
    /// Where it lives on the device from now on.
    pub row: RowId,
    /// What was asked.
    pub request: Arc<Request>,
    /// Which of the request's choices this is, `choice_offset` counted in; part of the sampler's key.
    pub choice_index: u32,
    /// All tokens that the row starts with are `request.prompt` and then these.
    pub generated: Vec<u32>,
}

/// What a step computes for one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScheduledSequence {
    /// Which sequence.
    pub row: RowId,
    /// Position of the first scheduled token = tokens whose K and V are in the cache when the step begins.
    pub num_computed_tokens: u32,
    /// Tokens this step adds; they follow `num_computed_tokens`. At least 1.
    pub num_scheduled_tokens: u32,
    /// Blocks appended to the row's tables by this step, in all KV groups, as a range of [`StepPlan::new_blocks`].
    /// The first range appended after an [`Admission`] starts the tables anew. Entries that no kernel reads (they are
    /// out of the window already) are [`BlockId::NONE`].
    pub new_blocks: Range<u32>,
    /// Whether the scheduled range reaches the last known token, so that a new token is sampled behind it.
    pub samples: bool,
}

/// What to run in one step. Consumed by [`crate::Scheduler::apply`], exactly once and in order.
#[must_use = "a plan is applied exactly once"]
#[derive(Debug)]
pub struct StepPlan {
    /// Which step this is.
    pub step_id: StepId,
    /// Rows given up since the last plan. A row can be in `released` and in `admitted`: release comes first.
    pub released: Vec<RowId>,
    /// Sequences that enter a row; each is among `sequences` too.
    pub admitted: Vec<Admission>,
    /// Decodes (one scheduled token) first, then prompts. Empty when there is nothing to compute.
    pub sequences: Vec<ScheduledSequence>,
    /// Arena of block ids that [`ScheduledSequence::new_blocks`] points into. With several KV groups the blocks of a
    /// range alternate: one position of group 0, group 1, ..., then the next position.
    pub new_blocks: Vec<BlockId>,
    /// Sum of `num_scheduled_tokens`.
    pub num_scheduled_tokens: u32,
}

impl StepPlan {
    /// How many of `sequences`, from the first on, have one scheduled token.
    #[must_use]
    pub fn num_decodes(&self) -> usize {
        let is_prompt = |sequence: &ScheduledSequence| sequence.num_scheduled_tokens > 1;
        self.sequences.iter().position(is_prompt).unwrap_or(self.sequences.len())
    }

    /// Whether there is nothing to compute. Such a plan is applied like any other.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    pub(crate) fn with_capacity(num_seqs: usize, num_blocks: usize) -> Self {
        Self {
            step_id: StepId(0),
            released: Vec::with_capacity(num_seqs),
            admitted: Vec::with_capacity(num_seqs),
            sequences: Vec::with_capacity(num_seqs),
            new_blocks: Vec::with_capacity(num_blocks),
            num_scheduled_tokens: 0,
        }
    }

    /// Empties the plan; its buffers serve the next one.
    pub(crate) fn clear(&mut self) {
        self.released.clear();
        self.admitted.clear();
        self.sequences.clear();
        self.new_blocks.clear();
        self.num_scheduled_tokens = 0;
    }
}

/// Log probability of one token among a distribution, in nats.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token that was chosen.
    pub logprob: f32,
    /// 1 is the most likely token.
    pub rank: u32,
    /// The most likely tokens in order; as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// What came back for one scheduled sequence, in plan order.
#[derive(Clone, Debug, PartialEq)]
pub enum SequenceOutput {
    /// The range was computed; `tokens` points into [`StepOutput::token_ids`]: 0 to k sampled tokens.
    ///
    /// A plan already in flight counts on all scheduled tokens to stay and on one sampled token. Where another number
    /// comes, that plan's part for the sequence is void: its entry in the output is not looked at, what it writes to the
    /// sequence's blocks is written again, and the sequence is admitted to its row anew. The same holds for a sequence
    /// that ended while a plan with it was in flight, except that it is not admitted again.
    Computed {
        /// How many of the scheduled tokens stay in the cache: all of them, except where speculated tokens were
        /// refused.
        num_computed_tokens: u32,
        /// Sampled tokens; empty unless the sequence samples.
        tokens: Range<u32>,
    },
    /// The logits of this row were not finite: the request's choice ends, its blocks are not reused.
    NonFinite,
    /// What the request allows leaves no token to choose: its choice ends.
    NothingAllowed,
}

/// What one step computed. [`crate::Scheduler::apply`] takes it apart and leaves empty buffers for the next step.
#[derive(Debug)]
pub struct StepOutput {
    /// Of the plan that was computed.
    pub step_id: StepId,
    /// One entry per sequence of the plan.
    pub sequences: Vec<SequenceOutput>,
    /// Sampled tokens of all sequences.
    pub token_ids: Vec<u32>,
    /// Beside `token_ids`: entry i belongs to token i. `None` where the request did not ask. May be empty when nobody
    /// asked.
    pub logprobs: Vec<Option<TokenLogprobs>>,
    /// Log probabilities of prompt tokens: (index into the plan's sequences, position of the token, values), where
    /// asked.
    pub prompt_logprobs: Vec<(u32, u32, TokenLogprobs)>,
}

impl Default for StepOutput {
    fn default() -> Self {
        Self::new(StepId(0))
    }
}

impl StepOutput {
    /// Empty output of a step.
    #[must_use]
    pub fn new(step_id: StepId) -> Self {
        Self {
            step_id,
            sequences: Vec::new(),
            token_ids: Vec::new(),
            logprobs: Vec::new(),
            prompt_logprobs: Vec::new(),
        }
    }

    /// Empties the buffers, without giving them back, for the output of another step.
    pub fn reset(&mut self, step_id: StepId) {
        self.step_id = step_id;
        self.sequences.clear();
        self.token_ids.clear();
        self.logprobs.clear();
        self.prompt_logprobs.clear();
    }

    /// Adds the next sequence's entry: all scheduled tokens computed, and these sampled.
    pub fn push_computed(&mut self, num_computed_tokens: u32, tokens: &[u32]) {
        let start = self.token_ids.len() as u32;
        self.token_ids.extend_from_slice(tokens);
        let tokens = start..self.token_ids.len() as u32;
        self.sequences.push(SequenceOutput::Computed { num_computed_tokens, tokens });
    }
}

/// What happened to a request, in order. The engine forwards it to whoever waits.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// To whom.
    pub request: RequestId,
    /// Choice index, `choice_offset` counted in.
    pub choice_index: u32,
    /// What happened.
    pub kind: EventKind,
}

/// See [`Event`].
#[derive(Clone, Debug, PartialEq)]
pub enum EventKind {
    /// First time in a plan.
    Scheduled {
        /// Tokens of its prompt that it need not compute: found in the prefix cache, or shared with another choice.
        num_cached_tokens: u32,
    },
    /// Back to waiting, to be computed again later.
    Preempted,
    /// Log probabilities of a prompt token, in order of position, before the first token. Only the first choice
    /// reports them.
    PromptLogprobs {
        /// Of the token in the prompt; at least 1.
        position: u32,
        /// Its values.
        logprobs: TokenLogprobs,
    },
    /// A generated token.
    Token {
        /// The token.
        token_id: u32,
        /// Where asked.
        logprobs: Option<TokenLogprobs>,
    },
    /// The choice's only and last event of this kind; its blocks are free.
    Finished {
        /// Why it ended.
        reason: crate::FinishReason,
        /// All generated tokens, those that the request came with counted in.
        num_generated_tokens: u32,
    },
}
