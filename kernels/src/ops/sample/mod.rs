//! Logits to tokens.

pub(crate) mod cpu;

use crate::Backend;

/// Sizes of the sampler's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SamplerShape {
    pub max_num_seqs: usize,
    /// Second dimension of the token table.
    pub max_model_len: usize,
    pub vocab_size: usize,
}

/// How tokens of one row are chosen. Applied in this order: mask, bad words, stop tokens below `min_tokens`, bias,
/// penalties, temperature, then the filters top-k, min-p, typical-p, top-p, each on what the one before left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerRow<'a> {
    /// Tokens of the row's prompt; those behind it were generated.
    pub prompt_len: u32,
    /// With `choice_index` and the position of the token to choose, the whole key of the generator.
    pub seed: u64,
    pub choice_index: u32,
    /// 0 takes the most likely token, the lowest id among equals.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
    pub typical_p: f32,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// Added to single logits; ids below `vocab_size`.
    pub bias: &'a [(u32, f32)],
    /// One bit per token, low bit first, `ceil(vocab_size / 32)` words; a clear bit cannot be chosen.
    pub mask: Option<&'a [u32]>,
    /// Tokens that cannot be chosen before `min_tokens` were generated.
    pub stop_token_ids: &'a [u32],
    pub min_tokens: u32,
    /// Runs of tokens of which the last cannot be chosen behind the others. None is empty.
    pub bad_words: &'a [Vec<u32>],
}

/// One token to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleAt {
    /// Row of the sampler's tables and of the token table.
    pub row: u32,
    /// Tokens that the row holds = position of the token to choose.
    pub num_tokens: u32,
}

/// What [`Sample`] stores instead of a token where the logits are not finite numbers.
pub const NON_FINITE: u32 = u32::MAX;

/// Chooses one token for each row of logits and appends it to the token table.
///
/// * `logits`      `F32`, `[rows.len(), vocab_size]`; not changed
/// * `rows`        which row of the tables each row of logits belongs to
/// * `token_table` `U32`, `[max_num_seqs, max_model_len]`; read for penalties and bad words, written at
///   `[row, num_tokens]` where that is below `max_model_len`
///
/// Writes the chosen token, or [`NON_FINITE`], to `out[out_offset + i]` (`U32`). A row whose logits hold NaN, positive
/// infinity, or nothing but negative infinity is not finite. A mask, bias or bad word that leaves nothing to choose is
/// reported the same way.
/// Generator: Philox4x32-10 (Salmon et al. 2011), one draw per (seed, choice, position); the draw is compared with
/// running sums in ascending order of token id.
pub struct Sample<'a, B: Backend> {
    pub sampler: &'a mut B::Sampler,
    pub logits: &'a B::Buffer,
    pub rows: &'a [SampleAt],
    pub token_table: &'a mut B::Buffer,
    pub out: &'a mut B::Buffer,
    pub out_offset: usize,
}
