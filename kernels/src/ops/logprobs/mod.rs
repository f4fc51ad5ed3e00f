//! Log probabilities of given and of most likely tokens.

pub(crate) mod cpu;

use crate::Backend;

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
