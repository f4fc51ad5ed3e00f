//! The meaning of [`super::RmsNorm`].

/// `[num_rows, dim]` of the normalised rows of `x`, in f64.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
    let dim = weight.len();
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(dim) {
        let mean = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / dim as f64;
        let factor = 1.0 / (mean + f64::from(eps)).sqrt();
        out.extend(row.iter().zip(weight).map(|(&x, &weight)| f64::from(x) * factor * f64::from(weight)));
    }
    out
}
