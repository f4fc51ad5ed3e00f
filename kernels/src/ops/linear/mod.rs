//! Products with a packed weight, from one row to thousands.

pub(crate) mod cpu;
pub(crate) mod cuda;
pub(crate) mod quantize;
pub mod reference;

use crate::ops::rms_norm::RmsNorm;
use crate::weight_format::{Codes, Grouping, LONG_GROUP_LEN, SHORT_GROUP_LEN};
use crate::{Backend, HostTensor, KernelError, TensorFormat, WeightFormat, WeightLayout, WeightSource};

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
/// * `x`      `F32`, `[num_rows, in_features]`; rounded before the product: to bf16 for weights of bf16 and fp8; for weights in
///   groups each group to codes of 8 bits with a scale, the largest magnitude being 127
/// * `weight` `[out_features, in_features]`, packed
/// * `bias`   `F32`, `[out_features]` in the order of the weight's parts
///
/// Writes `F32` `[num_rows, out_features]` to `out` (half as wide for `SwiGlu`). Every output is one sum over
/// `in_features` in ascending order, accumulated in f32, whatever `num_rows` is (exact within a group of codes; on CUDA
/// devices of slices that the weight's shape fixes, added in ascending order); bias and residual are added last. A number of `x` that is not finite makes its row so, and no other.
/// `x` and `out` may be longer than the rows need. Fails with `KernelError::Shape` naming the argument, and with
/// `KernelError::Type` where `SwiGlu` meets a weight that was not packed for it.
pub struct Linear<'a, B: Backend> {
    pub x: &'a B::Buffer,
    pub num_rows: usize,
    pub weight: &'a B::Weight,
    pub bias: Option<&'a B::Buffer>,
    pub epilogue: Epilogue,
    pub out: &'a mut B::Buffer,
}

/// Numbers of a row whose squares [`Backend::add_linear`] leaves as one sum.
pub const SQUARES_FEATURES: usize = 32;

/// A norm and the product behind it: [`crate::ops::rms_norm::RmsNorm`] of `x` to `normed`, then [`Linear`] of `normed`. A device
/// may do both in one, and leaves `normed` as it is then: what is rounded for the product are numbers times the norm's weights,
/// and the row's factor comes to the finished sums.
///
/// * `x`           `F32`, `[num_rows, in_features]`: the residual stream
/// * `squares`     what [`Backend::add_linear`] left beside these very numbers, where it did. A caller gives it for all
///   numbers of rows or for none: it changes bits
/// * `norm_weight` `F32`, `[in_features]`
/// * `normed`      `F32`, at least `[num_rows, in_features]`
///
/// All else as in [`Linear`].
pub struct NormLinear<'a, B: Backend> {
    pub x: &'a B::Buffer,
    pub squares: Option<&'a B::Buffer>,
    pub norm_weight: &'a B::Buffer,
    pub eps: f32,
    pub normed: &'a mut B::Buffer,
    pub num_rows: usize,
    pub in_features: usize,
    pub weight: &'a B::Weight,
    pub bias: Option<&'a B::Buffer>,
    pub epilogue: Epilogue,
    pub out: &'a mut B::Buffer,
}

impl<B: Backend> NormLinear<'_, B> {
    /// One after the other.
    pub(crate) fn apart(self, backend: &mut B) -> Result<(), KernelError> {
        let Self { x, norm_weight, eps, normed, num_rows, in_features, weight, bias, epilogue, out, .. } = self;
        backend.rms_norm(RmsNorm { x, weight: norm_weight, eps, num_rows, dim: in_features, out: normed })?;
        backend.linear(Linear { x: normed, num_rows, weight, bias, epilogue, out })
    }
}

impl<'a> WeightSource<'a> {
    /// The part that holds an output feature, and the feature's row in it.
    pub(crate) fn row(&'a self, feature: usize) -> Option<(&'a HostTensor<'a>, usize)> {
        let mut row = feature;
        for part in &self.parts {
            if row < part.rows {
                return Some((part, row));
            }
            row -= part.rows;
        }
        None
    }
}

/// What a packed matrix is, whatever its bytes look like on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightShape {
    /// Of all parts together.
    pub out_features: usize,
    pub in_features: usize,
    pub layout: WeightLayout,
    pub format: WeightFormat,
}

impl WeightShape {
    /// The shape that `source` packs to. Fails where its parts do not fit each other, are empty or are shorter or
    /// longer than they say.
    pub fn of(source: &WeightSource<'_>) -> Result<Self, KernelError> {
        let op = "pack_weight";
        let shape_error = |argument, expected, found| Err(KernelError::Shape { op, argument, expected, found });
        if let WeightFormat::Grouped(grouping) = source.format {
            check_grouping(grouping, source)?;
        }
        let expected_parts = if source.layout == WeightLayout::GateUp { 2 } else { source.parts.len().max(1) };
        if source.parts.len() != expected_parts {
            return shape_error("parts", expected_parts, source.parts.len());
        }
        let in_features = source.parts[0].cols;
        let mut out_features = 0_usize;
        for part in &source.parts {
            if part.cols != in_features || part.cols == 0 {
                return shape_error("parts.cols", in_features.max(1), part.cols);
            }
            if part.rows == 0 || (source.layout == WeightLayout::GateUp && part.rows != source.parts[0].rows) {
                return shape_error("parts.rows", source.parts[0].rows.max(1), part.rows);
            }
            if !part.cols.is_multiple_of(part.format.block_len()) {
                return shape_error("parts.cols", part.cols.next_multiple_of(part.format.block_len()), part.cols);
            }
            let num_bytes = part.format.row_bytes(part.cols).and_then(|row_bytes| row_bytes.checked_mul(part.rows));
            if num_bytes != Some(part.bytes.len()) {
                return shape_error("parts.bytes", num_bytes.unwrap_or(usize::MAX), part.bytes.len());
            }
            // Each row takes bytes that are there, so the sum fits.
            out_features += part.rows;
        }
        Ok(Self { out_features, in_features, layout: source.layout, format: source.format })
    }

    /// Numbers in a row of `out`.
    pub fn out_cols(&self, epilogue: Epilogue) -> usize {
        if epilogue == Epilogue::SwiGlu { self.out_features / 2 } else { self.out_features }
    }

    /// Whether the arguments of [`Linear`] fit each other; lengths in numbers. The same on every device.
    pub fn check(
        &self,
        num_rows: usize,
        x_len: usize,
        bias_len: Option<usize>,
        epilogue: Epilogue,
        out_len: usize,
    ) -> Result<(), KernelError> {
        let op = "linear";
        if epilogue == Epilogue::SwiGlu && self.layout != WeightLayout::GateUp {
            return Err(KernelError::Type { op, argument: "weight", found: "stacked" });
        }
        let at_least = |argument, cols: usize, found| match num_rows.checked_mul(cols) {
            Some(expected) if expected <= found => Ok(()),
            expected => Err(KernelError::Shape { op, argument, expected: expected.unwrap_or(usize::MAX), found }),
        };
        at_least("x", self.in_features, x_len)?;
        at_least("out", self.out_cols(epilogue), out_len)?;
        match bias_len {
            Some(found) if found != self.out_features => {
                Err(KernelError::Shape { op, argument: "bias", expected: self.out_features, found })
            }
            _ => Ok(()),
        }
    }
}

/// Whether there are kernels for `grouping`, and whether the parts can become it: indices into a table come from such
/// only.
fn check_grouping(grouping: Grouping, source: &WeightSource<'_>) -> Result<(), KernelError> {
    let is_known = match grouping.codes {
        Codes::Int8 => {
            grouping.group_len == SHORT_GROUP_LEN || (grouping.group_len == LONG_GROUP_LEN && !grouping.has_min)
        }
        Codes::Int4 => grouping.group_len == SHORT_GROUP_LEN,
        Codes::Iq4Nl => grouping.group_len == SHORT_GROUP_LEN && !grouping.has_min,
    };
    let op = "pack_weight";
    if !is_known {
        return Err(KernelError::Type { op, argument: "format", found: source.format.name() });
    }
    match source.parts.iter().find(|part| grouping.codes == Codes::Iq4Nl && part.format != TensorFormat::Iq4Nl) {
        Some(part) => Err(KernelError::Type { op, argument: "parts.format", found: part.format.name() }),
        None => Ok(()),
    }
}
