//! A model, its cache and its tables on a device, and the operations of a step over them.

use std::ops::Range;

use quire_kernels::ops::logprobs::Logprobs;
use quire_kernels::ops::sample::{Sample, SamplerShape};
use quire_kernels::{Backend, KernelError};

use super::tables::DeviceTables;
use crate::input_batch::{InputBatch, TableShape};
use crate::kv_cache::KvPlan;
use crate::models::decoder::{Decoder, StepInputs};

pub(super) struct DeviceModel<B: Backend> {
    pub decoder: Decoder<B>,
    /// One per KV group.
    pub kv: Vec<B::Kv>,
    pub sampler: B::Sampler,
    pub tables: DeviceTables<B>,
    pub shape: TableShape,
    pub vocab_size: usize,
}

impl<B: Backend> DeviceModel<B> {
    /// Takes the sampler and the tables of a loaded model; its cache is [`Self::alloc_kv`]'s.
    pub(super) fn alloc(backend: &mut B, decoder: Decoder<B>, shape: TableShape) -> Result<Self, KernelError> {
        let vocab_size = decoder.config().vocab_size;
        let sampler = backend.alloc_sampler(&SamplerShape {
            max_num_seqs: shape.max_num_seqs,
            max_model_len: shape.max_model_len,
            vocab_size,
        })?;
        let tables = DeviceTables::alloc(backend, &shape)?;
        Ok(Self { decoder, kv: Vec::new(), sampler, tables, shape, vocab_size })
    }

    /// Takes the cache, which every step needs.
    pub(super) fn alloc_kv(&mut self, backend: &mut B, kv_plan: &KvPlan) -> Result<(), KernelError> {
        self.kv = kv_plan.layouts.iter().map(|layout| backend.alloc_kv(layout)).collect::<Result<_, _>>()?;
        Ok(())
    }

    /// Runs the layers over the arrays that were uploaded.
    pub(super) fn forward(&mut self, backend: &mut B, num_tokens: usize, num_seqs: usize) -> Result<(), KernelError> {
        let Self { decoder, kv, tables, shape, .. } = self;
        decoder.forward(
            backend,
            StepInputs {
                num_tokens,
                num_seqs,
                token_table: &tables.token_table,
                token_indices: &tables.token_indices,
                positions: &tables.positions,
                cu_seqlens: &tables.cu_seqlens,
                context_lens: &tables.context_lens,
                rows: &tables.rows,
                slot_mapping: &tables.slot_mapping,
                block_tables: &tables.block_tables,
                max_num_blocks: shape.max_num_blocks(),
                kv,
            },
        )
    }

    /// Logits of the tokens at `gather[offset..offset + num_rows]`, at most a tile.
    pub(super) fn compute_logits(
        &mut self,
        backend: &mut B,
        offset: usize,
        num_rows: usize,
    ) -> Result<(), KernelError> {
        self.decoder.compute_logits(backend, &self.tables.gather, offset, num_rows)
    }

    /// Chooses the step's tokens `first..first + len`, at most a tile. Its logits stay.
    pub(super) fn choose(&mut self, backend: &mut B, first: usize, len: usize) -> Result<(), KernelError> {
        self.compute_logits(backend, first, len)?;
        let Self { decoder, sampler, tables, .. } = self;
        backend.sample(Sample {
            sampler,
            logits: decoder.logits(),
            rows: &tables.sample_rows,
            rows_offset: first,
            num_rows: len,
            token_table: &mut tables.token_table,
            out: &mut tables.sampled,
            out_offset: first,
        })
    }

    /// All of a step that adds one token to each of `size` sequences.
    pub(super) fn decode(&mut self, backend: &mut B, size: usize) -> Result<(), KernelError> {
        self.forward(backend, size, size)?;
        for first in (0..size).step_by(self.shape.logits_tile) {
            self.choose(backend, first, self.shape.logits_tile.min(size - first))?;
        }
        Ok(())
    }

    /// Log probabilities of those tokens of a tile, just chosen, of which they are wanted.
    pub(super) fn score_chosen(
        &mut self,
        backend: &mut B,
        batch: &InputBatch,
        tile: Range<usize>,
        num_top: usize,
    ) -> Result<(), KernelError> {
        let before = |end: usize| batch.wanted_logprobs.partition_point(|wanted| (wanted.sampled_index as usize) < end);
        let (first, end) = (before(tile.start), before(tile.end));
        if first == end {
            return Ok(());
        }
        let Self { decoder, tables, vocab_size, .. } = self;
        backend.logprobs(Logprobs {
            logits: decoder.logits(),
            vocab_size: *vocab_size,
            rows: &tables.logprob_rows,
            rows_offset: first,
            num_rows: end - first,
            tokens: &tables.sampled,
            num_top,
            out_values: &mut tables.logprob_values,
            out_ids: &mut tables.logprob_ids,
            out_offset: first,
        })
    }
}
