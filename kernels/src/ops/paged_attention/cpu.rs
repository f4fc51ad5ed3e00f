//! Attention as two small matrix products per tile of 64 tokens, with a running softmax between them.
//!
//! One unit of work is a KV head, up to [`MAX_ROWS`] rows, and a run of chunks. A row is one query head of one new token;
//! rows of a sequence are ordered by token, then by head of the group, so that all queries that share K and V go over
//! them together, in a decode step and in a prefill alike.
//!
//! Why a row has the same bits whatever is computed beside it:
//! * Chunks and tiles start at multiples of their lengths in the context. A score is one chain of products over
//!   dimensions, and the sum over a tile's tokens one chain over tokens, from zero.
//! * Tokens that a row does not see take no part in its sums, not even with weight zero: a NaN among them stays theirs.
//!   A chunk that a row does not see leaves its running total as it is: times one, plus zero. Only the sign of a zero
//!   could differ, and the last addition of zero removes it.
//! * A chunk's result is the same whether it goes to the running total at once or through memory, and chunks are
//!   merged in ascending order.
//!
//! Fetching the next tile's K and V ahead by hand was no faster than what the processor does by itself (11.5 GB/s a core
//! either way on Zen 4, where plain reading gives 13.5).
//!
//! Who owns what while a batch is computed: a worker its [`Scratch`]; a unit its part of `out`, or its part of `partials`
//! until it counts down its `countdown`; who counts it to zero, all parts of that row tile and head.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{CHUNK_LEN, Lens, Lists, PagedAttention, SeqOfBatch, first_visible};
use crate::cpu::CpuBackend;
use crate::cpu::buffer::AlignedBytes;
use crate::cpu::lanes::{LANES, Lanes, Vectorized, vectorize};
use crate::cpu::math::exp2;
use crate::cpu::thread_pool::SharedMut;
use crate::kv_layout::MAX_HEAD_DIM;
use crate::{DType, KernelError, KvLayout};

/// Rows of a unit. More would use K and V more often per load; these fit the second-level cache beside them.
const MAX_ROWS: usize = 64;

/// Tokens of a tile.
const TILE_LEN: usize = 64;

/// Vectors of tokens in a tile. A vector never crosses a block.
const TILE_VECTORS: usize = TILE_LEN / LANES;

/// Numbers kept for units of a split row tile, in all: 4 MiB. What finds no room is not split.
const PARTIAL_NUMBERS: usize = 1 << 20;

/// Row tiles times heads that can be split in one batch.
const MAX_SPLITS: usize = 1024;

/// Tasks that there is room for from the start: 8192 sequences, or prompts of 8192 tokens of 32 heads and a few hundred
/// sequences.
const NUM_TASKS: usize = 8192;

/// Units that a thread should find on average, so that all finish at about the same time.
const UNITS_PER_THREAD: usize = 3;

/// Working memory: taken once; only a batch of more than [`NUM_TASKS`] tasks, once, takes more for the list of them.
pub(crate) struct Workspace {
    scratches: Vec<Box<Scratch>>,
    partials: AlignedBytes,
    countdowns: Vec<AtomicU32>,
    tasks: Vec<Task>,
}

impl Workspace {
    pub(crate) fn new(num_threads: usize) -> Result<Self, KernelError> {
        // SAFETY: a scratch is plain numbers, for which zero bits are a value.
        let scratch = || unsafe { Box::<Scratch>::new_zeroed().assume_init() };
        Ok(Self {
            scratches: (0..num_threads).map(|_| scratch()).collect(),
            partials: AlignedBytes::zeroed("attention", PARTIAL_NUMBERS * size_of::<f32>())?,
            countdowns: (0..MAX_SPLITS).map(|_| AtomicU32::new(0)).collect(),
            tasks: Vec::with_capacity(NUM_TASKS),
        })
    }
}

/// Units that differ in the KV head only.
#[derive(Clone, Copy)]
struct Task {
    seq: usize,
    /// First row, and how many.
    row_start: usize,
    num_rows: usize,
    chunk_start: usize,
    chunk_end: usize,
    split: Option<Split>,
}

/// A task that is one of several for the same rows.
#[derive(Clone, Copy)]
struct Split {
    /// First and last chunk of all of them.
    chunk_start: usize,
    chunk_end: usize,
    num_parts: u32,
    /// Chunks of the first part, which leaves one result for all of them.
    first_len: usize,
    /// In `partials`, for head 0, and from head to head.
    partials_start: usize,
    head_stride: usize,
    /// In `countdowns`, for head 0.
    countdown: usize,
}

impl Split {
    /// Index in `partials` of what a part that starts at `chunk` leaves; each further chunk is one `state_len` later.
    fn start(&self, kv_head: usize, chunk: usize, state_len: usize) -> usize {
        let slot = if chunk == self.chunk_start { 0 } else { chunk - self.chunk_start - self.first_len + 1 };
        self.partials_start + kv_head * self.head_stride + slot * state_len
    }
}

/// What all units share.
struct Batch<'a> {
    qkv: &'a [f32],
    qkv_len: usize,
    lists: Lists<'a>,
    num_kv_heads: usize,
    group_len: usize,
    head_dim: usize,
    /// Scores are powers of two: one multiplication for the scale and for the base.
    scale: f32,
    window: Option<u32>,
    layout: KvLayout,
    layer: usize,
    /// In units of 4 bytes: one f32 or a pair of bf16.
    kv: &'a [u32],
    out: SharedMut<'a, f32>,
}

pub(crate) fn paged_attention(
    backend: &mut CpuBackend,
    args: PagedAttention<'_, CpuBackend>,
) -> Result<(), KernelError> {
    const OP: &str = PagedAttention::<CpuBackend>::OP;
    let layout = *args.kv.layout();
    let lens = Lens {
        qkv: args.qkv.len(),
        cu_seqlens_q: args.cu_seqlens_q.len(),
        context_lens: args.context_lens.len(),
        rows: args.rows.len(),
        out: args.out.len(),
    };
    args.check(lens, &layout)?;
    let lists = Lists {
        cu_seqlens_q: &args.cu_seqlens_q.u32(OP, "cu_seqlens_q")?[..args.num_seqs + 1],
        context_lens: &args.context_lens.u32(OP, "context_lens")?[..args.num_seqs],
        rows: &args.rows.u32(OP, "rows")?[..args.num_seqs],
        block_tables: args.block_tables.u32(OP, "block_tables")?,
        max_num_blocks: args.max_num_blocks,
    };
    args.check_lists(&lists, &layout)?;
    let (shape, num_tokens) = (args.shape, args.num_tokens);
    let batch = Batch {
        qkv: &args.qkv.f32(OP, "qkv")?[..num_tokens * shape.qkv_len()],
        qkv_len: shape.qkv_len(),
        lists,
        num_kv_heads: shape.num_kv_heads,
        group_len: shape.group_len(),
        head_dim: shape.head_dim,
        scale: args.scale * std::f32::consts::LOG2_E,
        window: args.window,
        layout,
        layer: args.layer,
        kv: args.kv.words(),
        out: SharedMut::new(&mut args.out.f32_mut(OP, "out")?[..num_tokens * shape.q_len()]),
    };

    let CpuBackend { isa, pool, attention_workspace: Workspace { scratches, partials, countdowns, tasks }, .. } =
        backend;
    plan(&batch, pool.num_threads(), tasks, countdowns);
    let tasks = &tasks[..];
    let num_units = tasks.len() * batch.num_kv_heads;
    let partials = SharedMut::new(partials.view_mut::<f32>());
    let scratches = SharedMut::new(scratches);
    let isa = *isa;
    pool.run_units(num_units, &|worker, index| {
        // From the end: prefills stand there, and their last rows see most.
        let index = num_units - 1 - index;
        let (task, kv_head) = (&tasks[index / batch.num_kv_heads], index % batch.num_kv_heads);
        let countdown = task.split.map(|split| &countdowns[split.countdown + kv_head]);
        // SAFETY: each worker has its own.
        let scratch = &mut *unsafe { scratches.slice_mut(worker..worker + 1) }[0];
        vectorize(isa, Unit { batch: &batch, task, kv_head, scratch, partials: &partials, countdown });
    });
    Ok(())
}

/// Cuts the batch into tasks. How, changes no bit of the result.
fn plan(batch: &Batch<'_>, num_threads: usize, tasks: &mut Vec<Task>, countdowns: &[AtomicU32]) {
    tasks.clear();
    let num_seqs = batch.lists.rows.len();
    let tiles = |seq: SeqOfBatch<'_>| {
        let num_rows = seq.q_len * batch.group_len;
        (0..num_rows).step_by(MAX_ROWS).map(move |row_start| (row_start, MAX_ROWS.min(num_rows - row_start)))
    };
    // Scores of a tile of rows: what its time grows with.
    let cost = |seq: SeqOfBatch<'_>, row_start: usize, num_rows: usize| {
        let visible = batch.visible(seq, row_start, num_rows);
        (visible.len() * num_rows) as u64
    };
    let can_split = num_threads > 1;
    let mut total = 0;
    if can_split {
        for seq in (0..num_seqs).map(|index| batch.lists.seq(index)) {
            total += tiles(seq).map(|(row_start, num_rows)| cost(seq, row_start, num_rows)).sum::<u64>();
        }
    }
    let target = total * batch.num_kv_heads as u64 / (num_threads * UNITS_PER_THREAD) as u64 + 1;
    let (mut next_partial, mut next_countdown) = (0, 0);
    for index in 0..num_seqs {
        let seq = batch.lists.seq(index);
        for (row_start, num_rows) in tiles(seq) {
            let visible = batch.visible(seq, row_start, num_rows);
            let (chunk_start, chunk_end) = (visible.start / CHUNK_LEN, visible.end.div_ceil(CHUNK_LEN));
            let whole = Task { seq: index, row_start, num_rows, chunk_start, chunk_end, split: None };
            let num_chunks = chunk_end - chunk_start;
            let mut num_parts = 1;
            if can_split {
                num_parts = (cost(seq, row_start, num_rows).div_ceil(target) as usize).min(num_chunks);
            }
            if num_parts == 1 {
                tasks.push(whole);
                continue;
            }
            let part_len = num_chunks.div_ceil(num_parts);
            let num_parts = num_chunks.div_ceil(part_len);
            let head_stride = (1 + num_chunks - part_len) * batch.state_len(num_rows);
            let split = Split {
                chunk_start,
                chunk_end,
                num_parts: num_parts as u32,
                first_len: part_len,
                partials_start: next_partial,
                head_stride,
                countdown: next_countdown,
            };
            let partials_end = next_partial + head_stride * batch.num_kv_heads;
            let countdowns_end = next_countdown + batch.num_kv_heads;
            if partials_end > PARTIAL_NUMBERS || countdowns_end > countdowns.len() {
                tasks.push(whole);
                continue;
            }
            for countdown in &countdowns[next_countdown..countdowns_end] {
                countdown.store(split.num_parts, Ordering::Relaxed);
            }
            (next_partial, next_countdown) = (partials_end, countdowns_end);
            for start in (chunk_start..chunk_end).step_by(part_len) {
                let chunk_end = (start + part_len).min(chunk_end);
                tasks.push(Task { chunk_start: start, chunk_end, split: Some(split), ..whole });
            }
        }
    }
}

impl Batch<'_> {
    /// Positions that the rows of a tile see, all together.
    fn visible(&self, seq: SeqOfBatch<'_>, row_start: usize, num_rows: usize) -> Range<usize> {
        let first = seq.first_position() + row_start / self.group_len;
        let last = seq.first_position() + (row_start + num_rows - 1) / self.group_len;
        first_visible(first, self.window)..last + 1
    }

    /// Floats between two rows of sums: whole vectors.
    fn row_len(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Numbers of the result of one chunk: per row the maximum, the sum of weights, the weighted sums.
    fn state_len(&self, num_rows: usize) -> usize {
        num_rows * (2 + self.row_len())
    }
}

/// Running softmax of some rows.
#[repr(C, align(64))]
struct State {
    /// `[num_rows][row_len]`
    sums: [f32; MAX_ROWS * MAX_HEAD_DIM],
    max: [f32; MAX_ROWS],
    /// Sums of weights.
    total: [f32; MAX_ROWS],
}

/// Working memory of a thread; fixed size, whatever the model.
#[repr(C, align(64))]
struct Scratch {
    /// Queries in the type of the cache, `[num_rows][head_dim]`.
    q: [u32; MAX_ROWS * MAX_HEAD_DIM],
    /// `[num_rows][TILE_LEN]`
    scores: [f32; MAX_ROWS * TILE_LEN],
    /// In the type of the cache, `[num_rows][TILE_LEN]`.
    weights: [u32; MAX_ROWS * TILE_LEN],
    /// Sums of weights by lane, `[num_rows][LANES]`; they become `State::total` at the end of a chunk.
    lane_totals: [f32; MAX_ROWS * LANES],
    /// What a row's sums so far are multiplied by before this tile's are added.
    factors: [f32; MAX_ROWS],
    chunk: State,
    total: State,
}

/// Numbers as the cache holds them, in words of 4 bytes.
trait Element {
    /// Numbers in a word.
    const PACK: usize;
    /// Sixteen words.
    type V<S: Lanes>: Copy;
    /// # Safety
    /// 16 words can be read.
    unsafe fn load<S: Lanes>(simd: S, words: *const u32) -> Self::V<S>;
    /// # Safety
    /// `len` words can be read; `len` is at most 16.
    unsafe fn load_first<S: Lanes>(simd: S, words: *const u32, len: usize) -> Self::V<S>;
    /// Each word and `bits`.
    fn keep<S: Lanes>(simd: S, v: Self::V<S>, bits: u32) -> Self::V<S>;
    fn splat<S: Lanes>(simd: S, word: u32) -> Self::V<S>;
    fn mul_add<S: Lanes>(simd: S, acc: S::F, a: Self::V<S>, b: Self::V<S>) -> S::F;
    /// Rounds to the type and back.
    fn round<S: Lanes>(simd: S, x: S::F) -> S::F;
    /// Writes 16 numbers.
    /// # Safety
    /// `16 / PACK` words can be written.
    unsafe fn store<S: Lanes>(simd: S, words: *mut u32, x: S::F);
}

/// f32.
struct Single;

impl Element for Single {
    const PACK: usize = 1;
    type V<S: Lanes> = S::F;
    #[inline(always)]
    unsafe fn load<S: Lanes>(simd: S, words: *const u32) -> S::F {
        // SAFETY: by contract.
        unsafe { simd.load(words.cast()) }
    }
    #[inline(always)]
    unsafe fn load_first<S: Lanes>(simd: S, words: *const u32, len: usize) -> S::F {
        // SAFETY: by contract.
        unsafe { simd.load_first(words.cast(), len, 0.0) }
    }
    #[inline(always)]
    fn keep<S: Lanes>(_: S, v: S::F, _: u32) -> S::F {
        v
    }
    #[inline(always)]
    fn splat<S: Lanes>(simd: S, word: u32) -> S::F {
        simd.splat(f32::from_bits(word))
    }
    #[inline(always)]
    fn mul_add<S: Lanes>(simd: S, acc: S::F, a: S::F, b: S::F) -> S::F {
        simd.fma(a, b, acc)
    }
    #[inline(always)]
    fn round<S: Lanes>(_: S, x: S::F) -> S::F {
        x
    }
    #[inline(always)]
    unsafe fn store<S: Lanes>(simd: S, words: *mut u32, x: S::F) {
        // SAFETY: by contract.
        unsafe { simd.store(words.cast(), x) }
    }
}

/// bf16, two in a word.
struct Pairs;

impl Element for Pairs {
    const PACK: usize = 2;
    type V<S: Lanes> = S::P;
    #[inline(always)]
    unsafe fn load<S: Lanes>(simd: S, words: *const u32) -> S::P {
        // SAFETY: by contract.
        unsafe { simd.load_pairs(words) }
    }
    #[inline(always)]
    unsafe fn load_first<S: Lanes>(simd: S, words: *const u32, len: usize) -> S::P {
        // SAFETY: by contract.
        unsafe { simd.load_pairs_first(words, len) }
    }
    #[inline(always)]
    fn keep<S: Lanes>(simd: S, v: S::P, bits: u32) -> S::P {
        simd.and_pairs(v, bits)
    }
    #[inline(always)]
    fn splat<S: Lanes>(simd: S, word: u32) -> S::P {
        simd.splat_pair(word)
    }
    #[inline(always)]
    fn mul_add<S: Lanes>(simd: S, acc: S::F, a: S::P, b: S::P) -> S::F {
        simd.dot_pairs(acc, a, b)
    }
    #[inline(always)]
    fn round<S: Lanes>(simd: S, x: S::F) -> S::F {
        simd.round_bf16(x)
    }
    #[inline(always)]
    unsafe fn store<S: Lanes>(simd: S, words: *mut u32, x: S::F) {
        // SAFETY: by contract.
        unsafe { simd.store_bf16(words.cast(), x) }
    }
}

/// One KV head of a task.
struct Unit<'a> {
    batch: &'a Batch<'a>,
    task: &'a Task,
    kv_head: usize,
    scratch: &'a mut Scratch,
    partials: &'a SharedMut<'a, f32>,
    countdown: Option<&'a AtomicU32>,
}

impl Vectorized for Unit<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        match self.batch.layout.dtype {
            DType::Bf16 => self.run_with::<S, Pairs>(simd),
            _ => self.run_with::<S, Single>(simd),
        }
    }
}

/// K and V of the tokens of a tile.
struct Tile {
    /// First word of each vector of tokens, and of its values. Those that no row sees are not there.
    k: [*const u32; TILE_VECTORS],
    v: [*const u32; TILE_VECTORS],
    /// Tokens of each vector that some row sees: `start..end` of 16.
    visible: [(usize, usize); TILE_VECTORS],
}

impl Unit<'_> {
    #[inline(always)]
    fn run_with<S: Lanes, E: Element>(mut self, simd: S) {
        let Task { num_rows, chunk_start, chunk_end, split, .. } = *self.task;
        let state_len = self.batch.state_len(num_rows);
        self.load_queries::<S, E>(simd);
        let is_later_part = split.is_some_and(|split| chunk_start != split.chunk_start);
        self.scratch.total.clear(num_rows, self.batch.row_len());
        for chunk in chunk_start..chunk_end {
            self.compute_chunk::<S, E>(simd, chunk);
            if is_later_part {
                let split = split.expect("a part of a split");
                let start = split.start(self.kv_head, chunk_start, state_len) + (chunk - chunk_start) * state_len;
                // SAFETY: the state of this chunk, rows and head, which nobody reads before the countdown.
                let out = unsafe { self.partials.slice_mut(start..start + state_len) };
                self.scratch.chunk.save(num_rows, out);
            } else {
                let Scratch { chunk, total, .. } = &mut *self.scratch;
                let (sums, max, totals) = (&chunk.sums[..], &chunk.max[..], &chunk.total[..]);
                merge(simd, total, sums, max, totals, num_rows, self.batch.row_len());
            }
        }
        let Some(split) = split else {
            return self.write_out(simd);
        };
        if !is_later_part {
            let start = split.start(self.kv_head, chunk_start, state_len);
            // SAFETY: as above.
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
    fn load_queries<S: Lanes, E: Element>(&mut self, simd: S) {
        let head_dim = self.batch.head_dim;
        let stride = head_dim / E::PACK;
        for row in 0..self.task.num_rows {
            let (token, head) = self.token_and_head(row);
            let q = &self.batch.qkv[token * self.batch.qkv_len + head * head_dim..][..head_dim];
            for (index, q) in q.chunks(LANES).enumerate() {
                let mut words = [0_u32; LANES];
                // SAFETY: 16 numbers take 16 words at most.
                unsafe { E::store(simd, words.as_mut_ptr(), simd.load_slice(q, 0.0)) };
                let num_words = q.len() / E::PACK;
                let start = row * stride + index * (LANES / E::PACK);
                self.scratch.q[start..start + num_words].copy_from_slice(&words[..num_words]);
            }
        }
    }

    /// Leaves the result of one chunk in `scratch.chunk`.
    #[inline(always)]
    fn compute_chunk<S: Lanes, E: Element>(&mut self, simd: S, chunk: usize) {
        let batch = self.batch;
        let (num_rows, row_len) = (self.task.num_rows, batch.row_len());
        self.scratch.chunk.clear(num_rows, row_len);
        self.scratch.lane_totals[..num_rows * LANES].fill(0.0);
        let seq = batch.lists.seq(self.task.seq);
        let visible = batch.visible(seq, self.task.row_start, num_rows);
        let start = visible.start.max(chunk * CHUNK_LEN);
        let end = visible.end.min((chunk + 1) * CHUNK_LEN);
        let mut tile_start = start / TILE_LEN * TILE_LEN;
        while tile_start < end {
            let tile = Tile::new(batch, seq.block_table, self.kv_head, tile_start, start..end);
            // Rows that see a token of the tile: positions grow with rows.
            let row_of = |position: usize| {
                let token = position.saturating_sub(seq.first_position());
                (token * batch.group_len).saturating_sub(self.task.row_start).min(num_rows)
            };
            let row_start = row_of(tile_start);
            let row_end = batch.window.map_or(num_rows, |window| row_of(tile_start + TILE_LEN + window as usize - 1));
            if row_start < row_end {
                self.compute_tile::<S, E>(simd, &tile, tile_start, row_start..row_end);
            }
            tile_start += TILE_LEN;
        }
        let Scratch { chunk, lane_totals, .. } = &mut *self.scratch;
        for (total, lanes) in chunk.total[..num_rows].iter_mut().zip(lane_totals.chunks_exact(LANES)) {
            *total = simd.sum(simd.load_slice(lanes, 0.0));
        }
    }

    #[inline(always)]
    fn compute_tile<S: Lanes, E: Element>(&mut self, simd: S, tile: &Tile, tile_start: usize, rows: Range<usize>) {
        let batch = self.batch;
        let (head_dim, row_len) = (batch.head_dim, batch.row_len());
        let scratch = &mut *self.scratch;
        let num_steps = head_dim / E::PACK;

        let is_whole = tile.visible.iter().all(|&visible| visible.1 > visible.0);
        for block in RowBlocks::new(rows.clone(), S::MAX_ROWS) {
            let scores = Scores::<E> {
                // SAFETY: queries and scores of rows below MAX_ROWS.
                q: unsafe { scratch.q.as_ptr().add(block.start * num_steps) },
                num_steps,
                k: &tile.k,
                k_stride: batch.layout.block_size,
                visible: &tile.visible,
                // SAFETY: as above.
                scores: unsafe { scratch.scores.as_mut_ptr().add(block.start * TILE_LEN) },
                element: std::marker::PhantomData,
            };
            scores.dispatch(simd, block.len(), is_whole && S::MAX_COLS == TILE_VECTORS);
        }

        let seq = batch.lists.seq(self.task.seq);
        let token_of = |row: usize| (self.task.row_start + row) / batch.group_len;
        let visible_to = |row: usize| {
            let position = seq.first_position() + token_of(row);
            let first = first_visible(position, batch.window).saturating_sub(tile_start).min(TILE_LEN);
            let end = (position + 1).saturating_sub(tile_start).min(TILE_LEN);
            first..end
        };
        for row in rows.clone() {
            softmax_row::<S, E>(simd, scratch, row, batch.scale, visible_to(row));
        }

        // Where all rows see the whole tile they are taken together, otherwise by token.
        let all_see_all = visible_to(rows.start).end == TILE_LEN && visible_to(rows.end - 1).start == 0;
        let mut start = rows.start;
        while start < rows.end {
            let next_token = (token_of(start) + 1) * batch.group_len - self.task.row_start;
            let end = if all_see_all { rows.end } else { next_token.min(rows.end) };
            let visible = by_vector(&visible_to(start));
            for block in RowBlocks::new(start..end, S::MAX_ROWS) {
                let mut dim = 0;
                while dim < head_dim {
                    let num_vectors = (head_dim - dim) / LANES;
                    let num_vectors = if num_vectors >= S::MAX_COLS { S::MAX_COLS } else { num_vectors.min(1) };
                    let sums = Sums::<E> {
                        // SAFETY: weights of rows below MAX_ROWS.
                        weights: unsafe { scratch.weights.as_ptr().add(block.start * (TILE_LEN / E::PACK)) },
                        factors: &scratch.factors[block.clone()],
                        v: &tile.v,
                        visible: &visible,
                        v_stride: head_dim,
                        dim,
                        // SAFETY: sums of rows below MAX_ROWS; `row_len` is head_dim rounded up to whole vectors.
                        sums: unsafe { scratch.chunk.sums.as_mut_ptr().add(block.start * row_len + dim) },
                        row_len,
                        element: std::marker::PhantomData,
                    };
                    sums.dispatch(simd, block.len(), num_vectors, head_dim - dim);
                    dim += num_vectors.max(1) * LANES;
                }
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

impl State {
    #[inline(always)]
    fn clear(&mut self, num_rows: usize, row_len: usize) {
        self.sums[..num_rows * row_len].fill(0.0);
        self.max[..num_rows].fill(f32::NEG_INFINITY);
        self.total[..num_rows].fill(0.0);
    }

    #[inline(always)]
    fn save(&self, num_rows: usize, out: &mut [f32]) {
        let (max, rest) = out.split_at_mut(num_rows);
        let (total, sums) = rest.split_at_mut(num_rows);
        max.copy_from_slice(&self.max[..num_rows]);
        total.copy_from_slice(&self.total[..num_rows]);
        sums.copy_from_slice(&self.sums[..sums.len()]);
    }

    #[inline(always)]
    fn load(&mut self, num_rows: usize, state: &[f32]) {
        let (max, rest) = state.split_at(num_rows);
        let (total, sums) = rest.split_at(num_rows);
        self.max[..num_rows].copy_from_slice(max);
        self.total[..num_rows].copy_from_slice(total);
        self.sums[..sums.len()].copy_from_slice(sums);
    }
}

/// Tokens `visible` of a tile, as tokens of each of its vectors.
#[inline(always)]
fn by_vector(visible: &Range<usize>) -> [(usize, usize); TILE_VECTORS] {
    let mut parts = [(0, 0); TILE_VECTORS];
    for (index, part) in parts.iter_mut().enumerate() {
        let limit = |token: usize| token.saturating_sub(index * LANES).min(LANES);
        *part = (limit(visible.start), limit(visible.end));
    }
    parts
}

/// Adds the result of the next chunk to those before it.
#[inline(always)]
fn merge<S: Lanes>(
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

/// Turns a row's scores of a tile into weights and brings its running maximum and totals up to date.
#[inline(always)]
fn softmax_row<S: Lanes, E: Element>(simd: S, scratch: &mut Scratch, row: usize, scale: f32, visible: Range<usize>) {
    let scores = &scratch.scores[row * TILE_LEN..][..TILE_LEN];
    let scale = simd.splat(scale);
    let mut x = [simd.splat(f32::NEG_INFINITY); TILE_VECTORS];
    if visible.start == 0 && visible.end == TILE_LEN {
        for (x, scores) in x.iter_mut().zip(scores.chunks_exact(LANES)) {
            *x = simd.mul(simd.load_slice(scores, 0.0), scale);
        }
    } else {
        for ((x, scores), (start, end)) in x.iter_mut().zip(scores.chunks_exact(LANES)).zip(by_vector(&visible)) {
            let mask = simd.mask_range(start, end);
            // What lies in the other lanes may be anything, NaN included.
            *x = simd.select(mask, simd.mul(simd.load_slice(scores, 0.0), scale), *x);
        }
    }
    let tile_max = simd.max_lane(simd.max(simd.max(x[0], x[1]), simd.max(x[2], x[3])));
    let old_max = scratch.chunk.max[row];
    let new_max = if tile_max > old_max { tile_max } else { old_max };
    scratch.chunk.max[row] = new_max;
    let old_factor = factor(simd, old_max, new_max);
    scratch.factors[row] = old_factor;
    // A row that has seen nothing yet has weights 2^(-inf - 0) = 0.
    let base = simd.splat(if new_max == f32::NEG_INFINITY { 0.0 } else { new_max });
    let weights = &mut scratch.weights[row * (TILE_LEN / E::PACK)..][..TILE_LEN / E::PACK];
    for (x, weights) in x.iter_mut().zip(weights.chunks_exact_mut(LANES / E::PACK)) {
        *x = E::round(simd, exp2(simd, simd.sub(*x, base)));
        // SAFETY: room for 16 numbers. Rounding again changes nothing.
        unsafe { E::store(simd, weights.as_mut_ptr(), *x) };
    }
    let lanes = &mut scratch.lane_totals[row * LANES..][..LANES];
    let tile_total = simd.add(simd.add(x[0], x[1]), simd.add(x[2], x[3]));
    simd.store_slice(lanes, simd.fma(simd.load_slice(lanes, 0.0), simd.splat(old_factor), tile_total));
}

impl Tile {
    /// The tile at `start`; `visible` are positions that some row sees in this chunk.
    #[inline(always)]
    fn new(batch: &Batch<'_>, block_table: &[u32], kv_head: usize, start: usize, visible: Range<usize>) -> Self {
        let layout = &batch.layout;
        let words = |index: usize| index * layout.dtype.size() / 4;
        let mut tile = Self {
            k: [std::ptr::null(); TILE_VECTORS],
            v: [std::ptr::null(); TILE_VECTORS],
            visible: [(0, 0); TILE_VECTORS],
        };
        for index in 0..TILE_VECTORS {
            let position = start + index * LANES;
            let limit = |end: usize| end.saturating_sub(position).min(LANES);
            let (first, end) = (limit(visible.start), limit(visible.end));
            if first >= end {
                continue;
            }
            let block = block_table[position / layout.block_size] as usize;
            let offset = position % layout.block_size;
            let head = words(layout.head_index(batch.layer, block, kv_head));
            let len = words(2 * layout.v_offset());
            let kv = &batch.kv[head..head + len];
            // SAFETY: K of this head and block are the first half of `kv`, V the second; the offset is a multiple of 16
            // below the block size.
            unsafe {
                tile.k[index] = kv.as_ptr().add(offset);
                tile.v[index] = kv.as_ptr().add(len / 2 + words(offset * layout.head_dim));
            }
            tile.visible[index] = (first, end);
        }
        tile
    }
}

/// Rows in runs that the accumulators hold, as even as they can be.
struct RowBlocks {
    rows: Range<usize>,
    max_len: usize,
}

impl RowBlocks {
    #[inline(always)]
    fn new(rows: Range<usize>, max_len: usize) -> Self {
        Self { rows, max_len }
    }
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

/// `scores[row][token] = sum over dims of q[row][dim] * k[dim][token]`: one block of rows, one tile.
struct Scores<'a, E> {
    q: *const u32,
    /// Words of a query.
    num_steps: usize,
    k: &'a [*const u32; TILE_VECTORS],
    /// Words from one step to the next.
    k_stride: usize,
    visible: &'a [(usize, usize); TILE_VECTORS],
    scores: *mut f32,
    element: std::marker::PhantomData<E>,
}

impl<E: Element> Scores<'_, E> {
    #[inline(always)]
    fn dispatch<S: Lanes>(self, simd: S, num_rows: usize, is_whole: bool) {
        macro_rules! rows {
            ($($rows:literal)+) => {
                match (num_rows, is_whole) {
                    $(
                        ($rows, true) => simd.enter(ScoresOf::<E, $rows, TILE_VECTORS>(self)),
                        ($rows, false) => simd.enter(ScoresOf::<E, $rows, 1>(self)),
                    )+
                    _ => unreachable!("at most MAX_ROWS rows"),
                }
            };
        }
        rows!(1 2 3 4 5 6)
    }
}

/// [`Scores`] of `R` rows, `G` vectors of tokens at a time.
struct ScoresOf<'a, E, const R: usize, const G: usize>(Scores<'a, E>);

impl<E: Element, const R: usize, const G: usize> Vectorized for ScoresOf<'_, E, R, G> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Scores { q, num_steps, k, k_stride, visible, scores, .. } = self.0;
        for first in (0..TILE_VECTORS).step_by(G) {
            if G == 1 && visible[first].0 >= visible[first].1 {
                continue;
            }
            let mut acc = [[simd.splat(0.0); G]; R];
            for step in 0..num_steps {
                let mut column = [E::splat(simd, 0); G];
                for (g, column) in column.iter_mut().enumerate() {
                    // SAFETY: a step is a row of `block_size` words of K, and 16 tokens from the vector's first are in
                    // the block; the vector is there, as some row sees it.
                    *column = unsafe { E::load(simd, k[first + g].add(step * k_stride)) };
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: `R` queries of `num_steps` words.
                    let q = E::splat(simd, unsafe { *q.add(r * num_steps + step) });
                    for (acc, &column) in acc.iter_mut().zip(&column) {
                        *acc = E::mul_add(simd, *acc, column, q);
                    }
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                for (g, &acc) in acc.iter().enumerate() {
                    // SAFETY: `R` rows of TILE_LEN scores.
                    unsafe { simd.store(scores.add(r * TILE_LEN + (first + g) * LANES), acc) };
                }
            }
        }
    }
}

/// `sums[row][dim] = sums[row][dim] * factors[row] + sum over tokens of weights[row][token] * v[token][dim]`: one block of
/// rows, one tile, some vectors of dimensions.
struct Sums<'a, E> {
    weights: *const u32,
    factors: &'a [f32],
    v: &'a [*const u32; TILE_VECTORS],
    /// What all of these rows see.
    visible: &'a [(usize, usize); TILE_VECTORS],
    /// Words from one step to the next: `head_dim`.
    v_stride: usize,
    dim: usize,
    sums: *mut f32,
    row_len: usize,
    element: std::marker::PhantomData<E>,
}

impl<E: Element> Sums<'_, E> {
    /// `num_vectors` whole vectors of dimensions: MAX_COLS, 1, or 0 for the last `num_dims`, which are fewer than 16.
    #[inline(always)]
    fn dispatch<S: Lanes>(self, simd: S, num_rows: usize, num_vectors: usize, num_dims: usize) {
        macro_rules! rows {
            ($($rows:literal)+) => {
                match (num_rows, num_vectors) {
                    $(
                        ($rows, 0) => simd.enter(SumsOf::<E, $rows, 1>(self, num_dims)),
                        ($rows, 1) => simd.enter(SumsOf::<E, $rows, 1>(self, LANES)),
                        ($rows, _) => simd.enter(SumsOf::<E, $rows, 4>(self, LANES)),
                    )+
                    _ => unreachable!("at most MAX_ROWS rows"),
                }
            };
        }
        rows!(1 2 3 4 5 6)
    }
}

/// [`Sums`] of `R` rows and `D` vectors; of the last vector so many lanes are there.
struct SumsOf<'a, E, const R: usize, const D: usize>(Sums<'a, E>, usize);

impl<E: Element, const R: usize, const D: usize> Vectorized for SumsOf<'_, E, R, D> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self(Sums { weights, factors, v, visible, v_stride, dim, sums, row_len, .. }, num_lanes) = self;
        let mut acc = [[simd.splat(0.0); D]; R];
        for index in 0..TILE_VECTORS {
            let (first, end) = visible[index];
            if first >= end {
                continue;
            }
            for step in first / E::PACK..end.div_ceil(E::PACK) {
                // A pair may have one token that is not seen; it may hold anything, and NaN times zero is NaN.
                let is_cut = E::PACK == 2 && (2 * step < first || 2 * step + 2 > end);
                let keep = if 2 * step < first { 0xffff_0000 } else { 0x0000_ffff };
                let mut column = [E::splat(simd, 0); D];
                for (d, column) in column.iter_mut().enumerate() {
                    // SAFETY: a step is a row of `head_dim` words of V; the vector of tokens is there, as the rows see
                    // it, and the last vector of dimensions has `num_lanes` lanes.
                    *column = unsafe {
                        let words = v[index].add(step * v_stride + dim + d * LANES);
                        if D == 1 && num_lanes < LANES {
                            E::load_first(simd, words, num_lanes)
                        } else {
                            E::load(simd, words)
                        }
                    };
                    if is_cut {
                        *column = E::keep(simd, *column, keep);
                    }
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let word = r * (TILE_LEN / E::PACK) + index * (LANES / E::PACK) + step;
                    // SAFETY: `R` rows of weights of a tile.
                    let weight = E::splat(simd, unsafe { *weights.add(word) });
                    for (acc, &column) in acc.iter_mut().zip(&column) {
                        *acc = E::mul_add(simd, *acc, column, weight);
                    }
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            let factor = simd.splat(factors[r]);
            for (d, &acc) in acc.iter().enumerate() {
                // SAFETY: `R` rows of whole vectors of sums.
                unsafe {
                    let sums = sums.add(r * row_len + d * LANES);
                    simd.store(sums, simd.fma(simd.load(sums), factor, acc));
                }
            }
        }
    }
}
