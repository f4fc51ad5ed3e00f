use super::{Linear, WeightShape};
use crate::cuda::device::failure;
use crate::cuda::{CudaBackend, Device, DevicePtr};
use crate::{KernelError, StepLimits, WeightSource};

/// A matrix on the device, in the order that `linear.cu` reads it in.
pub struct CudaWeight {
    shape: WeightShape,
    ptr: DevicePtr,
    flags: u32,
}

impl CudaWeight {
    pub fn shape(&self) -> &WeightShape {
        &self.shape
    }

    pub(crate) fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    /// As `weight.cuh` has them.
    pub(crate) fn flags(&self) -> u32 {
        self.flags
    }
}

/// Working memory.
#[derive(Default)]
pub(crate) struct Workspace {}

impl Workspace {
    pub(crate) fn reserve<D: Device>(&mut self, _device: &mut D, _limits: &StepLimits) -> Result<(), KernelError> {
        Ok(())
    }
}

pub(crate) fn pack_weight<D: Device>(
    _backend: &mut CudaBackend<D>,
    source: &WeightSource<'_>,
) -> Result<CudaWeight, KernelError> {
    let shape = WeightShape::of(source)?;
    Err(failure(format!("no device code multiplies {}", shape.format.name())))
}

/// Bytes on the device.
pub(crate) fn weight_bytes(shape: &WeightShape) -> usize {
    shape.out_features * shape.in_features
}

pub(crate) fn linear<D: Device>(
    _backend: &mut CudaBackend<D>,
    args: Linear<'_, CudaBackend<D>>,
) -> Result<(), KernelError> {
    let shape = args.weight.shape();
    shape.check(
        args.num_rows,
        args.x.len(),
        args.bias.map(crate::cuda::CudaBuffer::len),
        args.epilogue,
        args.out.len(),
    )?;
    Err(failure(format!("no device code multiplies {}", shape.format.name())))
}
