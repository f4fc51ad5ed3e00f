//! What weights are stored and multiplied as.

use crate::{DType, HostTensor, TensorFormat};

/// Input features that share a scale in block formats of files, and in 4-bit weights.
pub const SHORT_GROUP_LEN: usize = 32;
/// Input features that share a scale where nothing asks for less: scales are then hardly read or multiplied at all.
pub const LONG_GROUP_LEN: usize = 128;

/// What a packed weight is stored and multiplied as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    F32,
    Bf16,
    /// Numbers of [`crate::e4m3`], each [`LONG_GROUP_LEN`] of them with a scale in f32. Activations are rounded to bf16.
    Fp8,
    /// Small whole numbers with scales. Activations are quantized to 8 bits when they are multiplied.
    Grouped(Grouping),
}

/// Weights as codes: in each group of consecutive input features, `weight = scale * (code - zero) + min`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grouping {
    pub codes: Codes,
    /// [`SHORT_GROUP_LEN`] or [`LONG_GROUP_LEN`]; 4-bit codes have short groups.
    pub group_len: usize,
    /// Whether groups have a `min` of their own; else it is 0.
    pub has_min: bool,
}

/// What a code stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codes {
    /// 0 to 255 around 128.
    Int8,
    /// 0 to 15 around 8.
    Int4,
    /// 0 to 15, an index into ggml's table of `IQ4_NL`.
    Iq4Nl,
}

impl Codes {
    /// The zero that kernels subtract: through the sum of the activations, not from each code.
    pub const fn zero_point(self) -> i32 {
        match self {
            Self::Int8 | Self::Iq4Nl => 128,
            Self::Int4 => 8,
        }
    }

    /// Codes in a byte.
    pub const fn per_byte(self) -> usize {
        match self {
            Self::Int8 => 1,
            Self::Int4 | Self::Iq4Nl => 2,
        }
    }
}

impl WeightFormat {
    /// Numbers as they are: f32, or else bf16.
    pub const fn dense(dtype: DType) -> Self {
        if matches!(dtype, DType::F32) { Self::F32 } else { Self::Bf16 }
    }

    /// 8 bits for a weight of so many input features: long groups where they fill the row.
    pub const fn int8(in_features: usize) -> Self {
        let group_len = if in_features.is_multiple_of(LONG_GROUP_LEN) { LONG_GROUP_LEN } else { SHORT_GROUP_LEN };
        Self::Grouped(Grouping { codes: Codes::Int8, group_len, has_min: false })
    }

    /// 4 bits, with a scale and a minimum for each 32 weights.
    pub const fn int4() -> Self {
        Self::Grouped(Grouping { codes: Codes::Int4, group_len: SHORT_GROUP_LEN, has_min: true })
    }

    /// The smallest format that holds all of `parts` as they are in their files: blocks stay what they are, or become
    /// codes of 8 bits where parts differ. `None` where a part is dense, or not all are of 8-bit floats.
    pub fn of_blocks(parts: &[HostTensor<'_>]) -> Option<Self> {
        Self::of_formats(parts.iter().map(|part| part.format))
    }

    /// The same of parts that are known by their formats alone.
    pub fn of_formats(parts: impl Iterator<Item = TensorFormat> + Clone) -> Option<Self> {
        if parts.clone().all(|part| part == TensorFormat::F8E4M3) {
            return Some(Self::Fp8);
        }
        let mut all: Option<Grouping> = None;
        for part in parts {
            let own = Grouping::of_blocks(part)?;
            all = Some(match all {
                None => own,
                Some(all) => Grouping {
                    codes: if all.codes == own.codes { own.codes } else { Codes::Int8 },
                    group_len: SHORT_GROUP_LEN,
                    has_min: all.has_min || own.has_min,
                },
            });
        }
        all.map(Self::Grouped)
    }

    /// The name used in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Grouped(Grouping { codes: Codes::Int8, .. }) => "int8",
            Self::Grouped(Grouping { codes: Codes::Int4, .. }) => "int4",
            Self::Grouped(Grouping { codes: Codes::Iq4Nl, .. }) => "iq4_nl",
        }
    }
}

impl Grouping {
    /// What blocks of a file are kept as. The groups of `Q6_K` are shorter than any here: they are rounded once more, to
    /// 8 bits.
    const fn of_blocks(format: TensorFormat) -> Option<Self> {
        let (codes, has_min) = match format {
            TensorFormat::F32 | TensorFormat::Bf16 | TensorFormat::F16 | TensorFormat::F8E4M3 => return None,
            TensorFormat::Q8_0 | TensorFormat::Q5_0 | TensorFormat::Q6K => (Codes::Int8, false),
            TensorFormat::Q5_1 | TensorFormat::Q5K => (Codes::Int8, true),
            TensorFormat::Q4_0 => (Codes::Int4, false),
            TensorFormat::Q4_1 | TensorFormat::Q4K => (Codes::Int4, true),
            TensorFormat::Iq4Nl => (Codes::Iq4Nl, false),
        };
        Some(Self { codes, group_len: SHORT_GROUP_LEN, has_min })
    }

    /// Whether codes of `format` can be kept, rather than rounded again.
    pub(crate) fn keeps(self, format: TensorFormat) -> bool {
        Self::of_blocks(format).is_some_and(|own| {
            format != TensorFormat::Q6K
                && self.group_len == own.group_len
                && (self.has_min || !own.has_min)
                && (self.codes == own.codes || self.codes == Codes::Int8)
        })
    }
}
