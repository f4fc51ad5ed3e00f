//! Micro-kernels on tiles: 16, 32 or 48 rows of activations times one panel of 32 outputs, bf16 and fp8.
//!
//! A panel's step is two pairs of features of 32 outputs, so 8 steps are two B tiles beside each other, and 64 bytes of 16 rows
//! of activations are an A tile: three by two of them are six tiles of sums, for which five come from further than level 1. Weights that lie
//! otherwise are put so first. A call that is alone does that a tile ahead of the one that is multiplied, so that vectors and
//! tiles are at work together.
//!
//! Tiles are always full: a batch of 17 rows is multiplied as if it had 32, since the few products in vain cost less than
//! telling the processor (50 ns), and nobody looks at them. So `sums` has room for whole tiles, as have activations.
//!
//! Of each output the chain is that of `tdpbf16ps`: pairs in ascending order, 16 of them in one instruction. A group of fp8 is
//! such a chain from zero; groups, times their scales, are added in ascending order.

pub(super) mod grouped;

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch, _mm512_storeu_si512};
use std::mem::MaybeUninit;

use super::compact::{self, Beside, Exception};
use super::fp8;
use super::tiled::{Call, TiledKernel, WIDTH};
use crate::cpu::Isa;
use crate::cpu::amx::{ROW_BYTES, TILE_BYTES, TILE_ROWS, tile};
use crate::cpu::lanes::{LANES, Lanes, Vectorized, vectorize};
use crate::weight_format::LONG_GROUP_LEN;

/// Input features of a step.
pub(super) const STEP_FEATURES: usize = 4;

/// Bytes of a step of plain weights.
pub(super) const STEP_BYTES: usize = WIDTH * STEP_FEATURES * 2;

/// Input features of a B tile, and their steps.
const TILE_FEATURES: usize = ROW_BYTES / 2;
pub(super) const TILE_STEPS: usize = TILE_FEATURES / STEP_FEATURES;

/// Bytes of a B tile and the one beside it, of plain weights.
const PAIR_BYTES: usize = TILE_STEPS * STEP_BYTES;

/// Bytes from a row of a B tile, or of sums, to the next.
const STRIDE: usize = WIDTH * 4;

/// Bytes to the next lower tile of sums.
const LOWER: usize = TILE_ROWS * STRIDE;

/// Bytes of 16 outputs in a row of a B tile or of sums.
const SIXTEEN: usize = 64;

/// Tiles of rows of a call at most.
const MAX_TILES: usize = 3;

/// After so many depths a tile is stored, to whatever end: a core that stored none for half a microsecond takes a quarter of one to
/// store the next.
const STORES_EVERY: usize = 5;

/// B tiles below each other in a group of fp8.
const GROUP_TILES: usize = LONG_GROUP_LEN / TILE_FEATURES;

/// Tiles that are unpacked and not yet multiplied, in a call that is alone, and some whose loads may still be on their way.
const NUM_ROOMS: usize = 4;

const _: () = assert!(NUM_ROOMS.is_power_of_two());

/// Plain weights.
pub(super) const BF16: TiledKernel = TiledKernel {
    alone: &[bf16::<1>, bf16::<2>, bf16::<3>],
    first: &[bf16::<1>, bf16::<2>, bf16::<3>],
    later: &[bf16::<1>, bf16::<2>, bf16::<3>],
    unpacks: false,
    depth: TILE_ROWS as u8,
    min_rows: 1,
    grain: TILE_FEATURES,
};

/// Weights of 12 bits.
pub(super) const COMPACT: TiledKernel = TiledKernel {
    alone: &[compact_bf16::<1, false>, compact_bf16::<2, false>, compact_bf16::<3, false>],
    first: &[compact_bf16::<1, true>, compact_bf16::<2, true>, compact_bf16::<3, true>],
    unpacks: true,
    ..BF16
};

/// Weights of fp8.
pub(super) const FP8: TiledKernel = TiledKernel {
    alone: &[fp8::<1, false>, fp8::<2, false>, fp8::<3, false>],
    first: &[fp8::<1, true>, fp8::<2, true>, fp8::<3, true>],
    later: &[unpacked_fp8::<1>, unpacked_fp8::<2>, unpacked_fp8::<3>],
    unpacks: true,
    grain: LONG_GROUP_LEN,
    ..BF16
};

/// # Safety
/// See `CallFn`.
unsafe fn bf16<const R: usize>(call: &Call) {
    // SAFETY: by contract.
    unsafe {
        multiply::<R>(&Product::of(call, call.num_steps / TILE_STEPS), |index| {
            call.unpacked.wrapping_add(index * PAIR_BYTES).cast_const()
        });
    }
}

/// Unpacks a B tile while the one before it is multiplied, and `KEEP`s all for the calls that come after, or none.
///
/// # Safety
/// See `CallFn`.
unsafe fn compact_bf16<const R: usize, const KEEP: bool>(call: &Call) {
    let beside = call.beside.expect("compact panels have something beside them");
    // SAFETY: by contract; tiles come with all that this needs.
    unsafe {
        if beside.holds_zeros {
            compact_tiles::<R, KEEP, true>(call, beside);
        } else {
            compact_tiles::<R, KEEP, false>(call, beside);
        }
    }
}

/// # Safety
/// See [`compact_bf16`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,gfni")]
unsafe fn compact_tiles<const R: usize, const KEEP: bool, const HOLDS_ZEROS: bool>(call: &Call, beside: &Beside) {
    let num_tiles = call.num_steps / TILE_STEPS;
    let mut unpacking = Unpacking {
        packed: call.weights,
        index: 0,
        num_tiles,
        room: call.unpacked,
        turn: if KEEP { usize::MAX } else { NUM_ROOMS - 1 },
        beside,
        first_feature: call.first_feature,
        exceptions: beside.exceptions_from(call.first_feature),
    };
    // SAFETY: by contract there is room for all tiles where they are kept; what a product takes was unpacked one tile before.
    unsafe {
        unpacking.unpack::<HOLDS_ZEROS>();
        multiply::<R>(&Product::of(call, num_tiles), |index| {
            unpacking.unpack::<HOLDS_ZEROS>();
            call.unpacked.add((index & unpacking.turn) * PAIR_BYTES).cast_const()
        });
    }
}

/// Where unpacking of a compact panel stands.
struct Unpacking<'a> {
    /// The next tile.
    packed: *const u8,
    index: usize,
    num_tiles: usize,
    /// Where tiles are unpacked: those that are equal in the bits of `turn` to the same place.
    room: *mut u8,
    turn: usize,
    beside: &'a Beside,
    /// Of the next tile.
    first_feature: usize,
    /// Those to come.
    exceptions: &'a [Exception],
}

impl Unpacking<'_> {
    /// Unpacks the next tile, if there is one.
    ///
    /// # Safety
    /// There are a tile and its room; the processor has what [`compact::unpack_for_tiles`] needs.
    #[inline(always)]
    unsafe fn unpack<const HOLDS_ZEROS: bool>(&mut self) {
        if self.index == self.num_tiles {
            return;
        }
        let room = self.room.wrapping_add((self.index & self.turn) * PAIR_BYTES);
        for step in 0..TILE_STEPS {
            let packed = self.packed.wrapping_add(step * compact::STEP_BYTES);
            fetch(packed.wrapping_add(AHEAD_BYTES), compact::STEP_BYTES / 64);
            // SAFETY: by contract.
            unsafe {
                let numbers = compact::unpack_for_tiles::<HOLDS_ZEROS>(packed);
                for (vector, numbers) in numbers.into_iter().enumerate() {
                    _mm512_storeu_si512(room.add(step * STEP_BYTES + vector * SIXTEEN).cast(), numbers);
                }
            }
        }
        if self.exceptions.first().is_some_and(|first| (first.feature as usize) < self.first_feature + TILE_FEATURES) {
            // SAFETY: by contract; those before this tile are done.
            self.exceptions = unsafe { put_exceptions(self.beside, self.exceptions, self.first_feature, room) };
        }
        self.packed = self.packed.wrapping_add(TILE_STEPS * compact::STEP_BYTES);
        self.first_feature += TILE_FEATURES;
        self.index += 1;
    }
}

/// Puts a tile's exceptions into it, and returns those that follow.
///
/// # Safety
/// The tile has room at `room`, and no exception is of an earlier feature.
#[inline(never)]
unsafe fn put_exceptions<'a>(
    beside: &Beside,
    exceptions: &'a [Exception],
    first_feature: usize,
    room: *mut u8,
) -> &'a [Exception] {
    let mut rest = exceptions;
    while let Some((exception, others)) = rest.split_first() {
        let (feature, lane) = (exception.feature as usize - first_feature, usize::from(exception.lane));
        if feature >= TILE_FEATURES {
            break;
        }
        let place = feature / 2 * STRIDE + lane * 4 + feature % 2 * 2;
        // SAFETY: a lane's pair lies in the tile.
        unsafe { room.add(place).cast::<u16>().write(beside.tile_bits(exception)) };
        rest = others;
    }
    rest
}

/// As [`compact_bf16`], a group at a time.
///
/// # Safety
/// See `CallFn`.
unsafe fn fp8<const R: usize, const KEEP: bool>(call: &Call) {
    const STEP_BYTES: usize = fp8::step_bytes(Isa::Amx);
    let room =
        |group: usize| call.unpacked.wrapping_add(if KEEP { group } else { group % 2 } * GROUP_TILES * PAIR_BYTES);
    let unpack = |group: usize| {
        if group < call.num_steps {
            let step = call.weights.wrapping_add(group * STEP_BYTES);
            let ahead = step.wrapping_add(AHEAD_BYTES);
            vectorize(Isa::Amx, fp8::Unpack { step, room: room(group), ahead });
        }
    };
    unpack(0);
    for group in 0..call.num_steps {
        unpack(group + 1);
        // SAFETY: by contract.
        unsafe { add_group::<R>(call, group, room(group)) };
    }
}

/// # Safety
/// See `CallFn`.
unsafe fn unpacked_fp8<const R: usize>(call: &Call) {
    for group in 0..call.num_steps {
        let weights = call.unpacked.wrapping_add(group * GROUP_TILES * PAIR_BYTES);
        // SAFETY: by contract.
        unsafe { add_group::<R>(call, group, weights) };
    }
}

/// Adds a group's products with plain `weights`, times the scales, to a call's sums.
///
/// # Safety
/// See `CallFn`.
#[inline(always)]
unsafe fn add_group<const R: usize>(call: &Call, group: usize, weights: *const u8) {
    let mut products = MaybeUninit::<Products>::uninit();
    // SAFETY: by contract; `multiply` fills the rows that are added.
    unsafe {
        let product = Product {
            activations: call.activations.add(group * GROUP_TILES * TILE_BYTES),
            stride: call.activation_stride,
            num_tiles: GROUP_TILES,
            from: None,
            to: products.as_mut_ptr().cast(),
        };
        multiply::<R>(&product, |index| weights.add(index * PAIR_BYTES));
        vectorize(Isa::Amx, AddGroup::<R> { call, group, products: products.as_ptr() });
    }
}

/// Sums of a group, `[rows][outputs]`.
#[repr(C, align(64))]
struct Products([[f32; WIDTH]; MAX_TILES * TILE_ROWS]);

/// Adds sums of a group, times their scales, to a call's. Made where the contract of `CallFn` holds, and `products` has
/// `R` tiles of rows.
struct AddGroup<'a, const R: usize> {
    call: &'a Call<'a>,
    group: usize,
    products: *const Products,
}

impl<const R: usize> Vectorized for AddGroup<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { call, group, products } = self;
        let is_first = group == 0 && !call.continues;
        let (scales, products) = (fp8::scales(call.weights, group), products.cast::<f32>());
        for first in (0..WIDTH).step_by(LANES) {
            // SAFETY: by whoever made it.
            unsafe {
                let scale = simd.load(scales.add(first));
                for number in (first..R * TILE_ROWS * WIDTH).step_by(WIDTH) {
                    let at = call.sums.add(number);
                    let sum = if is_first { simd.splat(0.0) } else { simd.load(at) };
                    simd.store(at, simd.fma(simd.load(products.add(number)), scale, sum));
                }
            }
        }
    }
}

/// A product of tiles, `num_tiles` deep, and where all of it but weights lies.
struct Product {
    activations: *const u8,
    /// Bytes to the activations of the next 16 rows.
    stride: usize,
    num_tiles: usize,
    /// Where sums, `[R * 16][WIDTH]`, start from; else they start at zero.
    from: Option<*const u8>,
    to: *mut u8,
}

impl Product {
    /// All of a call.
    fn of(call: &Call, num_tiles: usize) -> Self {
        let to = call.sums.cast::<u8>();
        Self {
            activations: call.activations,
            stride: call.activation_stride,
            num_tiles,
            from: call.continues.then_some(to.cast_const()),
            to,
        }
    }
}

/// `R` tiles of rows by two of outputs. `weights` is asked once for each depth where its plain B tiles lie, ahead of the
/// instructions that take them. `to` holds anything until all is done.
///
/// # Safety
/// The thread holds `Tiles` of depth [`TILE_ROWS`], and all lies where `product` and `weights` say.
#[inline(always)]
unsafe fn multiply<const R: usize>(product: &Product, mut weights: impl FnMut(usize) -> *const u8) {
    let Product { mut activations, stride, num_tiles, from, to } = *product;
    // SAFETY: by contract.
    unsafe {
        if let Some(from) = from {
            load::<R>(from);
        } else {
            zero::<R>();
        }
        for index in 0..num_tiles {
            let weights = weights(index);
            if R == 3 {
                // Six tiles of sums leave two. What is loaded twice comes from level 1 the second time.
                tile!(load "tmm6", activations, ROW_BYTES);
                tile!(load "tmm7", weights, STRIDE);
                tile!(bf16 "tmm0", "tmm6", "tmm7");
                tile!(load "tmm7", weights.add(SIXTEEN), STRIDE);
                tile!(bf16 "tmm1", "tmm6", "tmm7");
                tile!(load "tmm6", activations.add(stride), ROW_BYTES);
                tile!(bf16 "tmm3", "tmm6", "tmm7");
                tile!(load "tmm7", weights, STRIDE);
                tile!(bf16 "tmm2", "tmm6", "tmm7");
                tile!(load "tmm6", activations.add(2 * stride), ROW_BYTES);
                tile!(bf16 "tmm4", "tmm6", "tmm7");
                tile!(load "tmm7", weights.add(SIXTEEN), STRIDE);
                tile!(bf16 "tmm5", "tmm6", "tmm7");
            } else {
                tile!(load "tmm4", activations, ROW_BYTES);
                tile!(load "tmm6", weights, STRIDE);
                tile!(bf16 "tmm0", "tmm4", "tmm6");
                tile!(load "tmm7", weights.add(SIXTEEN), STRIDE);
                tile!(bf16 "tmm1", "tmm4", "tmm7");
                if R == 2 {
                    tile!(load "tmm5", activations.add(stride), ROW_BYTES);
                    tile!(bf16 "tmm2", "tmm5", "tmm6");
                    tile!(bf16 "tmm3", "tmm5", "tmm7");
                }
            }
            if index % STORES_EVERY == STORES_EVERY - 1 {
                tile!(store "tmm6", to, STRIDE);
            }
            activations = activations.add(TILE_BYTES);
        }
        store::<R>(to);
    }
}

/// Tiles of sums to zero.
///
/// # Safety
/// The thread holds `Tiles`.
#[inline(always)]
unsafe fn zero<const R: usize>() {
    // SAFETY: by contract.
    unsafe {
        tile!(zero "tmm0");
        tile!(zero "tmm1");
        if R >= 2 {
            tile!(zero "tmm2");
            tile!(zero "tmm3");
        }
        if R == 3 {
            tile!(zero "tmm4");
            tile!(zero "tmm5");
        }
    }
}

/// Tiles of sums from memory, as [`store`] leaves them.
///
/// # Safety
/// The thread holds `Tiles`; they are there.
#[inline(always)]
unsafe fn load<const R: usize>(from: *const u8) {
    // SAFETY: by contract.
    unsafe {
        tile!(load "tmm0", from, STRIDE);
        tile!(load "tmm1", from.add(SIXTEEN), STRIDE);
        if R >= 2 {
            tile!(load "tmm2", from.add(LOWER), STRIDE);
            tile!(load "tmm3", from.add(LOWER + SIXTEEN), STRIDE);
        }
        if R == 3 {
            tile!(load "tmm4", from.add(2 * LOWER), STRIDE);
            tile!(load "tmm5", from.add(2 * LOWER + SIXTEEN), STRIDE);
        }
    }
}

/// Tiles of sums, `R` of rows by two of outputs, to memory.
///
/// # Safety
/// The thread holds `Tiles`; `to` has room for `[R * 16][WIDTH]`.
#[inline(always)]
unsafe fn store<const R: usize>(to: *mut u8) {
    // SAFETY: by contract.
    unsafe {
        tile!(store "tmm0", to, STRIDE);
        tile!(store "tmm1", to.add(SIXTEEN), STRIDE);
        if R >= 2 {
            tile!(store "tmm2", to.add(LOWER), STRIDE);
            tile!(store "tmm3", to.add(LOWER + SIXTEEN), STRIDE);
        }
        if R == 3 {
            tile!(store "tmm4", to.add(2 * LOWER), STRIDE);
            tile!(store "tmm5", to.add(2 * LOWER + SIXTEEN), STRIDE);
        }
    }
}

/// How far ahead a panel is asked for: what memory takes to answer, at its pace. Only who unpacks asks: what is on its way from
/// memory keeps others waiting that come from level 2.
const AHEAD_BYTES: usize = 8192;

/// Asks for lines that come next in memory: no further than into level 2.
#[inline(always)]
fn fetch(from: *const u8, num_lines: usize) {
    for line in 0..num_lines {
        // SAFETY: fetching ahead reads nothing, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(line * 64).cast()) };
    }
}
