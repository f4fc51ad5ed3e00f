//! Rows of a matrix, picked by index.

pub(crate) mod cpu;

use crate::Backend;

/// `out[i] = x[indices[i]]`: the hidden states that logits are wanted of.
///
/// * `x`       `F32`, `[any, dim]`
/// * `indices` `U32`, `[num_rows]`, read from `indices_offset` on
///
/// Writes `F32` `[num_rows, dim]`. Fails with `KernelError::Range` where an index is past `x`.
pub struct GatherRows<'a, B: Backend> {
    pub x: &'a B::Buffer,
    pub dim: usize,
    pub indices: &'a B::Buffer,
    pub indices_offset: usize,
    pub num_rows: usize,
    pub out: &'a mut B::Buffer,
}
