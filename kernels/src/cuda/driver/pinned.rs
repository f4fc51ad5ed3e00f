//! Page-locked memory, which the device reads and writes while the host goes on.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::Event;
use super::context::{Context, failed, not_taken};
use crate::KernelError;
use crate::cuda::device::DevicePtr;

/// Bytes that host and device both reach.
pub(super) struct Pinned {
    ptr: *mut u8,
    len: usize,
    context: Arc<Context>,
}

// SAFETY: owned memory; it is freed after its context was made current.
unsafe impl Send for Pinned {}

impl Pinned {
    pub(super) fn new(context: &Arc<Context>, len: usize) -> Result<Self, KernelError> {
        // SAFETY: the bytes are set below, before anybody can read them.
        let ptr = unsafe { result::malloc_host(len.max(1), 0) }
            .map_err(|error| not_taken("page-locked memory", len, error))?;
        // SAFETY: just given, and at least `len` bytes long.
        unsafe { ptr.cast::<u8>().write_bytes(0, len) };
        Ok(Self { ptr: ptr.cast(), len, context: Arc::clone(context) })
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `len` bytes, set, and the borrow is exclusive. Who lets the device write waits before looking.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // The device may still write to it.
            let _ = result::ctx::synchronize();
            // SAFETY: given by `malloc_host`, freed once.
            let _ = unsafe { result::free_host(self.ptr.cast()) };
        }
    }
}

/// Bytes of a part of the ring.
const SEGMENT_BYTES: usize = 256 << 10;
const NUM_SEGMENTS: usize = 32;
/// Every upload starts at a multiple of this.
const ALIGN: usize = 16;

/// Where uploads lie until the device has fetched them: parts that are filled one after the other, each with an event
/// behind its last upload.
pub(super) struct UploadRing {
    memory: Pinned,
    events: Vec<Event>,
    /// Whether a part's event was recorded since the part was written to.
    is_recorded: [bool; NUM_SEGMENTS],
    segment: usize,
    /// Bytes used of the present part.
    used: usize,
}

impl UploadRing {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, KernelError> {
        Ok(Self {
            memory: Pinned::new(context, NUM_SEGMENTS * SEGMENT_BYTES)?,
            events: (0..NUM_SEGMENTS).map(|_| Event::new(context)).collect::<Result<_, _>>()?,
            is_recorded: [false; NUM_SEGMENTS],
            segment: 0,
            used: 0,
        })
    }

    /// Copies `bytes` and queues their way to the device. Waits only where the device is a whole ring behind.
    pub(super) fn upload(
        &mut self,
        mut to: DevicePtr,
        mut bytes: &[u8],
        stream: sys::CUstream,
    ) -> Result<(), KernelError> {
        while !bytes.is_empty() {
            // What fits a part is not cut.
            if self.used > 0 && self.used + bytes.len().min(SEGMENT_BYTES) > SEGMENT_BYTES {
                self.next_segment(stream)?;
            }
            let (now, later) = bytes.split_at(bytes.len().min(SEGMENT_BYTES));
            let start = self.segment * SEGMENT_BYTES + self.used;
            let staged = &mut self.memory.bytes_mut()[start..start + now.len()];
            staged.copy_from_slice(now);
            // SAFETY: this part of the ring is not written to before its event has been waited for.
            unsafe { result::memcpy_htod_async(to.0, staged, stream) }
                .map_err(|error| failed("an upload failed", error))?;
            self.used = (self.used + now.len()).next_multiple_of(ALIGN);
            (to, bytes) = (to.offset(now.len()), later);
        }
        Ok(())
    }

    fn next_segment(&mut self, stream: sys::CUstream) -> Result<(), KernelError> {
        self.events[self.segment].record(stream)?;
        self.is_recorded[self.segment] = true;
        self.segment = (self.segment + 1) % NUM_SEGMENTS;
        self.used = 0;
        if std::mem::take(&mut self.is_recorded[self.segment]) {
            self.events[self.segment].wait()?;
        }
        Ok(())
    }
}
