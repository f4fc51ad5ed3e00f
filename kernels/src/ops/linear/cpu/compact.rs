//! Weights of bf16 in 12 bits a number, none lost: a stream of decodes is as fast as its weights can be read.
//!
//! A bf16 is a sign, 8 bits of exponent and 7 of fraction. Trained weights use few exponents: those of a panel nearly
//! all lie in a [`Window`] of 15 neighbours, so 4 bits say which of them it is, or that it is the exponent of zero. The few
//! numbers outside ([`Exception`]s) are zeros in the panel, and are kept beside it as they are. (That exponents of
//! weights hold less than three bits of information: Zhang et al. 2025, "70% Size, 100% Accuracy", who use codes of
//! varying length. A fixed length is what vectors can unpack at the pace of memory.)
//!
//! A number is kept as `sign << 15 | exponent_code << 7 | fraction`, which is a bf16 again: its own times a power of two
//! that is the panel's, and zero for the code 0. So unpacking is one `and`, and the power of two is made up for once in
//! each finished sum. The least of these bf16 is 2^-126; activations are multiplied by 2^64, so that products stay far from
//! both ends of f32. Scaling by powers of two rounds nothing: sums have the bits that plain weights give. (An activation
//! beyond 2^64 overflows, and so does its product with an exception; the row is then not finite.)
//!
//! Four of the 16 bits are not used. A step is two features of 64 lanes, or four of 32, as with plain weights: four vectors
//! of 32 numbers become three lines `A`, `B`, `C` of 16-bit words, whose bits 11 to 14 together are the fourth vector's: bits
//! 0 to 3 in `A`, 4 to 7 in `B`, 8 to 10 and the sign in `C`. Nothing moves between lanes.
//!
//! Sums stay one chain per output: the panel's products in ascending order of features, then its exceptions' likewise.
//!
//! Tiles (AMX) take whole blocks of numbers from memory, so exceptions are put into their places when a block is unpacked, and are
//! products like the others. Numbers then have the exponent [`TILE_EXPONENT`] plus their code, which leaves room on both sides for those
//! that a window does not hold. It is set by the instruction that takes the number from its word; a zero, which has no code of its own
//! then, is an exception too, or told apart by two more instructions in panels with many. No activation is scaled for tiles.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

#[cfg(target_arch = "x86_64")]
use super::tile::{Tile, fetch_ahead, load_avx512, store_avx512};
use crate::cpu::lanes::{LANES, prefetch};

/// Bytes of a step: three lines for what plain weights need four for.
pub(super) const STEP_BYTES: usize = 192;

/// Bytes of a step of plain weights, and of an unpacked one.
pub(super) const PLAIN_STEP_BYTES: usize = 256;

/// From so many tiles on it is faster to unpack a stretch once, for all of them, than once for each.
pub(super) const MIN_TILES_TO_UNPACK: usize = 3;

/// Of so many numbers at most one may be an exception; a matrix with more stays plain. Some 1 in 5,000 is of numbers
/// that are distributed normally.
pub(super) const NUMBERS_PER_EXCEPTION: usize = 1024;

/// Lines of exceptions that are asked for ahead: few have more.
const MAX_LINES_AHEAD: usize = 16;

/// Exponents that a window holds, beside that of zero.
const WINDOW_LEN: usize = 15;

const FRACTION_BITS: u32 = 7;
const FRACTION: u16 = (1 << FRACTION_BITS) - 1;
const SIGN: u16 = 1 << 15;
/// Bits of a number in a word: the others belong to the fourth vector.
const NUMBER: u16 = SIGN | 0x7ff;
/// Where those others begin.
const SPARE_BIT: u32 = 11;

/// What activations are multiplied by, 2^64.
pub(super) const ACTIVATION_SCALE: f32 = (1_u128 << 64) as f32;

/// Tiles take numbers with this exponent plus their code: near 1, where products are far from both ends of f32. It is set by
/// an `or`, so its lowest four bits are zero.
#[cfg(target_arch = "x86_64")]
const TILE_EXPONENT: u16 = 112;

/// Lanes of numbers in a line: two features of [`LANES`] outputs.
const LINE_LEN: usize = 2 * LANES;

/// A number of a panel that its window does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exception {
    pub(super) feature: u32,
    pub(super) lane: u16,
    /// The bf16.
    pub(super) bits: u16,
}

/// The exponents `lowest..lowest + 15` of a panel. `lowest` is 1 to [`Window::MAX_LOWEST`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    lowest: u16,
}

/// What a panel needs beside its lines.
pub(super) struct Beside {
    window: Window,
    /// In ascending order of features for each lane; of all lanes where tiles take them.
    pub(super) exceptions: Vec<Exception>,
    /// Whether tiles are to tell zeros by their code; else zeros are among the exceptions.
    #[cfg(target_arch = "x86_64")]
    pub(super) holds_zeros: bool,
}

impl Beside {
    pub(super) fn new(window: Window) -> Self {
        Self {
            window,
            exceptions: Vec::new(),
            #[cfg(target_arch = "x86_64")]
            holds_zeros: true,
        }
    }

    /// Asks for the exceptions, which lie elsewhere than the panel and are wanted when it is through.
    pub(super) fn fetch_ahead(&self) {
        for line in self.exceptions.chunks(64 / size_of::<Exception>()).take(MAX_LINES_AHEAD) {
            prefetch(line.as_ptr().cast());
        }
    }

    /// The exceptions of a feature and those that follow.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn exceptions_from(&self, feature: usize) -> &[Exception] {
        let first = self.exceptions.partition_point(|exception| (exception.feature as usize) < feature);
        &self.exceptions[first..]
    }

    /// Makes a panel of so many numbers, whose zeros are exceptions so far, ready for tiles: sorts exceptions, and leaves zeros to
    /// unpacking where there are many. Returns how many are no zeros, or `None` where tiles cannot take one.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn settle(&mut self, num_numbers: usize) -> Option<usize> {
        let is_zero = |exception: &Exception| exception.bits & !SIGN == 0;
        let num_zeros = self.exceptions.iter().filter(|exception| is_zero(exception)).count();
        let num_others = self.exceptions.len() - num_zeros;
        self.holds_zeros = num_zeros > num_numbers / NUMBERS_PER_EXCEPTION;
        if self.holds_zeros {
            self.exceptions.retain(|exception| !is_zero(exception));
            self.exceptions.shrink_to_fit();
        }
        self.exceptions.sort_unstable_by_key(|exception| (exception.feature, exception.lane));
        let is_possible = |exception: &Exception| match exponent(exception.bits) {
            0 => true,
            // An infinity, or no number.
            255 => false,
            normal => (1..255).contains(&(i32::from(normal) + i32::from(self.window.tile_shift()))),
        };
        self.exceptions.iter().all(is_possible).then_some(num_others)
    }

    /// The bits of an exception as tiles take it: scaled as the panel is.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn tile_bits(&self, exception: &Exception) -> u16 {
        match exponent(exception.bits) {
            // What is less than a normal number is zero to tiles.
            0 => exception.bits & SIGN,
            _ => exception.bits.wrapping_add_signed(self.window.tile_shift() << FRACTION_BITS),
        }
    }

    /// [`Beside::sum_scale`] where tiles multiplied.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn tile_sum_scale(&self) -> f32 {
        f32::from_bits(((127 - i32::from(self.window.tile_shift())) as u32) << 23)
    }

    /// What finished sums are to be multiplied by.
    pub(super) fn sum_scale(&self) -> f32 {
        1.0 / (self.window.scale() * ACTIVATION_SCALE)
    }

    /// The number at a lane (of `width`) and a feature of a step; zero for an exception.
    pub(super) fn number(&self, step: &[u8], width: usize, lane: usize, feature: usize) -> u16 {
        let (vector, place) = (vector(width, lane, feature), lane % LANES * 2 + feature % 2);
        let word = |line: usize| {
            let at = (line * LINE_LEN + place) * 2;
            u16::from_ne_bytes([step[at], step[at + 1]])
        };
        let spare = |line: usize| word(line) >> SPARE_BIT & 15;
        let number = match vector {
            3 => spare(0) | spare(1) << 4 | (spare(2) & 7) << 8 | spare(2) >> 3 << 15,
            _ => word(vector) & NUMBER,
        };
        match exponent(number) {
            0 => number,
            code => number & (SIGN | FRACTION) | (self.window.lowest + code - 1) << FRACTION_BITS,
        }
    }

    /// Adds the exceptions' products to finished sums, `[rows][width]`, before those are scaled.
    ///
    /// # Safety
    /// `x` gives, for every exception's feature, where the first row has it in bf16; the other rows' lie `stride` bytes apart.
    #[inline(always)]
    pub(super) unsafe fn add_exceptions(
        &self,
        width: usize,
        sums: &mut [f32],
        stride: usize,
        x: impl Fn(usize) -> *const u8,
    ) {
        let scale = self.window.scale();
        for &Exception { feature, lane, bits } in &self.exceptions {
            let weight = from_bf16(bits);
            let first = x(feature as usize);
            for (row, sums) in sums.chunks_exact_mut(width).enumerate() {
                // SAFETY: by contract.
                let x = unsafe { first.add(row * stride).cast::<u16>().read() };
                // A product of two bf16 is exact in f32.
                sums[usize::from(lane)] += from_bf16(x) * weight * scale;
            }
        }
    }
}

/// Which of a step's four vectors holds a lane's feature.
fn vector(width: usize, lane: usize, feature: usize) -> usize {
    feature / 2 * (width / LANES) + lane / LANES
}

fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

fn exponent(bits: u16) -> u16 {
    bits >> FRACTION_BITS & 0xff
}

/// The one around numbers near 1.
impl Default for Window {
    fn default() -> Self {
        Self { lowest: 119 }
    }
}

impl Window {
    /// With the one before it, what numbers are divided by is a normal f32, and so is what sums are multiplied by.
    const MAX_LOWEST: u16 = 127;

    /// The window that holds most of the numbers counted by exponent; the middle one of several.
    pub(super) fn of(counts: &[u32; 256]) -> Self {
        let all = 1..=Self::MAX_LOWEST;
        let held = |lowest: u16| -> u64 {
            counts[usize::from(lowest)..][..WINDOW_LEN].iter().map(|&count| u64::from(count)).sum()
        };
        let most = all.clone().map(held).max().expect("there are windows");
        let mut best = all.filter(|&lowest| held(lowest) == most);
        let num_best = best.clone().count();
        Self { lowest: best.nth((num_best - 1) / 2).expect("one of them has the most") }
    }

    /// What is added to exponents for tiles: the code of the lowest, 1, becomes [`TILE_EXPONENT`] + 1.
    #[cfg(target_arch = "x86_64")]
    fn tile_shift(self) -> i16 {
        TILE_EXPONENT as i16 + 1 - self.lowest as i16
    }

    /// What numbers are multiplied by when they are put into a panel: 2^(1 - lowest).
    fn scale(self) -> f32 {
        f32::from_bits(u32::from(128 - self.lowest) << 23)
    }

    /// A bf16 as it lies in a word, or `None` where the window does not hold it.
    #[inline(always)]
    fn held(self, bits: u16) -> Option<u16> {
        let place = exponent(bits).wrapping_sub(self.lowest);
        let is_zero = bits & !SIGN == 0;
        let is_held = is_zero || usize::from(place) < WINDOW_LEN;
        let exponent_code = if is_zero { 0 } else { place.wrapping_add(1) & 15 };
        is_held.then_some(bits & (SIGN | FRACTION) | exponent_code << FRACTION_BITS)
    }

    /// Puts pairs of numbers, one for each of 16 lanes (of `width`) from `first_lane` on, into a step that is zero there.
    /// `first_feature` is the first of a pair, and `step_features` are those of a step. Numbers outside the window become
    /// exceptions, and so do zeros with `zeros_are_exceptional`, which are held all the same.
    #[inline(always)]
    pub(super) fn put(
        self,
        pairs: &[u32; LANES],
        step: &mut [u8],
        (width, first_lane): (usize, usize),
        (step_features, first_feature): (usize, usize),
        zeros_are_exceptional: bool,
        exceptions: &mut Vec<Exception>,
    ) {
        let mut numbers = [0_u16; LINE_LEN];
        let mut all_held = true;
        for (numbers, &pair) in numbers.as_chunks_mut::<2>().0.iter_mut().zip(pairs) {
            for (number, bits) in numbers.iter_mut().zip([pair as u16, (pair >> 16) as u16]) {
                let held = self.held(bits);
                *number = held.unwrap_or(0);
                all_held &= held.is_some() && !(zeros_are_exceptional && bits & !SIGN == 0);
            }
        }
        if !all_held {
            for feature in 0..2 {
                for (lane, &pair) in pairs.iter().enumerate() {
                    let bits = (pair >> (16 * feature)) as u16;
                    if self.held(bits).is_none() || (zeros_are_exceptional && bits & !SIGN == 0) {
                        let (feature, lane) = ((first_feature + feature) as u32, (first_lane + lane) as u16);
                        exceptions.push(Exception { feature, lane, bits });
                    }
                }
            }
        }
        let mut or = |line: usize, part: fn(u16) -> u16| {
            let line = &mut step[line * 64..][..64];
            for (target, &number) in line.as_chunks_mut::<2>().0.iter_mut().zip(&numbers) {
                *target = (u16::from_ne_bytes(*target) | part(number)).to_ne_bytes();
            }
        };
        match vector(width, first_lane, first_feature % step_features) {
            3 => {
                or(0, |number| (number & 15) << SPARE_BIT);
                or(1, |number| (number >> 4 & 15) << SPARE_BIT);
                or(2, |number| (number >> 8 & 7 | number >> 15 << 3) << SPARE_BIT);
            }
            vector => or(vector, |number| number),
        }
    }
}

/// Counts the exponents of pairs of numbers; zeros do not need a window.
pub(super) fn count_exponents(pairs: &[u32], counts: &mut [u32; 256]) {
    for &pair in pairs {
        counts[usize::from(exponent(pair as u16))] += 1;
        counts[usize::from(exponent((pair >> 16) as u16))] += 1;
    }
    counts[0] = 0;
}

/// `R` rows; fetches `P` lines ahead per step. The steps of plain weights but for their unpacking.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,gfni")]
pub(super) unsafe fn avx512_pairs<const R: usize, const P: usize>(tile: &Tile) {
    // SAFETY: see `Kernel::run`.
    unsafe { avx512_steps::<R, P, false>(tile) }
}

/// The same, and leaves what it unpacked to the tiles that come after it.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,gfni")]
pub(super) unsafe fn avx512_unpacking<const R: usize, const P: usize>(tile: &Tile) {
    // SAFETY: see `Kernel::run`.
    unsafe { avx512_steps::<R, P, true>(tile) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,gfni")]
unsafe fn avx512_steps<const R: usize, const P: usize, const UNPACK: bool>(tile: &Tile) {
    // SAFETY: see `Kernel::run`; loads and stores are unaligned ones.
    unsafe {
        let mut acc = load_avx512::<R>(tile);
        let mut weights = tile.weights;
        let mut prefetch = tile.prefetch;
        let mut activations = tile.activations;
        let mut unpacked = tile.unpacked;
        for _ in 0..tile.num_steps {
            let w = unpack_step::<0, 0>(weights);
            fetch_ahead::<P>(prefetch, P == 3);
            if UNPACK {
                for (v, w) in w.iter().enumerate() {
                    _mm512_storeu_si512(unpacked.add(v * 64).cast(), *w);
                }
                unpacked = unpacked.add(PLAIN_STEP_BYTES);
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let pair = activations.add(r * tile.activation_stride).cast::<i32>().read();
                let pair: __m512bh = std::mem::transmute(_mm512_set1_epi32(pair));
                for (acc, w) in acc.iter_mut().zip(w) {
                    *acc = _mm512_dpbf16_ps(*acc, pair, std::mem::transmute::<__m512i, __m512bh>(w));
                }
            }
            weights = weights.add(STEP_BYTES);
            activations = activations.add(4);
            prefetch = prefetch.wrapping_add(P * 64);
        }
        store_avx512(tile, &acc);
    }
}

/// The pairs of a step, as they lie in one of plain weights, with exponents that are their codes plus `EXPONENT` (a multiple
/// of 16, the upper byte of whose bf16 is `EXPONENT_BYTE`), zeros among them.
///
/// # Safety
/// A step can be read at `weights`.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,gfni")]
pub(super) unsafe fn unpack_step<const EXPONENT: i32, const EXPONENT_BYTE: i32>(weights: *const u8) -> [__m512i; 4] {
    // In every byte, bits 3 to 5 go to 0 to 2, and bit 6 to 7; others become zero. (Byte 7 - i chooses the source of bit i.)
    const UPPER: i64 = i64::from_le_bytes([1 << 6, 0, 0, 0, 0, 1 << 5, 1 << 4, 1 << 3]);
    // Of three bits a, b, mask: a where the mask is 1, else b.
    const SELECT: i32 = 0b1110_0100;
    // `a & b | c` of three bits.
    const PART_OR: i32 = 0b1110_1010;
    let number = _mm512_set1_epi16(NUMBER as i16);
    let exponent = _mm512_set1_epi16((EXPONENT << FRACTION_BITS) as i16);
    let (lowest_bits, low_byte) = (_mm512_set1_epi16(0xf), _mm512_set1_epi16(0xff));
    // SAFETY: by contract.
    let [a, b, c] = std::array::from_fn(|line| unsafe { _mm512_loadu_si512(weights.add(line * 64).cast()) });
    let lower = _mm512_ternarylogic_epi32::<SELECT>(
        _mm512_srli_epi16::<SPARE_BIT>(a),
        _mm512_srli_epi16::<{ SPARE_BIT - 4 }>(b),
        lowest_bits,
    );
    // An exponent's upper bits are in the upper byte; what becomes of lower bytes is not taken.
    let upper = _mm512_gf2p8affine_epi64_epi8::<EXPONENT_BYTE>(c, _mm512_set1_epi64(UPPER));
    [
        _mm512_ternarylogic_epi32::<PART_OR>(a, number, exponent),
        _mm512_ternarylogic_epi32::<PART_OR>(b, number, exponent),
        _mm512_ternarylogic_epi32::<PART_OR>(c, number, exponent),
        _mm512_ternarylogic_epi32::<SELECT>(lower, upper, low_byte),
    ]
}

/// The pairs of a step as tiles take them, but for exceptions. Zeros where the panel `HOLDS_ZEROS`.
///
/// # Safety
/// A step can be read at `weights`.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,gfni")]
pub(super) unsafe fn unpack_for_tiles<const HOLDS_ZEROS: bool>(weights: *const u8) -> [__m512i; 4] {
    // SAFETY: by contract.
    unsafe {
        if HOLDS_ZEROS {
            let unsigned = _mm512_set1_epi16(!SIGN as i16);
            let exponent = _mm512_set1_epi16((TILE_EXPONENT << FRACTION_BITS) as i16);
            unpack_step::<0, 0>(weights)
                .map(|number| _mm512_mask_add_epi16(number, _mm512_test_epi16_mask(number, unsigned), number, exponent))
        } else {
            unpack_step::<{ TILE_EXPONENT as i32 }, { (TILE_EXPONENT >> 1) as i32 }>(weights)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step of pairs, `[64]`, as it is packed and read again.
    fn round_trip(window: Window, pairs: &[u32; 64]) -> (Vec<u32>, Vec<Exception>) {
        let mut step = [0; STEP_BYTES];
        let mut beside = Beside::new(window);
        for (group, pairs) in pairs.as_chunks::<LANES>().0.iter().enumerate() {
            window.put(pairs, &mut step, (64, group * LANES), (2, 6), false, &mut beside.exceptions);
        }
        let number = |lane, feature| u32::from(beside.number(&step, 64, lane, feature));
        ((0..64).map(|lane| number(lane, 0) | number(lane, 1) << 16).collect(), beside.exceptions)
    }

    #[test]
    fn every_bf16_is_held_or_an_exception() {
        let window = Window { lowest: 113 };
        for first in (0..=u16::MAX).step_by(128) {
            let pairs: [u32; 64] = std::array::from_fn(|lane| {
                let low = first + 2 * lane as u16;
                u32::from(low) | u32::from(low + 1) << 16
            });
            let (read, mut exceptions) = round_trip(window, &pairs);
            let is_held = (113..128).contains(&exponent(first));
            let mut missing = Vec::new();
            for (lane, (read, pair)) in read.iter().zip(pairs).enumerate() {
                for feature in 0..2 {
                    let (read, bits) = ((read >> (16 * feature)) as u16, (pair >> (16 * feature)) as u16);
                    if is_held || bits & !SIGN == 0 {
                        assert_eq!(read, bits, "lane {lane}");
                    } else {
                        assert_eq!(read, 0, "lane {lane}");
                        missing.push(Exception { feature: 6 + feature, lane: lane as u16, bits });
                    }
                }
            }
            // Within a lane they come in the order of features.
            exceptions.sort_by_key(|exception| exception.lane);
            assert_eq!(exceptions, missing, "{first:#x}");
        }
    }

    #[test]
    fn the_window_is_where_most_numbers_are() {
        let window = |counted: &[(usize, u32)]| {
            let mut counts = [0; 256];
            counted.iter().for_each(|&(exponent, count)| counts[exponent] = count);
            Window::of(&counts).lowest
        };
        assert_eq!(window(&[(110, 1), (120, 900), (121, 900), (134, 5), (135, 4)]), 120, "what is seldom is left out");
        assert_eq!(window(&[(100, 7), (114, 7)]), 100, "both ends are held");
        assert_eq!(window(&[(120, 3)]), 113, "room on both sides");
        assert_eq!(window(&[]), 64, "any will do");
        assert_eq!(window(&[(255, 1), (254, 9)]), 64, "numbers so large are never held");
        assert_eq!(window(&[(1, 1)]), 1);
    }

    #[test]
    fn scales_are_powers_of_two_that_cancel() {
        for lowest in [1, 64, 113, Window::MAX_LOWEST] {
            let beside = Beside::new(Window { lowest });
            let scale = beside.window.scale();
            assert!(scale.is_normal() && scale.log2() == 1.0 - f32::from(lowest), "{lowest}");
            assert!(beside.sum_scale().is_normal(), "{lowest}");
            assert_eq!(beside.sum_scale() * ACTIVATION_SCALE * scale, 1.0, "{lowest}");
        }
    }
}
