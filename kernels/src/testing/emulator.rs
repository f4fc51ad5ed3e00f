//! A CUDA device on the host: the `.cu` sources compiled by the system's C++ compiler against `kernels/emulator`.
//!
//! Every access of a kernel is looked at: to no buffer, past the end of one, to shared memory that another thread touches with
//! no barrier between, before the wait of an asynchronous copy; every wait that never ends is found. The launch fails with
//! one line that says which thread did what. It is slow, and meant for tests.

mod module;

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_void};

use crate::cuda::device::{ALIGN, MAX_ARGS, failure};
use crate::cuda::{Arg, Device, DeviceFacts, DevicePtr, GraphId, KernelId, Launch};
use crate::{DeviceInfo, KernelError};
use module::{Machine, Module};

/// Bytes before and behind each buffer that nobody may write, and what they hold.
const GUARD: usize = 1024;
const GUARD_BYTE: u8 = 0xa5;

/// Memory of the device.
const TOTAL_BYTES: u64 = 1 << 30;

/// Bytes of a message.
const MAX_ERROR: usize = 1024;

/// A CUDA device on the host. Its memory is the host's: a [`DevicePtr`] is an address in this process.
pub struct Emulator {
    facts: DeviceFacts,
    /// In ascending order of addresses.
    buffers: Vec<Buffer>,
    used_bytes: u64,
    machines: BTreeMap<&'static str, Machine>,
    recording: Option<Vec<Recorded>>,
    graphs: Vec<Vec<Recorded>>,
}

/// Memory for downloads.
pub struct Readback {
    bytes: Vec<u8>,
    len: usize,
}

struct Buffer {
    what: &'static str,
    name: CString,
    /// The first guard; the data are [`GUARD`] behind it.
    memory: *mut u8,
    len: usize,
}

/// What a graph holds.
#[derive(Clone)]
enum Recorded {
    Launch { kernel: KernelId, grid: [u32; 3], block: [u32; 3], shared_bytes: u32, args: Vec<Arg> },
    Fill { to: DevicePtr, byte: u8, bytes: usize },
}

// SAFETY: the buffers belong to the device alone; the machines say so themselves.
unsafe impl Send for Buffer {}

impl Emulator {
    /// A device of compute capability 8.0 with four multiprocessors. Fails where there is no C++ compiler.
    pub fn new() -> Result<Self, KernelError> {
        Self::with_multiprocessors(4)
    }

    /// The same with another number: results must not depend on it.
    pub fn with_multiprocessors(num_multiprocessors: u32) -> Result<Self, KernelError> {
        module::compiler()?;
        let info = DeviceInfo {
            kind: "cuda",
            name: "emulator".to_owned(),
            isa: "sm_80".to_owned(),
            num_units: num_multiprocessors as usize,
        };
        let facts = DeviceFacts {
            info,
            compute_capability: [8, 0],
            num_multiprocessors,
            max_shared_bytes: 163 * 1024,
            l2_bytes: 40 << 20,
            total_bytes: TOTAL_BYTES,
        };
        Ok(Self {
            facts,
            buffers: Vec::new(),
            used_bytes: 0,
            machines: BTreeMap::new(),
            recording: None,
            graphs: Vec::new(),
        })
    }

    /// Where a range of the device's memory lies.
    fn range(&self, at: DevicePtr, bytes: usize) -> Result<*mut u8, KernelError> {
        let address = at.0 as usize;
        let index = self.buffers.partition_point(|buffer| buffer.start() + buffer.len < address + bytes);
        match self.buffers.get(index) {
            _ if bytes == 0 => Ok(std::ptr::null_mut()),
            Some(buffer) if buffer.start() <= address => {
                // SAFETY: inside of the buffer, as was just seen.
                Ok(unsafe { buffer.memory.add(GUARD + address - buffer.start()) })
            }
            _ => Err(failure(format!("a copy of {bytes} bytes at {at:?} is in no buffer"))),
        }
    }

    fn run(&mut self, launch: &Launch<'_>) -> Result<(), KernelError> {
        let kernel = launch.kernel;
        let machine = match self.machines.entry(kernel.module) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => entry.insert(Module::load(kernel.module)?.machine()),
        };
        let function = CString::new(kernel.function).map_err(|_| failure("a kernel's name holds a zero"))?;
        check_args(kernel, machine.module().parameters(&function), launch.args)?;
        if launch.shared_bytes > self.facts.max_shared_bytes {
            return Err(failure(format!("{kernel}: {} bytes of shared memory", launch.shared_bytes)));
        }
        let mut args: Vec<*const c_void> = launch.args.iter().map(Arg::as_ptr).collect();
        let buffers: Vec<module::BufferRange> = self
            .buffers
            .iter()
            .map(|buffer| module::BufferRange {
                start: buffer.start(),
                end: buffer.start() + buffer.len,
                name: buffer.name.as_ptr(),
            })
            .collect();
        let mut error = [0_u8; MAX_ERROR];
        let request = module::Request {
            kernel: function.as_ptr(),
            grid: launch.grid,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            args: args.as_mut_ptr(),
            num_args: args.len(),
            buffers: buffers.as_ptr(),
            num_buffers: buffers.len(),
            error: error.as_mut_ptr().cast(),
            error_len: error.len(),
        };
        if !machine.launch(&request) {
            let message = CStr::from_bytes_until_nul(&error).map_or("".into(), CStr::to_string_lossy);
            return Err(failure(message));
        }
        match self.buffers.iter().find(|buffer| !buffer.is_guarded()) {
            Some(buffer) => Err(failure(format!("{kernel}: what is around {} was written", buffer.what))),
            None => Ok(()),
        }
    }

    fn carry_out(&mut self, recorded: &Recorded) -> Result<(), KernelError> {
        match recorded {
            Recorded::Launch { kernel, grid, block, shared_bytes, args } => {
                self.run(&Launch { kernel: *kernel, grid: *grid, block: *block, shared_bytes: *shared_bytes, args })
            }
            &Recorded::Fill { to, byte, bytes } => {
                let to = self.range(to, bytes)?;
                if bytes > 0 {
                    // SAFETY: the range is in a buffer of this device.
                    unsafe { std::ptr::write_bytes(to, byte, bytes) };
                }
                Ok(())
            }
        }
    }

    /// Now, or when the graph is replayed.
    fn enqueue(&mut self, recorded: Recorded) -> Result<(), KernelError> {
        match &mut self.recording {
            Some(recording) => {
                recording.push(recorded);
                Ok(())
            }
            None => self.carry_out(&recorded),
        }
    }

    fn download_to(&self, from: DevicePtr, bytes: &mut [u8]) -> Result<(), KernelError> {
        let address = self.range(from, bytes.len())?;
        if !bytes.is_empty() {
            // SAFETY: the range is in a buffer of this device.
            unsafe { std::ptr::copy_nonoverlapping(address, bytes.as_mut_ptr(), bytes.len()) };
        }
        Ok(())
    }

    fn not_recording(&self, what: &str) -> Result<(), KernelError> {
        match self.recording {
            Some(_) => Err(failure(format!("{what} while launches are recorded"))),
            None => Ok(()),
        }
    }
}

/// Whether the arguments have the types of the kernel's parameters.
fn check_args(kernel: KernelId, parameters: Option<&CStr>, args: &[Arg]) -> Result<(), KernelError> {
    let parameters = parameters.ok_or_else(|| failure(format!("there is no kernel {kernel}")))?.to_bytes();
    let codes = args.iter().map(|arg| match arg {
        Arg::Ptr(_) => b'p',
        Arg::U32(_) => b'u',
        Arg::I32(_) => b'i',
        Arg::U64(_) => b'U',
        Arg::F32(_) => b'f',
    });
    let codes: Vec<u8> = codes.collect();
    if codes != parameters || args.len() > MAX_ARGS {
        let [given, wanted] = [&codes[..], parameters].map(String::from_utf8_lossy);
        return Err(failure(format!("{kernel}: arguments {given}, the parameters are {wanted}")));
    }
    Ok(())
}

impl Buffer {
    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len + 2 * GUARD, ALIGN).expect("the device has less memory than addresses")
    }

    fn new(what: &'static str, len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the size is not zero.
        let memory = unsafe { alloc_zeroed(layout) };
        if memory.is_null() {
            handle_alloc_error(layout);
        }
        // SAFETY: both guards are inside of the allocation.
        unsafe {
            std::ptr::write_bytes(memory, GUARD_BYTE, GUARD);
            std::ptr::write_bytes(memory.add(GUARD + len), GUARD_BYTE, GUARD);
        }
        Self { what, name: CString::new(what).unwrap_or_default(), memory, len }
    }

    fn start(&self) -> usize {
        self.memory.expose_provenance() + GUARD
    }

    fn is_guarded(&self) -> bool {
        // SAFETY: both guards are inside of the allocation.
        let guards = unsafe {
            [
                std::slice::from_raw_parts(self.memory, GUARD),
                std::slice::from_raw_parts(self.memory.add(GUARD + self.len), GUARD),
            ]
        };
        guards.iter().all(|guard| guard.iter().all(|&byte| byte == GUARD_BYTE))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with the same layout in `new`.
        unsafe { dealloc(self.memory, Self::layout(self.len)) };
    }
}

impl Device for Emulator {
    type Readback = Readback;

    fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    fn free_bytes(&mut self) -> Result<u64, KernelError> {
        Ok(TOTAL_BYTES - self.used_bytes)
    }

    fn alloc(&mut self, what: &'static str, bytes: usize) -> Result<DevicePtr, KernelError> {
        self.not_recording("memory is taken")?;
        if bytes == 0 {
            return Ok(DevicePtr::NULL);
        }
        if bytes as u64 > TOTAL_BYTES - self.used_bytes {
            return Err(KernelError::OutOfMemory { what, bytes: bytes as u64 });
        }
        self.used_bytes += bytes as u64;
        let buffer = Buffer::new(what, bytes);
        let start = buffer.start();
        let index = self.buffers.partition_point(|other| other.start() < start);
        self.buffers.insert(index, buffer);
        Ok(DevicePtr(start as u64))
    }

    fn upload(&mut self, to: DevicePtr, bytes: &[u8]) -> Result<(), KernelError> {
        self.not_recording("an upload")?;
        let to = self.range(to, bytes.len())?;
        if !bytes.is_empty() {
            // SAFETY: the range is in a buffer of this device, which nobody else has.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        }
        Ok(())
    }

    fn download(&mut self, from: DevicePtr, bytes: &mut [u8]) -> Result<(), KernelError> {
        self.not_recording("a download")?;
        self.download_to(from, bytes)
    }

    fn fill(&mut self, to: DevicePtr, byte: u8, bytes: usize) -> Result<(), KernelError> {
        self.enqueue(Recorded::Fill { to, byte, bytes })
    }

    fn alloc_readback(&mut self, bytes: usize) -> Result<Readback, KernelError> {
        Ok(Readback { bytes: vec![0; bytes], len: 0 })
    }

    fn start_download(&mut self, readback: &mut Readback, ranges: &[(DevicePtr, usize)]) -> Result<(), KernelError> {
        self.not_recording("a download")?;
        let len = ranges.iter().map(|range| range.1).sum();
        if len > readback.bytes.len() {
            return Err(failure(format!("a download of {len} bytes to {}", readback.bytes.len())));
        }
        let mut rest = &mut readback.bytes[..];
        for &(from, bytes) in ranges {
            let (to, behind) = rest.split_at_mut(bytes);
            self.download_to(from, to)?;
            rest = behind;
        }
        readback.len = len;
        Ok(())
    }

    fn finish_download<'a>(&mut self, readback: &'a mut Readback) -> Result<&'a [u8], KernelError> {
        Ok(&readback.bytes[..readback.len])
    }

    fn prepare(&mut self, modules: &[&'static str]) -> Result<(), KernelError> {
        modules.iter().try_for_each(|module| Module::load(module).map(drop))
    }

    unsafe fn launch(&mut self, launch: &Launch<'_>) -> Result<(), KernelError> {
        let &Launch { kernel, grid, block, shared_bytes, args } = launch;
        if self.recording.is_some() {
            return self.enqueue(Recorded::Launch { kernel, grid, block, shared_bytes, args: args.to_vec() });
        }
        self.run(launch)
    }

    fn begin_capture(&mut self) -> Result<(), KernelError> {
        self.not_recording("a second recording")?;
        self.recording = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&mut self) -> Result<GraphId, KernelError> {
        let recorded = self.recording.take().ok_or_else(|| failure("nothing was recorded"))?;
        self.graphs.push(recorded);
        Ok(GraphId(self.graphs.len() as u32 - 1))
    }

    fn replay(&mut self, graph: GraphId) -> Result<(), KernelError> {
        self.not_recording("a replay")?;
        let recorded = self.graphs.get(graph.0 as usize).cloned().ok_or_else(|| failure("there is no such graph"))?;
        recorded.iter().try_for_each(|recorded| self.carry_out(recorded))
    }

    fn synchronize(&mut self) -> Result<(), KernelError> {
        self.not_recording("a wait")
    }
}
