use super::{Sample, SamplerRow, SamplerShape};
use crate::KernelError;
use crate::cpu::CpuBackend;

pub struct CpuSampler;

pub(crate) fn alloc_sampler(_backend: &mut CpuBackend, _shape: &SamplerShape) -> Result<CpuSampler, KernelError> {
    Err(KernelError::Device { device: "cpu", cause: "sample is not there yet".to_owned() })
}

pub(crate) fn set_sampler_row(
    _backend: &mut CpuBackend,
    _sampler: &mut CpuSampler,
    _row: u32,
    _params: &SamplerRow<'_>,
) -> Result<(), KernelError> {
    Err(KernelError::Device { device: "cpu", cause: "sample is not there yet".to_owned() })
}

pub(crate) fn sample(_backend: &mut CpuBackend, _args: Sample<'_, CpuBackend>) -> Result<(), KernelError> {
    Err(KernelError::Device { device: "cpu", cause: "sample is not there yet".to_owned() })
}
