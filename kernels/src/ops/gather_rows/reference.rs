//! The meaning of [`super::GatherRows`].

/// Row `indices[i]` of `x` for each i.
pub fn gather_rows(x: &[f32], dim: usize, indices: &[u32]) -> Vec<f32> {
    indices.iter().flat_map(|&index| &x[index as usize * dim..][..dim]).copied().collect()
}
