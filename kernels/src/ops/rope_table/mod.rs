//! Angles of the rotary position embedding for the tokens of a step, shared by all layers.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(feature = "testing")]
pub mod reference;

use crate::kv_layout::MAX_HEAD_DIM;
use crate::ops::at_least;
use crate::{Backend, KernelError};

/// Frequencies of a rotary embedding, and how they depend on the position.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeFrequencies {
    /// The same at every position; scaled variants (linear, llama3, YaRN) are folded in. `[head_dim / 2]`, radians per
    /// position.
    Fixed { inverse: Vec<f32> },
    /// Base grown with the context (dynamic NTK): the token at position p uses the base of a sequence of
    /// `max(p + 1, original_len)` tokens, so that it does not depend on how the context was chunked.
    DynamicNtk { base: f32, factor: f32, original_len: u32, head_dim: usize },
}

/// Cosine and sine of every rotary angle.
///
/// * `positions` `U32`, `[num_tokens]`
/// * `frequencies`, and `magnitude`: both results are multiplied by it (YaRN's attention factor; 1 otherwise)
///
/// Writes `F32` `[num_tokens, head_dim / 2, 2]` (cosine, sine) to `out`. The angle is rounded to f32, as the models'
/// own code does, then cosine and sine are rounded once. Source: Su et al. 2021; YaRN: Peng et al. 2023.
pub struct RopeTable<'a, B: Backend> {
    pub positions: &'a B::Buffer,
    pub num_tokens: usize,
    pub frequencies: &'a RopeFrequencies,
    pub magnitude: f32,
    pub out: &'a mut B::Buffer,
}

impl RopeFrequencies {
    /// Angles per token: `head_dim / 2`.
    pub fn len(&self) -> usize {
        match self {
            Self::Fixed { inverse } => inverse.len(),
            Self::DynamicNtk { head_dim, .. } => head_dim / 2,
        }
    }

    /// Whether there is no angle, which no operation takes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of the sequence whose frequencies the token at `position` uses; 0 where all use the same.
    pub(crate) fn seq_len(&self, position: u32) -> u32 {
        match self {
            Self::Fixed { .. } => 0,
            Self::DynamicNtk { original_len, .. } => position.saturating_add(1).max(*original_len),
        }
    }

    /// Frequencies in a sequence of `seq_len` tokens (see [`Self::seq_len`]), written to `out`.
    pub(crate) fn inverse(&self, seq_len: u32, out: &mut [f32]) {
        match self {
            Self::Fixed { inverse } => out.copy_from_slice(inverse),
            Self::DynamicNtk { base, factor, original_len, head_dim } => {
                let (factor, dim) = (f64::from(*factor), *head_dim as f64);
                let stretch = factor * f64::from(seq_len) / f64::from(*original_len) - (factor - 1.0);
                let base = f64::from(*base) * stretch.powf(dim / (dim - 2.0));
                for (i, out) in out.iter_mut().enumerate() {
                    // The power is rounded to f32 before it is inverted, as the models' own code does.
                    *out = 1.0 / base.powf((2 * i) as f64 / dim) as f32;
                }
            }
        }
    }
}

/// Numbers in each buffer.
pub(crate) struct Lens {
    pub(crate) positions: usize,
    pub(crate) out: usize,
}

impl<B: Backend> RopeTable<'_, B> {
    pub(crate) const OP: &'static str = "rope_table";

    /// What every device refuses.
    pub(crate) fn check(&self, lens: Lens) -> Result<(), KernelError> {
        let len = self.frequencies.len();
        at_least(Self::OP, "frequencies", 1, len)?;
        if len > MAX_HEAD_DIM / 2 {
            let expected = MAX_HEAD_DIM / 2;
            return Err(KernelError::Shape { op: Self::OP, argument: "frequencies", expected, found: len });
        }
        if let RopeFrequencies::DynamicNtk { original_len, head_dim, .. } = self.frequencies {
            at_least(Self::OP, "original_len", 1, *original_len as usize)?;
            // The exponent is head_dim / (head_dim - 2).
            at_least(Self::OP, "head_dim", 4, *head_dim)?;
        }
        at_least(Self::OP, "positions", self.num_tokens, lens.positions)?;
        at_least(Self::OP, "out", self.num_tokens.saturating_mul(2 * len), lens.out)
    }
}
