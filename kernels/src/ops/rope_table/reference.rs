//! The meaning of [`super::RopeTable`].

use super::RopeFrequencies;

/// `[positions.len(), head_dim / 2, 2]`: cosine and sine of each angle times `magnitude`.
pub fn rope_table(positions: &[u32], frequencies: &RopeFrequencies, magnitude: f32) -> Vec<f64> {
    let mut out = Vec::new();
    for &position in positions {
        for i in 0..frequencies.len() {
            let inverse = match frequencies {
                RopeFrequencies::Fixed { inverse } => inverse[i],
                RopeFrequencies::DynamicNtk { base, factor, original_len, head_dim } => {
                    let len = (position + 1).max(*original_len);
                    let (factor, dim) = (f64::from(*factor), *head_dim as f64);
                    let stretch = factor * f64::from(len) / f64::from(*original_len) - (factor - 1.0);
                    let base = f64::from(*base) * stretch.powf(dim / (dim - 2.0));
                    1.0 / base.powf((2 * i) as f64 / dim) as f32
                }
            };
            let angle = f64::from(position as f32 * inverse);
            out.extend([angle.cos() * f64::from(magnitude), angle.sin() * f64::from(magnitude)]);
        }
    }
    out
}
