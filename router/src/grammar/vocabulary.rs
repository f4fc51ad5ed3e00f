//! The model's tokens, as grammars see them: a tree of their bytes.

use std::sync::Arc;

use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{ParserFactory, api::ParserLimits};

use crate::detokenizer::TokenTable;

/// The tokens of one model, and which of them end a sequence.
pub struct Vocabulary {
    factory: ParserFactory,
    eos_token_ids: Arc<[u32]>,
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
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices).ok()?;
        factory.quiet();
        *factory.limits_mut() = limits;
        Some(Self { factory, eos_token_ids })
    }

    pub(super) fn factory(&self) -> &ParserFactory {
        &self.factory
    }

    pub(super) fn eos_token_ids(&self) -> &Arc<[u32]> {
        &self.eos_token_ids
    }
}
