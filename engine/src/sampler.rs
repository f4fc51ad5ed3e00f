//! From what a request asks to what the device's sampler takes. Seed and position decide, never the neighbours.

use quire_kernels::ops::sample::SamplerRow;
use quire_kernels::{Backend, KernelError};
use quire_scheduler::Admission;

/// Memory for converting one row after the other.
#[derive(Default)]
pub(crate) struct SamplerRows {
    mask: Vec<u32>,
    stop_token_ids: Vec<u32>,
    bias: Vec<(u32, f32)>,
}

impl SamplerRows {
    /// Sets the row that `admission` enters. Token ids past the vocabulary cannot be generated, so those to be stopped
    /// at, allowed or biased are left out.
    pub(crate) fn set<B: Backend>(
        &mut self,
        backend: &mut B,
        sampler: &mut B::Sampler,
        admission: &Admission,
        vocab_size: usize,
    ) -> Result<(), KernelError> {
        let request = &*admission.request;
        let sampling = &request.sampling;
        let in_vocab = |id: &u32| (*id as usize) < vocab_size;

        self.mask.clear();
        if let Some(allowed) = &sampling.allowed_token_ids {
            self.mask.resize(vocab_size.div_ceil(32), 0);
            for id in allowed.iter().filter(|id| in_vocab(id)) {
                self.mask[*id as usize / 32] |= 1 << (id % 32);
            }
        }
        self.stop_token_ids.clear();
        self.stop_token_ids.extend(request.stop_token_ids.iter().filter(|id| in_vocab(id)));
        self.bias.clear();
        self.bias.extend(sampling.logit_bias.iter().filter(|(id, _)| in_vocab(id)));

        let params = SamplerRow {
            prompt_len: request.prompt.len() as u32,
            seed: sampling.seed,
            choice_index: admission.choice_index,
            temperature: sampling.temperature,
            top_k: sampling.top_k.unwrap_or(0),
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            typical_p: sampling.typical_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            bias: &self.bias,
            mask: sampling.allowed_token_ids.is_some().then_some(&*self.mask),
            stop_token_ids: &self.stop_token_ids,
            min_tokens: request.min_tokens,
            bad_words: &sampling.bad_words,
        };
        backend.set_sampler_row(sampler, admission.row.0, &params)
    }
}
