//! Arithmetic on a CUDA device.

use std::ops::Range;

use crate::cuda::device::{Arg, Device, DevicePtr, GraphId, KernelId, Launch, failure};
use crate::cuda::fault::{self, Fault};
use crate::cuda::memory::{CudaBuffer, CudaKv};
use crate::ops::{
    embed::{self, Embed},
    gather_rows::{self, GatherRows},
    linear::{self, Linear, NormLinear},
    logprobs::{self, Logprobs},
    paged_attention::{self, PagedAttention},
    rms_norm::{self, RmsNorm},
    rope_kv_write::{self, RopeKvWrite},
    rope_table::{self, RopeTable},
    sample::{self, Sample, SamplerRow, SamplerShape},
    write_staged,
};
use crate::{Backend, DType, DeviceInfo, DeviceMemory, KernelError, KvLayout, StepLimits, WeightSource};

/// [`Backend`] over a CUDA device. What launchers work with: the device, records of what kernels found wrong, and working
/// memory of those operations that need some.
pub struct CudaBackend<D: Device> {
    pub(crate) device: D,
    faults: DevicePtr,
    /// Of what is free: bytes that are left to others.
    spared_bytes: u64,
    pub(crate) rope_frequencies: rope_table::cuda::Kept,
    pub(crate) linear_workspace: linear::cuda::Workspace,
    pub(crate) attention_workspace: paged_attention::cuda::Workspace,
    pub(crate) staging: write_staged::cuda::Staging,
}

impl<D: Device> CudaBackend<D> {
    /// Takes the little memory that is there before any model.
    pub fn new(mut device: D) -> Result<Self, KernelError> {
        let faults = device.alloc("fault records", fault::ALL_RECORDS_BYTES)?;
        let rope_frequencies = rope_table::cuda::Kept::new(&mut device)?;
        Ok(Self {
            device,
            faults,
            spared_bytes: 0,
            rope_frequencies,
            linear_workspace: linear::cuda::Workspace::default(),
            attention_workspace: paged_attention::cuda::Workspace::default(),
            staging: write_staged::cuda::Staging::default(),
        })
    }

    /// Makes the device code of all operations ready, so that no step has to. The first time on a machine takes long: the
    /// driver assembles it.
    pub fn prepare(&mut self) -> Result<(), KernelError> {
        self.device.prepare(&crate::ops::NAMES)
    }

    /// Lets [`Backend::memory`] show no more than `bytes` as available, counted from now.
    pub fn limit_memory(&mut self, bytes: u64) -> Result<(), KernelError> {
        self.spared_bytes = self.device.free_bytes()?.saturating_sub(bytes);
        Ok(())
    }

    /// The device under it.
    pub fn device(&mut self) -> &mut D {
        &mut self.device
    }

    /// The record of `fault`, to be handed to the kernel that looks.
    pub(crate) fn fault(&self, fault: Fault) -> Arg {
        Arg::Ptr(fault.record(self.faults))
    }

    /// Launches unless there is nothing to do.
    ///
    /// # Safety
    /// As for [`Device::launch`].
    pub(crate) unsafe fn launch(
        &mut self,
        kernel: KernelId,
        grid: [usize; 3],
        block: [u32; 3],
        shared_bytes: usize,
        args: &[Arg],
    ) -> Result<(), KernelError> {
        if grid.contains(&0) {
            return Ok(());
        }
        let too_large = |_| failure(format!("{kernel}: there is no grid of {grid:?} blocks with {shared_bytes} bytes"));
        let mut grid32 = [0; 3];
        for (of, &len) in grid32.iter_mut().zip(&grid) {
            *of = u32::try_from(len).map_err(too_large)?;
        }
        let shared_bytes = u32::try_from(shared_bytes).map_err(too_large)?;
        // SAFETY: the caller vouches for the arguments.
        unsafe { self.device.launch(&Launch { kernel, grid: grid32, block, shared_bytes, args }) }
    }

    /// Downloads numbers, and what kernels found wrong before. What was found is forgotten then.
    fn read<T: Word>(&mut self, from: DevicePtr, out: &mut [T]) -> Result<(), KernelError> {
        let mut records = [0; fault::ALL_RECORDS_BYTES];
        self.device.download(self.faults, &mut records)?;
        self.report(&records)?;
        if out.is_empty() {
            return Ok(());
        }
        self.device.download(from, T::bytes_mut(out))
    }

    fn report(&mut self, records: &[u8]) -> Result<(), KernelError> {
        let found = fault::check(records);
        if found.is_err() {
            self.device.fill(self.faults, 0, fault::ALL_RECORDS_BYTES)?;
        }
        found
    }
}

/// Numbers of 4 bytes that any bits are.
trait Word: Copy {
    fn bytes(words: &[Self]) -> &[u8] {
        // SAFETY: numbers without padding, of any bits.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) }
    }

    fn bytes_mut(words: &mut [Self]) -> &mut [u8] {
        // SAFETY: as above, and any bytes make a number.
        unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), size_of_val(words)) }
    }
}

impl Word for f32 {}
impl Word for u32 {}

/// Results on their way back: numbers, then the records of what kernels found wrong.
pub struct CudaReadback<D: Device> {
    memory: D::Readback,
    /// Numbers that fit.
    room: usize,
    words: Vec<u32>,
}

/// Most parts of one reading.
const MAX_READ_PARTS: usize = 7;

impl<D: Device> Backend for CudaBackend<D> {
    type Buffer = CudaBuffer;
    type Weight = linear::cuda::CudaWeight;
    type Kv = CudaKv;
    type Sampler = sample::cuda::CudaSampler;
    type Readback = CudaReadback<D>;
    type Graph = GraphId;

    fn info(&self) -> DeviceInfo {
        self.device.facts().info.clone()
    }

    fn alloc(&mut self, dtype: DType, len: usize) -> Result<CudaBuffer, KernelError> {
        CudaBuffer::alloc(&mut self.device, dtype, len)
    }

    fn write_f32(&mut self, buffer: &mut CudaBuffer, offset: usize, data: &[f32]) -> Result<(), KernelError> {
        let to = buffer.part(DType::F32, "write_f32", offset, data.len())?;
        if data.is_empty() { Ok(()) } else { self.device.upload(to, Word::bytes(data)) }
    }

    fn write_u32(&mut self, buffer: &mut CudaBuffer, offset: usize, data: &[u32]) -> Result<(), KernelError> {
        let to = buffer.part(DType::U32, "write_u32", offset, data.len())?;
        if data.is_empty() { Ok(()) } else { self.device.upload(to, Word::bytes(data)) }
    }

    fn stage_u32(&mut self, buffer: &mut CudaBuffer, offset: usize, data: &[u32]) -> Result<(), KernelError> {
        let to = buffer.part(DType::U32, "stage_u32", offset, data.len())?;
        if data.is_empty() || write_staged::cuda::stage(self, to, data)? {
            return Ok(());
        }
        self.device.upload(to, Word::bytes(data))
    }

    fn write_staged(&mut self) -> Result<(), KernelError> {
        write_staged::cuda::flush(self)
    }

    fn read_f32(&mut self, buffer: &CudaBuffer, offset: usize, out: &mut [f32]) -> Result<(), KernelError> {
        let from = buffer.part(DType::F32, "read_f32", offset, out.len())?;
        self.read(from, out)
    }

    fn read_u32(&mut self, buffer: &CudaBuffer, offset: usize, out: &mut [u32]) -> Result<(), KernelError> {
        let from = buffer.part(DType::U32, "read_u32", offset, out.len())?;
        self.read(from, out)
    }

    fn alloc_readback(&mut self, len: usize) -> Result<CudaReadback<D>, KernelError> {
        let bytes = len.saturating_mul(4).saturating_add(fault::ALL_RECORDS_BYTES);
        Ok(CudaReadback { memory: self.device.alloc_readback(bytes)?, room: len, words: Vec::with_capacity(len) })
    }

    fn start_read(
        &mut self,
        readback: &mut CudaReadback<D>,
        parts: &[(&CudaBuffer, Range<usize>)],
    ) -> Result<(), KernelError> {
        const OP: &str = "start_read";
        let len = parts.iter().map(|(_, range)| range.len()).sum();
        for (argument, expected, found) in [("readback", len, readback.room), ("parts", parts.len(), MAX_READ_PARTS)] {
            crate::ops::at_least(OP, argument, expected, found)?;
        }
        let mut ranges = [(DevicePtr::NULL, 0); MAX_READ_PARTS + 1];
        for (to, (buffer, range)) in ranges.iter_mut().zip(parts) {
            let from = buffer.part(buffer.dtype(), OP, range.start, range.len())?;
            *to = (from, 4 * range.len());
        }
        ranges[parts.len()] = (self.faults, fault::ALL_RECORDS_BYTES);
        self.device.start_download(&mut readback.memory, &ranges[..=parts.len()])
    }

    fn finish_read<'a>(&mut self, readback: &'a mut CudaReadback<D>) -> Result<&'a [u32], KernelError> {
        let CudaReadback { memory, words, .. } = readback;
        let bytes = self.device.finish_download(memory)?;
        let (numbers, records) = bytes.split_at(bytes.len() - fault::ALL_RECORDS_BYTES);
        words.clear();
        words.extend(numbers.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)));
        self.report(records)?;
        Ok(words)
    }

    fn capture(
        &mut self,
        operations: impl FnOnce(&mut Self) -> Result<(), KernelError>,
    ) -> Result<Option<GraphId>, KernelError> {
        let recorded = self.device.begin_capture().and_then(|()| {
            let recorded = operations(self);
            // Ended in any case: the device cannot go on otherwise. What failed first is what is reported.
            let graph = self.device.end_capture();
            recorded.and(graph)
        });
        match recorded {
            Ok(graph) => Ok(Some(graph)),
            // Nothing of it ran, and it can still be run as it is.
            Err(KernelError::OutOfMemory { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn replay(&mut self, graph: &GraphId) -> Result<(), KernelError> {
        self.device.replay(*graph)
    }

    fn can_capture(&self) -> bool {
        true
    }

    fn reserve(&mut self, limits: &StepLimits) -> Result<(), KernelError> {
        self.linear_workspace.reserve(&mut self.device, limits)?;
        self.staging.reserve(&mut self.device, limits)?;
        self.attention_workspace.reserve(&mut self.device, limits)
    }

    fn memory(&mut self) -> Result<Option<DeviceMemory>, KernelError> {
        let available_bytes = self.device.free_bytes()?.saturating_sub(self.spared_bytes);
        Ok(Some(DeviceMemory { total_bytes: self.device.facts().total_bytes, available_bytes }))
    }

    fn computes_beside_the_host(&self) -> bool {
        true
    }

    /// The output layer's weights are read once for each tile, and decoding has as many rows as sequences.
    fn logits_tile(&self) -> usize {
        256
    }

    fn pack_weight(&mut self, source: &WeightSource<'_>) -> Result<Self::Weight, KernelError> {
        linear::cuda::pack_weight(self, source)
    }

    fn weight_bytes(&self, shape: &linear::WeightShape) -> usize {
        linear::cuda::weight_bytes(shape)
    }

    fn packed_bytes(&self, weight: &Self::Weight) -> usize {
        linear::cuda::weight_bytes(weight.shape())
    }

    fn alloc_kv(&mut self, layout: &KvLayout) -> Result<CudaKv, KernelError> {
        CudaKv::alloc(&mut self.device, layout)
    }

    fn alloc_sampler(&mut self, shape: &SamplerShape) -> Result<Self::Sampler, KernelError> {
        sample::cuda::alloc_sampler(self, shape)
    }

    fn set_sampler_row(
        &mut self,
        sampler: &mut Self::Sampler,
        row: u32,
        params: &SamplerRow<'_>,
    ) -> Result<(), KernelError> {
        sample::cuda::set_sampler_row(self, sampler, row, params)
    }

    fn set_sampler_mask(&mut self, sampler: &mut Self::Sampler, row: u32, mask: &[u32]) -> Result<(), KernelError> {
        sample::cuda::set_sampler_mask(self, sampler, row, mask)
    }

    fn embed(&mut self, args: Embed<'_, Self>) -> Result<(), KernelError> {
        embed::cuda::embed(self, args)
    }

    fn rms_norm(&mut self, args: RmsNorm<'_, Self>) -> Result<(), KernelError> {
        rms_norm::cuda::rms_norm(self, args)
    }

    fn linear(&mut self, args: Linear<'_, Self>) -> Result<(), KernelError> {
        linear::cuda::linear(self, args)
    }

    fn norm_linear(&mut self, args: NormLinear<'_, Self>) -> Result<(), KernelError> {
        linear::cuda::norm_linear(self, args)
    }

    fn add_linear(&mut self, args: Linear<'_, Self>, squares: &mut CudaBuffer) -> Result<bool, KernelError> {
        linear::cuda::add_linear(self, args, squares)
    }

    fn rope_table(&mut self, args: RopeTable<'_, Self>) -> Result<(), KernelError> {
        rope_table::cuda::rope_table(self, args)
    }

    fn rope_kv_write(&mut self, args: RopeKvWrite<'_, Self>) -> Result<(), KernelError> {
        rope_kv_write::cuda::rope_kv_write(self, args)
    }

    fn paged_attention(&mut self, args: PagedAttention<'_, Self>) -> Result<(), KernelError> {
        paged_attention::cuda::paged_attention(self, args)
    }

    fn gather_rows(&mut self, args: GatherRows<'_, Self>) -> Result<(), KernelError> {
        gather_rows::cuda::gather_rows(self, args)
    }

    fn sample(&mut self, args: Sample<'_, Self>) -> Result<(), KernelError> {
        sample::cuda::sample(self, args)
    }

    fn logprobs(&mut self, args: Logprobs<'_, Self>) -> Result<(), KernelError> {
        logprobs::cuda::logprobs(self, args)
    }
}
