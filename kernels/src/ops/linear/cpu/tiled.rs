//! The walk over a matrix for kernels on tiles ([`super::amx`]), which multiply faster than a level-2 cache can deliver.
//!
//! * Few rows wait for the weights: a unit of work is a panel, gone through once from its beginning to its end. What is unpacked
//!   goes to a few tiles' room and is taken from there at once.
//! * More rows wait for both: a unit is a panel times a block of rows. The first rows go through a long stretch of the panel and
//!   leave it unpacked for the others.
//! * Many rows of many features wait for activations: a unit is a group of panels times a block of rows. Stretches are so long
//!   that those of all the rows fit the level-2 cache, so that they are fetched once for the group.
//!
//! Stretches are as long as caches allow, since taking sums up from memory and leaving them there again costs as much as several
//! tiles' products. Most weights have one. Activations lie in tiles: of each 16 rows the first 64 bytes, then the next 64, so that they are read in order.
//! Either walk adds each output's products in the same order.

use std::ops::Range;

use super::amx::grouped::quantize_row;
use super::compact::Beside;
use super::finish::Finish;
use super::tile::{ActivationForm, Kernel};
use super::weight::CpuWeight;
use super::{Activations, ROUND_UNIT_LEN, UNPACKED_BYTES, Workspace, tile};
use crate::cpu::ThreadPool;
use crate::cpu::amx::{ROW_BYTES, TILE_BYTES, TILE_ROWS, Tiles};
use crate::cpu::thread_pool::{SharedMut, split};

/// Rows up to which a unit is a panel.
const MAX_PANEL_ROWS: usize = 128;

/// Rows of a unit, of many.
const MAX_UNIT_ROWS: usize = 512;

/// Panels of a unit, of many rows and several stretches.
const MAX_GROUP_LEN: usize = 8;

/// Input features of a stretch.
const MAX_STRETCH: usize = 2048;

/// Activations of a stretch, of all rows: a megabyte of a level-2 cache.
const MAX_STRETCH_NUMBERS: usize = 1 << 19;

/// Units that each thread should find, so that all are done at about the same time.
const UNITS_PER_THREAD: usize = 2;

/// Outputs of a panel.
pub(super) const WIDTH: usize = 32;

/// Numbers of a thread's sums.
pub(super) const SUMS_LEN: usize = MAX_UNIT_ROWS * MAX_GROUP_LEN * WIDTH;

const _: () = assert!(MAX_STRETCH * WIDTH * 2 <= UNPACKED_BYTES && MAX_PANEL_ROWS <= MAX_UNIT_ROWS);

/// The micro-kernels of a format.
#[derive(Clone, Copy)]
pub(super) struct TiledKernel {
    /// Few rows times a whole panel. By tiles of rows - 1, as the others, which are as many.
    pub(super) alone: &'static [CallFn],
    /// The first rows times a stretch of a panel, which is left unpacked for others.
    pub(super) first: &'static [CallFn],
    /// More rows times a stretch of a panel, unpacked.
    pub(super) later: &'static [CallFn],
    /// Whether there is anything to unpack.
    pub(super) unpacks: bool,
    /// Words of a row of an A tile, and rows of a B tile.
    pub(super) depth: u8,
    /// With fewer rows the kernels without tiles are used.
    pub(super) min_rows: usize,
    /// Input features that stretches are multiples of.
    pub(super) grain: usize,
}

impl TiledKernel {
    /// Rows of one call at most.
    fn call_rows(&self) -> usize {
        self.alone.len() * TILE_ROWS
    }
}

/// # Safety
/// All that the call points to is there in the sizes that its numbers and the kernel's give; the thread holds
/// [`Tiles`].
pub(super) type CallFn = unsafe fn(&Call<'_>);

/// The arguments of a micro-kernel.
pub(super) struct Call<'a> {
    /// The first A tile.
    pub(super) activations: *const u8,
    /// Bytes to the first A tile of the next 16 rows.
    pub(super) activation_stride: usize,
    /// The panel as it lies, from the first step on.
    pub(super) weights: *const u8,
    pub(super) num_steps: usize,
    /// What was unpacked, or room for it. The weights themselves where there is nothing to unpack.
    pub(super) unpacked: *mut u8,
    /// `[rows, in whole tiles][WIDTH]`, in and out.
    pub(super) sums: *mut f32,
    /// Whether `sums` holds the chains so far; else they start at zero.
    pub(super) continues: bool,
    /// Of the first step.
    pub(super) first_feature: usize,
    /// What a compact panel has beside it.
    pub(super) beside: Option<&'a Beside>,
}

impl Activations {
    /// The A tiles of a row, which is the first of 16.
    fn tiles(&self, row: usize) -> *const u8 {
        self.first.wrapping_add(row / TILE_ROWS * self.stride)
    }
}

/// Bytes of the activations of `num_rows` rows.
pub(super) fn activation_bytes(kernel: &Kernel, in_features: usize, num_rows: usize) -> usize {
    num_rows.div_ceil(TILE_ROWS) * activation_stride(kernel, in_features)
}

/// Bytes of 16 rows: rows of whole tiles.
fn activation_stride(kernel: &Kernel, in_features: usize) -> usize {
    (kernel.num_steps(in_features) * kernel.activation_step_bytes).next_multiple_of(ROW_BYTES) * TILE_ROWS
}

/// The rows of `x` times the weight, into `out`.
pub(super) fn pass(
    pool: &ThreadPool,
    workspace: &mut Workspace,
    weight: &CpuWeight,
    tiled: &TiledKernel,
    x: &[f32],
    finish: &Finish<'_>,
    out: &SharedMut<'_, f32>,
) {
    let in_features = weight.shape.in_features;
    let num_rows = x.len() / in_features;
    let stride = activation_stride(&weight.kernel, in_features);
    round(pool, weight.kernel.activations, x, in_features, stride, workspace.activations.view_mut::<u8>());
    let activations = Activations { first: workspace.activations.as_ptr(), stride };
    let sums = SharedMut::new(workspace.sums.view_mut::<f32>());
    let unpacked = SharedMut::new(workspace.unpacked.view_mut::<u8>());
    let num_panels = weight.num_panels();
    let is_alone = num_rows <= tiled.call_rows();
    let num_blocks = num_rows.div_ceil(MAX_UNIT_ROWS);
    let stretch = (MAX_STRETCH_NUMBERS / num_rows.min(MAX_UNIT_ROWS)).min(MAX_STRETCH);
    let group_len = if num_rows <= MAX_PANEL_ROWS || in_features <= stretch {
        1
    } else {
        (num_panels / (UNITS_PER_THREAD * pool.num_threads())).clamp(1, MAX_GROUP_LEN)
    };
    let num_groups = num_panels.div_ceil(group_len);
    let shared = Shared { weight, tiled, activations, finish, out, stretch };
    pool.run_units(num_groups * num_blocks, &|worker, unit| {
        // SAFETY: each worker has its own share of these, and does one unit at a time.
        let (sums, unpacked) = unsafe {
            (
                sums.slice_mut(worker * SUMS_LEN..(worker + 1) * SUMS_LEN),
                unpacked.slice_mut(worker * UNPACKED_BYTES..(worker + 1) * UNPACKED_BYTES),
            )
        };
        // SAFETY: the kernel was made for what the machine has, and a worker that begins a unit holds no tiles.
        let _tiles = unsafe { Tiles::take(tiled.depth) };
        // SAFETY: units are disjoint in (panel, rows), and so are the parts of `out` that they write.
        unsafe {
            if is_alone {
                shared.alone(unit, num_rows, sums, unpacked);
            } else {
                // Of a block all panels, one after the other: its activations stay in a cache.
                let panels = split(num_panels, 1, unit % num_groups, num_groups);
                let rows = split(num_rows, TILE_ROWS, unit / num_groups, num_blocks);
                shared.group(panels, rows, sums, unpacked);
            }
        }
    });
}

struct Shared<'a> {
    weight: &'a CpuWeight,
    tiled: &'a TiledKernel,
    activations: Activations,
    finish: &'a Finish<'a>,
    out: &'a SharedMut<'a, f32>,
    /// Input features of a stretch.
    stretch: usize,
}

impl Shared<'_> {
    /// All rows, as many as a call may have, times a panel.
    ///
    /// # Safety
    /// No other thread writes this panel's columns; the thread holds [`Tiles`].
    unsafe fn alone(&self, panel: usize, num_rows: usize, sums: &mut [f32], unpacked: &mut [u8]) {
        let Self { weight, tiled, activations, .. } = *self;
        let start = weight.panel(panel);
        // The next panel's, which lies elsewhere and is wanted at its beginning.
        if let Some(next) = weight.beside(panel + 1) {
            next.fetch_ahead();
        }
        let call = Call {
            activations: activations.first,
            activation_stride: activations.stride,
            weights: start,
            num_steps: weight.num_steps(),
            unpacked: if tiled.unpacks { unpacked.as_mut_ptr() } else { start.cast_mut() },
            sums: sums.as_mut_ptr(),
            continues: false,
            first_feature: 0,
            beside: weight.beside(panel),
        };
        // SAFETY: by contract; sums have room for whole tiles.
        unsafe {
            tiled.alone[(num_rows - 1) / TILE_ROWS](&call);
            self.finish(panel, 0..num_rows, sums);
        }
    }

    /// A block of rows times a group of panels.
    ///
    /// # Safety
    /// No other thread writes these panels' columns of these rows; the thread holds [`Tiles`]. `rows` begins with a tile.
    unsafe fn group(&self, panels: Range<usize>, rows: Range<usize>, sums: &mut [f32], unpacked: &mut [u8]) {
        let Self { weight, tiled, activations, .. } = *self;
        let kernel = &weight.kernel;
        let grain = (tiled.grain / kernel.features_per_step).max(1);
        let num_steps = weight.num_steps();
        let num_stretches = num_steps.div_ceil(self.stretch / kernel.features_per_step);
        let num_tiles = rows.len().div_ceil(TILE_ROWS);
        let num_calls = num_tiles.div_ceil(tiled.later.len());
        for stretch in 0..num_stretches {
            let steps = split(num_steps, grain, stretch, num_stretches);
            let first_tile = steps.start * kernel.activation_step_bytes * TILE_ROWS;
            for (group, panel) in panels.clone().enumerate() {
                let weights = weight.panel(panel).wrapping_add(steps.start * kernel.step_bytes);
                for index in 0..num_calls {
                    let tiles = split(num_tiles, 1, index, num_calls);
                    // Sums that nobody takes up again lie in one place, which stays in the level-1 cache.
                    let first_sum = if num_stretches == 1 { 0 } else { group * num_tiles + tiles.start };
                    let sums = &mut sums[first_sum * TILE_ROWS * WIDTH..][..tiles.len() * TILE_ROWS * WIDTH];
                    let call_rows =
                        rows.start + tiles.start * TILE_ROWS..rows.end.min(rows.start + tiles.end * TILE_ROWS);
                    let call = Call {
                        activations: activations.tiles(call_rows.start).wrapping_add(first_tile),
                        activation_stride: activations.stride,
                        weights,
                        num_steps: steps.len(),
                        unpacked: if tiled.unpacks { unpacked.as_mut_ptr() } else { weights.cast_mut() },
                        sums: sums.as_mut_ptr(),
                        continues: stretch > 0,
                        first_feature: steps.start * kernel.features_per_step,
                        beside: weight.beside(panel),
                    };
                    let calls = if index == 0 { tiled.first } else { tiled.later };
                    // SAFETY: by contract; rows and steps lie inside activations and panel.
                    unsafe {
                        calls[tiles.len() - 1](&call);
                        if stretch + 1 == num_stretches {
                            self.finish(panel, call_rows, sums);
                        }
                    }
                }
            }
        }
    }

    /// Writes outputs from finished sums of `rows`, in whole tiles.
    ///
    /// # Safety
    /// No other thread writes this panel's columns of these rows.
    unsafe fn finish(&self, panel: usize, rows: Range<usize>, sums: &[f32]) {
        let sum_scale = self.weight.beside(panel).map_or(1.0, Beside::tile_sum_scale);
        // SAFETY: by contract.
        unsafe { self.finish.run(panel, rows, sum_scale, sums, self.out) };
    }
}

/// Rounds the rows of `x` into tiles.
fn round(pool: &ThreadPool, form: ActivationForm, x: &[f32], in_features: usize, stride: usize, target: &mut [u8]) {
    let num_rows = x.len() / in_features;
    let target = SharedMut::new(target);
    let unit_rows = (ROUND_UNIT_LEN / in_features).max(1);
    pool.run_units(num_rows.div_ceil(unit_rows), &|_, unit| {
        for row in unit * unit_rows..num_rows.min((unit + 1) * unit_rows) {
            let x = &x[row * in_features..][..in_features];
            let first = row / TILE_ROWS * stride + row % TILE_ROWS * ROW_BYTES;
            if let ActivationForm::Quantized { group_len } = form {
                // SAFETY: rows are disjoint, and there is room for all of their tiles.
                unsafe {
                    quantize_row(group_len, x, row % TILE_ROWS, target.as_mut_ptr().add(row / TILE_ROWS * stride))
                };
                continue;
            }
            for depth in 0..stride / TILE_BYTES {
                let x = x.get(depth * ROW_BYTES / 2..).unwrap_or_default();
                let start = first + depth * TILE_BYTES;
                // SAFETY: rows have lines of their own.
                let line = unsafe { target.slice_mut(start..start + ROW_BYTES) };
                // SAFETY: whoever has tiles has AVX-512 with bf16; a line is one vector.
                unsafe { tile::round_row_avx512(&x[..x.len().min(ROW_BYTES / 2)], 1.0, line) };
            }
        }
    });
}
