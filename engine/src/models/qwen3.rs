//! Qwen3 (Yang et al. 2025).

use quire_kernels::kv_layout::MAX_HEAD_DIM;

use super::config::{Facts, Fields, Shape};
use super::qwen2;
use crate::error::EngineError;

pub(crate) const NAME: &str = "Qwen3ForCausalLM";

/// Queries and keys are normalised per head; heads have a size of their own.
pub(crate) fn facts(fields: &Fields<'_>, shape: &Shape) -> Result<Facts, EngineError> {
    let attention_bias = fields.flag("attention_bias", false)?;
    Ok(Facts {
        num_kv_heads: fields.num_kv_heads(shape, 32)?,
        head_dim: fields.optional_size("head_dim", 1..=MAX_HEAD_DIM)?.unwrap_or(128),
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: false,
        qk_norm: Some(["self_attn.q_norm.weight", "self_attn.k_norm.weight"]),
        windows: qwen2::windows(fields, shape)?,
    })
}
