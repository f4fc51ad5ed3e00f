//! CUDA devices. The driver is loaded at run time: the crate builds and starts on machines that have none.
//!
//! [`CudaBackend`] is the arithmetic, written once over [`Device`]. The launchers lie beside the code that they launch, in
//! `ops/<op>/cuda.rs` and `ops/<op>/<op>.cu`.

pub mod backend;
pub mod device;
pub mod driver;
pub mod fault;
pub mod memory;
pub mod ptx;
#[cfg(feature = "testing")]
pub mod recorder;

pub use crate::ops::linear::cuda::CudaWeight;
pub use crate::ops::peaks::cuda as peaks;
pub use backend::CudaBackend;
pub use device::{Arg, Device, DeviceFacts, DevicePtr, GraphId, KernelId, Launch};
pub use driver::Driver;
pub use fault::Fault;
pub(crate) use memory::Workspace;
pub use memory::{CudaBuffer, CudaKv};

use cudarc::driver::DriverError;
use cudarc::driver::result;
use cudarc::driver::sys::CUdevice_attribute as Attribute;

use self::device::failure;
use self::driver::failed;
use crate::{DeviceInfo, KernelError};

/// The CUDA devices of this machine, in the driver's order. Fails with one clear line where there is no driver, no
/// device, or a driver that does not start; never panics.
pub fn probe() -> Result<Vec<DeviceInfo>, KernelError> {
    // First of all: every other call panics where the library cannot be loaded.
    // SAFETY: loads the driver's library, as any program that uses CUDA does.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err(failure("no driver here (libcuda could not be loaded)"));
    }
    result::init().map_err(|error| failed("the driver does not start", error))?;
    let num_devices = result::device::get_count().map_err(|error| failed("the driver lists no devices", error))?;
    (0..num_devices)
        .map(|ordinal| describe(ordinal).map_err(|error| failed("a device does not describe itself", error)))
        .collect()
}

fn describe(ordinal: i32) -> Result<DeviceInfo, DriverError> {
    let device = result::device::get(ordinal)?;
    let attribute = |attribute| {
        // SAFETY: the device comes from the driver, just above.
        unsafe { result::device::get_attribute(device, attribute) }
    };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let num_units = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    Ok(DeviceInfo {
        kind: "cuda",
        name: result::device::get_name(device)?,
        isa: format!("sm_{major}{minor}"),
        num_units: usize::try_from(num_units).unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probing_gives_devices_or_one_line() {
        match probe() {
            Ok(devices) => assert!(devices.iter().all(|device| device.kind == "cuda" && device.num_units > 0)),
            Err(error) => {
                let line = error.to_string();
                assert!(line.starts_with("cuda: ") && !line.contains('\n'), "{line}");
            }
        }
    }
}
