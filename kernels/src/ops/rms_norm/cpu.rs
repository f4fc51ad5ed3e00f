use super::{Lens, RmsNorm};
use crate::KernelError;
use crate::cpu::CpuBackend;
use crate::cpu::lanes::{LANES, Lanes, Vectorized, vectorize};
use crate::cpu::math::sum_of_squares;
use crate::cpu::thread_pool::SharedMut;

/// Numbers that are worth waking another thread for.
const MIN_NUMBERS_PER_THREAD: usize = 16 * 1024;

pub(crate) fn rms_norm(backend: &mut CpuBackend, args: RmsNorm<'_, CpuBackend>) -> Result<(), KernelError> {
    const OP: &str = RmsNorm::<CpuBackend>::OP;
    args.check(Lens { x: args.x.len(), weight: args.weight.len(), out: args.out.len() })?;
    let RmsNorm { num_rows, dim, eps, .. } = args;
    let x = &args.x.f32(OP, "x")?[..num_rows * dim];
    let weight = &args.weight.f32(OP, "weight")?[..dim];
    let out = SharedMut::new(&mut args.out.f32_mut(OP, "out")?[..num_rows * dim]);
    let isa = backend.isa;
    backend.pool.run_ranges(num_rows, MIN_NUMBERS_PER_THREAD.div_ceil(dim), &|_, rows| {
        let range = rows.start * dim..rows.end * dim;
        // SAFETY: threads get disjoint ranges of rows.
        let out = unsafe { out.slice_mut(range.clone()) };
        vectorize(isa, Rows { x: &x[range], weight, eps, out });
    });
    Ok(())
}

struct Rows<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Vectorized for Rows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let dim = self.weight.len();
        for (x, out) in self.x.chunks_exact(dim).zip(self.out.chunks_exact_mut(dim)) {
            out.copy_from_slice(x);
            normalize(simd, out, self.weight, self.eps);
        }
    }
}

/// `x / sqrt(mean(x^2) + eps) * weight` in place.
#[inline(always)]
pub(crate) fn normalize<S: Lanes>(simd: S, x: &mut [f32], weight: &[f32], eps: f32) {
    let mean = sum_of_squares(simd, x) / x.len() as f32;
    let factor = simd.splat(1.0 / (mean + eps).sqrt());
    for (x, weight) in x.chunks_mut(LANES).zip(weight.chunks(LANES)) {
        let scaled = simd.mul(simd.load_slice(x, 0.0), factor);
        simd.store_slice(x, simd.mul(scaled, simd.load_slice(weight, 0.0)));
    }
}
