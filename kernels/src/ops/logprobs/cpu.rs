use super::Logprobs;
use crate::KernelError;
use crate::cpu::CpuBackend;

pub(crate) fn logprobs(_backend: &mut CpuBackend, _args: Logprobs<'_, CpuBackend>) -> Result<(), KernelError> {
    Err(KernelError::Device { device: "cpu", cause: "logprobs is not there yet".to_owned() })
}
