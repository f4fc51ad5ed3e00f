//! Log probabilities of given and of most likely tokens.

pub(crate) mod cpu;
#[cfg(feature = "testing")]
pub mod reference;

use crate::ops::{at_least, below};
use crate::{Backend, KernelError};

/// One row of logits whose log probabilities are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogprobsAt {
    /// Row of `logits`.
    pub logits_row: u32,
    /// The token asked about.
    pub token_id: u32,
}

/// Log softmax of unchanged logits (before bias, penalties and temperature), in nats: for each row the value and rank
/// of one token and the `num_top` most likely tokens in order (lower id first among equals).
///
/// * `logits` `F32`, `[at least max(logits_row) + 1, vocab_size]`
///
/// Per entry i of `rows`, writes `out_values[i * (1 + num_top) ..]` (`F32`): the token's value, then the top values; and
/// `out_ids[i * (1 + num_top) ..]` (`U32`): the token's rank from 1, then the top ids.
pub struct Logprobs<'a, B: Backend> {
    pub logits: &'a B::Buffer,
    pub vocab_size: usize,
    pub rows: &'a [LogprobsAt],
    pub num_top: usize,
    pub out_values: &'a mut B::Buffer,
    pub out_ids: &'a mut B::Buffer,
}

/// Numbers in each buffer.
pub(crate) struct Lens {
    pub(crate) logits: usize,
    pub(crate) out_values: usize,
    pub(crate) out_ids: usize,
}

impl<B: Backend> Logprobs<'_, B> {
    pub(crate) const OP: &'static str = "logprobs";

    /// What every device refuses.
    pub(crate) fn check(&self, lens: Lens) -> Result<(), KernelError> {
        at_least(Self::OP, "vocab_size", 1, self.vocab_size)?;
        below(Self::OP, "num_top", self.num_top as u64, self.vocab_size + 1)?;
        let num_rows = lens.logits / self.vocab_size;
        for at in self.rows {
            below(Self::OP, "logits_row", at.logits_row, num_rows)?;
            below(Self::OP, "token_id", at.token_id, self.vocab_size)?;
        }
        let len = self.rows.len().saturating_mul(1 + self.num_top);
        at_least(Self::OP, "out_values", len, lens.out_values)?;
        at_least(Self::OP, "out_ids", len, lens.out_ids)
    }
}
