//! Progress of one generation: lengths, state, legal transitions.

use std::sync::Arc;

use crate::prefix_cache::BlockHash;
use crate::tenants::TenantIndex;
use crate::{FinishReason, Request, RequestId};

/// Where a sequence's state is kept; reused after it ended.
pub(crate) type Slot = u32;
pub(crate) const NO_SLOT: Slot = u32::MAX;
pub(crate) const NO_ROW: u32 = u32::MAX;

/// Order of arrival.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    pub(crate) arrival: u64,
    pub(crate) choice: u32,
}

/// The crate's text has the diagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// The slot is free.
    Vacant,
    /// Waits until another choice of its request has computed the prompt.
    Parked,
    /// In the waiting queue.
    Waiting,
    /// Has a row.
    Running,
    /// Has a row and will go back to waiting when the plans in flight that use it are applied.
    Preempting,
    /// Ended; row and blocks are freed when the plans in flight that use them are applied.
    Draining,
}

/// What every step looks at: one cache line.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Sequence {
    pub(crate) state: State,
    /// Unapplied plans that schedule it: 0 to 2.
    pub(crate) num_in_flight: u8,
    /// Unapplied plans that are expected to sample a token for it.
    pub(crate) num_pending: u8,
    /// Unapplied plans whose part in it is void: they continue from something that did not come true.
    pub(crate) num_void: u8,
    /// The device's row is off after a void part: it is admitted anew, to the same row, blocks kept.
    pub(crate) readmit: bool,
    pub(crate) row: u32,
    pub(crate) prompt_len: u32,
    /// Known tokens: prompt and generated.
    pub(crate) num_tokens: u32,
    /// Tokens whose K and V are in the cache for certain.
    pub(crate) num_computed: u32,
    /// The same when all plans in flight went as expected.
    pub(crate) num_planned: u32,
    /// Positions that its block tables cover.
    pub(crate) capacity: u32,
    /// `num_computed` from which on a block is full, or can be given back, that was not before.
    pub(crate) next_boundary: u32,
    /// The sequence ends with this many tokens.
    pub(crate) max_len: u32,
    /// Stop tokens count from this many tokens on.
    pub(crate) min_len: u32,
    pub(crate) tenant: TenantIndex,
    pub(crate) request: RequestId,
    pub(crate) choice_index: u32,
    /// Bit t % 32 is set for each stop token t: most tokens are cleared by one test.
    pub(crate) stop_filter: u32,
}

impl Sequence {
    pub(crate) const VACANT: Self = Self {
        state: State::Vacant,
        num_in_flight: 0,
        num_pending: 0,
        num_void: 0,
        readmit: false,
        row: NO_ROW,
        prompt_len: 0,
        num_tokens: 0,
        num_computed: 0,
        num_planned: 0,
        capacity: 0,
        next_boundary: u32::MAX,
        max_len: 0,
        min_len: 0,
        tenant: 0,
        request: RequestId(0),
        choice_index: 0,
        stop_filter: 0,
    };

    /// How many tokens it has when all plans in flight went as expected.
    pub(crate) fn expected_len(&self) -> u32 {
        self.num_tokens + u32::from(self.num_pending)
    }

    /// Tokens that could be scheduled now. 0 while it waits for a plan in flight: for the end that is certain to come,
    /// or because a part of the plan is void.
    pub(crate) fn num_schedulable(&self) -> u32 {
        let expected = self.expected_len();
        if expected >= self.max_len || self.num_void > 0 {
            return 0;
        }
        expected - self.num_planned
    }

    pub(crate) fn transition(&mut self, to: State) {
        use State::{Draining, Parked, Preempting, Running, Vacant, Waiting};
        let legal = match self.state {
            Vacant => matches!(to, Parked | Waiting),
            Parked => matches!(to, Waiting | Vacant),
            Waiting => matches!(to, Running | Vacant),
            Running => matches!(to, Waiting | Preempting | Draining | Vacant),
            Preempting => matches!(to, Waiting | Draining | Vacant),
            Draining => to == Vacant,
        };
        assert!(legal, "{:?} -> {to:?}", self.state);
        self.state = to;
    }
}

/// What only some steps look at.
#[derive(Debug, Default)]
pub(crate) struct Details {
    /// `None` in a vacant slot.
    pub(crate) request: Option<Arc<Request>>,
    pub(crate) rank: Rank,
    /// When it was first admitted, as a count: among running sequences the lower keeps its blocks and is served first.
    pub(crate) admission: u64,
    /// All generated tokens, those that the request came with counted in.
    pub(crate) generated: Vec<u32>,
    /// Of the known tokens' full blocks, as far as they were needed yet.
    pub(crate) hashes: Vec<BlockHash>,
    /// Blocks at the front that other sequences can hit, or that were hit or shared.
    pub(crate) num_published: u32,
    /// Why it ended, while it drains.
    pub(crate) finish: Option<FinishReason>,
    /// It was in a plan once.
    pub(crate) was_scheduled: bool,
    /// It computes the prompt for parked choices.
    pub(crate) leads: bool,
    /// Next prompt position whose log probability is to be reported; past the prompt when none is.
    pub(crate) next_prompt_logprob: u32,
    /// Nothing was given back since it was found not to fit: it still does not.
    pub(crate) blocked_epoch: Option<u64>,
    /// List of the request's live choices.
    pub(crate) previous_choice: Slot,
    pub(crate) next_choice: Slot,
}

impl Details {
    pub(crate) fn request(&self) -> &Arc<Request> {
        self.request.as_ref().expect("the slot is in use")
    }

    /// Tokens of the block at `position`, all of them known: those of the prompt, then generated ones.
    pub(crate) fn block_tokens(&self, position: u32, prompt_len: u32, block_size: u32) -> [&[u32]; 2] {
        let (prompt_len, block_size) = (prompt_len as usize, block_size as usize);
        let start = position as usize * block_size;
        let end = start + block_size;
        // Behind the prompt the request is not touched: it is not in the processor's cache.
        let prompt: &[u32] = match &self.request {
            Some(request) if start < prompt_len => &request.prompt[start..end.min(prompt_len)],
            _ => &[],
        };
        [prompt, &self.generated[start.max(prompt_len) - prompt_len..end.max(prompt_len) - prompt_len]]
    }

    /// Computes the hashes of the first `count` blocks, whose tokens are known.
    pub(crate) fn extend_hashes(&mut self, count: u32, prompt_len: u32, block_size: u32) {
        while (self.hashes.len() as u32) < count {
            let token_ids = self.block_tokens(self.hashes.len() as u32, prompt_len, block_size);
            let parent = match (self.hashes.last(), &self.request) {
                (Some(parent), _) => *parent,
                (None, request) => {
                    let request = request.as_ref().expect("the slot is in use");
                    BlockHash::root(&request.cache_salt, request.adapter)
                }
            };
            self.hashes.push(parent.child(token_ids));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_in_flight_continues_from_the_token_to_come() {
        let mut sequence =
            Sequence { num_tokens: 10, num_computed: 9, num_planned: 9, max_len: 12, ..Sequence::VACANT };
        assert_eq!(sequence.num_schedulable(), 1);
        sequence.num_planned = 10;
        sequence.num_pending = 1;
        assert_eq!(sequence.num_schedulable(), 1);
        sequence.num_planned = 11;
        sequence.num_pending = 2;
        assert_eq!(sequence.num_schedulable(), 0, "its last token is on its way");
        sequence.num_pending = 1;
        sequence.num_void = 1;
        assert_eq!(sequence.num_schedulable(), 0);
    }

    #[test]
    fn what_every_step_looks_at_is_one_cache_line() {
        assert_eq!(size_of::<Sequence>(), 64);
    }

    #[test]
    #[should_panic(expected = "Draining -> Running")]
    fn the_dead_do_not_run() {
        let mut sequence = Sequence { state: State::Draining, ..Sequence::VACANT };
        sequence.transition(State::Running);
    }
}
