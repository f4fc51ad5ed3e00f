//! A unit of work is a head and up to [`QUERIES`] tokens of one sequence. It goes over the sequence in tiles of [`KEYS`]
//! tokens: the tile's keys are turned around once, so that a vector holds one dimension of 16 keys; scores are chains of
//! products over dimensions; the running softmax takes a tile at a time, and the sums of values are chains over its tokens.
//! Every chain belongs to one query, and starts at multiples of [`KEYS`] in its sequence: who else is in the unit, or in the
//! batch, changes nothing.
//!
//! Who owns what: a worker its [`Scratch`], a unit its rows and columns of `out`.

use std::ops::Range;

use super::{EncoderAttention, Lens};
use crate::KernelError;
use crate::cpu::CpuBackend;
use crate::cpu::lanes::{LANES, Lanes, Vectorized, vectorize};
use crate::cpu::math::{exp2, exp2_block};
use crate::cpu::thread_pool::SharedMut;
use crate::kv_layout::MAX_HEAD_DIM;

/// Tokens whose queries go over a tile of keys together.
const QUERIES: usize = 32;

/// Tokens of a tile of keys; no more than [`exp2_block`] takes.
const KEYS: usize = 64;

/// Vectors of keys in a tile.
const KEY_VECTORS: usize = KEYS / LANES;

/// Queries whose sums are kept in registers at a time.
const TOGETHER: usize = 4;

/// Working memory of a thread; fixed size, whatever the model.
#[repr(C, align(64))]
pub(crate) struct Scratch {
    /// Keys of a tile, `[head_dim][KEYS]`.
    keys: [f32; MAX_HEAD_DIM * KEYS],
    /// `[QUERIES][KEYS]`: scores, then their weights.
    weights: [f32; QUERIES * KEYS],
    /// `[QUERIES][head_dim]`
    sums: [f32; QUERIES * MAX_HEAD_DIM],
    maxima: [f32; QUERIES],
    totals: [f32; QUERIES],
}

impl Scratch {
    /// One for each thread.
    pub(crate) fn for_threads(num_threads: usize) -> Vec<Box<Self>> {
        // SAFETY: a scratch is plain numbers, for which zero bits are a value.
        (0..num_threads).map(|_| unsafe { Box::<Self>::new_zeroed().assume_init() }).collect()
    }
}

struct Batch<'a> {
    qkv: &'a [f32],
    num_heads: usize,
    head_dim: usize,
    /// Scores become powers of two: one multiplication for the scale and for the base.
    factor: f32,
    out: SharedMut<'a, f32>,
}

pub(crate) fn encoder_attention(
    backend: &mut CpuBackend,
    args: EncoderAttention<'_, CpuBackend>,
) -> Result<(), KernelError> {
    const OP: &str = EncoderAttention::<CpuBackend>::OP;
    args.check(Lens { qkv: args.qkv.len(), cu_seqlens: args.cu_seqlens.len(), out: args.out.len() })?;
    let cu_seqlens = &args.cu_seqlens.u32(OP, "cu_seqlens")?[..args.num_seqs + 1];
    args.check_seqs(cu_seqlens)?;
    let width = args.width();
    let batch = Batch {
        qkv: &args.qkv.f32(OP, "qkv")?[..args.num_tokens * 3 * width],
        num_heads: args.num_heads,
        head_dim: args.head_dim,
        factor: args.scale * std::f32::consts::LOG2_E,
        out: SharedMut::new(&mut args.out.f32_mut(OP, "out")?[..args.num_tokens * width]),
    };
    let tiles_of = |bounds: &[u32]| ((bounds[1] - bounds[0]) as usize).div_ceil(QUERIES);
    let num_tiles: usize = cu_seqlens.windows(2).map(tiles_of).sum();
    let CpuBackend { isa, pool, encoder_scratches, .. } = backend;
    let scratches = SharedMut::new(encoder_scratches);
    let isa = *isa;
    pool.run_units(num_tiles * batch.num_heads, &|worker, index| {
        let (mut tile, head) = (index / batch.num_heads, index % batch.num_heads);
        let mut seqs = cu_seqlens.windows(2);
        let seq = loop {
            let bounds = seqs.next().expect("as many tiles as were counted");
            match tiles_of(bounds) {
                num_tiles if tile >= num_tiles => tile -= num_tiles,
                _ => break bounds[0] as usize..bounds[1] as usize,
            }
        };
        let first = seq.start + tile * QUERIES;
        let queries = first..seq.end.min(first + QUERIES);
        // SAFETY: each worker has its own.
        let scratch = &mut *unsafe { scratches.slice_mut(worker..worker + 1) }[0];
        vectorize(isa, Unit { batch: &batch, seq, queries, head, scratch });
    });
    Ok(())
}

struct Unit<'a, 'b> {
    batch: &'a Batch<'b>,
    seq: Range<usize>,
    queries: Range<usize>,
    head: usize,
    scratch: &'a mut Scratch,
}

impl Batch<'_> {
    /// Queries (0), keys (1) or values (2) of a token.
    #[inline(always)]
    fn part(&self, token: usize, part: usize, head: usize) -> &[f32] {
        &self.qkv[((3 * token + part) * self.num_heads + head) * self.head_dim..][..self.head_dim]
    }
}

impl Vectorized for Unit<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { batch, seq, queries, head, scratch } = self;
        let (dim, num_queries) = (batch.head_dim, queries.len());
        scratch.maxima.fill(f32::NEG_INFINITY);
        scratch.totals.fill(0.0);
        scratch.sums[..num_queries * dim].fill(0.0);
        for first in seq.clone().step_by(KEYS) {
            let keys = first..seq.end.min(first + KEYS);
            turn_keys(batch, keys.clone(), head, scratch);
            for query in 0..num_queries {
                score(simd, batch, queries.start + query, head, &scratch.keys, &mut scratch.weights[query * KEYS..]);
                weigh(simd, batch.factor, query, keys.len(), dim, scratch);
            }
            for first_query in (0..num_queries).step_by(TOGETHER) {
                add_values(simd, batch, keys.clone(), head, first_query, scratch);
            }
        }
        let width = batch.num_heads * dim;
        for (query, token) in queries.enumerate() {
            // SAFETY: these columns of this row are this unit's alone.
            let out = unsafe { batch.out.slice_mut(token * width + head * dim..token * width + (head + 1) * dim) };
            let total = simd.splat(scratch.totals[query]);
            for (out, sums) in out.chunks_mut(LANES).zip(scratch.sums[query * dim..][..dim].chunks(LANES)) {
                simd.store_slice(out, simd.div(simd.load_slice(sums, 0.0), total));
            }
        }
    }
}

/// Keys of a tile by dimension; what is behind the sequence is zero.
#[inline(always)]
fn turn_keys(batch: &Batch<'_>, keys: Range<usize>, head: usize, scratch: &mut Scratch) {
    let num_keys = keys.len();
    for (column, key) in keys.enumerate() {
        for (dim, value) in batch.part(key, 1, head).iter().enumerate() {
            scratch.keys[dim * KEYS + column] = *value;
        }
    }
    if num_keys < KEYS {
        for row in scratch.keys[..batch.head_dim * KEYS].chunks_exact_mut(KEYS) {
            row[num_keys..].fill(0.0);
        }
    }
}

/// Products of one query with a tile of keys.
#[inline(always)]
fn score<S: Lanes>(simd: S, batch: &Batch<'_>, query: usize, head: usize, keys: &[f32], out: &mut [f32]) {
    let mut sums = [simd.splat(0.0); KEY_VECTORS];
    for (q, row) in batch.part(query, 0, head).iter().zip(keys.chunks_exact(KEYS)) {
        let q = simd.splat(*q);
        for (vector, sum) in sums.iter_mut().enumerate() {
            *sum = simd.fma(q, simd.load_slice(&row[vector * LANES..], 0.0), *sum);
        }
    }
    for (vector, sum) in sums.into_iter().enumerate() {
        simd.store_slice(&mut out[vector * LANES..], sum);
    }
}

/// Scores of a query to weights; its sums so far to the new maximum's scale.
#[inline(always)]
fn weigh<S: Lanes>(simd: S, factor: f32, query: usize, num_keys: usize, dim: usize, scratch: &mut Scratch) {
    let row = &mut scratch.weights[query * KEYS..][..KEYS];
    row[num_keys..].fill(f32::NEG_INFINITY);
    let mut largest = simd.splat(f32::NEG_INFINITY);
    for scores in row.chunks_exact(LANES) {
        largest = simd.max(largest, simd.load_slice(scores, 0.0));
    }
    let before = scratch.maxima[query];
    let tile_max = simd.max_lane(largest);
    let max = if tile_max > before { tile_max } else { before };
    let scores: [f32; KEYS] = std::array::from_fn(|key| row[key]);
    let total = exp2_block(simd, &scores, max, factor, row);
    // Exactly 0 before the first tile, whose sums are 0 anyway.
    let rescale = exp2(simd, simd.splat((before - max) * factor));
    scratch.totals[query] = simd.to_array(rescale)[0] * scratch.totals[query] + total;
    scratch.maxima[query] = max;
    for sums in scratch.sums[query * dim..][..dim].chunks_mut(LANES) {
        simd.store_slice(sums, simd.mul(simd.load_slice(sums, 0.0), rescale));
    }
}

/// Values of a tile, weighted and added to the sums of a few queries; rows behind the last query are scratch.
#[inline(always)]
fn add_values<S: Lanes>(
    simd: S,
    batch: &Batch<'_>,
    keys: Range<usize>,
    head: usize,
    first_query: usize,
    scratch: &mut Scratch,
) {
    let dim = batch.head_dim;
    for start in (0..dim).step_by(LANES) {
        let len = LANES.min(dim - start);
        let mut sums = [simd.splat(0.0); TOGETHER];
        for (index, sum) in sums.iter_mut().enumerate() {
            *sum = simd.load_slice(&scratch.sums[(first_query + index) * dim + start..][..len], 0.0);
        }
        for (column, key) in keys.clone().enumerate() {
            let values = simd.load_slice(&batch.part(key, 2, head)[start..start + len], 0.0);
            for (index, sum) in sums.iter_mut().enumerate() {
                let weight = simd.splat(scratch.weights[(first_query + index) * KEYS + column]);
                *sum = simd.fma(weight, values, *sum);
            }
        }
        for (index, sum) in sums.into_iter().enumerate() {
            simd.store_slice(&mut scratch.sums[(first_query + index) * dim + start..][..len], sum);
        }
    }
}
