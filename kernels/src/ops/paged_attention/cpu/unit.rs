//! One unit of work: the rows of a task and one KV head, tile after tile.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use super::element::{Element, Floats8, Pairs, Quantized, Single, Widened, left_words};
use super::products::{Ahead, RowBlocks, Scores, Sums, max_rows};
use super::softmax::{by_vector, merge, softmax};
use super::work::Task;
use super::{Batch, Products, Scratch, TILE_LEN, TILE_VECTORS};
use crate::DType;
use crate::cpu::lanes::{LANES, Lanes, Vectorized, prefetch};
use crate::cpu::thread_pool::SharedMut;
use crate::ops::paged_attention::{CHUNK_LEN, first_visible};

/// One KV head of a task.
pub(super) struct Unit<'a> {
    pub(super) batch: &'a Batch<'a>,
    pub(super) task: &'a Task,
    pub(super) kv_head: usize,
    pub(super) scratch: &'a mut Scratch,
    pub(super) partials: &'a SharedMut<'a, f32>,
    pub(super) countdown: Option<&'a AtomicU32>,
}

impl Vectorized for Unit<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        #[cfg(target_arch = "x86_64")]
        if S::HAS_DOT_PAIRS && self.batch.products == Products::Tiles {
            if const { S::HAS_DOT_PAIRS } {
                match self.batch.layout.dtype {
                    DType::Bf16 => self.run_on_tiles::<S, Pairs>(simd),
                    _ => self.run_on_tiles::<S, Floats8<Pairs>>(simd),
                }
            }
            return;
        }
        let in_pairs = self.batch.products == Products::Pairs;
        match self.batch.layout.dtype {
            DType::I8 => self.run_with::<S, Quantized>(simd),
            DType::Bf16 if S::HAS_DOT_PAIRS && in_pairs => {
                if const { S::HAS_DOT_PAIRS } {
                    self.run_with::<S, Pairs>(simd);
                }
            }
            DType::Bf16 => self.run_with::<S, Widened>(simd),
            DType::F8E4M3 if S::HAS_DOT_PAIRS && in_pairs => {
                if const { S::HAS_DOT_PAIRS } {
                    self.run_with::<S, Floats8<Pairs>>(simd);
                }
            }
            DType::F8E4M3 => self.run_with::<S, Floats8<Widened>>(simd),
            _ => self.run_with::<S, Single>(simd),
        }
    }
}

impl Unit<'_> {
    #[inline(always)]
    fn run_with<S: Lanes, E: Element>(mut self, simd: S) {
        let Task { num_rows, chunk_start, chunk_end, .. } = *self.task;
        self.load_queries::<S, E>(simd);
        self.scratch.total.clear(num_rows, self.batch.row_len());
        let seq = self.batch.lists.seq(self.task.seq);
        // Where a chunk ends, what lies ahead is the next one.
        let visible = self.visible();
        let first = visible.start / TILE_LEN * TILE_LEN;
        let mut tiles = [first, first + TILE_LEN].map(|start| Tile::new::<E>(&self, seq.block_table, start, &visible));
        for chunk in chunk_start..chunk_end {
            self.compute_chunk::<S, E>(simd, chunk, &visible, &mut tiles);
            if self.is_later_part() {
                self.save_chunk(chunk);
            } else {
                self.merge_chunk(simd);
            }
        }
        self.finish(simd);
    }

    /// Positions that some row sees, of the task's chunks.
    #[inline(always)]
    pub(super) fn visible(&self) -> Range<usize> {
        let Task { row_start, num_rows, chunk_start, chunk_end, .. } = *self.task;
        let visible = self.batch.visible(self.batch.lists.seq(self.task.seq), row_start, num_rows);
        visible.start.max(chunk_start * CHUNK_LEN)..visible.end.min(chunk_end * CHUNK_LEN)
    }

    /// Whether the task is a part of a split, and not the first: each chunk's result is kept for itself.
    #[inline(always)]
    pub(super) fn is_later_part(&self) -> bool {
        self.task.split.is_some_and(|split| self.task.chunk_start != split.chunk_start)
    }

    /// Adds the result of a chunk to those before it.
    #[inline(always)]
    pub(super) fn merge_chunk<S: Lanes>(&mut self, simd: S) {
        let Scratch { chunk, total, .. } = &mut *self.scratch;
        let (sums, max, totals) = (&chunk.sums[..], &chunk.max[..], &chunk.total[..]);
        merge(simd, total, sums, max, totals, self.task.num_rows, self.batch.row_len());
    }

    /// Leaves the result of a later part's chunk where the last of the parts finds it.
    #[inline(always)]
    pub(super) fn save_chunk(&mut self, chunk: usize) {
        let Task { num_rows, chunk_start, .. } = *self.task;
        let state_len = self.batch.state_len(num_rows);
        let split = self.task.split.expect("a part of a split");
        let start = split.start(self.kv_head, chunk_start, state_len) + (chunk - chunk_start) * state_len;
        // SAFETY: the state of this chunk, rows and head, which nobody reads before the countdown.
        let out = unsafe { self.partials.slice_mut(start..start + state_len) };
        self.scratch.chunk.save(num_rows, out);
    }

    /// Writes what is in `scratch.total`; of a split, what all parts come to, when this is the last of them.
    #[inline(always)]
    pub(super) fn finish<S: Lanes>(&mut self, simd: S) {
        let Task { num_rows, chunk_start, split, .. } = *self.task;
        let Some(split) = split else {
            return self.write_out(simd);
        };
        let state_len = self.batch.state_len(num_rows);
        if !self.is_later_part() {
            let start = split.start(self.kv_head, chunk_start, state_len);
            // SAFETY: as in `save_chunk`.
            let out = unsafe { self.partials.slice_mut(start..start + state_len) };
            self.scratch.total.save(num_rows, out);
        }
        // Release: what was saved is seen by who counts to zero; acquire: that one sees all that was saved.
        let countdown = self.countdown.expect("a split has one");
        if countdown.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        let num_states = 1 + (split.chunk_end - split.chunk_start) - split.first_len;
        let start = split.start(self.kv_head, split.chunk_start, state_len);
        // SAFETY: all parts of these rows and this head are done, and no other thread counted to zero.
        let states = unsafe { self.partials.slice_mut(start..start + num_states * state_len) };
        let mut states = states.chunks_exact(state_len);
        self.scratch.total.load(num_rows, states.next().expect("the first part's"));
        for state in states {
            let (max, rest) = state.split_at(num_rows);
            let (totals, sums) = rest.split_at(num_rows);
            merge(simd, &mut self.scratch.total, sums, max, totals, num_rows, self.batch.row_len());
        }
        self.write_out(simd);
    }

    /// New token and query head of a row.
    #[inline(always)]
    fn token_and_head(&self, row: usize) -> (usize, usize) {
        let row = self.task.row_start + row;
        let group_len = self.batch.group_len;
        (
            self.batch.lists.cu_seqlens_q[self.task.seq] as usize + row / group_len,
            self.kv_head * group_len + row % group_len,
        )
    }

    #[inline(always)]
    pub(super) fn load_queries<S: Lanes, E: Element>(&mut self, simd: S) {
        let head_dim = self.batch.head_dim;
        for row in 0..self.task.num_rows {
            let (token, head) = self.token_and_head(row);
            let q = &self.batch.qkv[token * self.batch.qkv_len + head * head_dim..][..head_dim];
            let mut inverse = 1.0;
            if E::IS_SCALED {
                let (largest, is_finite) =
                    q.iter().fold((0.0_f32, true), |(max, ok), x| (max.max(x.abs()), ok && x.is_finite()));
                (inverse, self.scratch.q_scales[row]) = E::left_scale(largest, is_finite);
            }
            for (index, q) in q.chunks(LANES).enumerate() {
                let mut words = [0_u32; LANES];
                // SAFETY: 16 left factors take 16 words at most.
                unsafe {
                    let q = simd.load_slice(q, 0.0);
                    let q = if E::IS_SCALED { simd.mul(q, simd.splat(inverse)) } else { q };
                    E::store_left(simd, words.as_mut_ptr(), q);
                }
                let num_words = left_words::<E>(q.len());
                let start = row * left_words::<E>(head_dim) + index * left_words::<E>(LANES);
                self.scratch.q[start..start + num_words].copy_from_slice(&words[..num_words]);
            }
        }
    }

    /// Leaves the result of one chunk in `scratch.chunk`. `tiles` are the first that some row sees and the one behind it, and
    /// then the same of the next chunk; `visible` are positions that some row sees in all chunks of the task.
    #[inline(always)]
    fn compute_chunk<S: Lanes, E: Element>(
        &mut self,
        simd: S,
        chunk: usize,
        visible: &Range<usize>,
        tiles: &mut [Tile; 2],
    ) {
        let batch = self.batch;
        let (num_rows, row_len) = (self.task.num_rows, batch.row_len());
        self.scratch.chunk.clear(num_rows, row_len);
        self.scratch.lane_totals[..num_rows * LANES].fill(0.0);
        let seq = batch.lists.seq(self.task.seq);
        let end = visible.end.min((chunk + 1) * CHUNK_LEN);
        while tiles[0].start < end {
            let after_next = Tile::new::<E>(self, seq.block_table, tiles[1].start + TILE_LEN, visible);
            let tile = &tiles[0];
            // Rows that see a token of the tile: positions grow with rows.
            let row_of = |position: usize| {
                let token = position.saturating_sub(seq.first_position());
                (token * batch.group_len).saturating_sub(self.task.row_start).min(num_rows)
            };
            let row_start = row_of(tile.start);
            let row_end = batch.window.map_or(num_rows, |window| row_of(tile.start + TILE_LEN + window as usize - 1));
            if row_start < row_end {
                self.compute_tile::<S, E>(simd, tile, [&tiles[1], &after_next], row_start..row_end);
            }
            tiles.swap(0, 1);
            tiles[1] = after_next;
        }
        let Scratch { chunk, lane_totals, .. } = &mut *self.scratch;
        for (total, lanes) in chunk.total[..num_rows].iter_mut().zip(lane_totals.chunks_exact(LANES)) {
            *total = simd.sum(simd.load_slice(lanes, 0.0));
        }
    }

    #[inline(always)]
    fn compute_tile<S: Lanes, E: Element>(&mut self, simd: S, tile: &Tile, ahead: [&Tile; 2], rows: Range<usize>) {
        let batch = self.batch;
        let (head_dim, row_len) = (batch.head_dim, batch.row_len());
        let scratch = &mut *self.scratch;
        let q_words = left_words::<E>(head_dim);
        if E::IS_SCALED {
            tile.load_scales(scratch, batch.layout.block_size);
        }

        let is_whole = tile.visible.iter().all(|&visible| visible.1 > visible.0);
        for block in (RowBlocks { rows: rows.clone(), max_len: max_rows::<S>(is_whole) }) {
            let scores = Scores::<E> {
                // SAFETY: queries and scores of rows below MAX_ROWS.
                q: unsafe { scratch.q.as_ptr().add(block.start * q_words) },
                num_steps: head_dim / E::PACK,
                k: &tile.k,
                k_stride: batch.layout.block_size * E::LANE_BYTES,
                visible: &tile.visible,
                ahead: tiles_ahead(block.start == rows.start, ahead, |tile| &tile.k),
                // SAFETY: as above.
                scores: unsafe { scratch.scores.as_mut_ptr().add(block.start * TILE_LEN) },
                element: PhantomData,
            };
            scores.compute(simd, block.len(), is_whole);
        }

        let seq = batch.lists.seq(self.task.seq);
        let token_of = |row: usize| (self.task.row_start + row) / batch.group_len;
        let visible_to = |row: usize| {
            let position = seq.first_position() + token_of(row);
            let first = first_visible(position, batch.window).saturating_sub(tile.start).min(TILE_LEN);
            let end = (position + 1).saturating_sub(tile.start).min(TILE_LEN);
            first..end
        };
        softmax::<S, E>(simd, scratch, rows.clone(), batch.scale, visible_to);

        // Where all rows see the whole tile they are taken together, otherwise by token. Codes that are not seen
        // are multiplied with zero, which makes zero whatever they are.
        let all_see_all = visible_to(rows.start).end == TILE_LEN && visible_to(rows.end - 1).start == 0;
        let mut start = rows.start;
        while start < rows.end {
            let next_token = (token_of(start) + 1) * batch.group_len - self.task.row_start;
            let end = if all_see_all || E::IS_SCALED { rows.end } else { next_token.min(rows.end) };
            let visible = if E::IS_SCALED {
                tile.visible.map(|(first, end)| if first < end { (0, LANES) } else { (0, 0) })
            } else {
                by_vector(&visible_to(start))
            };
            let has_pairs_of_vectors = head_dim.is_multiple_of(2 * LANES);
            for block in (RowBlocks { rows: start..end, max_len: max_rows::<S>(has_pairs_of_vectors) }) {
                let sums = Sums::<E> {
                    // SAFETY: weights of rows below MAX_ROWS.
                    weights: unsafe { scratch.weights.as_ptr().add(block.start * left_words::<E>(TILE_LEN)) },
                    factors: &scratch.factors[block.clone()],
                    weight_scales: &scratch.weight_scales[block.clone()],
                    v: &tile.v,
                    visible: &visible,
                    ahead: tiles_ahead(block.start == rows.start, ahead, |tile| &tile.v),
                    head_dim,
                    dim: 0,
                    // SAFETY: sums of rows below MAX_ROWS; `row_len` is head_dim rounded up to whole vectors.
                    sums: unsafe { scratch.chunk.sums.as_mut_ptr().add(block.start * row_len) },
                    row_len,
                    element: PhantomData,
                };
                sums.compute(simd, block.len());
            }
            start = end;
        }
    }

    #[inline(always)]
    fn write_out<S: Lanes>(&mut self, simd: S) {
        let (head_dim, row_len) = (self.batch.head_dim, self.batch.row_len());
        let q_len = self.batch.num_kv_heads * self.batch.group_len * head_dim;
        for row in 0..self.task.num_rows {
            let (token, head) = self.token_and_head(row);
            let start = token * q_len + head * head_dim;
            // SAFETY: a row and head belong to one task and head, and only one unit writes them.
            let out = unsafe { self.batch.out.slice_mut(start..start + head_dim) };
            let total = simd.splat(self.scratch.total.total[row]);
            let sums = &self.scratch.total.sums[row * row_len..][..row_len];
            for (out, sums) in out.chunks_mut(LANES).zip(sums.chunks_exact(LANES)) {
                let x = simd.div(simd.load_slice(sums, 0.0), total);
                simd.store_slice(out, simd.add(x, simd.splat(0.0)));
            }
        }
    }
}

/// The part that `of` takes of the tiles ahead that some row sees, for the first of the products of a tile only.
#[inline(always)]
fn tiles_ahead<'a>(
    is_first: bool,
    tiles: [&'a Tile; 2],
    of: impl Fn(&'a Tile) -> &'a [*const u8; TILE_VECTORS],
) -> Ahead<'a> {
    let [next, after_next] = tiles.map(|tile| (is_first && tile.is_there).then(|| of(tile)));
    Ahead { next, after_next }
}

/// K and V of 16 tokens of a block.
#[derive(Clone, Copy)]
pub(super) struct Vector {
    /// First lanes.
    pub(super) k: *const u8,
    pub(super) v: *const u8,
    /// Scales of the keys; those of the values lie `block_size` later.
    pub(super) scales: *const f32,
}

impl Vector {
    pub(super) const NONE: Self = Self { k: std::ptr::null(), v: std::ptr::null(), scales: std::ptr::null() };

    /// Those from `position` on, a multiple of 16 that the table has a block for.
    #[inline(always)]
    pub(super) fn at<E: Element>(batch: &Batch<'_>, kv_head: usize, block_table: &[u32], position: usize) -> Self {
        let layout = &batch.layout;
        let block = block_table[position / layout.block_size] as usize;
        let offset = position % layout.block_size;
        let size = layout.dtype.size();
        let head = layout.head_index(batch.layer, block, kv_head) * size;
        let kv = &batch.kv[head..head + layout.head_bytes()];
        let v_start = layout.v_offset() * size;
        let mut vector = Self::NONE;
        // SAFETY: K of this head and block lie from the start of `kv`, V behind them, scales behind both; the offset is
        // a multiple of 16 below the block size.
        unsafe {
            vector.k = kv.as_ptr().add(offset * E::LANE_BYTES);
            vector.v = kv.as_ptr().add(v_start + offset * layout.head_dim * size);
            if E::IS_SCALED {
                vector.scales = kv.as_ptr().add(2 * v_start).cast::<f32>().add(offset);
                prefetch(vector.scales.cast());
                prefetch(vector.scales.add(layout.block_size).cast());
            }
        }
        vector
    }
}

/// K and V of the tokens of a tile.
struct Tile {
    /// Position of its first token.
    start: usize,
    /// Whether some row sees any of it.
    is_there: bool,
    /// First lane of each vector of tokens, and of its values. Those that no row sees are null.
    k: [*const u8; TILE_VECTORS],
    v: [*const u8; TILE_VECTORS],
    /// Scales of the vector's keys; those of its values lie `block_size` later.
    scales: [*const f32; TILE_VECTORS],
    /// Tokens of each vector that some row sees: `start..end` of 16.
    visible: [(usize, usize); TILE_VECTORS],
}

impl Tile {
    /// The tile at `start`; `visible` are positions that some row sees.
    #[inline(always)]
    fn new<E: Element>(unit: &Unit<'_>, block_table: &[u32], start: usize, visible: &Range<usize>) -> Self {
        let batch = unit.batch;
        let mut tile = Self {
            start,
            is_there: false,
            k: [std::ptr::null(); TILE_VECTORS],
            v: [std::ptr::null(); TILE_VECTORS],
            scales: [std::ptr::null(); TILE_VECTORS],
            visible: [(0, 0); TILE_VECTORS],
        };
        for index in 0..TILE_VECTORS {
            let position = start + index * LANES;
            let limit = |end: usize| end.saturating_sub(position).min(LANES);
            let (first, end) = (limit(visible.start), limit(visible.end));
            if first >= end {
                continue;
            }
            tile.is_there = true;
            tile.visible[index] = (first, end);
            let vector = Vector::at::<E>(batch, unit.kv_head, block_table, position);
            (tile.k[index], tile.v[index], tile.scales[index]) = (vector.k, vector.v, vector.scales);
        }
        tile
    }

    /// Scales of the tokens that some row sees, and others, to the scratch.
    #[inline(always)]
    fn load_scales(&self, scratch: &mut Scratch, block_size: usize) {
        for (index, &scales) in self.scales.iter().enumerate() {
            if scales.is_null() {
                continue;
            }
            let to = index * LANES..(index + 1) * LANES;
            // SAFETY: 16 tokens of the vector have their scales side by side, those of K before those of V.
            unsafe {
                scratch.k_scales[to.clone()].copy_from_slice(std::slice::from_raw_parts(scales, LANES));
                scratch.v_scales[to].copy_from_slice(std::slice::from_raw_parts(scales.add(block_size), LANES));
            }
        }
    }
}
