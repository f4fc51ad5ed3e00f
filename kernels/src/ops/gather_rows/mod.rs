//! Rows of a matrix, picked by index.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(feature = "testing")]
pub mod reference;

use crate::ops::at_least;
use crate::{Backend, KernelError};

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

/// Numbers in each buffer.
pub(crate) struct Lens {
    pub(crate) indices: usize,
    pub(crate) out: usize,
}

impl<B: Backend> GatherRows<'_, B> {
    pub(crate) const OP: &'static str = "gather_rows";

    /// What every device refuses; indices are looked at by the device.
    pub(crate) fn check(&self, lens: Lens) -> Result<(), KernelError> {
        at_least(Self::OP, "dim", 1, self.dim)?;
        at_least(Self::OP, "indices", self.indices_offset.saturating_add(self.num_rows), lens.indices)?;
        at_least(Self::OP, "out", self.num_rows.saturating_mul(self.dim), lens.out)
    }
}
