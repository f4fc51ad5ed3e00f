use super::{Lens, MAX_LIST_WORDS, Sample, SamplerRow, SamplerShape};
use crate::cuda::{CudaBackend, Device, DevicePtr, Fault, KernelId, Workspace};
use crate::{Backend, KernelError};

/// A thread block has a row.
const THREADS: u32 = 1024;

/// Words of a row's parameters, see [`sample`].
const PARAM_WORDS: usize = 32;

/// Which of them says whether the row has a mask.
const HAS_MASK_WORD: usize = 12;

/// Words of working memory for each token of the vocabulary.
const SCRATCH_WORDS_PER_TOKEN: usize = 2;

/// Parameters of all rows, their masks and lists, and working memory.
pub struct CudaSampler {
    shape: SamplerShape,
    /// `[max_num_seqs, PARAM_WORDS]`
    params: DevicePtr,
    /// `[max_num_seqs, num_mask_words]`
    masks: DevicePtr,
    /// `[max_num_seqs, MAX_LIST_WORDS]`
    lists: DevicePtr,
    /// `[rows of logits, SCRATCH_WORDS_PER_TOKEN, vocab_size]`
    scratch: Workspace,
    /// A row's words on their way.
    words: Vec<u32>,
}

pub(crate) fn alloc_sampler<D: Device>(
    backend: &mut CudaBackend<D>,
    shape: &SamplerShape,
) -> Result<CudaSampler, KernelError> {
    shape.check()?;
    let num_rows = shape.max_num_seqs.min(backend.logits_tile());
    let device = &mut backend.device;
    let mut alloc = |words: usize| device.alloc("sampler", words.saturating_mul(shape.max_num_seqs).saturating_mul(4));
    let mut sampler = CudaSampler {
        shape: *shape,
        params: alloc(PARAM_WORDS)?,
        masks: alloc(shape.num_mask_words())?,
        lists: alloc(MAX_LIST_WORDS)?,
        scratch: Workspace::new("sampler"),
        words: Vec::with_capacity(MAX_LIST_WORDS),
    };
    sampler.reserve(device, num_rows)?;
    Ok(sampler)
}

impl CudaSampler {
    /// Takes the working memory for so many rows of logits.
    fn reserve<D: Device>(&mut self, device: &mut D, num_rows: usize) -> Result<DevicePtr, KernelError> {
        let words = num_rows.saturating_mul(SCRATCH_WORDS_PER_TOKEN).saturating_mul(self.shape.vocab_size);
        self.scratch.at_least(device, words.saturating_mul(4))
    }
}

pub(crate) fn set_sampler_row<D: Device>(
    backend: &mut CudaBackend<D>,
    sampler: &mut CudaSampler,
    row: u32,
    params: &SamplerRow<'_>,
) -> Result<(), KernelError> {
    params.check(row, &sampler.shape)?;
    let row = row as usize;
    let words = &mut sampler.words;
    words.clear();
    words.extend([
        params.prompt_len,
        params.seed as u32,
        (params.seed >> 32) as u32,
        params.choice_index,
        params.temperature.to_bits(),
        params.top_k,
        params.top_p.to_bits(),
        params.min_p.to_bits(),
        params.typical_p.to_bits(),
        params.repetition_penalty.to_bits(),
        params.presence_penalty.to_bits(),
        params.frequency_penalty.to_bits(),
        u32::from(params.mask.is_some()),
        params.bias.len() as u32,
        params.stop_token_ids.len() as u32,
        params.min_tokens,
        params.bad_words.len() as u32,
    ]);
    words.resize(PARAM_WORDS, 0);
    let upload = |device: &mut D, table: DevicePtr, row_words: usize, words: &[u32]| {
        // SAFETY: any bytes of whole numbers are bytes.
        let bytes = unsafe { std::slice::from_raw_parts(words.as_ptr().cast::<u8>(), size_of_val(words)) };
        device.upload(table.offset(4 * row * row_words), bytes)
    };
    upload(&mut backend.device, sampler.params, PARAM_WORDS, words)?;
    if let Some(mask) = params.mask {
        upload(&mut backend.device, sampler.masks, sampler.shape.num_mask_words(), mask)?;
    }
    words.clear();
    words.extend(params.bias.iter().map(|(id, _)| *id));
    words.extend(params.bias.iter().map(|(_, value)| value.to_bits()));
    words.extend_from_slice(params.stop_token_ids);
    words.extend(params.bad_words.iter().map(|word| word.len() as u32));
    params.bad_words.iter().for_each(|word| words.extend_from_slice(word));
    if words.is_empty() {
        return Ok(());
    }
    upload(&mut backend.device, sampler.lists, MAX_LIST_WORDS, words)
}

pub(crate) fn set_sampler_mask<D: Device>(
    backend: &mut CudaBackend<D>,
    sampler: &mut CudaSampler,
    row: u32,
    mask: &[u32],
) -> Result<(), KernelError> {
    sampler.shape.check_row_mask(row, mask)?;
    let row = row as usize;
    let mut upload = |place: DevicePtr, words: &[u32]| {
        // SAFETY: any bytes of whole numbers are bytes.
        let bytes = unsafe { std::slice::from_raw_parts(words.as_ptr().cast::<u8>(), size_of_val(words)) };
        backend.device.upload(place, bytes)
    };
    upload(sampler.masks.offset(4 * row * sampler.shape.num_mask_words()), mask)?;
    upload(sampler.params.offset(4 * (row * PARAM_WORDS + HAS_MASK_WORD)), &[1])
}

/// ```c
/// // Row i = blockIdx.x of logits; rows[2 * i] is its row of the tables (UINT32_MAX: nobody), rows[2 * i + 1] the tokens
/// // that it holds. A row that is not below max_num_seqs and tokens above max_model_len are faults.
/// //
/// // params, of row r from word 32 * r on: 0 prompt_len, 1 seed (low), 2 seed (high), 3 choice_index, 4 temperature, 5 top_k,
/// // 6 top_p, 7 min_p, 8 typical_p, 9 repetition_penalty, 10 presence_penalty, 11 frequency_penalty, 12 has_mask, 13 num_bias,
/// // 14 num_stop_token_ids, 15 min_tokens, 16 num_bad_words; the others are 0.
/// // masks, of row r from word r * ceil(vocab_size / 32) on. lists, of row r from word r * list_words on: num_bias ids,
/// // num_bias values (f32), stop token ids, lengths of the bad words, the tokens of the bad words one after the other.
/// //
/// // scratch: two words for each row of logits and token of the vocabulary, [num_rows][2][vocab_size]. The first is for the
/// // kernel alone; the second is 0 at the start of the very first launch and must be 0 again at the end of each.
/// //
/// // Writes the token, or UINT32_MAX, to out[i], and appends it (0 for UINT32_MAX) to its row of the token table where that
/// // has room.
/// sample(const float* logits, const uint32_t* rows, const uint32_t* params, const uint32_t* masks, const uint32_t* lists,
///        uint32_t list_words, uint32_t max_num_seqs, uint32_t max_model_len, uint32_t vocab_size, uint32_t* scratch,
///        uint32_t* token_table, uint32_t* out, uint32_t* fault_row, uint32_t* fault_num_tokens)
/// ```
pub(crate) fn sample<D: Device>(
    backend: &mut CudaBackend<D>,
    args: Sample<'_, CudaBackend<D>>,
) -> Result<(), KernelError> {
    let op = Sample::<CudaBackend<D>>::OP;
    let shape = args.sampler.shape;
    args.check(
        Lens {
            logits: args.logits.len(),
            rows: args.rows.len(),
            token_table: args.token_table.len(),
            out: args.out.len(),
        },
        &shape,
    )?;
    let scratch = args.sampler.reserve(&mut backend.device, args.num_rows)?;
    let params = [
        args.logits.f32(op, "logits")?.into(),
        args.rows.u32(op, "rows")?.offset(8 * args.rows_offset).into(),
        args.sampler.params.into(),
        args.sampler.masks.into(),
        args.sampler.lists.into(),
        (MAX_LIST_WORDS as u32).into(),
        (shape.max_num_seqs as u32).into(),
        (shape.max_model_len as u32).into(),
        (shape.vocab_size as u32).into(),
        scratch.into(),
        args.token_table.u32(op, "token_table")?.into(),
        args.out.u32(op, "out")?.offset(4 * args.out_offset).into(),
        backend.fault(Fault::SampleRow),
        backend.fault(Fault::SampleNumTokens),
    ];
    let kernel = KernelId { module: "sample", function: "sample" };
    // SAFETY: `check` saw that logits, entries, token table and results lie in their buffers; the kernel looks at each
    // entry, and lists are as long as the parameters say, which is at most MAX_LIST_WORDS.
    unsafe { backend.launch(kernel, [args.num_rows, 1, 1], [THREADS, 1, 1], 0, &params) }
}
