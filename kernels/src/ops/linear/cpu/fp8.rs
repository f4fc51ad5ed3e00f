//! Micro-kernels for weights of 8-bit floats: codes become bf16 in registers, which holds them all, and are multiplied as
//! such weights are.
//!
//! A step is a group of 128 input features. Its weights, for a panel of `W` outputs, are codes, `[32][W]` words of four
//! features ([`word`]), then `[W]` scales of f32. Of a group each output is one chain of products in ascending order, from
//! zero; groups, times their scales, are added in ascending order, in every tile shape.
//!
//! | kernel        | panel | tile | products                        |
//! |---------------|-------|------|---------------------------------|
//! | AVX-512 BF16  | 64    | 6x64 | pairs of bf16, `vdpbf16ps`      |
//! | AVX-512       | 64    | 6x64 | widened to f32, FMA             |
//! | AVX2          | 16    | 4x16 | widened to f32, FMA             |
//! | portable      | 16    | 4x16 | plain loops                     |

use super::tile::{Tile, TileFn};
use crate::cpu::Isa;
use crate::cpu::lanes::{LANES, Lanes, Vectorized, prefetch, prefetch_early, vectorize};
use crate::e4m3;
use crate::weight_format::LONG_GROUP_LEN;

/// Words of codes of an output in a step.
const NUM_WORDS: usize = LONG_GROUP_LEN / 4;

/// Outputs of a panel.
pub(super) const fn panel_width(isa: Isa) -> usize {
    match isa {
        Isa::Amx => 32,
        _ if isa.is_avx512() => 64,
        _ => LANES,
    }
}

/// Bytes of the codes of a step.
pub(super) const fn code_bytes(isa: Isa) -> usize {
    panel_width(isa) * LONG_GROUP_LEN
}

/// Bytes of a step.
pub(super) const fn step_bytes(isa: Isa) -> usize {
    code_bytes(isa) + panel_width(isa) * size_of::<f32>()
}

/// Where the codes of four features lie in a word: those of a pair in bytes of the same half of 16 bits.
const PLACES: [usize; 4] = [0, 2, 1, 3];

/// The codes of four features as a word, see [`Lanes::unpack_e4m3`].
#[inline(always)]
pub(super) fn word(codes: [u8; 4]) -> u32 {
    u32::from_le_bytes(PLACES.map(|place| codes[place]))
}

/// The scales of a step behind `weights`, in panels for tiles.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn scales(weights: *const u8, step: usize) -> *const f32 {
    weights.wrapping_add(step * step_bytes(Isa::Amx) + code_bytes(Isa::Amx)).cast()
}

/// Writes a lane of a step to `out`, at most [`LONG_GROUP_LEN`] numbers.
pub(super) fn read_group(width: usize, step: &[u8], lane: usize, out: &mut [f32]) {
    let (codes, scales) = step.split_at(width * LONG_GROUP_LEN);
    let scale = scales.as_chunks().0[lane];
    for (index, out) in out.iter_mut().enumerate() {
        let code = codes[(index / 4 * width + lane) * 4 + PLACES[index % 4]];
        *out = f32::from_ne_bytes(scale) * e4m3::to_f32(code);
    }
}

/// The micro-kernels of an instruction set, by rows - 1.
pub(super) fn tiles(isa: Isa) -> &'static [TileFn] {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 => &[
            avx512::<1, true>,
            avx512::<2, true>,
            avx512::<3, true>,
            avx512::<4, true>,
            avx512::<5, true>,
            avx512::<6, true>,
        ],
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => &[
            avx512::<1, false>,
            avx512::<2, false>,
            avx512::<3, false>,
            avx512::<4, false>,
            avx512::<5, false>,
            avx512::<6, false>,
        ],
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &[avx2::<1>, avx2::<2>, avx2::<3>, avx2::<4>],
        _ => &[portable::<1>, portable::<2>, portable::<3>, portable::<4>],
    }
}

#[cfg(target_arch = "x86_64")]
unsafe fn avx512<const R: usize, const PAIRS: bool>(tile: &Tile) {
    vectorize(Isa::Avx512, Rows::<R, 4, PAIRS>(tile));
}

#[cfg(target_arch = "x86_64")]
unsafe fn avx2<const R: usize>(tile: &Tile) {
    vectorize(Isa::Avx2, Rows::<R, 1, false>(tile));
}

unsafe fn portable<const R: usize>(tile: &Tile) {
    vectorize(Isa::Portable, Rows::<R, 1, false>(tile));
}

/// Unpacks a step to pairs of bf16 as they lie in plain panels for tiles, and asks for as many bytes from `ahead` on. Made
/// where a step can be read at `step`, and `room` has room for its pairs.
#[cfg(target_arch = "x86_64")]
pub(super) struct Unpack {
    pub(super) step: *const u8,
    pub(super) room: *mut u8,
    pub(super) ahead: *const u8,
}

#[cfg(target_arch = "x86_64")]
impl Vectorized for Unpack {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        const WIDTH: usize = panel_width(Isa::Amx);
        const NUM_LINES: usize = step_bytes(Isa::Amx) / 64;
        let Self { step, room, mut ahead } = self;
        let (codes, mut room) = (step.cast::<u32>(), room.cast::<u32>());
        for word in 0..NUM_WORDS {
            // Little by little: only some two dozen lines can be on their way to a core.
            for _ in word * NUM_LINES / NUM_WORDS..(word + 1) * NUM_LINES / NUM_WORDS {
                prefetch_early(ahead);
                ahead = ahead.wrapping_add(64);
            }
            for first in (0..WIDTH).step_by(LANES) {
                // SAFETY: by whoever made it.
                unsafe {
                    let [low, high] = simd.unpack_e4m3(simd.load_pairs(codes.add(word * WIDTH + first)));
                    simd.store_pairs(room.add(first), low);
                    simd.store_pairs(room.add(WIDTH + first), high);
                }
            }
            room = room.wrapping_add(2 * WIDTH);
        }
    }
}

/// `R` rows times a panel of `V` vectors, in `PAIRS` or one after the other. Made where the contract of `Kernel::run` holds.
struct Rows<'a, const R: usize, const V: usize, const PAIRS: bool>(&'a Tile);

impl<const R: usize, const V: usize, const PAIRS: bool> Vectorized for Rows<'_, R, V, PAIRS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let tile = self.0;
        let (mut weights, mut activations, mut ahead) = (tile.weights, tile.activations, tile.prefetch);
        let mut fetch = |num_lines: usize| {
            for _ in 0..num_lines {
                if tile.is_alone {
                    prefetch(ahead)
                } else {
                    prefetch_early(ahead)
                }
                ahead = ahead.wrapping_add(64);
            }
        };
        // Bytes of a number of x.
        let size = if PAIRS { 2 } else { 4 };
        for step in 0..tile.num_steps {
            if !tile.is_alone {
                fetch(tile.num_lines);
            }
            let mut acc = [[simd.splat(0.0); V]; R];
            for word in 0..NUM_WORDS {
                if tile.is_alone {
                    // Little by little: only some two dozen lines can be on their way to a core.
                    fetch(V);
                }
                for v in 0..V {
                    // SAFETY: a step holds so many words, `V` vectors each.
                    let codes = unsafe { simd.load_pairs(weights.cast::<u32>().add((word * V + v) * LANES)) };
                    for (half, pair) in simd.unpack_e4m3(codes).into_iter().enumerate() {
                        for (r, acc) in acc.iter_mut().enumerate() {
                            let x = activations.wrapping_add(r * tile.activation_stride + (word * 4 + half * 2) * size);
                            // SAFETY: a row holds so many numbers in each step, on multiples of their size.
                            acc[v] = unsafe {
                                if PAIRS {
                                    simd.dot_pairs(acc[v], pair, simd.splat_pair(x.cast::<u32>().read()))
                                } else {
                                    let [first, second] = x.cast::<[f32; 2]>().read();
                                    let sum = simd.fma(simd.low_pairs(pair), simd.splat(first), acc[v]);
                                    simd.fma(simd.high_pairs(pair), simd.splat(second), sum)
                                }
                            };
                        }
                    }
                }
            }
            if tile.is_alone {
                fetch(tile.num_lines - NUM_WORDS * V);
            }
            for v in 0..V {
                // SAFETY: `V` vectors of scales stand behind a step's codes, and `sums` has so many of each row.
                unsafe {
                    let scale = simd.load(weights.cast::<f32>().add((NUM_WORDS * V + v) * LANES));
                    for (r, acc) in acc.iter().enumerate() {
                        let at = tile.sums.add((r * V + v) * LANES);
                        let is_first = step == 0 && !tile.continues;
                        let sum = if is_first { simd.splat(0.0) } else { simd.load(at) };
                        simd.store(at, simd.fma(acc[v], scale, sum));
                    }
                }
            }
            weights = weights.wrapping_add((NUM_WORDS + 1) * V * LANES * 4);
            activations = activations.wrapping_add(LONG_GROUP_LEN * size);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every code in every byte of a word, on every instruction set.
    #[test]
    fn all_codes_become_the_bf16_that_they_are() {
        struct Unpack(u8);
        impl Vectorized for Unpack {
            type Output = ();
            #[inline(always)]
            fn run<S: Lanes>(self, simd: S) {
                let codes: [[u8; 4]; LANES] = std::array::from_fn(|lane| {
                    std::array::from_fn(|place| self.0.wrapping_add(lane as u8).wrapping_add((97 * place) as u8))
                });
                let words = codes.map(word);
                let pairs = codes.map(|[low, high, ..]| u16::from_le_bytes([low, high]));
                // SAFETY: the arrays have 16 elements.
                let (words, pairs, first) = unsafe {
                    (
                        simd.load_pairs(words.as_ptr()),
                        simd.load_e4m3_pairs(pairs.as_ptr()),
                        simd.load_e4m3_pairs_first(pairs.as_ptr(), 3),
                    )
                };
                let halves = |pair: S::P| [simd.low_pairs(pair), simd.high_pairs(pair)].map(|half| simd.to_array(half));
                let [a, b] = simd.unpack_e4m3(words).map(halves);
                let (pairs, first) = (halves(pairs), halves(first));
                for (lane, codes) in codes.into_iter().enumerate() {
                    let found = [a[0][lane], a[1][lane], b[0][lane], b[1][lane]];
                    for (place, code) in codes.into_iter().enumerate() {
                        let wanted = u32::from(e4m3::BF16[usize::from(code)]) << 16;
                        assert_eq!(found[place].to_bits(), wanted, "{code:#x}");
                        if let Some(half) = pairs.get(place) {
                            assert_eq!(half[lane].to_bits(), wanted, "{code:#x}");
                            assert_eq!(first[place][lane].to_bits(), if lane < 3 { wanted } else { 0 }, "{code:#x}");
                        }
                    }
                }
            }
        }
        for isa in Isa::available() {
            for code in 0..=u8::MAX {
                vectorize(isa, Unpack(code));
            }
        }
    }
}
