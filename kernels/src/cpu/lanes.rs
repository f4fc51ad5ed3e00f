//! Sixteen numbers at a time, on every instruction set under one name.
//!
//! An operation is written once, generic over [`Lanes`], and compiled once per instruction set by [`vectorize`]. A type
//! that implements [`Lanes`] is made by [`vectorize`] only, after the instruction set was found to be there; that
//! is what makes its safe functions safe. Everything on the way from [`Vectorized::run`] to an instruction
//! is `#[inline(always)]`, since only what is inlined is compiled with the instruction set.

use crate::cpu::Isa;
use crate::e4m3;

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
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => {
            debug_assert!(isa.is_available());
            x86::Avx512(()).enter(work)
        }
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => {
            unreachable!("not an instruction set of this architecture")
        }
    }
}

/// One instruction set. `F` are 16 numbers, `M` one bit per lane, `P` 16 pairs of bf16, low half first.
pub(crate) trait Lanes: Copy + Send + Sync {
    type F: Copy;
    type M: Copy;
    type P: Copy;

    /// Sums (in vectors) that the registers hold in a product of small matrices, beside its factors.
    const NUM_SUMS: usize;
    /// Whether `dot_pairs` is an instruction of its own. Where it is not, it equals two calls of `fma`, low halves first.
    const HAS_DOT_PAIRS: bool;

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
    /// # Safety
    /// 16 pairs can be written at `x`.
    unsafe fn store_pairs(self, x: *mut u32, a: Self::P);
    /// The first `len` pairs, zero in the others.
    /// # Safety
    /// `len` pairs can be read at `x`; `len` is at most 16.
    unsafe fn load_pairs_first(self, x: *const u32, len: usize) -> Self::P;
    /// Each pair and `bits`.
    fn and_pairs(self, a: Self::P, bits: u32) -> Self::P;
    fn splat_pair(self, pair: u32) -> Self::P;
    /// `acc + a.low * b.low + a.high * b.high` per lane.
    fn dot_pairs(self, acc: Self::F, a: Self::P, b: Self::P) -> Self::F;

    /// The low half of each pair as f32.
    fn low_pairs(self, a: Self::P) -> Self::F;
    /// The high half of each pair as f32.
    fn high_pairs(self, a: Self::P) -> Self::F;

    /// Pairs of signed bytes as pairs of i16.
    /// # Safety
    /// 16 pairs can be read at `x`.
    unsafe fn load_i8_pairs(self, x: *const u16) -> Self::P;
    /// The first `len` pairs of signed bytes as pairs of i16, zero in the others.
    /// # Safety
    /// `len` pairs can be read at `x`; `len` is at most 16.
    #[inline(always)]
    unsafe fn load_i8_pairs_first(self, x: *const u16, len: usize) -> Self::P {
        let mut pairs = [0; LANES];
        // SAFETY: by contract; the array holds 16 pairs.
        unsafe {
            pairs[..len].copy_from_slice(std::slice::from_raw_parts(x, len));
            self.load_i8_pairs(pairs.as_ptr())
        }
    }
    /// Pairs of [`crate::e4m3`] as pairs of bf16, exactly; codes that are no numbers become some.
    /// # Safety
    /// 16 pairs can be read at `x`.
    unsafe fn load_e4m3_pairs(self, x: *const u16) -> Self::P;
    /// The first `len` pairs of [`crate::e4m3`] as pairs of bf16, zero in the others.
    /// # Safety
    /// `len` pairs can be read at `x`; `len` is at most 16.
    #[inline(always)]
    unsafe fn load_e4m3_pairs_first(self, x: *const u16, len: usize) -> Self::P {
        let mut pairs = [0; LANES];
        // SAFETY: by contract; the array holds 16 pairs.
        unsafe {
            pairs[..len].copy_from_slice(std::slice::from_raw_parts(x, len));
            self.load_e4m3_pairs(pairs.as_ptr())
        }
    }
    /// Four numbers of [`crate::e4m3`] in each word as two pairs of bf16, exactly: bytes 0 and 2, then 1 and 3. Codes that are
    /// no numbers become some.
    fn unpack_e4m3(self, words: Self::P) -> [Self::P; 2];
    /// `acc + a.low * b.low + a.high * b.high` per lane, on whole numbers: pairs of i16, sums of i32 that wrap.
    fn dot_i16(self, acc: Self::P, a: Self::P, b: Self::P) -> Self::P;
    /// Each i32 as f32.
    fn floats(self, a: Self::P) -> Self::F;
    /// Rounded to the nearest whole number (half to even), as 16 numbers of 16 bits. Whole numbers of magnitude up to
    /// 32767 only; a NaN becomes anything.
    /// # Safety
    /// 16 numbers can be written at `x`.
    unsafe fn store_i16(self, x: *mut i16, v: Self::F);

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

/// How far ahead of use a stream that is read once is fetched: the products, and what they are measured against.
pub(crate) const PREFETCH_AHEAD_BYTES: usize = 8192;

/// Asks for the cache line of an address, which may be any: wanted in a moment, in the level-1 cache.
#[inline(always)]
pub(crate) fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: fetching ahead reads nothing, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// As [`prefetch`], wanted later: no further than into level 2.
#[inline(always)]
pub(crate) fn prefetch_early(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: as in `prefetch`.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
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

/// Two numbers of e4m3 as a pair of bf16.
#[inline(always)]
fn bf16_pair_of(codes: [u8; 2]) -> u32 {
    let [low, high] = codes.map(|code| u32::from(e4m3::BF16[usize::from(code)]));
    low | high << 16
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

    const NUM_SUMS: usize = 2;
    const HAS_DOT_PAIRS: bool = false;

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
    unsafe fn store_pairs(self, x: *mut u32, a: Self::P) {
        // SAFETY: as above.
        unsafe { *x.cast::<Self::P>() = a }
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
    #[inline(always)]
    fn low_pairs(self, a: Self::P) -> Self::F {
        a.map(low)
    }
    #[inline(always)]
    fn high_pairs(self, a: Self::P) -> Self::F {
        a.map(high)
    }

    #[inline(always)]
    unsafe fn load_i8_pairs(self, x: *const u16) -> Self::P {
        // SAFETY: by contract; an array of u16 has the alignment of u16.
        let pairs = unsafe { *x.cast::<[u16; LANES]>() };
        pairs.map(|pair| {
            let [low, high] = pair.to_le_bytes().map(|byte| byte as i8);
            u32::from(i16::from(low) as u16) | u32::from(i16::from(high) as u16) << 16
        })
    }
    #[inline(always)]
    unsafe fn load_e4m3_pairs(self, x: *const u16) -> Self::P {
        // SAFETY: by contract; an array of u16 has the alignment of u16.
        let pairs = unsafe { *x.cast::<[u16; LANES]>() };
        pairs.map(|pair| bf16_pair_of(pair.to_le_bytes()))
    }
    #[inline(always)]
    fn unpack_e4m3(self, words: Self::P) -> [Self::P; 2] {
        [
            words.map(|word| bf16_pair_of([word as u8, (word >> 16) as u8])),
            words.map(|word| bf16_pair_of([(word >> 8) as u8, (word >> 24) as u8])),
        ]
    }
    #[inline(always)]
    fn dot_i16(self, mut acc: Self::P, a: Self::P, b: Self::P) -> Self::P {
        let half = |pair: u32, shift: u32| i32::from((pair >> shift) as i16);
        for i in 0..LANES {
            let sum = half(a[i], 0) * half(b[i], 0) + half(a[i], 16) * half(b[i], 16);
            acc[i] = acc[i].wrapping_add(sum as u32);
        }
        acc
    }
    #[inline(always)]
    fn floats(self, a: Self::P) -> Self::F {
        a.map(|word| word as i32 as f32)
    }
    #[inline(always)]
    unsafe fn store_i16(self, x: *mut i16, v: Self::F) {
        // SAFETY: by contract; an array of i16 has the alignment of i16.
        let out = unsafe { &mut *x.cast::<[i16; LANES]>() };
        let v = self.round(v);
        for i in 0..LANES {
            out[i] = v[i] as i16;
        }
    }
}

/// Bits `start..end` of 16.
#[inline(always)]
fn range_bits(start: usize, end: usize) -> u16 {
    let below = |n: usize| (1_u32 << n) - 1;
    (below(end) & !below(start)) as u16
}

#[cfg(target_arch = "x86_64")]
mod x86;

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
