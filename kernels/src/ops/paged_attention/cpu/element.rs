//! The types that K and V may have, and how each is multiplied with queries and weights.

use std::marker::PhantomData;

use crate::cpu::lanes::{LANES, Lanes};

/// One step of a product: for sixteen tokens of K (or dimensions of V) one dimension (or token), or a pair of them,
/// multiplied with the same of a row's left factors: its query, or its weights.
pub(super) trait Element {
    /// Numbers that a step multiplies per lane.
    const PACK: usize;
    /// Words of 4 bytes that a row's left factors take in a step.
    const LEFT_WORDS: usize;
    /// Bytes of one lane of a step in the cache.
    const LANE_BYTES: usize;
    /// Whether numbers are codes times a scale: that of their token in the cache, that of their row on the left. A code is a
    /// finite number, whatever lies in the cache.
    const IS_SCALED: bool;
    /// Sixteen lanes of a step of the cache.
    type Column<S: Lanes>: Copy;
    /// A row's left factors of a step.
    type Left<S: Lanes>: Copy;
    /// Sixteen sums.
    type Sums<S: Lanes>: Copy;

    fn zero<S: Lanes>(simd: S) -> Self::Sums<S>;
    fn zero_column<S: Lanes>(simd: S) -> Self::Column<S>;
    /// # Safety
    /// 16 lanes can be read.
    unsafe fn column<S: Lanes>(simd: S, lanes: *const u8) -> Self::Column<S>;
    /// # Safety
    /// `len` lanes can be read; `len` is at most 16.
    unsafe fn column_first<S: Lanes>(simd: S, lanes: *const u8, len: usize) -> Self::Column<S>;
    /// Only the first number of each pair, or only the second: zero in place of the other, whatever it is.
    fn keep_one<S: Lanes>(simd: S, column: Self::Column<S>, is_first: bool) -> Self::Column<S>;
    /// # Safety
    /// [`Self::LEFT_WORDS`] can be read.
    unsafe fn left<S: Lanes>(simd: S, words: *const u32) -> Self::Left<S>;
    fn mul_add<S: Lanes>(simd: S, sums: Self::Sums<S>, column: Self::Column<S>, left: Self::Left<S>) -> Self::Sums<S>;
    fn floats<S: Lanes>(simd: S, sums: Self::Sums<S>) -> S::F;
    /// Of scaled numbers: what left factors of up to `largest` are multiplied by before they are rounded, and the scale of the
    /// result. A scale of NaN where one of them is no finite number.
    #[inline(always)]
    fn left_scale(_largest: f32, is_finite: bool) -> (f32, f32) {
        (1.0, if is_finite { 1.0 } else { f32::NAN })
    }
    /// What left factors are rounded to.
    fn round<S: Lanes>(simd: S, x: S::F) -> S::F;
    /// Writes sixteen left factors.
    /// # Safety
    /// [`left_words`] of 16 words can be written.
    unsafe fn store_left<S: Lanes>(simd: S, words: *mut u32, x: S::F);
}

/// Words of the left factors of `len` numbers.
pub(super) const fn left_words<E: Element>(len: usize) -> usize {
    len / E::PACK * E::LEFT_WORDS
}

/// f32.
pub(super) struct Single;

impl Element for Single {
    const PACK: usize = 1;
    const LEFT_WORDS: usize = 1;
    const LANE_BYTES: usize = 4;
    const IS_SCALED: bool = false;
    type Column<S: Lanes> = S::F;
    type Left<S: Lanes> = S::F;
    type Sums<S: Lanes> = S::F;
    #[inline(always)]
    fn zero<S: Lanes>(simd: S) -> S::F {
        simd.splat(0.0)
    }
    #[inline(always)]
    fn zero_column<S: Lanes>(simd: S) -> S::F {
        simd.splat(0.0)
    }
    #[inline(always)]
    unsafe fn column<S: Lanes>(simd: S, lanes: *const u8) -> S::F {
        // SAFETY: by contract.
        unsafe { simd.load(lanes.cast()) }
    }
    #[inline(always)]
    unsafe fn column_first<S: Lanes>(simd: S, lanes: *const u8, len: usize) -> S::F {
        // SAFETY: by contract.
        unsafe { simd.load_first(lanes.cast(), len, 0.0) }
    }
    #[inline(always)]
    fn keep_one<S: Lanes>(_: S, column: S::F, _: bool) -> S::F {
        column
    }
    #[inline(always)]
    unsafe fn left<S: Lanes>(simd: S, words: *const u32) -> S::F {
        // SAFETY: by contract.
        simd.splat(f32::from_bits(unsafe { *words }))
    }
    #[inline(always)]
    fn mul_add<S: Lanes>(simd: S, sums: S::F, column: S::F, left: S::F) -> S::F {
        simd.fma(column, left, sums)
    }
    #[inline(always)]
    fn floats<S: Lanes>(_: S, sums: S::F) -> S::F {
        sums
    }
    #[inline(always)]
    fn round<S: Lanes>(_: S, x: S::F) -> S::F {
        x
    }
    #[inline(always)]
    unsafe fn store_left<S: Lanes>(simd: S, words: *mut u32, x: S::F) {
        // SAFETY: by contract.
        unsafe { simd.store(words.cast(), x) }
    }
}

/// bf16, two in a word, multiplied by the instruction for pairs.
pub(super) struct Pairs;

impl Element for Pairs {
    const PACK: usize = 2;
    const LEFT_WORDS: usize = 1;
    const LANE_BYTES: usize = 4;
    const IS_SCALED: bool = false;
    type Column<S: Lanes> = S::P;
    type Left<S: Lanes> = S::P;
    type Sums<S: Lanes> = S::F;
    #[inline(always)]
    fn zero<S: Lanes>(simd: S) -> S::F {
        simd.splat(0.0)
    }
    #[inline(always)]
    fn zero_column<S: Lanes>(simd: S) -> S::P {
        simd.splat_pair(0)
    }
    #[inline(always)]
    unsafe fn column<S: Lanes>(simd: S, lanes: *const u8) -> S::P {
        // SAFETY: by contract.
        unsafe { simd.load_pairs(lanes.cast()) }
    }
    #[inline(always)]
    unsafe fn column_first<S: Lanes>(simd: S, lanes: *const u8, len: usize) -> S::P {
        // SAFETY: by contract.
        unsafe { simd.load_pairs_first(lanes.cast(), len) }
    }
    #[inline(always)]
    fn keep_one<S: Lanes>(simd: S, column: S::P, is_first: bool) -> S::P {
        simd.and_pairs(column, if is_first { 0x0000_ffff } else { 0xffff_0000 })
    }
    #[inline(always)]
    unsafe fn left<S: Lanes>(simd: S, words: *const u32) -> S::P {
        // SAFETY: by contract.
        simd.splat_pair(unsafe { *words })
    }
    #[inline(always)]
    fn mul_add<S: Lanes>(simd: S, sums: S::F, column: S::P, left: S::P) -> S::F {
        simd.dot_pairs(sums, column, left)
    }
    #[inline(always)]
    fn floats<S: Lanes>(_: S, sums: S::F) -> S::F {
        sums
    }
    #[inline(always)]
    fn round<S: Lanes>(simd: S, x: S::F) -> S::F {
        simd.round_bf16(x)
    }
    #[inline(always)]
    unsafe fn store_left<S: Lanes>(simd: S, words: *mut u32, x: S::F) {
        // SAFETY: by contract.
        unsafe { simd.store_bf16(words.cast(), x) }
    }
}

/// bf16, two in a word, widened to f32: each column once for all rows, left factors when they are stored.
pub(super) struct Widened;

impl Element for Widened {
    const PACK: usize = 2;
    const LEFT_WORDS: usize = 2;
    const LANE_BYTES: usize = 4;
    const IS_SCALED: bool = false;
    type Column<S: Lanes> = (S::F, S::F);
    type Left<S: Lanes> = (S::F, S::F);
    type Sums<S: Lanes> = S::F;
    #[inline(always)]
    fn zero<S: Lanes>(simd: S) -> S::F {
        simd.splat(0.0)
    }
    #[inline(always)]
    fn zero_column<S: Lanes>(simd: S) -> (S::F, S::F) {
        (simd.splat(0.0), simd.splat(0.0))
    }
    #[inline(always)]
    unsafe fn column<S: Lanes>(simd: S, lanes: *const u8) -> (S::F, S::F) {
        // SAFETY: by contract.
        let pairs = unsafe { simd.load_pairs(lanes.cast()) };
        (simd.low_pairs(pairs), simd.high_pairs(pairs))
    }
    #[inline(always)]
    unsafe fn column_first<S: Lanes>(simd: S, lanes: *const u8, len: usize) -> (S::F, S::F) {
        // SAFETY: by contract.
        let pairs = unsafe { simd.load_pairs_first(lanes.cast(), len) };
        (simd.low_pairs(pairs), simd.high_pairs(pairs))
    }
    #[inline(always)]
    fn keep_one<S: Lanes>(simd: S, column: (S::F, S::F), is_first: bool) -> (S::F, S::F) {
        let zero = simd.splat(0.0);
        if is_first { (column.0, zero) } else { (zero, column.1) }
    }
    #[inline(always)]
    unsafe fn left<S: Lanes>(simd: S, words: *const u32) -> (S::F, S::F) {
        // SAFETY: by contract.
        let [low, high] = unsafe { *words.cast::<[u32; 2]>() };
        (simd.splat(f32::from_bits(low)), simd.splat(f32::from_bits(high)))
    }
    #[inline(always)]
    fn mul_add<S: Lanes>(simd: S, sums: S::F, column: (S::F, S::F), left: (S::F, S::F)) -> S::F {
        simd.fma(column.1, left.1, simd.fma(column.0, left.0, sums))
    }
    #[inline(always)]
    fn floats<S: Lanes>(_: S, sums: S::F) -> S::F {
        sums
    }
    #[inline(always)]
    fn round<S: Lanes>(simd: S, x: S::F) -> S::F {
        simd.round_bf16(x)
    }
    #[inline(always)]
    unsafe fn store_left<S: Lanes>(simd: S, words: *mut u32, x: S::F) {
        // SAFETY: by contract.
        unsafe { simd.store(words.cast(), simd.round_bf16(x)) }
    }
}

/// Whole numbers of 8 bits in the cache and of 16 bits on the left. Sums are exact: 256 products of 127 and 32767 fit an
/// i32, and so do those of 64 tokens.
pub(super) struct Quantized;

impl Element for Quantized {
    const PACK: usize = 2;
    const LEFT_WORDS: usize = 1;
    const LANE_BYTES: usize = 2;
    const IS_SCALED: bool = true;
    type Column<S: Lanes> = S::P;
    type Left<S: Lanes> = S::P;
    type Sums<S: Lanes> = S::P;
    #[inline(always)]
    fn zero<S: Lanes>(simd: S) -> S::P {
        simd.splat_pair(0)
    }
    #[inline(always)]
    fn zero_column<S: Lanes>(simd: S) -> S::P {
        simd.splat_pair(0)
    }
    #[inline(always)]
    unsafe fn column<S: Lanes>(simd: S, lanes: *const u8) -> S::P {
        // SAFETY: by contract.
        unsafe { simd.load_i8_pairs(lanes.cast()) }
    }
    #[inline(always)]
    unsafe fn column_first<S: Lanes>(simd: S, lanes: *const u8, len: usize) -> S::P {
        // SAFETY: by contract.
        unsafe { simd.load_i8_pairs_first(lanes.cast(), len) }
    }
    #[inline(always)]
    fn keep_one<S: Lanes>(simd: S, column: S::P, is_first: bool) -> S::P {
        simd.and_pairs(column, if is_first { 0x0000_ffff } else { 0xffff_0000 })
    }
    #[inline(always)]
    unsafe fn left<S: Lanes>(simd: S, words: *const u32) -> S::P {
        // SAFETY: by contract.
        simd.splat_pair(unsafe { *words })
    }
    #[inline(always)]
    fn mul_add<S: Lanes>(simd: S, sums: S::P, column: S::P, left: S::P) -> S::P {
        simd.dot_i16(sums, column, left)
    }
    #[inline(always)]
    fn floats<S: Lanes>(simd: S, sums: S::P) -> S::F {
        simd.floats(sums)
    }
    #[inline(always)]
    fn left_scale(largest: f32, is_finite: bool) -> (f32, f32) {
        let inverse = MAX_LEFT / largest;
        if is_finite && inverse.is_finite() {
            (inverse, largest / MAX_LEFT)
        } else {
            // Numbers so small that the quotient overflows are zeros.
            (0.0, if is_finite { 0.0 } else { f32::NAN })
        }
    }
    #[inline(always)]
    fn round<S: Lanes>(_: S, x: S::F) -> S::F {
        x
    }
    #[inline(always)]
    unsafe fn store_left<S: Lanes>(simd: S, words: *mut u32, x: S::F) {
        // SAFETY: by contract.
        unsafe { simd.store_i16(words.cast(), x) }
    }
}

/// Largest left factor of [`Quantized`].
const MAX_LEFT: f32 = 32767.0;

/// An element of pairs of bf16.
pub(super) trait OfPairs: Element {
    fn of_pairs<S: Lanes>(simd: S, pairs: S::P) -> Self::Column<S>;
}

impl OfPairs for Pairs {
    #[inline(always)]
    fn of_pairs<S: Lanes>(_: S, pairs: S::P) -> S::P {
        pairs
    }
}

impl OfPairs for Widened {
    #[inline(always)]
    fn of_pairs<S: Lanes>(simd: S, pairs: S::P) -> (S::F, S::F) {
        (simd.low_pairs(pairs), simd.high_pairs(pairs))
    }
}

/// Floats of 8 bits in the cache, which become pairs of bf16 and are multiplied as `E` does it.
pub(super) struct Floats8<E>(PhantomData<E>);

impl<E: OfPairs> Element for Floats8<E> {
    const PACK: usize = 2;
    const LEFT_WORDS: usize = E::LEFT_WORDS;
    const LANE_BYTES: usize = 2;
    const IS_SCALED: bool = true;
    type Column<S: Lanes> = E::Column<S>;
    type Left<S: Lanes> = E::Left<S>;
    type Sums<S: Lanes> = E::Sums<S>;
    #[inline(always)]
    fn zero<S: Lanes>(simd: S) -> E::Sums<S> {
        E::zero(simd)
    }
    #[inline(always)]
    fn zero_column<S: Lanes>(simd: S) -> E::Column<S> {
        E::zero_column(simd)
    }
    #[inline(always)]
    unsafe fn column<S: Lanes>(simd: S, lanes: *const u8) -> E::Column<S> {
        // SAFETY: by contract.
        E::of_pairs(simd, unsafe { simd.load_e4m3_pairs(lanes.cast()) })
    }
    #[inline(always)]
    unsafe fn column_first<S: Lanes>(simd: S, lanes: *const u8, len: usize) -> E::Column<S> {
        // SAFETY: by contract.
        E::of_pairs(simd, unsafe { simd.load_e4m3_pairs_first(lanes.cast(), len) })
    }
    #[inline(always)]
    fn keep_one<S: Lanes>(simd: S, column: E::Column<S>, is_first: bool) -> E::Column<S> {
        E::keep_one(simd, column, is_first)
    }
    #[inline(always)]
    unsafe fn left<S: Lanes>(simd: S, words: *const u32) -> E::Left<S> {
        // SAFETY: by contract.
        unsafe { E::left(simd, words) }
    }
    #[inline(always)]
    fn mul_add<S: Lanes>(simd: S, sums: E::Sums<S>, column: E::Column<S>, left: E::Left<S>) -> E::Sums<S> {
        E::mul_add(simd, sums, column, left)
    }
    #[inline(always)]
    fn floats<S: Lanes>(simd: S, sums: E::Sums<S>) -> S::F {
        E::floats(simd, sums)
    }
    #[inline(always)]
    fn round<S: Lanes>(_: S, x: S::F) -> S::F {
        x
    }
    #[inline(always)]
    unsafe fn store_left<S: Lanes>(simd: S, words: *mut u32, x: S::F) {
        // SAFETY: by contract.
        unsafe { E::store_left(simd, words, x) }
    }
}

const _: () = assert!(LANES == 16);
