//! Qwen2 and Qwen2.5 (Yang et al. 2024).

use quire_kernels::kv_layout::MAX_HEAD_DIM;

use super::config::{Facts, Fields, LayerType, Shape};
use crate::error::EngineError;

pub(crate) const NAME: &str = "Qwen2ForCausalLM";

/// Biases on queries, keys and values, always; layers from `max_window_layers` on have a window where
/// `use_sliding_window` is set.
pub(crate) fn facts(fields: &Fields<'_>, shape: &Shape) -> Result<Facts, EngineError> {
    Ok(Facts {
        num_kv_heads: fields.num_kv_heads(shape, 32)?,
        head_dim: fields.optional_size("head_dim", 1..=MAX_HEAD_DIM)?.unwrap_or(shape.default_head_dim()),
        qkv_bias: true,
        o_bias: false,
        mlp_bias: false,
        qk_norm: None,
        windows: windows(fields, shape)?,
    })
}

/// Windows of Qwen2 and Qwen3.
pub(crate) fn windows(fields: &Fields<'_>, shape: &Shape) -> Result<Vec<Option<u32>>, EngineError> {
    let window = if fields.flag("use_sliding_window", false)? && !fields.is_null("sliding_window") {
        Some(fields.optional_size("sliding_window", 1..=1 << 24)?.unwrap_or(4096) as u32)
    } else {
        None
    };
    let first_window_layer = fields.optional_size("max_window_layers", 0..=1024)?.unwrap_or(28);
    let by_index = |layer| if layer >= first_window_layer { LayerType::Sliding } else { LayerType::Full };
    let layer_types =
        fields.layer_types(shape.num_layers)?.unwrap_or_else(|| (0..shape.num_layers).map(by_index).collect());
    Ok(layer_types.into_iter().map(|kind| kind.window(window)).collect())
}
