//! What rounding to codes means: one definition for the packing of weights, for all kernels and for the reference.

use half::f16;

use crate::tensor_format::{IQ4_NL_CODES, read_f8_block};
use crate::weight_format::{Codes, Grouping};
use crate::{GroupScale, TensorFormat, WeightFormat, e4m3};

/// Activations are codes from -127 to 127.
pub(crate) const MAX_ACTIVATION: f32 = 127.0;

/// Groups whose largest number is smaller are zero: the reciprocal of their scale would not be finite.
pub(crate) const LEAST_MAGNITUDE: f32 = 1e-30;

/// Adding this to a number below 2^22 rounds it to a whole one, half to even, found in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;

/// The nearest whole number, half to even; magnitudes below 2^22.
#[inline(always)]
pub(crate) fn nearest(x: f32) -> i32 {
    (x + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32
}

/// Activations of one group, `x = scale * codes[i]`: symmetric, the largest magnitude becoming 127. Returns the scale and
/// the sum of the codes. A number that is not finite makes the scale NaN, and so every output of its row.
#[inline(always)]
pub(crate) fn quantize_activations(x: &[f32], codes: &mut [i8]) -> (f32, i32) {
    let mut largest = 0.0_f32;
    let mut poison = 0.0_f32;
    for &x in x {
        largest = if x.abs() > largest { x.abs() } else { largest };
        poison += x * 0.0;
    }
    if largest < LEAST_MAGNITUDE {
        codes.fill(0);
        return (poison, 0);
    }
    let factor = MAX_ACTIVATION / largest;
    let mut sum = 0_i32;
    for (code, &x) in codes.iter_mut().zip(x) {
        let nearest = nearest(x * factor);
        *code = nearest as i8;
        sum = sum.wrapping_add(nearest);
    }
    codes[x.len()..].fill(0);
    (largest / MAX_ACTIVATION + poison, sum)
}

/// Rounds a whole group of numbers to codes of `grouping` (not `Iq4Nl`), by the least and the largest of them; scale and
/// minimum are exact in f16. Numbers that are not finite become some code: a model with such weights is broken anyway.
#[inline(always)]
pub(crate) fn quantize_weights(grouping: Grouping, numbers: &[f32], codes: &mut [u8]) -> GroupScale {
    debug_assert!(numbers.len() == codes.len() && numbers.len().is_multiple_of(16));
    let zero = grouping.codes.zero_point();
    let max_code = 2 * zero - 1;
    // By lanes, so that compilers make it vectors.
    let (mut least, mut largest) = ([0.0_f32; 16], [0.0_f32; 16]);
    for numbers in numbers.as_chunks::<16>().0 {
        for ((least, largest), &x) in least.iter_mut().zip(&mut largest).zip(numbers) {
            *least = if x < *least { x } else { *least };
            *largest = if x > *largest { x } else { *largest };
        }
    }
    let (least, largest) = (least.into_iter().fold(0.0, f32::min), largest.into_iter().fold(0.0, f32::max));
    let (scale, min) = if grouping.has_min {
        let scale = to_f16((largest - least) / max_code as f32);
        // The least number has code 0.
        (scale, to_f16(least + scale * zero as f32))
    } else {
        (to_f16(largest.max(-least) / (zero - 1) as f32), 0.0)
    };
    let factor = if scale > 0.0 { scale.recip() } else { 0.0 };
    let (lowest, highest) = (-zero as f32, (zero - 1) as f32);
    for (code, &x) in codes.iter_mut().zip(numbers) {
        let distance = (x - min) * factor;
        let distance = if distance > lowest { distance } else { lowest };
        let distance = if distance < highest { distance } else { highest };
        *code = (nearest(distance) + zero) as u8;
    }
    GroupScale { scale, min }
}

/// Group `index` of a row of blocks as codes of `grouping`, which keeps them.
#[inline(always)]
pub(crate) fn requantize_block(
    grouping: Grouping,
    format: TensorFormat,
    row: &[u8],
    index: usize,
    codes: &mut [u8; 32],
) -> GroupScale {
    let group = format.read_group(row, index, codes);
    // Formats without a minimum say -0.0.
    let min = group.min + 0.0;
    let own_zero = i32::from(format.zero_point());
    let shift = match grouping.codes {
        // Codes of a table are what it says, around 128, unless they stay an index.
        Codes::Iq4Nl => {
            for code in codes.iter_mut() {
                *code = iq4_nl_index(*code);
            }
            return GroupScale { scale: to_f16(group.scale), min: 0.0 };
        }
        // Codes of four bits are kept, and the minimum moved: `s * c + m = s * (c - 8) + (m + 8 s)`.
        Codes::Int4 => {
            let zero = grouping.codes.zero_point() - own_zero;
            let min = if grouping.has_min { to_f16(min + group.scale * zero as f32) } else { 0.0 };
            return GroupScale { scale: to_f16(group.scale), min };
        }
        Codes::Int8 => Codes::Int8.zero_point() - own_zero,
    };
    for code in codes.iter_mut() {
        *code = (i32::from(*code) + shift) as u8;
    }
    GroupScale { scale: to_f16(group.scale), min: to_f16(min) }
}

/// Rounds a group of numbers to [`e4m3`] with the scale that is returned: the largest magnitude becomes the largest code.
/// Where one is no finite number the scale is NaN, and so is every output that the group is part of.
#[inline(always)]
pub(crate) fn quantize_fp8(numbers: &[f32], codes: &mut [u8]) -> f32 {
    let (mut largest, mut poison) = ([0.0_f32; 16], [0.0_f32; 16]);
    for numbers in numbers.as_chunks::<16>().0 {
        for ((largest, poison), &x) in largest.iter_mut().zip(&mut poison).zip(numbers) {
            *largest = if x.abs() > *largest { x.abs() } else { *largest };
            *poison += x * 0.0;
        }
    }
    let (largest, poison) = (largest.into_iter().fold(0.0, f32::max), poison.into_iter().sum::<f32>());
    if largest < LEAST_MAGNITUDE || poison.is_nan() {
        codes.fill(0);
        return poison;
    }
    let factor = e4m3::MAX / largest;
    for (code, &x) in codes.iter_mut().zip(numbers) {
        *code = e4m3::from_f32(x * factor);
    }
    largest / e4m3::MAX
}

/// Group `index` of a row of blocks of [`TensorFormat::F8E4M3`]. Where a code is no number all become zeros, and the scale
/// that is returned NaN: kernels need not know of such codes.
#[inline(always)]
pub(crate) fn fp8_block(row: &[u8], index: usize, codes: &mut [u8]) -> f32 {
    let block_bytes = TensorFormat::F8E4M3.block_bytes();
    let (scale, from) = read_f8_block(&row[index * block_bytes..][..block_bytes]);
    if from.iter().any(|&code| e4m3::is_nan(code)) {
        codes.fill(0);
        return f32::NAN;
    }
    codes.copy_from_slice(from);
    scale
}

/// The index whose value is `code`; one of the table's.
fn iq4_nl_index(code: u8) -> u8 {
    IQ4_NL_CODES.iter().position(|&value| value == code).map_or(0, |index| index as u8)
}

/// What a code of `codes` stands for, zero point subtracted.
#[inline(always)]
pub(crate) fn code_value(codes: Codes, code: u8) -> f32 {
    let code = if codes == Codes::Iq4Nl { IQ4_NL_CODES[usize::from(code & 15)] } else { code };
    (i32::from(code) - codes.zero_point()) as f32
}

/// Rounded to f16, the largest finite one at most.
fn to_f16(x: f32) -> f32 {
    let largest = f16::MAX.to_f32();
    f16::from_f32(x.clamp(-largest, largest)).to_f32()
}

/// A row of activations as `format` multiplies it.
pub(crate) fn rounded_activations(format: WeightFormat, x: &[f32]) -> Vec<f64> {
    match format {
        WeightFormat::F32 => x.iter().map(|&x| f64::from(x)).collect(),
        WeightFormat::Bf16 | WeightFormat::Fp8 => {
            x.iter().map(|&x| f64::from(half::bf16::from_f32(x).to_f32())).collect()
        }
        WeightFormat::Grouped(grouping) => {
            let mut out = Vec::with_capacity(x.len());
            let mut codes = vec![0; grouping.group_len];
            for group in x.chunks(grouping.group_len) {
                let (scale, _) = quantize_activations(group, &mut codes);
                out.extend(codes[..group.len()].iter().map(|&code| f64::from(scale) * f64::from(code)));
            }
            out
        }
    }
}
