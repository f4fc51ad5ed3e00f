//! A device that computes nothing and remembers what it was asked to do: for tests of what the host decides.
//!
//! Memory is real, so that uploads can be looked at and downloads give what was uploaded. Kernels do nothing, except staged
//! writes, which are uploads too, and what a test hands in.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::cuda::device::{ALIGN, Arg, Device, DeviceFacts, DevicePtr, GraphId, KernelId, Launch, MAX_ARGS};
use crate::{DeviceInfo, KernelError};

/// One thing that was asked for, in order. What is recorded into a graph is not among them, its replay is.
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    Alloc { what: &'static str, bytes: usize },
    Upload { to: DevicePtr, bytes: usize },
    Download { from: DevicePtr, bytes: usize },
    StartDownload { bytes: usize },
    FinishDownload,
    Launch { kernel: KernelId, grid: [u32; 3], block: [u32; 3], shared_bytes: u32, args: Vec<Arg> },
    Capture { num_launches: usize },
    Replay(GraphId),
    Synchronize,
}

/// What a kernel does instead of nothing: it sees its launch and the device's memory, and may fail as a broken card does.
pub type Effect = Box<dyn FnMut(&Launch<'_>, &mut Memory) -> Result<(), KernelError> + Send>;

/// What was asked for, to be read from elsewhere too.
#[derive(Clone, Default)]
pub struct Calls(Arc<Mutex<Vec<Call>>>);

impl Calls {
    /// All since this was asked before.
    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn push(&self, call: Call) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(call);
    }
}

/// See the module's text.
pub struct Recorder {
    facts: DeviceFacts,
    memory: Memory,
    calls: Calls,
    /// Launches of each graph.
    graphs: Vec<Vec<OwnedLaunch>>,
    capturing: Option<Vec<OwnedLaunch>>,
    effects: BTreeMap<KernelId, Effect>,
}

/// Memory of a [`Recorder`], by address.
pub struct Memory {
    total_bytes: u64,
    taken_bytes: u64,
    /// Ascending, with gaps between them.
    regions: BTreeMap<u64, Vec<u8>>,
    next: u64,
}

struct OwnedLaunch {
    kernel: KernelId,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    args: Vec<Arg>,
}

impl Recorder {
    /// A card of so much memory, like an H100 otherwise.
    pub fn new(total_bytes: u64) -> Self {
        let info = DeviceInfo { kind: "cuda", name: "recorder".to_owned(), isa: "sm_90".to_owned(), num_units: 132 };
        let facts = DeviceFacts {
            info,
            compute_capability: [9, 0],
            num_multiprocessors: 132,
            max_shared_bytes: 227 * 1024,
            l2_bytes: 50 << 20,
            total_bytes,
        };
        let memory = Memory { total_bytes, taken_bytes: 0, regions: BTreeMap::new(), next: 1 << 20 };
        let mut recorder = Self {
            facts,
            memory,
            calls: Calls::default(),
            graphs: Vec::new(),
            capturing: None,
            effects: BTreeMap::new(),
        };
        recorder.set_effect(KernelId { module: "write_staged", function: "write_staged" }, write_staged);
        recorder
    }

    /// Gives a kernel something to do.
    pub fn set_effect(
        &mut self,
        kernel: KernelId,
        effect: impl FnMut(&Launch<'_>, &mut Memory) -> Result<(), KernelError> + Send + 'static,
    ) {
        self.effects.insert(kernel, Box::new(effect));
    }

    /// What is asked for, now and later.
    pub fn calls(&self) -> Calls {
        self.calls.clone()
    }

    /// The memory, to be looked at and changed.
    pub fn memory(&mut self) -> &mut Memory {
        &mut self.memory
    }

    fn run(&mut self, launch: &Launch<'_>) -> Result<(), KernelError> {
        match self.effects.get_mut(&launch.kernel) {
            Some(effect) => effect(launch, &mut self.memory),
            None => Ok(()),
        }
    }
}

/// Pieces to their places, as `write_staged.cu` says.
fn write_staged(launch: &Launch<'_>, memory: &mut Memory) -> Result<(), KernelError> {
    let &[Arg::Ptr(words)] = launch.args else { panic!("{launch:?}") };
    let heads = memory.words(words, 4 * launch.grid[0] as usize);
    for &[low, high, first, len] in heads.as_chunks::<4>().0 {
        let piece = memory.words(words.offset(4 * first as usize), len as usize);
        memory.set_words(DevicePtr(u64::from(low) | u64::from(high) << 32), &piece);
    }
    Ok(())
}

impl Memory {
    /// Bytes from an address on.
    ///
    /// # Panics
    /// Where they are not inside memory that was given.
    pub fn bytes(&mut self, ptr: DevicePtr, len: usize) -> &mut [u8] {
        let region = self.regions.range_mut(..=ptr.0).next_back();
        let Some((start, bytes)) = region else { panic!("{ptr:?} is nobody's memory") };
        let offset = (ptr.0 - start) as usize;
        assert!(offset + len <= bytes.len(), "{len} bytes at {ptr:?} are not inside one piece of memory");
        &mut bytes[offset..offset + len]
    }

    /// Words from an address on.
    pub fn words(&mut self, ptr: DevicePtr, len: usize) -> Vec<u32> {
        self.bytes(ptr, 4 * len).as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()
    }

    /// Sets words from an address on.
    pub fn set_words(&mut self, ptr: DevicePtr, words: &[u32]) {
        let bytes = self.bytes(ptr, 4 * words.len());
        for (to, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
    }
}

impl OwnedLaunch {
    fn of(launch: &Launch<'_>) -> Self {
        let Launch { kernel, grid, block, shared_bytes, args } = *launch;
        Self { kernel, grid, block, shared_bytes, args: args.to_vec() }
    }

    fn as_launch(&self) -> Launch<'_> {
        let &Self { kernel, grid, block, shared_bytes, ref args } = self;
        Launch { kernel, grid, block, shared_bytes, args }
    }
}

impl Device for Recorder {
    type Readback = Vec<u8>;

    fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    fn free_bytes(&mut self) -> Result<u64, KernelError> {
        Ok(self.memory.total_bytes - self.memory.taken_bytes)
    }

    fn alloc(&mut self, what: &'static str, bytes: usize) -> Result<DevicePtr, KernelError> {
        if bytes == 0 {
            return Ok(DevicePtr::NULL);
        }
        let memory = &mut self.memory;
        if bytes as u64 > memory.total_bytes - memory.taken_bytes {
            return Err(KernelError::OutOfMemory { what, bytes: bytes as u64 });
        }
        self.calls.push(Call::Alloc { what, bytes });
        memory.taken_bytes += bytes as u64;
        let ptr = DevicePtr(memory.next);
        memory.regions.insert(ptr.0, vec![0; bytes]);
        // A gap, so that what is past the end is nobody's.
        memory.next += (bytes.next_multiple_of(ALIGN) + ALIGN) as u64;
        Ok(ptr)
    }

    fn upload(&mut self, to: DevicePtr, bytes: &[u8]) -> Result<(), KernelError> {
        assert!(self.capturing.is_none(), "nothing is uploaded while launches are recorded");
        self.calls.push(Call::Upload { to, bytes: bytes.len() });
        self.memory.bytes(to, bytes.len()).copy_from_slice(bytes);
        Ok(())
    }

    fn download(&mut self, from: DevicePtr, bytes: &mut [u8]) -> Result<(), KernelError> {
        assert!(self.capturing.is_none(), "nothing is downloaded while launches are recorded");
        self.calls.push(Call::Download { from, bytes: bytes.len() });
        bytes.copy_from_slice(self.memory.bytes(from, bytes.len()));
        Ok(())
    }

    fn fill(&mut self, to: DevicePtr, byte: u8, bytes: usize) -> Result<(), KernelError> {
        assert!(self.capturing.is_none(), "fills are not recorded here");
        self.memory.bytes(to, bytes).fill(byte);
        Ok(())
    }

    fn alloc_readback(&mut self, bytes: usize) -> Result<Vec<u8>, KernelError> {
        Ok(Vec::with_capacity(bytes))
    }

    fn start_download(&mut self, readback: &mut Vec<u8>, ranges: &[(DevicePtr, usize)]) -> Result<(), KernelError> {
        readback.clear();
        for &(from, len) in ranges {
            readback.extend_from_slice(self.memory.bytes(from, len));
        }
        self.calls.push(Call::StartDownload { bytes: readback.len() });
        Ok(())
    }

    fn finish_download<'a>(&mut self, readback: &'a mut Vec<u8>) -> Result<&'a [u8], KernelError> {
        self.calls.push(Call::FinishDownload);
        Ok(readback)
    }

    fn prepare(&mut self, _modules: &[&'static str]) -> Result<(), KernelError> {
        Ok(())
    }

    unsafe fn launch(&mut self, launch: &Launch<'_>) -> Result<(), KernelError> {
        assert!(launch.args.len() <= MAX_ARGS && !launch.grid.contains(&0), "{launch:?}");
        assert!(launch.shared_bytes <= self.facts.max_shared_bytes, "{launch:?}");
        if let Some(launches) = &mut self.capturing {
            launches.push(OwnedLaunch::of(launch));
            return Ok(());
        }
        let OwnedLaunch { kernel, grid, block, shared_bytes, args } = OwnedLaunch::of(launch);
        self.calls.push(Call::Launch { kernel, grid, block, shared_bytes, args });
        self.run(launch)
    }

    fn begin_capture(&mut self) -> Result<(), KernelError> {
        assert!(self.capturing.is_none(), "one recording at a time");
        self.capturing = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&mut self) -> Result<GraphId, KernelError> {
        let launches = self.capturing.take().expect("a recording has begun");
        self.calls.push(Call::Capture { num_launches: launches.len() });
        self.graphs.push(launches);
        Ok(GraphId(self.graphs.len() as u32 - 1))
    }

    fn replay(&mut self, graph: GraphId) -> Result<(), KernelError> {
        self.calls.push(Call::Replay(graph));
        let launches = std::mem::take(&mut self.graphs[graph.0 as usize]);
        let result = launches.iter().try_for_each(|launch| self.run(&launch.as_launch()));
        self.graphs[graph.0 as usize] = launches;
        result
    }

    fn synchronize(&mut self) -> Result<(), KernelError> {
        self.calls.push(Call::Synchronize);
        Ok(())
    }
}
