//! How the numbers of a weight lie in a file: dense, or in blocks that share scales.
//!
//! Block formats are those of ggml, and one of 8-bit floats. A block holds consecutive weights of one row, codes of a few
//! bits each with one or more scales; what a block means is stated here and nowhere else.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::{DType, e4m3};

/// Weights that share one scale in a grouped format, see [`TensorFormat::read_group`].
pub const GROUP_LEN: usize = 32;
/// Weights in a block of [`TensorFormat::F8E4M3`].
pub const F8_LEN: usize = 128;
/// Weights in a block of the K formats.
const SUPER_LEN: usize = 256;
/// The scales and minima of a block of `Q4_K` and `Q5_K`: eight of each, six bits a piece.
const K_SCALES_LEN: usize = 12;

/// What the codes of `IQ4_NL` stand for.
const IQ4_NL_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
pub(crate) const IQ4_NL_CODES: [u8; 16] = {
    let mut codes = [0; 16];
    let mut i = 0;
    while i < codes.len() {
        codes[i] = (IQ4_NL_VALUES[i] as u8).wrapping_add(128);
        i += 1;
    }
    codes
};

/// Numbers of a weight, as they lie in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorFormat {
    F32,
    Bf16,
    F16,
    /// 32 weights: a scale (f16) and signed bytes.
    Q8_0,
    /// 32 weights: a scale (f16) and 4-bit codes around 8.
    Q4_0,
    /// 32 weights: a scale, a minimum (f16) and 4-bit codes.
    Q4_1,
    /// 32 weights: a scale (f16) and 5-bit codes around 16, fifth bits apart.
    Q5_0,
    /// 32 weights: a scale, a minimum (f16) and 5-bit codes, fifth bits apart.
    Q5_1,
    /// 256 weights: two f16 factors, 6-bit scale and minimum for each 32, 4-bit codes.
    Q4K,
    /// As `Q4K`, with a fifth bit for each code.
    Q5K,
    /// 256 weights: 6-bit codes around 32, an 8-bit scale for each 16, one f16 factor.
    Q6K,
    /// 32 weights: a scale (f16) and 4-bit indices into a table of 16 values.
    Iq4Nl,
    /// 128 weights: a scale (f32) and as many numbers of [`e4m3`].
    F8E4M3,
}

/// What turns the codes of a group into weights, see [`TensorFormat::read_group`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupScale {
    pub scale: f32,
    /// `-0.0` where the format has none: adding it changes no bit of any number.
    pub min: f32,
}

impl TensorFormat {
    /// Those that ggml has.
    pub const ALL: [Self; 12] = [
        Self::F32,
        Self::Bf16,
        Self::F16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Iq4Nl,
    ];

    /// Weights in a block; 1 for the dense formats.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::Bf16 | Self::F16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Iq4Nl => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => SUPER_LEN,
            Self::F8E4M3 => F8_LEN,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::Q8_0 => 2 + 32,
            Self::Q4_0 | Self::Iq4Nl => 2 + 16,
            Self::Q4_1 => 4 + 16,
            Self::Q5_0 => 2 + 4 + 16,
            Self::Q5_1 => 4 + 4 + 16,
            Self::Q4K => 4 + K_SCALES_LEN + SUPER_LEN / 2,
            Self::Q5K => 4 + K_SCALES_LEN + SUPER_LEN / 8 + SUPER_LEN / 2,
            Self::Q6K => SUPER_LEN / 2 + SUPER_LEN / 4 + SUPER_LEN / 16 + 2,
            Self::F8E4M3 => 4 + F8_LEN,
        }
    }

    /// The name that ggml has for it, or safetensors.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Iq4Nl => "IQ4_NL",
            Self::F8E4M3 => "F8_E4M3",
        }
    }

    /// Whether every number stands for itself.
    pub const fn is_dense(self) -> bool {
        self.block_len() == 1
    }

    /// Bytes of a row of `cols` weights; `None` where that is not a whole number of blocks, or more than a `usize` holds.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Writes the weights of whole blocks to `out`, in f32 and by the order of operations that defines the format, so
    /// that the bits are those of every other exact reader.
    ///
    /// Panics unless `bytes` are the blocks of `out.len()` weights.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(self.row_bytes(out.len()), Some(bytes.len()), "{} blocks of {} weights", self.name(), out.len());
        match self {
            Self::F32 => {
                for (out, bytes) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *out = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                }
            }
            Self::Bf16 => {
                for (out, bytes) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *out = f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16);
                }
            }
            Self::F16 => {
                // A few at a time: the conversion has vector code for aligned slices.
                let mut halves = [f16::ZERO; 128];
                for (out, bytes) in out.chunks_mut(halves.len()).zip(bytes.chunks(2 * halves.len())) {
                    let halves = &mut halves[..out.len()];
                    for (half, bytes) in halves.iter_mut().zip(bytes.chunks_exact(2)) {
                        *half = f16::from_le_bytes([bytes[0], bytes[1]]);
                    }
                    halves.convert_to_f32_slice(out);
                }
            }
            Self::Q6K => {
                for (block, out) in bytes.chunks_exact(self.block_bytes()).zip(out.chunks_exact_mut(SUPER_LEN)) {
                    decode_q6_k(block, out);
                }
            }
            Self::F8E4M3 => {
                for (block, out) in bytes.chunks_exact(self.block_bytes()).zip(out.chunks_exact_mut(F8_LEN)) {
                    let (scale, codes) = read_f8_block(block);
                    for (out, &code) in out.iter_mut().zip(codes) {
                        *out = scale * e4m3::to_f32(code);
                    }
                }
            }
            _ => {
                let zero_point = i32::from(self.zero_point());
                let mut codes = [0; GROUP_LEN];
                for (index, out) in out.chunks_exact_mut(GROUP_LEN).enumerate() {
                    let GroupScale { scale, min } = self.read_group(bytes, index, &mut codes);
                    for (out, &code) in out.iter_mut().zip(&codes) {
                        *out = scale * (i32::from(code) - zero_point) as f32 + min;
                    }
                }
            }
        }
    }

    /// Bits that a code of [`TensorFormat::read_group`] needs, 4, 5 or 8; `None` for the formats that are not grouped
    /// (dense ones, `Q6K`, whose scales are for 16 weights, and `F8E4M3`, whose codes are no whole numbers). Where [`TensorFormat::code_table`] has values it is
    /// their index that needs so many.
    pub const fn code_bits(self) -> Option<u32> {
        match self {
            Self::F32 | Self::Bf16 | Self::F16 | Self::Q6K | Self::F8E4M3 => None,
            Self::Q4_0 | Self::Q4_1 | Self::Q4K | Self::Iq4Nl => Some(4),
            Self::Q5_0 | Self::Q5_1 | Self::Q5K => Some(5),
            Self::Q8_0 => Some(8),
        }
    }

    /// The only codes there are, ascending, where they are not all numbers of [`TensorFormat::code_bits`] bits.
    pub const fn code_table(self) -> Option<&'static [u8; 16]> {
        match self {
            Self::Iq4Nl => Some(&IQ4_NL_CODES),
            _ => None,
        }
    }

    /// The code that stands for zero, before the minimum is added. Grouped formats only.
    pub const fn zero_point(self) -> u8 {
        match self {
            Self::Q4_0 => 8,
            Self::Q5_0 => 16,
            Self::Q8_0 | Self::Iq4Nl => 128,
            _ => 0,
        }
    }

    /// Codes of the 32 weights from `32 * index` on, in order, of a row of a grouped format:
    /// `weight = scale * (code - zero_point) as f32 + min`, each operation rounded, is what [`TensorFormat::decode`]
    /// gives.
    ///
    /// Panics where the row ends before the group does, and for formats without [`TensorFormat::code_bits`].
    pub fn read_group(self, row: &[u8], index: usize, codes: &mut [u8; GROUP_LEN]) -> GroupScale {
        let groups_in_block = self.block_len() / GROUP_LEN;
        assert!(self.code_bits().is_some(), "{} has no groups", self.name());
        let block = &row[index / groups_in_block * self.block_bytes()..][..self.block_bytes()];
        let factor = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        let without_min = GroupScale { scale: factor(0), min: -0.0 };
        match self {
            Self::Q8_0 => {
                for (code, &byte) in codes.iter_mut().zip(&block[2..]) {
                    *code = byte.wrapping_add(128);
                }
                without_min
            }
            Self::Q4_0 => {
                split_halves(&block[2..], codes);
                without_min
            }
            Self::Q4_1 => {
                split_halves(&block[4..], codes);
                GroupScale { scale: factor(0), min: factor(2) }
            }
            Self::Q5_0 => {
                split_halves(&block[6..], codes);
                add_fifth_bits(&block[2..6], codes);
                without_min
            }
            Self::Q5_1 => {
                split_halves(&block[8..], codes);
                add_fifth_bits(&block[4..8], codes);
                GroupScale { scale: factor(0), min: factor(2) }
            }
            Self::Iq4Nl => {
                split_halves(&block[2..], codes);
                for code in codes {
                    *code = IQ4_NL_CODES[usize::from(*code)];
                }
                without_min
            }
            Self::Q4K | Self::Q5K => {
                let group = index % groups_in_block;
                let (head, nibbles) = block.split_at(block.len() - SUPER_LEN / 2);
                // Two groups share 32 bytes: the even one has the low halves.
                let shift = group % 2 * 4;
                for (code, &byte) in codes.iter_mut().zip(&nibbles[group / 2 * GROUP_LEN..]) {
                    *code = byte >> shift & 0xf;
                }
                // Empty for Q4_K.
                for (code, &bits) in codes.iter_mut().zip(&head[4 + K_SCALES_LEN..]) {
                    *code |= (bits >> group & 1) << 4;
                }
                let (scale, min) = k_scale(&head[4..4 + K_SCALES_LEN], group);
                GroupScale { scale: factor(0) * f32::from(scale), min: -(factor(2) * f32::from(min)) }
            }
            Self::F32 | Self::Bf16 | Self::F16 | Self::Q6K | Self::F8E4M3 => unreachable!("it has no groups"),
        }
    }
}

/// Panics for `U32`: weights are no indices.
impl From<DType> for TensorFormat {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::Bf16 => Self::Bf16,
            DType::F16 => Self::F16,
            DType::U32 | DType::I8 | DType::F8E4M3 => panic!("neither indices nor what a cache is quantized to"),
        }
    }
}

/// Scale and codes of a block of [`TensorFormat::F8E4M3`].
pub(crate) fn read_f8_block(block: &[u8]) -> (f32, &[u8; F8_LEN]) {
    let (scale, codes) = block.split_first_chunk().expect("a block of 4 and 128 bytes");
    (f32::from_le_bytes(*scale), codes.first_chunk().expect("a block of 4 and 128 bytes"))
}

/// 16 bytes: low halves are the first 16 codes, high halves the others.
fn split_halves(bytes: &[u8], codes: &mut [u8; GROUP_LEN]) {
    let (low, high) = codes.split_at_mut(GROUP_LEN / 2);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (byte & 0xf, byte >> 4);
    }
}

/// Bit `i` of the little-endian word belongs to code `i`.
fn add_fifth_bits(bits: &[u8], codes: &mut [u8; GROUP_LEN]) {
    for (eight, &bits) in codes.chunks_exact_mut(8).zip(bits) {
        for (i, code) in eight.iter_mut().enumerate() {
            *code |= (bits >> i & 1) << 4;
        }
    }
}

/// Scale and minimum of a group. Those of the first four lie in the low six bits of bytes 0 to 3 and 4 to 7; the others
/// have their low four bits in bytes 8 to 11 and their high two on top of the first four's.
fn k_scale(bytes: &[u8], group: usize) -> (u8, u8) {
    match group {
        0..4 => (bytes[group] & 0x3f, bytes[group + 4] & 0x3f),
        _ => {
            let low = bytes[group + 4];
            (low & 0xf | bytes[group - 4] >> 6 << 4, low >> 4 | bytes[group] >> 6 << 4)
        }
    }
}

/// Each half of the block, 128 weights: 64 bytes of low four bits (low halves first), 32 bytes of high two bits (lowest
/// first), and eight scales.
fn decode_q6_k(block: &[u8], out: &mut [f32]) {
    let (low, rest) = block.split_at(SUPER_LEN / 2);
    let (high, rest) = rest.split_at(SUPER_LEN / 4);
    let (scales, factor) = rest.split_at(SUPER_LEN / 16);
    let factor = f16::from_le_bytes([factor[0], factor[1]]).to_f32();
    for (i, out) in out.iter_mut().enumerate() {
        let (half, i_in_half) = (i / 128, i % 128);
        let low = low[half * 64 + i_in_half % 64] >> (i_in_half / 64 * 4) & 0xf;
        let high = high[half * 32 + i_in_half % 32] >> (i_in_half / 32 * 2) & 3;
        let scale = factor * f32::from(scales[i / 16] as i8);
        *out = scale * (i32::from(low | high << 4) - 32) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_whole_blocks() {
        assert_eq!(TensorFormat::F16.row_bytes(3), Some(6));
        assert_eq!(TensorFormat::Q4_0.row_bytes(64), Some(36));
        assert_eq!(TensorFormat::Q4_0.row_bytes(48), None);
        assert_eq!(TensorFormat::Q6K.row_bytes(512), Some(420));
        assert_eq!(TensorFormat::Q6K.row_bytes(0), Some(0));
        assert_eq!(TensorFormat::F32.row_bytes(usize::MAX), None);
        assert_eq!(TensorFormat::Q8_0.row_bytes(usize::MAX & !31), None);
        assert_eq!(TensorFormat::from(DType::Bf16), TensorFormat::Bf16);
    }

    #[test]
    fn codes_need_the_bits_they_are_said_to() {
        for format in TensorFormat::ALL {
            let Some(bits) = format.code_bits() else { continue };
            // Every byte of the codes has all bits set, then none.
            let mut codes = [0; GROUP_LEN];
            for fill in [0xff, 0] {
                format.read_group(&vec![fill; format.block_bytes()], 0, &mut codes);
                for code in codes {
                    match format.code_table() {
                        Some(table) => assert!(table.contains(&code)),
                        None => assert!(u32::from(code) < 1 << bits, "{format:?}: {code}"),
                    }
                }
            }
        }
        assert!(IQ4_NL_CODES.is_sorted());
    }

    #[test]
    #[should_panic(expected = "Q6_K has no groups")]
    fn q6_k_has_no_groups() {
        TensorFormat::Q6K.read_group(&[0; 210], 0, &mut [0; GROUP_LEN]);
    }
}
