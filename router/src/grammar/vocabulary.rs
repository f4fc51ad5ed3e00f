//! The model's tokens, as grammars see them: a tree of their bytes.

use std::sync::Arc;

use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{ParserFactory, api::ParserLimits};

use crate::detokenizer::TokenTable;

/// What ends the strings, lists and objects of JSON, and what else grammars often write.
const CLOSING: [&str; 6] = ["\"", "}", "]", ",", ")", "\n"];

/// The tokens of one model, and which of them end a sequence.
pub struct Vocabulary {
    factory: ParserFactory,
    eos_token_ids: Arc<[u32]>,
    /// Tokens that end what a structured output may be within.
    closing: Vec<u32>,
    max_automaton_states: usize,
}

impl Vocabulary {
    /// `None` where the model has no token that ends a sequence: an output that is complete could not end.
    pub(crate) fn new(
        table: &TokenTable,
        vocab_size: u32,
        eos_token_ids: &[u32],
        limits: ParserLimits,
    ) -> Option<Self> {
        let eos_token_ids: Arc<[u32]> = eos_token_ids.iter().copied().filter(|id| *id < vocab_size).collect();
        let first_eos = *eos_token_ids.first()?;
        let words: Vec<Vec<u8>> = (0..vocab_size)
            .map(|id| {
                let bytes = table.bytes(id);
                if bytes.is_empty() || !(table.is_special(id) || eos_token_ids.contains(&id)) {
                    return bytes.to_vec();
                }
                // A byte that no text has: what marks structure is never part of what a grammar describes.
                let mut word = vec![TokTrie::SPECIAL_TOKEN_MARKER];
                word.extend_from_slice(&bytes);
                word
            })
            .collect();
        let trie = TokTrie::from(&TokRxInfo::new(vocab_size, first_eos), &words).with_eos_tokens(&eos_token_ids);
        let closing = CLOSING.iter().filter_map(|text| trie.token_id(text.as_bytes())).collect();
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices).ok()?;
        factory.quiet();
        let max_automaton_states = limits.max_lexer_states;
        *factory.limits_mut() = limits;
        Some(Self { factory, eos_token_ids, closing, max_automaton_states })
    }

    pub(super) fn factory(&self) -> &ParserFactory {
        &self.factory
    }

    /// A token of `mask` that does not end the output: the first behind a random one, or in every fourth step one that closes
    /// something where there is one. `None` where only the end is allowed.
    pub(super) fn step_of_walk(&self, mask: &SimpleVob, step: usize, random: u64) -> Option<u32> {
        if step % 4 == 3
            && let Some(closing) = self.closing.iter().find(|id| mask.is_allowed(**id))
        {
            return Some(*closing);
        }
        let words = mask.as_slice();
        let first = (random >> 32) as usize % words.len().max(1);
        let places = (first..words.len()).chain(0..first).filter(|place| words[*place] != 0);
        let ids = places.flat_map(|place| {
            (0..32).filter(move |bit| words[place] >> bit & 1 == 1).map(move |bit| (32 * place + bit) as u32)
        });
        ids.into_iter().find(|id| !self.eos_token_ids.contains(id))
    }

    /// States that the automaton of one choice may have.
    pub(super) fn max_automaton_states(&self) -> usize {
        self.max_automaton_states
    }

    /// The demo model's, with the budgets that a server has.
    #[cfg(test)]
    pub(super) fn of_demo() -> Self {
        let tokenizer = crate::tokenizer::TextTokenizer::load(include_bytes!("../../demo/tokenizer.json"), 0).unwrap();
        let (table, limits) = (tokenizer.table(), super::GrammarLimits::default().parser_limits());
        Self::new(table, table.len() as u32, &[2], limits).unwrap()
    }

    #[cfg(test)]
    pub(super) fn limit(&mut self, set: impl FnOnce(&mut ParserLimits)) {
        set(self.factory.limits_mut());
        self.max_automaton_states = self.factory.limits_mut().max_lexer_states;
    }

    pub(super) fn eos_token_ids(&self) -> &Arc<[u32]> {
        &self.eos_token_ids
    }
}
