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
/// with a pi/2 of three parts, a large one by that of Payne and Hanek (1983); the polynomials are those of fdlibm (Sun
/// Microsystems 1993).
fn sin_cos(angle: f32) -> (f32, f32) {
    /// pi/2 in parts of 33 bits: their products with a quotient below 2^20 are exact.
    const HALF_PI: [f64; 3] = [1.570_796_326_734_125_6, 6.077_100_506_303_966e-11, 2.022_266_248_795_950_6e-21];
    /// Quotients of larger angles are longer.
    const MAX_ANGLE: f32 = 1e6;
    let (quotient, r) = if angle.abs() <= MAX_ANGLE {
        let x = f64::from(angle);
        let quotient = (x * std::f64::consts::FRAC_2_PI).round_ties_even();
        let r = x - quotient * HALF_PI[0] - quotient * HALF_PI[1] - quotient * HALF_PI[2];
        (quotient as i64, r)
    } else {
        reduce_large(angle)
    };
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
    let (sin, cos) = match quotient & 3 {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    };
    (sin as f32, cos as f32)
}

/// The nearest multiple of a quarter turn, modulo four, and the angle from there; not a number for what is not finite.
///
/// An angle is `m * 2^e` with a mantissa `m` of 24 bits. In quarter turns it is `m * 2^e * 2/pi`, and multiples of four
/// of them do not matter, so of the digits of 2/pi only a window of 128 is looked at: those before it give multiples of
/// four, those behind it less than 2^-100.
fn reduce_large(angle: f32) -> (i64, f64) {
    /// The first 256 binary digits of 2/pi behind the point.
    const TWO_OVER_PI: [u64; 4] =
        [0xa2f9_836e_4e44_1529, 0xfc27_57d1_f534_ddc0, 0xdb62_9599_3c43_9041, 0xfe51_63ab_debb_c561];
    if !angle.is_finite() {
        return (0, f64::NAN);
    }
    let bits = angle.to_bits();
    let mantissa = u128::from(bits & 0x007f_ffff | 0x0080_0000);
    let exponent = (bits >> 23 & 0xff) as i32 - 150;
    // The digit whose product with 2^e is worth two quarter turns is the window's first; before the point all are zero.
    let skipped = exponent - 2;
    let word = |index: usize| u128::from(TWO_OVER_PI.get(index).copied().unwrap_or(0));
    let digits = |from: usize| {
        let (index, shift) = (from / 64, from % 64);
        let start = word(index) << 64 | word(index + 1);
        if shift == 0 { start } else { start << shift | word(index + 2) >> (64 - shift) }
    };
    let window = if skipped >= 0 { digits(skipped as usize) } else { digits(0) >> -skipped };
    // In units of 2^-126 quarter turns; what overflows is a multiple of four.
    let turns = mantissa.wrapping_mul(window);
    let quotient = turns.wrapping_add(1 << 125) >> 126;
    let rest = turns.wrapping_sub(quotient << 126) as i128;
    let r = rest as f64 * 2f64.powi(-126) * std::f64::consts::FRAC_PI_2;
    if angle < 0.0 { (-(quotient as i64), -r) } else { (quotient as i64, r) }
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
        let mut rng = crate::testing::Rng::new(2);
        // From the border on: every power of two, numbers around it, and numbers between.
        let powers = (20..128).map(|power| 2f32.powi(power));
        let near = powers.clone().flat_map(|power| [power.next_down(), power, power.next_up()]);
        let between: Vec<f32> = powers.flat_map(|power| [0; 200].map(|_| power * (1.0 + rng.uniform()))).collect();
        let border = [1e6f32, 1e6f32.next_up(), f32::MAX, 16_367_173.0 * 2f32.powi(72)];
        for angle in near.chain(between).chain(border).filter(|angle| angle.is_finite()) {
            for angle in [angle, -angle] {
                let (sin, cos) = sin_cos(angle);
                // The library's own last bits may differ between its versions, but not by that much.
                let exact = f64::from(angle).sin_cos();
                for (actual, exact) in [(sin, exact.0), (cos, exact.1)] {
                    let half_unit = f64::from(actual.abs().next_up() - actual.abs()) / 2.0;
                    assert!((f64::from(actual) - exact).abs() <= half_unit * 1.000_001, "{angle}: {actual} {exact}");
                }
            }
        }
        assert!(sin_cos(f32::INFINITY).0.is_nan() && sin_cos(f32::NAN).1.is_nan());
    }

    /// Both ways to reduce an angle agree around the border between them.
    #[test]
    fn the_two_reductions_agree() {
        for i in 0..100_000 {
            let angle = 900_000.0 + i as f32;
            let (quotient, r) = reduce_large(angle);
            let x = f64::from(angle);
            let expected = (x * std::f64::consts::FRAC_2_PI).round_ties_even();
            assert_eq!(quotient, expected as i64 & 3);
            assert!((r - (x - expected * std::f64::consts::FRAC_PI_2)).abs() < 1e-9, "{angle}");
        }
    }
}
