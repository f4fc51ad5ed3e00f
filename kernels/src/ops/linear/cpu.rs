use super::Linear;
use crate::cpu::{CpuBackend, Isa};
use crate::{DType, KernelError, WeightSource};
pub struct CpuWeight;
pub(crate) struct Workspace;
impl Workspace {
    pub(crate) fn new(_n: usize) -> Result<Self, KernelError> {
        Ok(Self)
    }
}
pub(crate) fn pack_weight(_b: &mut CpuBackend, _s: &WeightSource<'_>) -> Result<CpuWeight, KernelError> {
    Ok(CpuWeight)
}
pub(crate) fn weight_bytes(_isa: Isa, _o: usize, _i: usize, _d: DType) -> usize {
    0
}
pub(crate) fn linear(_b: &mut CpuBackend, _a: Linear<'_, CpuBackend>) -> Result<(), KernelError> {
    Ok(())
}
