use std::time::Instant;

use crate::KernelError;
use crate::cpu::peaks::Peaks;
use crate::cuda::{Arg, CudaBackend, Device, KernelId};

/// As in `peaks.cu`.
const THREADS: u32 = 256;
const WARPS: usize = THREADS as usize / 32;
const CHAINS: usize = 8;

/// Thread blocks for each multiprocessor.
const BLOCKS_PER_MULTIPROCESSOR: usize = 8;

/// Best of so many tries.
const NUM_TRIES: usize = 5;

/// How much is done in a try.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Read so many bytes; several times what the device's cache holds.
    pub read_bytes: usize,
    /// Products in a chain.
    pub rounds: u32,
}

impl Effort {
    /// Some milliseconds a try.
    pub const FULL: Self = Self { read_bytes: 1 << 30, rounds: 1 << 14 };
}

/// Measures a card for less than a second. The memory that is read stays taken: measure before a model is loaded, or with
/// little. Products are those of `mma.sync`, which Hopper's own instructions are faster than.
pub fn measure<D: Device>(backend: &mut CudaBackend<D>, effort: Effort) -> Result<Peaks, KernelError> {
    let num_blocks = BLOCKS_PER_MULTIPROCESSOR * backend.device.facts().num_multiprocessors as usize;
    let memory = backend.device.alloc("bandwidth measurement", effort.read_bytes)?;
    let out = backend.device.alloc("bandwidth measurement", 4)?.into();
    let num_vectors = (effort.read_bytes / 16) as u64;
    let rounds = effort.rounds.into();
    let mut seconds = |function, args: &[Arg]| -> Result<f64, KernelError> {
        let kernel = KernelId { module: "peaks", function };
        let mut best = f64::INFINITY;
        // The first makes the kernel ready.
        for _ in 0..=NUM_TRIES {
            backend.device.synchronize()?;
            let start = Instant::now();
            // SAFETY: the memory is as long as the arguments say, and the result has a word.
            unsafe { backend.launch(kernel, [num_blocks, 1, 1], [THREADS, 1, 1], 0, args) }?;
            backend.device.synchronize()?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(best)
    };
    let products = (num_blocks * CHAINS * effort.rounds as usize) as f64;
    Ok(Peaks {
        read_bytes_per_second: effort.read_bytes as f64
            / seconds("peaks_read", &[memory.into(), num_vectors.into(), out])?,
        bf16_flops_per_second: products * (WARPS * 2 * 16 * 8 * 16) as f64 / seconds("peaks_bf16", &[rounds, out])?,
        int8_ops_per_second: products * (WARPS * 2 * 16 * 8 * 32) as f64 / seconds("peaks_int8", &[rounds, out])?,
        f32_flops_per_second: products * f64::from(2 * THREADS) / seconds("peaks_f32", &[rounds, out])?,
    })
}
