//! The two products of a tile: queries with K, and weights with V.

use std::marker::PhantomData;
use std::ops::Range;

use super::element::{Element, left_words};
use super::{TILE_LEN, TILE_VECTORS};
use crate::cpu::lanes::{LANES, Lanes, Vectorized, prefetch, prefetch_early};

/// Rows whose sums the registers hold beside two vectors of each.
pub(super) const fn max_rows<S: Lanes>(has_pairs_of_vectors: bool) -> usize {
    let most = if has_pairs_of_vectors { 12 } else { 6 };
    if most < S::NUM_SUMS { most } else { S::NUM_SUMS }
}

/// Vectors of each of so many rows that are computed together. A column is loaded once for all rows, and some registers
/// are for columns.
const fn num_cols<S: Lanes>(num_rows: usize) -> usize {
    if 4 * num_rows + 4 <= S::NUM_SUMS {
        4
    } else if 2 * num_rows <= S::NUM_SUMS {
        2
    } else {
        1
    }
}

/// Rows in runs that the accumulators hold, as even as they can be.
pub(super) struct RowBlocks {
    pub(super) rows: Range<usize>,
    pub(super) max_len: usize,
}

impl Iterator for RowBlocks {
    type Item = Range<usize>;
    #[inline(always)]
    fn next(&mut self) -> Option<Range<usize>> {
        let left = self.rows.len();
        let len = if left <= self.max_len {
            left
        } else if left < 2 * self.max_len {
            left.div_ceil(2)
        } else {
            self.max_len
        };
        let start = self.rows.start;
        self.rows.start += len;
        (len > 0).then_some(start..start + len)
    }
}

/// Calls the function for a number of rows and of vectors that registers hold.
macro_rules! dispatch {
    ($simd:ident, $num_rows:expr, $num_cols:expr, $of:ident, $work:expr) => {
        dispatch!(@ $simd, $num_rows, $num_cols, $of, $work,
            (1 4) (2 4) (3 4) (4 4) (5 4)
            (1 2) (2 2) (6 2) (7 2) (8 2) (9 2) (10 2) (11 2) (12 2)
            (1 1) (2 1) (3 1) (4 1) (5 1) (6 1))
    };
    (@ $simd:ident, $num_rows:expr, $num_cols:expr, $of:ident, $work:expr, $(($rows:literal $cols:literal))+) => {
        match ($num_rows, $num_cols) {
            $(
                ($rows, $cols) => {
                    if const { $rows * $cols <= S::NUM_SUMS } {
                        $simd.enter($of::<E, $rows, $cols>($work))
                    }
                }
            )+
            _ => unreachable!("`num_cols` and `max_rows` give no others"),
        }
    };
}

/// What is fetched while a tile is multiplied. Blocks lie anywhere, so the machine does not see them coming: what is
/// wanted next comes to level 1, and what is wanted after that to level 2, where many more lines can be on their way (on
/// Zen 4 one step ahead alone gave 59 % of the bandwidth, both 90 %).
#[derive(Clone, Copy)]
pub(super) struct Ahead<'a> {
    pub(super) next: Option<&'a [*const u8; TILE_VECTORS]>,
    pub(super) after_next: Option<&'a [*const u8; TILE_VECTORS]>,
}

impl Ahead<'_> {
    #[inline(always)]
    fn fetch(self, vector: usize, offset: usize) {
        if let Some(after_next) = self.after_next {
            prefetch_early(after_next[vector].wrapping_add(offset));
        }
        if let Some(next) = self.next {
            prefetch(next[vector].wrapping_add(offset));
        }
    }
}

/// `scores[row][token] = sum over dims of q[row][dim] * k[dim][token]`: one block of rows, one tile.
pub(super) struct Scores<'a, E> {
    /// Left factors of the first row; the next row's follow.
    pub(super) q: *const u32,
    /// Steps of a query.
    pub(super) num_steps: usize,
    pub(super) k: &'a [*const u8; TILE_VECTORS],
    /// Bytes from one step to the next.
    pub(super) k_stride: usize,
    pub(super) visible: &'a [(usize, usize); TILE_VECTORS],
    /// K of the tiles that come next, to be fetched meanwhile.
    pub(super) ahead: Ahead<'a>,
    pub(super) scores: *mut f32,
    pub(super) element: PhantomData<E>,
}

impl<E: Element> Scores<'_, E> {
    /// At most [`max_rows`]; of a tile that is not whole, at most those of single vectors.
    #[inline(always)]
    pub(super) fn compute<S: Lanes>(self, simd: S, num_rows: usize, is_whole: bool) {
        let num_cols = if is_whole { num_cols::<S>(num_rows) } else { 1 };
        dispatch!(simd, num_rows, num_cols, ScoresOf, self);
    }
}

/// [`Scores`] of `R` rows, `G` vectors of tokens at a time.
struct ScoresOf<'a, E, const R: usize, const G: usize>(Scores<'a, E>);

impl<E: Element, const R: usize, const G: usize> Vectorized for ScoresOf<'_, E, R, G> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Scores { q, num_steps, k, k_stride, visible, ahead, scores, .. } = self.0;
        let q_stride = num_steps * E::LEFT_WORDS;
        for first in (0..TILE_VECTORS).step_by(G) {
            if G == 1 && visible[first].0 >= visible[first].1 {
                continue;
            }
            let mut acc = [[E::zero(simd); G]; R];
            for step in 0..num_steps {
                for g in 0..G {
                    ahead.fetch(first + g, step * k_stride);
                }
                let mut column = [E::zero_column(simd); G];
                for (g, column) in column.iter_mut().enumerate() {
                    // SAFETY: a step is a row of `block_size` lanes of K, and 16 tokens from the vector's first are in the
                    // block; the vector is there, as some row sees it.
                    *column = unsafe { E::column(simd, k[first + g].add(step * k_stride)) };
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: `R` queries of `num_steps` steps.
                    let q = unsafe { E::left(simd, q.add(r * q_stride + step * E::LEFT_WORDS)) };
                    for (acc, &column) in acc.iter_mut().zip(&column) {
                        *acc = E::mul_add(simd, *acc, column, q);
                    }
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                for (g, &acc) in acc.iter().enumerate() {
                    // SAFETY: `R` rows of TILE_LEN scores.
                    unsafe { simd.store(scores.add(r * TILE_LEN + (first + g) * LANES), E::floats(simd, acc)) };
                }
            }
        }
    }
}

/// `sums[row][dim] = sums[row][dim] * factors[row] + sum over tokens of weights[row][token] * v[token][dim]`: one block of
/// rows, one tile.
pub(super) struct Sums<'a, E> {
    /// Left factors of the first row, those of a tile for each.
    pub(super) weights: *const u32,
    pub(super) factors: &'a [f32],
    /// Scales of the weights, where they have one.
    pub(super) weight_scales: &'a [f32],
    pub(super) v: &'a [*const u8; TILE_VECTORS],
    /// What all of these rows see.
    pub(super) visible: &'a [(usize, usize); TILE_VECTORS],
    /// V of the tiles that come next, to be fetched meanwhile.
    pub(super) ahead: Ahead<'a>,
    pub(super) head_dim: usize,
    /// First of the dimensions that are computed together.
    pub(super) dim: usize,
    pub(super) sums: *mut f32,
    pub(super) row_len: usize,
    pub(super) element: PhantomData<E>,
}

impl<E: Element> Sums<'_, E> {
    /// All dimensions of at most [`max_rows`] rows.
    #[inline(always)]
    pub(super) fn compute<S: Lanes>(mut self, simd: S, num_rows: usize) {
        while self.dim < self.head_dim {
            let num_vectors = (self.head_dim - self.dim) / LANES;
            let num_cols = if num_vectors >= num_cols::<S>(num_rows) { num_cols::<S>(num_rows) } else { 1 };
            dispatch!(simd, num_rows, num_cols, SumsOf, Sums { dim: self.dim, ..self });
            self.dim += num_cols * LANES;
        }
    }
}

/// [`Sums`] of `R` rows and `D` vectors of dimensions.
struct SumsOf<'a, E, const R: usize, const D: usize>(Sums<'a, E>);

impl<E: Element, const R: usize, const D: usize> Vectorized for SumsOf<'_, E, R, D> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Sums { weights, factors, weight_scales, v, visible, ahead, head_dim, dim, sums, row_len, .. } = self.0;
        let num_lanes = (head_dim - dim).min(LANES);
        let (v_stride, dim_start) = (head_dim * E::LANE_BYTES, dim * E::LANE_BYTES);
        let mut acc = [[E::zero(simd); D]; R];
        for index in 0..TILE_VECTORS {
            let (first, end) = visible[index];
            if first >= end {
                continue;
            }
            for step in first / E::PACK..end.div_ceil(E::PACK) {
                let start = step * v_stride + dim_start;
                for d in 0..D {
                    ahead.fetch(index, start + d * LANES * E::LANE_BYTES);
                }
                let mut column = [E::zero_column(simd); D];
                for (d, column) in column.iter_mut().enumerate() {
                    // SAFETY: a step is a row of `head_dim` lanes of V; the vector of tokens is there, as the rows see it,
                    // and the last vector of dimensions has `num_lanes` lanes.
                    *column = unsafe {
                        let lanes = v[index].add(start + d * LANES * E::LANE_BYTES);
                        if D == 1 && num_lanes < LANES {
                            E::column_first(simd, lanes, num_lanes)
                        } else {
                            E::column(simd, lanes)
                        }
                    };
                }
                // A pair may have one token that is not seen; it may hold anything, and NaN times zero is NaN.
                if E::PACK == 2 && (2 * step < first || 2 * step + 2 > end) {
                    for column in &mut column {
                        *column = E::keep_one(simd, *column, 2 * step >= first);
                    }
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let number = index * LANES + step * E::PACK;
                    // SAFETY: `R` rows of weights of a tile.
                    let weight =
                        unsafe { E::left(simd, weights.add(r * left_words::<E>(TILE_LEN) + left_words::<E>(number))) };
                    for (acc, &column) in acc.iter_mut().zip(&column) {
                        *acc = E::mul_add(simd, *acc, column, weight);
                    }
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            let factor = simd.splat(factors[r]);
            for (d, &acc) in acc.iter().enumerate() {
                let mut new = E::floats(simd, acc);
                if E::IS_SCALED {
                    new = simd.mul(new, simd.splat(weight_scales[r]));
                }
                // SAFETY: `R` rows of whole vectors of sums.
                unsafe {
                    let sums = sums.add(r * row_len + dim + d * LANES);
                    simd.store(sums, simd.fma(simd.load(sums), factor, new));
                }
            }
        }
    }
}
