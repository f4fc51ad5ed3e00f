//! The encoder that BERT and XLM-RoBERTa share: attention in both directions and an MLP, each followed by a layer norm of
//! its sum with what went in, written once over [`Backend`].
//!
//! All buffers are allocated when the model is loaded, for the largest batch; a batch allocates nothing.

mod config;

use quire_kernels::ops::activation::{Activation, ActivationKind};
use quire_kernels::ops::add_rows::AddRows;
use quire_kernels::ops::embed::Embed;
use quire_kernels::ops::encoder_attention::EncoderAttention;
use quire_kernels::ops::gather_rows::GatherRows;
use quire_kernels::ops::layer_norm::LayerNorm;
use quire_kernels::ops::linear::{Epilogue, WeightShape};
use quire_kernels::{Backend, DType, KernelError, WeightLayout};

pub(crate) use config::{EncoderConfig, Family, encoder_architecture};

use super::loader::{Loader, ModelSize, Projection, Role, WeightChoice};
use crate::error::EngineError;
use crate::weights::Weights;

const WORDS: &str = "embeddings.word_embeddings.weight";

/// One batch, on the device.
pub(crate) struct EncoderInputs<'a, B: Backend> {
    pub num_tokens: usize,
    pub num_seqs: usize,
    /// `U32`, `[num_tokens]` each: ids, 0 and on, rows of the table of positions, kinds.
    pub token_ids: &'a B::Buffer,
    pub token_indices: &'a B::Buffer,
    pub positions: &'a B::Buffer,
    pub token_types: &'a B::Buffer,
    /// `U32`, `[num_seqs + 1]`
    pub cu_seqlens: &'a B::Buffer,
}

/// The most that a batch holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BatchLimits {
    pub num_tokens: usize,
    pub num_seqs: usize,
}

/// A loaded encoder.
pub(crate) struct Encoder<B: Backend> {
    config: EncoderConfig,
    words: B::Weight,
    positions: B::Buffer,
    token_types: B::Buffer,
    norm: Norm<B>,
    layers: Vec<Layer<B>>,
    head: Option<ClassHead<B>>,
    buffers: Buffers<B>,
    size: ModelSize,
}

struct Norm<B: Backend> {
    weight: B::Buffer,
    bias: B::Buffer,
}

struct Layer<B: Backend> {
    qkv: Projection<B>,
    attention_out: Projection<B>,
    attention_norm: Norm<B>,
    up: Projection<B>,
    down: Projection<B>,
    norm: Norm<B>,
}

/// What makes a number for each label of a sequence's first hidden state: a hyperbolic tangent between two products.
struct ClassHead<B: Backend> {
    dense: Projection<B>,
    out: Projection<B>,
}

/// Activations, `[num_tokens, width]` each, and of whole sequences `[num_seqs, width]`.
struct Buffers<B: Backend> {
    /// What the layers hand on.
    hidden: B::Buffer,
    /// Sums before their norm.
    summed: B::Buffer,
    qkv: B::Buffer,
    attention: B::Buffer,
    mlp: B::Buffer,
    first: B::Buffer,
    dense: B::Buffer,
    logits: B::Buffer,
}

/// What the names of a model's tensors begin with, those of its head left out.
fn base_of(config: &EncoderConfig, weights: &Weights) -> &'static str {
    let base = match config.family {
        Family::Bert => "bert.",
        Family::XlmRoberta => "roberta.",
    };
    // A model without a head is mostly saved without the prefix.
    match config.labels {
        None if !weights.contains(&format!("{base}{WORDS}")) => "",
        None | Some(_) => base,
    }
}

/// What the files store the words' vectors as, where they have them as numbers.
pub(crate) fn stored_dtype(config: &EncoderConfig, weights: &Weights) -> Option<DType> {
    weights.dtype_of(&format!("{}{WORDS}", base_of(config, weights)))
}

impl<B: Backend> Encoder<B> {
    /// Packs all weights as `choice` says and allocates buffers for batches within `limits`.
    pub(crate) fn load(
        backend: &mut B,
        config: EncoderConfig,
        weights: &Weights,
        choice: WeightChoice,
        limits: BatchLimits,
    ) -> Result<Self, EngineError> {
        let base = base_of(&config, weights);
        let name = |part: &str| format!("{base}{part}");
        let hidden = config.hidden_size;
        let mut loader = Loader::new(backend, weights, choice);
        let words = loader.vocabulary(&[(name(WORDS), config.vocab_size)], hidden)?;
        let positions = loader.table(&name("embeddings.position_embeddings.weight"), config.num_positions, hidden)?;
        let token_types =
            loader.table(&name("embeddings.token_type_embeddings.weight"), config.num_token_types, hidden)?;
        let norm = loader.layer_norm(&name("embeddings.LayerNorm"), hidden)?;
        let layers = (0..config.num_layers)
            .map(|index| loader.encoder_layer(&config, &name(&format!("encoder.layer.{index}."))))
            .collect::<Result<_, _>>()?;
        let pooler = name("pooler.dense");
        let head = match &config.labels {
            None => None,
            Some(labels) => {
                let [dense, out] = match config.family {
                    Family::Bert => [pooler.clone(), "classifier".to_owned()],
                    Family::XlmRoberta => ["classifier.dense", "classifier.out_proj"].map(str::to_owned),
                };
                let dense = loader.projection(&[(dense, hidden)], hidden, WeightLayout::Stacked, true)?;
                let out = loader.projection(&[(out, labels.names.len())], hidden, WeightLayout::Stacked, true)?;
                Some(ClassHead { dense, out })
            }
        };
        let size = loader.finish();
        // Made for another task, and often there still.
        weights.pass_over(&[format!("{pooler}.weight"), format!("{pooler}.bias")]);
        weights.refuse_unread(&[])?;
        let buffers = Buffers::alloc(backend, &config, limits)?;
        Ok(Self { config, words, positions, token_types, norm, layers, head, buffers, size })
    }

    /// Bytes on the device of all matrices and tables, and of the buffers of batches within `limits`.
    pub(crate) fn expected_bytes(
        backend: &B,
        config: &EncoderConfig,
        choice: WeightChoice,
        limits: BatchLimits,
    ) -> (u64, u64) {
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let bytes = |out_features, in_features, role| {
            let format = choice.format_of_numbers(role, in_features);
            let layout = WeightLayout::Stacked;
            backend.weight_bytes(&WeightShape { out_features, in_features, layout, format }) as u64
        };
        let layer = bytes(3 * hidden, hidden, Role::Projection)
            + bytes(hidden, hidden, Role::Projection)
            + bytes(intermediate, hidden, Role::Projection)
            + bytes(hidden, intermediate, Role::Projection);
        let tables = (config.num_positions + config.num_token_types) * hidden * DType::F32.size();
        let weights =
            bytes(config.vocab_size, hidden, Role::Vocabulary) + config.num_layers as u64 * layer + tables as u64;
        let of_tokens = limits.num_tokens * (6 * hidden + intermediate);
        let of_seqs = limits.num_seqs * (2 * hidden + config.num_labels());
        (weights, ((of_tokens + of_seqs) * DType::F32.size()) as u64)
    }

    pub(crate) fn config(&self) -> &EncoderConfig {
        &self.config
    }

    pub(crate) fn size(&self) -> ModelSize {
        self.size
    }

    /// Hidden states of the last batch, `[num_tokens, hidden_size]`.
    pub(crate) fn hidden(&self) -> &B::Buffer {
        &self.buffers.hidden
    }

    /// Computes the hidden states of a batch.
    pub(crate) fn forward(&mut self, backend: &mut B, inputs: &EncoderInputs<'_, B>) -> Result<(), KernelError> {
        let Self { config, words, positions, token_types, norm, layers, buffers, .. } = self;
        let (num_tokens, dim, eps) = (inputs.num_tokens, config.hidden_size, config.layer_norm_eps);
        let Buffers { hidden, summed, qkv, attention, mlp, .. } = buffers;
        let normalize = |backend: &mut B, norm: &Norm<B>, x: &B::Buffer, out: &mut B::Buffer| {
            let Norm { weight, bias } = norm;
            backend.layer_norm(LayerNorm { x, weight, bias, eps, num_rows: num_tokens, dim, out })
        };

        backend.embed(Embed {
            table: words,
            token_table: inputs.token_ids,
            token_indices: inputs.token_indices,
            num_tokens,
            out: summed,
        })?;
        for (table, indices) in [(&*token_types, inputs.token_types), (&*positions, inputs.positions)] {
            backend.add_rows(AddRows { table, dim, indices, num_rows: num_tokens, out: summed })?;
        }
        normalize(backend, norm, summed, hidden)?;
        for layer in layers {
            layer.qkv.apply(backend, hidden, num_tokens, Epilogue::Store, qkv)?;
            backend.encoder_attention(EncoderAttention {
                qkv,
                num_tokens,
                num_seqs: inputs.num_seqs,
                num_heads: config.num_heads,
                head_dim: config.head_dim(),
                scale: (config.head_dim() as f32).sqrt().recip(),
                cu_seqlens: inputs.cu_seqlens,
                out: attention,
            })?;
            layer.attention_out.apply(backend, attention, num_tokens, Epilogue::Add, hidden)?;
            normalize(backend, &layer.attention_norm, hidden, summed)?;
            layer.up.apply(backend, summed, num_tokens, Epilogue::Store, mlp)?;
            let len = num_tokens * config.intermediate_size;
            backend.activation(Activation { kind: config.activation, len, x: mlp })?;
            layer.down.apply(backend, mlp, num_tokens, Epilogue::Add, summed)?;
            normalize(backend, &layer.norm, summed, hidden)?;
        }
        Ok(())
    }

    /// Logits of the sequences whose first tokens are at `firsts` (`U32`, `[num_seqs]`), `[num_seqs, num_labels]`.
    pub(crate) fn classify(
        &mut self,
        backend: &mut B,
        firsts: &B::Buffer,
        num_seqs: usize,
    ) -> Result<&B::Buffer, KernelError> {
        let Self { config, head, buffers, .. } = self;
        let Buffers { hidden, first, dense, logits, .. } = buffers;
        let head = head.as_ref().expect("a model with labels has a head");
        let dim = config.hidden_size;
        let (indices, num_rows) = (firsts, num_seqs);
        backend.gather_rows(GatherRows { x: hidden, dim, indices, indices_offset: 0, num_rows, out: first })?;
        head.dense.apply(backend, first, num_rows, Epilogue::Store, dense)?;
        backend.activation(Activation { kind: ActivationKind::Tanh, len: num_rows * dim, x: dense })?;
        head.out.apply(backend, dense, num_rows, Epilogue::Store, logits)?;
        Ok(logits)
    }
}

impl<B: Backend> Buffers<B> {
    fn alloc(backend: &mut B, config: &EncoderConfig, limits: BatchLimits) -> Result<Self, KernelError> {
        let BatchLimits { num_tokens, num_seqs } = limits;
        let hidden = config.hidden_size;
        let mut alloc = |rows: usize, width: usize| backend.alloc(DType::F32, rows * width);
        Ok(Self {
            hidden: alloc(num_tokens, hidden)?,
            summed: alloc(num_tokens, hidden)?,
            qkv: alloc(num_tokens, 3 * hidden)?,
            attention: alloc(num_tokens, hidden)?,
            mlp: alloc(num_tokens, config.intermediate_size)?,
            first: alloc(num_seqs, hidden)?,
            dense: alloc(num_seqs, hidden)?,
            logits: alloc(num_seqs, config.num_labels())?,
        })
    }
}

impl<B: Backend> Loader<'_, B> {
    fn layer_norm(&mut self, name: &str, dim: usize) -> Result<Norm<B>, EngineError> {
        Ok(Norm {
            weight: self.vectors(&[(format!("{name}.weight"), dim)])?,
            bias: self.vectors(&[(format!("{name}.bias"), dim)])?,
        })
    }

    /// The tensors of a layer, whose names begin with `prefix`.
    fn encoder_layer(&mut self, config: &EncoderConfig, prefix: &str) -> Result<Layer<B>, EngineError> {
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let qkv = ["query", "key", "value"].map(|part| (format!("{prefix}attention.self.{part}"), hidden));
        let mut one = |name: &str, out_features, in_features| {
            let module = [(format!("{prefix}{name}"), out_features)];
            self.projection(&module, in_features, WeightLayout::Stacked, true)
        };
        let attention_out = one("attention.output.dense", hidden, hidden)?;
        let up = one("intermediate.dense", intermediate, hidden)?;
        let down = one("output.dense", hidden, intermediate)?;
        Ok(Layer {
            qkv: self.projection(&qkv, hidden, WeightLayout::Stacked, true)?,
            attention_out,
            attention_norm: self.layer_norm(&format!("{prefix}attention.output.LayerNorm"), hidden)?,
            up,
            down,
            norm: self.layer_norm(&format!("{prefix}output.LayerNorm"), hidden)?,
        })
    }
}
