//! Where a token's K and V lie in a block of the cache.

use crate::{DType, KernelError, e4m3};

/// Largest `head_dim` that attention is written for.
pub const MAX_HEAD_DIM: usize = 256;

/// `block_size` is a multiple of this: the tokens of one vector lie in one block.
pub const BLOCK_SIZE_MULTIPLE: usize = 16;

/// Layout of one KV group's cache; the only place that turns (layer, block, head, offset, dimension) into an index.
///
/// Numbers are ordered by layer, block, KV head; then, per head of a block, K as `[head_dim / 2][block_size][2]`, so
/// that for a pair of dimensions the tokens of a block lie side by side in one vector and a query pair is broadcast over
/// them; then V as `[block_size / 2][head_dim][2]`, so that for a pair of tokens the dimensions lie side by side. With
/// `F32` the pairs are not interleaved: K is `[head_dim][block_size]`, V is `[block_size][head_dim]`. With `I8` and
/// `F8E4M3` a number is a code times the scale of its token and head: after V lie the scales of K, `[block_size]`, then those
/// of V, as `F32`; see [`quantize`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    pub num_layers: usize,
    pub num_blocks: usize,
    /// Tokens in a block; a multiple of 16.
    pub block_size: usize,
    pub num_kv_heads: usize,
    /// A multiple of 2.
    pub head_dim: usize,
    /// `F32`, `Bf16`, `I8` or `F8E4M3`.
    pub dtype: DType,
}

/// A place in the cache, before the dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvPlace {
    pub layer: usize,
    pub block: usize,
    pub kv_head: usize,
    /// Of the token in its block.
    pub offset: usize,
}

/// How the numbers of one token and head lie in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvToken {
    /// Index of dimension 0 of K.
    pub k_start: usize,
    /// Dimensions of K that lie side by side, and numbers from such a run to the next.
    pub k_run: usize,
    pub k_stride: usize,
    /// Index of dimension 0 of V, and numbers from a dimension to the next.
    pub v_start: usize,
    pub v_stride: usize,
    /// Of quantized numbers: indices of the scales of K and of V, in numbers of `F32`.
    pub scales: Option<[usize; 2]>,
}

/// Rounds the numbers of one token and head to codes of `dtype` (whole numbers of -127 to 127, or numbers of [`e4m3`] as their
/// bits) times a scale, which is returned: the largest magnitude over the largest code. Where one is no finite number, the
/// scale is NaN, so that whoever looks at the token learns of it.
pub fn quantize(dtype: DType, x: &[f32], codes: &mut [i8]) -> f32 {
    let is_float = matches!(dtype, DType::F8E4M3);
    let most = if is_float { e4m3::MAX } else { 127.0 };
    let mut largest = 0.0_f32;
    let mut is_finite = true;
    for &x in x {
        is_finite &= x.is_finite();
        largest = largest.max(x.abs());
    }
    let inverse = most / largest;
    // Numbers so small that the quotient overflows are zeros.
    if !is_finite || !inverse.is_finite() {
        codes.fill(0);
        return if is_finite { 0.0 } else { f32::NAN };
    }
    for (code, &x) in codes.iter_mut().zip(x) {
        let x = x * inverse;
        *code = if is_float { e4m3::from_f32(x).cast_signed() } else { x.round_ties_even() as i8 };
    }
    largest / most
}

impl KvLayout {
    /// Refuses what no device can hold or read: zero sizes, a block size that is not a multiple of 16, an odd or too
    /// large `head_dim`, a type that no cache has, slots that do not fit a `u32`.
    pub fn validate(&self) -> Result<(), KernelError> {
        const OP: &str = "kv_layout";
        if !matches!(self.dtype, DType::F32 | DType::Bf16) && !self.dtype.is_quantized() {
            return Err(KernelError::Type { op: OP, argument: "dtype", found: self.dtype.name() });
        }
        let sizes = [
            ("num_layers", self.num_layers),
            ("num_blocks", self.num_blocks),
            ("block_size", self.block_size),
            ("num_kv_heads", self.num_kv_heads),
            ("head_dim", self.head_dim),
        ];
        if let Some((argument, found)) = sizes.into_iter().find(|&(_, size)| size == 0) {
            return Err(KernelError::Shape { op: OP, argument, expected: 1, found });
        }
        if !self.block_size.is_multiple_of(BLOCK_SIZE_MULTIPLE) {
            let expected = self.block_size.next_multiple_of(BLOCK_SIZE_MULTIPLE);
            return Err(KernelError::Shape { op: OP, argument: "block_size", expected, found: self.block_size });
        }
        if !self.head_dim.is_multiple_of(2) || self.head_dim > MAX_HEAD_DIM {
            let expected = self.head_dim.next_multiple_of(2).min(MAX_HEAD_DIM);
            return Err(KernelError::Shape { op: OP, argument: "head_dim", expected, found: self.head_dim });
        }
        let num_slots = self.num_blocks as u64 * self.block_size as u64;
        if num_slots > u64::from(u32::MAX) {
            let limit = u64::from(u32::MAX);
            return Err(KernelError::Range { op: OP, argument: "num_blocks", value: num_slots, limit });
        }
        Ok(())
    }

    /// Bytes of K and V of one head of a block, scales included; a multiple of 64.
    pub const fn head_bytes(&self) -> usize {
        2 * self.v_offset() * self.dtype.size() + self.scale_bytes()
    }

    /// Bytes of the scales of one head of a block.
    const fn scale_bytes(&self) -> usize {
        if self.dtype.is_quantized() { 2 * self.block_size * size_of::<f32>() } else { 0 }
    }

    /// Bytes that one block takes in all layers.
    pub const fn block_bytes(&self) -> usize {
        self.num_layers * self.num_kv_heads * self.head_bytes()
    }

    /// Bytes of the whole cache.
    pub const fn total_bytes(&self) -> usize {
        self.num_blocks * self.block_bytes()
    }

    /// Tokens that fit.
    pub const fn num_slots(&self) -> usize {
        self.num_blocks * self.block_size
    }

    /// Index of the first number of K of one head of a block; V of that head starts [`Self::v_offset`] later.
    pub const fn head_index(&self, layer: usize, block: usize, kv_head: usize) -> usize {
        let head = (layer * self.num_blocks + block) * self.num_kv_heads + kv_head;
        head * (self.head_bytes() / self.dtype.size())
    }

    /// Numbers from the first of K to the first of V of one head of a block.
    pub const fn v_offset(&self) -> usize {
        self.block_size * self.head_dim
    }

    /// Index of one number of K.
    pub const fn k_index(&self, place: KvPlace, dim: usize) -> usize {
        let pack = self.pack();
        let pair = (dim / pack) * self.block_size + place.offset;
        self.head_index(place.layer, place.block, place.kv_head) + pair * pack + dim % pack
    }

    /// Index of one number of V.
    pub const fn v_index(&self, place: KvPlace, dim: usize) -> usize {
        let pack = self.pack();
        let pair = (place.offset / pack) * self.head_dim + dim;
        self.head_index(place.layer, place.block, place.kv_head) + self.v_offset() + pair * pack + place.offset % pack
    }

    /// Indices of the scales of K and of V of one token and head, in numbers of `F32` from the start of the cache. `None`
    /// where numbers have no scale.
    pub const fn scale_indices(&self, place: KvPlace) -> Option<[usize; 2]> {
        if !self.dtype.is_quantized() {
            return None;
        }
        let first = (self.head_index(place.layer, place.block, place.kv_head) + 2 * self.v_offset()) / size_of::<f32>();
        Some([first + place.offset, first + self.block_size + place.offset])
    }

    /// How the numbers of one token lie.
    pub const fn token(&self, place: KvPlace) -> KvToken {
        let pack = self.pack();
        KvToken {
            k_start: self.k_index(place, 0),
            k_run: pack,
            k_stride: pack * self.block_size,
            v_start: self.v_index(place, 0),
            v_stride: pack,
            scales: self.scale_indices(place),
        }
    }

    /// Numbers that are interleaved.
    const fn pack(&self) -> usize {
        if matches!(self.dtype, DType::F32) { 1 } else { 2 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(dtype: DType) -> KvLayout {
        KvLayout { num_layers: 2, num_blocks: 3, block_size: 16, num_kv_heads: 2, head_dim: 6, dtype }
    }

    const DTYPES: [DType; 4] = [DType::F32, DType::Bf16, DType::I8, DType::F8E4M3];

    #[test]
    fn indices_are_a_permutation_of_the_cache() {
        for dtype in DTYPES {
            let layout = layout(dtype);
            let mut seen = vec![false; layout.total_bytes() / dtype.size()];
            for layer in 0..2 {
                for block in 0..3 {
                    for kv_head in 0..2 {
                        for offset in 0..16 {
                            let place = KvPlace { layer, block, kv_head, offset };
                            for byte in layout.scale_indices(place).into_iter().flatten().flat_map(|i| 4 * i..4 * i + 4)
                            {
                                assert!(!std::mem::replace(&mut seen[byte], true), "{place:?} scale");
                            }
                            for dim in 0..6 {
                                for index in [layout.k_index(place, dim), layout.v_index(place, dim)] {
                                    assert!(!std::mem::replace(&mut seen[index], true), "{place:?} {dim}");
                                }
                            }
                        }
                    }
                }
            }
            assert!(seen.into_iter().all(|seen| seen));
        }
    }

    #[test]
    fn neighbours_lie_as_documented() {
        let place = KvPlace { layer: 0, block: 0, kv_head: 0, offset: 4 };
        let next = KvPlace { offset: 5, ..place };
        for pairs in [layout(DType::Bf16), layout(DType::I8)] {
            assert_eq!(pairs.k_index(place, 1), pairs.k_index(place, 0) + 1);
            assert_eq!(pairs.k_index(next, 0), pairs.k_index(place, 0) + 2);
            assert_eq!(pairs.v_index(next, 0), pairs.v_index(place, 0) + 1);
            assert_eq!(pairs.v_index(place, 1), pairs.v_index(place, 0) + 2);
        }
        let single = layout(DType::F32);
        assert_eq!(single.k_index(next, 0), single.k_index(place, 0) + 1);
        assert_eq!(single.v_index(place, 1), single.v_index(place, 0) + 1);
    }

    #[test]
    fn a_token_lies_where_its_numbers_do() {
        for dtype in DTYPES {
            let layout = layout(dtype);
            assert_eq!(layout.head_bytes() % 64, 0);
            for offset in 0..16 {
                let place = KvPlace { layer: 1, block: 2, kv_head: 1, offset };
                let KvToken { k_start, k_run, k_stride, v_start, v_stride, scales } = layout.token(place);
                assert_eq!(scales, layout.scale_indices(place));
                for dim in 0..6 {
                    assert_eq!(layout.k_index(place, dim), k_start + dim / k_run * k_stride + dim % k_run);
                    assert_eq!(layout.v_index(place, dim), v_start + dim * v_stride);
                }
            }
        }
    }

    #[test]
    fn quantized_numbers_are_off_by_half_a_step_at_most_and_what_is_no_number_shows() {
        let quantized = |x: &[f32]| {
            let mut codes = vec![99; x.len()];
            let scale = quantize(DType::I8, x, &mut codes);
            (codes, scale)
        };
        let mut rng = crate::testing::Rng::new(1);
        let x = rng.outliers(128);
        let (codes, scale) = quantized(&x);
        for (&x, code) in x.iter().zip(codes) {
            assert!((f64::from(x) - f64::from(code) * f64::from(scale)).abs() <= 0.5001 * f64::from(scale));
        }
        assert_eq!(quantized(&[0.0, -3.0, 1.5]), (vec![0, -127, 64], 3.0 / 127.0));
        assert_eq!(quantized(&[0.0, 1e-40]), (vec![0, 0], 0.0));
        assert_eq!(quantized(&[f32::MAX, -f32::MAX]).0, [127, -127]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (codes, scale) = quantized(&[1.0, bad]);
            assert!(codes == [0, 0] && scale.is_nan());
            let mut codes = [99; 2];
            assert!(quantize(DType::F8E4M3, &[1.0, bad], &mut codes).is_nan() && codes == [0, 0]);
        }
    }

    #[test]
    fn quantized_floats_are_off_by_half_a_step_of_their_own_at_most() {
        let x = crate::testing::Rng::new(1).outliers(128);
        let mut codes = [0; 128];
        let scale = quantize(DType::F8E4M3, &x, &mut codes);
        for (&x, code) in x.iter().zip(codes) {
            let found = f64::from(e4m3::to_f32(code.cast_unsigned())) * f64::from(scale);
            let step = (f64::from(x).abs() / 16.0).max(f64::from(scale) / 1024.0);
            assert!((f64::from(x) - found).abs() <= 1.0001 * step, "{x} {found}");
        }
        let mut codes = [99; 3];
        assert_eq!(quantize(DType::F8E4M3, &[0.0, -3.0, 1.5], &mut codes), 3.0 / 448.0);
        assert_eq!(codes.map(|code| e4m3::to_f32(code.cast_unsigned())), [0.0, -448.0, 224.0]);
        assert_eq!(quantize(DType::F8E4M3, &[0.0, 1e-40, 0.0], &mut codes), 0.0);
        assert_eq!(codes, [0; 3]);
    }

    #[test]
    fn impossible_layouts_are_named() {
        let good = layout(DType::Bf16);
        assert_eq!(good.validate(), Ok(()));
        let argument = |layout: KvLayout| match layout.validate() {
            Err(KernelError::Shape { argument, .. } | KernelError::Type { argument, .. }) => argument,
            Err(KernelError::Range { argument, .. }) => argument,
            other => panic!("{other:?}"),
        };
        assert_eq!(argument(KvLayout { num_layers: 0, ..good }), "num_layers");
        assert_eq!(argument(KvLayout { block_size: 24, ..good }), "block_size");
        assert_eq!(argument(KvLayout { head_dim: 7, ..good }), "head_dim");
        assert_eq!(argument(KvLayout { head_dim: 258, ..good }), "head_dim");
        assert_eq!(argument(KvLayout { dtype: DType::F16, ..good }), "dtype");
        assert_eq!(argument(KvLayout { num_blocks: 1 << 28, ..good }), "num_blocks");
    }
}
