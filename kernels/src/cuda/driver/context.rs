//! A device's primary context.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::DriverError;
use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use crate::cuda::device::{DeviceFacts, failure};
use crate::{DeviceInfo, KernelError};

/// The primary context of a device, held.
pub(super) struct Context {
    device: sys::CUdevice,
    handle: sys::CUcontext,
    /// No two have the same: the driver may give the handle of a context that is gone to a later one.
    id: u64,
}

// SAFETY: a context may be made current, and released, by any thread.
unsafe impl Send for Context {}
// SAFETY: as above; nothing here changes.
unsafe impl Sync for Context {}

thread_local! {
    /// The context that [`Context::enter`] made current last.
    static CURRENT: Cell<u64> = const { Cell::new(0) };
}

static LAST_ID: AtomicU64 = AtomicU64::new(0);

impl Context {
    /// Of a device that exists: the driver was initialised and lists it.
    pub(super) fn of_device(ordinal: usize) -> Result<Self, KernelError> {
        let ordinal = i32::try_from(ordinal).map_err(|_| failure(format!("there is no device {ordinal}")))?;
        let device = result::device::get(ordinal).map_err(|error| failed("the device is gone", error))?;
        // SAFETY: the device comes from the driver.
        let handle = unsafe { result::primary_ctx::retain(device) }
            .map_err(|error| failed("the device gives no context", error))?;
        Ok(Self { device, handle, id: LAST_ID.fetch_add(1, Ordering::Relaxed) + 1 })
    }

    /// Makes it the calling thread's own, as every call to the driver wants.
    pub(super) fn enter(&self) -> Result<(), KernelError> {
        if CURRENT.get() == self.id {
            return Ok(());
        }
        // SAFETY: the context is held.
        unsafe { result::ctx::set_current(self.handle) }.map_err(|error| failed("the context is lost", error))?;
        CURRENT.set(self.id);
        Ok(())
    }

    /// What the driver says of the device. The context is the thread's own.
    pub(super) fn facts(&self, info: DeviceInfo) -> Result<DeviceFacts, KernelError> {
        let attribute = |attribute| {
            // SAFETY: the device comes from the driver.
            let value = unsafe { result::device::get_attribute(self.device, attribute) };
            value.map(|value| u32::try_from(value).unwrap_or(0)).map_err(undescribed)
        };
        Ok(DeviceFacts {
            info,
            compute_capability: [
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ],
            num_multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            max_shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            l2_bytes: u64::from(attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?),
            // SAFETY: as above.
            total_bytes: unsafe { result::device::total_mem(self.device) }.map_err(undescribed)? as u64,
        })
    }
}

fn undescribed(error: DriverError) -> KernelError {
    failed("the device does not describe itself", error)
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: held by `of_device`, released once. The process goes on without the device if that fails.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// As [`failed`], where the device may have no room for `bytes` of `what`. Of a recording nobody knows how many: 0.
pub(super) fn not_taken(what: &'static str, bytes: usize, error: DriverError) -> KernelError {
    match error.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => KernelError::OutOfMemory { what, bytes: bytes as u64 },
        _ => failed(&format!("{what} could not be taken"), error),
    }
}

/// What was tried, and the driver's name and words for what came of it.
pub(in crate::cuda) fn failed(what: &str, error: DriverError) -> KernelError {
    let text = |text: Result<&std::ffi::CStr, DriverError>| text.map(|text| text.to_string_lossy().into_owned());
    let name = text(error.error_name()).unwrap_or_else(|_| format!("error {}", error.0 as u32));
    let words = text(error.error_string()).unwrap_or_else(|_| "no reason given".to_owned());
    failure(format!("{what}: {words} ({name})"))
}
