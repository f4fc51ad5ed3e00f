use super::{Lens, Logprobs};
use crate::KernelError;
use crate::cuda::{CudaBackend, Device, Fault, KernelId};

/// A thread block has an entry.
const THREADS: u32 = 1024;

/// ```c
/// // Entry i = blockIdx.x is rows[2 * i], a row of logits, and rows[2 * i + 1], an index into tokens. Writes
/// // out_values[i * (1 + num_top)..] and out_ids[i * (1 + num_top)..]: value and rank of the token, then the num_top most
/// // likely tokens in order, lower id first among equals, NaN last. A token of UINT32_MAX has value NaN and rank 0.
/// // Sums are f64 over fixed parts of the vocabulary.
/// logprobs(const float* logits, uint32_t num_logits_rows, uint32_t vocab_size, const uint32_t* rows,
///          const uint32_t* tokens, uint32_t num_tokens, uint32_t num_top, float* out_values, uint32_t* out_ids,
///          uint32_t* fault_logits_row, uint32_t* fault_token_index, uint32_t* fault_tokens)
/// ```
pub(crate) fn logprobs<D: Device>(
    backend: &mut CudaBackend<D>,
    args: Logprobs<'_, CudaBackend<D>>,
) -> Result<(), KernelError> {
    let op = Logprobs::<CudaBackend<D>>::OP;
    let (out_values, out_ids) = (args.out_values.len(), args.out_ids.len());
    args.check(Lens { rows: args.rows.len(), out_values, out_ids })?;
    let out_bytes = 4 * args.out_offset * (1 + args.num_top);
    let params = [
        args.logits.f32(op, "logits")?.into(),
        ((args.logits.len() / args.vocab_size) as u32).into(),
        (args.vocab_size as u32).into(),
        args.rows.u32(op, "rows")?.offset(8 * args.rows_offset).into(),
        args.tokens.u32(op, "tokens")?.into(),
        (args.tokens.len() as u32).into(),
        (args.num_top as u32).into(),
        args.out_values.f32(op, "out_values")?.offset(out_bytes).into(),
        args.out_ids.u32(op, "out_ids")?.offset(out_bytes).into(),
        backend.fault(Fault::LogprobsLogitsRow),
        backend.fault(Fault::LogprobsTokenIndex),
        backend.fault(Fault::LogprobsTokens),
    ];
    let kernel = KernelId { module: "logprobs", function: "logprobs" };
    // SAFETY: `check` saw that entries and results lie in their buffers, and the kernel looks at each entry and token.
    unsafe { backend.launch(kernel, [args.num_rows, 1, 1], [THREADS, 1, 1], 0, &params) }
}
