use super::{Embed, check};
use crate::cuda::{CudaBackend, Device, Fault, KernelId};
use crate::weight_format::Codes;
use crate::{KernelError, WeightFormat, WeightLayout};

/// A thread block has a token.
const THREADS: u32 = 256;

/// ```c
/// // out[token] = table[token_table[token_indices[token]]]; token = blockIdx.x. An index that is not below num_tokens_held
/// // and a token id that is not below vocab_size are faults. f32, bf16, ... is what the table is packed as; its layout is
/// // that of linear.cu, for out_features = vocab_size and in_features = hidden_size. group_len is 0 of dense weights.
/// embed_{f32,bf16,int8,int4,iq4_nl}(const void* table, uint32_t vocab_size, uint32_t hidden_size, uint32_t is_gate_up,
///                                   uint32_t group_len, uint32_t has_min, const uint32_t* token_table,
///                                   uint32_t num_tokens_held, const uint32_t* token_indices, float* out,
///                                   uint32_t* fault_token_indices, uint32_t* fault_token_table)
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
    let (function, group_len, has_min) = match shape.format {
        WeightFormat::F32 => ("embed_f32", 0, false),
        WeightFormat::Bf16 => ("embed_bf16", 0, false),
        WeightFormat::Grouped(grouping) => {
            let function = match grouping.codes {
                Codes::Int8 => "embed_int8",
                Codes::Int4 => "embed_int4",
                Codes::Iq4Nl => "embed_iq4_nl",
            };
            (function, grouping.group_len, grouping.has_min)
        }
    };
    let params = [
        table.ptr.into(),
        (shape.out_features as u32).into(),
        (shape.in_features as u32).into(),
        u32::from(shape.layout == WeightLayout::GateUp).into(),
        (group_len as u32).into(),
        u32::from(has_min).into(),
        tokens.into(),
        (token_table.len() as u32).into(),
        indices.into(),
        to.into(),
        backend.fault(Fault::EmbedTokenIndices),
        backend.fault(Fault::EmbedTokenTable),
    ];
    let kernel = KernelId { module: "embed", function };
    // SAFETY: `check` saw that indices and results lie in their buffers; the kernel looks at each index and token id.
    unsafe { backend.launch(kernel, [num_tokens, 1, 1], [THREADS, 1, 1], 0, &params) }
}
