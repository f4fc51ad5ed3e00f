//! The meaning of [`super::Linear`]: plain loops, sums in f64.

use super::quantize;
use super::{Epilogue, WeightShape};
use crate::weight_format::{Grouping, LONG_GROUP_LEN};
use crate::{TensorFormat, WeightFormat, WeightSource, e4m3};

/// Results, and how large the terms of each sum were, from which a test states how far rounding may carry a sum.
pub struct LinearReference {
    /// `[num_rows, out_cols]`
    pub out: Vec<f64>,
    /// `sum |x| |w|` of every output before the epilogue, `[num_rows, out_features]`; of weights in groups, scaled code and
    /// minimum count each for itself.
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
        let x = quantize::rounded_activations(source.format, &x[row * shape.in_features..][..shape.in_features]);
        for (feature, weights) in rows.iter().enumerate() {
            let (mut sum, mut magnitude) = (0.0, 0.0);
            for (&x, weight) in x.iter().zip(weights) {
                sum += x * (weight.scaled + weight.min);
                magnitude += x.abs() * (weight.scaled.abs() + weight.min.abs());
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

/// A weight as it is multiplied: `scaled + min`.
#[derive(Clone, Copy, Debug)]
pub struct Weight {
    pub scaled: f64,
    /// Of its group, else -0.0: adding it changes no bit of any number.
    pub min: f64,
}

/// The matrix as it is multiplied: rows of all parts in order, rounded to the packed format.
pub fn weight_rows(source: &WeightSource<'_>) -> Vec<Vec<Weight>> {
    let mut rows = Vec::new();
    for part in &source.parts {
        for bytes in part.bytes.chunks_exact(part.bytes.len() / part.rows) {
            let mut numbers = vec![0.0; part.cols];
            part.format.decode(bytes, &mut numbers);
            let whole = |number: f32| Weight { scaled: f64::from(number), min: -0.0 };
            rows.push(match source.format {
                WeightFormat::F32 => numbers.into_iter().map(whole).collect(),
                WeightFormat::Bf16 => {
                    numbers.into_iter().map(|number| whole(half::bf16::from_f32(number).to_f32())).collect()
                }
                WeightFormat::Fp8 => fp8_row(part.format, bytes, numbers),
                WeightFormat::Grouped(grouping) => grouped_row(grouping, part.format, bytes, numbers),
            });
        }
    }
    rows
}

fn fp8_row(format: TensorFormat, bytes: &[u8], mut numbers: Vec<f32>) -> Vec<Weight> {
    let len = numbers.len();
    numbers.resize(len.next_multiple_of(LONG_GROUP_LEN), 0.0);
    let mut row = Vec::with_capacity(numbers.len());
    let mut codes = [0; LONG_GROUP_LEN];
    for (index, numbers) in numbers.chunks(LONG_GROUP_LEN).enumerate() {
        let scale = match format {
            TensorFormat::F8E4M3 => quantize::fp8_block(bytes, index, &mut codes),
            _ => quantize::quantize_fp8(numbers, &mut codes),
        };
        let value = |code| Weight { scaled: f64::from(scale) * f64::from(e4m3::to_f32(code)), min: -0.0 };
        row.extend(codes.iter().map(|&code| value(code)));
    }
    row.truncate(len);
    row
}

fn grouped_row(grouping: Grouping, format: TensorFormat, bytes: &[u8], mut numbers: Vec<f32>) -> Vec<Weight> {
    let len = numbers.len();
    numbers.resize(len.next_multiple_of(grouping.group_len), 0.0);
    let mut row = Vec::with_capacity(numbers.len());
    let mut codes = vec![0; grouping.group_len];
    for (index, numbers) in numbers.chunks(grouping.group_len).enumerate() {
        let group = if grouping.keeps(format) {
            let codes: &mut [u8; 32] = codes.as_mut_slice().try_into().expect("kept codes have groups of 32");
            quantize::requantize_block(grouping, format, bytes, index, codes)
        } else {
            quantize::quantize_weights(grouping, numbers, &mut codes)
        };
        row.extend(codes.iter().map(|&code| Weight {
            scaled: f64::from(group.scale) * f64::from(quantize::code_value(grouping.codes, code)),
            min: f64::from(group.min),
        }));
    }
    row.truncate(len);
    row
}
