//! The meaning of [`super::Activation`].

use super::ActivationKind;

/// Of one number, in f64.
pub fn activation(kind: ActivationKind, x: f32) -> f64 {
    let x = f64::from(x);
    match kind {
        ActivationKind::Gelu => 0.5 * x * erfc(-x / std::f64::consts::SQRT_2),
        ActivationKind::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
        ActivationKind::Relu if x.is_nan() => x,
        ActivationKind::Relu => x.max(0.0),
        ActivationKind::Tanh => x.tanh(),
    }
}

/// `1 - erf(x)`: its Taylor series near 0, and its continued fraction beyond (Abramowitz and Stegun 7.1.5 and 7.1.14).
fn erfc(x: f64) -> f64 {
    let z = x.abs();
    let positive = if z < 2.0 {
        let (mut term, mut sum) = (z, z);
        for n in 1..80 {
            let n = f64::from(n);
            term *= -z * z / n;
            sum += term / (2.0 * n + 1.0);
        }
        1.0 - 2.0 / std::f64::consts::PI.sqrt() * sum
    } else {
        let fraction = (1..200).rev().fold(z, |below, k| z + f64::from(k) / 2.0 / below);
        (-z * z).exp() / (fraction * std::f64::consts::PI.sqrt())
    };
    if x < 0.0 { 2.0 - positive } else { positive }
}
