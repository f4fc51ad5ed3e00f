//! A card, through NVIDIA's driver.
//!
//! One primary context, one queue. Uploads go through page-locked memory and so never make the host wait for the device,
//! unless it is a whole ring of uploads ahead. Modules are assembled from PTX by the driver, once: see [`module_cache`].

mod context;
pub mod module_cache;
mod modules;
mod pinned;

use std::path::PathBuf;
use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys;

pub(in crate::cuda) use self::context::failed;
use self::context::{Context, not_taken};
use self::modules::Modules;
use self::pinned::{Pinned, UploadRing};
use crate::KernelError;
use crate::cuda::device::{Arg, Device, DeviceFacts, DevicePtr, GraphId, Launch, MAX_ARGS, failure};

/// See the module's text.
pub struct Driver {
    facts: DeviceFacts,
    modules: Modules,
    graphs: Vec<sys::CUgraphExec>,
    /// Freed with the device.
    memory: Vec<sys::CUdeviceptr>,
    uploads: UploadRing,
    stream: Stream,
    /// Last: all else is part of it.
    context: Arc<Context>,
}

// SAFETY: handles of the driver may be used by any thread that has made the context current, which every call does first;
// the thread that has the `Driver` is the only one that uses these.
unsafe impl Send for Driver {}

/// Most graphs that are kept.
const MAX_GRAPHS: usize = 256;

/// What the device may have no room for, in its errors.
const RECORDING: &str = "a recording of launches";
const REPLAY: &str = "a replay";

/// Page-locked memory that a download goes to, and the event behind it.
pub struct Readback {
    memory: Pinned,
    event: Event,
    /// Bytes of the last download.
    len: usize,
}

/// The queue.
struct Stream {
    handle: sys::CUstream,
    context: Arc<Context>,
}

/// An event of a context.
struct Event {
    handle: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: as of `Driver`; it is destroyed after its context was made current.
unsafe impl Send for Event {}

impl Driver {
    /// Opens the device `ordinal`, counted as the driver does. Modules that the driver assembles are kept in
    /// `cache_folder`, if there is one. Fails in one line where there is no driver, no such device, or one that is too old.
    pub fn open(ordinal: usize, cache_folder: Option<PathBuf>) -> Result<Self, KernelError> {
        let devices = super::probe()?;
        let Some(device) = devices.get(ordinal) else {
            return Err(failure(format!("there is no device {ordinal}; the driver lists {}", devices.len())));
        };
        let info = device.clone();
        let context = Arc::new(Context::of_device(ordinal)?);
        context.enter()?;
        let facts = context.facts(info)?;
        if facts.compute_capability < [8, 0] {
            let [major, minor] = facts.compute_capability;
            let name = &facts.info.name;
            return Err(failure(format!("{name} has compute capability {major}.{minor}, 8.0 is the least")));
        }
        let stream = Stream::new(&context)?;
        let uploads = UploadRing::new(&context)?;
        let modules = Modules::new(facts.compute_capability, cache_folder)?;
        Ok(Self { facts, modules, graphs: Vec::new(), memory: Vec::new(), uploads, stream, context })
    }

    /// Says from now on that it has so many multiprocessors: how launches are cut depends on it, results must not.
    #[cfg(feature = "testing")]
    pub fn pretend_multiprocessors(&mut self, number: u32) {
        self.facts.num_multiprocessors = number;
    }
}

impl Device for Driver {
    type Readback = Readback;

    fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    fn free_bytes(&mut self) -> Result<u64, KernelError> {
        self.context.enter()?;
        let (free, _) = result::mem_get_info().map_err(|error| failed("free memory is not known", error))?;
        Ok(free as u64)
    }

    fn alloc(&mut self, what: &'static str, bytes: usize) -> Result<DevicePtr, KernelError> {
        self.context.enter()?;
        if bytes == 0 {
            return Ok(DevicePtr::NULL);
        }
        // SAFETY: the memory is filled before anybody sees its address.
        let ptr = unsafe { result::malloc_sync(bytes) }.map_err(|error| not_taken(what, bytes, error))?;
        self.memory.push(ptr);
        self.fill(DevicePtr(ptr), 0, bytes)?;
        Ok(DevicePtr(ptr))
    }

    fn upload(&mut self, to: DevicePtr, bytes: &[u8]) -> Result<(), KernelError> {
        self.context.enter()?;
        self.uploads.upload(to, bytes, self.stream.handle)
    }

    fn download(&mut self, from: DevicePtr, bytes: &mut [u8]) -> Result<(), KernelError> {
        self.context.enter()?;
        // SAFETY: the bytes are borrowed until the stream has been waited for; if that fails nothing is known to write to
        // them any more, as the context is lost.
        unsafe { result::memcpy_dtoh_async(bytes, from.0, self.stream.handle) }
            .map_err(|error| failed("a download failed", error))?;
        self.synchronize()
    }

    fn fill(&mut self, to: DevicePtr, byte: u8, bytes: usize) -> Result<(), KernelError> {
        self.context.enter()?;
        // SAFETY: the caller fills memory that `alloc` gave.
        unsafe { result::memset_d8_async(to.0, byte, bytes, self.stream.handle) }
            .map_err(|error| failed("memory could not be filled", error))
    }

    fn alloc_readback(&mut self, bytes: usize) -> Result<Readback, KernelError> {
        self.context.enter()?;
        Ok(Readback { memory: Pinned::new(&self.context, bytes)?, event: Event::new(&self.context)?, len: 0 })
    }

    fn start_download(&mut self, readback: &mut Readback, ranges: &[(DevicePtr, usize)]) -> Result<(), KernelError> {
        self.context.enter()?;
        readback.len = 0;
        for &(from, len) in ranges {
            if len == 0 {
                continue;
            }
            let to = &mut readback.memory.bytes_mut()[readback.len..][..len];
            // SAFETY: page-locked memory that nobody looks at before `finish_download` has waited for the event.
            unsafe { result::memcpy_dtoh_async(to, from.0, self.stream.handle) }
                .map_err(|error| failed("a download failed", error))?;
            readback.len += len;
        }
        readback.event.record(self.stream.handle)
    }

    fn finish_download<'a>(&mut self, readback: &'a mut Readback) -> Result<&'a [u8], KernelError> {
        self.context.enter()?;
        readback.event.wait()?;
        Ok(&readback.memory.bytes_mut()[..readback.len])
    }

    fn prepare(&mut self, modules: &[&'static str]) -> Result<(), KernelError> {
        self.context.enter()?;
        self.modules.prepare(&self.context, modules)
    }

    unsafe fn launch(&mut self, launch: &Launch<'_>) -> Result<(), KernelError> {
        self.context.enter()?;
        let Launch { kernel, grid, block, shared_bytes, args } = *launch;
        if args.len() > MAX_ARGS || shared_bytes > self.facts.max_shared_bytes {
            let most = self.facts.max_shared_bytes;
            let num = args.len();
            return Err(failure(format!("{kernel}: {num} arguments, {shared_bytes} bytes of shared memory of {most}")));
        }
        let function = self.modules.function(&self.context, kernel, shared_bytes)?;
        let mut params = [std::ptr::null_mut(); MAX_ARGS];
        for (param, arg) in params.iter_mut().zip(args) {
            *param = Arg::as_ptr(arg).cast_mut();
        }
        let [grid, block] = [grid, block].map(|[x, y, z]| (x, y, z));
        let params = &mut params[..args.len()];
        // SAFETY: the function is of a loaded module; its arguments are the caller's promise, and are copied by the call.
        unsafe { result::launch_kernel(function, grid, block, shared_bytes, self.stream.handle, params) }.map_err(
            |error| match error.0 {
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => KernelError::OutOfMemory { what: "a launch", bytes: 0 },
                _ => failed(&format!("{kernel} with blocks {grid:?} of threads {block:?}"), error),
            },
        )
    }

    fn begin_capture(&mut self) -> Result<(), KernelError> {
        self.context.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is this device's.
        unsafe { result::stream::begin_capture(self.stream.handle, mode) }
            .map_err(|error| not_taken(RECORDING, 0, error))
    }

    fn end_capture(&mut self) -> Result<GraphId, KernelError> {
        self.context.enter()?;
        let error = |error| not_taken(RECORDING, 0, error);
        // SAFETY: the stream is this device's.
        let graph = unsafe { result::stream::end_capture(self.stream.handle) }.map_err(error)?;
        if graph.is_null() {
            return Err(failure("a recording was lost"));
        }
        if self.graphs.len() >= MAX_GRAPHS {
            // SAFETY: the graph was just made, and is destroyed once.
            unsafe { result::graph::destroy(graph) }.map_err(error)?;
            return Err(failure(format!("more than {MAX_GRAPHS} recordings")));
        }
        // SAFETY: the graph was just made, and is destroyed once.
        unsafe {
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let destroyed = result::graph::destroy(graph);
            let executable = executable.map_err(error)?;
            self.graphs.push(executable);
            destroyed.map_err(error)?;
        };
        Ok(GraphId(self.graphs.len() as u32 - 1))
    }

    fn replay(&mut self, graph: GraphId) -> Result<(), KernelError> {
        self.context.enter()?;
        let Some(&executable) = self.graphs.get(graph.0 as usize) else {
            return Err(failure(format!("there is no recording {}", graph.0)));
        };
        // SAFETY: graphs live as long as the device.
        unsafe { result::graph::launch(executable, self.stream.handle) }.map_err(|error| not_taken(REPLAY, 0, error))
    }

    fn synchronize(&mut self) -> Result<(), KernelError> {
        self.context.enter()?;
        // SAFETY: the stream is this device's.
        unsafe { result::stream::synchronize(self.stream.handle) }.map_err(|error| failed("the device failed", error))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.context.enter().is_err() {
            return;
        }
        // Whatever fails here fails because the context is lost, and all of it with the context.
        // SAFETY: each handle is this device's and is given back once, after the queue is empty.
        unsafe {
            let _ = result::stream::synchronize(self.stream.handle);
            for graph in self.graphs.drain(..) {
                let _ = result::graph::exec_destroy(graph);
            }
            for ptr in self.memory.drain(..) {
                let _ = result::free_sync(ptr);
            }
            self.modules.unload();
        }
    }
}

impl Stream {
    fn new(context: &Arc<Context>) -> Result<Self, KernelError> {
        let handle = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(|error| not_taken("a stream", 0, error))?;
        Ok(Self { handle, context: Arc::clone(context) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: made by `new`, destroyed once. An error means that the context is lost, and the stream with it.
            let _ = unsafe { result::stream::destroy(self.handle) };
        }
    }
}

impl Event {
    fn new(context: &Arc<Context>) -> Result<Self, KernelError> {
        let handle = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
            .map_err(|error| not_taken("an event", 0, error))?;
        Ok(Self { handle, context: Arc::clone(context) })
    }

    fn record(&self, stream: sys::CUstream) -> Result<(), KernelError> {
        // SAFETY: event and stream are of one context, and alive.
        unsafe { result::event::record(self.handle, stream) }
            .map_err(|error| failed("an event could not be recorded", error))
    }

    /// Until what was queued before the last [`Self::record`] is done.
    fn wait(&self) -> Result<(), KernelError> {
        // SAFETY: the event is alive.
        unsafe { result::event::synchronize(self.handle) }.map_err(|error| failed("the device failed", error))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: made by `new`, destroyed once. An error means that the context is lost, and the event with it.
            let _ = unsafe { result::event::destroy(self.handle) };
        }
    }
}
