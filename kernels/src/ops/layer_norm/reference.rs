//! The meaning of [`super::LayerNorm`].

/// `[num_rows, dim]` of the normalised rows of `x`, in f64.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32) -> Vec<f64> {
    let dim = weight.len();
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(dim) {
        let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / dim as f64;
        let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / dim as f64;
        let factor = 1.0 / (variance + f64::from(eps)).sqrt();
        let scaled = row.iter().zip(weight).map(|(&x, &weight)| (f64::from(x) - mean) * factor * f64::from(weight));
        out.extend(scaled.zip(bias).map(|(scaled, &bias)| scaled + f64::from(bias)));
    }
    out
}
