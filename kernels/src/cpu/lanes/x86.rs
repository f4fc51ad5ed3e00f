//! [`Lanes`] on the vector instructions of x86-64.

use std::arch::x86_64::*;

use super::{LANES, Lanes, Vectorized, range_bits};
use crate::e4m3;

/// Made by [`super::vectorize`] only where AVX2 and FMA were found.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(pub(super) ());

#[target_feature(enable = "avx2,fma")]
fn enter_avx2<W: Vectorized>(simd: Avx2, work: W) -> W::Output {
    work.run(simd)
}

/// Lanes of a half that are set below `len`, as the sign bits that masked loads and stores look at.
#[inline(always)]
fn first_of_half(len: usize) -> __m256i {
    const ONES: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    let len = len.min(8);
    // SAFETY: 8 of 16 numbers from 8 - len on are inside the table; `Avx2` exists, so AVX is there.
    unsafe { _mm256_loadu_si256(ONES.as_ptr().add(8 - len).cast()) }
}

/// `f(a.0, b.0, ...), f(a.1, b.1, ...)`
macro_rules! halves {
    ($f:ident($($a:expr),+)) => {
        // SAFETY: `Avx2` exists, so AVX2 and FMA are there.
        unsafe { ($f($($a.0),+), $f($($a.1),+)) }
    };
}

impl Lanes for Avx2 {
    type F = (__m256, __m256);
    type M = (__m256, __m256);
    type P = (__m256i, __m256i);

    const NUM_SUMS: usize = 4;
    const HAS_DOT_PAIRS: bool = false;

    #[inline(always)]
    fn enter<W: Vectorized>(self, work: W) -> W::Output {
        // SAFETY: `Avx2` exists, so AVX2 and FMA are there.
        unsafe { enter_avx2(self, work) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: `Avx2` exists, so AVX is there.
        let half = unsafe { _mm256_set1_ps(x) };
        (half, half)
    }
    #[inline(always)]
    unsafe fn load(self, x: *const f32) -> Self::F {
        // SAFETY: by contract.
        unsafe { (_mm256_loadu_ps(x), _mm256_loadu_ps(x.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_first(self, x: *const f32, len: usize, fill: f32) -> Self::F {
        let (m0, m1) = (first_of_half(len), first_of_half(len.saturating_sub(8)));
        // SAFETY: masked lanes are not read; the others can be by contract.
        unsafe {
            let fill = _mm256_set1_ps(fill);
            (
                _mm256_blendv_ps(fill, _mm256_maskload_ps(x, m0), _mm256_castsi256_ps(m0)),
                _mm256_blendv_ps(fill, _mm256_maskload_ps(x.wrapping_add(8), m1), _mm256_castsi256_ps(m1)),
            )
        }
    }
    #[inline(always)]
    unsafe fn store(self, x: *mut f32, v: Self::F) {
        // SAFETY: by contract.
        unsafe {
            _mm256_storeu_ps(x, v.0);
            _mm256_storeu_ps(x.add(8), v.1);
        }
    }
    #[inline(always)]
    unsafe fn store_first(self, x: *mut f32, len: usize, v: Self::F) {
        let (m0, m1) = (first_of_half(len), first_of_half(len.saturating_sub(8)));
        // SAFETY: masked lanes are not written; the others can be by contract.
        unsafe {
            _mm256_maskstore_ps(x, m0, v.0);
            _mm256_maskstore_ps(x.wrapping_add(8), m1, v.1);
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        halves!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        // SAFETY: `Avx2` exists, so AVX is there.
        unsafe { (_mm256_round_ps::<8>(a.0), _mm256_round_ps::<8>(a.1)) }
    }
    #[inline(always)]
    fn scale(self, a: Self::F, n: Self::F) -> Self::F {
        #[inline(always)]
        fn scale_half(a: __m256, n: __m256) -> __m256 {
            // Two factors, so that results without a full mantissa come out right.
            // SAFETY: called where `Avx2` exists only.
            unsafe {
                let n = _mm256_cvtps_epi32(n);
                let bias = _mm256_set1_epi32(127);
                let half = _mm256_srai_epi32::<1>(n);
                let rest = _mm256_sub_epi32(n, half);
                let half = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
                let rest = _mm256_slli_epi32::<23>(_mm256_add_epi32(rest, bias));
                _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(half)), _mm256_castsi256_ps(rest))
            }
        }
        (scale_half(a.0, n.0), scale_half(a.1, n.1))
    }
    #[inline(always)]
    fn round_bf16(self, a: Self::F) -> Self::F {
        #[inline(always)]
        fn round_half(a: __m256) -> __m256 {
            // SAFETY: called where `Avx2` exists only.
            unsafe {
                let bits = _mm256_castps_si256(a);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
                // A NaN must not be rounded into an infinity or a number: it is kept, made quiet.
                let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
                let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(a, a));
                let rounded = _mm256_blendv_epi8(up, quiet, is_nan);
                _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32(0xffff_0000_u32 as i32)))
            }
        }
        (round_half(a.0), round_half(a.1))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, x: *mut u16, v: Self::F) {
        let (a, b) = self.round_bf16(v);
        // SAFETY: room by contract.
        unsafe {
            let a = _mm256_srli_epi32::<16>(_mm256_castps_si256(a));
            let b = _mm256_srli_epi32::<16>(_mm256_castps_si256(b));
            // The pack works within 128 bits; the permutation puts the quarters back in order.
            let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(a, b));
            _mm256_storeu_si256(x.cast(), packed);
        }
    }

    #[inline(always)]
    fn mask_range(self, start: usize, end: usize) -> Self::M {
        self.mask_from_bits(range_bits(start, end))
    }
    #[inline(always)]
    fn mask_from_bits(self, bits: u16) -> Self::M {
        // SAFETY: `Avx2` exists, so AVX2 is there.
        unsafe {
            let low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let high = _mm256_slli_epi32::<8>(low);
            let bits = _mm256_set1_epi32(i32::from(bits));
            (
                _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(bits, low), low)),
                _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(bits, high), high)),
            )
        }
    }
    #[inline(always)]
    fn mask_bits(self, mask: Self::M) -> u16 {
        // SAFETY: `Avx2` exists, so AVX is there.
        unsafe { (_mm256_movemask_ps(mask.0) | _mm256_movemask_ps(mask.1) << 8) as u16 }
    }
    #[inline(always)]
    fn gt(self, a: Self::F, b: Self::F) -> Self::M {
        // SAFETY: `Avx2` exists, so AVX is there.
        unsafe { (_mm256_cmp_ps::<_CMP_GT_OQ>(a.0, b.0), _mm256_cmp_ps::<_CMP_GT_OQ>(a.1, b.1)) }
    }
    #[inline(always)]
    fn ge(self, a: Self::F, b: Self::F) -> Self::M {
        // SAFETY: `Avx2` exists, so AVX is there.
        unsafe { (_mm256_cmp_ps::<_CMP_GE_OQ>(a.0, b.0), _mm256_cmp_ps::<_CMP_GE_OQ>(a.1, b.1)) }
    }
    #[inline(always)]
    fn eq(self, a: Self::F, b: Self::F) -> Self::M {
        // SAFETY: `Avx2` exists, so AVX is there.
        unsafe { (_mm256_cmp_ps::<_CMP_EQ_OQ>(a.0, b.0), _mm256_cmp_ps::<_CMP_EQ_OQ>(a.1, b.1)) }
    }
    #[inline(always)]
    fn is_nan(self, a: Self::F) -> Self::M {
        // SAFETY: `Avx2` exists, so AVX is there.
        unsafe { (_mm256_cmp_ps::<_CMP_UNORD_Q>(a.0, a.0), _mm256_cmp_ps::<_CMP_UNORD_Q>(a.1, a.1)) }
    }
    #[inline(always)]
    fn or(self, a: Self::M, b: Self::M) -> Self::M {
        halves!(_mm256_or_ps(a, b))
    }
    #[inline(always)]
    fn select(self, mask: Self::M, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_blendv_ps(b, a, mask))
    }

    #[inline(always)]
    unsafe fn load_pairs(self, x: *const u32) -> Self::P {
        // SAFETY: by contract.
        unsafe { (_mm256_loadu_si256(x.cast()), _mm256_loadu_si256(x.add(8).cast())) }
    }
    #[inline(always)]
    unsafe fn store_pairs(self, x: *mut u32, a: Self::P) {
        // SAFETY: by contract.
        unsafe {
            _mm256_storeu_si256(x.cast(), a.0);
            _mm256_storeu_si256(x.add(8).cast(), a.1);
        }
    }
    #[inline(always)]
    unsafe fn load_pairs_first(self, x: *const u32, len: usize) -> Self::P {
        let (m0, m1) = (first_of_half(len), first_of_half(len.saturating_sub(8)));
        // SAFETY: masked lanes are not read; the others can be by contract.
        unsafe { (_mm256_maskload_epi32(x.cast(), m0), _mm256_maskload_epi32(x.wrapping_add(8).cast(), m1)) }
    }
    #[inline(always)]
    fn and_pairs(self, a: Self::P, bits: u32) -> Self::P {
        let bits = self.splat_pair(bits);
        halves!(_mm256_and_si256(a, bits))
    }
    #[inline(always)]
    fn splat_pair(self, pair: u32) -> Self::P {
        // SAFETY: `Avx2` exists, so AVX is there.
        let half = unsafe { _mm256_set1_epi32(pair as i32) };
        (half, half)
    }
    #[inline(always)]
    fn dot_pairs(self, acc: Self::F, a: Self::P, b: Self::P) -> Self::F {
        #[inline(always)]
        fn dot_half(acc: __m256, a: __m256i, b: __m256i) -> __m256 {
            // SAFETY: called where `Avx2` exists only.
            unsafe {
                let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
                let low = |x| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x));
                let high = |x| _mm256_castsi256_ps(_mm256_and_si256(x, upper));
                _mm256_fmadd_ps(high(a), high(b), _mm256_fmadd_ps(low(a), low(b), acc))
            }
        }
        (dot_half(acc.0, a.0, b.0), dot_half(acc.1, a.1, b.1))
    }
    #[inline(always)]
    fn low_pairs(self, a: Self::P) -> Self::F {
        // SAFETY: `Avx2` exists, so AVX2 is there.
        let low = unsafe { (_mm256_slli_epi32::<16>(a.0), _mm256_slli_epi32::<16>(a.1)) };
        halves!(_mm256_castsi256_ps(low))
    }
    #[inline(always)]
    fn high_pairs(self, a: Self::P) -> Self::F {
        let a = self.and_pairs(a, 0xffff_0000);
        halves!(_mm256_castsi256_ps(a))
    }

    #[inline(always)]
    unsafe fn load_i8_pairs(self, x: *const u16) -> Self::P {
        // SAFETY: by contract; AVX2 is there.
        unsafe {
            (_mm256_cvtepi8_epi16(_mm_loadu_si128(x.cast())), _mm256_cvtepi8_epi16(_mm_loadu_si128(x.add(8).cast())))
        }
    }
    #[inline(always)]
    unsafe fn load_e4m3_pairs(self, x: *const u16) -> Self::P {
        // SAFETY: by contract; AVX2 is there.
        let codes = unsafe {
            (_mm256_cvtepu8_epi16(_mm_loadu_si128(x.cast())), _mm256_cvtepu8_epi16(_mm_loadu_si128(x.add(8).cast())))
        };
        (e4m3_half(codes.0), e4m3_half(codes.1))
    }
    #[inline(always)]
    fn unpack_e4m3(self, words: Self::P) -> [Self::P; 2] {
        // SAFETY: `Avx2` exists, so AVX2 is there.
        let odd = unsafe { (_mm256_srli_epi16::<8>(words.0), _mm256_srli_epi16::<8>(words.1)) };
        [(e4m3_half(words.0), e4m3_half(words.1)), (e4m3_half(odd.0), e4m3_half(odd.1))]
    }
    #[inline(always)]
    fn dot_i16(self, acc: Self::P, a: Self::P, b: Self::P) -> Self::P {
        let products = halves!(_mm256_madd_epi16(a, b));
        halves!(_mm256_add_epi32(acc, products))
    }
    #[inline(always)]
    fn floats(self, a: Self::P) -> Self::F {
        halves!(_mm256_cvtepi32_ps(a))
    }
    #[inline(always)]
    unsafe fn store_i16(self, x: *mut i16, v: Self::F) {
        // SAFETY: room by contract.
        unsafe {
            let packed = _mm256_packs_epi32(_mm256_cvtps_epi32(v.0), _mm256_cvtps_epi32(v.1));
            // The pack works within 128 bits; the permutation puts the quarters back in order.
            _mm256_storeu_si256(x.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
        }
    }
}

/// What moves the exponent of e4m3 to that of bf16, once its bits are in place.
const E4M3_REBIAS: i16 = 120 << 7;

/// Magnitudes below this are multiples of the smallest one: bf16 has them with a full fraction.
const E4M3_FIRST_FULL: i16 = 8;

/// Numbers of e4m3 in the low bytes of 16 bits, whatever is in the high ones, as bf16.
#[inline(always)]
fn e4m3_half(codes: __m256i) -> __m256i {
    // Low bytes of the eight small magnitudes, then their high ones.
    const SMALL: [u8; 16] = {
        let mut bytes = [0; 16];
        let mut code = 0;
        while code < 8 {
            bytes[code] = e4m3::BF16[code] as u8;
            bytes[code + 8] = (e4m3::BF16[code] >> 8) as u8;
            code += 1;
        }
        bytes
    };
    // SAFETY: called where `Avx2` exists only; the table has 16 bytes.
    unsafe {
        let magnitude = _mm256_and_si256(codes, _mm256_set1_epi16(0x7f));
        let full = _mm256_add_epi16(_mm256_slli_epi16::<4>(magnitude), _mm256_set1_epi16(E4M3_REBIAS));
        let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(SMALL.as_ptr().cast()));
        let places = _mm256_or_si256(_mm256_slli_epi16::<8>(magnitude), magnitude);
        let small = _mm256_shuffle_epi8(table, _mm256_or_si256(places, _mm256_set1_epi16(0x0800)));
        let is_small = _mm256_cmpgt_epi16(_mm256_set1_epi16(E4M3_FIRST_FULL), magnitude);
        let sign = _mm256_and_si256(_mm256_slli_epi16::<8>(codes), _mm256_set1_epi16(i16::MIN));
        _mm256_or_si256(_mm256_blendv_epi8(full, small, is_small), sign)
    }
}

/// As [`e4m3_half`].
#[inline(always)]
fn e4m3_of(codes: __m512i) -> __m512i {
    // The small magnitudes, and what no code asks for.
    const SMALL: [u16; 32] = {
        let mut numbers = [0; 32];
        let mut code = 0;
        while code < 8 {
            numbers[code] = e4m3::BF16[code];
            code += 1;
        }
        numbers
    };
    // Of three bits a, b, mask: a where the mask is 1, else b.
    const SELECT: i32 = 0b1110_0100;
    // SAFETY: called where `Avx512` exists only; the table has 32 numbers.
    unsafe {
        let magnitude = _mm512_and_si512(codes, _mm512_set1_epi16(0x7f));
        let full = _mm512_add_epi16(_mm512_slli_epi16::<4>(magnitude), _mm512_set1_epi16(E4M3_REBIAS));
        let is_small = _mm512_cmplt_epi16_mask(magnitude, _mm512_set1_epi16(E4M3_FIRST_FULL));
        let small = _mm512_loadu_si512(SMALL.as_ptr().cast());
        let number = _mm512_mask_permutexvar_epi16(full, is_small, magnitude, small);
        let sign = _mm512_slli_epi16::<8>(codes);
        _mm512_ternarylogic_epi32::<SELECT>(sign, number, _mm512_set1_epi16(i16::MIN))
    }
}

/// Made by [`super::vectorize`] only where AVX-512 F, BW, VL, DQ, BF16 and VNNI were found.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(pub(super) ());

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma")]
fn enter_avx512<W: Vectorized>(simd: Avx512, work: W) -> W::Output {
    work.run(simd)
}

/// One instruction, on the ground that the instruction set was found.
macro_rules! op {
    ($($call:tt)+) => {
        // SAFETY: `Avx512` exists, so AVX-512 with BW, DQ, BF16 and VNNI is there.
        unsafe { $($call)+ }
    };
}

impl Lanes for Avx512 {
    type F = __m512;
    type M = __mmask16;
    type P = __m512i;

    const NUM_SUMS: usize = 24;
    const HAS_DOT_PAIRS: bool = true;

    #[inline(always)]
    fn enter<W: Vectorized>(self, work: W) -> W::Output {
        // SAFETY: `Avx512` exists, so all of these features are there.
        unsafe { enter_avx512(self, work) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        op!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(self, x: *const f32) -> __m512 {
        // SAFETY: by contract.
        unsafe { _mm512_loadu_ps(x) }
    }
    #[inline(always)]
    unsafe fn load_first(self, x: *const f32, len: usize, fill: f32) -> __m512 {
        // SAFETY: masked lanes are not read; the others can be by contract.
        unsafe { _mm512_mask_loadu_ps(_mm512_set1_ps(fill), range_bits(0, len), x) }
    }
    #[inline(always)]
    unsafe fn store(self, x: *mut f32, v: __m512) {
        // SAFETY: by contract.
        unsafe { _mm512_storeu_ps(x, v) }
    }
    #[inline(always)]
    unsafe fn store_first(self, x: *mut f32, len: usize, v: __m512) {
        // SAFETY: masked lanes are not written; the others can be by contract.
        unsafe { _mm512_mask_storeu_ps(x, range_bits(0, len), v) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        op!(_mm512_roundscale_ps::<8>(a))
    }
    #[inline(always)]
    fn scale(self, a: __m512, n: __m512) -> __m512 {
        op!(_mm512_scalef_ps(a, n))
    }
    #[inline(always)]
    fn round_bf16(self, a: __m512) -> __m512 {
        op!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bf16_of(a)))))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, x: *mut u16, v: __m512) {
        // SAFETY: room by contract.
        unsafe { _mm256_storeu_si256(x.cast(), bf16_of(v)) }
    }

    #[inline(always)]
    fn mask_range(self, start: usize, end: usize) -> __mmask16 {
        range_bits(start, end)
    }
    #[inline(always)]
    fn mask_from_bits(self, bits: u16) -> __mmask16 {
        bits
    }
    #[inline(always)]
    fn mask_bits(self, mask: __mmask16) -> u16 {
        mask
    }
    #[inline(always)]
    fn gt(self, a: __m512, b: __m512) -> __mmask16 {
        op!(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b))
    }
    #[inline(always)]
    fn ge(self, a: __m512, b: __m512) -> __mmask16 {
        op!(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(a, b))
    }
    #[inline(always)]
    fn eq(self, a: __m512, b: __m512) -> __mmask16 {
        op!(_mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b))
    }
    #[inline(always)]
    fn is_nan(self, a: __m512) -> __mmask16 {
        op!(_mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a))
    }
    #[inline(always)]
    fn or(self, a: __mmask16, b: __mmask16) -> __mmask16 {
        a | b
    }
    #[inline(always)]
    fn select(self, mask: __mmask16, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mask_blend_ps(mask, b, a))
    }

    #[inline(always)]
    unsafe fn load_pairs(self, x: *const u32) -> __m512i {
        // SAFETY: by contract.
        unsafe { _mm512_loadu_si512(x.cast()) }
    }
    #[inline(always)]
    unsafe fn store_pairs(self, x: *mut u32, a: __m512i) {
        // SAFETY: by contract.
        unsafe { _mm512_storeu_si512(x.cast(), a) }
    }
    #[inline(always)]
    unsafe fn load_pairs_first(self, x: *const u32, len: usize) -> __m512i {
        // SAFETY: masked lanes are not read; the others can be by contract.
        unsafe { _mm512_maskz_loadu_epi32(range_bits(0, len), x.cast()) }
    }
    #[inline(always)]
    fn and_pairs(self, a: __m512i, bits: u32) -> __m512i {
        op!(_mm512_and_si512(a, _mm512_set1_epi32(bits as i32)))
    }
    #[inline(always)]
    fn splat_pair(self, pair: u32) -> __m512i {
        op!(_mm512_set1_epi32(pair as i32))
    }
    #[inline(always)]
    fn dot_pairs(self, acc: __m512, a: __m512i, b: __m512i) -> __m512 {
        // SAFETY: `Avx512` exists, so BF16 is there; the types are 512 plain bits each.
        unsafe {
            let a = std::mem::transmute::<__m512i, __m512bh>(a);
            let b = std::mem::transmute::<__m512i, __m512bh>(b);
            _mm512_dpbf16_ps(acc, a, b)
        }
    }

    #[inline(always)]
    fn low_pairs(self, a: __m512i) -> __m512 {
        op!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(a)))
    }
    #[inline(always)]
    fn high_pairs(self, a: __m512i) -> __m512 {
        op!(_mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(0xffff_0000_u32 as i32))))
    }

    #[inline(always)]
    unsafe fn load_i8_pairs(self, x: *const u16) -> __m512i {
        // SAFETY: by contract.
        unsafe { _mm512_cvtepi8_epi16(_mm256_loadu_si256(x.cast())) }
    }
    #[inline(always)]
    unsafe fn load_e4m3_pairs(self, x: *const u16) -> __m512i {
        // SAFETY: by contract.
        e4m3_of(unsafe { _mm512_cvtepu8_epi16(_mm256_loadu_si256(x.cast())) })
    }
    #[inline(always)]
    fn unpack_e4m3(self, words: __m512i) -> [__m512i; 2] {
        [e4m3_of(words), e4m3_of(op!(_mm512_srli_epi16::<8>(words)))]
    }
    #[inline(always)]
    fn dot_i16(self, acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_dpwssd_epi32(acc, a, b))
    }
    #[inline(always)]
    fn floats(self, a: __m512i) -> __m512 {
        op!(_mm512_cvtepi32_ps(a))
    }
    #[inline(always)]
    unsafe fn store_i16(self, x: *mut i16, v: __m512) {
        // SAFETY: room by contract.
        unsafe { _mm256_storeu_si256(x.cast(), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v))) }
    }

    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        // SAFETY: `Avx512` exists; the order of the sum is that of the default implementation.
        unsafe {
            let a = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        }
    }
    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        // SAFETY: `Avx512` exists.
        unsafe {
            let a = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
        }
    }
}

/// Bits of the nearest bf16 of each lane.
#[inline(always)]
fn bf16_of(a: __m512) -> __m256i {
    // SAFETY: called where `Avx512` exists only; the types are 256 plain bits each.
    unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(a)) }
}

const _: () = assert!(LANES == 16);
