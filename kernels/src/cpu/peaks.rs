//! What the machine can do at most, measured: the figures that speed is stated beside.

use std::hint::black_box;
use std::time::Instant;

use super::buffer::AlignedBytes;
use super::lanes::{LANES, Lanes, Vectorized, vectorize};
use super::{CpuBackend, Isa, ThreadPool};
use crate::{DType, KernelError};

/// Bytes read by [`read_bytes_per_second`]: far more than any cache.
const READ_BYTES: usize = 256 << 20;

/// Best of so many tries: the machine may have other work.
const NUM_TRIES: usize = 5;

/// Limits of a backend: its threads together, with its instruction set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peaks {
    /// Reading memory once, in order, each thread its own part.
    pub read_bytes_per_second: f64,
    /// Multiplications and additions on registers alone, as `linear` does them with bf16 weights.
    pub bf16_flops_per_second: f64,
    /// The same with f32 weights.
    pub f32_flops_per_second: f64,
}

/// Measures for about half a second, with a quarter of a gigabyte of memory.
pub fn measure(backend: &CpuBackend) -> Result<Peaks, KernelError> {
    Ok(Peaks {
        read_bytes_per_second: read_bytes_per_second(&backend.pool)?,
        bf16_flops_per_second: flops_per_second(backend, DType::Bf16),
        f32_flops_per_second: flops_per_second(backend, DType::F32),
    })
}

fn read_bytes_per_second(pool: &ThreadPool) -> Result<f64, KernelError> {
    let mut memory = AlignedBytes::zeroed("bandwidth measurement", READ_BYTES)?;
    // Pages that nobody wrote are all the same page of zeros.
    memory.view_mut::<u8>().fill(1);
    let words = memory.view::<u32>();
    let seconds = best_seconds(|| {
        pool.run_ranges(words.len(), 1024, &|_, range| {
            let mut sums = [0_u32; 64];
            for lines in words[range].chunks_exact(64) {
                #[cfg(target_arch = "x86_64")]
                for line in 0..4 {
                    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
                    // SAFETY: fetching ahead reads nothing, whatever the address.
                    unsafe { _mm_prefetch::<_MM_HINT_T0>(lines.as_ptr().wrapping_add(1024 + line * 16).cast()) };
                }
                for (sum, word) in sums.iter_mut().zip(lines) {
                    *sum |= word;
                }
            }
            black_box(sums);
        });
    });
    Ok(READ_BYTES as f64 / seconds)
}

fn flops_per_second(backend: &CpuBackend, dtype: DType) -> f64 {
    const NUM_ROUNDS: usize = 200_000;
    // Elsewhere bf16 is widened to f32 first.
    let isa = backend.isa;
    let in_pairs = dtype == DType::Bf16 && isa == Isa::Avx512Bf16;
    let seconds = best_seconds(|| {
        backend.pool.run(&|_| {
            black_box(vectorize(isa, Multiply { in_pairs, num_rounds: NUM_ROUNDS }));
        });
    });
    let flops_per_round = NUM_CHAINS * LANES * if in_pairs { 4 } else { 2 };
    (backend.num_threads() * NUM_ROUNDS * flops_per_round) as f64 / seconds
}

/// Independent sums: more than the latency of any multiplication, fewer than half of the registers.
const NUM_CHAINS: usize = 6;

struct Multiply {
    in_pairs: bool,
    num_rounds: usize,
}

impl Vectorized for Multiply {
    type Output = f32;

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) -> f32 {
        let x = simd.splat(black_box(1.0));
        let pair = simd.splat_pair(black_box(0x3f80_3f80));
        let mut acc = [simd.splat(0.0); NUM_CHAINS];
        if self.in_pairs {
            for _ in 0..self.num_rounds {
                for acc in &mut acc {
                    *acc = simd.dot_pairs(*acc, pair, pair);
                }
            }
        } else {
            for _ in 0..self.num_rounds {
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

fn best_seconds(mut work: impl FnMut()) -> f64 {
    (0..NUM_TRIES)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}
