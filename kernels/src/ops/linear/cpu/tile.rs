//! Micro-kernels: a few rows of activations times one panel of weights, sums held in registers.
//!
//! | kernel        | panel | tile | a step is        | weights of a step          |
//! |---------------|-------|------|------------------|----------------------------|
//! | AMX, bf16 and fp8 | 32 | 48x32 | four features   | as the next; see [`super::tiled`] |
//! | AVX-512 BF16, bf16 | 64 | 6x64 | two features    | `[64][2]` in 12 bits each ([`compact`]), or plain; `vdpbf16ps` |
//! | AVX-512, bf16 | 64    | 6x64 | two features     | `[64][2]` bf16, widened, FMA |
//! | AVX-512, f32  | 64    | 6x64 | one feature      | `[64]` f32, FMA            |
//! | AVX2, bf16    | 16    | 6x16 | two features     | `[16][2]` bf16, widened, FMA |
//! | AVX2, f32     | 16    | 6x16 | one feature      | `[16]` f32, FMA            |
//! | portable      | 16    | 4x16 | as AVX2          | as AVX2                    |
//!
//! Weights that are codes with scales have kernels of their own, see [`grouped`] and [`fp8`].
//!
//! A step loads the panel's weights once, and broadcasts one activation (or pair) per row over them. 24 accumulators of
//! 6x64, four weights and a broadcast fill the 32 registers; a dot product of bf16 pairs has a latency of 6 cycles on
//! Zen 4, so 8 chains already run at full rate. Every accumulator is one chain over the steps in ascending order, in every
//! tile shape: rows are never summed differently because of their neighbours.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

#[cfg(target_arch = "x86_64")]
use super::amx;
#[cfg(target_arch = "x86_64")]
use super::compact::{avx512_pairs as avx512_compact_pairs, avx512_unpacking};
#[cfg(target_arch = "x86_64")]
use super::tiled::{self, TiledKernel};
use super::{compact, fp8, grouped};
use crate::WeightFormat;
use crate::cpu::Isa;
use crate::cpu::lanes::bf16_bits;
use crate::weight_format::LONG_GROUP_LEN;

/// The widest panel of any kernel.
pub(super) const MAX_PANEL_WIDTH: usize = 64;

/// The arguments of one micro-kernel.
pub(super) struct Tile {
    /// First row, at the first step.
    pub(super) activations: *const u8,
    /// Bytes from a row to the next.
    pub(super) activation_stride: usize,
    /// The panel at the first step.
    pub(super) weights: *const u8,
    pub(super) num_steps: usize,
    /// Where [`Kernel::run_unpacking`] leaves its weights.
    pub(super) unpacked: *mut u8,
    /// `[rows][panel_width]`, in and out.
    pub(super) sums: *mut f32,
    /// Whether `sums` holds the chains so far; else they start at zero.
    pub(super) continues: bool,
    /// Where to fetch ahead from, `num_lines` cache lines per step. May point anywhere.
    pub(super) prefetch: *const u8,
    /// At most the lines of a step.
    pub(super) num_lines: usize,
    /// Whether what is fetched ahead is wanted in a moment, since no other tile comes between.
    pub(super) is_alone: bool,
}

#[cfg(target_arch = "x86_64")]
impl Tile {
    /// Fetches `num_lines` lines ahead, and returns where the next ones begin.
    #[inline(always)]
    pub(super) fn fetch_lines(&self, from: *const u8, num_lines: usize) -> *const u8 {
        for line in 0..num_lines {
            fetch_line(from.wrapping_add(line * 64), self.is_alone);
        }
        from.wrapping_add(num_lines * 64)
    }
}

pub(super) type TileFn = unsafe fn(&Tile);

/// One function per number of rows.
macro_rules! tiles {
    ($name:ident $(, $arg:expr)?) => {
        [
            $name::<1 $(, $arg)?>,
            $name::<2 $(, $arg)?>,
            $name::<3 $(, $arg)?>,
            $name::<4 $(, $arg)?>,
            $name::<5 $(, $arg)?>,
            $name::<6 $(, $arg)?>,
        ]
    };
}

/// [`tiles`] for each number of lines fetched ahead.
#[cfg(target_arch = "x86_64")]
macro_rules! by_lines {
    ($name:ident) => {
        [tiles!($name, 0), tiles!($name, 1), tiles!($name, 2), tiles!($name, 3), tiles!($name, 4)]
    };
}

/// How activations are laid out for a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ActivationForm {
    /// As they come: rows of f32.
    Exact,
    /// In the workspace, rounded to bf16: as such where the kernel multiplies pairs of them, else as f32.
    Bf16,
    /// In the workspace, rounded to bf16 and multiplied by [`compact::ACTIVATION_SCALE`].
    ScaledBf16,
    /// In the workspace, as codes with a scale for each so many of them.
    Quantized { group_len: usize },
}

/// The micro-kernels for one instruction set and weight format, and the layout that they read.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub(super) panel_width: usize,
    pub(super) max_tile_rows: usize,
    /// A panel has a multiple of so many steps.
    pub(super) step_multiple: usize,
    /// The micro-kernels on tiles, which are used for their numbers of rows where there are some.
    #[cfg(target_arch = "x86_64")]
    pub(super) tiled: Option<&'static TiledKernel>,
    /// Input features of a step: 2 where pairs are interleaved, a group where they share a scale.
    pub(super) features_per_step: usize,
    /// Bytes of one step of a panel: whole cache lines.
    pub(super) step_bytes: usize,
    pub(super) activations: ActivationForm,
    /// Bytes that a row of activations moves on per step.
    pub(super) activation_step_bytes: usize,
    /// Whether weights lie in 12 bits a number, see [`compact`].
    pub(super) is_compact: bool,
    tiles: Tiles,
    /// Those of a compact kernel that unpack for others, and the others.
    unpacking: Option<(Tiles, Tiles)>,
}

/// Functions by rows - 1.
#[derive(Clone, Copy)]
enum Tiles {
    /// By lines fetched ahead per step, too.
    Dense(&'static [[TileFn; 6]; 5]),
    Grouped(&'static [TileFn]),
}

impl Tiles {
    fn function(&self, num_rows: usize, tile: &Tile) -> TileFn {
        match self {
            Self::Dense(tiles) => tiles[tile.num_lines][num_rows - 1],
            Self::Grouped(tiles) => tiles[num_rows - 1],
        }
    }
}

impl Kernel {
    /// The one that reads the fewest bytes: what a weight is packed for, but for one that does not become compact.
    pub(super) fn new(isa: Isa, format: WeightFormat) -> Self {
        let plain = Self::plain(isa, format);
        match (isa, format) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Bf16, WeightFormat::Bf16) => Self {
                step_bytes: compact::STEP_BYTES,
                is_compact: true,
                activations: ActivationForm::ScaledBf16,
                tiles: Tiles::Dense(&by_lines!(avx512_compact_pairs)),
                unpacking: Some((Tiles::Dense(&by_lines!(avx512_unpacking)), plain.tiles)),
                ..plain
            },
            #[cfg(target_arch = "x86_64")]
            (Isa::Amx, WeightFormat::Bf16) => {
                Self { step_bytes: compact::STEP_BYTES, is_compact: true, tiled: Some(&amx::COMPACT), ..plain }
            }
            _ => plain,
        }
    }

    /// The one for weights that lie as they are.
    pub(super) fn plain(isa: Isa, format: WeightFormat) -> Self {
        let base = Self {
            panel_width: 16,
            max_tile_rows: 4,
            step_multiple: 1,
            features_per_step: 1,
            step_bytes: 64,
            activations: ActivationForm::Exact,
            activation_step_bytes: 4,
            is_compact: false,
            #[cfg(target_arch = "x86_64")]
            tiled: None,
            tiles: Tiles::Dense(&[tiles!(portable, false); 5]),
            unpacking: None,
        };
        match format {
            WeightFormat::F32 => match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => Self { max_tile_rows: 6, tiles: Tiles::Dense(&by_lines!(avx2_f32)), ..base },
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => Self {
                    panel_width: 64,
                    max_tile_rows: 6,
                    step_bytes: 256,
                    tiles: Tiles::Dense(&by_lines!(avx512_f32)),
                    ..base
                },
                _ => base,
            },
            WeightFormat::Bf16 => Self::plain_bf16(isa, base),
            #[cfg(target_arch = "x86_64")]
            WeightFormat::Fp8 if isa == Isa::Amx => Self {
                features_per_step: LONG_GROUP_LEN,
                step_bytes: fp8::step_bytes(isa),
                activation_step_bytes: LONG_GROUP_LEN * 2,
                step_multiple: 1,
                tiled: Some(&amx::FP8),
                ..Self::plain_bf16(isa, base)
            },
            WeightFormat::Fp8 => {
                let tiles = fp8::tiles(isa);
                Self {
                    panel_width: fp8::panel_width(isa),
                    max_tile_rows: tiles.len(),
                    features_per_step: LONG_GROUP_LEN,
                    step_bytes: fp8::step_bytes(isa),
                    activations: ActivationForm::Bf16,
                    activation_step_bytes: LONG_GROUP_LEN * if isa == Isa::Avx512Bf16 { 2 } else { 4 },
                    tiles: Tiles::Grouped(tiles),
                    ..base
                }
            }
            WeightFormat::Grouped(grouping) => {
                let tiles = grouped::tiles(isa, grouping);
                Self {
                    panel_width: grouped::panel_width(isa),
                    max_tile_rows: tiles.len(),
                    features_per_step: grouping.group_len,
                    step_bytes: grouped::step_bytes(isa, grouping),
                    activations: ActivationForm::Quantized { group_len: grouping.group_len },
                    activation_step_bytes: grouped::activation_group_bytes(grouping.group_len),
                    tiles: Tiles::Grouped(tiles),
                    #[cfg(target_arch = "x86_64")]
                    tiled: (isa == Isa::Amx).then(|| amx::grouped::kernel(grouping)),
                    ..base
                }
            }
        }
    }

    fn plain_bf16(isa: Isa, base: Self) -> Self {
        let base = Self {
            features_per_step: 2,
            activations: ActivationForm::Bf16,
            activation_step_bytes: 8,
            tiles: Tiles::Dense(&[tiles!(portable, true); 5]),
            ..base
        };
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Self { max_tile_rows: 6, tiles: Tiles::Dense(&by_lines!(avx2_bf16)), ..base },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Self {
                panel_width: 64,
                max_tile_rows: 6,
                step_bytes: 256,
                tiles: Tiles::Dense(&by_lines!(avx512_bf16)),
                ..base
            },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Self {
                panel_width: 64,
                max_tile_rows: 6,
                step_bytes: 256,
                activation_step_bytes: 4,
                tiles: Tiles::Dense(&by_lines!(avx512_bf16_pairs)),
                ..base
            },
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Self {
                panel_width: tiled::WIDTH,
                features_per_step: amx::STEP_FEATURES,
                step_multiple: amx::TILE_STEPS,
                step_bytes: amx::STEP_BYTES,
                activation_step_bytes: amx::STEP_FEATURES * 2,
                tiled: Some(&amx::BF16),
                ..base
            },
            _ => base,
        }
    }

    /// Steps of a panel; what is behind `in_features` is zero.
    pub(super) fn num_steps(&self, in_features: usize) -> usize {
        in_features.div_ceil(self.features_per_step).next_multiple_of(self.step_multiple)
    }

    /// Cache lines of a step.
    pub(super) fn lines_per_step(&self) -> usize {
        self.step_bytes / 64
    }

    /// Bytes from a row in the workspace to the next: whole cache lines, an odd number of them, so that the rows of a
    /// tile do not fall into the same sets of the level-1 cache.
    pub(super) fn activation_stride(&self, in_features: usize) -> usize {
        let row_bytes = self.num_steps(in_features) * self.activation_step_bytes;
        (row_bytes.div_ceil(64) | 1) * 64
    }

    /// Computes one tile of `num_rows` rows.
    ///
    /// # Safety
    /// All of the tile but `prefetch` points to memory of the sizes that follow from its numbers and this kernel's;
    /// `num_rows` is 1 to `max_tile_rows`.
    pub(super) unsafe fn run(&self, num_rows: usize, tile: &Tile) {
        // SAFETY: by contract; the kernel was made for an available instruction set.
        unsafe { self.tiles.function(num_rows, tile)(tile) }
    }

    /// As [`Kernel::run`], of a compact kernel; also leaves the tile's weights at `tile.unpacked`, plain.
    ///
    /// # Safety
    /// As for [`Kernel::run`]; `tile.unpacked` has room for the tile's steps.
    pub(super) unsafe fn run_unpacking(&self, num_rows: usize, tile: &Tile) {
        let (unpacking, _) = self.unpacking.as_ref().expect("the kernel is compact");
        // SAFETY: by contract.
        unsafe { unpacking.function(num_rows, tile)(tile) }
    }

    /// As [`Kernel::run`], of a compact kernel, with weights that [`Kernel::run_unpacking`] left.
    ///
    /// # Safety
    /// As for [`Kernel::run`].
    pub(super) unsafe fn run_unpacked(&self, num_rows: usize, tile: &Tile) {
        let (_, plain) = self.unpacking.as_ref().expect("the kernel is compact");
        // SAFETY: by contract.
        unsafe { plain.function(num_rows, tile)(tile) }
    }
}

/// Fetches `P` lines, see [`fetch_line`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn fetch_ahead<const P: usize>(from: *const u8, is_wanted_soon: bool) {
    for line in 0..P {
        fetch_line(from.wrapping_add(line * 64), is_wanted_soon);
    }
}

/// Fetches a line: into the level-1 cache where it is wanted in a moment (a tile alone), else no further than into
/// level 2, from where the tiles of the next stretch take it.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn fetch_line(line: *const u8, is_wanted_soon: bool) {
    let line = line.cast();
    // SAFETY: fetching ahead reads nothing, whatever the address.
    unsafe { if is_wanted_soon { _mm_prefetch::<_MM_HINT_T0>(line) } else { _mm_prefetch::<_MM_HINT_T1>(line) } }
}

/// `R` rows; fetches `P` lines ahead per step.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn avx512_bf16_pairs<const R: usize, const P: usize>(tile: &Tile) {
    // SAFETY: see `Kernel::run`; loads and stores are unaligned ones.
    unsafe {
        let mut acc = load_avx512::<R>(tile);
        let mut weights = tile.weights;
        let mut prefetch = tile.prefetch;
        let mut activations = tile.activations;
        for _ in 0..tile.num_steps {
            let mut w = [_mm512_setzero_si512(); 4];
            for (v, w) in w.iter_mut().enumerate() {
                *w = _mm512_loadu_si512(weights.add(v * 64).cast());
            }
            fetch_ahead::<P>(prefetch, P == 4);
            for (r, acc) in acc.iter_mut().enumerate() {
                let pair = activations.add(r * tile.activation_stride).cast::<i32>().read();
                let pair: __m512bh = std::mem::transmute(_mm512_set1_epi32(pair));
                for (acc, w) in acc.iter_mut().zip(w) {
                    *acc = _mm512_dpbf16_ps(*acc, pair, std::mem::transmute::<__m512i, __m512bh>(w));
                }
            }
            weights = weights.add(256);
            activations = activations.add(4);
            prefetch = prefetch.wrapping_add(P * 64);
        }
        store_avx512(tile, &acc);
    }
}

/// As [`avx512_bf16_pairs`], pairs one after the other.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn avx512_bf16<const R: usize, const P: usize>(tile: &Tile) {
    // SAFETY: see `Kernel::run`; loads and stores are unaligned ones.
    unsafe {
        let mut acc = load_avx512::<R>(tile);
        let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        let mut weights = tile.weights;
        let mut prefetch = tile.prefetch;
        let mut activations = tile.activations;
        for _ in 0..tile.num_steps {
            let load = |v: usize| _mm512_loadu_si512(weights.add(v * 64).cast::<__m512i>());
            fetch_ahead::<P>(prefetch, P == 4);
            let mut multiply = |offset: usize, w: [__m512; 4]| {
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = activations.add(r * tile.activation_stride + offset).cast::<f32>().read();
                    for (acc, w) in acc.iter_mut().zip(w) {
                        *acc = _mm512_fmadd_ps(_mm512_set1_ps(x), w, *acc);
                    }
                }
            };
            // A bf16 is the upper half of an f32: the first of a pair is shifted up, the second masked. Loading weights
            // twice costs less than a register each.
            multiply(0, std::array::from_fn(|v| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(load(v)))));
            multiply(4, std::array::from_fn(|v| _mm512_castsi512_ps(_mm512_and_si512(load(v), high))));
            weights = weights.add(256);
            activations = activations.add(8);
            prefetch = prefetch.wrapping_add(P * 64);
        }
        store_avx512(tile, &acc);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn avx512_f32<const R: usize, const P: usize>(tile: &Tile) {
    // SAFETY: see `Kernel::run`; loads and stores are unaligned ones.
    unsafe {
        let mut acc = load_avx512::<R>(tile);
        let mut weights = tile.weights;
        let mut prefetch = tile.prefetch;
        let mut activations = tile.activations;
        for _ in 0..tile.num_steps {
            let mut w = [_mm512_setzero_ps(); 4];
            for (v, w) in w.iter_mut().enumerate() {
                *w = _mm512_loadu_ps(weights.add(v * 64).cast());
            }
            fetch_ahead::<P>(prefetch, P == 4);
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = _mm512_set1_ps(activations.add(r * tile.activation_stride).cast::<f32>().read());
                for (acc, w) in acc.iter_mut().zip(w) {
                    *acc = _mm512_fmadd_ps(x, w, *acc);
                }
            }
            weights = weights.add(256);
            activations = activations.add(4);
            prefetch = prefetch.wrapping_add(P * 64);
        }
        store_avx512(tile, &acc);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn load_avx512<const R: usize>(tile: &Tile) -> [[__m512; 4]; R] {
    let mut acc = [[_mm512_setzero_ps(); 4]; R];
    if tile.continues {
        for (r, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                // SAFETY: `sums` holds `R` rows of 64.
                *acc = unsafe { _mm512_loadu_ps(tile.sums.add(r * 64 + v * 16)) };
            }
        }
    }
    acc
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store_avx512<const R: usize>(tile: &Tile, acc: &[[__m512; 4]; R]) {
    for (r, acc) in acc.iter().enumerate() {
        for (v, acc) in acc.iter().enumerate() {
            // SAFETY: `sums` holds `R` rows of 64.
            unsafe { _mm512_storeu_ps(tile.sums.add(r * 64 + v * 16), *acc) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_bf16<const R: usize, const P: usize>(tile: &Tile) {
    // SAFETY: see `Kernel::run`; loads and stores are unaligned ones.
    unsafe {
        let mut acc = load_avx2::<R>(tile);
        let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
        let mut weights = tile.weights;
        let mut prefetch = tile.prefetch;
        let mut activations = tile.activations;
        for _ in 0..tile.num_steps {
            fetch_ahead::<P>(prefetch, true);
            let w0 = _mm256_loadu_si256(weights.cast());
            let w1 = _mm256_loadu_si256(weights.add(32).cast());
            // A bf16 is the upper half of an f32: the first of a pair is shifted up, the second masked.
            let first =
                [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(w0)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w1))];
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = _mm256_broadcast_ss(&*activations.add(r * tile.activation_stride).cast::<f32>());
                acc[0] = _mm256_fmadd_ps(x, first[0], acc[0]);
                acc[1] = _mm256_fmadd_ps(x, first[1], acc[1]);
            }
            let second =
                [_mm256_castsi256_ps(_mm256_and_si256(w0, high)), _mm256_castsi256_ps(_mm256_and_si256(w1, high))];
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = _mm256_broadcast_ss(&*activations.add(r * tile.activation_stride + 4).cast::<f32>());
                acc[0] = _mm256_fmadd_ps(x, second[0], acc[0]);
                acc[1] = _mm256_fmadd_ps(x, second[1], acc[1]);
            }
            weights = weights.add(64);
            activations = activations.add(8);
            prefetch = prefetch.wrapping_add(P * 64);
        }
        store_avx2(tile, &acc);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_f32<const R: usize, const P: usize>(tile: &Tile) {
    // SAFETY: see `Kernel::run`; loads and stores are unaligned ones.
    unsafe {
        let mut acc = load_avx2::<R>(tile);
        let mut weights = tile.weights;
        let mut prefetch = tile.prefetch;
        let mut activations = tile.activations;
        for _ in 0..tile.num_steps {
            fetch_ahead::<P>(prefetch, true);
            let w = [_mm256_loadu_ps(weights.cast()), _mm256_loadu_ps(weights.add(32).cast())];
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = _mm256_broadcast_ss(&*activations.add(r * tile.activation_stride).cast::<f32>());
                acc[0] = _mm256_fmadd_ps(x, w[0], acc[0]);
                acc[1] = _mm256_fmadd_ps(x, w[1], acc[1]);
            }
            weights = weights.add(64);
            activations = activations.add(4);
            prefetch = prefetch.wrapping_add(P * 64);
        }
        store_avx2(tile, &acc);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn load_avx2<const R: usize>(tile: &Tile) -> [[__m256; 2]; R] {
    let mut acc = [[_mm256_setzero_ps(); 2]; R];
    if tile.continues {
        for (r, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                // SAFETY: `sums` holds `R` rows of 16.
                *acc = unsafe { _mm256_loadu_ps(tile.sums.add(r * 16 + v * 8)) };
            }
        }
    }
    acc
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn store_avx2<const R: usize>(tile: &Tile, acc: &[[__m256; 2]; R]) {
    for (r, acc) in acc.iter().enumerate() {
        for (v, acc) in acc.iter().enumerate() {
            // SAFETY: `sums` holds `R` rows of 16.
            unsafe { _mm256_storeu_ps(tile.sums.add(r * 16 + v * 8), *acc) };
        }
    }
}

/// `acc + x * w`, fused where the build's target does that in one instruction. Elsewhere a fused product would be a
/// call into the C library for every number.
#[inline(always)]
fn multiply_add(x: f32, w: f32, acc: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) { x.mul_add(w, acc) } else { acc + x * w }
}

/// Plain loops over a panel of 16, which the compiler turns into whatever vectors the target has.
unsafe fn portable<const R: usize, const BF16: bool>(tile: &Tile) {
    const WIDTH: usize = 16;
    let mut acc = [[0.0_f32; WIDTH]; R];
    // SAFETY: `sums` holds `R` rows of 16; the panel holds `num_steps` steps of 16 pairs (or single numbers), the
    // activations `R` rows of as many, all aligned for their types. See `Kernel::run`.
    unsafe {
        if tile.continues {
            acc = tile.sums.cast::<[[f32; WIDTH]; R]>().read();
        }
        for step in 0..tile.num_steps {
            if BF16 {
                let pairs = tile.weights.cast::<[u32; WIDTH]>().add(step).read();
                let first = pairs.map(|pair| f32::from_bits(pair << 16));
                let second = pairs.map(|pair| f32::from_bits(pair & 0xffff_0000));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let row = tile.activations.add(r * tile.activation_stride).cast::<[f32; 2]>();
                    let x = row.add(step).read();
                    for (acc, w) in acc.iter_mut().zip(first) {
                        *acc = multiply_add(x[0], w, *acc);
                    }
                    for (acc, w) in acc.iter_mut().zip(second) {
                        *acc = multiply_add(x[1], w, *acc);
                    }
                }
            } else {
                let weights = tile.weights.cast::<[f32; WIDTH]>().add(step).read();
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = tile.activations.add(r * tile.activation_stride).cast::<f32>().add(step).read();
                    for (acc, w) in acc.iter_mut().zip(weights) {
                        *acc = multiply_add(x, w, *acc);
                    }
                }
            }
        }
        tile.sums.cast::<[[f32; WIDTH]; R]>().write(acc);
    }
}

/// Rounds one row, each number times `scale`, to bf16, and fills it up with zeros.
///
/// # Safety
/// `target` is 64-byte aligned and a multiple of 64 bytes with room for the row.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn round_row_avx512(x: &[f32], scale: f32, target: &mut [u8]) {
    debug_assert!(target.len().is_multiple_of(64) && target.len() >= x.len() * 2);
    for (line, target) in target.chunks_exact_mut(64).enumerate() {
        let rest = x.len().saturating_sub(line * 32);
        // SAFETY: the masks leave out what is past the row; a line of the target is one register.
        unsafe {
            let load = |skip: usize| {
                let num = rest.saturating_sub(skip).min(16);
                let mask = ((1_u32 << num) - 1) as u16;
                _mm512_mul_ps(
                    _mm512_maskz_loadu_ps(mask, x.as_ptr().wrapping_add(line * 32 + skip)),
                    _mm512_set1_ps(scale),
                )
            };
            let rounded = _mm512_cvtne2ps_pbh(load(16), load(0));
            _mm512_storeu_si512(target.as_mut_ptr().cast(), std::mem::transmute::<__m512bh, __m512i>(rounded));
        }
    }
}

/// [`round_row_f32`] in wide vectors.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
pub(super) fn round_row_avx2(x: &[f32], target: &mut [u8]) {
    round_row_f32(x, target);
}

/// Rounds one row to bf16 numbers, kept as f32, and fills it up with zeros.
#[inline(always)]
pub(super) fn round_row_f32(x: &[f32], target: &mut [u8]) {
    let (numbers, padding) = target.split_at_mut(size_of_val(x));
    for (target, &x) in numbers.chunks_exact_mut(4).zip(x) {
        let rounded = u32::from(bf16_bits(x)) << 16;
        target.copy_from_slice(&rounded.to_ne_bytes());
    }
    padding.fill(0);
}
