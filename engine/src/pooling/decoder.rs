//! Decoders that were trained as embedders (the last token's normalised hidden state) or rerankers ([`Judge`]). A text that is longer than a batch is
//! computed in chunks; the KV cache holds one batch, or one text of the longest length, and is written anew by each.

use quire_kernels::{Backend, DType, KernelError, KvLayout, StepLimits};

use super::handle::PoolingInput;
use super::judge::Judge;
use super::spec::{Pooling, PoolingInfo, PoolingTask, Spec};
use super::{Loaded, Plan, Pooler, normalize};
use crate::error::EngineError;
use crate::handle::ModelInfo;
use crate::model_executor::{dtype, kv_dtype};
use crate::model_files::ModelFiles;
use crate::models::config::{ModelConfig, unsupported};
use crate::models::decoder::{Decoder, EMBEDDING, Output, StepInputs};
use crate::models::encoder::BatchLimits;
use crate::models::loader::WeightChoice;

/// A decoder on a device, with the arrays of a batch.
pub(super) struct DecoderPooler<B: Backend> {
    backend: B,
    decoder: Decoder<B>,
    judge: Option<Judge>,
    normalize: bool,
    limits: BatchLimits,
    block_size: usize,
    max_num_blocks: usize,
    kv: Vec<B::Kv>,
    arrays: Arrays<B>,
    host: HostArrays,
}

struct Arrays<B: Backend> {
    token_table: B::Buffer,
    token_indices: B::Buffer,
    positions: B::Buffer,
    cu_seqlens: B::Buffer,
    context_lens: B::Buffer,
    rows: B::Buffer,
    gather: B::Buffer,
    /// One per KV group, all alike: a text has the same blocks in each.
    slot_mapping: Vec<B::Buffer>,
    block_tables: Vec<B::Buffer>,
}

#[derive(Default)]
struct HostArrays {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    cu_seqlens: Vec<u32>,
    context_lens: Vec<u32>,
    block_tables: Vec<u32>,
    gather: Vec<u32>,
}

/// Sizes of what a decoder's batches take.
struct Sizes {
    max_len: usize,
    limits: BatchLimits,
    layouts: Vec<KvLayout>,
    kv_dtype: DType,
}

impl Sizes {
    fn of(config: &ModelConfig, dtype: DType, plan: &Plan<'_>, spec: &Spec) -> Result<Self, EngineError> {
        let block_size = plan.settings.block_size as usize;
        if block_size == 0 || !block_size.is_multiple_of(16) || block_size > 1024 {
            let why = format!("{block_size} is not a multiple of 16 up to 1024");
            return Err(EngineError::Config { field: "scheduler.block_size".to_owned(), why });
        }
        let max_len = plan.max_len(config.rope.max_len as usize, spec);
        // Chunks need no room for a whole text.
        let limits = plan.batch_limits(1);
        let of_batch = limits.num_tokens.div_ceil(block_size) + limits.num_seqs;
        let num_blocks = of_batch.max(max_len.div_ceil(block_size));
        let shape = config.attention_shape();
        let kv_dtype = kv_dtype(plan.engine.kv_dtype, dtype);
        let layout = |window: &Option<u32>| KvLayout {
            num_layers: config.facts.windows.iter().filter(|layer| *layer == window).count(),
            num_blocks,
            block_size,
            num_kv_heads: shape.num_kv_heads,
            head_dim: shape.head_dim,
            dtype: kv_dtype,
        };
        Ok(Self { max_len, limits, layouts: config.kv_groups().iter().map(layout).collect(), kv_dtype })
    }

    fn kv_bytes(&self) -> u64 {
        self.layouts.iter().map(|layout| layout.total_bytes() as u64).sum()
    }
}

/// Whether a model judges, and what else its files say.
fn judge_and_spec(plan: &Plan<'_>) -> Result<(Option<Judge>, Spec), EngineError> {
    let judge = Judge::read(plan.source)?;
    let spec = if judge.is_some() { Spec::of_judge() } else { Spec::read(plan.source, Pooling::Last)? };
    Ok((judge, spec))
}

/// Bytes of a decoder: of its weights, and of its cache and a batch's buffers.
pub(super) fn expected_bytes<B: Backend>(
    backend: &B,
    files: &ModelFiles,
    plan: &Plan<'_>,
) -> Result<(u64, u64), EngineError> {
    let ModelFiles { config, weights, .. } = files;
    let (_, spec) = judge_and_spec(plan)?;
    let dtype = dtype(plan.engine.dtype, weights.dtype_of(EMBEDDING).or(config.dtype));
    let choice = WeightChoice { dtype, quantize: plan.engine.quantize };
    let sizes = Sizes::of(config, dtype, plan, &spec)?;
    let weights = Decoder::expected_weight_bytes(backend, config, weights, choice);
    Ok((weights, sizes.kv_bytes() + Decoder::<B>::expected_buffer_bytes(config, sizes.limits.num_tokens)))
}

impl<B: Backend> DecoderPooler<B> {
    pub(super) fn load(mut backend: B, files: ModelFiles, plan: &Plan<'_>) -> Result<Loaded<Self>, EngineError> {
        let ModelFiles { mut config, weights, .. } = files;
        let (judge, spec) = judge_and_spec(plan)?;
        if spec.pooling != Pooling::Last {
            return Err(unsupported("pooling", "decoders are served with the last token's pooling"));
        }
        let dtype = dtype(plan.engine.dtype, weights.dtype_of(EMBEDDING).or(config.dtype));
        let choice = WeightChoice { dtype, quantize: plan.engine.quantize };
        config.drop_long_windows(plan.max_len(config.rope.max_len as usize, &spec) as u32);
        let Sizes { max_len, limits, layouts, kv_dtype } = Sizes::of(&config, dtype, plan, &spec)?;
        let kv_bytes: u64 = layouts.iter().map(|layout| layout.total_bytes() as u64).sum();
        let weight_bytes = Decoder::expected_weight_bytes(&backend, &config, &weights, choice);
        let mut buffers = Decoder::<B>::expected_buffer_bytes(&config, limits.num_tokens);
        if judge.is_some() {
            buffers += (backend.logits_tile() * config.vocab_size * DType::F32.size()) as u64;
        }
        plan.check_fits("weights, the cache and the buffers of a batch", weight_bytes + kv_bytes + buffers)?;
        let windows = config.kv_groups();
        let output = if judge.is_some() { Output::Logits } else { Output::Hidden };
        let decoder = Decoder::load(&mut backend, config, &weights, choice, limits.num_tokens, &windows, output)?;
        let (config, size) = (decoder.config(), decoder.size());
        let block_size = plan.settings.block_size as usize;
        let max_num_blocks = max_len.div_ceil(block_size);
        if let Some(judge) = judge
            && judge.answers.iter().any(|id| *id as usize >= config.vocab_size)
        {
            return Err(unsupported("vocab_size", "is less than the tokens of a reranker's answers"));
        }
        let (task, num_dimensions) = match judge {
            Some(_) => (PoolingTask::Score, 1),
            None => (PoolingTask::Embed, config.hidden_size as u32),
        };
        let pooling = PoolingInfo {
            task,
            num_dimensions,
            is_normalized: spec.normalize,
            prompts: spec.prompts,
            default_prompt: spec.default_prompt,
            pair_prompt: judge.map(|judge| judge.prompt),
        };
        let info = ModelInfo {
            architecture: config.architecture.to_owned(),
            vocab_size: config.vocab_size as u32,
            max_model_len: max_len as u32,
            digest: weights.digest(),
            eos_token_ids: Vec::new(),
            num_parameters: size.num_parameters,
            weight_bytes: size.weight_bytes,
            kv_cache_bytes: kv_bytes,
            device_memory: None,
            weight_format: size.format,
            dtype: dtype.name(),
            kv_dtype: kv_dtype.name(),
            device: backend.info(),
            device_note: plan.device_note.clone(),
            block_size: block_size as u32,
            num_blocks: layouts[0].num_blocks as u32,
            max_num_seqs: limits.num_seqs as u32,
            max_num_batched_tokens: limits.num_tokens as u32,
            prefix_cache: false,
            kv_events: false,
        };
        let arrays = Arrays::alloc(&mut backend, limits, windows.len(), max_num_blocks)?;
        let shape = config.attention_shape();
        backend.reserve(&StepLimits {
            num_tokens: limits.num_tokens,
            num_seqs: limits.num_seqs,
            context_len: max_len,
            shape,
        })?;
        let kv = layouts.iter().map(|layout| backend.alloc_kv(layout)).collect::<Result<_, _>>()?;
        let pooler = Self {
            backend,
            decoder,
            judge,
            normalize: spec.normalize,
            limits,
            block_size,
            max_num_blocks,
            kv,
            arrays,
            host: HostArrays::default(),
        };
        Ok(Loaded { pooler, info, pooling, limits })
    }

    /// Uploads and computes the tokens `chunk` (first and end) of each text.
    fn forward(&mut self, texts: &[(&[u32], usize, usize)]) -> Result<(), KernelError> {
        let Self { backend, decoder, kv, arrays, host, block_size, max_num_blocks, .. } = self;
        host.clear();
        let mut next_block = 0;
        for &(tokens, first, end) in texts {
            let num_blocks = end.div_ceil(*block_size);
            let row = host.block_tables.len();
            host.block_tables.resize(row + *max_num_blocks, 0);
            let blocks = host.block_tables[row..][..num_blocks].iter_mut().zip(next_block as u32..);
            blocks.for_each(|(entry, block)| *entry = block);
            host.tokens.extend_from_slice(&tokens[first..end]);
            host.positions.extend(first as u32..end as u32);
            let first_slot = next_block * *block_size;
            host.slots.extend((first_slot + first) as u32..(first_slot + end) as u32);
            host.cu_seqlens.push(host.tokens.len() as u32);
            host.context_lens.push(end as u32);
            host.gather.push(host.tokens.len() as u32 - 1);
            next_block += num_blocks;
        }
        let lists = [
            (&mut arrays.token_table, &host.tokens),
            (&mut arrays.positions, &host.positions),
            (&mut arrays.cu_seqlens, &host.cu_seqlens),
            (&mut arrays.context_lens, &host.context_lens),
            (&mut arrays.gather, &host.gather),
        ];
        let slots = arrays.slot_mapping.iter_mut().map(|buffer| (buffer, &host.slots));
        let tables = arrays.block_tables.iter_mut().map(|buffer| (buffer, &host.block_tables));
        for (buffer, list) in lists.into_iter().chain(slots).chain(tables) {
            backend.write_u32(buffer, 0, list)?;
        }
        decoder.forward(
            backend,
            StepInputs {
                num_tokens: host.tokens.len(),
                num_seqs: texts.len(),
                token_table: &arrays.token_table,
                token_indices: &arrays.token_indices,
                positions: &arrays.positions,
                cu_seqlens: &arrays.cu_seqlens,
                context_lens: &arrays.context_lens,
                rows: &arrays.rows,
                slot_mapping: &arrays.slot_mapping,
                block_tables: &arrays.block_tables,
                max_num_blocks: *max_num_blocks,
                kv,
            },
        )
    }

    /// Vectors of the texts of the last forward pass.
    fn last_states(&mut self, num_texts: usize) -> Result<Vec<Vec<f32>>, KernelError> {
        let Self { backend, decoder, arrays, .. } = self;
        let dim = decoder.config().hidden_size;
        let tile = backend.logits_tile();
        let mut vectors = Vec::with_capacity(num_texts);
        for first in (0..num_texts).step_by(tile) {
            let num_rows = tile.min(num_texts - first);
            let mut states = vec![0.0; num_rows * dim];
            let hidden = decoder.compute_hidden(backend, &arrays.gather, first, num_rows)?;
            backend.read_f32(hidden, 0, &mut states)?;
            vectors.extend(states.chunks_exact(dim).map(<[f32]>::to_vec));
        }
        if self.normalize {
            vectors.iter_mut().for_each(|vector| normalize(vector));
        }
        Ok(vectors)
    }
}

impl<B: Backend> DecoderPooler<B> {
    /// Scores of the texts of the last forward pass.
    fn scores(&mut self, judge: &Judge, num_texts: usize) -> Result<Vec<Vec<f32>>, KernelError> {
        let Self { backend, decoder, arrays, .. } = self;
        let (vocab_size, tile) = (decoder.config().vocab_size, backend.logits_tile());
        let mut scores = Vec::with_capacity(num_texts);
        for first in (0..num_texts).step_by(tile) {
            let num_rows = tile.min(num_texts - first);
            decoder.compute_logits(backend, &arrays.gather, first, num_rows)?;
            for row in 0..num_rows {
                let mut logits = [[0.0]; 2];
                for (logit, id) in logits.iter_mut().zip(judge.answers) {
                    backend.read_f32(decoder.logits(), row * vocab_size + id as usize, logit)?;
                }
                let [[no], [yes]] = logits;
                scores.push(vec![Judge::score(no, yes)]);
            }
        }
        Ok(scores)
    }
}

impl HostArrays {
    fn clear(&mut self) {
        let Self { tokens, positions, slots, cu_seqlens, context_lens, block_tables, gather } = self;
        for list in [tokens, positions, slots, cu_seqlens, context_lens, block_tables, gather] {
            list.clear();
        }
        self.cu_seqlens.push(0);
    }
}

impl<B: Backend> Arrays<B> {
    fn alloc(
        backend: &mut B,
        limits: BatchLimits,
        num_groups: usize,
        max_num_blocks: usize,
    ) -> Result<Self, KernelError> {
        let BatchLimits { num_tokens, num_seqs } = limits;
        let mut alloc = |len: usize| backend.alloc(DType::U32, len);
        let mut arrays = Self {
            token_table: alloc(num_tokens)?,
            token_indices: alloc(num_tokens)?,
            positions: alloc(num_tokens)?,
            cu_seqlens: alloc(num_seqs + 1)?,
            context_lens: alloc(num_seqs)?,
            rows: alloc(num_seqs)?,
            gather: alloc(num_seqs)?,
            slot_mapping: (0..num_groups).map(|_| alloc(num_tokens)).collect::<Result<_, _>>()?,
            block_tables: (0..num_groups).map(|_| alloc(num_seqs * max_num_blocks)).collect::<Result<_, _>>()?,
        };
        let numbers: Vec<u32> = (0..num_tokens.max(num_seqs) as u32).collect();
        backend.write_u32(&mut arrays.token_indices, 0, &numbers[..num_tokens])?;
        backend.write_u32(&mut arrays.rows, 0, &numbers[..num_seqs])?;
        Ok(arrays)
    }
}

impl<B: Backend> Pooler for DecoderPooler<B> {
    fn compute(&mut self, batch: &[&PoolingInput]) -> Result<Vec<Vec<f32>>, EngineError> {
        let chunk_len = self.limits.num_tokens;
        match batch {
            [text] if text.token_ids.len() > chunk_len => {
                let tokens = &text.token_ids[..];
                for first in (0..tokens.len()).step_by(chunk_len) {
                    self.forward(&[(tokens, first, tokens.len().min(first + chunk_len))])?;
                }
            }
            texts => {
                let texts: Vec<(&[u32], usize, usize)> =
                    texts.iter().map(|text| (&text.token_ids[..], 0, text.token_ids.len())).collect();
                self.forward(&texts)?;
            }
        }
        Ok(match self.judge {
            Some(judge) => self.scores(&judge, batch.len())?,
            None => self.last_states(batch.len())?,
        })
    }
}
