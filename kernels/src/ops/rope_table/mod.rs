//! Angles of the rotary position embedding for the tokens of a step, shared by all layers.

pub(crate) mod cpu;

use crate::Backend;

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
/// Writes `F32` `[num_tokens, head_dim / 2, 2]` (cosine, sine) to `out`. Source: Su et al. 2021; YaRN: Peng et al. 2023.
pub struct RopeTable<'a, B: Backend> {
    pub positions: &'a B::Buffer,
    pub num_tokens: usize,
    pub frequencies: &'a RopeFrequencies,
    pub magnitude: f32,
    pub out: &'a mut B::Buffer,
}
