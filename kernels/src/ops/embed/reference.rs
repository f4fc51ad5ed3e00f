//! The meaning of [`super::Embed`].

use crate::WeightSource;
use crate::ops::linear::reference::weight_rows;

/// One row of the matrix, as it is packed, per token.
pub fn embed(source: &WeightSource<'_>, token_table: &[u32], token_indices: &[u32]) -> Vec<f32> {
    let rows = weight_rows(source);
    let row_of = |&index: &u32| &rows[token_table[index as usize] as usize];
    token_indices.iter().flat_map(row_of).map(|weight| (weight.scaled + weight.min) as f32).collect()
}
