//! Weights to blocks, for tests that need files of every format: plain rounding, no search for better scales.

use half::f16;

use crate::tensor_format::GROUP_LEN;
use crate::{TensorFormat, e4m3};

/// The blocks of whole rows of weights. Panics where they are no whole number of blocks.
pub fn encode(format: TensorFormat, weights: &[f32]) -> Vec<u8> {
    assert!(weights.len().is_multiple_of(format.block_len()), "{} weights in {}", weights.len(), format.name());
    let mut bytes = Vec::new();
    for block in weights.chunks_exact(format.block_len()) {
        encode_block(format, block, &mut bytes);
    }
    bytes
}

fn encode_block(format: TensorFormat, weights: &[f32], bytes: &mut Vec<u8>) {
    use TensorFormat::{Bf16, F8E4M3, F16, F32, Iq4Nl, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    match format {
        F32 => bytes.extend(weights[0].to_le_bytes()),
        Bf16 => bytes.extend(half::bf16::from_f32(weights[0]).to_le_bytes()),
        F16 => bytes.extend(f16::from_f32(weights[0]).to_le_bytes()),
        Q8_0 => {
            let scale = push_f16(farthest(weights).abs() / 127.0, bytes);
            bytes.extend(weights.iter().map(|&weight| divide(weight, scale).clamp(-127.0, 127.0) as i8 as u8));
        }
        Q4_0 => {
            let scale = push_f16(farthest(weights) / -8.0, bytes);
            push_nibbles(&codes(weights, scale, 0.0, 8.0, 15), bytes);
        }
        Q4_1 => {
            let (scale, min) = push_range(weights, 15.0, bytes);
            push_nibbles(&codes(weights, scale, min, 0.0, 15), bytes);
        }
        Q5_0 => {
            let scale = push_f16(farthest(weights) / -16.0, bytes);
            push_five_bits(&codes(weights, scale, 0.0, 16.0, 31), bytes);
        }
        Q5_1 => {
            let (scale, min) = push_range(weights, 31.0, bytes);
            push_five_bits(&codes(weights, scale, min, 0.0, 31), bytes);
        }
        Iq4Nl => {
            let table = format.code_table().expect("it has one");
            let scale = push_f16(farthest(weights) / -127.0, bytes);
            let nearest = |weight: &f32| {
                let wanted = divide(*weight, scale) + 128.0;
                let distance = |code: u8| (f32::from(code) - wanted).abs();
                let better = |best: u8, index: u8| {
                    if distance(table[usize::from(index)]) < distance(table[usize::from(best)]) { index } else { best }
                };
                (0..16).fold(0, better)
            };
            push_nibbles(&weights.iter().map(nearest).collect::<Vec<_>>(), bytes);
        }
        Q4K | Q5K => encode_k(weights, if format == Q4K { 15 } else { 31 }, bytes),
        Q6K => encode_q6_k(weights, bytes),
        F8E4M3 => {
            let scale = farthest(weights).abs() / e4m3::MAX;
            bytes.extend(scale.to_le_bytes());
            let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            bytes.extend(weights.iter().map(|&weight| e4m3::from_f32(weight * inverse)));
        }
    }
}

/// The number that is farthest from zero.
fn farthest(weights: &[f32]) -> f32 {
    weights.iter().fold(0.0, |farthest: f32, &weight| if weight.abs() > farthest.abs() { weight } else { farthest })
}

/// Rounded; 0 for a scale of 0.
fn divide(weight: f32, scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { (weight / scale).round() }
}

/// Gives the number as it was stored.
fn push_f16(number: f32, bytes: &mut Vec<u8>) -> f32 {
    let stored = f16::from_f32(number);
    bytes.extend(stored.to_le_bytes());
    stored.to_f32()
}

/// Scale and minimum that span the weights with codes up to `most`.
fn push_range(weights: &[f32], most: f32, bytes: &mut Vec<u8>) -> (f32, f32) {
    let min = weights.iter().copied().fold(f32::INFINITY, f32::min);
    let max = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (push_f16((max - min) / most, bytes), push_f16(min, bytes))
}

fn codes(weights: &[f32], scale: f32, min: f32, zero_point: f32, most: u8) -> Vec<u8> {
    let code = |weight: &f32| (divide(weight - min, scale) + zero_point).clamp(0.0, f32::from(most)) as u8;
    weights.iter().map(code).collect()
}

/// Low halves are the first 16 codes.
fn push_nibbles(codes: &[u8], bytes: &mut Vec<u8>) {
    let (low, high) = codes.split_at(GROUP_LEN / 2);
    bytes.extend(low.iter().zip(high).map(|(low, high)| low & 0xf | high << 4));
}

fn push_five_bits(codes: &[u8], bytes: &mut Vec<u8>) {
    let fifth = codes.iter().enumerate().fold(0_u32, |bits, (i, code)| bits | u32::from(code >> 4) << i);
    bytes.extend(fifth.to_le_bytes());
    push_nibbles(codes, bytes);
}

/// `Q4K` and `Q5K`: codes up to `most`, eight scales and minima of six bits.
fn encode_k(weights: &[f32], most: u8, bytes: &mut Vec<u8>) {
    let groups: Vec<&[f32]> = weights.chunks_exact(GROUP_LEN).collect();
    // A minimum is subtracted and never negative.
    let depth = |group: &[f32]| -group.iter().copied().fold(0.0, f32::min);
    let range = |group: &[f32]| group.iter().copied().fold(0.0, f32::max) + depth(group);
    let largest = |of: &dyn Fn(&[f32]) -> f32| groups.iter().map(|group| of(group)).fold(0.0, f32::max);
    let scale_unit = push_f16(largest(&range) / f32::from(most) / 63.0, bytes);
    let min_unit = push_f16(largest(&depth) / 63.0, bytes);
    let six_bits = |number: f32, unit: f32| divide(number, unit).clamp(0.0, 63.0) as u8;
    let scales: Vec<u8> = groups.iter().map(|group| six_bits(range(group) / f32::from(most), scale_unit)).collect();
    let mins: Vec<u8> = groups.iter().map(|group| six_bits(depth(group), min_unit)).collect();
    for numbers in [&scales, &mins] {
        bytes.extend((0..4).map(|i| numbers[i] | numbers[i + 4] >> 4 << 6));
    }
    bytes.extend((4..8).map(|i| scales[i] & 0xf | mins[i] << 4));

    let all: Vec<Vec<u8>> = groups
        .iter()
        .zip(scales.iter().zip(&mins))
        .map(|(group, (&scale, &min))| {
            codes(group, scale_unit * f32::from(scale), -(min_unit * f32::from(min)), 0.0, most)
        })
        .collect();
    if most > 15 {
        let fifth = |i: usize| all.iter().enumerate().fold(0, |bits, (group, codes)| bits | codes[i] >> 4 << group);
        bytes.extend((0..GROUP_LEN).map(fifth));
    }
    for pair in all.chunks_exact(2) {
        bytes.extend(pair[0].iter().zip(&pair[1]).map(|(low, high)| low & 0xf | high << 4));
    }
}

fn encode_q6_k(weights: &[f32], bytes: &mut Vec<u8>) {
    let scales: Vec<f32> = weights.chunks_exact(16).map(|group| farthest(group) / -32.0).collect();
    let unit = f16::from_f32(farthest(&scales) / 127.0).to_f32();
    let scales: Vec<i8> = scales.iter().map(|&scale| divide(scale, unit).clamp(-127.0, 127.0) as i8).collect();
    let groups = weights.chunks_exact(16).zip(&scales);
    let all: Vec<u8> =
        groups.flat_map(|(group, &scale)| codes(group, unit * f32::from(scale), 0.0, 32.0, 63)).collect();
    for half in all.chunks_exact(128) {
        bytes.extend((0..64).map(|i| half[i] & 0xf | half[i + 64] << 4));
    }
    for half in all.chunks_exact(128) {
        bytes.extend((0..32).map(|i| (0..4).fold(0, |bits, part| bits | half[i + 32 * part] >> 4 << (2 * part))));
    }
    bytes.extend(scales.iter().map(|&scale| scale as u8));
    push_f16(unit, bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    #[test]
    fn decoded_weights_are_near_the_encoded_ones() {
        let weights = Rng::new(7).normals(2048);
        for format in TensorFormat::ALL.into_iter().chain([TensorFormat::F8E4M3]) {
            let bytes = encode(format, &weights);
            let mut decoded = vec![0.0; weights.len()];
            format.decode(&bytes, &mut decoded);
            let error = weights.iter().zip(&decoded).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
            let error = (error / weights.len() as f32).sqrt();
            // Rounding to steps of the range over the codes: about 5.5 deviations in 16, 32 or 64 steps.
            let allowed = match format {
                TensorFormat::F32 => 0.0,
                TensorFormat::Bf16 | TensorFormat::F16 => 0.003,
                TensorFormat::Q8_0 => 0.01,
                TensorFormat::Q6K | TensorFormat::F8E4M3 => 0.04,
                _ if format.code_bits() == Some(5) => 0.06,
                _ => 0.12,
            };
            assert!(error <= allowed, "{format:?}: {error}");
            assert_eq!(encode(format, &vec![0.0; format.block_len()]).len(), format.block_bytes());
        }
    }
}
