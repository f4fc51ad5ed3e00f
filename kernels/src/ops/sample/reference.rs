//! The meaning of [`super::Sample`], by sorting whole vocabularies.

use super::SamplerRow;

/// Probability of each token; `None` where the logits are not finite or nothing is left to choose. `tokens` are those
/// that the row holds.
pub fn distribution(logits: &[f32], tokens: &[u32], params: &SamplerRow<'_>) -> Option<Vec<f64>> {
    let is_finite = |x: &[f64]| x.iter().all(|x| !x.is_nan() && *x < f64::INFINITY) && x.iter().any(|x| x.is_finite());
    let mut x: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    if !is_finite(&x) {
        return None;
    }
    let generated = &tokens[(params.prompt_len as usize).min(tokens.len())..];
    if let Some(mask) = params.mask {
        for (id, x) in x.iter_mut().enumerate() {
            if mask[id / 32] >> (id % 32) & 1 == 0 {
                *x = f64::NEG_INFINITY;
            }
        }
    }
    for word in params.bad_words {
        let (&last, before) = word.split_last().expect("not empty");
        if generated.ends_with(before) {
            x[last as usize] = f64::NEG_INFINITY;
        }
    }
    if generated.len() < params.min_tokens as usize {
        for &id in params.stop_token_ids {
            x[id as usize] = f64::NEG_INFINITY;
        }
    }
    for &(id, bias) in params.bias {
        x[id as usize] += f64::from(bias);
    }
    for (id, x) in x.iter_mut().enumerate() {
        if tokens.contains(&(id as u32)) {
            let penalty = f64::from(params.repetition_penalty);
            *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
        }
        let count = generated.iter().filter(|&&token| token as usize == id).count();
        if count > 0 {
            *x -= f64::from(params.frequency_penalty) * count as f64 + f64::from(params.presence_penalty);
        }
    }
    if !is_finite(&x) {
        return None;
    }
    // The two zeros are equal.
    x.iter_mut().for_each(|x| *x += 0.0);

    let mut by_value: Vec<usize> = (0..x.len()).collect();
    by_value.sort_by(|&a, &b| x[b].total_cmp(&x[a]).then(a.cmp(&b)));
    let max = x[by_value[0]];
    let mut p = vec![0.0; x.len()];
    if params.temperature == 0.0 {
        p[by_value[0]] = 1.0;
        return Some(p);
    }
    for (p, x) in p.iter_mut().zip(&x) {
        *p = ((x - max) / f64::from(params.temperature)).exp();
    }
    scale(&mut p);
    if params.top_k > 0 {
        for &id in by_value.iter().skip(params.top_k as usize) {
            p[id] = 0.0;
        }
        scale(&mut p);
    }
    if params.min_p > 0.0 {
        let limit = p[by_value[0]] * f64::from(params.min_p);
        p.iter_mut().filter(|p| **p < limit).for_each(|p| *p = 0.0);
        scale(&mut p);
    }
    if params.typical_p < 1.0 {
        let surprise = |p: f64| if p > 0.0 { -p.ln() } else { f64::INFINITY };
        let entropy: f64 = p.iter().filter(|&&p| p > 0.0).map(|&p| p * surprise(p)).sum();
        let mut by_distance: Vec<usize> = (0..p.len()).collect();
        let distance = |id: usize| (surprise(p[id]) - entropy).abs();
        by_distance.sort_by(|&a, &b| distance(a).total_cmp(&distance(b)).then(a.cmp(&b)));
        keep_mass(&mut p, &by_distance, f64::from(params.typical_p));
    }
    if params.top_p < 1.0 {
        keep_mass(&mut p, &by_value, f64::from(params.top_p));
    }
    Some(p)
}

fn scale(p: &mut [f64]) {
    let total: f64 = p.iter().sum();
    p.iter_mut().for_each(|p| *p /= total);
}

/// Keeps the first tokens of `order` that together reach `mass`.
fn keep_mass(p: &mut [f64], order: &[usize], mass: f64) {
    let mut sum = 0.0;
    let mut is_reached = false;
    for &id in order {
        if is_reached {
            p[id] = 0.0;
        }
        sum += p[id];
        is_reached |= sum >= mass;
    }
    scale(p);
}
