//! The softmax between the two products: scores of a stretch to weights.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{ROWS_MULTIPLE, SPAN_LEN, STRETCH_SPANS, STRETCH_VECTORS, bits_of};
use crate::cpu::lanes::LANES;
use crate::ops::paged_attention::cpu::element::Element;

/// Multiplies by a factor.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn scale_by(numbers: &mut [f32], factor: f32) {
    let factor = _mm512_set1_ps(factor);
    for numbers in numbers.chunks_exact_mut(LANES) {
        // SAFETY: 16 numbers.
        unsafe {
            let at = numbers.as_mut_ptr();
            _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), factor));
        }
    }
}

/// Brings the largest scores so far up to date, of a block of rows: `new` are those of this stretch. Leaves what sums so far are
/// multiplied by, and multiplies `totals`, where they are none of the tiles'.
///
/// # Safety
/// A block of rows lies at `max`, and at `totals`.
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) unsafe fn take_max(
    max: *mut f32,
    new: &[f32; ROWS_MULTIPLE],
    factors: &mut [f32; ROWS_MULTIPLE],
    totals: Option<*mut f32>,
) {
    for first in (0..ROWS_MULTIPLE).step_by(LANES) {
        // SAFETY: by contract.
        unsafe {
            let old = _mm512_loadu_ps(max.add(first));
            let new = _mm512_loadu_ps(new.as_ptr().add(first));
            let both = _mm512_max_ps(new, old);
            // Equal also where nothing was seen yet, and both are negative infinity.
            let is_same = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(old, both);
            let factor = _mm512_mask_mov_ps(exp2(_mm512_sub_ps(old, both)), is_same, _mm512_set1_ps(1.0));
            _mm512_storeu_ps(max.add(first), both);
            _mm512_storeu_ps(factors.as_mut_ptr().add(first), factor);
            if let Some(totals) = totals {
                let at = totals.add(first);
                _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), factor));
            }
        }
    }
}

/// A row of scores of a stretch that becomes one of weights.
pub(super) struct Scores {
    pub(super) scores: *const f32,
    pub(super) weights: *mut u16,
    pub(super) scale: f32,
    /// Of fp8: what scores of a token are multiplied by in place of `scale`, and its weights.
    pub(super) scales: [*const f32; 2],
}

impl Scores {
    /// Weights of a span's `tokens`, zeros of others; adds, of fp8, to their totals before they are multiplied with scales of V.
    ///
    /// # Safety
    /// The row's scores of the span are there, and room for weights.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn weigh_span<E: Element>(&self, span: usize, tokens: u32, base: __m512, totals: &mut [__m512; 2]) {
        let mut weights = [_mm512_setzero_ps(); 2];
        for (half, to) in weights.iter_mut().enumerate() {
            let first = span * SPAN_LEN + half * LANES;
            let is_seen = (tokens >> (half * LANES)) as u16;
            // SAFETY: by contract.
            unsafe {
                let score = _mm512_loadu_ps(self.scores.add(first));
                let scale =
                    if E::IS_SCALED { _mm512_loadu_ps(self.scales[0].add(first)) } else { _mm512_set1_ps(self.scale) };
                let mut weight = exp2(_mm512_fmsub_ps(score, scale, base));
                if E::IS_SCALED {
                    totals[half] = _mm512_mask_add_ps(totals[half], is_seen, totals[half], weight);
                    weight = _mm512_mul_ps(weight, _mm512_loadu_ps(self.scales[1].add(first)));
                }
                *to = _mm512_maskz_mov_ps(is_seen, weight);
            }
        }
        let pairs = _mm512_cvtne2ps_pbh(weights[1], weights[0]);
        // SAFETY: by contract; the types are 512 plain bits each.
        unsafe {
            let pairs = std::mem::transmute::<__m512bh, __m512i>(pairs);
            _mm512_storeu_si512(self.weights.add(span * SPAN_LEN).cast(), pairs);
        }
    }

    /// Writes weights of all `spans`, zeros where the row does not see the token. Returns, of fp8, their sum before they are
    /// multiplied with the scales of V.
    ///
    /// # Safety
    /// The row's scores of `spans` are there, and room for weights; the row sees nothing else.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    pub(super) unsafe fn weigh<E: Element>(&self, max: f32, spans: &Range<usize>, seen: &Range<usize>) -> f32 {
        // A row that has seen nothing yet has weights 2^(-inf - 0) = 0.
        let base = _mm512_set1_ps(if max == f32::NEG_INFINITY { 0.0 } else { max });
        let mut totals = [_mm512_setzero_ps(); 2];
        for span in spans.clone() {
            // SAFETY: by contract.
            unsafe { self.weigh_span::<E>(span, bits_of(span, seen), base, &mut totals) };
        }
        if E::IS_SCALED { _mm512_reduce_add_ps(_mm512_add_ps(totals[0], totals[1])) } else { 0.0 }
    }

    /// As [`Self::weigh`] of a row that sees the whole stretch.
    ///
    /// # Safety
    /// As of [`Self::weigh`], of all spans.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    pub(super) unsafe fn weigh_all<E: Element>(&self, max: f32) -> f32 {
        let base = _mm512_set1_ps(if max == f32::NEG_INFINITY { 0.0 } else { max });
        let mut totals = [_mm512_setzero_ps(); 2];
        for span in 0..STRETCH_SPANS {
            // SAFETY: by contract.
            unsafe { self.weigh_span::<E>(span, u32::MAX, base, &mut totals) };
        }
        if E::IS_SCALED { _mm512_reduce_add_ps(_mm512_add_ps(totals[0], totals[1])) } else { 0.0 }
    }

    /// Scores of a vector of tokens, of fp8 times their scales.
    ///
    /// # Safety
    /// They are there.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load<E: Element>(&self, vector: usize) -> __m512 {
        // SAFETY: by contract.
        unsafe {
            let score = _mm512_loadu_ps(self.scores.add(vector * LANES));
            if E::IS_SCALED { _mm512_mul_ps(score, _mm512_loadu_ps(self.scales[0].add(vector * LANES))) } else { score }
        }
    }

    /// The largest score that is a number, times its scale, of the tokens that the row sees.
    ///
    /// # Safety
    /// As of [`Self::weigh`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    pub(super) unsafe fn max<E: Element>(&self, seen: &Range<usize>) -> f32 {
        let mut max = _mm512_set1_ps(f32::NEG_INFINITY);
        for vector in seen.start / LANES..seen.end.div_ceil(LANES) {
            let is_seen = (bits_of(vector / 2, seen) >> (vector % 2 * LANES)) as u16;
            // The second argument stays where the first is NaN.
            // SAFETY: by contract.
            max = unsafe { _mm512_mask_max_ps(max, is_seen, self.load::<E>(vector), max) };
        }
        let max = _mm512_reduce_max_ps(max);
        if E::IS_SCALED { max } else { max * self.scale }
    }

    /// As [`Self::max`] of a row that sees the whole stretch.
    ///
    /// # Safety
    /// As of [`Self::weigh`], of all spans.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    pub(super) unsafe fn max_of_all<E: Element>(&self) -> f32 {
        let mut max = [_mm512_set1_ps(f32::NEG_INFINITY); 2];
        for vector in 0..STRETCH_VECTORS {
            // SAFETY: by contract.
            max[vector % 2] = unsafe { _mm512_max_ps(self.load::<E>(vector), max[vector % 2]) };
        }
        let max = _mm512_reduce_max_ps(_mm512_max_ps(max[0], max[1]));
        if E::IS_SCALED { max } else { max * self.scale }
    }
}

/// `2^x` for `x` up to 127, relative error below 3e-6 (a bf16 is off by 2e-3); exactly 1 at 0, exactly 0 far below.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn exp2(x: __m512) -> __m512 {
    // x - floor(x), without exceptions; of an infinity zero.
    const FLOOR: i32 = 0b1001;
    let r = _mm512_reduce_ps::<FLOOR>(x);
    // Least relative error on [0, 1] of those that are 1 at 0 (Remez).
    let mut p = _mm512_set1_ps(0.013_426_684);
    for c in [0.052_242_474, 0.241_280_2, 0.693_044_84, 1.0] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    // Times two to the power of floor(x).
    _mm512_scalef_ps(p, x)
}
