//! The served CPU version of [`super::Linear`].
//!
//! Weights lie in panels of `panel_width` output features, one panel after the other, each a single sequential stream
//! over `in_features` (see [`weight`]). The unit of work is a panel times a block of rows; every thread goes through a
//! contiguous share of the units, so it streams its own part of the matrix once and in order, and helps others at the end. Inside a unit the panel is cut into
//! stretches of [`K_BLOCK`] that stay in the level-2 cache while tiles of a few rows pass over them (see [`tile`]).
//! Partial sums wait in f32 between stretches and are taken up again as the accumulator's start, so each output is one
//! chain of additions over `in_features` in ascending order, however rows, stretches and threads are cut. Kernels on tiles (AMX)
//! have a walk of their own, see [`tiled`].
//!
//! Memory while serving: activations rounded to bf16 or to codes go to a workspace for [`MAX_PASS_ROWS`] rows of the widest
//! weight packed so far, taken when that weight is packed. More rows than that take several passes over the weights,
//! where arithmetic has long outgrown the reading of them.

#[cfg(target_arch = "x86_64")]
mod amx;
mod compact;
mod finish;
mod fp8;
mod grouped;
mod pack;
mod tile;
#[cfg(target_arch = "x86_64")]
mod tiled;
mod weight;

pub(crate) use pack::pack_weight;
pub use weight::CpuWeight;
pub(crate) use weight::weight_bytes;

use std::ops::Range;

use self::compact::Beside;
use self::finish::Finish;
use self::tile::{ActivationForm, Kernel, Tile};
use super::Linear;
use crate::KernelError;
use crate::cpu::buffer::AlignedBytes;
use crate::cpu::lanes::PREFETCH_AHEAD_BYTES;
use crate::cpu::thread_pool::{SharedMut, split};
use crate::cpu::{CpuBackend, Isa, ThreadPool};

/// Rows of one pass over the weights.
const MAX_PASS_ROWS: usize = 1024;

/// Rows of one unit of work: their partial sums (48 KiB) stay in the level-2 cache beside a stretch of the panel.
const MAX_UNIT_ROWS: usize = 192;

/// Input features of a stretch: 128 KiB of a bf16 panel of 64. Even.
const K_BLOCK: usize = 1024;

/// Activations that are rounded as one unit of work, some 3 microseconds: less is not worth waking another thread.
const ROUND_UNIT_LEN: usize = 1 << 16;

/// Working memory of [`linear`].
pub(crate) struct Workspace {
    /// Activations as the kernel reads them: `[MAX_PASS_ROWS]` rows of a padded stride.
    activations: AlignedBytes,
    /// Partial sums of each thread's unit: `[num_threads][SUMS_LEN]` f32.
    sums: AlignedBytes,
    /// Weights of each thread, unpacked: `[num_threads][UNPACKED_BYTES]`.
    unpacked: AlignedBytes,
}

/// Bytes of a thread's unpacked weights: as much for either walk.
const UNPACKED_BYTES: usize = K_BLOCK / 2 * compact::PLAIN_STEP_BYTES;

/// Numbers of a thread's sums: of units on tiles, which are larger, since any backend may multiply what another one packed.
#[cfg(target_arch = "x86_64")]
const SUMS_LEN: usize = tiled::SUMS_LEN;
#[cfg(not(target_arch = "x86_64"))]
const SUMS_LEN: usize = MAX_UNIT_ROWS * tile::MAX_PANEL_WIDTH;

const _: () = assert!(SUMS_LEN >= MAX_UNIT_ROWS * tile::MAX_PANEL_WIDTH);

impl Workspace {
    pub(crate) fn new(num_threads: usize) -> Result<Self, KernelError> {
        Ok(Self {
            activations: AlignedBytes::zeroed("rounded activations", 0)?,
            sums: AlignedBytes::zeroed("partial sums", num_threads * SUMS_LEN * size_of::<f32>())?,
            unpacked: AlignedBytes::zeroed("unpacked weights", num_threads * UNPACKED_BYTES)?,
        })
    }

    /// Makes room for the activations of a weight so wide. Called when one is packed; finds enough room when one is
    /// used, unless another backend packed it.
    fn reserve(&mut self, kernel: &Kernel, in_features: usize) -> Result<(), KernelError> {
        let num_bytes = match kernel.activations {
            ActivationForm::Exact => 0,
            #[cfg(target_arch = "x86_64")]
            _ if kernel.tiled.is_some() => tiled::activation_bytes(kernel, in_features, MAX_PASS_ROWS)
                .max(MAX_PASS_ROWS * kernel.activation_stride(in_features)),
            _ => MAX_PASS_ROWS * kernel.activation_stride(in_features),
        };
        if self.activations.len() < num_bytes {
            self.activations = AlignedBytes::zeroed("rounded activations", num_bytes)?;
        }
        Ok(())
    }
}

pub(crate) fn linear(backend: &mut CpuBackend, args: Linear<'_, CpuBackend>) -> Result<(), KernelError> {
    let Linear { x, num_rows, weight, bias, epilogue, out } = args;
    let x = x.f32("linear", "x")?;
    let bias = bias.map(|bias| bias.f32("linear", "bias")).transpose()?;
    let out = out.f32_mut("linear", "out")?;
    weight.shape.check(num_rows, x.len(), bias.map(<[f32]>::len), epilogue, out.len())?;
    if !weight.isa.is_available() {
        return Err(KernelError::Type { op: "linear", argument: "weight", found: weight.isa.name() });
    }
    backend.linear_workspace.reserve(&weight.kernel, weight.shape.in_features)?;

    let in_features = weight.shape.in_features;
    let out_cols = weight.shape.out_cols(epilogue);
    let mut first_row = 0;
    while first_row < num_rows {
        let pass_rows = (num_rows - first_row).min(MAX_PASS_ROWS);
        let finish =
            Finish { shape: &weight.shape, panel_width: weight.kernel.panel_width, isa: weight.isa, bias, epilogue };
        pass(
            &backend.pool,
            &mut backend.linear_workspace,
            weight,
            &x[first_row * in_features..][..pass_rows * in_features],
            &finish,
            &mut out[first_row * out_cols..][..pass_rows * out_cols],
        );
        first_row += pass_rows;
    }
    Ok(())
}

/// The rows of `x` times the weight, into `out`.
fn pass(
    pool: &ThreadPool,
    workspace: &mut Workspace,
    weight: &CpuWeight,
    x: &[f32],
    finish: &Finish<'_>,
    out: &mut [f32],
) {
    let in_features = weight.shape.in_features;
    let num_rows = x.len() / in_features;
    let kernel = &weight.kernel;
    #[cfg(target_arch = "x86_64")]
    if let Some(tiled) = kernel.tiled.filter(|tiled| num_rows >= tiled.min_rows) {
        tiled::pass(pool, workspace, weight, tiled, x, finish, &SharedMut::new(out));
        return;
    }
    let activations = match kernel.activations {
        ActivationForm::Exact => Activations { first: x.as_ptr().cast(), stride: in_features * size_of::<f32>() },
        form => {
            let stride = kernel.activation_stride(in_features);
            round_activations(pool, weight.isa, form, x, in_features, stride, &mut workspace.activations);
            Activations { first: workspace.activations.as_ptr(), stride }
        }
    };

    let num_blocks = num_rows.div_ceil(MAX_UNIT_ROWS);
    let num_units = weight.num_panels() * num_blocks;
    let sums = SharedMut::new(workspace.sums.view_mut::<f32>());
    let unpacked = SharedMut::new(workspace.unpacked.view_mut::<u8>());
    let out = SharedMut::new(out);
    pool.run_units(num_units, &|worker, unit| {
        // SAFETY: each worker has its own share of the sums, and does one unit at a time.
        let sums = unsafe { sums.slice_mut(worker * SUMS_LEN..(worker + 1) * SUMS_LEN) };
        // SAFETY: as above.
        let unpacked = unsafe { unpacked.slice_mut(worker * UNPACKED_BYTES..(worker + 1) * UNPACKED_BYTES) };
        let (panel, block) = (unit / num_blocks, unit % num_blocks);
        let rows = split(num_rows, 1, block, num_blocks);
        // SAFETY: the activations hold `num_rows` rows of the stride; units are disjoint in (panel, rows), and so are
        // the parts of `out` that they write.
        unsafe { compute_unit(weight, activations, panel, rows, finish, Scratch { sums, unpacked }, &out) };
    });
}

/// Rows as the kernel reads them.
#[derive(Clone, Copy)]
struct Activations {
    first: *const u8,
    /// Bytes from a row to the next; of tiles from 16 rows to the next.
    stride: usize,
}

// SAFETY: only read, and not written while the job runs that reads them.
unsafe impl Sync for Activations {}
// SAFETY: as above.
unsafe impl Send for Activations {}

/// A thread's share of the [`Workspace`].
struct Scratch<'a> {
    sums: &'a mut [f32],
    unpacked: &'a mut [u8],
}

/// All sums of `panel` for `rows` (at most [`MAX_UNIT_ROWS`]), and their epilogue.
///
/// # Safety
/// `activations` holds the rows; no other thread writes this panel's columns of these rows.
unsafe fn compute_unit(
    weight: &CpuWeight,
    activations: Activations,
    panel: usize,
    rows: Range<usize>,
    finish: &Finish<'_>,
    scratch: Scratch<'_>,
    out: &SharedMut<'_, f32>,
) {
    let kernel = &weight.kernel;
    let width = kernel.panel_width;
    let num_tiles = rows.len().div_ceil(kernel.max_tile_rows);
    let num_steps = weight.num_steps();
    let unpacks = kernel.is_compact && num_tiles >= compact::MIN_TILES_TO_UNPACK;
    let num_stretches = num_steps.div_ceil(K_BLOCK / kernel.features_per_step);
    let panel_start = weight.panel(panel);
    let unpacked = scratch.unpacked.as_mut_ptr();
    let beside = weight.beside(panel);
    if let Some(beside) = beside {
        beside.fetch_ahead();
    }
    let sum_scale = beside.map_or(1.0, Beside::sum_scale);
    for stretch in 0..num_stretches {
        let steps = split(num_steps, 1, stretch, num_stretches);
        // SAFETY: inside the panel.
        let weights = unsafe { panel_start.add(steps.start * kernel.step_bytes) };
        let stretch_bytes = steps.len() * kernel.step_bytes;
        for index in 0..num_tiles {
            let tile_rows = split(rows.len(), 1, index, num_tiles);
            let sums = &mut scratch.sums[tile_rows.start * width..tile_rows.end * width];
            // Each line is fetched ahead once. A tile alone fetches a little ahead in its own stream; of several, each
            // fetches its share of the stretch that comes next in memory, while this one is at work.
            let lines = split(kernel.lines_per_step(), 1, index, num_tiles);
            let ahead = if num_tiles == 1 {
                PREFETCH_AHEAD_BYTES
            } else {
                stretch_bytes + lines.start * stretch_bytes / kernel.lines_per_step()
            };
            let first_row = rows.start + tile_rows.start;
            // SAFETY: the tile's rows and steps lie inside activations and panel, and `sums` has room for its rows.
            unsafe {
                let tile = Tile {
                    activations: activations
                        .first
                        .add(first_row * activations.stride + steps.start * kernel.activation_step_bytes),
                    activation_stride: activations.stride,
                    weights: if unpacks && index > 0 { unpacked } else { weights },
                    num_steps: steps.len(),
                    unpacked,
                    sums: sums.as_mut_ptr(),
                    continues: stretch > 0,
                    prefetch: weights.wrapping_add(ahead),
                    num_lines: lines.len(),
                    is_alone: num_tiles == 1,
                };
                match (unpacks, index) {
                    (false, _) => kernel.run(tile_rows.len(), &tile),
                    (true, 0) => kernel.run_unpacking(tile_rows.len(), &tile),
                    (true, _) => kernel.run_unpacked(tile_rows.len(), &tile),
                }
                if stretch + 1 == num_stretches {
                    if let Some(beside) = beside {
                        let first = activations.first.add(first_row * activations.stride);
                        beside.add_exceptions(width, sums, activations.stride, |feature| first.add(feature * 2));
                    }
                    finish.run(panel, first_row..first_row + tile_rows.len(), sum_scale, sums, out);
                }
            }
        }
    }
}

/// Rounds the rows of `x` to `form`, which is not `Exact`.
fn round_activations(
    pool: &ThreadPool,
    isa: Isa,
    form: ActivationForm,
    x: &[f32],
    in_features: usize,
    stride: usize,
    activations: &mut AlignedBytes,
) {
    let num_rows = x.len() / in_features;
    let target = SharedMut::new(activations.view_mut::<u8>());
    let unit_rows = (ROUND_UNIT_LEN / in_features).max(1);
    pool.run_units(num_rows.div_ceil(unit_rows), &|_, unit| {
        let rows = unit * unit_rows..num_rows.min((unit + 1) * unit_rows);
        // SAFETY: the rows of different units are disjoint.
        let target = unsafe { target.slice_mut(rows.start * stride..rows.end * stride) };
        for (row, target) in rows.zip(target.chunks_exact_mut(stride)) {
            let x = &x[row * in_features..][..in_features];
            match (form, isa) {
                (ActivationForm::Quantized { group_len }, _) => grouped::quantize_row(isa, group_len, x, target),
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the ISA is available; the stride has room for the row in whole vectors.
                (form, Isa::Avx512Bf16) => unsafe {
                    let scale = if form == ActivationForm::ScaledBf16 { compact::ACTIVATION_SCALE } else { 1.0 };
                    tile::round_row_avx512(x, scale, target);
                },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the ISA is available.
                (_, Isa::Avx2 | Isa::Avx512) => unsafe { tile::round_row_avx2(x, target) },
                _ => tile::round_row_f32(x, target),
            }
        }
    });
}
