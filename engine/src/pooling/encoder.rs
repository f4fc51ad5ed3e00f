//! Encoders: whole texts, side by side, and what is wanted of their hidden states.

use quire_kernels::{Backend, DType, KernelError};

use super::handle::PoolingInput;
use super::spec::{Pooling, PoolingInfo, PoolingTask, Spec};
use super::{Loaded, Plan, Pooler, normalize};
use crate::error::EngineError;
use crate::handle::ModelInfo;
use crate::model_executor::dtype;
use crate::models::encoder::{BatchLimits, Encoder, EncoderConfig, EncoderInputs, stored_dtype};
use crate::models::labels::Activation;
use crate::models::loader::WeightChoice;
use crate::weights::Weights;

/// An encoder on a device, with the arrays of a batch.
pub(super) struct EncoderPooler<B: Backend> {
    backend: B,
    encoder: Encoder<B>,
    pooling: Pooling,
    normalize: bool,
    /// `[num_tokens]` each, as [`EncoderInputs`] says.
    token_ids: B::Buffer,
    token_indices: B::Buffer,
    positions: B::Buffer,
    token_types: B::Buffer,
    /// `[num_seqs + 1]`
    cu_seqlens: B::Buffer,
    host: HostArrays,
}

/// The same on the host, and hidden states that were read.
#[derive(Default)]
struct HostArrays {
    token_ids: Vec<u32>,
    positions: Vec<u32>,
    token_types: Vec<u32>,
    cu_seqlens: Vec<u32>,
    hidden: Vec<f32>,
}

impl<B: Backend> EncoderPooler<B> {
    pub(super) fn load(
        mut backend: B,
        config: EncoderConfig,
        weights: &Weights,
        plan: &Plan<'_>,
    ) -> Result<Loaded<Self>, EngineError> {
        let spec = Spec::read(plan.source, Pooling::Mean)?;
        let choice = choice_of(&config, weights, plan);
        let max_len = plan.max_len(config.max_len(), &spec);
        let limits = plan.batch_limits(max_len);
        let (weight_bytes, working_bytes) = Encoder::expected_bytes(&backend, &config, choice, limits);
        plan.check_fits("weights and the buffers of a batch", weight_bytes + working_bytes)?;
        let encoder = Encoder::load(&mut backend, config, weights, choice, limits)?;
        let (config, size) = (encoder.config(), encoder.size());
        let labels = config.labels.as_ref().map_or_else(Vec::new, |labels| labels.names.clone());
        let pooling = PoolingInfo {
            task: PoolingTask::of_labels(labels.len()),
            num_dimensions: if labels.is_empty() { config.hidden_size } else { labels.len() } as u32,
            is_normalized: spec.normalize && labels.is_empty(),
            prompts: spec.prompts,
            default_prompt: spec.default_prompt,
            pair_prompt: None,
            labels: labels.into(),
        };
        let info = ModelInfo {
            architecture: config.architecture.to_owned(),
            vocab_size: config.vocab_size as u32,
            max_model_len: max_len as u32,
            digest: weights.digest(),
            eos_token_ids: Vec::new(),
            num_parameters: size.num_parameters,
            weight_bytes: size.weight_bytes,
            kv_cache_bytes: 0,
            device_memory: None,
            weight_format: size.format,
            dtype: choice.dtype.name(),
            kv_dtype: choice.dtype.name(),
            device: backend.info(),
            device_note: plan.device_note.clone(),
            block_size: 0,
            num_blocks: 0,
            max_num_seqs: limits.num_seqs as u32,
            max_num_batched_tokens: limits.num_tokens as u32,
            prefix_cache: false,
            kv_events: false,
        };
        let mut alloc = |len: usize| backend.alloc(DType::U32, len);
        let mut token_indices = alloc(limits.num_tokens)?;
        let [token_ids, positions, token_types] =
            [alloc(limits.num_tokens)?, alloc(limits.num_tokens)?, alloc(limits.num_tokens)?];
        let cu_seqlens = alloc(limits.num_seqs + 1)?;
        let indices: Vec<u32> = (0..limits.num_tokens as u32).collect();
        backend.write_u32(&mut token_indices, 0, &indices)?;
        let pooler = Self {
            backend,
            encoder,
            pooling: spec.pooling,
            normalize: spec.normalize,
            token_ids,
            token_indices,
            positions,
            token_types,
            cu_seqlens,
            host: HostArrays::default(),
        };
        Ok(Loaded { pooler, info, pooling, limits })
    }

    /// The vector of the texts' hidden states, on the host: their sums are in f64, in order of position.
    fn pool(&mut self) -> Result<Vec<Vec<f32>>, KernelError> {
        let Self { backend, encoder, pooling, normalize: normalized, host, .. } = self;
        let dim = encoder.config().hidden_size;
        let num_tokens = host.token_ids.len();
        host.hidden.resize(num_tokens * dim, 0.0);
        backend.read_f32(encoder.hidden(), 0, &mut host.hidden)?;
        let vectors = host.cu_seqlens.windows(2).map(|bounds| {
            let states = &host.hidden[bounds[0] as usize * dim..bounds[1] as usize * dim];
            let mut vector = match pooling {
                Pooling::First => states[..dim].to_vec(),
                Pooling::Last => states[states.len() - dim..].to_vec(),
                Pooling::Mean => mean(states, dim),
            };
            if *normalized {
                normalize(&mut vector);
            }
            vector
        });
        Ok(vectors.collect())
    }

    fn classify(
        &mut self,
        num_seqs: usize,
        num_labels: usize,
        activation: Activation,
    ) -> Result<Vec<Vec<f32>>, KernelError> {
        let Self { backend, encoder, cu_seqlens, .. } = self;
        // The starts of the sequences are all offsets but the last.
        let found = encoder.classify(backend, cu_seqlens, num_seqs)?;
        let mut logits = vec![0.0; num_seqs * num_labels];
        backend.read_f32(found, 0, &mut logits)?;
        logits.chunks_exact_mut(num_labels).for_each(|logits| activation.apply(logits));
        Ok(logits.chunks_exact(num_labels).map(<[f32]>::to_vec).collect())
    }
}

/// The mean of rows of `dim` numbers.
fn mean(states: &[f32], dim: usize) -> Vec<f32> {
    let mut sums = vec![0.0_f64; dim];
    for row in states.chunks_exact(dim) {
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
    }
    let num_rows = (states.len() / dim) as f64;
    sums.into_iter().map(|sum| (sum / num_rows) as f32).collect()
}

/// What an encoder's weights become: what the files have counts more than what their configuration says.
fn choice_of(config: &EncoderConfig, weights: &Weights, plan: &Plan<'_>) -> WeightChoice {
    let stored = stored_dtype(config, weights).or(config.dtype);
    WeightChoice { dtype: dtype(plan.engine.dtype, stored), quantize: plan.engine.quantize }
}

/// Bytes of an encoder: of its weights, and of a batch's buffers.
pub(super) fn expected_bytes<B: Backend>(
    backend: &B,
    config: &EncoderConfig,
    weights: &Weights,
    plan: &Plan<'_>,
) -> Result<(u64, u64), EngineError> {
    let spec = Spec::read(plan.source, Pooling::Mean)?;
    let limits: BatchLimits = plan.batch_limits(plan.max_len(config.max_len(), &spec));
    let choice = choice_of(config, weights, plan);
    Ok(Encoder::expected_bytes(backend, config, choice, limits))
}

impl<B: Backend> Pooler for EncoderPooler<B> {
    fn compute(&mut self, batch: &[&PoolingInput]) -> Result<Vec<Vec<f32>>, EngineError> {
        let config = self.encoder.config();
        let (first_position, last_type) = (config.first_position as u32, config.num_token_types as u32 - 1);
        let labels = config.labels.as_ref().map(|labels| (labels.names.len(), labels.activation));
        let host = &mut self.host;
        host.token_ids.clear();
        host.positions.clear();
        host.token_types.clear();
        host.cu_seqlens.clear();
        host.cu_seqlens.push(0);
        for input in batch {
            let len = input.token_ids.len() as u32;
            host.token_ids.extend_from_slice(&input.token_ids);
            host.positions.extend(first_position..first_position + len);
            let second_from = input.second_from.unwrap_or(len);
            host.token_types.extend((0..len).map(|position| u32::from(position >= second_from).min(last_type)));
            host.cu_seqlens.push(host.token_ids.len() as u32);
        }
        let backend = &mut self.backend;
        backend.write_u32(&mut self.token_ids, 0, &host.token_ids)?;
        backend.write_u32(&mut self.positions, 0, &host.positions)?;
        backend.write_u32(&mut self.token_types, 0, &host.token_types)?;
        backend.write_u32(&mut self.cu_seqlens, 0, &host.cu_seqlens)?;
        let inputs = EncoderInputs {
            num_tokens: host.token_ids.len(),
            num_seqs: batch.len(),
            token_ids: &self.token_ids,
            token_indices: &self.token_indices,
            positions: &self.positions,
            token_types: &self.token_types,
            cu_seqlens: &self.cu_seqlens,
        };
        self.encoder.forward(backend, &inputs)?;
        Ok(match labels {
            Some((num_labels, activation)) => self.classify(batch.len(), num_labels, activation)?,
            None => self.pool()?,
        })
    }
}
