//! Numbers of 8 bits: a sign, four bits of exponent, three of fraction (e4m3 of OCP's FP8). There are no infinities; the
//! largest magnitude is 448, the smallest 2^-9, and the code of all ones is no number.

/// The largest magnitude.
pub const MAX: f32 = 448.0;

const SIGN: u8 = 0x80;
const NAN: u8 = 0x7f;
/// What corrects the bias of the exponent once its bits are moved to those of an f32: 2^120.
const REBIAS: f32 = f32::from_bits((127 + 120) << 23);

/// What the codes are, as bf16, which holds them all. Those that are no number are one here, as bits moved to their places
/// would be: kernels learn of such from a scale.
pub(crate) const BF16: [u16; 256] = {
    let mut table = [0; 256];
    let mut code = 0;
    while code < table.len() {
        let sign = (code as u8 & SIGN) as u16;
        table[code] = if is_nan(code as u8) { 0x43f0 | sign << 8 } else { (to_f32(code as u8).to_bits() >> 16) as u16 };
        code += 1;
    }
    table
};

/// Whether the code is no number.
pub const fn is_nan(code: u8) -> bool {
    code & !SIGN == NAN
}

/// What a code stands for.
pub const fn to_f32(code: u8) -> f32 {
    let sign = (code & SIGN) as u32;
    if is_nan(code) {
        return f32::from_bits(sign << 24 | 0x7fc0_0000);
    }
    // Exact for the small ones, too.
    let magnitude = f32::from_bits(((code & !SIGN) as u32) << 20) * REBIAS;
    f32::from_bits(magnitude.to_bits() | sign << 24)
}

/// The nearest code, half to even; of what is larger than the largest that, of what is no number none.
#[inline(always)]
pub fn from_f32(x: f32) -> u8 {
    let bits = x.to_bits();
    let sign = (bits >> 24) as u8 & SIGN;
    let magnitude = x.abs();
    // In steps of 2^-9; a sum with 1.5 * 2^23 leaves the nearest whole number in the low bits.
    let small = (magnitude * 512.0 + 12_582_912.0).to_bits() as u8;
    let rounded = (bits & 0x7fff_ffff).wrapping_add(0x7_ffff + (bits >> 20 & 1));
    let full = (rounded >> 20).wrapping_sub(120 << 3) as u8;
    // Without branches, so that loops of it become vectors.
    let code = if magnitude < 0.015_625 { small } else { full };
    let code = if magnitude >= MAX { NAN - 1 } else { code };
    sign | if x.is_nan() { NAN } else { code }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By its definition, in f64.
    fn value(code: u8) -> f64 {
        let (exponent, fraction) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let magnitude = if exponent == 0 {
            fraction / 8.0 * 2.0_f64.powi(-6)
        } else {
            (1.0 + fraction / 8.0) * 2.0_f64.powi(exponent - 7)
        };
        if code & SIGN == 0 { magnitude } else { -magnitude }
    }

    #[test]
    fn every_code_is_what_the_definition_says() {
        for code in 0..=u8::MAX {
            let number = to_f32(code);
            if is_nan(code) {
                assert!(number.is_nan());
                assert_eq!(f32::from_bits(u32::from(BF16[usize::from(code)]) << 16).abs(), 480.0);
            } else {
                assert_eq!(f64::from(number), value(code), "{code:#x}");
                assert_eq!(number.is_sign_negative(), code & SIGN != 0, "{code:#x}");
                assert_eq!(f32::from_bits(u32::from(BF16[usize::from(code)]) << 16), number, "{code:#x}");
            }
            assert_eq!(from_f32(number), code, "{code:#x}");
        }
        assert_eq!(to_f32(0x7e), MAX);
    }

    #[test]
    fn the_nearest_code_is_found_half_to_even() {
        for code in 0..0x7e {
            let (low, high) = (to_f32(code), to_f32(code + 1));
            let middle = (low + high) / 2.0;
            assert_eq!(from_f32(middle), code + code % 2, "{code:#x}");
            assert_eq!(from_f32(f32::from_bits(middle.to_bits() - 1)), code, "{code:#x}");
            assert_eq!(from_f32(f32::from_bits(middle.to_bits() + 1)), code + 1, "{code:#x}");
            assert_eq!(from_f32(-middle), SIGN | (code + code % 2), "{code:#x}");
        }
        for (x, code) in [
            (449.0, 0x7e),
            (f32::MAX, 0x7e),
            (f32::INFINITY, 0x7e),
            (f32::NEG_INFINITY, 0xfe),
            (1e-40, 0),
            (-0.0, 0x80),
        ] {
            assert_eq!(from_f32(x), code, "{x:e}");
        }
        assert!(is_nan(from_f32(f32::NAN)) && is_nan(from_f32(-f32::NAN)));
    }
}
