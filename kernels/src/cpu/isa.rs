//! Which vector instructions the CPU has. Chosen once, when the backend is made: packed weights depend on it.

use std::fmt;

/// Instruction sets that kernels are written for, from the least to the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Whatever the build's target has: plain loops.
    Portable,
    /// AVX2 with FMA (x86-64-v3).
    Avx2,
    /// AVX-512 F, BW, VL, DQ with BF16 and VNNI, products of bf16 weights by FMA: Intel's cores take four to seven times as
    /// long for a dot product of bf16 pairs as for an FMA, which does half as much.
    Avx512,
    /// The same with GFNI and products of bf16 pairs (`vdpbf16ps`), where they are as fast as FMA: Zen 4 and later.
    Avx512Bf16,
    /// The same with AMX: products of bf16 weights, and of whole numbers for many rows, in tiles of 16 rows and 16 outputs.
    /// Sapphire Rapids and later, where the system lets a process use tiles.
    Amx,
}

impl Isa {
    /// The best that this machine has: by what it is, never by a measurement, so that equal machines give equal bits.
    pub fn detect() -> Self {
        let is_best = |isa: &Self| *isa != Self::Avx512Bf16 || has_fast_bf16_products();
        Self::available().into_iter().rfind(is_best).expect("Portable is always there")
    }

    /// All that this machine has, from the least to the best.
    pub fn available() -> Vec<Self> {
        [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Amx]
            .into_iter()
            .filter(|isa| isa.is_available())
            .collect()
    }

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512Bf16.is_available() && super::amx::is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => Self::Avx512.is_available() && is_x86_feature_detected!("gfni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bf16")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 | Self::Avx512Bf16 | Self::Amx => false,
        }
    }

    /// The name used in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
        }
    }

    /// Whether it is one of those with 512-bit vectors.
    pub(crate) const fn is_avx512(self) -> bool {
        cfg!(target_arch = "x86_64") && matches!(self, Self::Avx512 | Self::Avx512Bf16 | Self::Amx)
    }
}

/// Whether the maker's cores multiply bf16 pairs at the pace of FMA.
fn has_fast_bf16_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let leaf = std::arch::x86_64::__cpuid(0);
        [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat() == *b"AuthenticAMD"
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn portable_is_always_there_and_detect_takes_the_fastest() {
        let available = Isa::available();
        assert_eq!(available[0], Isa::Portable);
        assert!(available.is_sorted());
        let best = available[available.len() - 1];
        let expected = if best == Isa::Avx512Bf16 && !has_fast_bf16_products() { Isa::Avx512 } else { best };
        assert_eq!(Isa::detect(), expected);
    }
}
