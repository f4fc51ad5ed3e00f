use super::GatherRows;
use crate::KernelError;
use crate::cpu::CpuBackend;

pub(crate) fn gather_rows(_backend: &mut CpuBackend, _args: GatherRows<'_, CpuBackend>) -> Result<(), KernelError> {
    Err(KernelError::Device { device: "cpu", cause: "gather_rows is not there yet".to_owned() })
}
