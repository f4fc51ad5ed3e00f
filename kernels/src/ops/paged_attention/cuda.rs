use super::{Lens, PagedAttention};
use crate::cuda::device::failure;
use crate::cuda::{CudaBackend, Device};
use crate::{KernelError, StepLimits};

/// Working memory.
#[derive(Default)]
pub(crate) struct Workspace {}

impl Workspace {
    pub(crate) fn reserve<D: Device>(&mut self, _device: &mut D, _limits: &StepLimits) -> Result<(), KernelError> {
        Ok(())
    }
}

pub(crate) fn paged_attention<D: Device>(
    _backend: &mut CudaBackend<D>,
    args: PagedAttention<'_, CudaBackend<D>>,
) -> Result<(), KernelError> {
    args.check(
        Lens {
            qkv: args.qkv.len(),
            cu_seqlens_q: args.cu_seqlens_q.len(),
            context_lens: args.context_lens.len(),
            rows: args.rows.len(),
            out: args.out.len(),
        },
        args.kv.layout(),
    )?;
    Err(failure(format!("no device code attends to {}", args.kv.layout().dtype.name())))
}
