//! Pieces wait on the host until [`flush`], then go to the device as one upload, and to their places by one launch.

use crate::cuda::memory::Workspace as Memory;
use crate::cuda::{CudaBackend, Device, DevicePtr, KernelId};
use crate::{KernelError, StepLimits};

/// A thread block has a piece.
const THREADS: u32 = 256;

/// Words of a piece's head: where it goes, where it begins, how long it is.
const HEAD_WORDS: usize = 4;

/// Most words of an upload, heads included: what goes to the device in one piece.
const MAX_WORDS: usize = 64 << 10;

/// Pieces that wait.
#[derive(Debug)]
pub(crate) struct Staging {
    memory: Memory,
    /// What the device has room for; nothing waits before it is reserved.
    max_words: usize,
    heads: Vec<[u32; HEAD_WORDS]>,
    words: Vec<u32>,
    /// Heads, then words, as they are uploaded.
    blob: Vec<u8>,
}

impl Default for Staging {
    fn default() -> Self {
        let memory = Memory::new("staged uploads");
        Self { memory, max_words: 0, heads: Vec::new(), words: Vec::new(), blob: Vec::new() }
    }
}

impl Staging {
    /// Takes what steps of at most this size need: some arrays of tokens, more of sequences, with their heads.
    pub(crate) fn reserve<D: Device>(&mut self, device: &mut D, limits: &StepLimits) -> Result<(), KernelError> {
        let words = 6 * limits.num_tokens + 32 * limits.num_seqs + 1024;
        self.max_words = words.min(MAX_WORDS);
        self.heads.reserve(self.max_words / HEAD_WORDS);
        self.words.reserve(self.max_words);
        self.blob.reserve(4 * self.max_words);
        self.memory.at_least(device, 4 * self.max_words).map(|_| ())
    }

    fn num_words(&self) -> usize {
        HEAD_WORDS * self.heads.len() + self.words.len()
    }
}

/// Lets `words` wait; they go to the device at once where there is no room for them.
pub(crate) fn stage<D: Device>(
    backend: &mut CudaBackend<D>,
    to: DevicePtr,
    words: &[u32],
) -> Result<bool, KernelError> {
    if HEAD_WORDS + words.len() > backend.staging.max_words {
        flush(backend)?;
        return Ok(false);
    }
    if backend.staging.num_words() + HEAD_WORDS + words.len() > backend.staging.max_words {
        flush(backend)?;
    }
    let staging = &mut backend.staging;
    // Where the words begin is told once it is known how many heads there are.
    staging.heads.push([to.0 as u32, (to.0 >> 32) as u32, staging.words.len() as u32, words.len() as u32]);
    staging.words.extend_from_slice(words);
    Ok(true)
}

/// ```c
/// // pieces to their places; piece = blockIdx.x
/// write_staged(const uint32_t* words)
/// ```
pub(crate) fn flush<D: Device>(backend: &mut CudaBackend<D>) -> Result<(), KernelError> {
    let staging = &mut backend.staging;
    let num_pieces = staging.heads.len();
    if num_pieces == 0 {
        return Ok(());
    }
    let num_head_words = (HEAD_WORDS * num_pieces) as u32;
    staging.blob.clear();
    for [low, high, first, len] in staging.heads.drain(..) {
        let head = [low, high, first + num_head_words, len];
        head.into_iter().for_each(|word| staging.blob.extend_from_slice(&word.to_le_bytes()));
    }
    staging.words.drain(..).for_each(|word| staging.blob.extend_from_slice(&word.to_le_bytes()));
    let words = staging.memory.at_least(&mut backend.device, 0)?;
    backend.device.upload(words, &staging.blob)?;
    let kernel = KernelId { module: "write_staged", function: "write_staged" };
    // SAFETY: `stage` was given places that have so many words, and the upload is as long as its heads say.
    unsafe { backend.launch(kernel, [num_pieces, 1, 1], [THREADS, 1, 1], 0, &[words.into()]) }
}
