use super::PagedAttention;
use crate::KernelError;
use crate::cpu::CpuBackend;

pub(crate) fn paged_attention(_backend: &mut CpuBackend, _args: PagedAttention<'_, CpuBackend>) -> Result<(), KernelError> {
    Err(KernelError::Device { device: "cpu", cause: "paged_attention is not there yet".to_owned() })
}
