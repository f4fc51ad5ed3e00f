//! Host memory of the CPU device: aligned, zeroed, and given by the system before anything is computed in it.

use std::alloc::Layout;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ThreadPool;
use crate::{DType, KernelError, KvLayout};

/// Alignment of everything here: one cache line, one AVX-512 register.
pub const ALIGN: usize = 64;

/// From this size on memory comes straight from the system in whole pages, huge ones where they are to be had.
const MAP_FROM_BYTES: usize = 4 << 20;

/// Bytes of a huge page; mapped memory starts at a multiple of it.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Bytes that [`AlignedBytes::populate`] asks the system for at a time.
const POPULATE_BYTES: usize = 32 << 20;

/// The least that systems call a page.
const PAGE_BYTES: usize = 4096;

/// Zeroed bytes, aligned to [`ALIGN`]. Large ones are mapped straight from the system.
pub(crate) struct AlignedBytes {
    ptr: NonNull<u8>,
    len: usize,
    owner: Owner,
}

/// Who takes the memory back.
enum Owner {
    Nobody,
    Allocator {
        base: NonNull<u8>,
        layout: Layout,
    },
    #[cfg(unix)]
    Mapping {
        base: NonNull<u8>,
        len: usize,
    },
    /// A part of an arena's chunk, which lives as long as any of its parts.
    Chunk {
        _chunk: Arc<AlignedBytes>,
    },
}

// SAFETY: the memory is owned, plain bytes; shared access only reads.
unsafe impl Send for AlignedBytes {}
// SAFETY: as above; every write goes through `&mut self` or through a `SharedMut` made from it.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    /// `len` zero bytes that are resident. `what` names them in the error.
    pub(crate) fn zeroed(what: &'static str, len: usize) -> Result<Self, KernelError> {
        let mut bytes = Self::reserved(what, len)?;
        bytes.populate(what, None)?;
        Ok(bytes)
    }

    /// `len` zero bytes whose pages the system gives when they are first written: for what is filled at once, or
    /// populated with the help of a pool.
    pub(crate) fn reserved(what: &'static str, len: usize) -> Result<Self, KernelError> {
        let out_of_memory = || KernelError::OutOfMemory { what, bytes: len as u64 };
        if len == 0 {
            // An aligned address that is never read: there are no bytes behind it.
            let ptr = NonNull::new(std::ptr::without_provenance_mut::<u8>(ALIGN)).expect("ALIGN is not zero");
            return Ok(Self { ptr, len, owner: Owner::Nobody });
        }
        #[cfg(unix)]
        if len >= MAP_FROM_BYTES {
            return Self::mapped(len).ok_or_else(out_of_memory);
        }
        // The standard allocator writes zeros itself when asked for more than its natural alignment, so ask for a
        // little more memory instead and align by hand.
        let padded = len.checked_add(ALIGN).ok_or_else(out_of_memory)?;
        let layout = Layout::from_size_align(padded, 16).map_err(|_| out_of_memory())?;
        // SAFETY: the layout has a size above zero.
        let base = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).ok_or_else(out_of_memory)?;
        // SAFETY: the offset is below ALIGN and the allocation is ALIGN longer than `len`.
        let ptr = unsafe { base.add(base.align_offset(ALIGN)) };
        Ok(Self { ptr, len, owner: Owner::Allocator { base, layout } })
    }

    #[cfg(unix)]
    fn mapped(len: usize) -> Option<Self> {
        let map_len = len.checked_add(2 * HUGE_PAGE_BYTES)? / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
        // SAFETY: an anonymous private mapping at an address of the system's choice touches no memory of ours.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return None;
        }
        let base = NonNull::new(base.cast::<u8>())?;
        // SAFETY: the offset is below HUGE_PAGE_BYTES and the mapping is at least that much longer than `len`.
        let ptr = unsafe { base.add(base.align_offset(HUGE_PAGE_BYTES)) };
        // Advice only: where it is refused, small pages do.
        #[cfg(target_os = "linux")]
        // SAFETY: the range lies inside the mapping made above.
        unsafe {
            libc::madvise(ptr.as_ptr().cast(), len, libc::MADV_HUGEPAGE);
        }
        Some(Self { ptr, len, owner: Owner::Mapping { base, len: map_len } })
    }

    /// Makes all pages resident now, so that no step waits for the system to give and clear them, or finds that there
    /// are none left. Fails where the system says so; one that promises more than it has ends processes instead.
    pub(crate) fn populate(&mut self, what: &'static str, pool: Option<&ThreadPool>) -> Result<(), KernelError> {
        let num_pieces = self.len.div_ceil(POPULATE_BYTES);
        let is_refused = AtomicBool::new(false);
        let memory = &*self;
        let populate = |_: usize, pieces: Range<usize>| {
            for piece in pieces {
                let start = piece * POPULATE_BYTES;
                if !memory.populate_piece(start..(start + POPULATE_BYTES).min(memory.len)) {
                    is_refused.store(true, Ordering::Relaxed);
                }
            }
        };
        match pool {
            Some(pool) => pool.run_ranges(num_pieces, 1, &populate),
            None => populate(0, 0..num_pieces),
        }
        match is_refused.into_inner() {
            true => Err(KernelError::OutOfMemory { what, bytes: self.len as u64 }),
            false => Ok(()),
        }
    }

    /// False where there is no memory.
    fn populate_piece(&self, range: Range<usize>) -> bool {
        #[cfg(target_os = "linux")]
        if matches!(self.owner, Owner::Mapping { .. }) {
            // SAFETY: the range lies inside the mapping, which starts at a page; pages keep what they hold.
            let done = unsafe {
                libc::madvise(self.ptr.add(range.start).as_ptr().cast(), range.len(), libc::MADV_POPULATE_WRITE)
            };
            if done == 0 {
                return true;
            }
            // Systems before Linux 5.14 do not know this advice.
            if std::io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL) {
                return false;
            }
        }
        for offset in range.step_by(PAGE_BYTES) {
            // SAFETY: the byte is inside this memory, and nobody else can reach it: `populate` has the only reference,
            // and every piece is one thread's. It keeps its value. Volatile, so that it is written all the same.
            unsafe {
                let byte = self.ptr.add(offset).as_ptr();
                byte.write_volatile(byte.read_volatile());
            }
        }
        true
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.ptr.as_ptr()
    }

    /// All of it as numbers of a plain type. Bytes that do not fill a number at the end are left out.
    pub(crate) fn view<T: Plain>(&self) -> &[T] {
        // SAFETY: aligned to 64, `len` bytes long, initialised, and any bits are a valid `T`.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr().cast(), self.len / size_of::<T>()) }
    }

    /// As [`Self::view`], to be written.
    pub(crate) fn view_mut<T: Plain>(&mut self) -> &mut [T] {
        // SAFETY: as in `view`, and `&mut self` makes it the only access.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr().cast(), self.len / size_of::<T>()) }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        match &self.owner {
            Owner::Nobody | Owner::Chunk { .. } => {}
            // SAFETY: base and layout are those of the allocation, which is given back once.
            Owner::Allocator { base, layout } => unsafe { std::alloc::dealloc(base.as_ptr(), *layout) },
            #[cfg(unix)]
            // SAFETY: base and length are those of the mapping, which is given back once.
            Owner::Mapping { base, len } => unsafe {
                libc::munmap(base.as_ptr().cast(), *len);
            },
        }
    }
}

/// Many pieces of memory one after the other in large chunks, so that pieces smaller than a huge page lie in huge pages
/// too. What is left of a chunk is not resident.
#[derive(Default)]
pub(crate) struct Arena {
    chunk: Option<Arc<AlignedBytes>>,
    used: usize,
}

impl Arena {
    const CHUNK_BYTES: usize = 64 << 20;

    /// `len` zero bytes, alone where they are a large part of a chunk. They become resident as they are filled.
    pub(crate) fn zeroed(&mut self, what: &'static str, len: usize) -> Result<AlignedBytes, KernelError> {
        if len == 0 || len > Self::CHUNK_BYTES / 2 {
            return AlignedBytes::reserved(what, len);
        }
        let chunk = match &self.chunk {
            Some(chunk) if self.used + len <= chunk.len() => Arc::clone(chunk),
            _ => {
                let chunk = Arc::new(AlignedBytes::reserved(what, Self::CHUNK_BYTES)?);
                self.chunk = Some(Arc::clone(&chunk));
                self.used = 0;
                chunk
            }
        };
        // SAFETY: `used + len` is at most the chunk's length. No piece begins before the end of the one before, and a
        // chunk that was left is never taken from again, so the piece is nobody else's.
        let ptr = unsafe { chunk.ptr.add(self.used) };
        self.used += len.next_multiple_of(ALIGN);
        Ok(AlignedBytes { ptr, len, owner: Owner::Chunk { _chunk: chunk } })
    }
}

/// Numbers for which any bits are a value, with an alignment of at most [`ALIGN`].
///
/// # Safety
/// Implement for plain numbers only.
pub(crate) unsafe trait Plain: Copy {}
// SAFETY: any 32 bits are an f32.
unsafe impl Plain for f32 {}
// SAFETY: any 32 bits are a u32.
unsafe impl Plain for u32 {}
// SAFETY: any 16 bits are a u16.
unsafe impl Plain for u16 {}
// SAFETY: any 8 bits are an i8.
unsafe impl Plain for i8 {}
// SAFETY: any 8 bits are a u8.
unsafe impl Plain for u8 {}

/// `F32` or `U32` numbers in host memory.
pub struct CpuBuffer {
    dtype: DType,
    len: usize,
    bytes: AlignedBytes,
}

impl CpuBuffer {
    /// Zeros. Fails with `KernelError::Type` unless `dtype` is `F32` or `U32`.
    pub fn zeroed(dtype: DType, len: usize) -> Result<Self, KernelError> {
        if !matches!(dtype, DType::F32 | DType::U32) {
            return Err(KernelError::Type { op: "alloc", argument: "dtype", found: dtype.name() });
        }
        let num_bytes = len
            .checked_mul(dtype.size())
            .filter(|&bytes| bytes <= isize::MAX as usize)
            .ok_or(KernelError::OutOfMemory { what: "buffer", bytes: u64::MAX })?;
        Ok(Self { dtype, len, bytes: AlignedBytes::zeroed("buffer", num_bytes)? })
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Numbers in it.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn expect(&self, dtype: DType, op: &'static str, argument: &'static str) -> Result<(), KernelError> {
        if self.dtype == dtype { Ok(()) } else { Err(KernelError::Type { op, argument, found: self.dtype.name() }) }
    }

    /// All of it as `F32`. The error names the operation and its argument.
    pub fn f32(&self, op: &'static str, argument: &'static str) -> Result<&[f32], KernelError> {
        self.expect(DType::F32, op, argument)?;
        Ok(self.bytes.view())
    }

    /// All of it as `F32`, to be written.
    pub fn f32_mut(&mut self, op: &'static str, argument: &'static str) -> Result<&mut [f32], KernelError> {
        self.expect(DType::F32, op, argument)?;
        Ok(self.bytes.view_mut())
    }

    /// All of it as `U32`.
    pub fn u32(&self, op: &'static str, argument: &'static str) -> Result<&[u32], KernelError> {
        self.expect(DType::U32, op, argument)?;
        Ok(self.bytes.view())
    }

    /// All of it as `U32`, to be written.
    pub fn u32_mut(&mut self, op: &'static str, argument: &'static str) -> Result<&mut [u32], KernelError> {
        self.expect(DType::U32, op, argument)?;
        Ok(self.bytes.view_mut())
    }
}

/// One KV group's cache in host memory, laid out by [`KvLayout`].
pub struct CpuKv {
    layout: KvLayout,
    bytes: AlignedBytes,
}

impl CpuKv {
    /// Zeros for all layers and blocks, made resident by all threads of `pool`. Fails with `KernelError::Type` unless the
    /// layout holds what a cache may be stored as.
    pub fn zeroed(layout: &KvLayout, pool: &ThreadPool) -> Result<Self, KernelError> {
        if !matches!(layout.dtype, DType::F32 | DType::Bf16) && !layout.dtype.is_quantized() {
            return Err(KernelError::Type { op: "alloc_kv", argument: "dtype", found: layout.dtype.name() });
        }
        let num_bytes = [layout.num_layers, layout.num_blocks, layout.num_kv_heads]
            .into_iter()
            .try_fold(layout.head_bytes(), usize::checked_mul)
            .filter(|&bytes| bytes <= isize::MAX as usize)
            .ok_or(KernelError::OutOfMemory { what: "KV cache", bytes: u64::MAX })?;
        let mut bytes = AlignedBytes::reserved("KV cache", num_bytes)?;
        bytes.populate("KV cache", Some(pool))?;
        Ok(Self { layout: *layout, bytes })
    }

    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    fn expect(&self, dtype: DType, op: &'static str) -> Result<(), KernelError> {
        if self.layout.dtype == dtype {
            Ok(())
        } else {
            Err(KernelError::Type { op, argument: "kv", found: self.layout.dtype.name() })
        }
    }

    fn expect_quantized(&self, op: &'static str) -> Result<(), KernelError> {
        self.expect(if self.layout.dtype.is_quantized() { self.layout.dtype } else { DType::I8 }, op)
    }

    /// The whole cache as it lies in memory.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.view()
    }

    /// The whole cache of an `F32` layout.
    pub fn f32(&self, op: &'static str) -> Result<&[f32], KernelError> {
        self.expect(DType::F32, op)?;
        Ok(self.bytes.view())
    }

    /// The whole cache of an `F32` layout, to be written.
    pub fn f32_mut(&mut self, op: &'static str) -> Result<&mut [f32], KernelError> {
        self.expect(DType::F32, op)?;
        Ok(self.bytes.view_mut())
    }

    /// The whole cache of a `Bf16` layout, as bits.
    pub fn bf16(&self, op: &'static str) -> Result<&[u16], KernelError> {
        self.expect(DType::Bf16, op)?;
        Ok(self.bytes.view())
    }

    /// The whole cache of a `Bf16` layout, as bits, to be written.
    pub fn bf16_mut(&mut self, op: &'static str) -> Result<&mut [u16], KernelError> {
        self.expect(DType::Bf16, op)?;
        Ok(self.bytes.view_mut())
    }

    /// The whole cache of a quantized layout, as bytes.
    pub fn i8(&self, op: &'static str) -> Result<&[i8], KernelError> {
        self.expect_quantized(op)?;
        Ok(self.bytes.view())
    }

    /// The whole cache of a quantized layout, as bytes, to be written.
    pub fn i8_mut(&mut self, op: &'static str) -> Result<&mut [i8], KernelError> {
        self.expect_quantized(op)?;
        Ok(self.bytes.view_mut())
    }

    /// The whole cache of a quantized layout in numbers of `F32`, of which [`KvLayout::scale_indices`] are scales.
    pub fn scales(&self, op: &'static str) -> Result<&[f32], KernelError> {
        self.expect_quantized(op)?;
        Ok(self.bytes.view())
    }

    /// As [`Self::scales`], to be written.
    pub fn scales_mut(&mut self, op: &'static str) -> Result<&mut [f32], KernelError> {
        self.expect_quantized(op)?;
        Ok(self.bytes.view_mut())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_zeroed_and_as_long_as_asked() {
        for len in [0, 1, 63, 64, 4096, MAP_FROM_BYTES - 1, MAP_FROM_BYTES, MAP_FROM_BYTES + 1, 3 * HUGE_PAGE_BYTES + 5]
        {
            let mut bytes = AlignedBytes::zeroed("test", len).expect("small enough");
            assert_eq!(bytes.as_ptr() as usize % ALIGN, 0, "{len}");
            assert_eq!(bytes.len(), len);
            assert!(bytes.view::<u8>().iter().all(|&byte| byte == 0), "{len}");
            bytes.view_mut::<u8>().fill(0xa5);
            assert_eq!(bytes.view::<u8>().iter().filter(|&&byte| byte == 0xa5).count(), len);
        }
    }

    #[test]
    fn pieces_of_an_arena_are_aligned_zeroed_and_apart() {
        let mut arena = Arena::default();
        let mut pieces = Vec::new();
        for index in 0..200_usize {
            let len = (index * 7919 * 131) % (3 << 20) + 1;
            let mut piece = arena.zeroed("test", len).expect("small enough");
            assert_eq!(piece.as_ptr() as usize % ALIGN, 0);
            assert!(piece.view::<u8>()[..len.min(100)].iter().all(|&byte| byte == 0));
            piece.view_mut::<u8>()[0] = index as u8;
            piece.view_mut::<u8>()[len - 1] = index as u8;
            pieces.push(piece);
        }
        drop(arena);
        pieces.remove(0);
        for (index, piece) in (1_usize..).zip(&pieces) {
            assert_eq!((piece.view::<u8>()[0], piece.view::<u8>()[piece.len() - 1]), (index as u8, index as u8));
        }
        let large = Arena::default().zeroed("test", Arena::CHUNK_BYTES).expect("lazily zeroed");
        assert_eq!(large.len(), Arena::CHUNK_BYTES);
    }

    /// Pages of a range that are resident.
    #[cfg(target_os = "linux")]
    fn num_resident(bytes: &AlignedBytes) -> usize {
        let mut pages = vec![0_u8; bytes.len().div_ceil(PAGE_BYTES)];
        // SAFETY: the range is mapped and starts at a page; `pages` has a byte for each.
        let done = unsafe { libc::mincore(bytes.as_ptr().cast_mut().cast(), bytes.len(), pages.as_mut_ptr()) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        pages.iter().filter(|&&page| page & 1 == 1).count()
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_is_resident_when_it_is_given_and_keeps_what_it_holds() {
        let len = POPULATE_BYTES + 3 * HUGE_PAGE_BYTES;
        let pages = len / PAGE_BYTES;
        assert_eq!(num_resident(&AlignedBytes::zeroed("test", len).expect("small enough")), pages);
        let mut bytes = AlignedBytes::reserved("test", len).expect("small enough");
        assert!(num_resident(&bytes) < pages);
        bytes.view_mut::<u8>()[len - 1] = 7;
        let pool = ThreadPool::new(2).expect("threads");
        bytes.populate("test", Some(&pool)).expect("there is memory");
        assert_eq!(num_resident(&bytes), pages);
        assert!(bytes.view::<u8>()[..len - 1].iter().all(|&byte| byte == 0));
        assert_eq!(bytes.view::<u8>()[len - 1], 7);
        // The allocator's memory, page by page.
        let mut small = AlignedBytes::reserved("test", 3 * PAGE_BYTES).expect("small enough");
        small.view_mut::<u8>()[PAGE_BYTES] = 9;
        small.populate("test", None).expect("there is memory");
        assert_eq!(small.view::<u8>().iter().filter(|&&byte| byte != 0).count(), 1);
    }

    #[test]
    fn views_check_the_type() {
        let mut buffer = CpuBuffer::zeroed(DType::U32, 3).expect("small");
        assert_eq!(buffer.u32("op", "x"), Ok(&[0, 0, 0][..]));
        let refused = Err(KernelError::Type { op: "op", argument: "x", found: "u32" });
        assert_eq!(buffer.f32_mut("op", "x").map(|_| ()), refused);
        assert!(matches!(CpuBuffer::zeroed(DType::Bf16, 3), Err(KernelError::Type { .. })));
    }

    #[test]
    fn impossible_sizes_are_named() {
        assert!(matches!(CpuBuffer::zeroed(DType::F32, usize::MAX / 4), Err(KernelError::OutOfMemory { .. })));
        assert!(matches!(CpuBuffer::zeroed(DType::F32, 1 << 50), Err(KernelError::OutOfMemory { .. })));
    }
}
