use super::{Embed, check};
use crate::KernelError;
use crate::cuda::{CudaBackend, Device, Fault, KernelId};

/// A thread block has a token.
const THREADS: u32 = 256;

/// ```c
/// // out[token] = table[token_table[token_indices[token]]]; token = blockIdx.x. An index that is not below num_tokens_held
/// // and a token id that is not below vocab_size are faults. The table and its flags are those of weight.cuh, for
/// // out_features = vocab_size and in_features = hidden_size.
/// embed(const uint8_t* table, uint32_t flags, uint32_t vocab_size, uint32_t hidden_size, const uint32_t* token_table,
///       uint32_t num_tokens_held, const uint32_t* token_indices, float* out, uint32_t* fault_token_indices,
///       uint32_t* fault_token_table)
/// ```
pub(crate) fn embed<D: Device>(
    backend: &mut CudaBackend<D>,
    args: Embed<'_, CudaBackend<D>>,
) -> Result<(), KernelError> {
    let Embed { table, token_table, token_indices, num_tokens, out } = args;
    let shape = *table.shape();
    let tokens = token_table.u32("embed", "token_table")?;
    let indices = token_indices.u32("embed", "token_indices")?;
    let to = out.f32("embed", "out")?;
    check(shape.in_features, num_tokens, token_indices.len(), out.len())?;
    let params = [
        table.ptr().into(),
        table.flags().into(),
        (shape.out_features as u32).into(),
        (shape.in_features as u32).into(),
        tokens.into(),
        (token_table.len() as u32).into(),
        indices.into(),
        to.into(),
        backend.fault(Fault::EmbedTokenIndices),
        backend.fault(Fault::EmbedTokenTable),
    ];
    let kernel = KernelId { module: "embed", function: "embed" };
    // SAFETY: `check` saw that indices and results lie in their buffers; the kernel looks at each index and token id.
    unsafe { backend.launch(kernel, [num_tokens, 1, 1], [THREADS, 1, 1], 0, &params) }
}
