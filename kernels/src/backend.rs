//! The line between models and devices.

use crate::kv_layout::KvLayout;
use crate::ops::linear::WeightShape;
use crate::ops::{
    embed::Embed, gather_rows::GatherRows, linear::Linear, logprobs::Logprobs, paged_attention::PagedAttention,
    rms_norm::RmsNorm, rope_kv_write::RopeKvWrite, rope_table::RopeTable, sample::Sample, sample::SamplerRow,
    sample::SamplerShape,
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
}

impl DType {
    /// Bytes of one number.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::I8 => 1,
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
        }
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

/// A device: buffers, copies, and one method per operation. Models are generic over it and never ask which it is.
///
/// * Activations are `F32` buffers; weights are packed at load into whatever the device multiplies fastest.
/// * All memory is taken by `alloc*` and `pack_weight` before serving; operations take none.
/// * Every output element is computed by an order of operations that depends on shapes of weights and of the cache
///   only: never on how many rows or sequences are in the batch, on threads, or on neighbours. A row computed alone, in
///   a chunk or in a batch has the same bits.
/// * Operations may be queued; `read_*` waits for all before it.
pub trait Backend: Send + Sized + 'static {
    /// Memory of a fixed length and [`DType`] on the device.
    type Buffer: Send;
    /// A packed matrix, see [`WeightSource`].
    type Weight: Send;
    /// One KV group's cache: all its layers and blocks, laid out by [`KvLayout`].
    type Kv: Send;
    /// Per-row parameters of the sampler, kept on the device, and its working memory.
    type Sampler: Send;

    /// What this device is.
    fn info(&self) -> DeviceInfo;

    /// Zeroed memory for `len` numbers.
    fn alloc(&mut self, dtype: DType, len: usize) -> Result<Self::Buffer, KernelError>;
    /// Copies `data` to `buffer[offset..]`. Fails unless the buffer holds `F32` and has room.
    fn write_f32(&mut self, buffer: &mut Self::Buffer, offset: usize, data: &[f32]) -> Result<(), KernelError>;
    /// Copies `data` to `buffer[offset..]`. Fails unless the buffer holds `U32` and has room.
    fn write_u32(&mut self, buffer: &mut Self::Buffer, offset: usize, data: &[u32]) -> Result<(), KernelError>;
    /// Copies `buffer[offset..]` to all of `out`, after everything queued before.
    fn read_f32(&mut self, buffer: &Self::Buffer, offset: usize, out: &mut [f32]) -> Result<(), KernelError>;
    /// Copies `buffer[offset..]` to all of `out`, after everything queued before.
    fn read_u32(&mut self, buffer: &Self::Buffer, offset: usize, out: &mut [u32]) -> Result<(), KernelError>;

    /// Packs a matrix for [`Backend::linear`] and [`Backend::embed`].
    fn pack_weight(&mut self, source: &WeightSource<'_>) -> Result<Self::Weight, KernelError>;
    /// Bytes that a packed matrix of this shape takes, for the memory plan.
    fn weight_bytes(&self, shape: &WeightShape) -> usize;
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

    /// See [`Embed`].
    fn embed(&mut self, args: Embed<'_, Self>) -> Result<(), KernelError>;
    /// See [`RmsNorm`].
    fn rms_norm(&mut self, args: RmsNorm<'_, Self>) -> Result<(), KernelError>;
    /// See [`Linear`].
    fn linear(&mut self, args: Linear<'_, Self>) -> Result<(), KernelError>;
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

    /// Sums `buffer` over all ranks of a tensor-parallel group, in rank order. With one rank there is nothing to add.
    fn all_reduce(&mut self, buffer: &mut Self::Buffer) -> Result<(), KernelError> {
        let _ = buffer;
        Ok(())
    }
}
