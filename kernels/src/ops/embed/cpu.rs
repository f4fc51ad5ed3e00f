use super::Embed;
use crate::KernelError;
use crate::cpu::CpuBackend;
pub(crate) fn embed(_b: &mut CpuBackend, _a: Embed<'_, CpuBackend>) -> Result<(), KernelError> {
    Ok(())
}
