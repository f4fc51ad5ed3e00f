use super::AddRows;
use crate::KernelError;
use crate::cpu::CpuBackend;
use crate::cpu::thread_pool::SharedMut;
use crate::ops::all_below;

/// Numbers that are worth waking another thread for.
const MIN_NUMBERS_PER_THREAD: usize = 64 * 1024;

pub(crate) fn add_rows(backend: &mut CpuBackend, args: AddRows<'_, CpuBackend>) -> Result<(), KernelError> {
    const OP: &str = AddRows::<CpuBackend>::OP;
    args.check(args.indices.len(), args.out.len())?;
    let AddRows { dim, num_rows, .. } = args;
    let table = args.table.f32(OP, "table")?;
    let indices = &args.indices.u32(OP, "indices")?[..num_rows];
    let out = SharedMut::new(&mut args.out.f32_mut(OP, "out")?[..num_rows * dim]);
    all_below(OP, "indices", indices, table.len() / dim)?;
    backend.pool.run_ranges(num_rows, MIN_NUMBERS_PER_THREAD.div_ceil(dim), &|_, rows| {
        // SAFETY: threads get disjoint ranges of rows.
        let out = unsafe { out.slice_mut(rows.start * dim..rows.end * dim) };
        for (out, &index) in out.chunks_exact_mut(dim).zip(&indices[rows]) {
            let row = &table[index as usize * dim..][..dim];
            out.iter_mut().zip(row).for_each(|(out, add)| *out += add);
        }
    });
    Ok(())
}
