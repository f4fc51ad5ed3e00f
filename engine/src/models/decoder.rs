//! The decoder that all served architectures share: attention and a gated MLP between RMS norms, written once over
//! [`Backend`].
//!
//! All buffers are allocated when the model is loaded, for the largest step; a step allocates nothing.

use quire_kernels::ops::embed::Embed;
use quire_kernels::ops::gather_rows::GatherRows;
use quire_kernels::ops::linear::{Epilogue, Linear, NormLinear, SQUARES_FEATURES};
use quire_kernels::ops::paged_attention::PagedAttention;
use quire_kernels::ops::rms_norm::RmsNorm;
use quire_kernels::ops::rope_kv_write::{QkNorm, RopeKvWrite};
use quire_kernels::ops::rope_table::RopeTable;
use quire_kernels::{Backend, DType, KernelError, WeightLayout};

use super::config::ModelConfig;
use super::loader::{Fused, Loader, ModelSize, Projection, Role, WeightChoice, expected_bytes};
use crate::error::EngineError;
use crate::weights::Weights;

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
const FINAL_NORM: &str = "model.norm.weight";
const LM_HEAD: &str = "lm_head.weight";

/// One step's batch, on the device. Shapes as in the operations that read them.
pub(crate) struct StepInputs<'a, B: Backend> {
    pub num_tokens: usize,
    pub num_seqs: usize,
    pub token_table: &'a B::Buffer,
    pub token_indices: &'a B::Buffer,
    pub positions: &'a B::Buffer,
    pub cu_seqlens: &'a B::Buffer,
    pub context_lens: &'a B::Buffer,
    pub rows: &'a B::Buffer,
    /// One per KV group, like the tables and the caches.
    pub slot_mapping: &'a [B::Buffer],
    pub block_tables: &'a [B::Buffer],
    pub max_num_blocks: usize,
    pub kv: &'a mut [B::Kv],
}

/// What is wanted of the last layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    Logits,
    /// Normalised hidden states alone, see [`Decoder::compute_hidden`].
    Hidden,
}

/// A loaded model.
pub(crate) struct Decoder<B: Backend> {
    config: ModelConfig,
    embedding: B::Weight,
    /// `None` where the embedding is used for the output too.
    lm_head: Option<B::Weight>,
    layers: Vec<Layer<B>>,
    final_norm: B::Buffer,
    buffers: Buffers<B>,
    size: ModelSize,
}

struct Layer<B: Backend> {
    input_norm: B::Buffer,
    qkv: Projection<B>,
    qk_norm: Option<[B::Buffer; 2]>,
    o: Projection<B>,
    post_norm: B::Buffer,
    gate_up: Projection<B>,
    down: Projection<B>,
    window: Option<u32>,
    /// Which KV group the layer belongs to, and its index there.
    group: usize,
    layer_in_group: usize,
}

/// Activations, `[max_num_tokens, width]` each; the last three `[logits_tile, width]`: the logits of a long
/// prompt would be larger than the model.
struct Buffers<B: Backend> {
    hidden: B::Buffer,
    /// Sums of squares of `hidden`, see [`Backend::add_linear`].
    squares: B::Buffer,
    normed: B::Buffer,
    qkv: B::Buffer,
    attention: B::Buffer,
    mlp: B::Buffer,
    cos_sin: B::Buffer,
    gathered: B::Buffer,
    gathered_normed: B::Buffer,
    logits: B::Buffer,
}

impl<B: Backend> Decoder<B> {
    /// Packs all weights as `choice` says and allocates buffers for steps of at most `max_num_tokens`. `kv_groups` are the
    /// windows of the KV groups; every layer's window is one of them. A model of [`Output::Hidden`] whose files have no output
    /// matrix needs none.
    pub(crate) fn load(
        backend: &mut B,
        config: ModelConfig,
        weights: &Weights,
        choice: WeightChoice,
        max_num_tokens: usize,
        kv_groups: &[Option<u32>],
        output: Output,
    ) -> Result<Self, EngineError> {
        let mut loader = Loader::new(backend, weights, choice);
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let embedding = loader.vocabulary(&[(EMBEDDING.to_owned(), vocab)], hidden)?;
        let has_output = output == Output::Logits || weights.contains(LM_HEAD);
        let lm_head = match config.tie_word_embeddings || !has_output {
            true => None,
            false => Some(loader.vocabulary(&[(LM_HEAD.to_owned(), vocab)], hidden)?),
        };
        let final_norm = loader.vectors(&[(FINAL_NORM.to_owned(), hidden)])?;
        let mut layers_in_group = vec![0; kv_groups.len()];
        let mut layers = Vec::with_capacity(config.num_layers);
        for (index, &window) in config.facts.windows.iter().enumerate() {
            let group = kv_groups.iter().position(|kind| *kind == window).expect("every window has its group");
            let layer_in_group = layers_in_group[group];
            layers_in_group[group] += 1;
            layers.push(loader.layer(&config, index, window, group, layer_in_group)?);
        }
        let size = loader.finish();
        weights.refuse_unread(if config.tie_word_embeddings { &[(LM_HEAD, EMBEDDING)] } else { &[] })?;
        let buffers = Buffers::alloc(backend, &config, max_num_tokens, output)?;
        Ok(Self { config, embedding, lm_head, layers, final_norm, buffers, size })
    }

    /// Bytes on the device of the matrices that [`Decoder::load`] takes, by what the files hold of each.
    pub(crate) fn expected_weight_bytes(
        backend: &B,
        config: &ModelConfig,
        weights: &Weights,
        choice: WeightChoice,
        output: Output,
    ) -> u64 {
        let vocabulary = |name: &str| {
            let tensor = [(name.to_owned(), config.vocab_size)];
            let shape = (config.hidden_size, WeightLayout::Stacked);
            expected_bytes(backend, weights, choice, Role::Vocabulary, &tensor, shape)
        };
        let projection = |Fused { modules, in_features, layout, .. }: Fused| {
            let tensors: Vec<_> = modules.into_iter().map(|(name, rows)| (format!("{name}.weight"), rows)).collect();
            expected_bytes(backend, weights, choice, Role::Projection, &tensors, (in_features, layout))
        };
        let has_output = output == Output::Logits || weights.contains(LM_HEAD);
        let lm_head = if config.tie_word_embeddings || !has_output { 0 } else { vocabulary(LM_HEAD) };
        let layers = (0..config.num_layers).flat_map(|index| {
            let Matrices { qkv, o, gate_up, down } = Matrices::of_layer(config, index);
            [qkv, o, gate_up, down]
        });
        vocabulary(EMBEDDING) + lm_head + layers.map(projection).sum::<u64>()
    }

    /// Bytes of the buffers of steps of at most `max_num_tokens`, those of logits left out.
    pub(crate) fn expected_buffer_bytes(config: &ModelConfig, max_num_tokens: usize) -> u64 {
        let shape = config.attention_shape();
        let width =
            2 * config.hidden_size + shape.qkv_len() + shape.q_len() + config.intermediate_size + shape.head_dim;
        (max_num_tokens * width * DType::F32.size()) as u64
    }

    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What a step reads of the weights, in its order: those of the layers, and the output matrix.
    pub(crate) fn weights_of_step(&self) -> Vec<&B::Weight> {
        let mut weights = Vec::with_capacity(4 * self.layers.len() + 1);
        for layer in &self.layers {
            weights.extend([&layer.qkv, &layer.o, &layer.gate_up, &layer.down].map(|projection| &projection.weight));
        }
        weights.push(self.lm_head.as_ref().unwrap_or(&self.embedding));
        weights
    }

    pub(crate) fn size(&self) -> ModelSize {
        self.size
    }

    /// The logits of the last [`Decoder::compute_logits`], `[logits_tile, vocab_size]`.
    pub(crate) fn logits(&self) -> &B::Buffer {
        &self.buffers.logits
    }

    /// Computes the hidden states of all tokens of a step, and writes their K and V.
    pub(crate) fn forward(&mut self, backend: &mut B, inputs: StepInputs<'_, B>) -> Result<(), KernelError> {
        let Self { config, embedding, layers, buffers, .. } = self;
        let StepInputs { num_tokens, num_seqs, kv, .. } = inputs;
        let (eps, dim, shape) = (config.rms_norm_eps, config.hidden_size, config.attention_shape());
        let Buffers { hidden, squares, normed, qkv, attention, mlp, cos_sin, .. } = buffers;
        let norm_of = |weight| Norm { weight, eps, dim };

        backend.rope_table(RopeTable {
            positions: inputs.positions,
            num_tokens,
            frequencies: &config.rope.frequencies,
            magnitude: config.rope.magnitude,
            out: cos_sin,
        })?;
        backend.embed(Embed {
            table: embedding,
            token_table: inputs.token_table,
            token_indices: inputs.token_indices,
            num_tokens,
            out: hidden,
        })?;
        // Whether there are sums of squares of `hidden`: not of embeddings.
        let mut has_squares = false;
        for layer in layers {
            let norm = norm_of(&layer.input_norm);
            let stream = Stream { x: hidden, squares: has_squares.then_some(&*squares), normed };
            layer.qkv.apply_to_norm(backend, &norm, stream, num_tokens, Epilogue::Store, qkv)?;
            backend.rope_kv_write(RopeKvWrite {
                qkv,
                num_tokens,
                shape,
                cos_sin,
                qk_norm: layer.qk_norm.as_ref().map(|[q_weight, k_weight]| QkNorm { q_weight, k_weight, eps }),
                slot_mapping: &inputs.slot_mapping[layer.group],
                kv: &mut kv[layer.group],
                layer: layer.layer_in_group,
            })?;
            backend.paged_attention(PagedAttention {
                qkv,
                num_tokens,
                num_seqs,
                shape,
                scale: (shape.head_dim as f32).sqrt().recip(),
                window: layer.window,
                cu_seqlens_q: inputs.cu_seqlens,
                context_lens: inputs.context_lens,
                block_tables: &inputs.block_tables[layer.group],
                max_num_blocks: inputs.max_num_blocks,
                rows: inputs.rows,
                kv: &kv[layer.group],
                layer: layer.layer_in_group,
                out: attention,
            })?;
            // The residual stream is a rank's own sum: with several ranks, all but the first store where this adds, and
            // the sum over ranks is the stream again (and sums of squares, being of a part, are none).
            has_squares = layer.o.add(backend, attention, num_tokens, hidden, squares)?;
            backend.all_reduce(hidden)?;
            let norm = norm_of(&layer.post_norm);
            let stream = Stream { x: hidden, squares: has_squares.then_some(&*squares), normed };
            layer.gate_up.apply_to_norm(backend, &norm, stream, num_tokens, Epilogue::SwiGlu, mlp)?;
            has_squares = layer.down.add(backend, mlp, num_tokens, hidden, squares)?;
            backend.all_reduce(hidden)?;
        }
        Ok(())
    }

    /// Normalised hidden states of the tokens of the last step at `indices[offset..offset + num_rows]`, at most
    /// [`Backend::logits_tile`] rows: `[num_rows, hidden_size]`.
    pub(crate) fn compute_hidden(
        &mut self,
        backend: &mut B,
        indices: &B::Buffer,
        offset: usize,
        num_rows: usize,
    ) -> Result<&B::Buffer, KernelError> {
        let Self { config, final_norm, buffers, .. } = self;
        let Buffers { hidden, gathered, gathered_normed, .. } = buffers;
        let (eps, dim) = (config.rms_norm_eps, config.hidden_size);
        backend.gather_rows(GatherRows { x: hidden, dim, indices, indices_offset: offset, num_rows, out: gathered })?;
        backend.rms_norm(RmsNorm { x: gathered, weight: final_norm, eps, num_rows, dim, out: gathered_normed })?;
        Ok(gathered_normed)
    }

    /// Logits of the tokens of the last step at `indices[offset..offset + num_rows]`; at most [`Backend::logits_tile`] rows.
    pub(crate) fn compute_logits(
        &mut self,
        backend: &mut B,
        indices: &B::Buffer,
        offset: usize,
        num_rows: usize,
    ) -> Result<(), KernelError> {
        self.compute_hidden(backend, indices, offset, num_rows)?;
        let Self { embedding, lm_head, buffers, .. } = self;
        let Buffers { gathered_normed, logits, .. } = buffers;
        backend.linear(Linear {
            x: gathered_normed,
            num_rows,
            weight: lm_head.as_ref().unwrap_or(embedding),
            bias: None,
            epilogue: Epilogue::Store,
            out: logits,
        })
    }
}

/// A norm of the residual stream.
struct Norm<'a, B: Backend> {
    weight: &'a B::Buffer,
    eps: f32,
    dim: usize,
}

/// The residual stream where a norm reads it; `normed` is what the norm may write to.
struct Stream<'a, B: Backend> {
    x: &'a B::Buffer,
    squares: Option<&'a B::Buffer>,
    normed: &'a mut B::Buffer,
}

impl<B: Backend> Projection<B> {
    /// Of the normalised stream.
    fn apply_to_norm(
        &self,
        backend: &mut B,
        norm: &Norm<'_, B>,
        stream: Stream<'_, B>,
        num_rows: usize,
        epilogue: Epilogue,
        out: &mut B::Buffer,
    ) -> Result<(), KernelError> {
        let Stream { x, squares, normed } = stream;
        backend.norm_linear(NormLinear {
            x,
            squares,
            norm_weight: norm.weight,
            eps: norm.eps,
            normed,
            num_rows,
            in_features: norm.dim,
            weight: &self.weight,
            bias: self.bias.as_ref(),
            epilogue,
            out,
        })
    }

    /// Adds to the stream. Whether there are sums of its squares then.
    fn add(
        &self,
        backend: &mut B,
        x: &B::Buffer,
        num_rows: usize,
        stream: &mut B::Buffer,
        squares: &mut B::Buffer,
    ) -> Result<bool, KernelError> {
        let (weight, bias) = (&self.weight, self.bias.as_ref());
        backend.add_linear(Linear { x, num_rows, weight, bias, epilogue: Epilogue::Add, out: stream }, squares)
    }
}

impl<B: Backend> Buffers<B> {
    fn alloc(
        backend: &mut B,
        config: &ModelConfig,
        max_num_tokens: usize,
        output: Output,
    ) -> Result<Self, KernelError> {
        let shape = config.attention_shape();
        let tile = backend.logits_tile();
        let num_logits = match output {
            Output::Logits => tile * config.vocab_size,
            Output::Hidden => 0,
        };
        let mut alloc = |rows: usize, width: usize| backend.alloc(DType::F32, rows * width);
        Ok(Self {
            hidden: alloc(max_num_tokens, config.hidden_size)?,
            squares: alloc(max_num_tokens, config.hidden_size.div_ceil(SQUARES_FEATURES))?,
            normed: alloc(max_num_tokens, config.hidden_size)?,
            qkv: alloc(max_num_tokens, shape.qkv_len())?,
            attention: alloc(max_num_tokens, shape.q_len())?,
            mlp: alloc(max_num_tokens, config.intermediate_size)?,
            cos_sin: alloc(max_num_tokens, shape.head_dim)?,
            gathered: alloc(tile, config.hidden_size)?,
            gathered_normed: alloc(tile, config.hidden_size)?,
            logits: alloc(1, num_logits)?,
        })
    }
}

/// The names of a layer's matrices, and how they are fused.
struct Matrices {
    qkv: Fused,
    o: Fused,
    gate_up: Fused,
    down: Fused,
}

impl Matrices {
    fn of_layer(config: &ModelConfig, index: usize) -> Self {
        let (facts, shape) = (&config.facts, config.attention_shape());
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let kv_len = shape.num_kv_heads * shape.head_dim;
        let fused = |modules: &[(&str, usize)], in_features, layout, has_bias| {
            let named = modules.iter().map(|(part, rows)| (format!("model.layers.{index}.{part}"), *rows));
            Fused { modules: named.collect(), in_features, layout, has_bias }
        };
        let qkv = [("self_attn.q_proj", shape.q_len()), ("self_attn.k_proj", kv_len), ("self_attn.v_proj", kv_len)];
        let gate_up = [("mlp.gate_proj", intermediate), ("mlp.up_proj", intermediate)];
        Self {
            qkv: fused(&qkv, hidden, WeightLayout::Stacked, facts.qkv_bias),
            o: fused(&[("self_attn.o_proj", hidden)], shape.q_len(), WeightLayout::Stacked, facts.o_bias),
            gate_up: fused(&gate_up, hidden, WeightLayout::GateUp, facts.mlp_bias),
            down: fused(&[("mlp.down_proj", hidden)], intermediate, WeightLayout::Stacked, facts.mlp_bias),
        }
    }
}

impl<B: Backend> Loader<'_, B> {
    fn layer(
        &mut self,
        config: &ModelConfig,
        index: usize,
        window: Option<u32>,
        group: usize,
        layer_in_group: usize,
    ) -> Result<Layer<B>, EngineError> {
        let (hidden, head_dim) = (config.hidden_size, config.attention_shape().head_dim);
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let Matrices { qkv, o, gate_up, down } = Matrices::of_layer(config, index);
        let qk_norm = match config.facts.qk_norm {
            None => None,
            Some([q, k]) => Some([self.vectors(&[(name(q), head_dim)])?, self.vectors(&[(name(k), head_dim)])?]),
        };
        Ok(Layer {
            input_norm: self.vectors(&[(name("input_layernorm.weight"), hidden)])?,
            qkv: self.fused(&qkv)?,
            qk_norm,
            o: self.fused(&o)?,
            post_norm: self.vectors(&[(name("post_attention_layernorm.weight"), hidden)])?,
            gate_up: self.fused(&gate_up)?,
            down: self.fused(&down)?,
            window,
            group,
            layer_in_group,
        })
    }
}
