//! The running softmax: scores of a tile to weights, and results of chunks to one.

use std::ops::Range;

use super::element::{Element, left_words};
use super::{MAX_TILE_ROWS, Scratch, TILE_LEN, TILE_VECTORS};
use crate::cpu::lanes::{LANES, Lanes};
use crate::cpu::math::exp2;
use crate::kv_layout::MAX_HEAD_DIM;

/// Running softmax of some rows.
#[repr(C, align(64))]
pub(super) struct State {
    /// `[num_rows][row_len]`
    pub(super) sums: [f32; MAX_TILE_ROWS * MAX_HEAD_DIM],
    pub(super) max: [f32; MAX_TILE_ROWS],
    /// Sums of weights.
    pub(super) total: [f32; MAX_TILE_ROWS],
}

impl State {
    #[inline(always)]
    pub(super) fn clear(&mut self, num_rows: usize, row_len: usize) {
        self.sums[..num_rows * row_len].fill(0.0);
        self.max[..num_rows].fill(f32::NEG_INFINITY);
        self.total[..num_rows].fill(0.0);
    }

    #[inline(always)]
    pub(super) fn save(&self, num_rows: usize, out: &mut [f32]) {
        let (max, rest) = out.split_at_mut(num_rows);
        let (total, sums) = rest.split_at_mut(num_rows);
        max.copy_from_slice(&self.max[..num_rows]);
        total.copy_from_slice(&self.total[..num_rows]);
        sums.copy_from_slice(&self.sums[..sums.len()]);
    }

    #[inline(always)]
    pub(super) fn load(&mut self, num_rows: usize, state: &[f32]) {
        let (max, rest) = state.split_at(num_rows);
        let (total, sums) = rest.split_at(num_rows);
        self.max[..num_rows].copy_from_slice(max);
        self.total[..num_rows].copy_from_slice(total);
        self.sums[..sums.len()].copy_from_slice(sums);
    }
}

/// Tokens `visible` of a tile, as tokens of each of its vectors.
#[inline(always)]
pub(super) fn by_vector(visible: &Range<usize>) -> [(usize, usize); TILE_VECTORS] {
    let mut parts = [(0, 0); TILE_VECTORS];
    for (index, part) in parts.iter_mut().enumerate() {
        let limit = |token: usize| token.saturating_sub(index * LANES).min(LANES);
        *part = (limit(visible.start), limit(visible.end));
    }
    parts
}

/// Adds the result of the next chunk to those before it.
#[inline(always)]
pub(super) fn merge<S: Lanes>(
    simd: S,
    into: &mut State,
    sums: &[f32],
    max: &[f32],
    totals: &[f32],
    num_rows: usize,
    row_len: usize,
) {
    for row in 0..num_rows {
        let new_max = if max[row] > into.max[row] { max[row] } else { into.max[row] };
        let old_factor = factor(simd, into.max[row], new_max);
        let new_factor = factor(simd, max[row], new_max);
        into.max[row] = new_max;
        into.total[row] = into.total[row] * old_factor + totals[row] * new_factor;
        let (old_factor, new_factor) = (simd.splat(old_factor), simd.splat(new_factor));
        let range = row * row_len..(row + 1) * row_len;
        for (into, sums) in into.sums[range.clone()].chunks_exact_mut(LANES).zip(sums[range].chunks_exact(LANES)) {
            let new = simd.mul(simd.load_slice(sums, 0.0), new_factor);
            simd.store_slice(into, simd.fma(simd.load_slice(into, 0.0), old_factor, new));
        }
    }
}

/// What sums relative to `old_max` are multiplied by to be relative to `new_max`.
#[inline(always)]
fn factor<S: Lanes>(simd: S, old_max: f32, new_max: f32) -> f32 {
    // Also where nothing was seen yet, and both are negative infinity.
    if old_max == new_max { 1.0 } else { simd.to_array(exp2(simd, simd.splat(old_max - new_max)))[0] }
}

/// Turns the scores of a tile of `rows` into weights and brings running maxima and totals up to date. A row sees the
/// tokens `visible_to(row)` of the tile; `scale` makes scores powers of two.
#[inline(always)]
pub(super) fn softmax<S: Lanes, E: Element>(
    simd: S,
    scratch: &mut Scratch,
    rows: Range<usize>,
    scale: f32,
    visible_to: impl Fn(usize) -> Range<usize>,
) {
    for row in rows.clone() {
        scratch.tile_max[row] = scaled_scores::<S, E>(simd, scratch, row, scale, visible_to(row));
    }
    // Sixteen rows at a time. What lies beyond the last is computed too, and is nobody's.
    for first in (rows.start / LANES * LANES..rows.end).step_by(LANES) {
        let range = first..first + LANES;
        let old_max = simd.load_slice(&scratch.chunk.max[range.clone()], 0.0);
        let tile_max = simd.load_slice(&scratch.tile_max[range.clone()], 0.0);
        let new_max = simd.select(simd.gt(tile_max, old_max), tile_max, old_max);
        // Equal also where nothing was seen yet, and both are negative infinity.
        let is_same = simd.eq(old_max, new_max);
        let factor = simd.select(is_same, simd.splat(1.0), exp2(simd, simd.sub(old_max, new_max)));
        simd.store_slice(&mut scratch.factors[range.clone()], factor);
        let is_own = simd.mask_range(rows.start.saturating_sub(first), (rows.end - first).min(LANES));
        simd.store_slice(&mut scratch.chunk.max[range], simd.select(is_own, new_max, old_max));
    }
    for row in rows {
        weights::<S, E>(simd, scratch, row, visible_to(row));
    }
}

/// Brings the scores of a row to their scale, negative infinity where the row does not see the token. Returns the largest.
#[inline(always)]
fn scaled_scores<S: Lanes, E: Element>(
    simd: S,
    scratch: &mut Scratch,
    row: usize,
    scale: f32,
    visible: Range<usize>,
) -> f32 {
    let scores = &mut scratch.scores[row * TILE_LEN..][..TILE_LEN];
    let scale = simd.splat(if E::IS_SCALED { scratch.q_scales[row] * scale } else { scale });
    let sees_all = visible.start == 0 && visible.end == TILE_LEN;
    let parts = by_vector(&visible);
    let mut x = [simd.splat(f32::NEG_INFINITY); TILE_VECTORS];
    for (index, (x, scores)) in x.iter_mut().zip(scores.chunks_exact_mut(LANES)).enumerate() {
        let mut scaled = simd.mul(simd.load_slice(scores, 0.0), scale);
        if E::IS_SCALED {
            scaled = simd.mul(scaled, simd.load_slice(&scratch.k_scales[index * LANES..], 0.0));
        }
        if !sees_all {
            // What lies in the other lanes may be anything, NaN included.
            let (start, end) = parts[index];
            scaled = simd.select(simd.mask_range(start, end), scaled, *x);
        }
        *x = scaled;
        simd.store_slice(scores, scaled);
    }
    simd.max_lane(simd.max(simd.max(x[0], x[1]), simd.max(x[2], x[3])))
}

/// Weights of a row whose maximum and factor are up to date, and its totals.
#[inline(always)]
fn weights<S: Lanes, E: Element>(simd: S, scratch: &mut Scratch, row: usize, visible: Range<usize>) {
    let max = scratch.chunk.max[row];
    // A row that has seen nothing yet has weights 2^(-inf - 0) = 0.
    let base = simd.splat(if max == f32::NEG_INFINITY { 0.0 } else { max });
    let mut x = [base; TILE_VECTORS];
    let scores = &scratch.scores[row * TILE_LEN..][..TILE_LEN];
    for (x, scores) in x.iter_mut().zip(scores.chunks_exact(LANES)) {
        *x = E::round(simd, exp2(simd, simd.sub(simd.load_slice(scores, 0.0), base)));
    }
    let lanes = &mut scratch.lane_totals[row * LANES..][..LANES];
    let tile_total = simd.add(simd.add(x[0], x[1]), simd.add(x[2], x[3]));
    simd.store_slice(lanes, simd.fma(simd.load_slice(lanes, 0.0), simd.splat(scratch.factors[row]), tile_total));
    if E::IS_SCALED {
        let parts = by_vector(&visible);
        for (index, x) in x.iter_mut().enumerate() {
            let scaled = simd.mul(*x, simd.load_slice(&scratch.v_scales[index * LANES..], 0.0));
            // The scale of a token that is not seen may be anything.
            let (start, end) = parts[index];
            *x = simd.select(simd.mask_range(start, end), scaled, simd.splat(0.0));
        }
        let largest = simd.max_lane(simd.max(simd.max(x[0], x[1]), simd.max(x[2], x[3])));
        let sum = simd.add(simd.add(x[0], x[1]), simd.add(x[2], x[3]));
        let is_finite = simd.mask_bits(simd.is_nan(sum)) == 0;
        let (inverse, scale) = E::left_scale(largest, is_finite);
        scratch.weight_scales[row] = scale;
        for x in &mut x {
            *x = simd.mul(*x, simd.splat(inverse));
        }
    }
    let words = left_words::<E>(LANES);
    let out = &mut scratch.weights[row * TILE_VECTORS * words..][..TILE_VECTORS * words];
    for (x, out) in x.iter().zip(out.chunks_exact_mut(words)) {
        // SAFETY: room for 16 left factors. Rounding again changes nothing.
        unsafe { E::store_left(simd, out.as_mut_ptr(), *x) };
    }
}
