//! Sixteen numbers at a time, on every instruction set under one name.
//!
//! An operation is written once, generic over [`Lanes`], and compiled once per instruction set by [`vectorize`]. A type
//! that implements [`Lanes`] is made by [`vectorize`] only, after the instruction set was found to be there; that
//! is what makes its safe functions safe. Everything on the way from [`Vectorized::run`] to an instruction
//! is `#[inline(always)]`, since only what is inlined is compiled with the instruction set.

use crate::cpu::Isa;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Work written for any instruction set.
pub(crate) trait Vectorized {
    type Output;
    /// To be marked `#[inline(always)]`.
    fn run<S: Lanes>(self, simd: S) -> Self::Output;
}

/// Runs `work` with the instructions of `isa`, which the machine has.
pub(crate) fn vectorize<W: Vectorized>(isa: Isa, work: W) -> W::Output {
    match isa {
        Isa::Portable => Portable(()).enter(work),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            debug_assert!(isa.is_available());
            x86::Avx2(()).enter(work)
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => {
            debug_assert!(isa.is_available());
            x86::Avx512(()).enter(work)
        }
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 => unreachable!("not an instruction set of this architecture"),
    }
}

/// One instruction set. `F` are 16 numbers, `M` one bit per lane, `P` 16 pairs of bf16, low half first.
pub(crate) trait Lanes: Copy + Send + Sync {
    type F: Copy;
    type M: Copy;
    type P: Copy;

    /// Rows and columns (in vectors) of accumulators that the registers hold, in a product of small matrices.
    const MAX_ROWS: usize;
    const MAX_COLS: usize;

    /// Compiles `work` for this instruction set as a function of its own.
    fn enter<W: Vectorized>(self, work: W) -> W::Output;

    fn splat(self, x: f32) -> Self::F;
    /// # Safety
    /// 16 numbers can be read at `x`.
    unsafe fn load(self, x: *const f32) -> Self::F;
    /// The first `len` lanes from memory, `fill` in the others.
    /// # Safety
    /// `len` numbers can be read at `x`; `len` is at most 16.
    unsafe fn load_first(self, x: *const f32, len: usize, fill: f32) -> Self::F;
    /// # Safety
    /// 16 numbers can be written at `x`.
    unsafe fn store(self, x: *mut f32, v: Self::F);
    /// # Safety
    /// `len` numbers can be written at `x`; `len` is at most 16.
    unsafe fn store_first(self, x: *mut f32, len: usize, v: Self::F);

    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`; rounded once where the machine can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger; `b` where one is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The smaller; `b` where one is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// To the nearest whole number, half to even; for magnitudes below 2^22.
    fn round(self, a: Self::F) -> Self::F;
    /// `a * 2^n` for whole `n` in -160 to 160.
    fn scale(self, a: Self::F, n: Self::F) -> Self::F;
    /// Rounded to bf16 (half to even) and back.
    fn round_bf16(self, a: Self::F) -> Self::F;
    /// Rounded to bf16 (half to even), as 16 numbers of 16 bits.
    /// # Safety
    /// 16 numbers can be written at `x`.
    unsafe fn store_bf16(self, x: *mut u16, v: Self::F);

    /// Lanes `start..end`; `end` is at most 16.
    fn mask_range(self, start: usize, end: usize) -> Self::M;
    /// One bit per lane, lane 0 lowest.
    fn mask_from_bits(self, bits: u16) -> Self::M;
    fn mask_bits(self, mask: Self::M) -> u16;
    fn gt(self, a: Self::F, b: Self::F) -> Self::M;
    fn ge(self, a: Self::F, b: Self::F) -> Self::M;
    fn eq(self, a: Self::F, b: Self::F) -> Self::M;
    fn is_nan(self, a: Self::F) -> Self::M;
    fn or(self, a: Self::M, b: Self::M) -> Self::M;
    /// `a` where the mask is set, else `b`.
    fn select(self, mask: Self::M, a: Self::F, b: Self::F) -> Self::F;

    /// # Safety
    /// 16 pairs can be read at `x`.
    unsafe fn load_pairs(self, x: *const u32) -> Self::P;
    /// The first `len` pairs, zero in the others.
    /// # Safety
    /// `len` pairs can be read at `x`; `len` is at most 16.
    unsafe fn load_pairs_first(self, x: *const u32, len: usize) -> Self::P;
    /// Each pair and `bits`.
    fn and_pairs(self, a: Self::P, bits: u32) -> Self::P;
    fn splat_pair(self, pair: u32) -> Self::P;
    /// `acc + a.low * b.low + a.high * b.high` per lane.
    fn dot_pairs(self, acc: Self::F, a: Self::P, b: Self::P) -> Self::F;

    /// The lanes as an array.
    #[inline(always)]
    fn to_array(self, a: Self::F) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        // SAFETY: the array holds 16 numbers.
        unsafe { self.store(out.as_mut_ptr(), a) };
        out
    }

    /// Sum of the lanes: halves onto each other, 8, 4, 2, 1.
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        let mut x = self.to_array(a);
        let mut half = LANES / 2;
        while half > 0 {
            for lane in 0..half {
                x[lane] += x[lane + half];
            }
            half /= 2;
        }
        x[0]
    }

    /// The largest lane; NaN is passed over where it can be.
    #[inline(always)]
    fn max_lane(self, a: Self::F) -> f32 {
        let mut x = self.to_array(a);
        let mut half = LANES / 2;
        while half > 0 {
            for lane in 0..half {
                x[lane] = if x[lane] > x[lane + half] { x[lane] } else { x[lane + half] };
            }
            half /= 2;
        }
        x[0]
    }

    /// The first 16 numbers of `x`, or all of them and `fill` behind.
    #[inline(always)]
    fn load_slice(self, x: &[f32], fill: f32) -> Self::F {
        if x.len() >= LANES {
            // SAFETY: 16 numbers are there.
            unsafe { self.load(x.as_ptr()) }
        } else {
            // SAFETY: `len` numbers are there.
            unsafe { self.load_first(x.as_ptr(), x.len(), fill) }
        }
    }

    /// Writes as many lanes as `x` has room for.
    #[inline(always)]
    fn store_slice(self, x: &mut [f32], v: Self::F) {
        if x.len() >= LANES {
            // SAFETY: 16 numbers have room.
            unsafe { self.store(x.as_mut_ptr(), v) };
        } else {
            // SAFETY: `len` numbers have room.
            unsafe { self.store_first(x.as_mut_ptr(), x.len(), v) };
        }
    }
}

/// Half of a bf16 pair as f32: bits moved to the upper half.
#[inline(always)]
fn low(pair: u32) -> f32 {
    f32::from_bits(pair << 16)
}

#[inline(always)]
fn high(pair: u32) -> f32 {
    f32::from_bits(pair & 0xffff_0000)
}

/// The nearest bf16, half to even; a NaN stays one. Without branches, so that loops of it become vectors.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let quiet = bits | 0x0040_0000;
    (if x.is_nan() { quiet } else { rounded } >> 16) as u16
}

/// Plain loops that the compiler turns into whatever the target has.
#[derive(Clone, Copy)]
pub(crate) struct Portable(());

impl Lanes for Portable {
    type F = [f32; LANES];
    type M = u16;
    type P = [u32; LANES];

    const MAX_ROWS: usize = 2;
    const MAX_COLS: usize = 1;

    #[inline]
    fn enter<W: Vectorized>(self, work: W) -> W::Output {
        work.run(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(self, x: *const f32) -> Self::F {
        // SAFETY: by contract; an array of f32 has the alignment of f32.
        unsafe { *x.cast::<Self::F>() }
    }
    #[inline(always)]
    unsafe fn load_first(self, x: *const f32, len: usize, fill: f32) -> Self::F {
        let mut out = [fill; LANES];
        // SAFETY: by contract.
        out[..len].copy_from_slice(unsafe { std::slice::from_raw_parts(x, len) });
        out
    }
    #[inline(always)]
    unsafe fn store(self, x: *mut f32, v: Self::F) {
        // SAFETY: by contract; an array of f32 has the alignment of f32.
        unsafe { *x.cast::<Self::F>() = v }
    }
    #[inline(always)]
    unsafe fn store_first(self, x: *mut f32, len: usize, v: Self::F) {
        // SAFETY: by contract.
        unsafe { std::slice::from_raw_parts_mut(x, len) }.copy_from_slice(&v[..len]);
    }

    #[inline(always)]
    fn add(self, mut a: Self::F, b: Self::F) -> Self::F {
        for i in 0..LANES {
            a[i] += b[i];
        }
        a
    }
    #[inline(always)]
    fn sub(self, mut a: Self::F, b: Self::F) -> Self::F {
        for i in 0..LANES {
            a[i] -= b[i];
        }
        a
    }
    #[inline(always)]
    fn mul(self, mut a: Self::F, b: Self::F) -> Self::F {
        for i in 0..LANES {
            a[i] *= b[i];
        }
        a
    }
    #[inline(always)]
    fn div(self, mut a: Self::F, b: Self::F) -> Self::F {
        for i in 0..LANES {
            a[i] /= b[i];
        }
        a
    }
    #[inline(always)]
    fn fma(self, mut a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        for i in 0..LANES {
            a[i] = a[i] * b[i] + c[i];
        }
        a
    }
    #[inline(always)]
    fn max(self, mut a: Self::F, b: Self::F) -> Self::F {
        for i in 0..LANES {
            a[i] = if a[i] > b[i] { a[i] } else { b[i] };
        }
        a
    }
    #[inline(always)]
    fn min(self, mut a: Self::F, b: Self::F) -> Self::F {
        for i in 0..LANES {
            a[i] = if a[i] < b[i] { a[i] } else { b[i] };
        }
        a
    }
    #[inline(always)]
    fn round(self, mut a: Self::F) -> Self::F {
        // Adding 1.5 * 2^23 leaves no bits behind the point.
        const SHIFT: f32 = 12_582_912.0;
        for x in &mut a {
            *x = (*x + SHIFT) - SHIFT;
        }
        a
    }
    #[inline(always)]
    fn scale(self, mut a: Self::F, n: Self::F) -> Self::F {
        // Two factors, so that results without a full mantissa come out right.
        for i in 0..LANES {
            let n = n[i] as i32;
            let half = n >> 1;
            a[i] = a[i] * f32::from_bits(((half + 127) << 23) as u32) * f32::from_bits(((n - half + 127) << 23) as u32);
        }
        a
    }
    #[inline(always)]
    fn round_bf16(self, mut a: Self::F) -> Self::F {
        for x in &mut a {
            *x = f32::from_bits(u32::from(bf16_bits(*x)) << 16);
        }
        a
    }
    #[inline(always)]
    unsafe fn store_bf16(self, x: *mut u16, v: Self::F) {
        // SAFETY: by contract; an array of u16 has the alignment of u16.
        let out = unsafe { &mut *x.cast::<[u16; LANES]>() };
        for i in 0..LANES {
            out[i] = bf16_bits(v[i]);
        }
    }

    #[inline(always)]
    fn mask_range(self, start: usize, end: usize) -> Self::M {
        range_bits(start, end)
    }
    #[inline(always)]
    fn mask_from_bits(self, bits: u16) -> Self::M {
        bits
    }
    #[inline(always)]
    fn mask_bits(self, mask: Self::M) -> u16 {
        mask
    }
    #[inline(always)]
    fn gt(self, a: Self::F, b: Self::F) -> Self::M {
        let mut mask = 0;
        for i in 0..LANES {
            mask |= u16::from(a[i] > b[i]) << i;
        }
        mask
    }
    #[inline(always)]
    fn ge(self, a: Self::F, b: Self::F) -> Self::M {
        let mut mask = 0;
        for i in 0..LANES {
            mask |= u16::from(a[i] >= b[i]) << i;
        }
        mask
    }
    #[inline(always)]
    fn eq(self, a: Self::F, b: Self::F) -> Self::M {
        let mut mask = 0;
        for i in 0..LANES {
            mask |= u16::from(a[i] == b[i]) << i;
        }
        mask
    }
    #[inline(always)]
    fn is_nan(self, a: Self::F) -> Self::M {
        let mut mask = 0;
        for (i, x) in a.iter().enumerate() {
            mask |= u16::from(x.is_nan()) << i;
        }
        mask
    }
    #[inline(always)]
    fn or(self, a: Self::M, b: Self::M) -> Self::M {
        a | b
    }
    #[inline(always)]
    fn select(self, mask: Self::M, a: Self::F, mut b: Self::F) -> Self::F {
        for i in 0..LANES {
            if mask >> i & 1 == 1 {
                b[i] = a[i];
            }
        }
        b
    }

    #[inline(always)]
    unsafe fn load_pairs(self, x: *const u32) -> Self::P {
        // SAFETY: by contract; an array of u32 has the alignment of u32.
        unsafe { *x.cast::<Self::P>() }
    }
    #[inline(always)]
    unsafe fn load_pairs_first(self, x: *const u32, len: usize) -> Self::P {
        let mut out = [0; LANES];
        // SAFETY: by contract.
        out[..len].copy_from_slice(unsafe { std::slice::from_raw_parts(x, len) });
        out
    }
    #[inline(always)]
    fn and_pairs(self, mut a: Self::P, bits: u32) -> Self::P {
        for x in &mut a {
            *x &= bits;
        }
        a
    }
    #[inline(always)]
    fn splat_pair(self, pair: u32) -> Self::P {
        [pair; LANES]
    }
    #[inline(always)]
    fn dot_pairs(self, mut acc: Self::F, a: Self::P, b: Self::P) -> Self::F {
        for i in 0..LANES {
            acc[i] = acc[i] + low(a[i]) * low(b[i]) + high(a[i]) * high(b[i]);
        }
        acc
    }
}

/// Bits `start..end` of 16.
#[inline(always)]
fn range_bits(start: usize, end: usize) -> u16 {
    let below = |n: usize| (1_u32 << n) - 1;
    (below(end) & !below(start)) as u16
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Lanes, Vectorized, range_bits};

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

        const MAX_ROWS: usize = 4;
        const MAX_COLS: usize = 1;

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
    }

    /// Made by [`super::vectorize`] only where AVX-512 F, BW, VL, DQ and BF16 were found.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(pub(super) ());

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
    fn enter_avx512<W: Vectorized>(simd: Avx512, work: W) -> W::Output {
        work.run(simd)
    }

    /// One instruction, on the ground that the instruction set was found.
    macro_rules! op {
        ($($call:tt)+) => {
            // SAFETY: `Avx512` exists, so AVX-512 with BW, DQ and BF16 is there.
            unsafe { $($call)+ }
        };
    }

    impl Lanes for Avx512 {
        type F = __m512;
        type M = __mmask16;
        type P = __m512i;

        const MAX_ROWS: usize = 6;
        const MAX_COLS: usize = 4;

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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_half_does() {
        let edges = [0.0, -0.0, 1.0, f32::MAX, f32::MIN_POSITIVE, 1e-40, f32::INFINITY, f32::NEG_INFINITY];
        let near_ties = (0..1 << 18).map(|low| f32::from_bits(0x3f80_0000 + low));
        for x in edges.into_iter().chain(near_ties) {
            assert_eq!(bf16_bits(x), half::bf16::from_f32(x).to_bits(), "{x:e}");
        }
        assert!(half::bf16::from_bits(bf16_bits(f32::from_bits(0x7f80_0001))).is_nan());
    }
}
