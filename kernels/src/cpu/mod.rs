//! The CPU device: threads, memory, and which vector instructions to use. The arithmetic lies in `ops/<op>/cpu.rs`.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
pub mod buffer;
pub mod isa;
pub(crate) mod lanes;
pub(crate) mod math;
pub mod peaks;
pub mod thread_pool;

pub use crate::ops::linear::cpu::CpuWeight;
pub use buffer::{CpuBuffer, CpuKv};
pub use isa::Isa;
pub use thread_pool::ThreadPool;

use std::convert::Infallible;
use std::ops::Range;

use self::buffer::Arena;
use crate::backend::{Backend, check_room};
use crate::ops::{
    activation::{self, Activation},
    add_rows::{self, AddRows},
    embed::{self, Embed},
    encoder_attention::{self, EncoderAttention},
    gather_rows::{self, GatherRows},
    layer_norm::{self, LayerNorm},
    linear::{self, Linear},
    logprobs::{self, Logprobs},
    paged_attention::{self, PagedAttention},
    rms_norm::{self, RmsNorm},
    rope_kv_write::{self, RopeKvWrite},
    rope_table::{self, RopeTable},
    sample::{self, Sample, SamplerRow, SamplerShape},
};
use crate::{DType, DeviceInfo, DeviceMemory, KernelError, KvLayout, StepLimits, WeightSource};

/// How to use the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuConfig {
    /// Threads that compute, the caller included: physical cores, not hyperthreads.
    pub num_threads: usize,
    /// `None` takes the best that the machine has.
    pub isa: Option<Isa>,
}

/// [`Backend`] over the cores of this machine.
pub struct CpuBackend {
    pub(crate) isa: Isa,
    pub(crate) pool: ThreadPool,
    pub(crate) weights: Arena,
    pub(crate) linear_workspace: linear::cpu::Workspace,
    pub(crate) attention_workspace: paged_attention::cpu::Workspace,
    pub(crate) encoder_scratches: Vec<Box<encoder_attention::cpu::Scratch>>,
}

/// Results that were copied when they were asked for: nothing runs later here.
pub struct CpuReadback {
    words: Vec<u32>,
    /// How many of them were copied last.
    len: usize,
}

impl CpuBackend {
    /// Starts the threads. Fails where the machine lacks `config.isa` or a thread cannot be had.
    pub fn new(config: CpuConfig) -> Result<Self, KernelError> {
        let isa = config.isa.unwrap_or_else(Isa::detect);
        if !isa.is_available() {
            return Err(KernelError::Device { device: "cpu", cause: format!("no {isa} instructions here") });
        }
        let pool = ThreadPool::new(config.num_threads)?;
        let linear_workspace = linear::cpu::Workspace::new(pool.num_threads())?;
        let attention_workspace = paged_attention::cpu::Workspace::new(pool.num_threads())?;
        let encoder_scratches = encoder_attention::cpu::Scratch::for_threads(pool.num_threads());
        Ok(Self { isa, pool, weights: Arena::default(), linear_workspace, attention_workspace, encoder_scratches })
    }

    /// The instruction set that kernels and packed weights are for.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads, the caller included.
    pub fn num_threads(&self) -> usize {
        self.pool.num_threads()
    }
}

impl Backend for CpuBackend {
    type Buffer = CpuBuffer;
    type Weight = linear::cpu::CpuWeight;
    type Kv = CpuKv;
    type Sampler = sample::cpu::CpuSampler;
    type Readback = CpuReadback;
    /// Calls cost next to nothing here.
    type Graph = Infallible;

    fn info(&self) -> DeviceInfo {
        DeviceInfo { kind: "cpu", name: cpu_name(), isa: self.isa.name().to_owned(), num_units: self.num_threads() }
    }

    fn run_on_host(&mut self, num_units: usize, work: &(dyn Fn(usize) + Sync)) {
        self.pool.run_units(num_units, &|_, unit| work(unit));
    }

    fn alloc(&mut self, dtype: DType, len: usize) -> Result<CpuBuffer, KernelError> {
        CpuBuffer::zeroed(dtype, len)
    }

    fn write_f32(&mut self, buffer: &mut CpuBuffer, offset: usize, data: &[f32]) -> Result<(), KernelError> {
        part_mut("write_f32", buffer.f32_mut("write_f32", "buffer")?, offset, data.len())?.copy_from_slice(data);
        Ok(())
    }

    fn write_u32(&mut self, buffer: &mut CpuBuffer, offset: usize, data: &[u32]) -> Result<(), KernelError> {
        part_mut("write_u32", buffer.u32_mut("write_u32", "buffer")?, offset, data.len())?.copy_from_slice(data);
        Ok(())
    }

    fn read_f32(&mut self, buffer: &CpuBuffer, offset: usize, out: &mut [f32]) -> Result<(), KernelError> {
        out.copy_from_slice(part("read_f32", buffer.f32("read_f32", "buffer")?, offset, out.len())?);
        Ok(())
    }

    fn read_u32(&mut self, buffer: &CpuBuffer, offset: usize, out: &mut [u32]) -> Result<(), KernelError> {
        out.copy_from_slice(part("read_u32", buffer.u32("read_u32", "buffer")?, offset, out.len())?);
        Ok(())
    }

    fn alloc_readback(&mut self, len: usize) -> Result<CpuReadback, KernelError> {
        Ok(CpuReadback { words: vec![0; len], len: 0 })
    }

    fn start_read(
        &mut self,
        readback: &mut CpuReadback,
        parts: &[(&CpuBuffer, Range<usize>)],
    ) -> Result<(), KernelError> {
        const OP: &str = "start_read";
        readback.len = 0;
        for (buffer, range) in parts {
            let (start, len) = (range.start, range.len());
            check_room(OP, buffer.len(), start, len)?;
            check_room(OP, readback.words.len(), readback.len, len)?;
            let to = &mut readback.words[readback.len..][..len];
            match buffer.dtype() {
                DType::F32 => {
                    let from = &buffer.f32(OP, "buffer")?[start..][..len];
                    to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_bits());
                }
                _ => to.copy_from_slice(&buffer.u32(OP, "buffer")?[start..][..len]),
            }
            readback.len += len;
        }
        Ok(())
    }

    fn finish_read<'a>(&mut self, readback: &'a mut CpuReadback) -> Result<&'a [u32], KernelError> {
        Ok(&readback.words[..readback.len])
    }

    fn capture(
        &mut self,
        _operations: impl FnOnce(&mut Self) -> Result<(), KernelError>,
    ) -> Result<Option<Infallible>, KernelError> {
        Ok(None)
    }

    fn replay(&mut self, graph: &Infallible) -> Result<(), KernelError> {
        match *graph {}
    }

    fn can_capture(&self) -> bool {
        false
    }

    /// The threads have what they need.
    fn reserve(&mut self, _limits: &StepLimits) -> Result<(), KernelError> {
        Ok(())
    }

    fn memory(&mut self) -> Result<Option<DeviceMemory>, KernelError> {
        Ok(None)
    }

    fn computes_beside_the_host(&self) -> bool {
        false
    }

    fn logits_tile(&self) -> usize {
        64
    }

    fn pack_weight(&mut self, source: &WeightSource<'_>) -> Result<Self::Weight, KernelError> {
        linear::cpu::pack_weight(self, source)
    }

    fn seconds_of_reading(&mut self, weights: &[&Self::Weight]) -> Option<f64> {
        Some(peaks::seconds_of_reading(self, weights.iter().map(|weight| weight.bytes())))
    }

    fn weight_bytes(&self, shape: &linear::WeightShape) -> usize {
        linear::cpu::weight_bytes(self.isa, shape)
    }

    fn packed_bytes(&self, weight: &Self::Weight) -> usize {
        weight.bytes().len()
    }

    fn alloc_kv(&mut self, layout: &KvLayout) -> Result<CpuKv, KernelError> {
        layout.validate()?;
        CpuKv::zeroed(layout, &self.pool)
    }

    fn alloc_sampler(&mut self, shape: &SamplerShape) -> Result<Self::Sampler, KernelError> {
        sample::cpu::alloc_sampler(self, shape)
    }

    fn set_sampler_row(
        &mut self,
        sampler: &mut Self::Sampler,
        row: u32,
        params: &SamplerRow<'_>,
    ) -> Result<(), KernelError> {
        sample::cpu::set_sampler_row(self, sampler, row, params)
    }

    fn embed(&mut self, args: Embed<'_, Self>) -> Result<(), KernelError> {
        embed::cpu::embed(self, args)
    }

    fn rms_norm(&mut self, args: RmsNorm<'_, Self>) -> Result<(), KernelError> {
        rms_norm::cpu::rms_norm(self, args)
    }

    fn linear(&mut self, args: Linear<'_, Self>) -> Result<(), KernelError> {
        linear::cpu::linear(self, args)
    }

    fn rope_table(&mut self, args: RopeTable<'_, Self>) -> Result<(), KernelError> {
        rope_table::cpu::rope_table(self, args)
    }

    fn rope_kv_write(&mut self, args: RopeKvWrite<'_, Self>) -> Result<(), KernelError> {
        rope_kv_write::cpu::rope_kv_write(self, args)
    }

    fn paged_attention(&mut self, args: PagedAttention<'_, Self>) -> Result<(), KernelError> {
        paged_attention::cpu::paged_attention(self, args)
    }

    fn gather_rows(&mut self, args: GatherRows<'_, Self>) -> Result<(), KernelError> {
        gather_rows::cpu::gather_rows(self, args)
    }

    fn sample(&mut self, args: Sample<'_, Self>) -> Result<(), KernelError> {
        sample::cpu::sample(self, args)
    }

    fn set_sampler_mask(&mut self, sampler: &mut Self::Sampler, row: u32, mask: &[u32]) -> Result<(), KernelError> {
        sample::cpu::set_sampler_mask(sampler, row, mask)
    }

    fn logprobs(&mut self, args: Logprobs<'_, Self>) -> Result<(), KernelError> {
        logprobs::cpu::logprobs(self, args)
    }

    fn layer_norm(&mut self, args: LayerNorm<'_, Self>) -> Result<(), KernelError> {
        layer_norm::cpu::layer_norm(self, args)
    }

    fn activation(&mut self, args: Activation<'_, Self>) -> Result<(), KernelError> {
        activation::cpu::activation(self, args)
    }

    fn add_rows(&mut self, args: AddRows<'_, Self>) -> Result<(), KernelError> {
        add_rows::cpu::add_rows(self, args)
    }

    fn encoder_attention(&mut self, args: EncoderAttention<'_, Self>) -> Result<(), KernelError> {
        encoder_attention::cpu::encoder_attention(self, args)
    }
}

/// `data[offset..][..len]`, or the error that names the buffer.
fn part<'a, T>(op: &'static str, data: &'a [T], offset: usize, len: usize) -> Result<&'a [T], KernelError> {
    check_room(op, data.len(), offset, len)?;
    Ok(&data[offset..offset + len])
}

/// As [`part`], to be written.
fn part_mut<'a, T>(op: &'static str, data: &'a mut [T], offset: usize, len: usize) -> Result<&'a mut [T], KernelError> {
    check_room(op, data.len(), offset, len)?;
    Ok(&mut data[offset..offset + len])
}

/// The processor's own name for itself.
fn cpu_name() -> String {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::__cpuid;
        if __cpuid(0x8000_0000).eax >= 0x8000_0004 {
            let bytes: Vec<u8> = (0x8000_0002..=0x8000_0004)
                .map(__cpuid)
                .flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
                .flat_map(u32::to_le_bytes)
                .take_while(|&byte| byte != 0)
                .collect();
            return String::from_utf8_lossy(&bytes).trim().to_owned();
        }
    }
    std::env::consts::ARCH.to_owned()
}
