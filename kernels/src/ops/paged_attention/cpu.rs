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
//! bf16 is multiplied in pairs with [`Isa::Avx512Bf16`], and widened to f32 with every other instruction set.
//! K and V of the next two tiles are fetched while the present one is multiplied (see [`products::Ahead`]).
//!
//! Who owns what while a batch is computed: a worker its [`Scratch`]; a unit its part of `out`, or its part of `partials`
//! until it counts down its `countdown`; who counts it to zero, all parts of that row tile and head.

mod element;
mod products;
mod softmax;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod unit;
mod work;

use std::ops::Range;
use std::sync::atomic::AtomicU32;

use self::softmax::State;
use self::unit::Unit;
use self::work::Task;
use super::{Lens, Lists, PagedAttention, SeqOfBatch, first_visible};
#[cfg(target_arch = "x86_64")]
use crate::cpu::amx::{TILE_ROWS, Tiles};
use crate::cpu::buffer::AlignedBytes;
use crate::cpu::lanes::{LANES, vectorize};
use crate::cpu::thread_pool::SharedMut;
use crate::cpu::{CpuBackend, Isa};
use crate::kv_layout::MAX_HEAD_DIM;
use crate::{KernelError, KvLayout};

/// Rows of a unit. More would use K and V more often per load; these fit the second-level cache beside them.
const MAX_ROWS: usize = 64;

/// Rows of a unit on tiles, which use K and V up much faster.
const MAX_TILE_ROWS: usize = 256;

/// Units that a thread should find on average, so that all finish at about the same time.
const UNITS_PER_THREAD: usize = 3;

/// Rows that are computed together on tiles, and read and written together, whatever is in them.
const ROWS_MULTIPLE: usize = 32;

/// Words of queries: each number widened, or in pairs for many rows.
const MAX_LEFT_WORDS: usize = MAX_TILE_ROWS * MAX_HEAD_DIM / 2;
const _: () = assert!(MAX_ROWS * MAX_HEAD_DIM <= MAX_LEFT_WORDS);

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

/// How pairs of bf16 are multiplied: one way for all batches of a cache.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Products {
    /// Widened to f32, by FMA.
    Widened,
    /// By the instruction for pairs.
    Pairs,
    /// On tiles.
    Tiles,
}

impl Products {
    fn of(isa: Isa, layout: &KvLayout, scale: f32) -> Self {
        match isa {
            Isa::Avx512Bf16 => Self::Pairs,
            #[cfg(target_arch = "x86_64")]
            Isa::Amx if tiles::can_compute(layout, scale) => Self::Tiles,
            _ => Self::Widened,
        }
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
    kv: &'a [u8],
    products: Products,
    /// Most rows of a task.
    max_rows: usize,
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
    let products = Products::of(backend.isa, &layout, args.scale);
    let num_threads = backend.pool.num_threads();
    let max_rows = match products {
        Products::Tiles => tile_rows(num_tokens * shape.num_heads, num_threads),
        _ => MAX_ROWS,
    };
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
        kv: args.kv.bytes(),
        products,
        max_rows,
        out: SharedMut::new(&mut args.out.f32_mut(OP, "out")?[..num_tokens * shape.q_len()]),
    };

    let CpuBackend { isa, pool, attention_workspace: Workspace { scratches, partials, countdowns, tasks }, .. } =
        backend;
    work::plan(&batch, num_threads, tasks, countdowns);
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
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set has them, and a unit runs in no other.
        let _tiles = (products == Products::Tiles).then(|| unsafe { Tiles::take(TILE_ROWS as u8) });
        vectorize(isa, Unit { batch: &batch, task, kv_head, scratch, partials: &partials, countdown });
    });
    Ok(())
}

/// Rows of a task on tiles: no more than leave each thread its units, whole blocks of them.
fn tile_rows(num_rows: usize, num_threads: usize) -> usize {
    (num_rows / (num_threads * UNITS_PER_THREAD)).next_multiple_of(ROWS_MULTIPLE).clamp(MAX_ROWS, MAX_TILE_ROWS)
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

/// Working memory of a thread; fixed size, whatever the model.
#[repr(C, align(64))]
struct Scratch {
    /// Left factors of scores, `[num_rows][head_dim]`.
    q: [u32; MAX_LEFT_WORDS],
    /// `[num_rows][TILE_LEN]`
    scores: [f32; MAX_ROWS * TILE_LEN],
    /// Left factors of sums, `[num_rows][TILE_LEN]`.
    weights: [u32; MAX_ROWS * TILE_LEN],
    /// Sums of weights by lane, `[num_rows][LANES]`; they become `State::total` at the end of a chunk.
    lane_totals: [f32; MAX_ROWS * LANES],
    /// What a row's sums so far are multiplied by before this tile's are added.
    factors: [f32; MAX_ROWS],
    /// Largest scores of this tile.
    tile_max: [f32; MAX_ROWS],
    /// Of whole numbers: what they are multiplied by, for left factors of a row and for tokens of this tile.
    q_scales: [f32; MAX_TILE_ROWS],
    weight_scales: [f32; MAX_ROWS],
    k_scales: [f32; TILE_LEN],
    v_scales: [f32; TILE_LEN],
    chunk: State,
    total: State,
    #[cfg(target_arch = "x86_64")]
    tiles: tiles::TileScratch,
}
