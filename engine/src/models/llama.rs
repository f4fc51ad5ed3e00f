//! Llama 2, 3 and what shares their shape (Touvron et al. 2023; Grattafiori et al. 2024).

use quire_kernels::kv_layout::MAX_HEAD_DIM;

use super::config::{Facts, Fields, Shape};
use crate::error::EngineError;

pub(crate) const NAME: &str = "LlamaForCausalLM";

/// No window; biases only where the file asks for them.
pub(crate) fn facts(fields: &Fields<'_>, shape: &Shape) -> Result<Facts, EngineError> {
    let attention_bias = fields.flag("attention_bias", false)?;
    Ok(Facts {
        num_kv_heads: fields.optional_size("num_key_value_heads", 1..=1024)?.unwrap_or(shape.num_heads),
        head_dim: fields.optional_size("head_dim", 1..=MAX_HEAD_DIM)?.unwrap_or(shape.default_head_dim()),
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: fields.flag("mlp_bias", false)?,
        qk_norm: None,
        windows: vec![None; shape.num_layers],
    })
}
