//! Log probabilities of given and of most likely tokens.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(feature = "testing")]
pub mod reference;

use crate::ops::sample::NON_FINITE;
use crate::ops::{at_least, below};
use crate::{Backend, KernelError};

/// One row of logits whose log probabilities are wanted: two words of [`Logprobs::rows`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogprobsAt {
    /// Row of `logits`.
    pub logits_row: u32,
    /// Which of `tokens` is asked about.
    pub token_index: u32,
}

impl LogprobsAt {
    /// As it lies in [`Logprobs::rows`].
    pub const fn words(self) -> [u32; 2] {
        [self.logits_row, self.token_index]
    }
}

/// Log softmax of unchanged logits (before bias, penalties and temperature), in nats: for each row the value and rank
/// of one token and the `num_top` most likely tokens in order (lower id first among equals).
///
/// * `logits` `F32`, `[at least max(logits_row) + 1, vocab_size]`
/// * `rows`   `U32`, `[any, 2]`, see [`LogprobsAt`]; read from entry `rows_offset` on
/// * `tokens` `U32`; what sampling chose, say. One that is [`NON_FINITE`] has value NaN and rank 0
///
/// Per entry i, writes `out_values[(out_offset + i) * (1 + num_top) ..]` (`F32`): the token's value, then the top values;
/// and `out_ids[(out_offset + i) * (1 + num_top) ..]` (`U32`): the token's rank from 1, then the top ids.
pub struct Logprobs<'a, B: Backend> {
    pub logits: &'a B::Buffer,
    pub vocab_size: usize,
    pub rows: &'a B::Buffer,
    pub rows_offset: usize,
    pub num_rows: usize,
    pub tokens: &'a B::Buffer,
    pub num_top: usize,
    pub out_values: &'a mut B::Buffer,
    pub out_ids: &'a mut B::Buffer,
    pub out_offset: usize,
}

/// Numbers in each buffer.
pub(crate) struct Lens {
    pub(crate) rows: usize,
    pub(crate) out_values: usize,
    pub(crate) out_ids: usize,
}

impl<B: Backend> Logprobs<'_, B> {
    pub(crate) const OP: &'static str = "logprobs";

    /// What every device refuses of sizes; entries of `rows` are looked at by the device.
    pub(crate) fn check(&self, lens: Lens) -> Result<(), KernelError> {
        at_least(Self::OP, "vocab_size", 1, self.vocab_size)?;
        below(Self::OP, "num_top", self.num_top as u64, self.vocab_size + 1)?;
        let num_words = self.rows_offset.saturating_add(self.num_rows).saturating_mul(2);
        at_least(Self::OP, "rows", num_words, lens.rows)?;
        let len = self.out_offset.saturating_add(self.num_rows).saturating_mul(1 + self.num_top);
        at_least(Self::OP, "out_values", len, lens.out_values)?;
        at_least(Self::OP, "out_ids", len, lens.out_ids)
    }

    /// What the device refuses of an entry, and its token where there is one.
    pub(crate) fn check_row(
        [logits_row, token_index]: [u32; 2],
        num_logits_rows: usize,
        tokens: &[u32],
        vocab_size: usize,
    ) -> Result<Option<u32>, KernelError> {
        below(Self::OP, "logits_row", logits_row, num_logits_rows)?;
        below(Self::OP, "token_index", token_index, tokens.len())?;
        match tokens[token_index as usize] {
            NON_FINITE => Ok(None),
            token_id => below(Self::OP, "tokens", token_id, vocab_size).map(|()| Some(token_id)),
        }
    }
}
