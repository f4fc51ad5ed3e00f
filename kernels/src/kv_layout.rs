//! Where a token's K and V lie in a block of the cache.

use crate::DType;

/// Layout of one KV group's cache; the only place that turns (layer, block, head, offset, dimension) into an index.
///
/// Bytes of one layer of one block, per KV head: K as `[head_dim / 2][block_size][2]`, so that for a pair of dimensions
/// the tokens of a block lie side by side in one vector and a query pair is broadcast over them; then V as
/// `[block_size / 2][head_dim][2]`, so that for a pair of tokens the dimensions lie side by side. With `F32` the pairs
/// are not interleaved: K is `[head_dim][block_size]`, V is `[block_size][head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    pub num_layers: usize,
    pub num_blocks: usize,
    /// Tokens in a block; a multiple of 16.
    pub block_size: usize,
    pub num_kv_heads: usize,
    /// A multiple of 2.
    pub head_dim: usize,
    /// `F32` or `Bf16`.
    pub dtype: DType,
}

impl KvLayout {
    /// Numbers that one block takes in one layer: K and V of all heads.
    pub const fn block_len(&self) -> usize {
        2 * self.num_kv_heads * self.block_size * self.head_dim
    }

    /// Bytes that one block takes in all layers.
    pub const fn block_bytes(&self) -> usize {
        self.num_layers * self.block_len() * self.dtype.size()
    }

    /// Bytes of the whole cache.
    pub const fn total_bytes(&self) -> usize {
        self.num_blocks * self.block_bytes()
    }
}
