//! The meaning of [`super::Linear`]: plain loops, sums in f64.

use super::{Epilogue, WeightShape};
use crate::{DType, WeightSource};

/// Results, and how large the terms of each sum were, from which a test states how far rounding may carry a sum.
pub struct LinearReference {
    /// `[num_rows, out_cols]`
    pub out: Vec<f64>,
    /// `sum |x| |w|` of every output before the epilogue, `[num_rows, out_features]`.
    pub magnitudes: Vec<f64>,
    /// `x W^T + bias`, before the epilogue, `[num_rows, out_features]`.
    pub sums: Vec<f64>,
}

/// What [`super::Linear`] writes, from `out` as it was before.
///
/// Panics where shapes do not fit: the reference is not the place that refuses inputs.
pub fn linear(
    x: &[f32],
    num_rows: usize,
    source: &WeightSource<'_>,
    bias: Option<&[f32]>,
    epilogue: Epilogue,
    out_before: &[f32],
) -> LinearReference {
    let shape = WeightShape::of(source).expect("a source that can be packed");
    let rows = weight_rows(source);
    let mut sums = vec![0.0; num_rows * shape.out_features];
    let mut magnitudes = vec![0.0; num_rows * shape.out_features];
    for row in 0..num_rows {
        let x = &x[row * shape.in_features..][..shape.in_features];
        for (feature, weights) in rows.iter().enumerate() {
            let (mut sum, mut magnitude) = (0.0, 0.0);
            for (&x, &weight) in x.iter().zip(weights) {
                let term = f64::from(round_to(source.dtype, x)) * weight;
                sum += term;
                magnitude += term.abs();
            }
            sums[row * shape.out_features + feature] = sum + bias.map_or(0.0, |bias| f64::from(bias[feature]));
            magnitudes[row * shape.out_features + feature] = magnitude;
        }
    }
    let out_cols = shape.out_cols(epilogue);
    let out = (0..num_rows * out_cols)
        .map(|index| {
            let (row, col) = (index / out_cols, index % out_cols);
            let sums = &sums[row * shape.out_features..][..shape.out_features];
            match epilogue {
                Epilogue::Store => sums[col],
                Epilogue::Add => f64::from(out_before[index]) + sums[col],
                Epilogue::SwiGlu => sums[col] / (1.0 + (-sums[col]).exp()) * sums[out_cols + col],
            }
        })
        .collect();
    LinearReference { out, magnitudes, sums }
}

/// The matrix as it is multiplied: rows of all parts in order, rounded to the packed type.
pub fn weight_rows(source: &WeightSource<'_>) -> Vec<Vec<f64>> {
    let mut rows = Vec::new();
    for part in &source.parts {
        let mut numbers = vec![0.0; part.cols];
        for bytes in part.bytes.chunks_exact(part.bytes.len() / part.rows) {
            part.format.decode(bytes, &mut numbers);
            rows.push(numbers.iter().map(|&number| f64::from(round_to(source.dtype, number))).collect());
        }
    }
    rows
}

fn round_to(dtype: DType, value: f32) -> f32 {
    if dtype == DType::Bf16 { half::bf16::from_f32(value).to_f32() } else { value }
}
