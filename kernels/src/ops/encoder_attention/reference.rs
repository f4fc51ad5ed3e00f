//! The meaning of [`super::EncoderAttention`].

/// `[num_tokens, num_heads * head_dim]`, in f64.
pub fn encoder_attention(qkv: &[f32], cu_seqlens: &[u32], num_heads: usize, head_dim: usize, scale: f32) -> Vec<f64> {
    let width = num_heads * head_dim;
    let at = |token: usize, part: usize, head: usize| -> &[f32] {
        &qkv[token * 3 * width + part * width + head * head_dim..][..head_dim]
    };
    let mut out = vec![0.0; qkv.len() / 3];
    for bounds in cu_seqlens.windows(2) {
        let tokens = bounds[0] as usize..bounds[1] as usize;
        for query in tokens.clone() {
            for head in 0..num_heads {
                let score = |key: usize| -> f64 {
                    let products = at(query, 0, head).iter().zip(at(key, 1, head));
                    products.map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() * f64::from(scale)
                };
                let scores: Vec<f64> = tokens.clone().map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
                let total: f64 = weights.iter().sum();
                let row = &mut out[query * width + head * head_dim..][..head_dim];
                for (key, weight) in tokens.clone().zip(&weights) {
                    for (out, value) in row.iter_mut().zip(at(key, 2, head)) {
                        *out += weight / total * f64::from(*value);
                    }
                }
            }
        }
    }
    out
}
