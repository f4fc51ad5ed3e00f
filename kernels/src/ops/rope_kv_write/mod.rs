//! From the fused projection to rotated queries and a written cache.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(feature = "testing")]
pub mod reference;

use crate::kv_layout::MAX_HEAD_DIM;
use crate::ops::{at_least, below};
use crate::{Backend, KernelError, KvLayout};

/// The slot of a token that fills up a batch: its K and V are written nowhere.
pub const NO_SLOT: u32 = u32::MAX;

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
/// * `slot_mapping` `U32`, `[num_tokens]`: `block_id * block_size + offset` of each token, all different (of two tokens
///   with one slot, either's numbers may stay); [`NO_SLOT`] where K and V are written nowhere
///
/// Keys and values in `qkv` are left as they are. Rounding is to nearest, half to even.
/// Fails with `KernelError::Range` where a slot is past the cache, before anything is written.
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

impl AttentionShape {
    /// Queries that share a key and value head.
    pub const fn group_len(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    /// What every device refuses of the heads of a layer and the cache that they use.
    pub(crate) fn check(&self, op: &'static str, layout: &KvLayout, layer: usize) -> Result<(), KernelError> {
        at_least(op, "num_kv_heads", 1, self.num_kv_heads)?;
        at_least(op, "num_heads", self.num_kv_heads, self.num_heads)?;
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let expected = self.num_heads.next_multiple_of(self.num_kv_heads);
            return Err(KernelError::Shape { op, argument: "num_heads", expected, found: self.num_heads });
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) || self.head_dim > MAX_HEAD_DIM {
            let expected = self.head_dim.max(1).next_multiple_of(2).min(MAX_HEAD_DIM);
            return Err(KernelError::Shape { op, argument: "head_dim", expected, found: self.head_dim });
        }
        for (expected, found) in [(self.num_kv_heads, layout.num_kv_heads), (self.head_dim, layout.head_dim)] {
            if expected != found {
                return Err(KernelError::Shape { op, argument: "kv", expected, found });
            }
        }
        below(op, "layer", layer as u64, layout.num_layers)
    }
}

/// Numbers in each buffer; no norms, no lengths of them.
pub(crate) struct Lens {
    pub(crate) qkv: usize,
    pub(crate) cos_sin: usize,
    pub(crate) slot_mapping: usize,
    pub(crate) qk_norm: Option<[usize; 2]>,
}

impl<B: Backend> RopeKvWrite<'_, B> {
    pub(crate) const OP: &'static str = "rope_kv_write";

    /// What every device refuses; slots are looked at by the device.
    pub(crate) fn check(&self, lens: Lens, layout: &KvLayout) -> Result<(), KernelError> {
        self.shape.check(Self::OP, layout, self.layer)?;
        at_least(Self::OP, "qkv", self.num_tokens.saturating_mul(self.shape.qkv_len()), lens.qkv)?;
        at_least(Self::OP, "cos_sin", self.num_tokens.saturating_mul(self.shape.head_dim), lens.cos_sin)?;
        at_least(Self::OP, "slot_mapping", self.num_tokens, lens.slot_mapping)?;
        if let Some([q_weight, k_weight]) = lens.qk_norm {
            at_least(Self::OP, "q_weight", self.shape.head_dim, q_weight)?;
            at_least(Self::OP, "k_weight", self.shape.head_dim, k_weight)?;
        }
        Ok(())
    }
}
