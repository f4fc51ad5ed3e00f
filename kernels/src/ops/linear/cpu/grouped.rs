//! Micro-kernels for weights that are codes: whole-number products within a group, scaled and added in f32.
//!
//! A step is one group of input features. Its weights, for a panel of `W` outputs:
//!
//! | part   | bytes                                                                                     |
//! |--------|-------------------------------------------------------------------------------------------|
//! | codes  | 8 bits: `[group / 4][W][4]`; 4 bits: `[group / 8][W][4]`, one quad in the low halves, the next in the high ones |
//! | scales | `[W]`, f16 (AVX-512) or f32                                                               |
//! | mins   | as the scales, where groups have one                                                      |
//!
//! and of each row of activations: `[group]` codes of 8 bits, then an [`ActivationGroup`]. Sums of a group are exact, so
//! their order is free; groups are added to the f32 sum in ascending order, in every tile shape.
//!
//! | kernel   | panel | tile  | four products and sums            |
//! |----------|-------|-------|-----------------------------------|
//! | AVX-512  | 32    | 8x32  | `vpdpbusd`                        |
//! | AVX2     | 16    | 4x16  | two `vpmaddwd` of even and odd bytes: `vpmaddubsw` would saturate |
//! | portable | 16    | 4x16  | plain loops                       |
//!
//! f32 sums stay in the level-1 cache: a load and a store per 8 products or more, beside the multiplications. 12 rows would
//! fill the registers of AVX-512 with accumulators, but at the end of a group, and while codes of 4 bits are taken apart,
//! they go to memory and back: 8 rows are faster (of groups of 128, 70 in place of 61 % of the peak at 32 rows).

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::tile::{Tile, TileFn};
use crate::cpu::Isa;
use crate::ops::linear::quantize;
use crate::tensor_format::IQ4_NL_CODES;
use crate::weight_format::{Codes, Grouping, LONG_GROUP_LEN, SHORT_GROUP_LEN};

/// What stands behind the codes of a group of activations.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ActivationGroup {
    pub(super) scale: f32,
    /// `scale` times the sum of the codes: what a minimum is multiplied with.
    pub(super) scaled_sum: f32,
    /// The sum of the codes times minus the zero point, for the zero points 128 and 8.
    pub(super) from_zero: [i32; 2],
}

/// Bytes of a group of activations.
pub(super) const fn activation_group_bytes(group_len: usize) -> usize {
    group_len + size_of::<ActivationGroup>()
}

/// Outputs of a panel.
pub(super) const fn panel_width(isa: Isa) -> usize {
    if isa.is_avx512() { 32 } else { 16 }
}

/// Bytes of a scale or a minimum.
pub(super) const fn scale_size(isa: Isa) -> usize {
    if isa.is_avx512() { 2 } else { 4 }
}

/// Bytes of the codes of a step.
pub(super) const fn code_bytes(isa: Isa, grouping: Grouping) -> usize {
    panel_width(isa) * grouping.group_len / grouping.codes.per_byte()
}

/// Bytes of a step.
pub(super) const fn step_bytes(isa: Isa, grouping: Grouping) -> usize {
    let num_scales = if grouping.has_min { 2 } else { 1 };
    code_bytes(isa, grouping) + num_scales * panel_width(isa) * scale_size(isa)
}

/// One function per number of rows.
macro_rules! tiles {
    ($name:ident, [$($rows:literal)*], $args:tt) => {
        &[$(tiles!(@one $name, $rows, $args)),*]
    };
    (@one $name:ident, $rows:literal, [$($arg:literal)*]) => {
        $name::<$rows $(, $arg)*>
    };
}

/// One function per number of rows, for the format that `grouping` is.
macro_rules! by_format {
    ($grouping:expr, $name:ident, $rows:tt) => {
        match ($grouping.codes, $grouping.group_len, $grouping.has_min) {
            (Codes::Int8, LONG_GROUP_LEN, false) => tiles!($name, $rows, [32 false false false]),
            (Codes::Int8, SHORT_GROUP_LEN, false) => tiles!($name, $rows, [8 false false false]),
            (Codes::Int8, SHORT_GROUP_LEN, true) => tiles!($name, $rows, [8 false false true]),
            (Codes::Int4, SHORT_GROUP_LEN, false) => tiles!($name, $rows, [8 true false false]),
            (Codes::Int4, SHORT_GROUP_LEN, true) => tiles!($name, $rows, [8 true false true]),
            (Codes::Iq4Nl, SHORT_GROUP_LEN, false) => tiles!($name, $rows, [8 true true false]),
            _ => unreachable!("refused by WeightShape::of"),
        }
    };
}

/// The micro-kernels for a format, by rows - 1.
pub(super) fn tiles(isa: Isa, grouping: Grouping) -> &'static [TileFn] {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => by_format!(grouping, avx512, [1 2 3 4 5 6 7 8]),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => by_format!(grouping, avx2, [1 2 3 4]),
        _ => by_format!(grouping, portable, [1 2 3 4]),
    }
}

/// Which of `from_zero` belongs to such codes. Indices into a table have bytes behind them.
pub(super) const fn zero_index(is_packed: bool, has_table: bool) -> usize {
    if is_packed && !has_table { 1 } else { 0 }
}

/// Zeroes the sums of `rows` rows of `width` where chains start.
///
/// # Safety
/// See `Kernel::run`.
#[inline(always)]
unsafe fn start_sums(tile: &Tile, rows: usize, width: usize) {
    if !tile.continues {
        // SAFETY: `sums` holds so many numbers.
        unsafe { std::ptr::write_bytes(tile.sums, 0, rows * width) };
    }
}

/// `R` rows of groups of `Q` quads; `PACKED` codes have 4 bits, `TABLE` ones are indices.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn avx512<const R: usize, const Q: usize, const PACKED: bool, const TABLE: bool, const MIN: bool>(tile: &Tile) {
    // SAFETY: see `Kernel::run`.
    unsafe {
        if tile.is_alone {
            avx512_steps::<R, Q, PACKED, TABLE, MIN, true>(tile);
        } else {
            avx512_steps::<R, Q, PACKED, TABLE, MIN, false>(tile);
        }
    }
}

/// Where a tile is `ALONE` it waits for memory: a step has many lines, and only some two dozen can be on their way to a core,
/// so they are asked for little by little while the step is multiplied. Otherwise a tile asks for its few at once.
///
/// # Safety
/// See `Kernel::run`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn avx512_steps<
    const R: usize,
    const Q: usize,
    const PACKED: bool,
    const TABLE: bool,
    const MIN: bool,
    const ALONE: bool,
>(
    tile: &Tile,
) {
    // SAFETY: see `Kernel::run`; loads and stores are unaligned ones.
    unsafe {
        start_sums(tile, R, 32);
        let stride = tile.activation_stride;
        let low_half = _mm512_set1_epi8(15);
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(IQ4_NL_CODES.as_ptr().cast()));
        let mut weights = tile.weights;
        let mut activations = tile.activations;
        let num_lines = if PACKED { Q / 2 } else { Q };
        let mut prefetch = tile.prefetch;
        for _ in 0..tile.num_steps {
            if !ALONE {
                prefetch = tile.fetch_lines(prefetch, tile.num_lines);
            }
            let mut acc = [[_mm512_setzero_si512(); 2]; R];
            let mut multiply = |quad: usize, codes: [__m512i; 2]| {
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = activations.add(r * stride + quad * 4).cast::<i32>().read_unaligned();
                    let x = _mm512_set1_epi32(x);
                    acc[0] = _mm512_dpbusd_epi32(acc[0], codes[0], x);
                    acc[1] = _mm512_dpbusd_epi32(acc[1], codes[1], x);
                }
            };
            let load = |line: usize| {
                [0, 64].map(|offset| _mm512_loadu_si512(weights.add(line * 128 + offset).cast::<__m512i>()))
            };
            for line in 0..num_lines {
                if ALONE {
                    prefetch = tile.fetch_lines(prefetch, 2);
                }
                if PACKED {
                    let decode = |codes: __m512i| {
                        let codes = _mm512_and_si512(codes, low_half);
                        if TABLE { _mm512_shuffle_epi8(table, codes) } else { codes }
                    };
                    let codes = load(line);
                    multiply(2 * line, codes.map(decode));
                    multiply(2 * line + 1, codes.map(|codes| decode(_mm512_srli_epi16::<4>(codes))));
                } else {
                    multiply(line, load(line));
                }
            }
            if ALONE {
                prefetch = tile.fetch_lines(prefetch, tile.num_lines - 2 * num_lines);
            }
            weights = weights.add(num_lines * 128);
            let halves = |from: *const u8| {
                [0, 32].map(|offset| _mm512_cvtph_ps(_mm256_loadu_si256(from.add(offset).cast::<__m256i>())))
            };
            let scales = halves(weights);
            weights = weights.add(64);
            let mut mins = [_mm512_setzero_ps(); 2];
            if MIN {
                mins = halves(weights);
                weights = weights.add(64);
            }
            for (r, acc) in acc.iter().enumerate() {
                let group = activations.add(r * stride + Q * 4).cast::<ActivationGroup>().read_unaligned();
                // Added at the end: accumulators that start from memory would be kept there.
                let from_zero = _mm512_set1_epi32(group.from_zero[zero_index(PACKED, TABLE)]);
                for v in 0..2 {
                    let acc = _mm512_add_epi32(acc[v], from_zero);
                    let sum = tile.sums.add(r * 32 + v * 16);
                    let scale = _mm512_mul_ps(scales[v], _mm512_set1_ps(group.scale));
                    let mut total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), scale, _mm512_loadu_ps(sum));
                    if MIN {
                        total = _mm512_fmadd_ps(mins[v], _mm512_set1_ps(group.scaled_sum), total);
                    }
                    _mm512_storeu_ps(sum, total);
                }
            }
            activations = activations.add(activation_group_bytes(Q * 4));
        }
    }
}

/// As [`avx512`], 16 outputs wide.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const R: usize, const Q: usize, const PACKED: bool, const TABLE: bool, const MIN: bool>(tile: &Tile) {
    // SAFETY: see `Kernel::run`.
    unsafe {
        if tile.is_alone {
            avx2_steps::<R, Q, PACKED, TABLE, MIN, true>(tile);
        } else {
            avx2_steps::<R, Q, PACKED, TABLE, MIN, false>(tile);
        }
    }
}

/// As [`avx512_steps`].
///
/// # Safety
/// See `Kernel::run`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_steps<
    const R: usize,
    const Q: usize,
    const PACKED: bool,
    const TABLE: bool,
    const MIN: bool,
    const ALONE: bool,
>(
    tile: &Tile,
) {
    // SAFETY: see `Kernel::run`; loads and stores are unaligned ones.
    unsafe {
        start_sums(tile, R, 16);
        let stride = tile.activation_stride;
        let low_half = _mm256_set1_epi8(15);
        let low_byte = _mm256_set1_epi16(255);
        let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(IQ4_NL_CODES.as_ptr().cast()));
        let mut weights = tile.weights;
        let mut activations = tile.activations;
        let num_lines = if PACKED { Q / 2 } else { Q };
        let mut prefetch = tile.prefetch;
        for _ in 0..tile.num_steps {
            if !ALONE {
                prefetch = tile.fetch_lines(prefetch, tile.num_lines);
            }
            let mut acc = [[_mm256_setzero_si256(); 2]; R];
            let mut multiply = |quad: usize, codes: [__m256i; 2]| {
                // Codes 0 and 2 of each quad as numbers of 16 bits, then 1 and 3.
                let even = codes.map(|codes| _mm256_and_si256(codes, low_byte));
                let odd = codes.map(|codes| _mm256_srli_epi16::<8>(codes));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = activations.add(r * stride + quad * 4).cast::<i32>().read_unaligned();
                    let x = _mm256_set1_epi32(x);
                    let x_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x));
                    let x_odd = _mm256_srai_epi16::<8>(x);
                    for v in 0..2 {
                        let products =
                            _mm256_add_epi32(_mm256_madd_epi16(even[v], x_even), _mm256_madd_epi16(odd[v], x_odd));
                        acc[v] = _mm256_add_epi32(acc[v], products);
                    }
                }
            };
            let load = |line: usize| {
                [0, 32].map(|offset| _mm256_loadu_si256(weights.add(line * 64 + offset).cast::<__m256i>()))
            };
            for line in 0..num_lines {
                if ALONE {
                    prefetch = tile.fetch_lines(prefetch, 1);
                }
                if PACKED {
                    let decode = |codes: __m256i| {
                        let codes = _mm256_and_si256(codes, low_half);
                        if TABLE { _mm256_shuffle_epi8(table, codes) } else { codes }
                    };
                    let codes = load(line);
                    multiply(2 * line, codes.map(decode));
                    multiply(2 * line + 1, codes.map(|codes| decode(_mm256_srli_epi16::<4>(codes))));
                } else {
                    multiply(line, load(line));
                }
            }
            if ALONE {
                prefetch = tile.fetch_lines(prefetch, tile.num_lines - num_lines);
            }
            weights = weights.add(num_lines * 64);
            let numbers = |from: *const u8| [0, 32].map(|offset| _mm256_loadu_ps(from.add(offset).cast()));
            let scales = numbers(weights);
            weights = weights.add(64);
            let mut mins = [_mm256_setzero_ps(); 2];
            if MIN {
                mins = numbers(weights);
                weights = weights.add(64);
            }
            for (r, acc) in acc.iter().enumerate() {
                let group = activations.add(r * stride + Q * 4).cast::<ActivationGroup>().read_unaligned();
                // Added at the end: accumulators that start from memory would be kept there.
                let from_zero = _mm256_set1_epi32(group.from_zero[zero_index(PACKED, TABLE)]);
                for v in 0..2 {
                    let acc = _mm256_add_epi32(acc[v], from_zero);
                    let sum = tile.sums.add(r * 16 + v * 8);
                    let scale = _mm256_mul_ps(scales[v], _mm256_set1_ps(group.scale));
                    let mut total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), scale, _mm256_loadu_ps(sum));
                    if MIN {
                        total = _mm256_fmadd_ps(mins[v], _mm256_set1_ps(group.scaled_sum), total);
                    }
                    _mm256_storeu_ps(sum, total);
                }
            }
            activations = activations.add(activation_group_bytes(Q * 4));
        }
    }
}

/// As [`avx2`], in plain loops.
unsafe fn portable<const R: usize, const Q: usize, const PACKED: bool, const TABLE: bool, const MIN: bool>(
    tile: &Tile,
) {
    const WIDTH: usize = 16;
    let mut weights = tile.weights;
    let mut activations = tile.activations;
    // SAFETY: see `Kernel::run`; a step holds its codes, scales and minima, aligned for f32.
    unsafe {
        start_sums(tile, R, WIDTH);
        for _ in 0..tile.num_steps {
            let num_lines = if PACKED { Q / 2 } else { Q };
            let scales_at = weights.add(num_lines * WIDTH * 4);
            let scales = scales_at.cast::<[f32; WIDTH]>().read();
            let mut next = scales_at.add(WIDTH * 4);
            let mut mins = [0.0; WIDTH];
            if MIN {
                mins = next.cast::<[f32; WIDTH]>().read();
                next = next.add(WIDTH * 4);
            }
            for r in 0..R {
                let row = activations.add(r * tile.activation_stride);
                let group = row.add(Q * 4).cast::<ActivationGroup>().read_unaligned();
                let mut acc = [group.from_zero[zero_index(PACKED, TABLE)]; WIDTH];
                for line in 0..num_lines {
                    let codes = weights.add(line * WIDTH * 4).cast::<[[u8; 4]; WIDTH]>().read();
                    for half in 0..if PACKED { 2 } else { 1 } {
                        let quad = if PACKED { 2 * line + half } else { line };
                        let x = row.add(quad * 4).cast::<[i8; 4]>().read();
                        for (acc, codes) in acc.iter_mut().zip(codes) {
                            for (code, x) in codes.into_iter().zip(x) {
                                let code = if PACKED { code >> (4 * half) & 15 } else { code };
                                let code = if TABLE { IQ4_NL_CODES[usize::from(code)] } else { code };
                                *acc = acc.wrapping_add(i32::from(code) * i32::from(x));
                            }
                        }
                    }
                }
                let sums = &mut *tile.sums.add(r * WIDTH).cast::<[f32; WIDTH]>();
                for lane in 0..WIDTH {
                    sums[lane] += acc[lane] as f32 * (scales[lane] * group.scale);
                    if MIN {
                        sums[lane] += mins[lane] * group.scaled_sum;
                    }
                }
            }
            weights = next;
            activations = activations.add(activation_group_bytes(Q * 4));
        }
    }
}

/// Writes one row of activations as codes. What lies behind the last group is left as it is, and never read.
pub(super) fn quantize_row(isa: Isa, group_len: usize, x: &[f32], target: &mut [u8]) {
    let group_bytes = activation_group_bytes(group_len);
    for (x, target) in x.chunks(group_len).zip(target.chunks_exact_mut(group_bytes)) {
        let (codes, tail) = target.split_at_mut(group_len);
        let ActivationGroup { scale, scaled_sum, from_zero } = quantize_group(isa, x, codes);
        let [scale_at, scaled_sum_at, zeros_at @ ..] = tail.as_chunks_mut::<4>().0 else {
            unreachable!("a group ends in four numbers");
        };
        *scale_at = scale.to_ne_bytes();
        *scaled_sum_at = scaled_sum.to_ne_bytes();
        zeros_at[0] = from_zero[0].to_ne_bytes();
        zeros_at[1] = from_zero[1].to_ne_bytes();
    }
}

/// Writes one group of activations, or what there is of it, as codes.
#[inline]
pub(super) fn quantize_group(isa: Isa, x: &[f32], codes: &mut [u8]) -> ActivationGroup {
    let (scale, sum) = match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the backend was made for an available instruction set.
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { quantize_avx512(x, codes) },
        _ => {
            let mut group = [0_i8; LONG_GROUP_LEN];
            let found = quantize::quantize_activations(x, &mut group[..codes.len()]);
            for (code, x) in codes.iter_mut().zip(group) {
                *code = x as u8;
            }
            found
        }
    };
    let from_zero = [Codes::Int8, Codes::Int4].map(|codes| sum.wrapping_mul(-codes.zero_point()));
    ActivationGroup { scale, scaled_sum: scale * sum as f32, from_zero }
}

/// [`quantize::quantize_activations`] of at most `codes.len()` numbers, which is a multiple of 16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn quantize_avx512(x: &[f32], codes: &mut [u8]) -> (f32, i32) {
    debug_assert!(codes.len().is_multiple_of(16) && x.len() <= codes.len());
    let load = |first: usize| {
        let num = x.len().saturating_sub(first).min(16);
        // SAFETY: the mask leaves out what is past the numbers.
        unsafe { _mm512_maskz_loadu_ps(((1_u32 << num) - 1) as u16, x.as_ptr().wrapping_add(first)) }
    };
    let zero = _mm512_setzero_ps();
    let (mut largest, mut poison) = (zero, zero);
    for first in (0..codes.len()).step_by(16) {
        let x = load(first);
        // The second operand is the result where one is NaN.
        largest = _mm512_max_ps(_mm512_abs_ps(x), largest);
        poison = _mm512_fmadd_ps(x, zero, poison);
    }
    let (largest, poison) = (_mm512_reduce_max_ps(largest), _mm512_reduce_add_ps(poison));
    if largest < quantize::LEAST_MAGNITUDE {
        codes.fill(0);
        return (poison, 0);
    }
    let factor = _mm512_set1_ps(quantize::MAX_ACTIVATION / largest);
    let mut sum = _mm512_setzero_si512();
    for (first, codes) in (0..).step_by(16).zip(codes.chunks_exact_mut(16)) {
        let nearest = _mm512_cvtps_epi32(_mm512_mul_ps(load(first), factor));
        sum = _mm512_add_epi32(sum, nearest);
        // SAFETY: the chunk has 16 bytes.
        unsafe { _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(nearest)) };
    }
    (largest / quantize::MAX_ACTIVATION + poison, _mm512_reduce_add_epi32(sum))
}
