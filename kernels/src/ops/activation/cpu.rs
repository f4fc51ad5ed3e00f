use super::{Activation, ActivationKind};
use crate::KernelError;
use crate::cpu::CpuBackend;
use crate::cpu::lanes::{LANES, Lanes, Vectorized, vectorize};
use crate::cpu::math::exp;
use crate::cpu::thread_pool::SharedMut;

/// Numbers that are worth waking another thread for.
const MIN_NUMBERS_PER_THREAD: usize = 8 * 1024;

pub(crate) fn activation(backend: &mut CpuBackend, args: Activation<'_, CpuBackend>) -> Result<(), KernelError> {
    const OP: &str = Activation::<CpuBackend>::OP;
    args.check(args.x.len())?;
    let Activation { kind, len, x } = args;
    let x = SharedMut::new(&mut x.f32_mut(OP, "x")?[..len]);
    let isa = backend.isa;
    // Whole vectors to each thread: which lane a number is in changes nothing, since none sees another.
    backend.pool.run_ranges(len.div_ceil(LANES), MIN_NUMBERS_PER_THREAD / LANES, &|_, vectors| {
        let range = vectors.start * LANES..(vectors.end * LANES).min(len);
        // SAFETY: threads get disjoint ranges.
        let x = unsafe { x.slice_mut(range) };
        vectorize(isa, Numbers { kind, x });
    });
    Ok(())
}

struct Numbers<'a> {
    kind: ActivationKind,
    x: &'a mut [f32],
}

impl Vectorized for Numbers<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        for x in self.x.chunks_mut(LANES) {
            let v = simd.load_slice(x, 0.0);
            let result = match self.kind {
                ActivationKind::Gelu => gelu(simd, v),
                ActivationKind::GeluTanh => gelu_tanh(simd, v),
                // The second argument stays where one is NaN.
                ActivationKind::Relu => simd.max(simd.splat(0.0), v),
                ActivationKind::Tanh => tanh(simd, v),
            };
            simd.store_slice(x, result);
        }
    }
}

/// `max(x, 0) - |x| / 2 * erfc(|x| / sqrt 2)`: no difference of near numbers on either side of 0. The complement is Abramowitz
/// and Stegun 7.1.26, whose error is below 1.5e-7.
#[inline(always)]
fn gelu<S: Lanes>(simd: S, x: S::F) -> S::F {
    let zero = simd.splat(0.0);
    let magnitude = simd.max(simd.sub(zero, x), x);
    let z = simd.mul(magnitude, simd.splat(std::f32::consts::FRAC_1_SQRT_2));
    let one = simd.splat(1.0);
    let t = simd.div(one, simd.fma(z, simd.splat(0.327_591_1), one));
    let mut p = simd.splat(1.061_405_4);
    for c in [-1.453_152_1, 1.421_413_8, -0.284_496_72, 0.254_829_6] {
        p = simd.fma(p, t, simd.splat(c));
    }
    let complement = simd.mul(simd.mul(p, t), exp(simd, simd.sub(zero, simd.mul(z, z))));
    let half = simd.mul(magnitude, simd.splat(0.5));
    simd.sub(simd.max(zero, x), simd.mul(half, complement))
}

/// `x - x / (e^(2 u) + 1)`, which is `x (1 + tanh u) / 2`.
#[inline(always)]
fn gelu_tanh<S: Lanes>(simd: S, x: S::F) -> S::F {
    let one = simd.splat(1.0);
    let cubic = simd.fma(simd.mul(simd.mul(x, x), simd.splat(0.044_715)), x, x);
    let twice_u = simd.mul(cubic, simd.splat(2.0 * 0.797_884_6));
    simd.sub(x, simd.div(x, simd.add(exp(simd, twice_u), one)))
}

#[inline(always)]
fn tanh<S: Lanes>(simd: S, x: S::F) -> S::F {
    let (one, two) = (simd.splat(1.0), simd.splat(2.0));
    simd.sub(one, simd.div(two, simd.add(exp(simd, simd.mul(x, two)), one)))
}
