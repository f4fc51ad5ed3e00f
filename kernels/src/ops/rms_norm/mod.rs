//! Root mean square normalisation.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(feature = "testing")]
pub mod reference;

use crate::ops::at_least;
use crate::{Backend, KernelError};

/// `out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight`, in f32 with the sum in a fixed order.
///
/// * `x`      `F32`, `[num_rows, dim]`
/// * `weight` `F32`, `[dim]`
///
/// Writes `F32` `[num_rows, dim]` to `out`. Source: Zhang and Sennrich 2019.
pub struct RmsNorm<'a, B: Backend> {
    pub x: &'a B::Buffer,
    pub weight: &'a B::Buffer,
    pub eps: f32,
    pub num_rows: usize,
    pub dim: usize,
    pub out: &'a mut B::Buffer,
}

/// Numbers in each buffer.
pub(crate) struct Lens {
    pub(crate) x: usize,
    pub(crate) weight: usize,
    pub(crate) out: usize,
}

impl<B: Backend> RmsNorm<'_, B> {
    pub(crate) const OP: &'static str = "rms_norm";

    /// What every device refuses.
    pub(crate) fn check(&self, lens: Lens) -> Result<(), KernelError> {
        at_least(Self::OP, "dim", 1, self.dim)?;
        let len = self.num_rows.saturating_mul(self.dim);
        at_least(Self::OP, "x", len, lens.x)?;
        at_least(Self::OP, "weight", self.dim, lens.weight)?;
        at_least(Self::OP, "out", len, lens.out)
    }
}
