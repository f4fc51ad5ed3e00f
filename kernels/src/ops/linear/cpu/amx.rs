//! Micro-kernels on tiles: 16 or 32 rows of activations times one panel of 64 outputs, bf16 and fp8.
//!
//! A panel's step is a pair of features of 64 outputs, so 16 steps are four B tiles beside each other, and 64 bytes of 16 rows
//! of activations are an A tile. Weights that lie otherwise are put so first, into a buffer that stays in the level-1 cache.
//!
//! Tiles are always full: a batch of 17 rows is multiplied as if it had 32, since the few products in vain cost less than
//! telling the processor (50 ns), and nobody looks at them. So `sums` has room for whole tiles, and activations can be read
//! so far.
//!
//! Of each output the chain is that of `tdpbf16ps`: pairs in ascending order, 16 of them in one instruction. A group of fp8 is
//! such a chain from zero; groups, times their scales, are added in ascending order.

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch, _mm512_storeu_si512};

use super::compact;
use super::tile::{TILE_ROWS, Tile, TileFn};
use crate::cpu::Isa;
use crate::cpu::amx::{ROW_BYTES, tile};
use crate::cpu::lanes::{LANES, Lanes, Vectorized, vectorize};
use crate::weight_format::LONG_GROUP_LEN;

/// Steps of a B tile: words of a row of an A tile.
pub(super) const TILE_STEPS: usize = ROW_BYTES / 4;

/// Most rows of a call.
pub(super) const MAX_ROWS: usize = 2 * TILE_ROWS;

/// Input features of a stretch: 32 KiB of plain weights, which stay in the level-1 cache.
pub(super) const STRETCH_FEATURES: usize = 256;

/// Outputs of a panel.
const WIDTH: usize = 64;

/// Bytes of a step of plain weights, from a row of a B tile to the next.
const STEP_BYTES: usize = WIDTH * 4;

/// Bytes of a row of sums.
const SUMS_BYTES: usize = WIDTH * size_of::<f32>();

/// Bytes of 16 outputs, of weights in a step or of sums.
const SIXTEEN: usize = 64;

/// B tiles below each other in a group of fp8.
const GROUP_TILES: usize = LONG_GROUP_LEN / 2 / TILE_STEPS;

/// Plain weights. Of each family of functions there is one for each number of tiles of rows.
pub(super) const BF16: &[TileFn] = &[bf16::<1>, bf16::<2>];

/// Compact weights, unpacked for the tiles that come after and take [`BF16`].
pub(super) const COMPACT: &[TileFn] = &[compact_bf16::<1>, compact_bf16::<2>];

/// Weights of fp8, unpacked for the tiles that come after and take [`UNPACKED_FP8`].
pub(super) const FP8: &[TileFn] = &[fp8::<1>, fp8::<2>];

/// Weights of fp8 that are unpacked: all that is read of a panel are scales.
pub(super) const UNPACKED_FP8: &[TileFn] = &[unpacked_fp8::<1>, unpacked_fp8::<2>];

/// # Safety
/// See `Kernel::run`; the thread holds `Tiles`.
unsafe fn bf16<const R: usize>(tile: &Tile) {
    let product = Product::of(tile, tile.weights);
    let mut prefetch = tile.prefetch;
    // SAFETY: by contract; see the head of this file for what is behind the rows.
    unsafe {
        if R == 1 {
            multiply_1x4(&product, || prefetch = fetch(prefetch, tile.num_lines * TILE_STEPS));
        } else {
            let mut fetch_half = || prefetch = fetch(prefetch, tile.num_lines * TILE_STEPS / 2);
            multiply_2x2(&product, &mut fetch_half);
            multiply_2x2(&product.right_half(), &mut fetch_half);
        }
    }
}

/// # Safety
/// See `Kernel::run_unpacking`; the thread holds `Tiles`.
unsafe fn compact_bf16<const R: usize>(tile: &Tile) {
    // SAFETY: by contract; tiles come with all that this needs.
    unsafe {
        match tile.num_lines {
            0 => compact_fetching::<R, 0>(tile),
            1 => compact_fetching::<R, 1>(tile),
            2 => compact_fetching::<R, 2>(tile),
            _ => compact_fetching::<R, 3>(tile),
        }
    }
}

/// Unpacks a B tile's steps while the one before them is multiplied, and asks for `P` lines a step.
///
/// # Safety
/// See `Kernel::run_unpacking`; the thread holds `Tiles`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,gfni")]
unsafe fn compact_fetching<const R: usize, const P: usize>(tile: &Tile) {
    let product = Product::of(tile, tile.unpacked);
    let (mut weights, mut unpacked, mut prefetch) = (tile.weights, tile.unpacked, tile.prefetch);
    let mut num_packed = tile.num_steps / TILE_STEPS;
    // Two passes over 32 rows share what is to be asked for: unpacking takes the longer one.
    let later_lines = if R == 1 { 0 } else { P.div_ceil(3) };
    let mut unpack = || {
        if num_packed == 0 {
            return;
        }
        num_packed -= 1;
        for _ in 0..TILE_STEPS {
            // SAFETY: by contract there are so many steps, and room for them.
            unsafe {
                for (vector, pairs) in compact::unpack_step(weights).into_iter().enumerate() {
                    _mm512_storeu_si512(unpacked.add(vector * SIXTEEN).cast(), pairs);
                }
            }
            prefetch = fetch(prefetch, P - later_lines);
            weights = weights.wrapping_add(compact::STEP_BYTES);
            unpacked = unpacked.wrapping_add(STEP_BYTES);
        }
    };
    // SAFETY: by contract; what a product takes is unpacked one tile before.
    unsafe {
        unpack();
        if R == 1 {
            multiply_1x4(&product, unpack);
        } else {
            multiply_2x2(&product, unpack);
            multiply_2x2(&product.right_half(), || prefetch = fetch(prefetch, later_lines * TILE_STEPS));
        }
    }
}

/// # Safety
/// See `Kernel::run_unpacking`; the thread holds `Tiles`.
unsafe fn fp8<const R: usize>(tile: &Tile) {
    vectorize(Isa::Amx, super::fp8::Unpack(tile));
    // SAFETY: by contract.
    unsafe { unpacked_fp8::<R>(&Tile { num_lines: 0, ..*tile }) }
}

/// # Safety
/// See `Kernel::run`; the thread holds `Tiles`, and `tile.unpacked` has the tile's weights.
unsafe fn unpacked_fp8<const R: usize>(tile: &Tile) {
    let mut products = Products([[0.0; WIDTH]; MAX_ROWS]);
    let mut prefetch = tile.prefetch;
    for step in 0..tile.num_steps {
        // SAFETY: by contract: a step is a group.
        unsafe {
            let weights = tile.unpacked.add(step * GROUP_TILES * TILE_STEPS * STEP_BYTES);
            let activations = tile.activations.add(step * GROUP_TILES * ROW_BYTES);
            let to = products.0.as_mut_ptr().cast();
            let stride = tile.activation_stride;
            let product = Product { weights, activations, stride, num_tiles: GROUP_TILES, from: None, to };
            if R == 1 {
                multiply_1x4(&product, || ());
            } else {
                multiply_2x2(&product, || ());
                multiply_2x2(&product.right_half(), || ());
            }
            prefetch = fetch(prefetch, tile.num_lines);
            vectorize(Isa::Amx, AddGroup::<R> { tile, step, products: &products });
        }
    }
}

/// Sums of a group, [rows][outputs].
#[repr(C, align(64))]
struct Products([[f32; WIDTH]; MAX_ROWS]);

/// Adds sums of a group, times their scales, to a tile's. Made where the contract of `Kernel::run` holds.
struct AddGroup<'a, const R: usize> {
    tile: &'a Tile,
    step: usize,
    products: &'a Products,
}

impl<const R: usize> Vectorized for AddGroup<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { tile, step, products } = self;
        let is_first = step == 0 && !tile.continues;
        let scales = super::fp8::scales(tile.weights, step);
        for first in (0..WIDTH).step_by(LANES) {
            // SAFETY: a step has so many scales, and `sums` so many of each row.
            unsafe {
                let scale = simd.load(scales.add(first));
                for (row, products) in products.0[..R * TILE_ROWS].iter().enumerate() {
                    let at = tile.sums.add(row * WIDTH + first);
                    let sum = if is_first { simd.splat(0.0) } else { simd.load(at) };
                    simd.store(at, simd.fma(simd.load(products.as_ptr().add(first)), scale, sum));
                }
            }
        }
    }
}

/// A product of tiles, `num_tiles` deep, and where all of it lies.
#[derive(Clone, Copy)]
struct Product {
    weights: *const u8,
    activations: *const u8,
    stride: usize,
    num_tiles: usize,
    /// Where sums, `[R * 16][64]`, start from; else they start at zero.
    from: Option<*const u8>,
    to: *mut u8,
}

impl Product {
    /// All of a tile, with `weights` that are plain.
    fn of(tile: &Tile, weights: *const u8) -> Self {
        let to = tile.sums.cast::<u8>();
        Self {
            weights,
            activations: tile.activations,
            stride: tile.activation_stride,
            num_tiles: tile.num_steps / TILE_STEPS,
            from: tile.continues.then_some(to.cast_const()),
            to,
        }
    }

    /// That of outputs 32 to 63.
    fn right_half(&self) -> Self {
        let by = |at: *mut u8| at.wrapping_add(2 * SIXTEEN);
        Self {
            weights: by(self.weights.cast_mut()),
            from: self.from.map(|from| by(from.cast_mut()).cast_const()),
            to: by(self.to),
            ..*self
        }
    }
}

/// One tile of rows by four of outputs. Calls `beside` once for each tile of depth, ahead of its instructions.
///
/// # Safety
/// The thread holds `Tiles`, and all lies where `product` says.
#[inline(always)]
unsafe fn multiply_1x4(product: &Product, mut beside: impl FnMut()) {
    let Product { mut weights, mut activations, stride, num_tiles, from, to } = *product;
    // SAFETY: by contract.
    unsafe {
        if let Some(from) = from {
            tile!(load "tmm0", from, SUMS_BYTES);
            tile!(load "tmm1", from.add(SIXTEEN), SUMS_BYTES);
            tile!(load "tmm2", from.add(2 * SIXTEEN), SUMS_BYTES);
            tile!(load "tmm3", from.add(3 * SIXTEEN), SUMS_BYTES);
        } else {
            tile!(zero "tmm0");
            tile!(zero "tmm1");
            tile!(zero "tmm2");
            tile!(zero "tmm3");
        }
        for _ in 0..num_tiles {
            beside();
            tile!(load "tmm4", activations, stride);
            tile!(load "tmm5", weights, STEP_BYTES);
            tile!(bf16 "tmm0", "tmm4", "tmm5");
            tile!(load "tmm6", weights.add(SIXTEEN), STEP_BYTES);
            tile!(bf16 "tmm1", "tmm4", "tmm6");
            tile!(load "tmm7", weights.add(2 * SIXTEEN), STEP_BYTES);
            tile!(bf16 "tmm2", "tmm4", "tmm7");
            tile!(load "tmm5", weights.add(3 * SIXTEEN), STEP_BYTES);
            tile!(bf16 "tmm3", "tmm4", "tmm5");
            activations = activations.add(ROW_BYTES);
            weights = weights.add(TILE_STEPS * STEP_BYTES);
        }
        tile!(store "tmm0", to, SUMS_BYTES);
        tile!(store "tmm1", to.add(SIXTEEN), SUMS_BYTES);
        tile!(store "tmm2", to.add(2 * SIXTEEN), SUMS_BYTES);
        tile!(store "tmm3", to.add(3 * SIXTEEN), SUMS_BYTES);
    }
}

/// Two tiles of rows by two of outputs: each tile that is loaded is used twice. As [`multiply_1x4`].
///
/// # Safety
/// See [`multiply_1x4`].
#[inline(always)]
unsafe fn multiply_2x2(product: &Product, mut beside: impl FnMut()) {
    const LOWER: usize = TILE_ROWS * SUMS_BYTES;
    let Product { mut weights, mut activations, stride, num_tiles, from, to } = *product;
    // SAFETY: by contract.
    unsafe {
        if let Some(from) = from {
            tile!(load "tmm0", from, SUMS_BYTES);
            tile!(load "tmm1", from.add(SIXTEEN), SUMS_BYTES);
            tile!(load "tmm2", from.add(LOWER), SUMS_BYTES);
            tile!(load "tmm3", from.add(LOWER + SIXTEEN), SUMS_BYTES);
        } else {
            tile!(zero "tmm0");
            tile!(zero "tmm1");
            tile!(zero "tmm2");
            tile!(zero "tmm3");
        }
        for _ in 0..num_tiles {
            beside();
            tile!(load "tmm4", activations, stride);
            tile!(load "tmm6", weights, STEP_BYTES);
            tile!(bf16 "tmm0", "tmm4", "tmm6");
            tile!(load "tmm7", weights.add(SIXTEEN), STEP_BYTES);
            tile!(bf16 "tmm1", "tmm4", "tmm7");
            tile!(load "tmm5", activations.add(TILE_ROWS * stride), stride);
            tile!(bf16 "tmm2", "tmm5", "tmm6");
            tile!(bf16 "tmm3", "tmm5", "tmm7");
            activations = activations.add(ROW_BYTES);
            weights = weights.add(TILE_STEPS * STEP_BYTES);
        }
        tile!(store "tmm0", to, SUMS_BYTES);
        tile!(store "tmm1", to.add(SIXTEEN), SUMS_BYTES);
        tile!(store "tmm2", to.add(LOWER), SUMS_BYTES);
        tile!(store "tmm3", to.add(LOWER + SIXTEEN), SUMS_BYTES);
    }
}

/// Asks for lines that come next in memory: no further than into level 2. Returns where the next ones begin.
#[inline(always)]
fn fetch(from: *const u8, num_lines: usize) -> *const u8 {
    for line in 0..num_lines {
        // SAFETY: fetching ahead reads nothing, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(line * 64).cast()) };
    }
    from.wrapping_add(num_lines * 64)
}
