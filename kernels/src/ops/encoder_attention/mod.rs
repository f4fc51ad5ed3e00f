//! Attention in both directions, within each sequence of a batch.

pub(crate) mod cpu;
#[cfg(feature = "testing")]
pub mod reference;

use crate::kv_layout::MAX_HEAD_DIM;
use crate::ops::{at_least, below};
use crate::{Backend, KernelError};

/// Attention of every token of a sequence over all tokens of it, for one ragged batch. No cache: K and V come and go with the
/// batch.
///
/// * `qkv`        `F32`, `[num_tokens, 3 * num_heads * head_dim]`: queries, keys, values of each token
/// * `cu_seqlens` `U32`, `[num_seqs + 1]`, offsets of each sequence's tokens; the last is `num_tokens`
/// * `scale`      factor of the scores, `1 / sqrt(head_dim)` normally
///
/// Writes `F32` `[num_tokens, num_heads * head_dim]` to `out`. Products are f32. A row's sums run over the tokens of its sequence
/// in ascending order, in tiles of fixed length with a running softmax: they depend on the sequence alone.
/// Fails with `KernelError::Shape` or `KernelError::Range` naming the argument, before anything is written.
/// Vaswani et al. 2017; online softmax: Milakov and Gimelshein 2018.
pub struct EncoderAttention<'a, B: Backend> {
    pub qkv: &'a B::Buffer,
    pub num_tokens: usize,
    pub num_seqs: usize,
    pub num_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    pub cu_seqlens: &'a B::Buffer,
    pub out: &'a mut B::Buffer,
}

/// Numbers in each buffer.
pub(crate) struct Lens {
    pub(crate) qkv: usize,
    pub(crate) cu_seqlens: usize,
    pub(crate) out: usize,
}

impl<B: Backend> EncoderAttention<'_, B> {
    pub(crate) const OP: &'static str = "encoder_attention";

    /// Width of a row of queries, of keys, of values, and of the output.
    pub(crate) fn width(&self) -> usize {
        self.num_heads.saturating_mul(self.head_dim)
    }

    /// What every device refuses of sizes.
    pub(crate) fn check(&self, lens: Lens) -> Result<(), KernelError> {
        at_least(Self::OP, "num_heads", 1, self.num_heads)?;
        at_least(Self::OP, "head_dim", 1, self.head_dim)?;
        below(Self::OP, "head_dim", self.head_dim as u64, MAX_HEAD_DIM + 1)?;
        let len = self.num_tokens.saturating_mul(self.width());
        at_least(Self::OP, "qkv", len.saturating_mul(3), lens.qkv)?;
        at_least(Self::OP, "cu_seqlens", self.num_seqs.saturating_add(1), lens.cu_seqlens)?;
        at_least(Self::OP, "out", len, lens.out)
    }

    /// What a device that can look into the list refuses: lengths that do not fit each other.
    pub(crate) fn check_seqs(&self, cu_seqlens: &[u32]) -> Result<(), KernelError> {
        let shape = |expected, found| KernelError::Shape { op: Self::OP, argument: "cu_seqlens", expected, found };
        let mut next = 0;
        for &end in cu_seqlens {
            if (end as usize) < next {
                return Err(shape(next, end as usize));
            }
            next = end as usize;
        }
        match (cu_seqlens.first(), next) {
            (Some(0), end) if end == self.num_tokens => Ok(()),
            (Some(0), end) => Err(shape(self.num_tokens, end)),
            (first, _) => Err(shape(0, first.map_or(0, |first| *first as usize))),
        }
    }
}
