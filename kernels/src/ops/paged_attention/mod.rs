//! Attention of new tokens over their paged context.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(feature = "testing")]
pub mod reference;

use crate::kv_layout::KvLayout;
use crate::ops::rope_kv_write::AttentionShape;
use crate::ops::{all_below, at_least, below};
use crate::{Backend, KernelError};

/// Causal attention of new tokens over their paged context, for one ragged batch.
///
/// * `qkv`          `F32`, `[num_tokens, qkv_len]`, queries first in each row, RoPE applied
/// * `kv`, `layer`  one layer of the cache, laid out by [`crate::KvLayout`]; holds the new tokens' K and V already
/// * `cu_seqlens_q` `U32`, `[num_seqs + 1]`, offsets of each sequence's new tokens
/// * `context_lens` `U32`, `[num_seqs]`, tokens in the cache, new ones included: the last new token is at
///   `context_len - 1`
/// * `block_tables` `U32`, `[num_rows, max_num_blocks]`; entries past a context, and those before every window, are
///   never read
/// * `rows`         `U32`, `[num_seqs]`: row of `block_tables` of each sequence
/// * `window`       a token at position p sees p - window + 1 to p; `None` sees all before it
/// * `scale`        factor of the scores, `1 / sqrt(head_dim)` normally
///
/// Writes `F32` `[num_tokens, q_len]` to `out`. The context of a query is cut into chunks of [`CHUNK_LEN`] tokens at
/// fixed positions; the partial results are merged in ascending order, whoever computed them.
/// Queries and probabilities are rounded before they are multiplied with K and V: to the cache's type, or, where that is
/// `I8`, to 16 bits: whole numbers with a scale per query, and per token and tile of tokens, or, on CUDA devices, sums of two
/// numbers of bf16; where it is `F8E4M3`, to bf16, probabilities behind the scale of their token. Sums are f32; those of whole numbers are exact within a tile.
/// Fails with `KernelError::Shape` or `KernelError::Range` naming the argument, before anything is written.
/// Blocks: PagedAttention (Kwon et al. 2023, sec. 4.1). Online softmax: Milakov and Gimelshein 2018.
pub struct PagedAttention<'a, B: Backend> {
    pub qkv: &'a B::Buffer,
    pub num_tokens: usize,
    pub num_seqs: usize,
    pub shape: AttentionShape,
    pub scale: f32,
    pub window: Option<u32>,
    pub cu_seqlens_q: &'a B::Buffer,
    pub context_lens: &'a B::Buffer,
    pub block_tables: &'a B::Buffer,
    pub max_num_blocks: usize,
    pub rows: &'a B::Buffer,
    pub kv: &'a B::Kv,
    pub layer: usize,
    pub out: &'a mut B::Buffer,
}

/// Tokens of context that are one unit of work and of summation order.
pub const CHUNK_LEN: usize = 512;

/// Numbers in each buffer.
pub(crate) struct Lens {
    pub(crate) qkv: usize,
    pub(crate) cu_seqlens_q: usize,
    pub(crate) context_lens: usize,
    pub(crate) rows: usize,
    pub(crate) out: usize,
}

/// The lists of a batch, cut to what is used.
#[derive(Clone, Copy)]
pub(crate) struct Lists<'a> {
    pub(crate) cu_seqlens_q: &'a [u32],
    pub(crate) context_lens: &'a [u32],
    pub(crate) rows: &'a [u32],
    pub(crate) block_tables: &'a [u32],
    pub(crate) max_num_blocks: usize,
}

/// One sequence of a batch.
#[derive(Clone, Copy)]
pub(crate) struct SeqOfBatch<'a> {
    pub(crate) q_len: usize,
    pub(crate) context_len: usize,
    /// The whole row; entries past the context and before the window are anything.
    pub(crate) block_table: &'a [u32],
}

impl SeqOfBatch<'_> {
    /// Position of the first new token.
    pub(crate) fn first_position(&self) -> usize {
        self.context_len - self.q_len
    }
}

/// First position that the token at `position` sees.
pub(crate) fn first_visible(position: usize, window: Option<u32>) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window as usize))
}

impl<'a> Lists<'a> {
    /// A sequence of lists that passed [`PagedAttention::check_lists`].
    pub(crate) fn seq(&self, index: usize) -> SeqOfBatch<'a> {
        SeqOfBatch {
            q_len: (self.cu_seqlens_q[index + 1] - self.cu_seqlens_q[index]) as usize,
            context_len: self.context_lens[index] as usize,
            block_table: &self.block_tables[self.rows[index] as usize * self.max_num_blocks..][..self.max_num_blocks],
        }
    }
}

impl<B: Backend> PagedAttention<'_, B> {
    pub(crate) const OP: &'static str = "paged_attention";

    /// What every device refuses of sizes.
    pub(crate) fn check(&self, lens: Lens, layout: &KvLayout) -> Result<(), KernelError> {
        self.shape.check(Self::OP, layout, self.layer)?;
        at_least(Self::OP, "qkv", self.num_tokens.saturating_mul(self.shape.qkv_len()), lens.qkv)?;
        at_least(Self::OP, "cu_seqlens_q", self.num_seqs.saturating_add(1), lens.cu_seqlens_q)?;
        at_least(Self::OP, "context_lens", self.num_seqs, lens.context_lens)?;
        at_least(Self::OP, "rows", self.num_seqs, lens.rows)?;
        at_least(Self::OP, "out", self.num_tokens.saturating_mul(self.shape.q_len()), lens.out)?;
        // A token sees itself at least.
        at_least(Self::OP, "window", 1, self.window.map_or(1, |window| window as usize))
    }

    /// What a device that can look into the lists refuses: lengths that do not fit each other, rows and blocks that do
    /// not exist. Only entries that are used are looked at.
    pub(crate) fn check_lists(&self, lists: &Lists<'_>, layout: &KvLayout) -> Result<(), KernelError> {
        let num_rows = lists.block_tables.len().checked_div(self.max_num_blocks).unwrap_or(0);
        let shape = |argument, expected, found| Err(KernelError::Shape { op: Self::OP, argument, expected, found });
        let mut next = 0;
        for index in 0..self.num_seqs {
            let (start, end) = (lists.cu_seqlens_q[index] as usize, lists.cu_seqlens_q[index + 1] as usize);
            if start != next || end < start {
                return shape("cu_seqlens_q", next.max(start), start.min(end));
            }
            next = end;
            let context_len = lists.context_lens[index] as usize;
            if end == start {
                continue;
            }
            at_least(Self::OP, "context_lens", end - start, context_len)?;
            if context_len > self.max_num_blocks.saturating_mul(layout.block_size) {
                return shape("max_num_blocks", context_len.div_ceil(layout.block_size), self.max_num_blocks);
            }
            below(Self::OP, "rows", lists.rows[index], num_rows)?;
            let first = first_visible(context_len - (end - start), self.window) / layout.block_size;
            let row = &lists.block_tables[lists.rows[index] as usize * self.max_num_blocks..];
            let used = &row[first..context_len.div_ceil(layout.block_size)];
            all_below(Self::OP, "block_tables", used, layout.num_blocks)?;
        }
        if next != self.num_tokens {
            return shape("cu_seqlens_q", self.num_tokens, next);
        }
        Ok(())
    }
}
