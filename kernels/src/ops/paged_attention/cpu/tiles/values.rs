//! V of a span as B tiles, of numbers only.

use std::arch::x86_64::*;

use super::{Chunk, bits_of};
use crate::cpu::amx::TILE_ROWS;
use crate::cpu::lanes::{LANES, Lanes};
use crate::ops::paged_attention::cpu::element::Element;

/// Copies V of a span as B tiles, zeros in place of tokens that no row sees or that have numbers that are none. Returns which
/// of them have.
///
/// # Safety
/// There is room for the span at `to`.
#[inline(always)]
pub(super) unsafe fn copy_span<S: Lanes, E: Element>(
    simd: S,
    head_dim: usize,
    chunk: &Chunk,
    span: usize,
    to: *mut u32,
) -> u32 {
    if !E::IS_SCALED {
        // SAFETY: by contract.
        return unsafe { copy_bf16_span(head_dim, chunk, span, to) };
    }
    for pair in 0..TILE_ROWS {
        let vector = &chunk.vectors[2 * span + pair / 8];
        for column in 0..head_dim / LANES {
            // SAFETY: a vector's tokens are 8 pairs of `head_dim` lanes. Codes are numbers, whatever they are.
            unsafe {
                let pairs = if vector.v.is_null() {
                    simd.splat_pair(0)
                } else {
                    let lanes = vector.v.add((pair % 8 * head_dim + column * LANES) * E::LANE_BYTES);
                    simd.load_e4m3_pairs(lanes.cast())
                };
                simd.store_pairs(to.add((column * TILE_ROWS + pair) * LANES), pairs);
            }
        }
    }
    0
}

/// Twice the magnitude of an infinity of bf16: what is as large is no number.
const NO_NUMBER: u16 = 0xff00;

/// As [`copy_span`].
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn copy_bf16_span(head_dim: usize, chunk: &Chunk, span: usize, to: *mut u32) -> u32 {
    let seen = bits_of(span, &chunk.visible);
    let mut largest = _mm512_setzero_si512();
    for pair in 0..TILE_ROWS {
        let is_seen = seen >> (2 * pair);
        let mask = halves_of(is_seen);
        let vector = &chunk.vectors[2 * span + pair / 8];
        for column in 0..head_dim / LANES {
            // SAFETY: a vector's tokens are 8 pairs of `head_dim` lanes; one that no row sees is not looked at.
            unsafe {
                let to = to.add((column * TILE_ROWS + pair) * LANES);
                if mask == 0 {
                    _mm512_storeu_si512(to.cast(), _mm512_setzero_si512());
                    continue;
                }
                let lanes = vector.v.add((pair % 8 * head_dim + column * LANES) * 4);
                let pairs = _mm512_and_si512(_mm512_loadu_si512(lanes.cast()), _mm512_set1_epi32(mask as i32));
                largest = _mm512_max_epu16(largest, _mm512_add_epi16(pairs, pairs));
                _mm512_storeu_si512(to.cast(), pairs);
            }
        }
    }
    if _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(NO_NUMBER.cast_signed())) == 0 {
        return 0;
    }
    // SAFETY: the span was written just now.
    let words = unsafe { std::slice::from_raw_parts_mut(to, TILE_ROWS * head_dim) };
    zero_what_is_no_number(words)
}

/// All bits of the halves of a pair that two tokens' bits name.
#[inline(always)]
fn halves_of(tokens: u32) -> u32 {
    ((tokens & 1) * 0xffff) | ((tokens >> 1 & 1) * 0xffff_0000)
}

/// Makes zeros of tokens with numbers that are none, and returns which they are.
#[cold]
fn zero_what_is_no_number(words: &mut [u32]) -> u32 {
    let is_bad = |half: u32| (half as u16).wrapping_mul(2) >= NO_NUMBER;
    let mut bad = 0;
    for (index, word) in words.iter().enumerate() {
        let pair = index / LANES % TILE_ROWS;
        bad |= (u32::from(is_bad(*word)) | u32::from(is_bad(*word >> 16)) << 1) << (2 * pair);
    }
    for (index, word) in words.iter_mut().enumerate() {
        let tokens = bad >> (2 * (index / LANES % TILE_ROWS));
        *word &= !halves_of(tokens);
    }
    bad
}
