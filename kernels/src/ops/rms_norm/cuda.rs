use super::{Lens, RmsNorm};
use crate::KernelError;
use crate::cuda::{CudaBackend, Device, KernelId};

/// A thread block has a row.
const THREADS: u32 = 256;

/// ```c
/// // out[row] = x[row] / sqrt(mean(x[row]^2) + eps) * weight; row = blockIdx.x
/// rms_norm(const float* x, const float* weight, float eps, uint32_t dim, float* out)
/// ```
pub(crate) fn rms_norm<D: Device>(
    backend: &mut CudaBackend<D>,
    args: RmsNorm<'_, CudaBackend<D>>,
) -> Result<(), KernelError> {
    let op = RmsNorm::<CudaBackend<D>>::OP;
    args.check(Lens { x: args.x.len(), weight: args.weight.len(), out: args.out.len() })?;
    let (x, weight, out) = (args.x.f32(op, "x")?, args.weight.f32(op, "weight")?, args.out.f32(op, "out")?);
    let params = [x.into(), weight.into(), args.eps.into(), (args.dim as u32).into(), out.into()];
    let kernel = KernelId { module: "rms_norm", function: "rms_norm" };
    // SAFETY: `check` saw that all rows and the weight lie in their buffers.
    unsafe { backend.launch(kernel, [args.num_rows, 1, 1], [THREADS, 1, 1], 0, &params) }
}
