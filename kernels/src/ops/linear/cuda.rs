//! The CUDA version of [`super::Linear`]: which kernel of `linear.cu` takes which rows, and the memory between them.
//!
//! A product is one launch, whatever the format and however many rows: x is read as it lies in memory (few rows of bf16, all
//! of f32), or all thread blocks round it to fragments first, together. A norm before it comes with the reading or the
//! rounding. Which kernel it is, and how many thread blocks share the input features, changes no bit of the result.

mod weight;

pub use weight::CudaWeight;
pub(crate) use weight::{pack_weight, weight_bytes};

use self::weight::{Form, Kind};
use super::{Epilogue, Linear, NormLinear, SQUARES_FEATURES, WeightShape};
use crate::cuda::memory::Workspace as Memory;
use crate::cuda::{CudaBackend, CudaBuffer, Device, DevicePtr, KernelId};
use crate::ops::at_least;
use crate::{KernelError, StepLimits, WeightLayout};

/// A ring of `linear.cu`: stages in it, and the bytes of one that hold x.
const fn ring_bytes(num_stages: usize, weight_bytes: usize, x_bytes: usize) -> usize {
    num_stages * (weight_bytes + x_bytes)
}

/// Counts of the rounding, in front of those of partial sums.
const ROUND_COUNTS: usize = 4;

/// Tickets of the rounding for each multiprocessor, where there is so much to round.
const TICKETS_PER_MULTIPROCESSOR: usize = 4;

/// Bytes of codes and scales that x becomes of a stage of 16 tokens.
const fn int8_tile_bytes(groups_of_stage: usize) -> usize {
    16 * 128 + groups_of_stage * 128
}

/// How many rows a thread block takes, and what it takes for that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    function: &'static str,
    /// Where x is normalised on its way.
    norm_function: &'static str,
    tokens: usize,
    threads: u32,
    shared_bytes: usize,
    x: XForm,
}

/// What a kernel reads as x.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum XForm {
    F32,
    Bf16Fragments,
    Int8Fragments,
}

const BF16_STAGE: usize = 16 << 10;

const fn bf16_from_f32(function: &'static str, norm_function: &'static str, tokens: usize, num_stages: usize) -> Tile {
    // Tokens, and the norm's weights.
    let shared_bytes = ring_bytes(num_stages, BF16_STAGE, tokens * (64 + 8) * 4 + 64 * 4);
    Tile { function, norm_function, tokens, threads: 128, shared_bytes, x: XForm::F32 }
}

const fn bf16_from_fragments(function: &'static str, tokens: usize, num_stages: usize, threads: u32) -> Tile {
    let shared_bytes = ring_bytes(num_stages, BF16_STAGE, tokens * 64 * 2);
    Tile { function, norm_function: function, tokens, threads, shared_bytes, x: XForm::Bf16Fragments }
}

const fn grouped(function: &'static str, tokens: usize, weight_bytes: usize, groups_of_stage: usize) -> Tile {
    let shared_bytes = ring_bytes(4, weight_bytes, tokens.div_ceil(16) * int8_tile_bytes(groups_of_stage));
    let threads = if tokens > 32 { 256 } else { 128 };
    Tile { function, norm_function: function, tokens, threads, shared_bytes, x: XForm::Int8Fragments }
}

const BF16_TILES: [Tile; 5] = [
    bf16_from_f32("linear_bf16_x8", "linear_bf16_x8_norm", 8, 4),
    bf16_from_f32("linear_bf16_x16", "linear_bf16_x16_norm", 16, 4),
    bf16_from_f32("linear_bf16_x32", "linear_bf16_x32_norm", 32, 3),
    bf16_from_fragments("linear_bf16_t64", 64, 4, 128),
    bf16_from_fragments("linear_bf16_t128", 128, 3, 256),
];
const fn fp8(function: &'static str, tokens: usize, num_stages: usize) -> Tile {
    let shared_bytes = ring_bytes(num_stages, (16 << 10) + 128 * 4, tokens.div_ceil(16) * 16 * 128 * 2);
    let threads = if tokens > 32 { 256 } else { 128 };
    Tile { function, norm_function: function, tokens, threads, shared_bytes, x: XForm::Bf16Fragments }
}

const FP8_TILES: [Tile; 3] = [fp8("linear_fp8_t8", 8, 4), fp8("linear_fp8_t32", 32, 4), fp8("linear_fp8_t64", 64, 3)];
const INT8_LONG_TILES: [Tile; 3] = [
    grouped("linear_int8_long_t8", 8, (16 << 10) + 256, 1),
    grouped("linear_int8_long_t32", 32, (16 << 10) + 256, 1),
    grouped("linear_int8_long_t64", 64, (16 << 10) + 256, 1),
];
const INT8_SHORT_TILES: [Tile; 3] = [
    grouped("linear_int8_short_t8", 8, (16 << 10) + 8 * 256, 4),
    grouped("linear_int8_short_t32", 32, (16 << 10) + 8 * 256, 4),
    grouped("linear_int8_short_t64", 64, (16 << 10) + 8 * 256, 4),
];
const INT4_TILES: [Tile; 3] = [
    grouped("linear_int4_t8", 8, (8 << 10) + 8 * 256, 4),
    grouped("linear_int4_t32", 32, (8 << 10) + 8 * 256, 4),
    grouped("linear_int4_t64", 64, (8 << 10) + 8 * 256, 4),
];
const F32_TILES: [Tile; 1] = [Tile {
    function: "linear_f32",
    norm_function: "linear_f32",
    tokens: 16,
    threads: 128,
    shared_bytes: 0,
    x: XForm::F32,
}];

impl Kind {
    /// From few to many tokens.
    const fn tiles(self) -> &'static [Tile] {
        match self {
            Self::Bf16 => &BF16_TILES,
            Self::F32 => &F32_TILES,
            Self::Int8Long => &INT8_LONG_TILES,
            Self::Int8Short => &INT8_SHORT_TILES,
            Self::Int4 => &INT4_TILES,
            Self::Fp8 => &FP8_TILES,
        }
    }
}

/// Stages of a slice: how the input features of a weight are cut. Depends on its shape alone, since the order of sums does.
/// So many slices that an H200's 132 multiprocessors all have some, and none shorter than 256 features.
fn slice_stages(form: &Form, shape: &WeightShape) -> usize {
    let num_slices = match (form.kind, form.num_panels(shape)) {
        (Kind::F32, _) | (_, 512..) => 1,
        (_, 128..) => 2,
        (_, 17..) => 4,
        _ => 8,
    };
    let features = shape.in_features.div_ceil(num_slices).next_multiple_of(128).max(256);
    features / form.stage_features
}

/// How one product is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    tile: Tile,
    form: Form,
    /// Tiles of tokens, panels, slices.
    grid: [usize; 3],
    num_stages: usize,
    slice_stages: usize,
    /// Pieces that a warp rounds, and how many of them are a ticket.
    num_units: usize,
    ticket_units: usize,
    /// Working memory: rounded x, partial sums, their counts.
    bytes: [usize; 3],
}

impl Plan {
    fn new(shape: &WeightShape, num_rows: usize, num_multiprocessors: usize) -> Self {
        let form = Form::of(shape.format);
        let (num_panels, num_stages) = (form.num_panels(shape), form.num_stages(shape.in_features));
        let tiles = form.kind.tiles();
        // Copies of 16 bytes want rows that start at multiples of them.
        let can_read =
            |tile: &Tile| form.kind == Kind::F32 || tile.x != XForm::F32 || shape.in_features.is_multiple_of(4);
        let tile =
            *tiles.iter().find(|tile| can_read(tile) && num_rows <= tile.tokens).unwrap_or(&tiles[tiles.len() - 1]);
        let num_token_tiles = num_rows.div_ceil(tile.tokens);
        let slice_stages = slice_stages(&form, shape);
        let num_units = num_token_tiles * num_panels;
        // One thread block for all slices where there is work for all multiprocessors anyway.
        let num_slices = if num_units >= num_multiprocessors { 1 } else { num_stages.div_ceil(slice_stages) };
        let num_x_tiles = num_token_tiles * tile.tokens.div_ceil(16);
        let x_tile_bytes = match tile.x {
            XForm::F32 => 0,
            XForm::Bf16Fragments => 16 * form.stage_features * 2,
            XForm::Int8Fragments => int8_tile_bytes(if form.kind == Kind::Int8Long { 1 } else { 4 }),
        };
        let (partials_bytes, num_arrivals) = match num_slices {
            1 => (0, 0),
            _ => (num_units * num_slices * form.panel_features * tile.tokens * 4, num_units),
        };
        let num_round_units = match tile.x {
            XForm::F32 => 0,
            XForm::Bf16Fragments => num_x_tiles * num_stages * (form.stage_features / 16),
            XForm::Int8Fragments => num_x_tiles * 16 * num_stages,
        };
        // A unit for each warp at least.
        let ticket_units = num_round_units
            .div_ceil(TICKETS_PER_MULTIPROCESSOR * num_multiprocessors)
            .next_multiple_of(tile.threads as usize / 32);
        Self {
            tile,
            form,
            grid: [num_token_tiles, num_panels, num_slices],
            num_stages,
            slice_stages,
            num_units: num_round_units,
            ticket_units,
            bytes: [num_x_tiles * num_stages * x_tile_bytes, partials_bytes, (ROUND_COUNTS + num_arrivals) * 4],
        }
    }
}

/// The most working memory that any number of rows up to `max_rows` needs.
fn most_bytes(shape: &WeightShape, max_rows: usize, num_multiprocessors: usize) -> [usize; 3] {
    // What is needed changes with the tile and the number of tiles, and within a tile not at all.
    let rows = [8, 16, 32].into_iter().chain((64..max_rows).step_by(32)).chain([max_rows]);
    rows.map(|num_rows| Plan::new(shape, num_rows.min(max_rows), num_multiprocessors).bytes)
        .fold([0; 3], |[a, b, c], [d, e, f]| [a.max(d), b.max(e), c.max(f)])
}

/// Working memory of [`linear`].
#[derive(Debug)]
pub(crate) struct Workspace {
    rounded: Memory,
    partials: Memory,
    /// Counts that every launch leaves at zero.
    arrivals: Memory,
    /// All shapes of weights that were packed.
    shapes: Vec<WeightShape>,
}

impl Default for Workspace {
    fn default() -> Self {
        Self {
            rounded: Memory::new("rounded activations"),
            partials: Memory::new("partial sums"),
            arrivals: Memory::new("counts of partial sums"),
            shapes: Vec::new(),
        }
    }
}

impl Workspace {
    /// A weight of this shape will be multiplied.
    fn expect(&mut self, shape: &WeightShape) {
        if !self.shapes.contains(shape) {
            self.shapes.push(*shape);
        }
    }

    /// Takes what products of the packed weights need in steps of at most this size.
    pub(crate) fn reserve<D: Device>(&mut self, device: &mut D, limits: &StepLimits) -> Result<(), KernelError> {
        let num_multiprocessors = device.facts().num_multiprocessors as usize;
        let mut most = [0; 3];
        for shape in &self.shapes {
            for (most, needed) in most.iter_mut().zip(most_bytes(shape, limits.num_tokens, num_multiprocessors)) {
                *most = needed.max(*most);
            }
        }
        self.take(device, most).map(|_| ())
    }

    fn take<D: Device>(&mut self, device: &mut D, bytes: [usize; 3]) -> Result<[DevicePtr; 3], KernelError> {
        let [rounded, partials, arrivals] = bytes;
        Ok([
            self.rounded.at_least(device, rounded)?,
            self.partials.at_least(device, partials)?,
            self.arrivals.at_least(device, arrivals)?,
        ])
    }
}

const fn kernel(function: &'static str) -> KernelId {
    KernelId { module: "linear", function }
}

pub(crate) fn linear<D: Device>(
    backend: &mut CudaBackend<D>,
    args: Linear<'_, CudaBackend<D>>,
) -> Result<(), KernelError> {
    multiply(backend, args, None, DevicePtr::NULL)
}

/// A norm on the way of x.
#[derive(Clone, Copy)]
struct Norm {
    weight: DevicePtr,
    squares: DevicePtr,
    eps: f32,
}

impl Norm {
    const NONE: Self = Self { weight: DevicePtr::NULL, squares: DevicePtr::NULL, eps: 0.0 };
}

pub(crate) fn norm_linear<D: Device>(
    backend: &mut CudaBackend<D>,
    args: NormLinear<'_, CudaBackend<D>>,
) -> Result<(), KernelError> {
    const OP: &str = "norm_linear";
    let Some(squares) = args.squares else { return args.apart(backend) };
    let in_features = args.weight.shape().in_features;
    let num_squares = args.num_rows.saturating_mul(in_features.div_ceil(SQUARES_FEATURES));
    at_least(OP, "in_features", in_features, args.in_features)?;
    at_least(OP, "norm_weight", in_features, args.norm_weight.len())?;
    at_least(OP, "squares", num_squares, squares.len())?;
    let (weight, squares) = (args.norm_weight.f32(OP, "norm_weight")?, squares.f32(OP, "squares")?);
    let norm = Norm { weight, squares, eps: args.eps };
    let NormLinear { x, num_rows, weight, bias, epilogue, out, .. } = args;
    multiply(backend, Linear { x, num_rows, weight, bias, epilogue, out }, Some(norm), DevicePtr::NULL)
}

pub(crate) fn add_linear<D: Device>(
    backend: &mut CudaBackend<D>,
    args: Linear<'_, CudaBackend<D>>,
    squares: &mut CudaBuffer,
) -> Result<bool, KernelError> {
    const OP: &str = "add_linear";
    let shape = args.weight.shape();
    if args.epilogue != Epilogue::Add || shape.layout != WeightLayout::Stacked {
        return Err(KernelError::Type { op: OP, argument: "epilogue", found: "one that does not add" });
    }
    at_least(
        OP,
        "squares",
        args.num_rows.saturating_mul(shape.out_features.div_ceil(SQUARES_FEATURES)),
        squares.len(),
    )?;
    let squares = squares.f32(OP, "squares")?;
    multiply(backend, args, None, squares).map(|()| true)
}

fn multiply<D: Device>(
    backend: &mut CudaBackend<D>,
    args: Linear<'_, CudaBackend<D>>,
    norm: Option<Norm>,
    squares: DevicePtr,
) -> Result<(), KernelError> {
    let Linear { x, num_rows, weight, bias, epilogue, out } = args;
    let x_ptr = x.f32("linear", "x")?;
    let bias_ptr = bias.map_or(Ok(DevicePtr::NULL), |bias| bias.f32("linear", "bias"))?;
    let out_ptr = out.f32("linear", "out")?;
    let shape = weight.shape();
    shape.check(num_rows, x.len(), bias.map(|bias| bias.len()), epilogue, out.len())?;
    if num_rows == 0 {
        return Ok(());
    }
    let plan = Plan::new(shape, num_rows, backend.device.facts().num_multiprocessors as usize);
    let [rounded, partials, arrivals] = backend.linear_workspace.take(&mut backend.device, plan.bytes)?;
    let sizes = Sizes::new(shape, num_rows, &plan)?;
    let epilogue = match epilogue {
        Epilogue::Store => 0,
        Epilogue::Add => 1,
        Epilogue::SwiGlu => 2_u32,
    };
    let args = [
        weight.ptr().into(),
        x_ptr.into(),
        rounded.into(),
        out_ptr.into(),
        bias_ptr.into(),
        partials.into(),
        arrivals.into(),
        sizes.num_rows.into(),
        sizes.in_features.into(),
        sizes.out_features.into(),
        sizes.num_stages.into(),
        sizes.slice_stages.into(),
        sizes.num_units.into(),
        sizes.ticket_units.into(),
        weight.flags().into(),
        epilogue.into(),
        norm.unwrap_or(Norm::NONE).weight.into(),
        norm.unwrap_or(Norm::NONE).squares.into(),
        norm.unwrap_or(Norm::NONE).eps.into(),
        squares.into(),
    ];
    let function = if norm.is_some() { plan.tile.norm_function } else { plan.tile.function };
    // SAFETY: these are the parameters of every product; `check` saw that buffers are long enough, and the callers those of
    // norms; the workspace is what the plan says.
    unsafe { backend.launch(kernel(function), plan.grid, [plan.tile.threads, 1, 1], plan.tile.shared_bytes, &args) }
}

/// Sizes as kernels take them.
struct Sizes {
    num_rows: u32,
    in_features: u32,
    out_features: u32,
    num_stages: u32,
    slice_stages: u32,
    num_units: u32,
    ticket_units: u32,
}

impl Sizes {
    fn new(shape: &WeightShape, num_rows: usize, plan: &Plan) -> Result<Self, KernelError> {
        let size = |argument, size: usize| {
            u32::try_from(size).map_err(|_| KernelError::Range {
                op: "linear",
                argument,
                value: size as u64,
                limit: u64::from(u32::MAX),
            })
        };
        Ok(Self {
            num_rows: size("num_rows", num_rows)?,
            in_features: size("in_features", shape.in_features)?,
            out_features: size("out_features", shape.out_features)?,
            num_stages: size("in_features", plan.num_stages)?,
            slice_stages: size("in_features", plan.slice_stages)?,
            num_units: size("num_rows", plan.num_units)?,
            ticket_units: size("num_rows", plan.ticket_units)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{WeightFormat, WeightLayout};

    fn shape(out_features: usize, in_features: usize, format: WeightFormat) -> WeightShape {
        WeightShape { out_features, in_features, layout: WeightLayout::Stacked, format }
    }

    const FORMATS: [WeightFormat; 5] =
        [WeightFormat::Bf16, WeightFormat::F32, WeightFormat::Fp8, WeightFormat::int8(4096), WeightFormat::int4()];

    #[test]
    fn slices_depend_on_the_weight_alone_and_cover_it() {
        for format in FORMATS {
            for (out_features, in_features) in [(6144, 4096), (4096, 14336), (128_256, 4096), (896, 4864), (70, 33)] {
                let shape = shape(out_features, in_features, format);
                let plans = [1, 9, 64, 65, 2048].map(|num_rows| Plan::new(&shape, num_rows, 132));
                for plan in plans {
                    assert_eq!(plan.slice_stages, plans[0].slice_stages);
                    assert_eq!(plan.slice_stages * plan.form.stage_features % 128, 0);
                    let covered = plan.grid[2] * plan.slice_stages * plan.form.stage_features;
                    assert!(plan.grid[2] == 1 || covered >= in_features);
                    assert!(plan.grid[2] == 1 || covered - plan.slice_stages * plan.form.stage_features < in_features);
                }
            }
        }
    }

    #[test]
    fn an_8b_model_fills_an_h200_and_rings_fit_every_card() {
        // Thread blocks at one row of qkv, o, gate and up, down, vocabulary.
        let blocks = [(6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336), (128_256, 4096)].map(|(out, k)| {
            let plan = Plan::new(&shape(out, k, WeightFormat::Bf16), 1, 132);
            plan.grid.iter().product::<usize>()
        });
        assert_eq!(blocks, [192, 128, 224, 128, 1002]);
        for format in FORMATS {
            for tile in Form::of(format).kind.tiles() {
                assert!(tile.shared_bytes <= 99 << 10, "{tile:?}");
            }
        }
    }

    #[test]
    fn what_is_reserved_is_enough_for_every_number_of_rows() {
        for format in FORMATS {
            let shape = shape(4096, 4096, format);
            for max_rows in [1, 7, 40, 100, 700] {
                let most = most_bytes(&shape, max_rows, 132);
                for num_rows in 1..=max_rows {
                    let needed = Plan::new(&shape, num_rows, 132).bytes;
                    assert!(needed.iter().zip(most).all(|(&needed, most)| needed <= most), "{format:?} {num_rows}");
                }
            }
        }
    }
}
