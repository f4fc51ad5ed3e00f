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
        Box::new(Follower { matcher, eos_token_ids, is_masked: false, has_ended: false })
    }
}

/// One choice's place in a grammar.
struct Follower {
    matcher: Matcher,
    eos_token_ids: Arc<[u32]>,
    /// The mask that the next token was chosen by was computed.
    is_masked: bool,
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
        // The budget of a mask is met or not by what the masks before it left in the automaton. So a choice that begins anew
        // with its tokens goes the whole way again: it would be refused elsewhere than at the first time.
        if !std::mem::take(&mut self.is_masked) {
            self.matcher.compute_mask().map_err(|_| NotAllowed)?;
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
        self.is_masked = true;
        mask.iter_mut().zip(allowed.as_slice()).for_each(|(word, allowed)| *word = *allowed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use llguidance::toktrie::SimpleVob;

    use super::*;
    use crate::grammar::{GrammarLimits, GrammarSource, OutputFormat, Vocabulary};

    #[test]
    fn what_a_mask_costs_does_not_depend_on_which_were_asked_for() {
        let vocabulary = Vocabulary::of_demo();
        let schema = r#"{"type":"object","properties":{"a":{"type":"string","maxLength":40},"b":{"type":"number"}}}"#;
        let source = GrammarSource::of(&OutputFormat::JsonSchema(schema.into()), &GrammarLimits::default()).unwrap();
        let matcher = Matcher::new(vocabulary.factory().create_parser(source.into_grammar()));
        let follower = || Follower {
            matcher: matcher.deep_clone(),
            eos_token_ids: Arc::clone(vocabulary.eos_token_ids()),
            is_masked: false,
            has_ended: false,
        };
        let num_words = vocabulary.factory().tok_env().tok_trie().vocab_size().div_ceil(32);
        let cost_of_mask = |follower: &mut Follower| {
            let mut mask = vec![0; num_words];
            follower.mask(&mut mask).unwrap();
            (follower.matcher.last_step_stats().unwrap().lexer_cost, mask)
        };
        let mut running = follower();
        let (mut path, mut random) = (Vec::new(), 11_u64);
        for step in 0..24 {
            let (cost, mask) = cost_of_mask(&mut running);
            // Preempted here, and begun anew.
            let mut resumed = follower();
            path.iter().for_each(|token_id| resumed.advance(*token_id).unwrap());
            assert_eq!(cost_of_mask(&mut resumed), (cost, mask.clone()), "{step}");
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let allowed = SimpleVob::from_slice(
                &(0..32 * num_words).map(|id| mask[id / 32] >> (id % 32) & 1 == 1).collect::<Vec<_>>(),
            );
            let Some(token_id) = vocabulary.step_of_walk(&allowed, step + 1, random) else { break };
            running.advance(token_id).unwrap();
            path.push(token_id);
        }
        assert!(path.len() > 12, "{path:?}");
    }
}
