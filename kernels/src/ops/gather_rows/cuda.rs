use super::{GatherRows, Lens};
use crate::KernelError;
use crate::cuda::{CudaBackend, Device, Fault, KernelId};

/// A thread block has a row.
const THREADS: u32 = 256;

/// ```c
/// // out[row] = x[indices[row]]; row = blockIdx.x. An index that is not below num_x_rows is a fault.
/// gather_rows(const float* x, uint32_t num_x_rows, uint32_t dim, const uint32_t* indices, float* out,
///             uint32_t* fault_indices)
/// ```
pub(crate) fn gather_rows<D: Device>(
    backend: &mut CudaBackend<D>,
    args: GatherRows<'_, CudaBackend<D>>,
) -> Result<(), KernelError> {
    let op = GatherRows::<CudaBackend<D>>::OP;
    args.check(Lens { indices: args.indices.len(), out: args.out.len() })?;
    let (x, out) = (args.x.f32(op, "x")?, args.out.f32(op, "out")?);
    let indices = args.indices.u32(op, "indices")?.offset(4 * args.indices_offset);
    let num_x_rows = (args.x.len() / args.dim) as u32;
    let fault = backend.fault(Fault::GatherRowsIndices);
    let params = [x.into(), num_x_rows.into(), (args.dim as u32).into(), indices.into(), out.into(), fault];
    let kernel = KernelId { module: "gather_rows", function: "gather_rows" };
    // SAFETY: `check` saw that all indices and results lie in their buffers, and the kernel looks at each index.
    unsafe { backend.launch(kernel, [args.num_rows, 1, 1], [THREADS, 1, 1], 0, &params) }
}
