use super::RopeKvWrite;
use crate::KernelError;
use crate::cpu::CpuBackend;

pub(crate) fn rope_kv_write(_backend: &mut CpuBackend, _args: RopeKvWrite<'_, CpuBackend>) -> Result<(), KernelError> {
    Err(KernelError::Device { device: "cpu", cause: "rope_kv_write is not there yet".to_owned() })
}
