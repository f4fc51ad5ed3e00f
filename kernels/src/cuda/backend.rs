//! Arithmetic on a CUDA device.

use crate::KernelError;
use crate::cuda::device::{Arg, Device, DevicePtr, KernelId, Launch};
use crate::cuda::fault::{self, Fault};

/// What launchers work with: a device, and the records of what kernels found wrong.
pub struct CudaBackend<D: Device> {
    pub(crate) device: D,
    faults: DevicePtr,
}

impl<D: Device> CudaBackend<D> {
    /// Takes the device's records.
    pub fn new(mut device: D) -> Result<Self, KernelError> {
        let faults = device.alloc("fault records", fault::ALL_RECORDS_BYTES)?;
        Ok(Self { device, faults })
    }

    /// The device under it.
    pub fn device(&mut self) -> &mut D {
        &mut self.device
    }

    /// The record of `fault`, to be handed to the kernel that looks.
    pub fn fault(&self, fault: Fault) -> Arg {
        Arg::Ptr(fault.record(self.faults))
    }

    /// Launches unless there is nothing to do.
    ///
    /// # Safety
    /// As for [`Device::launch`].
    pub unsafe fn launch(
        &mut self,
        kernel: KernelId,
        grid: [usize; 3],
        block: [u32; 3],
        shared_bytes: usize,
        args: &[Arg],
    ) -> Result<(), KernelError> {
        if grid.contains(&0) {
            return Ok(());
        }
        let too_large =
            |_| KernelError::Device { device: "cuda", cause: format!("{kernel}: no grid of {grid:?} blocks") };
        let mut grid32 = [0; 3];
        for (of, &len) in grid32.iter_mut().zip(&grid) {
            *of = u32::try_from(len).map_err(too_large)?;
        }
        let shared_bytes = u32::try_from(shared_bytes).map_err(too_large)?;
        // SAFETY: the caller vouches for the arguments.
        unsafe { self.device.launch(&Launch { kernel, grid: grid32, block, shared_bytes, args }) }
    }

    /// The first thing that kernels found wrong since it was asked before.
    pub fn take_fault(&mut self) -> Result<(), KernelError> {
        let mut records = [0; fault::ALL_RECORDS_BYTES];
        self.device.download(self.faults, &mut records)?;
        let found = fault::check(&records);
        if found.is_err() {
            self.device.fill(self.faults, 0, fault::ALL_RECORDS_BYTES)?;
        }
        found
    }
}
