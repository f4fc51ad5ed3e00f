//! The meaning of [`super::AddRows`].

/// `out` with a row of `table` added to each of its rows, rounded once.
pub fn add_rows(table: &[f32], dim: usize, indices: &[u32], out: &[f32]) -> Vec<f32> {
    let rows = indices.iter().flat_map(|&index| &table[index as usize * dim..][..dim]);
    out.iter().zip(rows).map(|(out, row)| out + row).collect()
}
