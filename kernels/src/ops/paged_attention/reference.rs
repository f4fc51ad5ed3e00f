//! The meaning of [`super::PagedAttention`].

use half::bf16;

use crate::kv_layout::KvPlace;
use crate::ops::rope_kv_write::AttentionShape;
use crate::{DType, KvLayout};

/// One sequence: its new queries over its context.
pub struct Case<'a> {
    /// `[q_len, num_heads, head_dim]`
    pub q: &'a [f32],
    pub shape: AttentionShape,
    pub scale: f32,
    pub window: Option<u32>,
    pub context_len: usize,
    pub block_table: &'a [u32],
    pub layer: usize,
}

/// One number of K and of V: what the cache holds, times its scale where it has one.
pub type Number<'a> = &'a dyn Fn(KvPlace, usize) -> f64;

/// `[q_len, num_heads, head_dim]`. `k` and `v` read the cache at a place and dimension.
pub fn paged_attention(case: &Case<'_>, layout: &KvLayout, k: Number<'_>, v: Number<'_>) -> Vec<f64> {
    let AttentionShape { num_heads, head_dim, .. } = case.shape;
    let q_len = case.q.len() / (num_heads * head_dim);
    let round = |x: f32| match layout.dtype {
        DType::Bf16 | DType::F8E4M3 => f64::from(bf16::from_f32(x)),
        _ => f64::from(x),
    };
    let mut out = Vec::with_capacity(case.q.len());
    for (index, q) in case.q.chunks_exact(head_dim).enumerate() {
        let (token, head) = (index / num_heads, index % num_heads);
        let position = case.context_len - q_len + token;
        let first = case.window.map_or(0, |window| (position + 1).saturating_sub(window as usize));
        let place = |position: usize| KvPlace {
            layer: case.layer,
            block: case.block_table[position / layout.block_size] as usize,
            kv_head: head / case.shape.group_len(),
            offset: position % layout.block_size,
        };
        let scores: Vec<f64> = (first..=position)
            .map(|position| {
                let place = place(position);
                let dot: f64 = (0..head_dim).map(|dim| round(q[dim]) * k(place, dim)).sum();
                dot * f64::from(case.scale)
            })
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        for dim in 0..head_dim {
            let values = (first..=position).map(|position| v(place(position), dim));
            out.push(values.zip(&weights).map(|(value, weight)| value * weight).sum::<f64>() / total);
        }
    }
    out
}
