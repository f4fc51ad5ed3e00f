//! From what a request asks to what the device's sampler takes. Seed and position decide, never the neighbours.

use quire_kernels::ops::sample::{MAX_LIST_WORDS, SamplerRow, num_list_words};
use quire_kernels::{Backend, KernelError};
use quire_scheduler::{Admission, SamplingParams, SubmitError};

use crate::handle::MAX_LOGPROBS;

/// Refuses what no sampler can do, before it is queued: a row that the device refuses would end the engine for all.
pub(crate) fn check(sampling: &SamplingParams, stop_token_ids: &[u32], vocab_size: u32) -> Result<(), SubmitError> {
    const PAST_VOCAB: &str = "holds a token id that the model does not have";
    let invalid = |field, why| Err(SubmitError::Invalid { field, why });
    let past_vocab = |ids: &[u32]| ids.iter().any(|id| *id >= vocab_size);
    let fractions = [("top_p", sampling.top_p), ("min_p", sampling.min_p), ("typical_p", sampling.typical_p)];
    if let Some((field, _)) = fractions.iter().find(|(_, value)| !(0.0..=1.0).contains(value)) {
        return invalid(field, "must be a number from 0 to 1");
    }
    if !(0.0..=2.0).contains(&sampling.temperature) {
        return invalid("temperature", "must be a number from 0 to 2");
    }
    if !(sampling.repetition_penalty > 0.0 && sampling.repetition_penalty.is_finite()) {
        return invalid("repetition_penalty", "must be a number above 0");
    }
    if !sampling.presence_penalty.is_finite() {
        return invalid("presence_penalty", "must be a number");
    }
    if !sampling.frequency_penalty.is_finite() {
        return invalid("frequency_penalty", "must be a number");
    }
    if sampling.logit_bias.iter().any(|(id, _)| *id >= vocab_size) {
        return invalid("logit_bias", PAST_VOCAB);
    }
    if sampling.logit_bias.iter().any(|(_, value)| !value.is_finite() && *value != f32::NEG_INFINITY) {
        return invalid("logit_bias", "must be numbers, or negative infinity");
    }
    match sampling.allowed_token_ids.as_deref() {
        Some([]) => return invalid("allowed_token_ids", "must hold a token id"),
        Some(ids) if past_vocab(ids) => return invalid("allowed_token_ids", PAST_VOCAB),
        _ => {}
    }
    if sampling.bad_words.iter().any(Vec::is_empty) {
        return invalid("bad_words", "must not be empty");
    }
    if sampling.bad_words.iter().any(|word| past_vocab(word)) {
        return invalid("bad_words", PAST_VOCAB);
    }
    if num_list_words(&sampling.logit_bias, stop_token_ids, &sampling.bad_words) > MAX_LIST_WORDS {
        return invalid("bad_words", "hold more tokens than a sampler has room for");
    }
    if sampling.logprobs.max(sampling.prompt_logprobs) > Some(MAX_LOGPROBS) {
        return invalid("logprobs", "must not ask for more than 128 tokens");
    }
    Ok(())
}

/// Memory for converting one row after the other.
#[derive(Default)]
pub(crate) struct SamplerRows {
    mask: Vec<u32>,
    stop_token_ids: Vec<u32>,
}

impl SamplerRows {
    /// Sets the row that `admission` enters; its parameters passed [`check`]. Token ids past the vocabulary are never
    /// generated, so there is no need to stop at them. A row that `is_masked` at each step gets its allowed tokens and its
    /// `min_tokens` with the masks.
    pub(crate) fn set<B: Backend>(
        &mut self,
        backend: &mut B,
        sampler: &mut B::Sampler,
        admission: &Admission,
        vocab_size: usize,
        is_masked: bool,
    ) -> Result<(), KernelError> {
        let request = &*admission.request;
        let sampling = &request.sampling;
        self.mask.clear();
        if let Some(allowed) = &sampling.allowed_token_ids {
            self.mask.resize(vocab_size.div_ceil(32), 0);
            for id in allowed {
                self.mask[*id as usize / 32] |= 1 << (id % 32);
            }
        }
        self.stop_token_ids.clear();
        self.stop_token_ids.extend(request.stop_token_ids.iter().filter(|id| (**id as usize) < vocab_size));

        let params = SamplerRow {
            prompt_len: request.prompt.len() as u32,
            seed: sampling.seed,
            choice_index: admission.choice_index,
            temperature: sampling.temperature,
            top_k: sampling.top_k.unwrap_or(0),
            top_p: sampling.top_p,
            // A negative zero is zero.
            min_p: sampling.min_p + 0.0,
            typical_p: sampling.typical_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            bias: &sampling.logit_bias,
            mask: sampling.allowed_token_ids.is_some().then_some(&*self.mask),
            stop_token_ids: &self.stop_token_ids,
            min_tokens: if is_masked { 0 } else { request.min_tokens },
            bad_words: &sampling.bad_words,
        };
        backend.set_sampler_row(sampler, admission.row.0, &params)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_sampler_can_do_is_named() {
        type Change = fn(&mut SamplingParams);
        let cases: [(&str, Change); 22] = [
            ("temperature", |p| p.temperature = f32::NAN),
            ("temperature", |p| p.temperature = -0.1),
            ("temperature", |p| p.temperature = f32::INFINITY),
            ("top_p", |p| p.top_p = 1.5),
            ("top_p", |p| p.top_p = f32::NAN),
            ("min_p", |p| p.min_p = -1.0),
            ("min_p", |p| p.min_p = 2.0),
            ("typical_p", |p| p.typical_p = f32::NEG_INFINITY),
            ("repetition_penalty", |p| p.repetition_penalty = 0.0),
            ("repetition_penalty", |p| p.repetition_penalty = f32::NAN),
            ("presence_penalty", |p| p.presence_penalty = f32::INFINITY),
            ("frequency_penalty", |p| p.frequency_penalty = f32::NAN),
            ("logit_bias", |p| p.logit_bias = vec![(100, 1.0)]),
            ("logit_bias", |p| p.logit_bias = vec![(0, f32::INFINITY)]),
            ("logit_bias", |p| p.logit_bias = vec![(0, f32::NAN)]),
            ("allowed_token_ids", |p| p.allowed_token_ids = Some(vec![])),
            ("allowed_token_ids", |p| p.allowed_token_ids = Some(vec![u32::MAX])),
            ("bad_words", |p| p.bad_words = vec![vec![]]),
            ("bad_words", |p| p.bad_words = vec![vec![1], vec![2, 100]]),
            ("bad_words", |p| p.bad_words = vec![vec![1; 1023]; 16]),
            ("logprobs", |p| p.logprobs = Some(129)),
            ("logprobs", |p| p.prompt_logprobs = Some(u32::MAX)),
        ];
        for (field, change) in cases {
            let mut params = SamplingParams::default();
            check(&params, &[1], 100).unwrap();
            change(&mut params);
            assert!(
                matches!(check(&params, &[1], 100), Err(SubmitError::Invalid { field: named, .. }) if named == field)
            );
        }
    }
}
