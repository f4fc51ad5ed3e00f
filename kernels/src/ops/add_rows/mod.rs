//! Rows of a table, picked by index and added.

pub(crate) mod cpu;
#[cfg(feature = "testing")]
pub mod reference;

use crate::ops::at_least;
use crate::{Backend, KernelError};

/// `out[i] += table[indices[i]]`: learned embeddings of positions and of kinds of tokens.
///
/// * `table`   `F32`, `[any, dim]`
/// * `indices` `U32`, `[num_rows]`
///
/// Adds to `F32` `[num_rows, dim]`. Fails with `KernelError::Range` where an index is past `table`, before anything is written.
pub struct AddRows<'a, B: Backend> {
    pub table: &'a B::Buffer,
    pub dim: usize,
    pub indices: &'a B::Buffer,
    pub num_rows: usize,
    pub out: &'a mut B::Buffer,
}

impl<B: Backend> AddRows<'_, B> {
    pub(crate) const OP: &'static str = "add_rows";

    /// What every device refuses; indices are looked at by the device.
    pub(crate) fn check(&self, indices_len: usize, out_len: usize) -> Result<(), KernelError> {
        at_least(Self::OP, "dim", 1, self.dim)?;
        at_least(Self::OP, "indices", self.num_rows, indices_len)?;
        at_least(Self::OP, "out", self.num_rows.saturating_mul(self.dim), out_len)
    }
}
