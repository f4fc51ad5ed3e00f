//! From the fused projection to rotated queries and a written cache.

pub(crate) mod cpu;

use crate::Backend;

/// Heads of an attention layer. `num_heads` is a multiple of `num_kv_heads`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    pub num_heads: usize,
    pub num_kv_heads: usize,
    /// Even.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Width of a row of the fused projection: queries, keys, values.
    pub const fn qkv_len(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    /// Width of a row of queries, and of the attention's output.
    pub const fn q_len(&self) -> usize {
        self.num_heads * self.head_dim
    }
}

/// Per-head normalisation of queries and keys before the rotation (Qwen3).
pub struct QkNorm<'a, B: Backend> {
    /// `F32`, `[head_dim]`
    pub q_weight: &'a B::Buffer,
    /// `F32`, `[head_dim]`
    pub k_weight: &'a B::Buffer,
    pub eps: f32,
}

/// Normalises (optional) and rotates queries in place; normalises and rotates keys and writes them and the values to
/// the cache, rounded to its type.
///
/// * `qkv`          `F32`, `[num_tokens, qkv_len]`: queries, keys, values of each token
/// * `cos_sin`      `F32`, `[num_tokens, head_dim / 2, 2]`, see [`crate::ops::rope_table::RopeTable`]; dimension i turns with
///   i + head_dim / 2
/// * `slot_mapping` `U32`, `[num_tokens]`: `block_id * block_size + offset` of each token, all different
///
/// Fails with `KernelError::Range` where a slot is past the cache.
pub struct RopeKvWrite<'a, B: Backend> {
    pub qkv: &'a mut B::Buffer,
    pub num_tokens: usize,
    pub shape: AttentionShape,
    pub cos_sin: &'a B::Buffer,
    pub qk_norm: Option<QkNorm<'a, B>>,
    pub slot_mapping: &'a B::Buffer,
    pub kv: &'a mut B::Kv,
    pub layer: usize,
}
