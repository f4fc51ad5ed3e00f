//! What the machine can do at most, measured: the figures that speed is stated beside.

use std::hint::black_box;
use std::time::Instant;

use super::buffer::AlignedBytes;
use super::lanes::{LANES, Lanes, PREFETCH_AHEAD_BYTES, Vectorized, prefetch, vectorize};
use super::{CpuBackend, Isa};
use crate::{DType, KernelError};

/// Bytes read by [`read_bytes_per_second`]: several times the largest cache, as the weights of a model are.
const READ_BYTES: usize = 1 << 30;

/// What is read in one go: a few cache lines.
const READ_PIECE: usize = 4 * LINE_BYTES;

/// One vector.
const LINE_BYTES: usize = LANES * size_of::<f32>();

/// Best of so many tries: the machine may have other work.
const NUM_TRIES: usize = 5;

/// Limits of a backend: its threads together, with its instruction set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peaks {
    /// Reading memory once, in order, each thread its own part.
    pub read_bytes_per_second: f64,
    /// Multiplications and additions on registers alone, as `linear` does them with bf16 weights.
    pub bf16_flops_per_second: f64,
    /// Products of bytes and their sums in 32 bits, as `linear` does them with quantized weights, two operations each:
    /// `tdpbsud` on AMX, `vpdpbusd` on AVX-512, two `vpmaddwd` on AVX2, plain loops elsewhere.
    pub int8_ops_per_second: f64,
    /// Multiplications and additions on registers alone with f32 weights.
    pub f32_flops_per_second: f64,
}

/// Measures for about a second, with a gigabyte of memory. A backend of one thread gives the figures of one core.
pub fn measure(backend: &CpuBackend) -> Result<Peaks, KernelError> {
    Ok(Peaks {
        read_bytes_per_second: read_bytes_per_second(backend)?,
        bf16_flops_per_second: flops_per_second(backend, DType::Bf16),
        int8_ops_per_second: int8_ops_per_second(backend),
        f32_flops_per_second: flops_per_second(backend, DType::F32),
    })
}

fn read_bytes_per_second(backend: &CpuBackend) -> Result<f64, KernelError> {
    let mut memory = AlignedBytes::zeroed("bandwidth measurement", READ_BYTES)?;
    // Pages that nobody wrote are all the same page of zeros.
    memory.view_mut::<u8>().fill(1);
    Ok(READ_BYTES as f64 / seconds_of_reading(backend, std::iter::once(memory.view::<u8>())))
}

/// Of memory in these parts, one after the other: a machine with several memories reads one faster than another, so what a
/// model is held against is reading where the model lies.
pub(crate) fn seconds_of_reading<'a>(backend: &CpuBackend, parts: impl Iterator<Item = &'a [u8]> + Clone) -> f64 {
    let isa = backend.isa;
    best_seconds(|| {
        for part in parts.clone() {
            backend.pool.run_ranges(part.len() / READ_PIECE, 1, &|_, range| {
                let bytes = &part[range.start * READ_PIECE..range.end * READ_PIECE];
                black_box(vectorize(isa, Read { bytes }));
            });
        }
    })
}

/// Adds up all bytes as if they were numbers, so that each is read once. At most a piece at the end is left out.
struct Read<'a> {
    bytes: &'a [u8],
}

impl Vectorized for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) -> f32 {
        let mut sums = [simd.splat(0.0); READ_PIECE / LINE_BYTES];
        for piece in self.bytes.chunks_exact(READ_PIECE) {
            for (sum, line) in sums.iter_mut().zip(piece.chunks_exact(LINE_BYTES)) {
                prefetch(line.as_ptr().wrapping_add(PREFETCH_AHEAD_BYTES));
                // SAFETY: a line is 16 numbers of 4 bytes; loads need no alignment, and any bits are a number.
                *sum = simd.add(*sum, unsafe { simd.load(line.as_ptr().cast()) });
            }
        }
        simd.sum(sums.into_iter().reduce(|a, b| simd.add(a, b)).expect("there are some"))
    }
}

/// Rounds of every measurement on registers.
const NUM_ROUNDS: usize = 200_000;

fn flops_per_second(backend: &CpuBackend, dtype: DType) -> f64 {
    let isa = backend.isa;
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Amx && dtype == DType::Bf16 {
        // SAFETY: a backend is made only for instructions that the machine has.
        return rounds_per_second(backend, || unsafe { x86::bf16_amx() }) * x86::AMX_FLOPS as f64;
    }
    // Elsewhere bf16 is widened to f32 first.
    let in_pairs = dtype == DType::Bf16 && isa == Isa::Avx512Bf16;
    // Independent sums: more than the latency of any multiplication, and no more than the registers hold.
    if isa >= Isa::Avx512 {
        rounds_per_second(backend, || vectorize(isa, Multiply::<12> { in_pairs }))
            * (12 * LANES * if in_pairs { 4 } else { 2 }) as f64
    } else {
        rounds_per_second(backend, || vectorize(isa, Multiply::<6> { in_pairs })) * (6 * LANES * 2) as f64
    }
}

/// How many rounds all threads together get done, where `work` does [`NUM_ROUNDS`].
fn rounds_per_second<T>(backend: &CpuBackend, work: impl Fn() -> T + Sync) -> f64 {
    let seconds = best_seconds(|| {
        backend.pool.run(&|_| {
            black_box(work());
        });
    });
    (backend.num_threads() * NUM_ROUNDS) as f64 / seconds
}

/// Multiplies into `N` independent sums.
struct Multiply<const N: usize> {
    in_pairs: bool,
}

impl<const N: usize> Vectorized for Multiply<N> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) -> f32 {
        let x = simd.splat(black_box(1.0));
        let pair = simd.splat_pair(black_box(0x3f80_3f80));
        let mut acc = [simd.splat(0.0); N];
        if self.in_pairs {
            for _ in 0..NUM_ROUNDS {
                for acc in &mut acc {
                    *acc = simd.dot_pairs(*acc, pair, pair);
                }
            }
        } else {
            for _ in 0..NUM_ROUNDS {
                for acc in &mut acc {
                    *acc = simd.fma(x, x, *acc);
                }
            }
        }
        let mut sum = acc[0];
        for acc in &acc[1..] {
            sum = simd.add(sum, *acc);
        }
        simd.sum(sum)
    }
}

fn int8_ops_per_second(backend: &CpuBackend) -> f64 {
    match backend.isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => {
            // SAFETY: a backend is made only for instructions that the machine has.
            rounds_per_second(backend, || unsafe { x86::int8_amx() }) * (2 * x86::AMX_FLOPS) as f64
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => {
            // SAFETY: a backend is made only for instructions that the machine has; both AVX-512 sets include VNNI.
            rounds_per_second(backend, || unsafe { x86::int8_avx512() }) * x86::AVX512_OPS as f64
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            // SAFETY: as above.
            rounds_per_second(backend, || unsafe { x86::int8_avx2() }) * x86::AVX2_OPS as f64
        }
        _ => rounds_per_second(backend, int8_portable) * PORTABLE_OPS as f64,
    }
}

/// Of a round of [`int8_portable`].
const PORTABLE_OPS: usize = LANES * 4 * 2;

/// Four products for each sum, with the sum's own bytes as one side, so that no round can be left out.
fn int8_portable() -> i32 {
    let codes: [[u8; 4]; LANES] = black_box([[3; 4]; LANES]);
    let mut sums = [1_i32; LANES];
    for _ in 0..NUM_ROUNDS {
        for (sum, codes) in sums.iter_mut().zip(&codes) {
            let products = codes.iter().zip(sum.to_ne_bytes()).map(|(&a, b)| i32::from(a) * i32::from(b as i8));
            *sum = sum.wrapping_add(products.sum());
        }
    }
    sums.into_iter().fold(0, i32::wrapping_add)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::NUM_ROUNDS;
    use crate::cpu::amx::{TILE_ROWS, Tiles, tile};

    const AVX512_CHAINS: usize = 12;
    const AVX2_CHAINS: usize = 10;
    /// Of a round: sums, products for each, and two operations for each product.
    pub(super) const AVX512_OPS: usize = AVX512_CHAINS * 16 * 4 * 2;
    pub(super) const AVX2_OPS: usize = AVX2_CHAINS * 8 * 4 * 2;

    /// Of a round of bf16: four tiles of sums, pairs for each, and two operations for each product.
    pub(super) const AMX_FLOPS: usize = 4 * TILE_ROWS * TILE_ROWS * (2 * TILE_ROWS) * 2;

    /// # Safety
    /// The machine has tiles.
    pub(super) unsafe fn bf16_amx() {
        // SAFETY: by contract; nothing here holds tiles already.
        unsafe {
            let _tiles = Tiles::take(TILE_ROWS as u8);
            for _ in 0..NUM_ROUNDS {
                tile!(bf16 "tmm0", "tmm4", "tmm6");
                tile!(bf16 "tmm1", "tmm4", "tmm7");
                tile!(bf16 "tmm2", "tmm5", "tmm6");
                tile!(bf16 "tmm3", "tmm5", "tmm7");
            }
        }
    }

    /// # Safety
    /// The machine has tiles.
    pub(super) unsafe fn int8_amx() {
        // SAFETY: as above.
        unsafe {
            let _tiles = Tiles::take(TILE_ROWS as u8);
            for _ in 0..NUM_ROUNDS {
                tile!(i8u8 "tmm0", "tmm4", "tmm6");
                tile!(i8u8 "tmm1", "tmm4", "tmm7");
                tile!(i8u8 "tmm2", "tmm5", "tmm6");
                tile!(i8u8 "tmm3", "tmm5", "tmm7");
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn int8_avx512() -> i32 {
        let codes = _mm512_set1_epi32(black_box(0x0102_0304));
        let mut acc = [_mm512_setzero_si512(); AVX512_CHAINS];
        for _ in 0..NUM_ROUNDS {
            for acc in &mut acc {
                *acc = _mm512_dpbusd_epi32(*acc, codes, codes);
            }
        }
        let sum = acc.into_iter().reduce(|a, b| _mm512_add_epi32(a, b)).expect("there are some");
        _mm512_reduce_add_epi32(sum)
    }

    /// Even and odd bytes apart, as 16-bit numbers. A sum is one side of its next products, so that none is left out.
    #[target_feature(enable = "avx2")]
    pub(super) fn int8_avx2() -> i32 {
        let (even, odd) = (_mm256_set1_epi16(black_box(3)), _mm256_set1_epi16(black_box(5)));
        let mut acc = [_mm256_set1_epi32(black_box(1)); AVX2_CHAINS];
        for _ in 0..NUM_ROUNDS {
            for acc in &mut acc {
                let products = _mm256_add_epi32(_mm256_madd_epi16(even, *acc), _mm256_madd_epi16(odd, *acc));
                *acc = _mm256_add_epi32(*acc, products);
            }
        }
        let sum = acc.into_iter().reduce(|a, b| _mm256_add_epi32(a, b)).expect("there are some");
        _mm256_extract_epi32::<0>(sum)
    }
}

fn best_seconds(mut work: impl FnMut()) -> f64 {
    (0..NUM_TRIES)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::CpuConfig;

    #[test]
    fn every_instruction_set_has_its_figures() {
        for isa in Isa::available() {
            let backend = CpuBackend::new(CpuConfig { num_threads: 1, isa: Some(isa) }).expect("a thread");
            for dtype in [DType::Bf16, DType::F32] {
                let flops = flops_per_second(&backend, dtype);
                assert!(flops.is_finite() && flops > 0.0, "{isa}: {flops}");
            }
            let ops = int8_ops_per_second(&backend);
            assert!(ops.is_finite() && ops > 0.0, "{isa}: {ops}");
        }
    }

    #[test]
    fn reading_adds_up_every_number() {
        let numbers = [0.5_f32; 20 * 4 * LANES];
        let bytes = numbers.map(f32::to_ne_bytes).concat();
        for isa in Isa::available() {
            assert_eq!(vectorize(isa, Read { bytes: &bytes }), 0.5 * numbers.len() as f32, "{isa}");
        }
    }
}
