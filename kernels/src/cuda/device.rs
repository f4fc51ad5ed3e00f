//! What the host side needs of a CUDA device: memory, copies in order, launches, and launches recorded once and replayed.
//!
//! [`crate::cuda::CudaBackend`] is written once over this: over the driver where there is a card, over an emulation of the
//! same sources where there is none, and over a recording fake where only the host's decisions are asked about.

use std::ffi::c_void;
use std::fmt;

use crate::{DeviceInfo, KernelError};

/// Alignment of all memory of a device.
pub const ALIGN: usize = 256;

/// Most arguments of a kernel.
pub const MAX_ARGS: usize = 32;

/// An address in a device's memory. Only the device that gave it can read what is there.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    /// No memory: what an absent argument is for a kernel.
    pub const NULL: Self = Self(0);

    /// The address `bytes` later.
    pub const fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

impl fmt::Debug for DevicePtr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A kernel: an `extern "C" __global__` function of the module that was made of `ops/<module>/<module>.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KernelId {
    /// Name of the operation's folder.
    pub module: &'static str,
    pub function: &'static str,
}

impl fmt::Display for KernelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::{}", self.module, self.function)
    }
}

/// An argument of a kernel, of the very type that the kernel's parameter has (pointers are 8 bytes).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    Ptr(DevicePtr),
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
}

impl Arg {
    /// Where the value lies, as launches want it: valid as long as `self` is.
    pub fn as_ptr(&self) -> *const c_void {
        match self {
            Self::Ptr(ptr) => (&raw const ptr.0).cast(),
            Self::U32(value) => (&raw const *value).cast(),
            Self::I32(value) => (&raw const *value).cast(),
            Self::U64(value) => (&raw const *value).cast(),
            Self::F32(value) => (&raw const *value).cast(),
        }
    }
}

impl From<DevicePtr> for Arg {
    fn from(ptr: DevicePtr) -> Self {
        Self::Ptr(ptr)
    }
}

impl From<u32> for Arg {
    fn from(value: u32) -> Self {
        Self::U32(value)
    }
}

impl From<i32> for Arg {
    fn from(value: i32) -> Self {
        Self::I32(value)
    }
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self::U64(value)
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Self::F32(value)
    }
}

/// One launch of a kernel. A grid with a zero is nothing to do, and is not launched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Launch<'a> {
    pub kernel: KernelId,
    /// Thread blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block; at most [`DeviceFacts::max_shared_bytes`].
    pub shared_bytes: u32,
    /// In the order of the kernel's parameters; at most [`MAX_ARGS`].
    pub args: &'a [Arg],
}

/// What is fixed about a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    pub info: DeviceInfo,
    /// Major and minor: `[9, 0]` for an H100.
    pub compute_capability: [u32; 2],
    pub num_multiprocessors: u32,
    /// Most dynamic shared memory that a thread block can ask for.
    pub max_shared_bytes: u32,
    pub l2_bytes: u64,
    /// All memory of the device, taken or free.
    pub total_bytes: u64,
}

impl DeviceFacts {
    /// Whether modules made for `sm_90a` run here.
    pub fn is_hopper(&self) -> bool {
        self.compute_capability == [9, 0]
    }
}

/// Launches that were captured; see [`Device::begin_capture`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GraphId(pub u32);

/// A CUDA device with one queue. Calls are carried out in their order; those that do not say that they wait may return
/// before. Memory and graphs live as long as the device.
///
/// Errors are [`KernelError::OutOfMemory`] and [`KernelError::Device`]; after the latter, what the device holds is not
/// known any more.
pub trait Device: Send + Sized + 'static {
    /// Memory on the host that a download goes to while the queue goes on.
    type Readback: Send;

    fn facts(&self) -> &DeviceFacts;

    /// Bytes that could still be taken.
    fn free_bytes(&mut self) -> Result<u64, KernelError>;

    /// Zeroed memory, aligned to [`ALIGN`]. `what` names it in the error. No bytes are [`DevicePtr::NULL`].
    fn alloc(&mut self, what: &'static str, bytes: usize) -> Result<DevicePtr, KernelError>;

    /// Copies to the device. The bytes may change as soon as the call returns.
    fn upload(&mut self, to: DevicePtr, bytes: &[u8]) -> Result<(), KernelError>;

    /// Copies to the host, and waits for everything before.
    fn download(&mut self, from: DevicePtr, bytes: &mut [u8]) -> Result<(), KernelError>;

    /// Sets all bytes.
    fn fill(&mut self, to: DevicePtr, byte: u8, bytes: usize) -> Result<(), KernelError>;

    /// Memory for downloads of at most so many bytes.
    fn alloc_readback(&mut self, bytes: usize) -> Result<Self::Readback, KernelError>;

    /// Copies `ranges` to the host, one after the other, after everything before; what is queued later does not delay it.
    fn start_download(
        &mut self,
        readback: &mut Self::Readback,
        ranges: &[(DevicePtr, usize)],
    ) -> Result<(), KernelError>;

    /// Waits for the last [`Self::start_download`] to `readback`, and for nothing behind it: all its bytes.
    fn finish_download<'a>(&mut self, readback: &'a mut Self::Readback) -> Result<&'a [u8], KernelError>;

    /// Makes all kernels of these modules ready, so that no launch has to: several modules at a time where that helps.
    fn prepare(&mut self, modules: &[&'static str]) -> Result<(), KernelError>;

    /// Runs a kernel.
    ///
    /// # Safety
    /// The number of arguments and their types are the kernel's, and what it reads and writes by them is memory of this
    /// device.
    unsafe fn launch(&mut self, launch: &Launch<'_>) -> Result<(), KernelError>;

    /// From here to [`Self::end_capture`] launches and fills are recorded, not run. Nothing else is done in between. Every
    /// kernel was launched before. [`KernelError::OutOfMemory`] of this, of what is recorded or of its end leaves the device as
    /// it was, without a recording.
    fn begin_capture(&mut self) -> Result<(), KernelError>;

    /// Ends the recording. Where something failed in between, this is called all the same, and may fail too.
    fn end_capture(&mut self) -> Result<GraphId, KernelError>;

    /// Runs what was recorded. [`KernelError::OutOfMemory`] means that nothing of it ran.
    fn replay(&mut self, graph: GraphId) -> Result<(), KernelError>;

    /// Waits for everything before.
    fn synchronize(&mut self) -> Result<(), KernelError>;
}

/// The failure of a device, in one line.
pub fn failure(cause: impl Into<String>) -> KernelError {
    KernelError::Device { device: "cuda", cause: cause.into() }
}
