//! Tensors of 8-bit floats, as two families of checkpoints write them: beside `<name>` lies `<name>_scale_inv` (a scale for each
//! 128 x 128 weights) or `<name>_scale` (one for all, one for each row, or for blocks), and a weight is its code times its scale.

use quire_kernels::tensor_format::F8_LEN;
use quire_kernels::{TensorFormat, e4m3};

/// What is put behind a tensor's name for that of its scales.
pub(super) const SCALES: [&str; 2] = ["_scale_inv", "_scale"];

/// The scales of a tensor.
pub(super) struct Scales {
    pub(super) values: Vec<f32>,
    pub(super) shape: Vec<usize>,
}

impl Scales {
    /// Scales of a row and from one scale down to the next, in rows; across it is always a block or the whole row.
    fn grid(&self, rows: usize, cols: usize) -> Option<(usize, usize)> {
        let is_one = self.values.len() == 1;
        match *self.shape {
            _ if is_one => Some((1, rows)),
            [num] | [num, 1] if num == rows => Some((1, 1)),
            [down, across] if (down, across) == (rows.div_ceil(F8_LEN), cols.div_ceil(F8_LEN)) => {
                Some((across, F8_LEN))
            }
            _ => None,
        }
    }
}

/// What codes are handed on as in rows of so many: blocks, or numbers where that is no whole number of them.
pub(super) fn format_of_rows(cols: usize) -> TensorFormat {
    if cols.is_multiple_of(F8_LEN) { TensorFormat::F8E4M3 } else { TensorFormat::F32 }
}

/// `codes`, `[rows, cols]`, with their scales, as the kernels take them, see [`format_of_rows`]. Says why
/// where scales do not fit.
pub(super) fn tensor(
    codes: &[u8],
    rows: usize,
    cols: usize,
    scales: &Scales,
) -> Result<(TensorFormat, Vec<u8>), String> {
    let (across, rows_of_scale) = scales.grid(rows, cols).ok_or_else(|| {
        format!(
            "has scales of shape {:?}; one for all, one for each row and one for each {F8_LEN} x {F8_LEN} are served",
            scales.shape
        )
    })?;
    let scale = |row: usize, block: usize| scales.values[row / rows_of_scale * across + block.min(across - 1)];
    let format = format_of_rows(cols);
    let is_whole = format == TensorFormat::F8E4M3;
    let row_bytes = match is_whole {
        true => cols / F8_LEN * format.block_bytes(),
        false => cols * size_of::<f32>(),
    };
    let mut bytes = Vec::with_capacity(rows * row_bytes);
    for (row, codes) in codes.chunks_exact(cols).enumerate() {
        for (block, codes) in codes.chunks(F8_LEN).enumerate() {
            let scale = scale(row, block);
            if is_whole {
                bytes.extend(scale.to_le_bytes());
                bytes.extend(codes);
            } else {
                bytes.extend(codes.iter().flat_map(|&code| (scale * e4m3::to_f32(code)).to_le_bytes()));
            }
        }
    }
    Ok((format, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(rows: usize, cols: usize, shape: &[usize]) -> Result<(TensorFormat, Vec<f32>), String> {
        // The code of 1.
        let codes = vec![0x38; rows * cols];
        let num = shape.iter().product::<usize>();
        let scales = Scales { values: (1..=num).map(|index| index as f32).collect(), shape: shape.to_vec() };
        let (format, bytes) = tensor(&codes, rows, cols, &scales)?;
        let mut values = vec![0.0; rows * cols];
        format.decode(&bytes, &mut values);
        Ok((format, values))
    }

    #[test]
    fn each_weight_has_its_scale() {
        for cols in [256, 130] {
            for (shape, scale_of) in [
                (&[][..], (|_, _| 1) as fn(usize, usize) -> usize),
                (&[1], |_, _| 1),
                (&[1, 1], |_, _| 1),
                (&[130], |row, _| row + 1),
                (&[130, 1], |row, _| row + 1),
                (&[2, 2], |row, col| row / 128 * 2 + col / 128 + 1),
            ] {
                let (format, values) = values(130, cols, shape).unwrap();
                assert_eq!(format == TensorFormat::F8E4M3, cols == 256);
                for (index, value) in values.into_iter().enumerate() {
                    assert_eq!(value, scale_of(index / cols, index % cols) as f32, "{shape:?} {index}");
                }
            }
        }
    }

    #[test]
    fn scales_of_other_shapes_are_refused() {
        for shape in [&[129][..], &[2, 3], &[130, 2], &[1, 256], &[0], &[130, 1, 1]] {
            let why = values(130, 256, shape).unwrap_err();
            assert!(why.contains(&format!("{shape:?}")), "{why}");
        }
    }
}
