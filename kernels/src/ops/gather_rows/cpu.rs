use super::{GatherRows, Lens};
use crate::KernelError;
use crate::cpu::CpuBackend;
use crate::cpu::thread_pool::SharedMut;
use crate::ops::all_below;

/// Numbers that are worth waking another thread for.
const MIN_NUMBERS_PER_THREAD: usize = 64 * 1024;

pub(crate) fn gather_rows(backend: &mut CpuBackend, args: GatherRows<'_, CpuBackend>) -> Result<(), KernelError> {
    const OP: &str = GatherRows::<CpuBackend>::OP;
    args.check(Lens { indices: args.indices.len(), out: args.out.len() })?;
    let GatherRows { dim, num_rows, indices_offset, .. } = args;
    let x = args.x.f32(OP, "x")?;
    let indices = &args.indices.u32(OP, "indices")?[indices_offset..indices_offset + num_rows];
    let out = SharedMut::new(&mut args.out.f32_mut(OP, "out")?[..num_rows * dim]);
    all_below(OP, "indices", indices, x.len() / dim)?;
    backend.pool.run_ranges(num_rows, MIN_NUMBERS_PER_THREAD.div_ceil(dim), &|_, rows| {
        // SAFETY: threads get disjoint ranges of rows.
        let out = unsafe { out.slice_mut(rows.start * dim..rows.end * dim) };
        for (out, &index) in out.chunks_exact_mut(dim).zip(&indices[rows]) {
            out.copy_from_slice(&x[index as usize * dim..][..dim]);
        }
    });
    Ok(())
}
