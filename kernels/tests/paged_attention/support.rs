//! Sequences in a cache, and attention beside its meaning, for every backend.

use quire_kernels::cpu::{CpuBackend, CpuKv};
use quire_kernels::kv_layout::KvPlace;
use quire_kernels::ops::paged_attention::{PagedAttention, reference};
use quire_kernels::ops::rope_kv_write::AttentionShape;
use quire_kernels::testing::{POISON, Rng, Tolerance, poison_kv, read_kv, write_kv};
use quire_kernels::{Backend, DType, KvLayout};

pub(crate) const LAYER: usize = 1;

/// A table entry that nothing may read.
const NO_BLOCK: u32 = u32::MAX;

/// Queries, keys and values of a sequence from its first token on, and the blocks that hold it.
pub(crate) struct Seq {
    /// `[len, qkv_len]`
    pub(crate) qkv: Vec<f32>,
    pub(crate) blocks: Vec<u32>,
}

/// Sequences of one cache.
pub(crate) struct World {
    pub(crate) shape: AttentionShape,
    pub(crate) layout: KvLayout,
    pub(crate) window: Option<u32>,
    pub(crate) scale: f32,
    pub(crate) seqs: Vec<Seq>,
}

/// New tokens `from..to` of a sequence, with `to` tokens in the cache.
#[derive(Clone, Copy)]
pub(crate) struct Step {
    pub(crate) seq: usize,
    pub(crate) from: usize,
    pub(crate) to: usize,
}

impl World {
    /// Sequences of these lengths in shuffled blocks, the first of which are shared by every two neighbours.
    pub(crate) fn new(rng: &mut Rng, shape: AttentionShape, block_size: usize, dtype: DType, lens: &[usize]) -> Self {
        let num_blocks = lens.iter().map(|len| len.div_ceil(block_size)).sum::<usize>() + 3;
        let AttentionShape { num_kv_heads, head_dim, .. } = shape;
        let layout = KvLayout { num_layers: 2, num_blocks, block_size, num_kv_heads, head_dim, dtype };
        let mut free = rng.permutation(num_blocks);
        let mut seqs: Vec<Seq> = Vec::new();
        for (index, &len) in lens.iter().enumerate() {
            let mut seq = Seq { qkv: rng.normals(len * shape.qkv_len()), blocks: Vec::new() };
            if index % 2 == 1 {
                // One whole block in common, where both have one.
                let before = &seqs[index - 1];
                if before.qkv.len().min(seq.qkv.len()) >= block_size * shape.qkv_len() {
                    let shared = block_size * shape.qkv_len();
                    seq.qkv[..shared].copy_from_slice(&before.qkv[..shared]);
                    seq.blocks.push(before.blocks[0]);
                }
            }
            while seq.blocks.len() < len.div_ceil(block_size) {
                seq.blocks.push(free.pop().expect("enough blocks"));
            }
            seqs.push(seq);
        }
        let scale = 1.0 / (head_dim as f32).sqrt();
        Self { shape, layout, window: None, scale, seqs }
    }

    pub(crate) fn poisoned_cache(&self, backend: &mut CpuBackend) -> CpuKv {
        let mut kv = backend.alloc_kv(&self.layout).expect("room");
        poison_kv(&mut kv);
        kv
    }

    /// Writes K and V of tokens `from..to`.
    pub(crate) fn write(&self, kv: &mut CpuKv, seq: usize, from: usize, to: usize) {
        let AttentionShape { num_kv_heads, head_dim, .. } = self.shape;
        for position in from..to {
            let row = &self.seqs[seq].qkv[position * self.shape.qkv_len()..][..self.shape.qkv_len()];
            let (k, v) = row[self.shape.q_len()..].split_at(num_kv_heads * head_dim);
            let block = self.seqs[seq].blocks[position / self.layout.block_size] as usize;
            for kv_head in 0..num_kv_heads {
                let place = KvPlace { layer: LAYER, block, kv_head, offset: position % self.layout.block_size };
                let head = kv_head * head_dim..(kv_head + 1) * head_dim;
                write_kv(kv, place, &k[head.clone()], &v[head]);
            }
        }
    }

    /// First position that any token of the step sees.
    pub(crate) fn first_visible(&self, step: Step) -> usize {
        self.window.map_or(0, |window| (step.from + 1).saturating_sub(window as usize))
    }

    /// A cache that holds what the steps may look at, and NaN.
    pub(crate) fn cache(&self, backend: &mut CpuBackend, steps: &[Step]) -> CpuKv {
        let mut kv = self.poisoned_cache(backend);
        for &step in steps {
            self.write(&mut kv, step.seq, self.first_visible(step), step.to);
        }
        kv
    }

    /// The table's row: only the blocks that the step may look at.
    pub(crate) fn table(&self, step: Step, max_num_blocks: usize) -> Vec<u32> {
        let used = self.first_visible(step) / self.layout.block_size..step.to.div_ceil(self.layout.block_size);
        (0..max_num_blocks)
            .map(|index| if used.contains(&index) { self.seqs[step.seq].blocks[index] } else { NO_BLOCK })
            .collect()
    }

    pub(crate) fn attend<B: Backend>(&self, backend: &mut B, kv: &B::Kv, steps: &[Step]) -> Vec<f32> {
        let mut qkv = Vec::new();
        let (mut cu_seqlens_q, mut context_lens) = (vec![0], Vec::new());
        let max_num_blocks = steps.iter().map(|step| step.to.div_ceil(self.layout.block_size)).max().unwrap_or(0) + 2;
        // Rows of the table are in reverse order, with one that nobody uses.
        let mut tables = vec![NO_BLOCK; max_num_blocks];
        let mut rows = Vec::new();
        for (index, &step) in steps.iter().enumerate() {
            let (start, end) = (step.from * self.shape.qkv_len(), step.to * self.shape.qkv_len());
            qkv.extend_from_slice(&self.seqs[step.seq].qkv[start..end]);
            cu_seqlens_q.push(cu_seqlens_q[index] + (step.to - step.from) as u32);
            context_lens.push(step.to as u32);
            rows.push((steps.len() - index) as u32);
        }
        for &step in steps.iter().rev() {
            tables.extend(self.table(step, max_num_blocks));
        }
        let num_tokens = qkv.len() / self.shape.qkv_len();
        // K and V of the rows are not looked at: they are in the cache.
        for row in qkv.chunks_mut(self.shape.qkv_len()) {
            row[self.shape.q_len()..].fill(POISON);
        }
        let mut qkv_buffer = backend.alloc(DType::F32, qkv.len()).expect("room");
        backend.write_f32(&mut qkv_buffer, 0, &qkv).expect("it fits");
        let mut upload = |data: &[u32]| {
            let mut buffer = backend.alloc(DType::U32, data.len()).expect("room");
            backend.write_u32(&mut buffer, 0, data).expect("it fits");
            buffer
        };
        let (cu_seqlens_q, context_lens) = (upload(&cu_seqlens_q), upload(&context_lens));
        let (block_tables, rows) = (upload(&tables), upload(&rows));
        let mut result = vec![POISON; num_tokens * self.shape.q_len()];
        let mut out = backend.alloc(DType::F32, result.len()).expect("room");
        backend.write_f32(&mut out, 0, &result).expect("it fits");
        backend
            .paged_attention(PagedAttention {
                qkv: &qkv_buffer,
                num_tokens,
                num_seqs: steps.len(),
                shape: self.shape,
                scale: self.scale,
                window: self.window,
                cu_seqlens_q: &cu_seqlens_q,
                context_lens: &context_lens,
                block_tables: &block_tables,
                max_num_blocks,
                rows: &rows,
                kv,
                layer: LAYER,
                out: &mut out,
            })
            .expect("shapes fit");
        backend.read_f32(&out, 0, &mut result).expect("it fits");
        result
    }

    pub(crate) fn expected(&self, kv: &CpuKv, steps: &[Step]) -> Vec<f64> {
        let mut out = Vec::new();
        for &step in steps {
            let rows = self.seqs[step.seq].qkv.chunks(self.shape.qkv_len()).take(step.to).skip(step.from);
            let q: Vec<f32> = rows.flat_map(|row| &row[..self.shape.q_len()]).copied().collect();
            let case = reference::Case {
                q: &q,
                shape: self.shape,
                scale: self.scale,
                window: self.window,
                context_len: step.to,
                block_table: &self.seqs[step.seq].blocks,
                layer: LAYER,
            };
            let [k, v] = [0, 1].map(|part| move |place, dim| read_kv(kv, place, dim)[part]);
            out.extend(reference::paged_attention(&case, &self.layout, &k, &v));
        }
        out
    }

    /// Largest magnitude of a value: what a weighted mean is close relative to.
    pub(crate) fn largest_value(&self) -> f64 {
        let start = self.shape.q_len() + self.shape.num_kv_heads * self.shape.head_dim;
        let rows = self.seqs.iter().flat_map(|seq| seq.qkv.chunks(self.shape.qkv_len()));
        rows.flat_map(|row| &row[start..]).fold(0.0, |max, x| max.max(f64::from(x.abs())))
    }

    /// Of f32: scores below 16 are off by 2e-6 at most, so weights by twice that, and so is their mean of values; sums
    /// add as much. Of bf16: each weight is rounded to 8 bits, 1/512 off at most, above and below the line. Of int8 (what
    /// the cache holds is what is expected to be multiplied): queries are off by 1/65534 of their largest dimension, which
    /// scores of up to 256 dimensions may add up to 2e-3 in the worst case and 2e-4 in the random one; weights by 1/65534
    /// of their tile's largest.
    pub(crate) fn tolerance(&self) -> Tolerance {
        let relative = match self.layout.dtype {
            DType::F32 => 1e-5,
            DType::I8 => 1e-3,
            // Weights are rounded behind their scales.
            _ => 1.0 / 256.0,
        };
        Tolerance { abs: relative * self.largest_value(), rel: 0.0 }
    }
}

pub(crate) fn shape(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { num_heads, num_kv_heads, head_dim }
}

pub(crate) fn whole(lens: &[usize]) -> Vec<Step> {
    lens.iter().enumerate().map(|(seq, &to)| Step { seq, from: 0, to }).collect()
}

pub(crate) fn last(lens: &[usize]) -> Vec<Step> {
    lens.iter().enumerate().map(|(seq, &to)| Step { seq, from: to - 1, to }).collect()
}

pub(crate) const DTYPES: [DType; 4] = [DType::F32, DType::Bf16, DType::I8, DType::F8E4M3];
