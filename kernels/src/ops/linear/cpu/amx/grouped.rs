//! Micro-kernels on tiles for weights that are codes: the sums of [`super::super::grouped`], to the bit, for many rows.
//!
//! Whole-number sums of a group are exact, so they may come from tiles or from vectors. What is done with them, in f32, is the same
//! in the same order. Few rows wait for memory, and vectors take weights without a detour: they stay with those.
//!
//! A B tile is 16 quads of features by 16 outputs as panels hold them, or 8 quads where a group has 32 features: then the thread's
//! tiles are set to that depth. Of 16 rows of activations a group is `[depth][16][64 or 32]` codes, then 16 each of what
//! [`ActivationGroup`] says of a row.
//!
//! While the tiles multiply a group, vectors add the sums of the one before.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::super::grouped::{self, ActivationGroup, activation_group_bytes, zero_index};
use super::super::tiled::{Call, CallFn, TiledKernel, WIDTH};
use super::{AHEAD_BYTES, SIXTEEN, STRIDE, fetch, store};
use crate::cpu::Isa;
use crate::cpu::amx::{ROW_BYTES, TILE_ROWS, tile};
use crate::tensor_format::IQ4_NL_CODES;
use crate::weight_format::{Codes, Grouping, LONG_GROUP_LEN, SHORT_GROUP_LEN};

/// From so many rows on tiles are faster than vectors. Short groups have more to add for each product.
const MIN_ROWS: usize = 9;
const MIN_ROWS_OF_SHORT: usize = 25;

/// The kernels of a format: group, codes of 4 bits, a table, minima.
macro_rules! kernel {
    ($group:literal $packed:literal $table:literal $min:literal) => {
        const {
            &TiledKernel {
        alone: kernel!(@calls ALONE, $group $packed $table $min),
        first: kernel!(@calls FIRST, $group $packed $table $min),
        later: kernel!(@calls LATER, $group $packed $table $min),
                unpacks: $packed,
                // A group is one depth of its own where it is short.
                depth: if $group < ROW_BYTES { ($group / 4) as u8 } else { TILE_ROWS as u8 },
                min_rows: if $group < ROW_BYTES { MIN_ROWS_OF_SHORT } else { MIN_ROWS },
                grain: $group,
            }
        }
    };
    (@calls $place:ident, $group:literal $packed:literal $table:literal $min:literal) => {
        &[
            groups::<1, $group, $packed, $table, $min, $place> as CallFn,
            groups::<2, $group, $packed, $table, $min, $place> as CallFn,
        ]
    };
}

/// The kernels for a format.
pub(in super::super) fn kernel(grouping: Grouping) -> &'static TiledKernel {
    match (grouping.codes, grouping.group_len, grouping.has_min) {
        (Codes::Int8, LONG_GROUP_LEN, false) => kernel!(128 false false false),
        (Codes::Int8, SHORT_GROUP_LEN, false) => kernel!(32 false false false),
        (Codes::Int8, SHORT_GROUP_LEN, true) => kernel!(32 false false true),
        (Codes::Int4, SHORT_GROUP_LEN, false) => kernel!(32 true false false),
        (Codes::Int4, SHORT_GROUP_LEN, true) => kernel!(32 true false true),
        (Codes::Iq4Nl, SHORT_GROUP_LEN, false) => kernel!(32 true true false),
        _ => unreachable!("refused by WeightShape::of"),
    }
}

/// Where a call stands among those of a panel's stretch: there is no other; others take what it unpacks; it takes that.
const ALONE: u8 = 0;
const FIRST: u8 = 1;
const LATER: u8 = 2;

/// Sums of a group, `[rows][outputs]`.
#[repr(C, align(64))]
struct Products([[i32; WIDTH]; 2 * TILE_ROWS]);

/// `R` tiles of rows times groups of `GROUP` features.
///
/// # Safety
/// See `CallFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn groups<
    const R: usize,
    const GROUP: usize,
    const PACKED: bool,
    const TABLE: bool,
    const MIN: bool,
    const PLACE: u8,
>(
    call: &Call,
) {
    let code_bytes = GROUP * WIDTH / if PACKED { 2 } else { 1 };
    let step_bytes = code_bytes + WIDTH * 2 * if MIN { 2 } else { 1 };
    let step = |group: usize| call.weights.wrapping_add(group * step_bytes);
    // Where the codes of a group lie as bytes.
    let codes = |group: usize| {
        let group_bytes = GROUP * WIDTH;
        match (PACKED, PLACE) {
            (false, _) => step(group),
            (true, ALONE) => call.unpacked.wrapping_add(group % 2 * group_bytes).cast_const(),
            (true, _) => call.unpacked.wrapping_add(group * group_bytes).cast_const(),
        }
    };
    let activations = |group: usize| call.activations.wrapping_add(group * TILE_ROWS * activation_group_bytes(GROUP));
    let mut products = [const { MaybeUninit::<Products>::uninit() }; 2];
    // SAFETY: by contract; what is added was stored before.
    unsafe {
        let prepare = |group: usize| {
            if PLACE == LATER || group >= call.num_steps {
                return;
            }
            fetch(step(group).wrapping_add(AHEAD_BYTES), step_bytes / 64);
            if PACKED {
                unpack::<TABLE>(step(group), GROUP / 8, codes(group).cast_mut());
            }
        };
        prepare(0);
        multiply::<R, GROUP>(codes(0), activations(0), call.activation_stride);
        store::<R>(products[0].as_mut_ptr().cast());
        for group in 0..call.num_steps {
            prepare(group + 1);
            if group + 1 < call.num_steps {
                multiply::<R, GROUP>(codes(group + 1), activations(group + 1), call.activation_stride);
            }
            for r in 0..R {
                let rows = Rows {
                    products: products[group % 2].as_ptr().cast::<i32>().add(r * TILE_ROWS * WIDTH),
                    said: activations(group).add(r * call.activation_stride + TILE_ROWS * GROUP).cast(),
                    scales: step(group).add(code_bytes),
                    sums: call.sums.add(r * TILE_ROWS * WIDTH),
                    is_first: group == 0 && !call.continues,
                };
                add::<PACKED, TABLE, MIN>(&rows);
            }
            if group + 1 < call.num_steps {
                store::<R>(products[(group + 1) % 2].as_mut_ptr().cast());
            }
        }
    }
}

/// Sums of a group into tiles 0 to 3.
///
/// # Safety
/// See `CallFn`.
#[inline(always)]
unsafe fn multiply<const R: usize, const GROUP: usize>(codes: *const u8, activations: *const u8, stride: usize) {
    // Bytes of a row of an A tile: a quad for each row of a B tile.
    let row_bytes = GROUP.min(ROW_BYTES);
    // SAFETY: by contract.
    unsafe {
        tile!(zero "tmm0");
        tile!(zero "tmm1");
        tile!(zero "tmm2");
        tile!(zero "tmm3");
        for depth in 0..GROUP / row_bytes {
            let activations = activations.add(depth * TILE_ROWS * row_bytes);
            let codes = codes.add(depth * row_bytes / 4 * STRIDE);
            tile!(load "tmm4", activations, row_bytes);
            tile!(load "tmm6", codes, STRIDE);
            tile!(i8u8 "tmm0", "tmm4", "tmm6");
            tile!(load "tmm7", codes.add(SIXTEEN), STRIDE);
            tile!(i8u8 "tmm1", "tmm4", "tmm7");
            if R == 2 {
                tile!(load "tmm5", activations.add(stride), row_bytes);
                tile!(i8u8 "tmm2", "tmm5", "tmm6");
                tile!(i8u8 "tmm3", "tmm5", "tmm7");
            }
        }
    }
}

/// A tile of rows whose sums of a group are there.
struct Rows {
    /// `[16][WIDTH]`
    products: *const i32,
    /// What the rows say of their codes.
    said: *const Said,
    scales: *const u8,
    /// `[16][WIDTH]`
    sums: *mut f32,
    is_first: bool,
}

/// [`ActivationGroup`]s of 16 rows.
#[repr(C)]
struct Said {
    scale: [f32; TILE_ROWS],
    scaled_sum: [f32; TILE_ROWS],
    from_zero: [[i32; TILE_ROWS]; 2],
}

const _: () = assert!(size_of::<Said>() == TILE_ROWS * size_of::<ActivationGroup>());

/// Adds sums of a group, scaled, to the f32 sums: the very operations of the vectors' kernel.
///
/// # Safety
/// All of `rows` is there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn add<const PACKED: bool, const TABLE: bool, const MIN: bool>(rows: &Rows) {
    // SAFETY: by contract.
    unsafe {
        let halves = |from: *const u8| {
            [0, 32].map(|offset| _mm512_cvtph_ps(_mm256_loadu_si256(from.add(offset).cast::<__m256i>())))
        };
        let scales = halves(rows.scales);
        let mins = if MIN { halves(rows.scales.add(WIDTH * 2)) } else { [_mm512_setzero_ps(); 2] };
        let said = &*rows.said;
        for r in 0..TILE_ROWS {
            let from_zero = _mm512_set1_epi32(said.from_zero[zero_index(PACKED, TABLE)][r]);
            for v in 0..2 {
                let at = r * WIDTH + v * 16;
                let acc = _mm512_add_epi32(_mm512_loadu_si512(rows.products.add(at).cast()), from_zero);
                let sum = rows.sums.add(at);
                let scale = _mm512_mul_ps(scales[v], _mm512_set1_ps(said.scale[r]));
                let before = if rows.is_first { _mm512_setzero_ps() } else { _mm512_loadu_ps(sum) };
                let mut total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), scale, before);
                if MIN {
                    total = _mm512_fmadd_ps(mins[v], _mm512_set1_ps(said.scaled_sum[r]), total);
                }
                _mm512_storeu_ps(sum, total);
            }
        }
    }
}

/// Codes of 4 bits, `num_lines` quads of pairs, to bytes.
///
/// # Safety
/// They are there, and there is room for twice as many bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn unpack<const TABLE: bool>(packed: *const u8, num_lines: usize, to: *mut u8) {
    // SAFETY: by contract.
    unsafe {
        let low_half = _mm512_set1_epi8(15);
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(IQ4_NL_CODES.as_ptr().cast()));
        let decode = |codes: __m512i| {
            let codes = _mm512_and_si512(codes, low_half);
            if TABLE { _mm512_shuffle_epi8(table, codes) } else { codes }
        };
        for line in 0..num_lines {
            for half in [0, 64] {
                let codes = _mm512_loadu_si512(packed.add(line * STRIDE + half).cast());
                let to = to.add(2 * line * STRIDE + half);
                _mm512_storeu_si512(to.cast(), decode(codes));
                _mm512_storeu_si512(to.add(STRIDE).cast(), decode(_mm512_srli_epi16::<4>(codes)));
            }
        }
    }
}

/// Writes row `row` of a tile of rows as codes to `target`, which holds all of that tile's groups.
///
/// # Safety
/// No one else writes this row. `target` has room for the tile of rows.
pub(in super::super) unsafe fn quantize_row(group_len: usize, x: &[f32], row: usize, target: *mut u8) {
    let row_bytes = group_len.min(ROW_BYTES);
    let mut codes = [0; LONG_GROUP_LEN];
    let codes = &mut codes[..group_len];
    for (group, x) in x.chunks(group_len).enumerate() {
        let said = grouped::quantize_group(Isa::Amx, x, codes);
        // SAFETY: by contract.
        unsafe {
            let target = target.add(group * TILE_ROWS * activation_group_bytes(group_len));
            for (depth, codes) in codes.chunks_exact(row_bytes).enumerate() {
                let at = target.add((depth * TILE_ROWS + row) * row_bytes);
                at.copy_from_nonoverlapping(codes.as_ptr(), row_bytes);
            }
            let at = target.add(TILE_ROWS * group_len).cast::<Said>();
            (&raw mut (*at).scale[row]).write(said.scale);
            (&raw mut (*at).scaled_sum[row]).write(said.scaled_sum);
            (&raw mut (*at).from_zero[0][row]).write(said.from_zero[0]);
            (&raw mut (*at).from_zero[1][row]).write(said.from_zero[1]);
        }
    }
}
