//! Attention of new tokens over their paged context.

pub(crate) mod cpu;

use crate::Backend;
use crate::ops::rope_kv_write::AttentionShape;

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
/// Fails with `KernelError::Shape` naming the argument.
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
