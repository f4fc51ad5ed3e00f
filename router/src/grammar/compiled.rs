//! A grammar that was compiled, and a choice on its way through it.

use std::fmt;
use std::sync::Arc;

use llguidance::Matcher;
use quire_engine::{Grammar, NotAllowed, TokenConstraint};

use super::warm::Start;

/// A grammar over one model's tokens.
pub struct CompiledGrammar {
    /// At the beginning. Each choice gets a copy with caches of its own, so that what it may do and what that costs never
    /// depends on others that obey the same grammar.
    start: Start,
    eos_token_ids: Arc<[u32]>,
}

impl fmt::Debug for CompiledGrammar {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A grammar can hold a caller's words.
        formatter.write_str("CompiledGrammar")
    }
}

impl CompiledGrammar {
    pub(super) fn new(start: Start, eos_token_ids: Arc<[u32]>) -> Self {
        Self { start, eos_token_ids }
    }

    /// About what it takes beside what its text says.
    pub(super) fn num_bytes(&self) -> usize {
        self.start.num_bytes
    }
}

impl Grammar for CompiledGrammar {
    fn begin(&self) -> Box<dyn TokenConstraint> {
        let (matcher, eos_token_ids) = (self.start.matcher.deep_clone(), Arc::clone(&self.eos_token_ids));
        Box::new(Follower { matcher, eos_token_ids, has_ended: false })
    }
}

/// One choice's place in a grammar.
struct Follower {
    matcher: Matcher,
    eos_token_ids: Arc<[u32]>,
    /// A token that ends the sequence came, where it might.
    has_ended: bool,
}

impl Follower {
    /// Whether the tokens so far are a whole output.
    fn is_complete(&mut self) -> bool {
        self.has_ended || self.is_exhausted() || self.matcher.is_accepting().unwrap_or(false)
    }

    /// Nothing can follow but the end.
    fn is_exhausted(&self) -> bool {
        self.matcher.is_stopped() && self.matcher.stop_reason().is_ok()
    }
}

impl TokenConstraint for Follower {
    fn advance(&mut self, token_id: u32) -> Result<(), NotAllowed> {
        if self.eos_token_ids.contains(&token_id) {
            if !self.is_complete() {
                return Err(NotAllowed);
            }
            self.has_ended = true;
            return Ok(());
        }
        if self.has_ended || self.is_exhausted() {
            return Err(NotAllowed);
        }
        self.matcher.consume_token(token_id).map_err(|_| NotAllowed)
    }

    fn mask(&mut self, mask: &mut [u32]) -> Result<(), NotAllowed> {
        if self.has_ended || self.is_exhausted() {
            for id in &*self.eos_token_ids {
                mask[*id as usize / 32] |= 1 << (id % 32);
            }
            return Ok(());
        }
        let allowed = self.matcher.compute_mask().map_err(|_| NotAllowed)?;
        mask.iter_mut().zip(allowed.as_slice()).for_each(|(word, allowed)| *word = *allowed);
        Ok(())
    }
}
