//! Root mean square normalisation.

pub(crate) mod cpu;

use crate::Backend;

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
