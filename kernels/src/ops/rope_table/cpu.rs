use super::RopeTable;
use crate::KernelError;
use crate::cpu::CpuBackend;

pub(crate) fn rope_table(_backend: &mut CpuBackend, _args: RopeTable<'_, CpuBackend>) -> Result<(), KernelError> {
    Err(KernelError::Device { device: "cpu", cause: "rope_table is not there yet".to_owned() })
}
