//! Logits to tokens.

pub(crate) mod cpu;
pub(crate) mod cuda;
pub mod philox;
#[cfg(feature = "testing")]
pub mod reference;

use crate::ops::{all_below, at_least, below};
use crate::{Backend, KernelError};

/// Sizes of the sampler's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SamplerShape {
    pub max_num_seqs: usize,
    /// Second dimension of the token table.
    pub max_model_len: usize,
    pub vocab_size: usize,
}

/// How tokens of one row are chosen. Applied in this order: mask, bad words, stop tokens below `min_tokens`, bias,
/// penalties (repetition, then frequency and presence), temperature, then the filters top-k, min-p, typical-p, top-p,
/// each on what the one before left, its probabilities scaled to a sum of 1.
///
/// Top-k and top-p take tokens by falling probability, lower id first among equals, and so cut through equals; top-p stops
/// with the token that reaches it. Typical-p takes them by how far their surprise is from the mean, lower id first among
/// equals (Meister et al. 2022). Each leaves at least one token.
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
    /// 1 keeps all.
    pub top_p: f32,
    /// Least probability relative to the largest; 0 keeps all.
    pub min_p: f32,
    /// 1 keeps all.
    pub typical_p: f32,
    /// Above 0. Logits of tokens of the prompt and of generated ones are divided by it where positive, else multiplied;
    /// 1 changes nothing.
    pub repetition_penalty: f32,
    /// Taken from the logits of generated tokens.
    pub presence_penalty: f32,
    /// Taken from the logits of generated tokens once for each time.
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

/// One token to choose: two words of [`Sample::rows`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleAt {
    /// Row of the sampler's tables and of the token table.
    pub row: u32,
    /// Tokens that the row holds = position of the token to choose.
    pub num_tokens: u32,
}

impl SampleAt {
    /// Fills up a batch: no token is chosen, and nothing is written.
    pub const NOBODY: Self = Self { row: u32::MAX, num_tokens: 0 };

    /// As it lies in [`Sample::rows`].
    pub const fn words(self) -> [u32; 2] {
        [self.row, self.num_tokens]
    }

    /// What lies in [`Sample::rows`].
    pub const fn of_words([row, num_tokens]: [u32; 2]) -> Self {
        Self { row, num_tokens }
    }
}

/// Most words of a row's lists: two for each entry of `bias`, one for each stop token, for each bad word, and for each token of
/// a bad word. Devices have room for as many from the start.
pub const MAX_LIST_WORDS: usize = 16 * 1024;

/// What [`Sample`] stores instead of a token where the logits are not finite numbers.
pub const NON_FINITE: u32 = u32::MAX;

/// Chooses one token for each row of logits and appends it to the token table.
///
/// * `logits`      `F32`, `[rows.len(), vocab_size]`; not changed
/// * `rows`        `U32`, `[any, 2]`, see [`SampleAt`]: which row of the tables each row of logits belongs to; read from
///   entry `rows_offset` on
/// * `token_table` `U32`, `[max_num_seqs, max_model_len]`; read for penalties and bad words, written at
///   `[row, num_tokens]` where that is below `max_model_len`
///
/// Writes the chosen token, or [`NON_FINITE`], to `out[out_offset + i]` (`U32`). A row whose logits hold NaN, positive
/// infinity, or nothing but negative infinity is not finite. A mask, bias or bad word that leaves nothing to choose is
/// reported the same way; the token table gets token 0 then, so that a step planned already can still be computed.
/// Generator: Philox4x32-10 (Salmon et al. 2011), one draw per (seed, choice, position), see [`philox::uniform`]; the draw
/// times the sum of probabilities is compared with running sums in ascending order of token id.
pub struct Sample<'a, B: Backend> {
    pub sampler: &'a mut B::Sampler,
    pub logits: &'a B::Buffer,
    pub rows: &'a B::Buffer,
    pub rows_offset: usize,
    pub num_rows: usize,
    pub token_table: &'a mut B::Buffer,
    pub out: &'a mut B::Buffer,
    pub out_offset: usize,
}

impl SamplerShape {
    /// Words of a mask.
    pub const fn num_mask_words(&self) -> usize {
        self.vocab_size.div_ceil(32)
    }

    fn check_mask(&self, op: &'static str, mask: &[u32]) -> Result<(), KernelError> {
        let (expected, found) = (self.num_mask_words(), mask.len());
        if found == expected { Ok(()) } else { Err(KernelError::Shape { op, argument: "mask", expected, found }) }
    }

    /// What every device refuses of [`Backend::set_sampler_mask`].
    pub(crate) fn check_row_mask(&self, row: u32, mask: &[u32]) -> Result<(), KernelError> {
        const OP: &str = "set_sampler_mask";
        below(OP, "row", row, self.max_num_seqs)?;
        self.check_mask(OP, mask)
    }

    /// What every device refuses.
    pub(crate) fn check(&self) -> Result<(), KernelError> {
        const OP: &str = "alloc_sampler";
        at_least(OP, "max_num_seqs", 1, self.max_num_seqs)?;
        at_least(OP, "max_model_len", 1, self.max_model_len)?;
        at_least(OP, "vocab_size", 1, self.vocab_size)?;
        // The largest id says that there is none.
        below(OP, "vocab_size", self.vocab_size as u64, NON_FINITE as usize)
    }
}

impl SamplerRow<'_> {
    pub(crate) const OP: &'static str = "set_sampler_row";

    /// What every device refuses. Of numbers that are not finite, or negative where that has no meaning, the error shows
    /// the bits: those of all others are below the bits of infinity.
    pub(crate) fn check(&self, row: u32, shape: &SamplerShape) -> Result<(), KernelError> {
        let op = Self::OP;
        let infinity = f32::INFINITY.to_bits() as usize;
        below(op, "row", row, shape.max_num_seqs)?;
        let positive = [
            ("temperature", self.temperature),
            ("top_p", self.top_p),
            ("min_p", self.min_p),
            ("typical_p", self.typical_p),
            ("repetition_penalty", self.repetition_penalty),
            ("presence_penalty", self.presence_penalty.abs()),
            ("frequency_penalty", self.frequency_penalty.abs()),
        ];
        for (argument, value) in positive {
            // Adding zero makes a negative zero a positive one.
            below(op, argument, (value + 0.0).to_bits(), infinity)?;
        }
        if self.repetition_penalty == 0.0 {
            return Err(KernelError::Range { op, argument: "repetition_penalty", value: 0, limit: 0 });
        }
        below(op, "min_p", self.min_p.to_bits(), 1.0_f32.to_bits() as usize + 1)?;
        for &(id, value) in self.bias {
            below(op, "bias", id, shape.vocab_size)?;
            // Negative infinity bans a token.
            if value != f32::NEG_INFINITY {
                below(op, "bias", value.abs().to_bits(), infinity)?;
            }
        }
        if let Some(mask) = self.mask {
            shape.check_mask(op, mask)?;
        }
        all_below(op, "stop_token_ids", self.stop_token_ids, shape.vocab_size)?;
        for word in self.bad_words {
            at_least(op, "bad_words", 1, word.len())?;
            all_below(op, "bad_words", word, shape.vocab_size)?;
        }
        let num_words = num_list_words(self.bias, self.stop_token_ids, self.bad_words);
        below(op, "lists", num_words as u64, MAX_LIST_WORDS + 1)
    }
}

/// Words of these lists, to be compared with [`MAX_LIST_WORDS`].
pub fn num_list_words(bias: &[(u32, f32)], stop_token_ids: &[u32], bad_words: &[Vec<u32>]) -> usize {
    2 * bias.len() + stop_token_ids.len() + bad_words.iter().map(|word| 1 + word.len()).sum::<usize>()
}

/// Numbers in each buffer.
pub(crate) struct Lens {
    pub(crate) logits: usize,
    pub(crate) rows: usize,
    pub(crate) token_table: usize,
    pub(crate) out: usize,
}

impl<B: Backend> Sample<'_, B> {
    pub(crate) const OP: &'static str = "sample";

    /// What every device refuses of sizes; entries of `rows` are looked at by the device.
    pub(crate) fn check(&self, lens: Lens, shape: &SamplerShape) -> Result<(), KernelError> {
        at_least(Self::OP, "logits", self.num_rows.saturating_mul(shape.vocab_size), lens.logits)?;
        let num_words = self.rows_offset.saturating_add(self.num_rows).saturating_mul(2);
        at_least(Self::OP, "rows", num_words, lens.rows)?;
        at_least(Self::OP, "token_table", shape.max_num_seqs * shape.max_model_len, lens.token_table)?;
        at_least(Self::OP, "out", self.out_offset.saturating_add(self.num_rows), lens.out)
    }

    /// What the device refuses of an entry.
    pub(crate) fn check_row(at: SampleAt, shape: &SamplerShape) -> Result<(), KernelError> {
        if at.row == SampleAt::NOBODY.row {
            return Ok(());
        }
        below(Self::OP, "row", at.row, shape.max_num_seqs)?;
        below(Self::OP, "num_tokens", at.num_tokens, shape.max_model_len + 1)
    }
}
