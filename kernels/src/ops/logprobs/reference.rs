//! The meaning of [`super::Logprobs`].

/// Of one row: log probability and rank of `token_id`, and the `num_top` most likely tokens with theirs.
pub fn logprobs(logits: &[f32], token_id: u32, num_top: usize) -> (f64, u32, Vec<(u32, f64)>) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|&x| (f64::from(x) - f64::from(max)).exp()).sum();
    let value = |id: u32| f64::from(logits[id as usize]) - f64::from(max) - total.ln();
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    // Adding zero makes the two zeros equal.
    let logit = |id: u32| logits[id as usize] + 0.0;
    ids.sort_by(|&a, &b| logit(b).total_cmp(&logit(a)).then(a.cmp(&b)));
    let rank = 1 + ids.iter().position(|&id| id == token_id).expect("a token of the vocabulary") as u32;
    (value(token_id), rank, ids[..num_top].iter().map(|&id| (id, value(id))).collect())
}
