use super::{LayerNorm, Lens};
use crate::KernelError;
use crate::cpu::CpuBackend;
use crate::cpu::lanes::{LANES, Lanes, Vectorized, vectorize};
use crate::cpu::math::{sum, sum_of_squares};
use crate::cpu::thread_pool::SharedMut;

/// Numbers that are worth waking another thread for.
const MIN_NUMBERS_PER_THREAD: usize = 16 * 1024;

pub(crate) fn layer_norm(backend: &mut CpuBackend, args: LayerNorm<'_, CpuBackend>) -> Result<(), KernelError> {
    const OP: &str = LayerNorm::<CpuBackend>::OP;
    args.check(Lens { x: args.x.len(), weight: args.weight.len(), bias: args.bias.len(), out: args.out.len() })?;
    let LayerNorm { num_rows, dim, eps, .. } = args;
    let x = &args.x.f32(OP, "x")?[..num_rows * dim];
    let weight = &args.weight.f32(OP, "weight")?[..dim];
    let bias = &args.bias.f32(OP, "bias")?[..dim];
    let out = SharedMut::new(&mut args.out.f32_mut(OP, "out")?[..num_rows * dim]);
    let isa = backend.isa;
    backend.pool.run_ranges(num_rows, MIN_NUMBERS_PER_THREAD.div_ceil(dim), &|_, rows| {
        let range = rows.start * dim..rows.end * dim;
        // SAFETY: threads get disjoint ranges of rows.
        let out = unsafe { out.slice_mut(range.clone()) };
        vectorize(isa, Rows { x: &x[range], weight, bias, eps, out });
    });
    Ok(())
}

struct Rows<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Vectorized for Rows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let dim = self.weight.len();
        for (x, out) in self.x.chunks_exact(dim).zip(self.out.chunks_exact_mut(dim)) {
            let mean = simd.splat(sum(simd, x) / dim as f32);
            for (x, out) in x.chunks(LANES).zip(out.chunks_mut(LANES)) {
                simd.store_slice(out, simd.sub(simd.load_slice(x, 0.0), mean));
            }
            let variance = sum_of_squares(simd, out) / dim as f32;
            let factor = simd.splat(1.0 / (variance + self.eps).sqrt());
            let affine = self.weight.chunks(LANES).zip(self.bias.chunks(LANES));
            for (out, (weight, bias)) in out.chunks_mut(LANES).zip(affine) {
                let scaled = simd.mul(simd.load_slice(out, 0.0), factor);
                let biased = simd.fma(scaled, simd.load_slice(weight, 0.0), simd.load_slice(bias, 0.0));
                simd.store_slice(out, biased);
            }
        }
    }
}
