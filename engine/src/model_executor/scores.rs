//! Log probabilities as they come back from a device.

use std::iter::Peekable;

use quire_kernels::ops::logprobs::{Logprobs, LogprobsAt};
use quire_kernels::{Backend, KernelError};
use quire_scheduler::TokenLogprobs;

use super::device_model::DeviceModel;
use crate::handle::MAX_LOGPROBS;
use crate::input_batch::{InputBatch, PromptToken, WantedLogprobs};

/// Which of the sampled tokens each is of, and the log probabilities of `wanted`: `words` are the values of all of them, as
/// bits, then the ids, `1 + num_top` each.
pub(super) fn of_chosen<'a>(
    words: &'a [u32],
    wanted: &'a [WantedLogprobs],
    num_top: usize,
) -> Peekable<impl Iterator<Item = (u32, TokenLogprobs)> + 'a> {
    let (values, ids) = words.split_at(words.len() / 2);
    let width = 1 + num_top;
    let rows = values.chunks_exact(width).zip(ids.chunks_exact(width)).zip(wanted);
    rows.map(|((values, ids), wanted)| (wanted.sampled_index, of_row(values, ids, wanted.num_top as usize))).peekable()
}

/// The most likely tokens come in order, so whoever asked for fewer takes the first of them.
fn of_row(values: &[u32], ids: &[u32], wanted: usize) -> TokenLogprobs {
    let value = |bits: u32| f32::from_bits(bits);
    let top = ids[1..].iter().copied().zip(values[1..].iter().map(|&bits| value(bits))).take(wanted).collect();
    TokenLogprobs { logprob: value(values[0]), rank: ids[0], top }
}

/// Memory of the host for scoring prompts.
#[derive(Default)]
pub(super) struct Scores {
    rows: Vec<u32>,
    tokens: Vec<u32>,
    values: Vec<f32>,
    ids: Vec<u32>,
}

impl Scores {
    /// Log probabilities of prompt tokens, a tile of logits at a time, in order. Launching waits for the device here: a
    /// step that scores a prompt is in no hurry.
    pub(super) fn score_prompts<B: Backend>(
        &mut self,
        backend: &mut B,
        model: &mut DeviceModel<B>,
        batch: &InputBatch,
        mut answer: impl FnMut(&PromptToken, TokenLogprobs),
    ) -> Result<(), KernelError> {
        let asked = &batch.prompt_tokens;
        if asked.is_empty() {
            return Ok(());
        }
        let tile = model.shape.logits_tile;
        self.rows.clear();
        self.tokens.clear();
        for (index, token) in asked.iter().enumerate() {
            self.rows.extend(LogprobsAt { logits_row: (index % tile) as u32, token_index: index as u32 }.words());
            self.tokens.push(token.token_id);
        }
        backend.write_u32(&mut model.tables.logprob_rows, 0, &self.rows)?;
        backend.write_u32(&mut model.tables.prompt_tokens, 0, &self.tokens)?;
        for (index, asked) in asked.chunks(tile).enumerate() {
            let first = index * tile;
            model.compute_logits(backend, batch.num_sampled + first, asked.len())?;
            let num_top = asked.iter().map(|token| token.num_top).max().unwrap_or(0).min(MAX_LOGPROBS);
            let num_top = (num_top as usize).min(model.vocab_size);
            let DeviceModel { decoder, tables, vocab_size, .. } = &mut *model;
            backend.logprobs(Logprobs {
                logits: decoder.logits(),
                vocab_size: *vocab_size,
                rows: &tables.logprob_rows,
                rows_offset: first,
                num_rows: asked.len(),
                tokens: &tables.prompt_tokens,
                num_top,
                out_values: &mut tables.logprob_values,
                out_ids: &mut tables.logprob_ids,
                out_offset: 0,
            })?;
            let width = 1 + num_top;
            self.values.resize(asked.len() * width, 0.0);
            self.ids.resize(asked.len() * width, 0);
            backend.read_f32(&tables.logprob_values, 0, &mut self.values)?;
            backend.read_u32(&tables.logprob_ids, 0, &mut self.ids)?;
            let rows = self.values.chunks_exact(width).zip(self.ids.chunks_exact(width));
            for (token, (values, ids)) in asked.iter().zip(rows) {
                let bits: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
                answer(token, of_row(&bits, ids, token.num_top as usize));
            }
        }
        Ok(())
    }
}
