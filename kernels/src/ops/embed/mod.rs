//! Token ids to rows of the embedding matrix.

pub(crate) mod cpu;
pub(crate) mod cuda;
pub mod reference;

use crate::{Backend, KernelError};

/// Looks up one row of `table` per token: `out[t] = table[token_table[token_indices[t]]]`.
///
/// * `table`         `[vocab_size, hidden_size]`, packed for [`Backend::linear`] too (tied embeddings are one matrix)
/// * `token_table`   `U32`, `[max_num_seqs, max_model_len]`: the tokens of every row, sampled ones included
/// * `token_indices` `U32`, `[num_tokens]`: flat indices into `token_table`
///
/// Writes `F32` `[num_tokens, hidden_size]`. Fails with `KernelError::Shape` naming the argument, and with
/// `KernelError::Range` where an index or a token id is past its table.
pub struct Embed<'a, B: Backend> {
    pub table: &'a B::Weight,
    pub token_table: &'a B::Buffer,
    pub token_indices: &'a B::Buffer,
    pub num_tokens: usize,
    pub out: &'a mut B::Buffer,
}

/// Whether the lengths of [`Embed`]'s arguments fit each other. The same on every device.
pub(crate) fn check(
    hidden_size: usize,
    num_tokens: usize,
    num_indices: usize,
    out_len: usize,
) -> Result<(), KernelError> {
    let op = "embed";
    if num_indices < num_tokens {
        return Err(KernelError::Shape { op, argument: "token_indices", expected: num_tokens, found: num_indices });
    }
    match num_tokens.checked_mul(hidden_size) {
        Some(expected) if expected <= out_len => Ok(()),
        expected => {
            Err(KernelError::Shape { op, argument: "out", expected: expected.unwrap_or(usize::MAX), found: out_len })
        }
    }
}
