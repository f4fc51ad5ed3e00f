//! The meaning of [`super::RopeKvWrite`], before rounding.

use super::AttentionShape;
use crate::ops::rms_norm;

/// Weights of queries and keys, and epsilon.
pub type QkNorm<'a> = Option<(&'a [f32], &'a [f32], f32)>;

/// Rotated queries `[num_tokens, num_heads, head_dim]`, rotated keys and values `[num_tokens, num_kv_heads, head_dim]`.
pub fn rope_kv_write(
    qkv: &[f32],
    shape: AttentionShape,
    cos_sin: &[f32],
    qk_norm: QkNorm<'_>,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let dim = shape.head_dim;
    let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
    for (row, cos_sin) in qkv.chunks_exact(shape.qkv_len()).zip(cos_sin.chunks_exact(dim)) {
        for (index, head) in row.chunks_exact(dim).enumerate() {
            let is_query = index < shape.num_heads;
            if index >= shape.num_heads + shape.num_kv_heads {
                v.extend(head.iter().map(|&x| f64::from(x)));
                continue;
            }
            let head = match qk_norm {
                Some((q_weight, k_weight, eps)) => {
                    rms_norm::reference::rms_norm(head, if is_query { q_weight } else { k_weight }, eps)
                }
                None => head.iter().map(|&x| f64::from(x)).collect(),
            };
            let half = dim / 2;
            let out = if is_query { &mut q } else { &mut k };
            let (cos, sin) = (|i: usize| f64::from(cos_sin[2 * i]), |i: usize| f64::from(cos_sin[2 * i + 1]));
            out.extend((0..half).map(|i| head[i] * cos(i) - head[i + half] * sin(i)));
            out.extend((0..half).map(|i| head[i + half] * cos(i) + head[i] * sin(i)));
        }
    }
    (q, k, v)
}
