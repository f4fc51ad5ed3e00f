use super::{Lens, RopeTable};
use crate::KernelError;
use crate::cpu::CpuBackend;
use crate::cpu::thread_pool::SharedMut;
use crate::kv_layout::MAX_HEAD_DIM;

/// Angles that are worth waking another thread for.
const MIN_ANGLES_PER_THREAD: usize = 512;

pub(crate) fn rope_table(backend: &mut CpuBackend, args: RopeTable<'_, CpuBackend>) -> Result<(), KernelError> {
    const OP: &str = RopeTable::<CpuBackend>::OP;
    args.check(Lens { positions: args.positions.len(), out: args.out.len() })?;
    let RopeTable { frequencies, magnitude, num_tokens, .. } = args;
    let len = frequencies.len();
    let positions = &args.positions.u32(OP, "positions")?[..num_tokens];
    let out = SharedMut::new(&mut args.out.f32_mut(OP, "out")?[..num_tokens * 2 * len]);
    backend.pool.run_ranges(num_tokens, MIN_ANGLES_PER_THREAD.div_ceil(len), &|_, tokens| {
        // SAFETY: threads get disjoint ranges of tokens.
        let out = unsafe { out.slice_mut(tokens.start * 2 * len..tokens.end * 2 * len) };
        let mut inverse = [0.0; MAX_HEAD_DIM / 2];
        let inverse = &mut inverse[..len];
        // Neighbours often share their frequencies.
        let mut of_seq_len = None;
        for (out, &position) in out.chunks_exact_mut(2 * len).zip(&positions[tokens]) {
            let seq_len = frequencies.seq_len(position);
            if of_seq_len != Some(seq_len) {
                frequencies.inverse(seq_len, inverse);
                of_seq_len = Some(seq_len);
            }
            for (out, &inverse) in out.as_chunks_mut::<2>().0.iter_mut().zip(&*inverse) {
                let (sin, cos) = sin_cos(position as f32 * inverse);
                *out = [cos * magnitude, sin * magnitude];
            }
        }
    });
    Ok(())
}

/// Sine and cosine of an angle, computed in f64 and rounded once.
///
/// Written out rather than taken from the system's library, whose last bits differ between its versions: a
/// request must give the same bits on every replica. The angle is reduced to a quarter turn by Cody and Waite's method
/// with a pi/2 of three parts; the polynomials are those of fdlibm (Sun Microsystems 1993).
fn sin_cos(angle: f32) -> (f32, f32) {
    /// pi/2 in parts of 33 bits: their products with a quotient below 2^20 are exact.
    const HALF_PI: [f64; 3] = [1.570_796_326_734_125_6, 6.077_100_506_303_966e-11, 2.022_266_248_795_950_6e-21];
    /// Larger angles are no longer positions of a context.
    const MAX_ANGLE: f32 = 1e6;
    if angle.abs() > MAX_ANGLE {
        let (sin, cos) = f64::from(angle).sin_cos();
        return (sin as f32, cos as f32);
    }
    let x = f64::from(angle);
    let quotient = (x * std::f64::consts::FRAC_2_PI).round_ties_even();
    let r = x - quotient * HALF_PI[0] - quotient * HALF_PI[1] - quotient * HALF_PI[2];
    let z = r * r;
    const SIN: [f64; 6] = [
        1.589_690_995_211_55e-10,
        -2.505_076_025_340_686_3e-8,
        2.755_731_370_707_006_8e-6,
        -1.984_126_982_985_795e-4,
        8.333_333_333_322_49e-3,
        -1.666_666_666_666_663_2e-1,
    ];
    const COS: [f64; 6] = [
        -1.135_964_755_778_819_5e-11,
        2.087_572_321_298_175e-9,
        -2.755_731_435_139_066_3e-7,
        2.480_158_728_947_673e-5,
        -1.388_888_888_887_411e-3,
        4.166_666_666_666_66e-2,
    ];
    let polynomial = |c: [f64; 6]| c.into_iter().reduce(|p, c| p * z + c).expect("six coefficients");
    let sin = r + r * z * polynomial(SIN);
    let cos = 1.0 - 0.5 * z + z * z * polynomial(COS);
    let (sin, cos) = match quotient as i64 & 3 {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    };
    (sin as f32, cos as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sine_and_cosine_are_rounded_once() {
        let mut num_differing = 0;
        let mut rng = crate::testing::Rng::new(1);
        let small = (0..200_000).map(|i| i as f32 * 1e-4);
        let large: Vec<f32> = (0..200_000).map(|_| rng.uniform() * 1e6).collect();
        let positions = (0..131_072).map(|i| i as f32);
        for angle in small.chain(large).chain(positions).chain([-0.0, 1e-30]) {
            let (sin, cos) = sin_cos(angle);
            let exact = f64::from(angle).sin_cos();
            for (actual, exact) in [(sin, exact.0), (cos, exact.1)] {
                // Half a unit of the last place, and what an f64 result may be off.
                let half_unit = f64::from(actual.abs().next_up() - actual.abs()) / 2.0;
                assert!((f64::from(actual) - exact).abs() <= half_unit * 1.000_001, "{angle}");
                num_differing += usize::from(actual != exact as f32);
            }
        }
        assert_eq!(num_differing, 0);
    }

    #[test]
    fn angles_beyond_any_context_still_have_a_sine() {
        let (sin, cos) = sin_cos(3e9);
        assert!((sin * sin + cos * cos - 1.0).abs() < 1e-6);
        assert!(sin_cos(f32::INFINITY).0.is_nan());
    }
}
