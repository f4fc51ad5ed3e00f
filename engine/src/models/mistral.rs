//! Mistral 7B and its successors of the same shape (Jiang et al. 2023).

use quire_kernels::kv_layout::MAX_HEAD_DIM;

use super::config::{Facts, Fields, LayerType, Shape};
use crate::error::EngineError;

pub(crate) const NAME: &str = "MistralForCausalLM";

/// No biases; one window for all layers unless `sliding_window` is null or `layer_types` says otherwise. A file without
/// the key means 4096.
pub(crate) fn facts(fields: &Fields<'_>, shape: &Shape) -> Result<Facts, EngineError> {
    let window = if fields.is_null("sliding_window") {
        None
    } else {
        Some(fields.optional_size("sliding_window", 1..=1 << 24)?.unwrap_or(4096) as u32)
    };
    let layer_types =
        fields.layer_types(shape.num_layers)?.unwrap_or_else(|| vec![LayerType::Sliding; shape.num_layers]);
    Ok(Facts {
        num_kv_heads: fields.num_kv_heads(shape, 8)?,
        head_dim: fields.optional_size("head_dim", 1..=MAX_HEAD_DIM)?.unwrap_or(shape.default_head_dim()),
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: None,
        windows: layer_types.into_iter().map(|kind| kind.window(window)).collect(),
    })
}
