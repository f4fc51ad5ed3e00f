//! What lies on the device beside model and cache: the arrays of a step, and what comes of it.

use quire_kernels::{Backend, DType, KernelError};

use crate::handle::MAX_LOGPROBS;
use crate::input_batch::{InputBatch, TableShape};

pub(super) struct DeviceTables<B: Backend> {
    /// `[max_num_seqs, max_model_len]`
    pub token_table: B::Buffer,
    /// Per KV group `[max_num_seqs, max_num_blocks]`.
    pub block_tables: Vec<B::Buffer>,
    pub token_indices: B::Buffer,
    pub positions: B::Buffer,
    pub cu_seqlens: B::Buffer,
    pub context_lens: B::Buffer,
    pub rows: B::Buffer,
    pub slot_mapping: Vec<B::Buffer>,
    pub gather: B::Buffer,
    /// `[max_num_seqs, 2]`
    pub sample_rows: B::Buffer,
    /// `[max_num_seqs]`: chosen tokens.
    pub sampled: B::Buffer,
    /// `[max(max_num_seqs, max_num_batched_tokens), 2]`
    pub logprob_rows: B::Buffer,
    /// `[max_num_batched_tokens]`: tokens of prompts whose log probabilities are wanted.
    pub prompt_tokens: B::Buffer,
    /// `[max(max_num_seqs, logits_tile), 1 + MAX_LOGPROBS]`
    pub logprob_values: B::Buffer,
    pub logprob_ids: B::Buffer,
}

impl<B: Backend> DeviceTables<B> {
    pub(super) fn alloc(backend: &mut B, shape: &TableShape) -> Result<Self, KernelError> {
        let (seqs, tokens) = (shape.max_num_seqs, shape.max_num_batched_tokens);
        let num_groups = shape.num_kv_groups;
        let num_logprobs = seqs.max(shape.logits_tile) * (1 + MAX_LOGPROBS as usize);
        let mut alloc = |len: usize| backend.alloc(DType::U32, len);
        Ok(Self {
            token_table: alloc(seqs * shape.max_model_len)?,
            block_tables: (0..num_groups).map(|_| alloc(seqs * shape.max_num_blocks())).collect::<Result<_, _>>()?,
            token_indices: alloc(tokens)?,
            positions: alloc(tokens)?,
            cu_seqlens: alloc(seqs + 1)?,
            context_lens: alloc(seqs)?,
            rows: alloc(seqs)?,
            slot_mapping: (0..num_groups).map(|_| alloc(tokens)).collect::<Result<_, _>>()?,
            gather: alloc(seqs + tokens)?,
            sample_rows: alloc(2 * seqs)?,
            sampled: alloc(seqs)?,
            logprob_rows: alloc(2 * seqs.max(tokens))?,
            prompt_tokens: alloc(tokens)?,
            logprob_ids: alloc(num_logprobs)?,
            logprob_values: backend.alloc(DType::F32, num_logprobs)?,
        })
    }

    /// Stages the blocks that the step appended.
    pub(super) fn stage_block_tables(&mut self, backend: &mut B, batch: &InputBatch) -> Result<(), KernelError> {
        for update in &batch.table_updates {
            let blocks = &batch.block_tables[update.group][update.offset..][..update.len];
            backend.stage_u32(&mut self.block_tables[update.group], update.offset, blocks)?;
        }
        Ok(())
    }

    /// The step's arrays, all of them by one upload where that helps.
    pub(super) fn upload(&mut self, backend: &mut B, batch: &InputBatch) -> Result<(), KernelError> {
        self.stage_block_tables(backend, batch)?;
        let arrays = [
            (&mut self.token_indices, &batch.token_indices),
            (&mut self.positions, &batch.positions),
            (&mut self.cu_seqlens, &batch.cu_seqlens),
            (&mut self.context_lens, &batch.context_lens),
            (&mut self.rows, &batch.rows),
            (&mut self.gather, &batch.gather),
            (&mut self.sample_rows, &batch.sample_rows),
            (&mut self.logprob_rows, &batch.logprob_rows),
        ];
        let slots = self.slot_mapping.iter_mut().zip(&batch.slot_mapping);
        for (buffer, array) in arrays.into_iter().chain(slots) {
            if !array.is_empty() {
                backend.stage_u32(buffer, 0, array)?;
            }
        }
        backend.write_staged()
    }
}
