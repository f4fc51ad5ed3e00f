//! Products with a packed weight, from one row to thousands.

pub(crate) mod cpu;

use crate::Backend;

/// What happens to a finished sum before it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// `out = y`
    Store,
    /// `out = out + y`: the residual stream.
    Add,
    /// `out[i] = silu(gate[i]) * up[i]` with a weight packed as [`crate::WeightLayout::GateUp`]; `out` is half as wide
    /// (Shazeer 2020).
    SwiGlu,
}

/// `y = x W^T + bias`, then the epilogue.
///
/// * `x`      `F32`, `[num_rows, in_features]`; rounded to the weight's type before the product
/// * `weight` `[out_features, in_features]`, packed
/// * `bias`   `F32`, `[out_features]` in the order of the weight's parts
///
/// Writes `F32` `[num_rows, out_features]` to `out` (half as wide for `SwiGlu`). Every output is one sum over
/// `in_features` in ascending order, accumulated in f32, whatever `num_rows` is; bias and residual are added last.
pub struct Linear<'a, B: Backend> {
    pub x: &'a B::Buffer,
    pub num_rows: usize,
    pub weight: &'a B::Weight,
    pub bias: Option<&'a B::Buffer>,
    pub epilogue: Epilogue,
    pub out: &'a mut B::Buffer,
}
