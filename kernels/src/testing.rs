//! What tests of this and of other crates share: seeded numbers, hostile inputs, comparison with a stated tolerance.

mod blocks;
mod emulator;
#[cfg(unix)]
pub mod fake_driver;

pub use blocks::encode;
pub use emulator::Emulator;

use std::path::PathBuf;

use half::bf16;

use crate::cpu::{CpuBackend, CpuConfig, CpuKv, Isa};
use crate::cuda::{CudaBackend, Device, Driver};
use crate::kv_layout::{KvPlace, quantize};
use crate::{DType, KernelError, e4m3};

/// How far a number may be from what is expected: `abs + rel * |expected|`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    pub abs: f64,
    pub rel: f64,
}

impl Tolerance {
    /// Equal numbers, `-0.0` equal to `0.0`.
    pub const EXACT: Self = Self { abs: 0.0, rel: 0.0 };
}

/// Panics unless every number is within the tolerance of its expected one, naming the worst and how many there are.
/// NaN is close to NaN only, an infinity only to itself.
#[track_caller]
pub fn assert_close<E: Into<f64> + Copy>(actual: &[f32], expected: &[E], tolerance: Tolerance) {
    assert_eq!(actual.len(), expected.len(), "lengths differ");
    let mut num_bad = 0;
    let mut worst = (0, 0.0, 0.0, -1.0);
    for (index, (&actual, &expected)) in actual.iter().zip(expected).enumerate() {
        let (actual, expected): (f64, f64) = (actual.into(), expected.into());
        if actual == expected || (actual.is_nan() && expected.is_nan()) {
            continue;
        }
        let allowed = tolerance.abs + tolerance.rel * expected.abs();
        // NaN is never close to a number, and an infinity is as far as can be.
        let excess = match (actual - expected).abs() / allowed {
            excess if excess.is_nan() || expected.is_infinite() => f64::INFINITY,
            excess => excess,
        };
        if excess > 1.0 {
            num_bad += 1;
            if excess > worst.3 {
                worst = (index, actual, expected, excess);
            }
        }
    }
    let (index, actual, expected, excess) = worst;
    assert!(
        num_bad == 0,
        "{num_bad} numbers are not close; [{index}] is {actual:e}, expected {expected:e}, {excess:.2} times {tolerance:?}"
    );
}

/// Panics unless all bits are equal, naming the first that are not.
#[track_caller]
pub fn assert_same_bits(actual: &[f32], expected: &[f32]) {
    assert_eq!(actual.len(), expected.len(), "lengths differ");
    for (index, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        assert!(actual.to_bits() == expected.to_bits(), "bits differ at [{index}]: {actual:e}, expected {expected:e}");
    }
}

/// A small generator of test numbers (SplitMix64, Steele et al. 2014): the same seed, the same numbers, everywhere.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `limit`, which is not zero.
    pub fn below(&mut self, limit: usize) -> usize {
        ((u128::from(self.next_u64()) * limit as u128) >> 64) as usize
    }

    /// In `[-1, 1)`.
    pub fn uniform(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// About normal, mean 0 and variance 1.
    pub fn normal(&mut self) -> f32 {
        // Four uniform numbers of variance 1/3 each: tails end at 3.46, which is no loss here.
        (0..4).map(|_| self.uniform()).sum::<f32>() * 0.75_f32.sqrt()
    }

    pub fn normals(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.normal()).collect()
    }

    /// Normal numbers of which one in 64 is a thousand times as large, as activations of real models are.
    pub fn outliers(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.normal() * if self.below(64) == 0 { 1000.0 } else { 1.0 }).collect()
    }

    /// `0..len` in random order.
    pub fn permutation(&mut self, len: usize) -> Vec<u32> {
        let mut items: Vec<u32> = (0..len as u32).collect();
        for last in (1..len).rev() {
            items.swap(last, self.below(last + 1));
        }
        items
    }
}

/// Fills a cache with what nobody may look at: NaN, and large whole numbers with scales of NaN.
pub fn poison_kv(kv: &mut CpuKv) {
    let op = "poison_kv";
    match kv.layout().dtype {
        DType::F32 => kv.f32_mut(op).expect("f32").fill(POISON),
        // As whole numbers 127, 127, -1, 127; of e4m3 none is a number.
        DType::I8 | DType::F8E4M3 => {
            let bits = POISON.to_bits();
            kv.scales_mut(op).expect("int8").fill(f32::from_bits(bits | 0x7f_7f7f));
        }
        _ => kv.bf16_mut(op).expect("bf16").fill(bf16::from_f32(POISON).to_bits()),
    }
}

/// Writes K and V of one token and head as the cache holds them.
pub fn write_kv(kv: &mut CpuKv, place: KvPlace, k: &[f32], v: &[f32]) {
    let (op, layout) = ("write_kv", *kv.layout());
    let mut codes = [vec![0; k.len()], vec![0; v.len()]];
    if let Some(at) = layout.scale_indices(place) {
        let scales = [quantize(layout.dtype, k, &mut codes[0]), quantize(layout.dtype, v, &mut codes[1])];
        for (at, scale) in at.into_iter().zip(scales) {
            kv.scales_mut(op).expect("int8")[at] = scale;
        }
    }
    for (part, x) in [k, v].into_iter().enumerate() {
        for (dim, &x) in x.iter().enumerate() {
            let at = if part == 0 { layout.k_index(place, dim) } else { layout.v_index(place, dim) };
            match layout.dtype {
                DType::F32 => kv.f32_mut(op).expect("f32")[at] = x,
                DType::I8 | DType::F8E4M3 => kv.i8_mut(op).expect("int8")[at] = codes[part][dim],
                _ => kv.bf16_mut(op).expect("bf16")[at] = bf16::from_f32(x).to_bits(),
            }
        }
    }
}

/// One number of K and one of V, times their scales where they have one.
pub fn read_kv(kv: &CpuKv, place: KvPlace, dim: usize) -> [f64; 2] {
    let (op, layout) = ("read_kv", kv.layout());
    let at = [layout.k_index(place, dim), layout.v_index(place, dim)];
    match layout.dtype {
        DType::F32 => at.map(|at| f64::from(kv.f32(op).expect("f32")[at])),
        DType::I8 | DType::F8E4M3 => {
            let scales = layout.scale_indices(place).expect("quantized numbers have scales");
            let scales = scales.map(|at| f64::from(kv.scales(op).expect("int8")[at]));
            let code = |code: i8| match layout.dtype {
                DType::F8E4M3 => f64::from(e4m3::to_f32(code.cast_unsigned())),
                _ => f64::from(code),
            };
            let codes = at.map(|at| code(kv.i8(op).expect("int8")[at]));
            [codes[0] * scales[0], codes[1] * scales[1]]
        }
        _ => at.map(|at| f64::from(bf16::from_bits(kv.bf16(op).expect("bf16")[at]))),
    }
}

/// A NaN for memory that nothing may read: a stray read shows in the result.
pub const POISON: f32 = f32::NAN;

/// A backend for each instruction set of this machine, and for each number of threads given.
pub fn cpu_backends(num_threads: &[usize]) -> Vec<CpuBackend> {
    let mut backends = Vec::new();
    for isa in Isa::available() {
        for &num_threads in num_threads {
            let backend = CpuBackend::new(CpuConfig { num_threads, isa: Some(isa) }).expect("the ISA is available");
            backends.push(backend);
        }
    }
    backends
}

/// The CUDA backend over the emulator; none where device code is not emulated, and a line that says so.
pub fn emulated_backends() -> Vec<CudaBackend<Emulator>> {
    emulated(None).into_iter().collect()
}

/// How a test that runs over the emulator and on a card gets its device, pretending to have so many multiprocessors.
pub type OpenDevice<D> = fn(Option<u32>) -> Option<CudaBackend<D>>;

/// The emulator, see [`OpenDevice`]; `None` is [`emulated_backends`]'s own number of multiprocessors.
pub fn emulated(num_multiprocessors: Option<u32>) -> Option<CudaBackend<Emulator>> {
    let device = match num_multiprocessors {
        Some(number) => Emulator::with_multiprocessors(number),
        None => Emulator::new(),
    };
    opened(device)
}

/// Where tests keep device code that the driver assembled, in the system's folder for temporary files.
pub fn card_cache() -> PathBuf {
    std::env::temp_dir().join("quire-cuda")
}

/// The first card, see [`OpenDevice`]; `None` is the card's own number of multiprocessors. A launch is planned for the number
/// that is pretended, and runs on those that are there.
pub fn card(num_multiprocessors: Option<u32>) -> Option<CudaBackend<Driver>> {
    let mut driver = Driver::open(0, Some(card_cache()));
    if let (Ok(driver), Some(number)) = (&mut driver, num_multiprocessors) {
        driver.pretend_multiprocessors(number);
    }
    opened(driver)
}

fn opened<D: Device>(device: Result<D, KernelError>) -> Option<CudaBackend<D>> {
    match device {
        Ok(device) => Some(CudaBackend::new(device).expect("little memory")),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

/// Tests over CUDA devices: `<name>::emulated`, and `<name>::on_a_card`. Their body gets an [`OpenDevice`].
#[macro_export]
macro_rules! device_tests {
    ($($name:ident: |$open:ident| $body:expr;)+) => { $(
        mod $name {
            use super::*;

            #[test]
            fn emulated() {
                let $open = quire_kernels::testing::emulated;
                $body
            }

            #[test]
            fn on_a_card() {
                let $open = quire_kernels::testing::card;
                $body
            }
        }
    )+ };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closeness_is_as_stated() {
        let tolerance = Tolerance { abs: 0.5, rel: 0.1 };
        assert_close(&[1.0, 11.0, f32::NAN, f32::INFINITY], &[1.5, 10.0, f64::NAN, f64::INFINITY], tolerance);
        for (actual, expected) in
            [(1.0, 1.7), (f32::NAN, 1.0), (1.0, f32::NAN), (1.0, f32::INFINITY), (f32::INFINITY, f32::NEG_INFINITY)]
        {
            let panic = std::panic::catch_unwind(|| assert_close(&[0.0, actual], &[0.0, expected], tolerance));
            let message = *panic.expect_err("not close").downcast::<String>().expect("a message");
            assert!(message.contains("[1]"), "{message}");
        }
    }

    #[test]
    fn numbers_are_spread_as_named() {
        let mut rng = Rng::new(1);
        let numbers = rng.normals(10_000);
        let mean = numbers.iter().sum::<f32>() / 1e4;
        let variance = numbers.iter().map(|x| x * x).sum::<f32>() / 1e4;
        assert!(mean.abs() < 0.05 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
        let mut permutation = rng.permutation(100);
        permutation.sort_unstable();
        assert!(permutation.iter().copied().eq(0..100));
    }
}
