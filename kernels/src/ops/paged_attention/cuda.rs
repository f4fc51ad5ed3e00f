//! The CUDA version of [`super::PagedAttention`]: one launch for a batch, whatever is in it. The grid depends on the device
//! alone, and the list of work is reckoned on the device, so a launch can be recorded and run again with other lengths.

use super::{CHUNK_LEN, Lens, PagedAttention};
use crate::cuda::memory::Workspace as Memory;
use crate::cuda::{Arg, CudaBackend, Device, Fault, KernelId};
use crate::kv_layout::MAX_HEAD_DIM;
use crate::{DType, KernelError, StepLimits};

const THREADS: u32 = 128;

/// Thread blocks of a multiprocessor: what registers and shared memory of an H200 leave room for.
const BLOCKS_PER_MULTIPROCESSOR: usize = 2;

/// Sequences of a launch: lists of all of them lie in shared memory.
const MAX_SEQS: usize = 1024;

/// Rows of a thread block that has a warp for each.
const F32_ROWS: usize = 4;

/// Partial results in memory, at most. Where they do not fit, a thread block goes through all of a sequence.
const MAX_PARTIAL_BYTES: usize = 128 << 20;

/// Numbers of a partial result beside those of the head.
const STATE_TAIL: usize = 4;

/// Tokens of a tile.
const TILE_LEN: usize = 32;

/// A kernel and its shared memory.
#[derive(Clone, Copy)]
struct Kernel {
    function: &'static str,
    /// The widest that it takes.
    head_dim: usize,
    shared_bytes: usize,
}

impl Kernel {
    /// As in `paged_attention.cu`: K, V and scales of the tiles of the ring, then fragments of the queries.
    const fn new(function: &'static str, dtype: DType, head_dim: usize) -> Self {
        let (pair_bytes, scale_bytes) = if dtype.is_quantized() { (2, 2 * TILE_LEN * 4) } else { (4, 0) };
        let parts = if matches!(dtype, DType::I8) { 2 } else { 1 };
        let num_stages = if head_dim > 128 { 2 } else { 4 };
        let sharers = match head_dim * parts / 128 {
            _ if dtype.is_quantized() && head_dim > 128 => 4,
            0 => 1,
            sharers => sharers,
        };
        let slot_bytes = head_dim * TILE_LEN * pair_bytes + scale_bytes;
        let query_bytes = 64 / sharers * head_dim * 2 * parts;
        Self { function, head_dim, shared_bytes: num_stages * slot_bytes + query_bytes }
    }

    /// For a cache that passed [`crate::KvLayout::validate`].
    fn of(dtype: DType, head_dim: usize) -> Self {
        const BF16: [Kernel; 4] = [
            Kernel::new("paged_attention_bf16_64", DType::Bf16, 64),
            Kernel::new("paged_attention_bf16_96", DType::Bf16, 96),
            Kernel::new("paged_attention_bf16_128", DType::Bf16, 128),
            Kernel::new("paged_attention_bf16_256", DType::Bf16, 256),
        ];
        const INT8: [Kernel; 3] = [
            Kernel::new("paged_attention_int8_64", DType::I8, 64),
            Kernel::new("paged_attention_int8_128", DType::I8, 128),
            Kernel::new("paged_attention_int8_256", DType::I8, 256),
        ];
        const FP8: [Kernel; 3] = [
            Kernel::new("paged_attention_fp8_64", DType::F8E4M3, 64),
            Kernel::new("paged_attention_fp8_128", DType::F8E4M3, 128),
            Kernel::new("paged_attention_fp8_256", DType::F8E4M3, 256),
        ];
        const F32: [Kernel; 1] = [Kernel { function: "paged_attention_f32", head_dim: MAX_HEAD_DIM, shared_bytes: 0 }];
        let kernels: &[Self] = match dtype {
            DType::I8 => &INT8,
            DType::F8E4M3 => &FP8,
            DType::Bf16 => &BF16,
            _ => &F32,
        };
        *kernels.iter().find(|kernel| head_dim <= kernel.head_dim).unwrap_or(&kernels[kernels.len() - 1])
    }
}

/// Working memory of [`paged_attention`].
#[derive(Debug)]
pub(crate) struct Workspace {
    partials: Memory,
    partial_bytes: usize,
    /// Counts that every launch leaves at zero.
    counters: Memory,
    /// Whether it is known how large steps become.
    is_reserved: bool,
}

impl Default for Workspace {
    fn default() -> Self {
        let (partials, counters) = (Memory::new("partial attention"), Memory::new("counts of partial attention"));
        Self { partials, partial_bytes: 0, counters, is_reserved: false }
    }
}

/// Bytes of partial results that sequences of one new token each leave, as far as there is room.
fn partial_bytes(num_seqs: usize, num_heads: usize, context_len: usize, head_dim: usize) -> usize {
    let num_rows = num_seqs.min(MAX_SEQS).saturating_mul(num_heads).saturating_mul(context_len.div_ceil(CHUNK_LEN));
    num_rows.saturating_mul(state_bytes(head_dim)).min(MAX_PARTIAL_BYTES)
}

const fn state_bytes(head_dim: usize) -> usize {
    (head_dim + STATE_TAIL) * size_of::<f32>()
}

fn counter_bytes(num_seqs: usize, num_kv_heads: usize) -> usize {
    (2 + num_seqs.min(MAX_SEQS) * num_kv_heads) * size_of::<u32>()
}

impl Workspace {
    /// Takes what steps of at most this size need.
    pub(crate) fn reserve<D: Device>(&mut self, device: &mut D, limits: &StepLimits) -> Result<(), KernelError> {
        let shape = limits.shape;
        // Whatever the cache's type: kernels for codes are the widest that have partial results.
        let head_dim = Kernel::of(DType::I8, shape.head_dim).head_dim;
        self.grow(device, partial_bytes(limits.num_seqs, shape.num_heads, limits.context_len, head_dim))?;
        self.counters.at_least(device, counter_bytes(limits.num_seqs, shape.num_kv_heads))?;
        self.is_reserved = true;
        Ok(())
    }

    fn grow<D: Device>(&mut self, device: &mut D, bytes: usize) -> Result<(), KernelError> {
        self.partial_bytes = self.partial_bytes.max(bytes);
        self.partials.at_least(device, self.partial_bytes).map(|_| ())
    }
}

pub(crate) fn paged_attention<D: Device>(
    backend: &mut CudaBackend<D>,
    args: PagedAttention<'_, CudaBackend<D>>,
) -> Result<(), KernelError> {
    const OP: &str = "paged_attention";
    let layout = *args.kv.layout();
    let lens = Lens {
        qkv: args.qkv.len(),
        cu_seqlens_q: args.cu_seqlens_q.len(),
        context_lens: args.context_lens.len(),
        rows: args.rows.len(),
        out: args.out.len(),
    };
    args.check(lens, &layout)?;
    let PagedAttention { num_tokens, num_seqs, shape, max_num_blocks, .. } = args;
    let qkv = args.qkv.f32(OP, "qkv")?;
    let out = args.out.f32(OP, "out")?;
    let cu_seqlens_q = args.cu_seqlens_q.u32(OP, "cu_seqlens_q")?;
    let context_lens = args.context_lens.u32(OP, "context_lens")?;
    let rows = args.rows.u32(OP, "rows")?;
    let block_tables = args.block_tables.u32(OP, "block_tables")?;
    let num_table_rows = args.block_tables.len().checked_div(max_num_blocks).unwrap_or(0);
    if num_tokens == 0 || num_seqs == 0 {
        return Ok(());
    }
    let kernel = Kernel::of(layout.dtype, layout.head_dim);
    let workspace = &mut backend.attention_workspace;
    if !workspace.is_reserved {
        let context_len = max_num_blocks.saturating_mul(layout.block_size);
        let bytes = partial_bytes(num_seqs, shape.num_heads, context_len, kernel.head_dim);
        workspace.grow(&mut backend.device, bytes)?;
    }
    let counter_bytes = counter_bytes(num_seqs, shape.num_kv_heads);
    let counters = workspace.counters.at_least(&mut backend.device, counter_bytes)?;
    let partials = workspace.partials.at_least(&mut backend.device, workspace.partial_bytes)?;
    let num_partial_rows = workspace.partial_bytes / state_bytes(kernel.head_dim);
    let faults = [Fault::PagedAttentionContextLens, Fault::PagedAttentionRows, Fault::PagedAttentionBlockTables];
    let faults = faults.map(|fault| backend.fault(fault));
    let size = |argument, size: usize| {
        let limit = u64::from(u32::MAX);
        u32::try_from(size).map(Arg::from).map_err(|_| KernelError::Range {
            op: OP,
            argument,
            value: size as u64,
            limit,
        })
    };
    let grid = match layout.dtype {
        DType::F32 => num_tokens.saturating_mul(shape.num_heads).div_ceil(F32_ROWS),
        _ => backend.device.facts().num_multiprocessors as usize * BLOCKS_PER_MULTIPROCESSOR,
    };
    // All sequences in one launch, unless they are more than a list has room for.
    for first in (0..num_seqs).step_by(MAX_SEQS) {
        let seqs = |from: crate::cuda::DevicePtr| Arg::from(from.offset(first * size_of::<u32>()));
        let params = [
            qkv.into(),
            args.kv.layer(args.layer).into(),
            out.into(),
            seqs(cu_seqlens_q),
            seqs(context_lens),
            seqs(rows),
            block_tables.into(),
            partials.into(),
            counters.into(),
            size("num_tokens", num_tokens)?,
            size("num_seqs", MAX_SEQS.min(num_seqs - first))?,
            size("num_heads", shape.num_heads)?,
            size("num_kv_heads", shape.num_kv_heads)?,
            size("head_dim", shape.head_dim)?,
            size("block_size", layout.block_size)?,
            size("num_blocks", layout.num_blocks)?,
            size("max_num_blocks", max_num_blocks)?,
            size("block_tables", num_table_rows)?,
            args.window.unwrap_or(0).into(),
            size("num_partial_rows", num_partial_rows)?,
            args.scale.into(),
            faults[0],
            faults[1],
            faults[2],
        ];
        let id = KernelId { module: "paged_attention", function: kernel.function };
        // SAFETY: these are the kernel's parameters; `check` saw that buffers are long enough for the sizes, the kernel
        // looks at every length, row and block itself, and the workspace is as large as it is told.
        unsafe { backend.launch(id, [grid, 1, 1], [THREADS, 1, 1], kernel.shared_bytes, &params)? };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_head_has_a_kernel_and_its_tiles_fit_every_card() {
        for dtype in [DType::Bf16, DType::I8, DType::F8E4M3, DType::F32] {
            for head_dim in (2..=crate::kv_layout::MAX_HEAD_DIM).step_by(2) {
                let kernel = Kernel::of(dtype, head_dim);
                assert!(kernel.head_dim >= head_dim);
                // Beside the lists of units, which take 11 KiB.
                assert!(kernel.shared_bytes <= 88 << 10, "{}: {}", kernel.function, kernel.shared_bytes);
            }
        }
        assert_eq!(Kernel::of(DType::Bf16, 128).shared_bytes, 4 * 16 * 1024 + 16 * 1024);
    }

    #[test]
    fn partial_results_are_bounded() {
        // 32 sequences of 4096 tokens, heads of an 8B model.
        assert_eq!(partial_bytes(32, 32, 4096, 128), 32 * 32 * 8 * 132 * 4);
        assert_eq!(partial_bytes(256, 32, 1 << 20, 128), MAX_PARTIAL_BYTES);
        assert_eq!(partial_bytes(usize::MAX, usize::MAX, usize::MAX, 128), MAX_PARTIAL_BYTES);
    }
}
