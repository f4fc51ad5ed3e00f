//! A chunk on tiles (see [`crate::cpu::amx`]): bf16, and fp8 that becomes bf16 in a buffer.
//!
//! A stretch of 256 tokens and a block of up to 32 rows are computed together: half of a chunk's scores stay nearer to the core
//! than all of them, and with a quarter the passes would change more often than they are worth.
//!
//! * Scores. 16 rows of queries are an A tile; 16 pairs of dimensions of 16 tokens are a B tile, as K lies in the cache.
//! * Weights, row by row: two to the power of what is left of the scores, rounded to bf16 and laid down as A tiles.
//! * Sums, which go on from those of the stretch before. A B tile are 16 pairs of tokens (a span) of 16 dimensions. Blocks of the
//!   cache may be shorter, so V is copied first, once for all rows of the unit. A tile of ones gives the sums of weights,
//!   where those are what is multiplied.
//!
//! Each result is one chain over dimensions or over a chunk's tokens, in the order of `tdpbf16ps`, for one row as for many: rows
//! are filled up to 16, and nobody looks at those. Tokens that a row does not see have weight zero, which adds nothing; so
//! that this holds, V of numbers only is multiplied: a token with any other is all zeros in the copy, and rows that see it
//! get a sum of weights that is NaN.

mod product;
mod values;
mod weights;

use std::ops::Range;

use self::product::{ONES, Product};
use self::values::copy_span;
use self::weights::{Scores, scale_by, take_max};
use super::element::Element;
use super::softmax::State;
use super::unit::{Unit, Vector};
use super::work::Task;
use super::{Batch, MAX_TILE_ROWS, ROWS_MULTIPLE, Scratch};
use crate::cpu::amx::{ROW_BYTES, TILE_BYTES, TILE_ROWS};
use crate::cpu::lanes::{LANES, Lanes, prefetch_early};
use crate::kv_layout::MAX_HEAD_DIM;
use crate::ops::paged_attention::{CHUNK_LEN, first_visible};
use crate::{DType, KvLayout};

/// Tokens of a B tile of V.
const SPAN_LEN: usize = 2 * TILE_ROWS;

const NUM_SPANS: usize = CHUNK_LEN / SPAN_LEN;

const NUM_VECTORS: usize = CHUNK_LEN / LANES;

/// Tokens whose scores exist at the same time.
const STRETCH_LEN: usize = 256;

const STRETCH_SPANS: usize = STRETCH_LEN / SPAN_LEN;

const STRETCH_VECTORS: usize = STRETCH_LEN / LANES;

/// Vectors of tokens from what is computed to what is asked for.
const AHEAD: usize = 8;

/// Dimensions of a B tile of K.
const TILE_DIMS: usize = 2 * TILE_ROWS;

/// From row to row, a little more than a stretch: rows a power of two apart would be in each other's way in the cache.
const SCORE_STRIDE: usize = STRETCH_LEN + LANES;
const WEIGHT_STRIDE: usize = STRETCH_LEN + 2 * LANES;

/// Whether the cache's numbers can be put into tiles.
pub(super) fn can_compute(layout: &KvLayout, scale: f32) -> bool {
    // The largest score times the scale is the largest of the products.
    let keeps_order = scale > 0.0 && scale.is_finite();
    matches!(layout.dtype, DType::Bf16 | DType::F8E4M3) && layout.head_dim.is_multiple_of(TILE_DIMS) && keeps_order
}

/// Working memory of a thread. What is behind a unit's own rows is read and written too, and means nothing.
#[repr(C, align(64))]
pub(super) struct TileScratch {
    /// Of the rows' tokens.
    positions: [u32; MAX_TILE_ROWS],
    /// `[ROWS_MULTIPLE][SCORE_STRIDE]`
    scores: [f32; ROWS_MULTIPLE * SCORE_STRIDE],
    /// bf16, `[ROWS_MULTIPLE][WEIGHT_STRIDE]`
    weights: [u16; ROWS_MULTIPLE * WEIGHT_STRIDE],
    /// Sums of weights so far, in every column.
    totals: [f32; ROWS_MULTIPLE * LANES],
    /// Largest scores of a stretch, and what sums so far are multiplied by.
    max: [f32; ROWS_MULTIPLE],
    factors: [f32; ROWS_MULTIPLE],
    /// Of fp8: pairs of dimensions of a chunk's tokens, `[vector of tokens][head_dim / 2][16]`.
    k: [u32; CHUNK_LEN * MAX_HEAD_DIM / 2],
    /// Pairs of tokens, `[span][head_dim / 16][16 pairs][16 dimensions]`.
    v: [u32; CHUNK_LEN * MAX_HEAD_DIM / 2],
    /// Of fp8: what scores of a token are multiplied by, and its weights.
    k_scales: [f32; CHUNK_LEN],
    v_scales: [f32; CHUNK_LEN],
}

impl TileScratch {
    /// Which of `len` tokens from position `start` on a row sees.
    #[inline(always)]
    fn seen_by(&self, row: usize, window: Option<u32>, start: usize, len: usize) -> Range<usize> {
        let position = self.positions[row] as usize;
        let within = |position: usize| position.saturating_sub(start).min(len);
        within(first_visible(position, window))..within(position + 1)
    }
}

/// Where the tokens of a chunk lie that some row of a unit sees.
struct Chunk {
    /// Position of its first token.
    start: usize,
    /// Those tokens, from the first of the chunk.
    visible: Range<usize>,
    /// A vector of which no row sees any is null.
    vectors: [Vector; NUM_VECTORS],
}

impl Chunk {
    /// One of a unit, or one that is not there.
    #[inline(always)]
    fn new<E: Element>(unit: &Unit<'_>, chunk: usize, visible: &Range<usize>) -> Self {
        let start = chunk * CHUNK_LEN;
        let within = |position: usize| position.saturating_sub(start).min(CHUNK_LEN);
        let visible = within(visible.start)..within(visible.end);
        let block_table = unit.batch.lists.seq(unit.task.seq).block_table;
        let mut vectors = [Vector::NONE; NUM_VECTORS];
        let seen = visible.start / LANES..visible.end.div_ceil(LANES);
        for (vector, index) in vectors[seen.clone()].iter_mut().zip(seen) {
            *vector = Vector::at::<E>(unit.batch, unit.kv_head, block_table, start + index * LANES);
        }
        Self { start, visible, vectors }
    }

    /// A vector's keys, or others, where no row sees its tokens.
    #[inline(always)]
    fn some_k(&self, index: usize) -> *const u8 {
        let first = self.visible.start / LANES;
        self.vectors[index.clamp(first, (self.visible.end - 1) / LANES)].k
    }
}

/// Two chunks, the second of which comes next.
struct Chunks<'a>([&'a Chunk; 2]);

impl Chunks<'_> {
    /// What is wanted [`AHEAD`] vectors of tokens after one of the first chunk.
    #[inline(always)]
    fn ahead(&self, index: usize) -> &Vector {
        let index = index + AHEAD;
        &self.0[index / NUM_VECTORS].vectors[index % NUM_VECTORS]
    }
}

/// Rows and tokens that are computed together.
struct Block {
    /// Of the unit.
    rows: Range<usize>,
    /// Of the chunk.
    spans: Range<usize>,
    /// Whether there are no sums yet.
    is_first: bool,
}

impl Block {
    fn has_two_tiles(&self) -> bool {
        self.rows.len() > TILE_ROWS
    }
}

/// How far V of a chunk is copied.
struct Values {
    next_span: usize,
    /// Tokens of a span with numbers that are none.
    bad: [u32; NUM_SPANS],
}

impl Unit<'_> {
    /// All of the unit.
    #[inline(always)]
    pub(super) fn run_on_tiles<S: Lanes, E: Element>(mut self, simd: S) {
        let Task { chunk_start, chunk_end, .. } = *self.task;
        self.load_queries::<S, E>(simd);
        self.load_positions();
        let visible = self.visible();
        let mut chunks = [chunk_start, chunk_start + 1].map(|index| Chunk::new::<E>(&self, index, &visible));
        for index in chunk_start..chunk_end {
            // The first result of all is the running one.
            let is_total = index == chunk_start && !self.is_later_part();
            self.compute_chunk_on_tiles::<S, E>(simd, &Chunks(chunks.each_ref()), is_total);
            if self.is_later_part() {
                self.save_chunk(index);
            } else if !is_total {
                self.merge_chunk(simd);
            }
            chunks.swap(0, 1);
            chunks[1] = Chunk::new::<E>(&self, index + 2, &visible);
        }
        self.finish(simd);
    }

    /// Leaves the result of the first of the chunks in `scratch.total` or `scratch.chunk`.
    #[inline(always)]
    fn compute_chunk_on_tiles<S: Lanes, E: Element>(&mut self, simd: S, chunks: &Chunks<'_>, is_total: bool) {
        let (num_rows, row_len) = (self.task.num_rows, self.batch.row_len());
        let chunk = chunks.0[0];
        if E::IS_SCALED {
            self.unpack_k::<S, E>(simd, chunk);
        }
        let mut v = Values { next_span: chunk.visible.start / SPAN_LEN, bad: [0; NUM_SPANS] };
        for start in (0..num_rows).step_by(ROWS_MULTIPLE) {
            let rows = start..(start + ROWS_MULTIPLE).min(num_rows);
            let seen = self.seen_by(rows.start, chunk.start).start..self.seen_by(rows.end - 1, chunk.start).end;
            let state = self.state(is_total);
            state.max[rows.clone()].fill(f32::NEG_INFINITY);
            state.total[rows.clone()].fill(0.0);
            if seen.is_empty() {
                state.sums[rows.start * row_len..rows.end * row_len].fill(0.0);
                continue;
            }
            let all = seen.start / SPAN_LEN..seen.end.div_ceil(SPAN_LEN);
            for stretch in all.start / STRETCH_SPANS..all.end.div_ceil(STRETCH_SPANS) {
                let first = stretch * STRETCH_SPANS;
                let spans = all.start.max(first)..all.end.min(first + STRETCH_SPANS);
                let block = Block { rows: rows.clone(), is_first: spans.start == all.start, spans };
                // SAFETY: the thread has tiles, as a batch's products say.
                unsafe {
                    self.scores_on_tiles::<E>(chunks, &block);
                    self.weigh::<E>(chunk, &block, is_total);
                    self.sums_on_tiles::<S, E>(simd, chunks, &block, &mut v, is_total);
                }
            }
            if E::IS_SCALED {
                continue;
            }
            for (index, row) in rows.clone().enumerate() {
                self.state(is_total).total[row] = self.scratch.tiles.totals[index * LANES];
            }
            if v.bad[all.clone()].iter().any(|&tokens| tokens != 0) {
                for row in rows {
                    let seen = self.seen_by(row, chunk.start);
                    if all.clone().any(|span| v.bad[span] & bits_of(span, &seen) != 0) {
                        self.state(is_total).total[row] = f32::NAN;
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn state(&mut self, is_total: bool) -> &mut State {
        if is_total { &mut self.scratch.total } else { &mut self.scratch.chunk }
    }

    #[inline(always)]
    fn load_positions(&mut self) {
        let Task { seq, row_start, num_rows, .. } = *self.task;
        let group_len = self.batch.group_len;
        let first = self.batch.lists.seq(seq).first_position();
        let (mut position, mut head) = ((first + row_start / group_len) as u32, row_start % group_len);
        for to in &mut self.scratch.tiles.positions[..num_rows] {
            *to = position;
            head += 1;
            if head == group_len {
                (position, head) = (position + 1, 0);
            }
        }
    }

    /// Tokens of the chunk at `start` that a row sees.
    #[inline(always)]
    fn seen_by(&self, row: usize, start: usize) -> Range<usize> {
        self.scratch.tiles.seen_by(row, self.batch.window, start, CHUNK_LEN)
    }

    /// Of fp8: brings K to bf16, and the scales of K and V to where rows of scores look for them.
    #[inline(always)]
    fn unpack_k<S: Lanes, E: Element>(&mut self, simd: S, chunk: &Chunk) {
        let (head_dim, block_size) = (self.batch.head_dim, self.batch.layout.block_size);
        let tiles = &mut self.scratch.tiles;
        for (index, vector) in chunk.vectors.iter().enumerate() {
            if vector.k.is_null() {
                continue;
            }
            let tokens = index * LANES;
            // SAFETY: the vector's 16 tokens are in a block, with their scales side by side, those of K before those of V; the
            // scratch has room for a chunk's.
            unsafe {
                let to = tiles.k.as_mut_ptr().add(tokens * head_dim / 2);
                for step in 0..head_dim / 2 {
                    let codes = vector.k.add(step * block_size * E::LANE_BYTES);
                    simd.store_pairs(to.add(step * LANES), simd.load_e4m3_pairs(codes.cast()));
                }
                let scale = simd.mul(simd.load(vector.scales), simd.splat(self.batch.scale));
                simd.store(tiles.k_scales.as_mut_ptr().add(tokens), scale);
                simd.store(tiles.v_scales.as_mut_ptr().add(tokens), simd.load(vector.scales.add(block_size)));
            }
        }
    }

    /// Scores of a block.
    ///
    /// # Safety
    /// The thread has tiles; K of fp8 is unpacked.
    #[inline(always)]
    unsafe fn scores_on_tiles<E: Element>(&mut self, chunks: &Chunks<'_>, block: &Block) {
        let (head_dim, block_size) = (self.batch.head_dim, self.batch.layout.block_size);
        let tiles = &mut self.scratch.tiles;
        let (q_stride, k_stride) = (head_dim * 2, if E::IS_SCALED { ROW_BYTES } else { block_size * 4 });
        let columns = block.spans.start * 2..block.spans.end * 2;
        let q = self.scratch.q.as_ptr().wrapping_add(block.rows.start * head_dim / 2);
        let unpacked = tiles.k.as_ptr();
        let k = |index: usize| {
            if E::IS_SCALED {
                unpacked.wrapping_add(index * LANES * head_dim / 2).cast()
            } else {
                chunks.0[0].some_k(index)
            }
        };
        let scores = tiles.scores.as_mut_ptr();
        let product = |first: usize, k: [*const u8; 4]| Product {
            num_tiles: head_dim / TILE_DIMS,
            a: q.cast(),
            a_stride: q_stride,
            a_step: ROW_BYTES,
            b: k,
            b_stride: k_stride,
            b_step: TILE_ROWS * k_stride,
            continues: false,
            to: [0, 1, 2, 3].map(|column| scores.wrapping_add(((first + column) % STRETCH_VECTORS) * LANES)),
            to_stride: SCORE_STRIDE,
        };
        let fetch = |columns: Range<usize>| {
            if block.rows.start == 0 {
                columns.for_each(|index| self.batch.fetch_k::<E>(chunks.ahead(index)));
            }
        };
        // SAFETY: rows of whole tiles of queries and of scores are in the scratch; 16 tokens are in a block of the cache.
        unsafe {
            if block.has_two_tiles() {
                for first in columns.step_by(2) {
                    fetch(first..first + 2);
                    product(first, [k(first), k(first + 1), k(first), k(first)]).multiply::<2, 2>();
                }
            } else {
                for first in (columns.start / 4 * 4..columns.end).step_by(4) {
                    fetch(first..first + 4);
                    product(first, [0, 1, 2, 3].map(|column| k(first + column))).multiply::<1, 4>();
                }
            }
        }
    }

    /// Scores of a block to weights, and what there is of sums to their scale.
    ///
    /// # Safety
    /// The instruction set is there, and so are the scores.
    #[inline(always)]
    unsafe fn weigh<E: Element>(&mut self, chunk: &Chunk, block: &Block, is_total: bool) {
        let (window, scale, row_len) = (self.batch.window, self.batch.scale, self.batch.row_len());
        let Scratch { tiles, chunk: of_chunk, total, .. } = &mut *self.scratch;
        let state = if is_total { total } else { of_chunk };
        let first_token = block.spans.start / STRETCH_SPANS * STRETCH_LEN;
        let start = chunk.start + first_token;
        let spans = block.spans.start % STRETCH_SPANS..block.spans.end - first_token / SPAN_LEN;
        let rows = block.rows.clone();
        let first_sees = tiles.seen_by(rows.start, window, start, STRETCH_LEN);
        let last_sees = tiles.seen_by(rows.end - 1, window, start, STRETCH_LEN);
        // What one of them does not see, none of those before, or none of those behind it does.
        let all_see_all = first_sees.end == STRETCH_LEN && last_sees.start == 0;
        let (scores, weights) = (tiles.scores.as_ptr(), tiles.weights.as_mut_ptr());
        let scales = [tiles.k_scales.as_ptr(), tiles.v_scales.as_ptr()].map(|scales| scales.wrapping_add(first_token));
        let scores_of = |index: usize| Scores {
            scores: scores.wrapping_add(index * SCORE_STRIDE),
            weights: weights.wrapping_add(index * WEIGHT_STRIDE),
            scale,
            scales,
        };
        // SAFETY: by contract; states and this scratch have room for whole blocks of rows.
        unsafe {
            for (index, row) in rows.clone().enumerate() {
                tiles.max[index] = if all_see_all {
                    scores_of(index).max_of_all::<E>()
                } else {
                    scores_of(index).max::<E>(&tiles.seen_by(row, window, start, STRETCH_LEN))
                };
            }
            let totals = E::IS_SCALED.then(|| state.total.as_mut_ptr().add(rows.start));
            take_max(state.max.as_mut_ptr().add(rows.start), &tiles.max, &mut tiles.factors, totals);
            for (index, row) in rows.enumerate() {
                let (scores, max) = (scores_of(index), state.max[row]);
                let total = if all_see_all {
                    scores.weigh_all::<E>(max)
                } else {
                    scores.weigh::<E>(max, &spans, &tiles.seen_by(row, window, start, STRETCH_LEN))
                };
                if E::IS_SCALED {
                    state.total[row] += total;
                }
                if !block.is_first {
                    let factor = tiles.factors[index];
                    scale_by(&mut state.sums[row * row_len..][..row_len], factor);
                    scale_by(&mut tiles.totals[index * LANES..][..LANES], factor);
                }
            }
        }
    }

    /// Sums of V, of a block, and of weights, where they have no scale.
    ///
    /// # Safety
    /// The thread has tiles, and the weights are there.
    #[inline(always)]
    unsafe fn sums_on_tiles<S: Lanes, E: Element>(
        &mut self,
        simd: S,
        chunks: &Chunks<'_>,
        block: &Block,
        v: &mut Values,
        is_total: bool,
    ) {
        let (batch, head_dim, row_len) = (self.batch, self.batch.head_dim, self.batch.row_len());
        let sums = self.state(is_total).sums.as_mut_ptr().wrapping_add(block.rows.start * row_len);
        let tiles = &mut self.scratch.tiles;
        let num_columns = head_dim / LANES;
        let weights = tiles.weights.as_ptr().wrapping_add(block.spans.start % STRETCH_SPANS * SPAN_LEN);
        let values = tiles.v.as_mut_ptr();
        let span_words = num_columns * TILE_BYTES / 4;
        // SAFETY: a chunk's V has room in the scratch, and rows of whole tiles have theirs in weights and sums.
        unsafe {
            while v.next_span < block.spans.end {
                let span = v.next_span;
                [2 * span, 2 * span + 1].iter().for_each(|&index| batch.fetch_v::<E>(chunks.ahead(index)));
                v.bad[span] =
                    copy_span::<S, E>(simd, head_dim, chunks.0[0], span, values.wrapping_add(span * span_words));
                v.next_span += 1;
            }
            let first = values.cast_const().wrapping_add(block.spans.start * span_words).cast::<u8>();
            let product = |columns: [usize; 4]| Product {
                num_tiles: block.spans.len(),
                a: weights.cast(),
                a_stride: WEIGHT_STRIDE * 2,
                a_step: ROW_BYTES,
                b: columns.map(|column| first.wrapping_add(column * TILE_BYTES)),
                b_stride: ROW_BYTES,
                b_step: num_columns * TILE_BYTES,
                continues: !block.is_first,
                to: columns.map(|column| sums.wrapping_add(column * LANES)),
                to_stride: row_len,
            };
            if block.has_two_tiles() {
                for column in (0..num_columns).step_by(2) {
                    product([column, column + 1, column, column]).multiply::<2, 2>();
                }
            } else {
                for column in (0..num_columns).step_by(4) {
                    // What is left is two columns, or none.
                    if column + 4 <= num_columns {
                        product([0, 1, 2, 3].map(|by| column + by)).multiply::<1, 4>();
                    } else {
                        product([column, column + 1, column, column]).multiply::<1, 2>();
                    }
                }
            }
            if !E::IS_SCALED {
                let ones = [ONES.0.as_ptr().cast(); 4];
                let to = [tiles.totals.as_mut_ptr(); 4];
                let totals = Product { b: ones, b_step: 0, to, to_stride: LANES, ..product([0; 4]) };
                if block.has_two_tiles() { totals.multiply::<2, 1>() } else { totals.multiply::<1, 1>() }
            }
        }
    }
}

/// Tokens of a span among `seen`, one bit each.
#[inline(always)]
fn bits_of(span: usize, seen: &Range<usize>) -> u32 {
    let within = |token: usize| token.saturating_sub(span * SPAN_LEN).min(SPAN_LEN);
    let below = |token: usize| ((1_u64 << within(token)) - 1) as u32;
    below(seen.end) & !below(seen.start)
}

impl Batch<'_> {
    /// Asks for keys of a vector of tokens, which are wanted later.
    #[inline(always)]
    fn fetch_k<E: Element>(&self, vector: &Vector) {
        if !vector.k.is_null() {
            let stride = self.layout.block_size * E::LANE_BYTES;
            // Of fp8, two steps of a short block are one line.
            let by = if stride < ROW_BYTES { ROW_BYTES / stride } else { 1 };
            for step in (0..self.head_dim / 2).step_by(by) {
                prefetch_early(vector.k.wrapping_add(step * stride));
            }
        }
    }

    /// Asks for values of a vector of tokens, as [`Self::fetch_k`].
    #[inline(always)]
    fn fetch_v<E: Element>(&self, vector: &Vector) {
        if !vector.v.is_null() {
            for line in 0..LANES / 2 * self.head_dim * E::LANE_BYTES / ROW_BYTES {
                prefetch_early(vector.v.wrapping_add(line * ROW_BYTES));
            }
        }
    }
}
