//! The line between models and devices.

use std::ops::Range;

use crate::kv_layout::KvLayout;
use crate::ops::linear::{NormLinear, WeightShape};
use crate::ops::rope_kv_write::AttentionShape;
use crate::ops::{
    activation::Activation, add_rows::AddRows, embed::Embed, encoder_attention::EncoderAttention,
    gather_rows::GatherRows, layer_norm::LayerNorm, linear::Linear, logprobs::Logprobs,
    paged_attention::PagedAttention, rms_norm::RmsNorm, rope_kv_write::RopeKvWrite, rope_table::RopeTable,
    sample::Sample, sample::SamplerRow, sample::SamplerShape,
};
use crate::{KernelError, TensorFormat, WeightFormat};

/// Type of a number in a buffer or a packed weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    Bf16,
    F16,
    U32,
    /// Whole numbers of a quantized KV cache.
    I8,
    /// Numbers of [`crate::e4m3`] of one.
    F8E4M3,
}

impl DType {
    /// Bytes of one number.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::I8 | Self::F8E4M3 => 1,
        }
    }

    /// The name used in configurations and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::U32 => "u32",
            Self::I8 => "int8",
            Self::F8E4M3 => "fp8",
        }
    }

    /// Whether numbers of a KV cache have a scale for each token and head.
    pub const fn is_quantized(self) -> bool {
        matches!(self, Self::I8 | Self::F8E4M3)
    }
}

/// A matrix as it lies in a file, row-major: `[rows, cols]`. A vector has one row.
#[derive(Clone, Copy, Debug)]
pub struct HostTensor<'a> {
    pub format: TensorFormat,
    pub rows: usize,
    /// A whole number of the format's blocks.
    pub cols: usize,
    /// `rows * format.row_bytes(cols)` bytes, little-endian, any alignment.
    pub bytes: &'a [u8],
}

/// How the parts of a [`WeightSource`] become one matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightLayout {
    /// Output features of the parts one after the other: `[q; k; v]`.
    Stacked,
    /// Exactly two parts of equal shape, gate and up; stored so that [`crate::ops::linear::Epilogue::SwiGlu`] finds
    /// both halves of an output in one tile.
    GateUp,
}

/// Weights `[out_features, in_features]` as read from files, to be packed once for a device.
#[derive(Clone, Debug)]
pub struct WeightSource<'a> {
    /// All with the same number of columns (`in_features`).
    pub parts: Vec<HostTensor<'a>>,
    pub layout: WeightLayout,
    /// What the packed weight is stored and multiplied as.
    pub format: WeightFormat,
}

/// What a device is, for log lines and reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `cpu` or `cuda`.
    pub kind: &'static str,
    /// As the device names itself.
    pub name: String,
    /// Instruction set or compute capability that kernels were chosen for.
    pub isa: String,
    /// CPU threads, or multiprocessors.
    pub num_units: usize,
}

/// The largest step that will be computed: what working memory is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    pub num_tokens: usize,
    pub num_seqs: usize,
    /// Most tokens of a sequence.
    pub context_len: usize,
    pub shape: AttentionShape,
}

/// Memory of a device that is not the host's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// All of it.
    pub total_bytes: u64,
    /// What may still be taken: what is free, within what this process was allowed to take.
    pub available_bytes: u64,
}

/// A device: buffers, copies, and one method per operation. Models are generic over it and never ask which it is.
///
/// * Activations are `F32` buffers; weights are packed at load into whatever the device multiplies fastest.
/// * All memory is taken by `alloc*` and `pack_weight` before serving; operations take none.
/// * Every output element is computed by an order of operations that depends on shapes of weights and of the cache
///   only: never on how many rows or sequences are in the batch, on threads, or on neighbours. A row computed alone, in
///   a chunk or in a batch has the same bits.
/// * Operations may be queued; reading waits for all before it. What such a device finds wrong in the contents of buffers
///   (an index past its table, say) is the error of the next reading, and the rows concerned hold anything.
pub trait Backend: Send + Sized + 'static {
    /// Memory of a fixed length and [`DType`] on the device.
    type Buffer: Send;
    /// A packed matrix, see [`WeightSource`].
    type Weight: Send;
    /// One KV group's cache: all its layers and blocks, laid out by [`KvLayout`].
    type Kv: Send;
    /// Per-row parameters of the sampler, kept on the device, and its working memory.
    type Sampler: Send;
    /// Memory of the host that results come back to while later operations run.
    type Readback: Send;
    /// Operations that were recorded, see [`Backend::capture`].
    type Graph: Send;

    /// What this device is.
    fn info(&self) -> DeviceInfo;

    /// Calls `work` once for each unit of `0..num_units`, on all threads of the host that the backend computes with; a device
    /// elsewhere has none but this one. Returns when all are done.
    fn run_on_host(&mut self, num_units: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..num_units).for_each(work);
    }

    /// Zeroed memory for `len` numbers.
    fn alloc(&mut self, dtype: DType, len: usize) -> Result<Self::Buffer, KernelError>;
    /// Copies `data` to `buffer[offset..]`. Fails unless the buffer holds `F32` and has room.
    fn write_f32(&mut self, buffer: &mut Self::Buffer, offset: usize, data: &[f32]) -> Result<(), KernelError>;
    /// Copies `data` to `buffer[offset..]`. Fails unless the buffer holds `U32` and has room.
    fn write_u32(&mut self, buffer: &mut Self::Buffer, offset: usize, data: &[u32]) -> Result<(), KernelError>;
    /// As [`Backend::write_u32`], for the many small writes of a step: they may wait for each other, and all are done when
    /// [`Backend::write_staged`] was called. Nothing else reads or writes there in between, and no two of them overlap.
    fn stage_u32(&mut self, buffer: &mut Self::Buffer, offset: usize, data: &[u32]) -> Result<(), KernelError> {
        self.write_u32(buffer, offset, data)
    }
    /// Does all that was staged.
    fn write_staged(&mut self) -> Result<(), KernelError> {
        Ok(())
    }
    /// Copies `buffer[offset..]` to all of `out`, after everything queued before.
    fn read_f32(&mut self, buffer: &Self::Buffer, offset: usize, out: &mut [f32]) -> Result<(), KernelError>;
    /// Copies `buffer[offset..]` to all of `out`, after everything queued before.
    fn read_u32(&mut self, buffer: &Self::Buffer, offset: usize, out: &mut [u32]) -> Result<(), KernelError>;

    /// Room for so many numbers of 4 bytes.
    fn alloc_readback(&mut self, len: usize) -> Result<Self::Readback, KernelError>;
    /// Copies parts of buffers of `F32` or `U32` to the host, one after the other, after everything queued before; what is
    /// queued afterwards does not delay it.
    fn start_read(
        &mut self,
        readback: &mut Self::Readback,
        parts: &[(&Self::Buffer, Range<usize>)],
    ) -> Result<(), KernelError>;
    /// Waits for the last [`Backend::start_read`] to `readback`, and for nothing behind it. Its numbers as they lie in
    /// memory: those of `F32` as their bits.
    fn finish_read<'a>(&mut self, readback: &'a mut Self::Readback) -> Result<&'a [u32], KernelError>;

    /// Records the operations that `operations` calls instead of running them: sizes and buffers are what they are now, the
    /// contents of buffers what they will be at each [`Backend::replay`]. They were run once before, with the same sizes;
    /// nothing is written, read or allocated among them. `None`, and nothing of it will run, where a replay saves no time or the
    /// device has no memory for a recording.
    fn capture(
        &mut self,
        operations: impl FnOnce(&mut Self) -> Result<(), KernelError>,
    ) -> Result<Option<Self::Graph>, KernelError>;
    /// Runs what was recorded. `KernelError::OutOfMemory` means that nothing of it ran.
    fn replay(&mut self, graph: &Self::Graph) -> Result<(), KernelError>;
    /// Whether [`Backend::capture`] records.
    fn can_capture(&self) -> bool;

    /// Takes the working memory of steps of at most this size, once all weights are packed. Without it operations take what
    /// they need when they first need it.
    fn reserve(&mut self, limits: &StepLimits) -> Result<(), KernelError>;
    /// Memory that the device has of its own. `None` where it computes in the host's.
    fn memory(&mut self) -> Result<Option<DeviceMemory>, KernelError>;
    /// Whether planning a step while another is computed takes nothing from the device.
    fn computes_beside_the_host(&self) -> bool;
    /// Rows of logits that are worth computing at a time.
    fn logits_tile(&self) -> usize;

    /// Packs a matrix for [`Backend::linear`] and [`Backend::embed`].
    fn pack_weight(&mut self, source: &WeightSource<'_>) -> Result<Self::Weight, KernelError>;
    /// The least seconds in which these packed matrices can be read once, one after the other, with nothing done to them:
    /// what a step of few rows is measured against. Best of some passes; `None` where a device does not measure it.
    fn seconds_of_reading(&mut self, weights: &[&Self::Weight]) -> Option<f64> {
        let _ = weights;
        None
    }
    /// Bytes that a packed matrix of this shape is expected to take, for the memory plan.
    fn weight_bytes(&self, shape: &WeightShape) -> usize;
    /// Bytes that a packed matrix takes: more than expected where its numbers cannot be stored as compactly.
    fn packed_bytes(&self, weight: &Self::Weight) -> usize;
    /// One KV group's cache.
    fn alloc_kv(&mut self, layout: &KvLayout) -> Result<Self::Kv, KernelError>;
    /// The sampler's tables for so many rows.
    fn alloc_sampler(&mut self, shape: &SamplerShape) -> Result<Self::Sampler, KernelError>;
    /// Sets the parameters of one row; they stay until set again.
    fn set_sampler_row(
        &mut self,
        sampler: &mut Self::Sampler,
        row: u32,
        params: &SamplerRow<'_>,
    ) -> Result<(), KernelError>;
    /// Replaces the mask of one row (see [`SamplerRow::mask`]) and nothing else, in the order of all that is queued: what
    /// samples before keeps the mask that it had. `mask` may be written again as soon as the call returns.
    fn set_sampler_mask(&mut self, sampler: &mut Self::Sampler, row: u32, mask: &[u32]) -> Result<(), KernelError>;

    /// See [`Embed`].
    fn embed(&mut self, args: Embed<'_, Self>) -> Result<(), KernelError>;
    /// See [`RmsNorm`].
    fn rms_norm(&mut self, args: RmsNorm<'_, Self>) -> Result<(), KernelError>;
    /// See [`Linear`].
    fn linear(&mut self, args: Linear<'_, Self>) -> Result<(), KernelError>;
    /// See [`NormLinear`].
    fn norm_linear(&mut self, args: NormLinear<'_, Self>) -> Result<(), KernelError> {
        args.apart(self)
    }
    /// As [`Backend::linear`] with [`crate::ops::linear::Epilogue::Add`] and a stacked weight. Whether it left sums of squares
    /// of what is in `out` now, for a norm behind it: `F32` `[num_rows, out_features / SQUARES_FEATURES]`, rounded up. That
    /// depends on the weight alone.
    fn add_linear(&mut self, args: Linear<'_, Self>, squares: &mut Self::Buffer) -> Result<bool, KernelError> {
        let _ = squares;
        self.linear(args).map(|()| false)
    }
    /// See [`RopeTable`].
    fn rope_table(&mut self, args: RopeTable<'_, Self>) -> Result<(), KernelError>;
    /// See [`RopeKvWrite`].
    fn rope_kv_write(&mut self, args: RopeKvWrite<'_, Self>) -> Result<(), KernelError>;
    /// See [`PagedAttention`].
    fn paged_attention(&mut self, args: PagedAttention<'_, Self>) -> Result<(), KernelError>;
    /// See [`GatherRows`].
    fn gather_rows(&mut self, args: GatherRows<'_, Self>) -> Result<(), KernelError>;
    /// See [`Sample`].
    fn sample(&mut self, args: Sample<'_, Self>) -> Result<(), KernelError>;
    /// See [`Logprobs`].
    fn logprobs(&mut self, args: Logprobs<'_, Self>) -> Result<(), KernelError>;

    /// See [`LayerNorm`]. This and what follows is what encoders need beside; a device that has no code for it refuses.
    fn layer_norm(&mut self, _args: LayerNorm<'_, Self>) -> Result<(), KernelError> {
        Err(not_here(self, LayerNorm::<Self>::OP))
    }
    /// See [`Activation`].
    fn activation(&mut self, _args: Activation<'_, Self>) -> Result<(), KernelError> {
        Err(not_here(self, Activation::<Self>::OP))
    }
    /// See [`AddRows`].
    fn add_rows(&mut self, _args: AddRows<'_, Self>) -> Result<(), KernelError> {
        Err(not_here(self, AddRows::<Self>::OP))
    }
    /// See [`EncoderAttention`].
    fn encoder_attention(&mut self, _args: EncoderAttention<'_, Self>) -> Result<(), KernelError> {
        Err(not_here(self, EncoderAttention::<Self>::OP))
    }

    /// Sums `buffer` over all ranks of a tensor-parallel group, in rank order. With one rank there is nothing to add.
    fn all_reduce(&mut self, buffer: &mut Self::Buffer) -> Result<(), KernelError> {
        let _ = buffer;
        Ok(())
    }
}

/// An operation that a device has no code for.
fn not_here<B: Backend>(backend: &B, op: &'static str) -> KernelError {
    KernelError::Device { device: backend.info().kind, cause: format!("{op} has no code for this device") }
}

/// Refuses a range that a buffer of `found` numbers does not have.
pub(crate) fn check_room(op: &'static str, found: usize, offset: usize, len: usize) -> Result<(), KernelError> {
    match offset.checked_add(len) {
        Some(expected) if expected <= found => Ok(()),
        end => Err(KernelError::Shape { op, argument: "buffer", expected: end.unwrap_or(usize::MAX), found }),
    }
}
