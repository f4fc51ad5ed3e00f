//! What [`CudaBackend`](super::CudaBackend) gives out: handles to memory that lives as long as the device.

use crate::backend::check_room;
use crate::cuda::device::{Device, DevicePtr};
use crate::{DType, KernelError, KvLayout};

/// Numbers on the device.
#[derive(Debug)]
pub struct CudaBuffer {
    ptr: DevicePtr,
    dtype: DType,
    len: usize,
}

/// One KV group's cache on the device, laid out by [`KvLayout`].
#[derive(Debug)]
pub struct CudaKv {
    ptr: DevicePtr,
    layout: KvLayout,
}

/// Working memory of an operation, grown outside of steps: what was reserved for the largest step is never grown in one.
#[derive(Debug)]
pub(crate) struct Workspace {
    what: &'static str,
    ptr: DevicePtr,
    bytes: usize,
}

impl CudaBuffer {
    /// Zeroed.
    pub(crate) fn alloc<D: Device>(device: &mut D, dtype: DType, len: usize) -> Result<Self, KernelError> {
        let bytes = len.saturating_mul(dtype.size());
        Ok(Self { ptr: device.alloc("a buffer", bytes)?, dtype, len })
    }

    /// Numbers.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no numbers.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where `len` numbers from `offset` on lie. Fails where they are not `dtype`, or there are not so many.
    pub(crate) fn part(
        &self,
        dtype: DType,
        op: &'static str,
        offset: usize,
        len: usize,
    ) -> Result<DevicePtr, KernelError> {
        let ptr = self.of_type(dtype, op, "buffer")?;
        check_room(op, self.len, offset, len)?;
        Ok(ptr.offset(offset * dtype.size()))
    }

    /// Where the numbers lie; fails where they are not `F32`, naming `argument` of `op`.
    pub fn f32(&self, op: &'static str, argument: &'static str) -> Result<DevicePtr, KernelError> {
        self.of_type(DType::F32, op, argument)
    }

    /// As [`Self::f32`], of `U32`.
    pub fn u32(&self, op: &'static str, argument: &'static str) -> Result<DevicePtr, KernelError> {
        self.of_type(DType::U32, op, argument)
    }

    fn of_type(&self, dtype: DType, op: &'static str, argument: &'static str) -> Result<DevicePtr, KernelError> {
        if self.dtype == dtype {
            Ok(self.ptr)
        } else {
            Err(KernelError::Type { op, argument, found: self.dtype.name() })
        }
    }
}

impl CudaKv {
    /// Zeroed.
    pub(crate) fn alloc<D: Device>(device: &mut D, layout: &KvLayout) -> Result<Self, KernelError> {
        layout.validate()?;
        Ok(Self { ptr: device.alloc("the KV cache", layout.total_bytes())?, layout: *layout })
    }

    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Where block 0 of layer 0 lies.
    pub fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    /// Where one layer lies: `[num_blocks, num_kv_heads]` of [`KvLayout::head_bytes`] each.
    pub fn layer(&self, layer: usize) -> DevicePtr {
        self.ptr.offset(layer * self.layout.num_blocks * self.layout.num_kv_heads * self.layout.head_bytes())
    }
}

impl Workspace {
    /// Nothing yet. `what` names it in errors.
    pub(crate) const fn new(what: &'static str) -> Self {
        Self { what, ptr: DevicePtr::NULL, bytes: 0 }
    }

    /// At least so many bytes. They hold zeros when they are taken, and then what the operation left there. What was taken
    /// before stays taken until the device goes, so whoever knows the largest step asks for it at the start.
    pub(crate) fn at_least<D: Device>(&mut self, device: &mut D, bytes: usize) -> Result<DevicePtr, KernelError> {
        if bytes > self.bytes {
            self.ptr = device.alloc(self.what, bytes)?;
            self.bytes = bytes;
        }
        Ok(self.ptr)
    }
}
