//! Functions of sixteen numbers at a time, and sums in a fixed order.

use crate::cpu::lanes::{LANES, Lanes};

/// `2^x` for `x` up to 127, relative error below 3e-7; exactly 1 at 0, exactly 0 below -150.
#[inline(always)]
pub(crate) fn exp2<S: Lanes>(simd: S, x: S::F) -> S::F {
    // The limit comes first: where `x` is NaN, the maximum is its second argument.
    let x = simd.max(simd.splat(-151.0), x);
    let n = simd.round(x);
    let r = simd.sub(x, n);
    // Cephes exp2f.
    let mut p = simd.splat(1.535_336_2e-4);
    for c in [1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1, 1.0] {
        p = simd.fma(p, r, simd.splat(c));
    }
    simd.scale(p, n)
}

/// `e^x`, relative error below 3e-7; exactly 1 at 0, exactly 0 below -105, infinite above 89.
#[inline(always)]
pub(crate) fn exp<S: Lanes>(simd: S, x: S::F) -> S::F {
    // As in `exp2`.
    let x = simd.min(simd.splat(90.0), simd.max(simd.splat(-105.0), x));
    let n = simd.round(simd.mul(x, simd.splat(std::f32::consts::LOG2_E)));
    // ln 2 in two parts, the first of few bits, so that its product with n is exact.
    let r = simd.fma(n, simd.splat(-0.693_359_4), x);
    let r = simd.fma(n, simd.splat(2.121_944_4e-4), r);
    // Cephes expf.
    let mut p = simd.splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.0e-1] {
        p = simd.fma(p, r, simd.splat(c));
    }
    let p = simd.fma(simd.mul(p, r), r, r);
    simd.scale(simd.add(p, simd.splat(1.0)), n)
}

/// Sum of squares: lane `i mod 64` of four vectors takes number i, then the vectors are added in pairs, then the lanes.
/// The order depends on the length only.
#[inline(always)]
pub(crate) fn sum_of_squares<S: Lanes>(simd: S, x: &[f32]) -> f32 {
    let mut acc = [simd.splat(0.0); 4];
    for part in x.chunks(4 * LANES) {
        for (acc, part) in acc.iter_mut().zip(part.chunks(LANES)) {
            let v = simd.load_slice(part, 0.0);
            *acc = simd.fma(v, v, *acc);
        }
    }
    simd.sum(simd.add(simd.add(acc[0], acc[1]), simd.add(acc[2], acc[3])))
}

/// Sum of numbers, in the order of [`sum_of_squares`].
#[inline(always)]
pub(crate) fn sum<S: Lanes>(simd: S, x: &[f32]) -> f32 {
    let mut acc = [simd.splat(0.0); 4];
    for part in x.chunks(4 * LANES) {
        for (acc, part) in acc.iter_mut().zip(part.chunks(LANES)) {
            *acc = simd.add(*acc, simd.load_slice(part, 0.0));
        }
    }
    simd.sum(simd.add(simd.add(acc[0], acc[1]), simd.add(acc[2], acc[3])))
}

/// Numbers whose exponentials are summed in f32, by lane and then over the lanes; blocks are added in f64.
pub(crate) const SUM_BLOCK_LEN: usize = 8 * LANES;

/// `2^((x - max) * factor)` of up to [`SUM_BLOCK_LEN`] numbers, none above `max`, written to `out` where it has room (it has
/// the length of `x`, or none), and their sum.
#[inline(always)]
pub(crate) fn exp2_block<S: Lanes>(simd: S, x: &[f32], max: f32, factor: f32, out: &mut [f32]) -> f32 {
    let (max, factor) = (simd.splat(max), simd.splat(factor));
    let mut acc = simd.splat(0.0);
    for (index, x) in x.chunks(LANES).enumerate() {
        let scaled = simd.mul(simd.sub(simd.load_slice(x, f32::NEG_INFINITY), max), factor);
        let weight = exp2(simd, scaled);
        if !out.is_empty() {
            simd.store_slice(&mut out[index * LANES..][..x.len()], weight);
        }
        acc = simd.add(acc, weight);
    }
    simd.sum(acc)
}

/// The largest number, and whether there is a NaN (which the maximum passes over). Negative infinity of none.
#[inline(always)]
pub(crate) fn max_and_nan<S: Lanes>(simd: S, x: &[f32]) -> (f32, bool) {
    let mut max = [simd.splat(f32::NEG_INFINITY); 4];
    let mut nan = simd.mask_from_bits(0);
    for part in x.chunks(4 * LANES) {
        for (max, part) in max.iter_mut().zip(part.chunks(LANES)) {
            let v = simd.load_slice(part, f32::NEG_INFINITY);
            // The second argument stays where the first is NaN.
            *max = simd.max(v, *max);
            nan = simd.or(nan, simd.is_nan(v));
        }
    }
    let max = simd.max(simd.max(max[0], max[1]), simd.max(max[2], max[3]));
    (simd.max_lane(max), simd.mask_bits(nan) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use crate::cpu::lanes::{Vectorized, vectorize};

    struct Apply<'a> {
        x: &'a [f32],
        exp: &'a mut [f32],
        exp2: &'a mut [f32],
    }

    impl Vectorized for Apply<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Lanes>(self, simd: S) {
            for (i, x) in self.x.chunks(LANES).enumerate() {
                let range = i * LANES..i * LANES + x.len();
                let v = simd.load_slice(x, 0.0);
                simd.store_slice(&mut self.exp[range.clone()], exp(simd, v));
                simd.store_slice(&mut self.exp2[range], exp2(simd, v));
            }
        }
    }

    #[test]
    fn exponentials_are_as_close_as_documented() {
        let mut x: Vec<f32> = (-170_000..127_000).map(|i| i as f32 * 1e-3 + 1e-5).collect();
        x.extend([f32::NEG_INFINITY, f32::NAN, -1e30, -105.1, -150.9, 0.0, -0.0]);
        for isa in Isa::available() {
            let (mut of_e, mut of_2) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            vectorize(isa, Apply { x: &x, exp: &mut of_e, exp2: &mut of_2 });
            for (i, &x) in x.iter().enumerate() {
                for (name, actual, expected) in
                    [("exp", of_e[i], f64::from(x).exp()), ("exp2", of_2[i], f64::from(x).exp2())]
                {
                    // Below the smallest full number the spacing is 1.4e-45.
                    let is_close = (f64::from(actual) - expected).abs() <= 3e-7 * expected + 1.5e-45
                        || (expected > f64::from(f32::MAX) && actual == f32::INFINITY)
                        || (x.is_nan() && actual.is_nan());
                    assert!(is_close, "{isa} {name}({x:e}) = {actual:e}, expected {expected:e}");
                    assert!(x != 0.0 || actual == 1.0, "{isa} {name}");
                    assert!(x != f32::NEG_INFINITY || actual == 0.0, "{isa} {name}");
                }
            }
        }
    }

    struct Sums<'a>(&'a [f32]);

    impl Vectorized for Sums<'_> {
        type Output = (f32, f32, f32);
        #[inline(always)]
        fn run<S: Lanes>(self, simd: S) -> (f32, f32, f32) {
            let v = simd.load_slice(self.0, 0.0);
            (simd.sum(v), simd.max_lane(v), sum_of_squares(simd, self.0))
        }
    }

    #[test]
    fn sums_and_maxima_have_one_order_on_every_instruction_set() {
        let mut rng = crate::testing::Rng::new(3);
        let x = rng.outliers(16);
        let expected = vectorize(Isa::Portable, Sums(&x));
        for isa in Isa::available() {
            let (sum, max, _) = vectorize(isa, Sums(&x));
            assert_eq!((sum.to_bits(), max), (expected.0.to_bits(), expected.1), "{isa}");
        }
        for len in [1, 15, 16, 17, 64, 65, 1000] {
            let x = rng.normals(len);
            let exact: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
            for isa in Isa::available() {
                let (_, _, squares) = vectorize(isa, Sums(&x));
                assert!((f64::from(squares) - exact).abs() <= 1e-6 * exact, "{isa} {len}");
            }
        }
    }

    struct Masks<'a>(&'a [f32; LANES], f32, &'a mut [u16; 4]);

    impl Vectorized for Masks<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Lanes>(self, simd: S) {
            let v = simd.load_slice(self.0, 0.0);
            let limit = simd.splat(self.1);
            let nan = simd.or(simd.is_nan(v), simd.mask_from_bits(0));
            *self.2 = [
                simd.mask_bits(simd.gt(v, limit)),
                simd.mask_bits(simd.ge(v, limit)),
                simd.mask_bits(simd.eq(v, limit)),
                simd.mask_bits(nan),
            ];
        }
    }

    #[test]
    fn comparisons_agree() {
        let mut x: [f32; LANES] = std::array::from_fn(|i| (i * 7 % 5) as f32);
        x[4] = f32::NAN;
        x[9] = f32::NEG_INFINITY;
        let expected = [2.0_f32].map(|limit| {
            let bits = |f: &dyn Fn(f32) -> bool| (0..LANES).map(|i| u16::from(f(x[i])) << i).sum::<u16>();
            [bits(&|x| x > limit), bits(&|x| x >= limit), bits(&|x| x == limit), bits(&|x| x.is_nan())]
        });
        for isa in Isa::available() {
            let mut actual = [0; 4];
            vectorize(isa, Masks(&x, 2.0, &mut actual));
            assert_eq!(actual, expected[0], "{isa}");
        }
    }
}
