//! Decoders that were trained as embedders (the last token's normalised hidden state), as classifiers (a product of it for each
//! label) or as rerankers ([`Judge`]). A text that is longer than a batch is
//! computed in chunks; the KV cache holds one batch, or one text of the longest length, and is written anew by each.

use quire_kernels::ops::linear::Epilogue;
use quire_kernels::{Backend, DType, KernelError, KvLayout, StepLimits, WeightLayout};

use super::handle::PoolingInput;
use super::judge::{Judge, decoder_labels, pair_prompt};
use super::spec::{Pooling, PoolingInfo, PoolingTask, Spec};
use super::{Loaded, Plan, Pooler, normalize};
use crate::error::EngineError;
use crate::handle::ModelInfo;
use crate::model_executor::{dtype, kv_dtype};
use crate::model_files::ModelFiles;
use crate::models::config::{ModelConfig, unsupported};
use crate::models::decoder::{Decoder, EMBEDDING, Output, StepInputs};
use crate::models::encoder::BatchLimits;
use crate::models::labels::{Activation, Labels};
use crate::models::loader::{Loader, ModelSize, Projection, Role, WeightChoice, expected_bytes as matrix_bytes};
use crate::weights::Weights;

/// The module of a classification head.
const HEAD: &str = "score";

/// A decoder on a device, with the arrays of a batch.
pub(super) struct DecoderPooler<B: Backend> {
    backend: B,
    decoder: Decoder<B>,
    answer: Answer<B>,
    normalize: bool,
    limits: BatchLimits,
    block_size: usize,
    max_num_blocks: usize,
    kv: Vec<B::Kv>,
    arrays: Arrays<B>,
    host: HostArrays,
}

/// What is made of a text's last hidden state.
enum Answer<B: Backend> {
    Vector,
    Judged(Judge),
    Labels {
        head: Projection<B>,
        num_labels: usize,
        activation: Activation,
        /// `[logits_tile, num_labels]`
        logits: B::Buffer,
    },
}

/// The same, as the files say it.
enum Wanted {
    Vector,
    Judged(Judge),
    Labels(Labels),
}

impl Wanted {
    /// And what else the files say.
    fn read(plan: &Plan<'_>) -> Result<(Self, Spec), EngineError> {
        if let Some(judge) = Judge::read(plan.source)? {
            return Ok((Self::Judged(judge), Spec::bare()));
        }
        match decoder_labels(plan.source)? {
            Some(labels) => Ok((Self::Labels(labels), Spec::bare())),
            None => Ok((Self::Vector, Spec::read(plan.source, Pooling::Last)?)),
        }
    }

    fn output(&self) -> Output {
        if let Self::Judged(_) = self { Output::Logits } else { Output::Hidden }
    }

    /// Bytes of all matrices, and of the buffers of a batch of at most `num_tokens`.
    fn expected_bytes<B: Backend>(
        &self,
        backend: &B,
        config: &ModelConfig,
        weights: &Weights,
        choice: WeightChoice,
        num_tokens: usize,
    ) -> (u64, u64) {
        let (head, num_logits) = match self {
            Self::Vector => (0, 0),
            Self::Judged(_) => (0, config.vocab_size),
            Self::Labels(Labels { names, .. }) => {
                let module = [(format!("{HEAD}.weight"), names.len())];
                let shape = (config.hidden_size, WeightLayout::Stacked);
                (matrix_bytes(backend, weights, choice, Role::Projection, &module, shape), names.len())
            }
        };
        let matrices = Decoder::expected_weight_bytes(backend, config, weights, choice, self.output());
        let logits = (backend.logits_tile() * num_logits * DType::F32.size()) as u64;
        (matrices + head, Decoder::<B>::expected_buffer_bytes(config, num_tokens) + logits)
    }
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

/// Bytes of a decoder: of its weights, and of its cache and a batch's buffers.
pub(super) fn expected_bytes<B: Backend>(
    backend: &B,
    files: &ModelFiles,
    plan: &Plan<'_>,
) -> Result<(u64, u64), EngineError> {
    let ModelFiles { config, weights, .. } = files;
    let (wanted, spec) = Wanted::read(plan)?;
    let dtype = dtype(plan.engine.dtype, weights.dtype_of(EMBEDDING).or(config.dtype));
    let choice = WeightChoice { dtype, quantize: plan.engine.quantize };
    let sizes = Sizes::of(config, dtype, plan, &spec)?;
    let (weight_bytes, buffer_bytes) = wanted.expected_bytes(backend, config, weights, choice, sizes.limits.num_tokens);
    Ok((weight_bytes, sizes.kv_bytes() + buffer_bytes))
}

impl<B: Backend> DecoderPooler<B> {
    pub(super) fn load(mut backend: B, files: ModelFiles, plan: &Plan<'_>) -> Result<Loaded<Self>, EngineError> {
        let ModelFiles { mut config, weights, .. } = files;
        let (wanted, spec) = Wanted::read(plan)?;
        if spec.pooling != Pooling::Last {
            return Err(unsupported("pooling", "decoders are served with the last token's pooling"));
        }
        let dtype = dtype(plan.engine.dtype, weights.dtype_of(EMBEDDING).or(config.dtype));
        let choice = WeightChoice { dtype, quantize: plan.engine.quantize };
        config.drop_long_windows(plan.max_len(config.rope.max_len as usize, &spec) as u32);
        let Sizes { max_len, limits, layouts, kv_dtype } = Sizes::of(&config, dtype, plan, &spec)?;
        let kv_bytes: u64 = layouts.iter().map(|layout| layout.total_bytes() as u64).sum();
        let (weight_bytes, buffers) = wanted.expected_bytes(&backend, &config, &weights, choice, limits.num_tokens);
        plan.check_fits("weights, the cache and the buffers of a batch", weight_bytes + kv_bytes + buffers)?;
        let windows = config.kv_groups();
        // First, so that the decoder finds its head's weights read.
        let (answer, head_size) = Answer::load(&mut backend, &config, &weights, choice, &wanted)?;
        let decoder =
            Decoder::load(&mut backend, config, &weights, choice, limits.num_tokens, &windows, wanted.output())?;
        let (config, size) = (decoder.config(), decoder.size());
        let block_size = plan.settings.block_size as usize;
        let max_num_blocks = max_len.div_ceil(block_size);
        if let Wanted::Judged(judge) = wanted
            && judge.answers.iter().any(|id| *id as usize >= config.vocab_size)
        {
            return Err(unsupported("vocab_size", "is less than the tokens of a reranker's answers"));
        }
        let pair_prompt = match &wanted {
            Wanted::Vector => None,
            Wanted::Judged(judge) => Some(judge.prompt),
            Wanted::Labels(_) => pair_prompt(plan.source)?,
        };
        let (task, num_dimensions, labels) = match &wanted {
            Wanted::Vector => (PoolingTask::Embed, config.hidden_size, Vec::new()),
            Wanted::Judged(_) => (PoolingTask::Score, 1, Vec::new()),
            Wanted::Labels(Labels { names, .. }) => (PoolingTask::of_labels(names.len()), names.len(), names.clone()),
        };
        let pooling = PoolingInfo {
            task,
            num_dimensions: num_dimensions as u32,
            is_normalized: spec.normalize,
            prompts: spec.prompts,
            default_prompt: spec.default_prompt,
            pair_prompt,
            labels: labels.into(),
        };
        let info = ModelInfo {
            architecture: config.architecture.to_owned(),
            vocab_size: config.vocab_size as u32,
            max_model_len: max_len as u32,
            digest: weights.digest(),
            eos_token_ids: Vec::new(),
            num_parameters: size.num_parameters + head_size.num_parameters,
            weight_bytes: size.weight_bytes + head_size.weight_bytes,
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
            answer,
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
    /// Numbers for each label of the texts of the last forward pass.
    fn classes(&mut self, num_texts: usize) -> Result<Vec<Vec<f32>>, KernelError> {
        let Self { backend, decoder, arrays, answer, .. } = self;
        let Answer::Labels { head, num_labels, activation, logits } = answer else { unreachable!("there is a head") };
        let tile = backend.logits_tile();
        let mut classes = Vec::with_capacity(num_texts);
        for first in (0..num_texts).step_by(tile) {
            let num_rows = tile.min(num_texts - first);
            let mut found = vec![0.0; num_rows * *num_labels];
            let hidden = decoder.compute_hidden(backend, &arrays.gather, first, num_rows)?;
            head.apply(backend, hidden, num_rows, Epilogue::Store, logits)?;
            backend.read_f32(logits, 0, &mut found)?;
            found.chunks_exact_mut(*num_labels).for_each(|logits| activation.apply(logits));
            classes.extend(found.chunks_exact(*num_labels).map(<[f32]>::to_vec));
        }
        Ok(classes)
    }

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

impl<B: Backend> Answer<B> {
    fn load(
        backend: &mut B,
        config: &ModelConfig,
        weights: &Weights,
        choice: WeightChoice,
        wanted: &Wanted,
    ) -> Result<(Self, ModelSize), EngineError> {
        let (num_labels, activation) = match wanted {
            Wanted::Vector => return Ok((Self::Vector, ModelSize::default())),
            Wanted::Judged(judge) => return Ok((Self::Judged(*judge), ModelSize::default())),
            Wanted::Labels(labels) => (labels.names.len(), labels.activation),
        };
        let mut loader = Loader::new(backend, weights, choice);
        let module = [(HEAD.to_owned(), num_labels)];
        let head = loader.projection(&module, config.hidden_size, WeightLayout::Stacked, false)?;
        let size = loader.finish();
        let logits = backend.alloc(DType::F32, backend.logits_tile() * num_labels)?;
        Ok((Self::Labels { head, num_labels, activation, logits }, size))
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
        Ok(match self.answer {
            Answer::Judged(judge) => self.scores(&judge, batch.len())?,
            Answer::Labels { .. } => self.classes(batch.len())?,
            Answer::Vector => self.last_states(batch.len())?,
        })
    }
}
