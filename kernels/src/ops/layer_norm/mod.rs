//! Layer normalisation.

pub(crate) mod cpu;
#[cfg(feature = "testing")]
pub mod reference;

use crate::ops::at_least;
use crate::{Backend, KernelError};

/// `out[r] = (x[r] - mean(x[r])) / sqrt(variance(x[r]) + eps) * weight + bias`, in f32 with sums in a fixed order; the variance
/// is that of the row itself, of its centred numbers.
///
/// * `x`              `F32`, `[num_rows, dim]`
/// * `weight`, `bias` `F32`, `[dim]`
///
/// Writes `F32` `[num_rows, dim]` to `out`. Source: Ba, Kiros and Hinton 2016.
pub struct LayerNorm<'a, B: Backend> {
    pub x: &'a B::Buffer,
    pub weight: &'a B::Buffer,
    pub bias: &'a B::Buffer,
    pub eps: f32,
    pub num_rows: usize,
    pub dim: usize,
    pub out: &'a mut B::Buffer,
}

/// Numbers in each buffer.
pub(crate) struct Lens {
    pub(crate) x: usize,
    pub(crate) weight: usize,
    pub(crate) bias: usize,
    pub(crate) out: usize,
}

impl<B: Backend> LayerNorm<'_, B> {
    pub(crate) const OP: &'static str = "layer_norm";

    /// What every device refuses.
    pub(crate) fn check(&self, lens: Lens) -> Result<(), KernelError> {
        at_least(Self::OP, "dim", 1, self.dim)?;
        let len = self.num_rows.saturating_mul(self.dim);
        at_least(Self::OP, "x", len, lens.x)?;
        at_least(Self::OP, "weight", self.dim, lens.weight)?;
        at_least(Self::OP, "bias", self.dim, lens.bias)?;
        at_least(Self::OP, "out", len, lens.out)
    }
}
