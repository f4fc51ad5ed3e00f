//! Runs plans with a model on any backend.
//!
//! The device keeps, per row: the sequence's tokens, its block tables, and how its tokens are sampled. All are written
//! when the sequence is admitted; later steps upload positions and appended blocks only, and the sampler appends its
//! tokens itself. So a step can be launched that continues from a token nobody has read yet.

use std::collections::VecDeque;

use quire_kernels::ops::logprobs::{Logprobs, LogprobsAt};
use quire_kernels::ops::sample::{NON_FINITE, Sample, SampleAt, SamplerShape};
use quire_kernels::{Backend, DType, KernelError};
use quire_scheduler::{Admission, SequenceOutput, StepId, StepOutput, StepPlan, TokenLogprobs};

use crate::config::{DTypeChoice, EngineConfig, KvDTypeChoice, SchedulerSettings};
use crate::error::EngineError;
use crate::executor::Executor;
use crate::handle::{MAX_LOGPROBS, ModelInfo};
use crate::input_batch::{InputBatch, TableShape};
use crate::kv_cache::{self, Budget, KvPlan};
use crate::memory;
use crate::model_files::ModelFiles;
use crate::models::decoder::{Decoder, EMBEDDING, LOGITS_TILE, StepInputs, WeightChoice};
use crate::sampler::SamplerRows;
use crate::source::ModelSource;

/// Most steps that are launched and not collected.
const MAX_IN_FLIGHT: usize = 2;

/// See the module's text.
pub(crate) struct ModelExecutor<B: Backend> {
    backend: B,
    decoder: Decoder<B>,
    kv: Vec<B::Kv>,
    sampler: B::Sampler,
    tables: DeviceTables<B>,
    batch: InputBatch,
    sampler_rows: SamplerRows,
    scratch: Scratch,
    /// Oldest first.
    in_flight: VecDeque<InFlight>,
    spare: Vec<InFlight>,
    shape: TableShape,
    vocab_size: usize,
    /// Which part of `tables.sampled` the next step writes.
    next_part: usize,
}

/// What lies on the device beside model and cache.
struct DeviceTables<B: Backend> {
    /// `[max_num_seqs, max_model_len]`
    token_table: B::Buffer,
    /// Per KV group `[max_num_seqs, max_num_blocks]`.
    block_tables: Vec<B::Buffer>,
    token_indices: B::Buffer,
    positions: B::Buffer,
    cu_seqlens: B::Buffer,
    context_lens: B::Buffer,
    rows: B::Buffer,
    slot_mapping: Vec<B::Buffer>,
    gather: B::Buffer,
    /// `[MAX_IN_FLIGHT, max_num_seqs]`: chosen tokens.
    sampled: B::Buffer,
    logprob_values: B::Buffer,
    logprob_ids: B::Buffer,
}

/// Memory on the host that every step uses anew.
#[derive(Default)]
struct Scratch {
    tokens: Vec<u32>,
    sample_at: Vec<SampleAt>,
    logprobs_at: Vec<LogprobsAt>,
    /// Beside `logprobs_at`: how many of the most likely tokens are wanted.
    num_top: Vec<usize>,
    values: Vec<f32>,
    ids: Vec<u32>,
}

/// A step that was launched.
#[derive(Default)]
struct InFlight {
    /// Everything but tokens.
    output: StepOutput,
    /// Per sequence: how many tokens it computes, and whether one is sampled.
    sequences: Vec<(u32, bool)>,
    /// Per sampled token, in order.
    logprobs: Vec<Option<TokenLogprobs>>,
    /// Sequences whose prompt had logits that are no numbers.
    non_finite: Vec<u32>,
    num_sampled: usize,
    part: usize,
}

/// A model that is ready to run, and what the scheduler must know of it.
pub(crate) struct Loaded<B: Backend> {
    pub executor: ModelExecutor<B>,
    pub info: ModelInfo,
    pub kv_plan: KvPlan,
}

impl<B: Backend> ModelExecutor<B> {
    /// Loads a model and takes all the memory that serving it needs.
    pub(crate) fn load(
        mut backend: B,
        source: &ModelSource,
        engine: &EngineConfig,
        settings: &SchedulerSettings,
        device_note: Option<String>,
    ) -> Result<Loaded<B>, EngineError> {
        let ModelFiles { mut config, weights, eos_token_ids } = ModelFiles::open(source, engine)?;
        let dtype = dtype(engine.dtype, weights.dtype_of(EMBEDDING).or(config.dtype));
        let choice = WeightChoice { dtype, quantize: engine.quantize };

        config.drop_long_windows(kv_cache::wanted_model_len(&config, settings)?);
        // Plan once as if all memory were free: settings that can never work should fail before minutes of loading.
        let exact = Some(engine.kv_cache_memory).filter(|bytes| *bytes > 0).map(Budget::Exact);
        let kv_dtype = kv_dtype(engine.kv_dtype, dtype);
        let plan = KvPlan::new(
            &config,
            kv_dtype,
            settings,
            exact.unwrap_or(Budget::Default { free: u64::MAX, weights: u64::MAX }),
        )?;
        crate::scheduler_config(plan.max_model_len, settings, plan.groups).validate()?;
        let windows = plan.windows;
        let max_num_tokens = settings.max_num_batched_tokens as usize;
        let decoder = Decoder::load(&mut backend, config, &weights, choice, max_num_tokens, &windows)?;
        let digest = weights.digest();
        drop(weights);
        let free = memory::free_memory();
        let weights = decoder.size().weight_bytes;
        let budget = exact.unwrap_or(Budget::Default { free, weights });
        let config = decoder.config();
        let kv_plan = KvPlan::new(config, kv_dtype, settings, budget)?;
        if kv_plan.total_bytes() > free {
            return Err(EngineError::Config {
                field: "engine.kv_cache_memory".to_owned(),
                why: format!("a cache of {} bytes does not fit, {free} bytes are free", kv_plan.total_bytes()),
            });
        }
        let vocab_size = config.vocab_size;
        let shape = TableShape {
            max_num_seqs: settings.max_num_seqs as usize,
            max_num_batched_tokens: max_num_tokens,
            max_model_len: kv_plan.max_model_len as usize,
            block_size: settings.block_size as usize,
            num_kv_groups: windows.len(),
        };
        if (shape.max_num_seqs as u64) * (shape.max_model_len as u64) > u64::from(u32::MAX) {
            return Err(EngineError::Config {
                field: "scheduler.max_num_seqs".to_owned(),
                why: format!("{} sequences of {} tokens are too many", shape.max_num_seqs, shape.max_model_len),
            });
        }
        let info = ModelInfo {
            architecture: config.architecture.to_owned(),
            vocab_size: vocab_size as u32,
            max_model_len: kv_plan.max_model_len,
            digest,
            eos_token_ids,
            num_parameters: decoder.size().num_parameters,
            weight_bytes: decoder.size().weight_bytes,
            kv_cache_bytes: kv_plan.total_bytes(),
            weight_format: decoder.size().format,
            dtype: dtype.name(),
            kv_dtype: kv_dtype.name(),
            device: backend.info(),
            device_note,
            block_size: settings.block_size,
            num_blocks: kv_plan.groups[0].num_blocks,
            max_num_seqs: settings.max_num_seqs,
            max_num_batched_tokens: settings.max_num_batched_tokens,
            prefix_cache: settings.prefix_cache,
        };
        let kv = kv_plan.layouts.iter().map(|layout| backend.alloc_kv(layout)).collect::<Result<_, _>>()?;
        let sampler = backend.alloc_sampler(&SamplerShape {
            max_num_seqs: shape.max_num_seqs,
            max_model_len: shape.max_model_len,
            vocab_size,
        })?;
        let tables = DeviceTables::alloc(&mut backend, &shape)?;
        let executor = Self {
            backend,
            decoder,
            kv,
            sampler,
            tables,
            batch: InputBatch::new(shape),
            sampler_rows: SamplerRows::default(),
            scratch: Scratch::default(),
            in_flight: VecDeque::with_capacity(MAX_IN_FLIGHT),
            spare: Vec::with_capacity(MAX_IN_FLIGHT),
            shape,
            vocab_size,
            next_part: 0,
        };
        Ok(Loaded { executor, info, kv_plan })
    }

    /// Writes what the device must know of a sequence that enters a row.
    fn admit(&mut self, admission: &Admission) -> Result<(), KernelError> {
        let offset = admission.row.0 as usize * self.shape.max_model_len;
        let prompt = &*admission.request.prompt;
        let table = &mut self.tables.token_table;
        self.backend.write_u32(table, offset, prompt)?;
        self.backend.write_u32(table, offset + prompt.len(), &admission.generated)?;
        self.sampler_rows.set(&mut self.backend, &mut self.sampler, admission, self.vocab_size)
    }

    fn upload_block_tables(&mut self) -> Result<(), KernelError> {
        let Self { backend, tables, batch, .. } = self;
        for update in &batch.table_updates {
            let blocks = &batch.block_tables[update.group][update.offset..][..update.len];
            backend.write_u32(&mut tables.block_tables[update.group], update.offset, blocks)?;
        }
        Ok(())
    }

    /// Uploads the step's arrays and runs the layers.
    fn forward(&mut self) -> Result<(), KernelError> {
        self.upload_block_tables()?;
        let Self { backend, tables, batch, .. } = self;
        backend.write_u32(&mut tables.token_indices, 0, &batch.token_indices)?;
        backend.write_u32(&mut tables.positions, 0, &batch.positions)?;
        backend.write_u32(&mut tables.cu_seqlens, 0, &batch.cu_seqlens)?;
        backend.write_u32(&mut tables.context_lens, 0, &batch.context_lens)?;
        backend.write_u32(&mut tables.rows, 0, &batch.rows)?;
        for (buffer, slots) in tables.slot_mapping.iter_mut().zip(&batch.slot_mapping) {
            backend.write_u32(buffer, 0, slots)?;
        }
        backend.write_u32(&mut tables.gather, 0, &batch.gather)?;
        self.decoder.forward(
            backend,
            StepInputs {
                num_tokens: batch.positions.len(),
                num_seqs: batch.rows.len(),
                token_table: &tables.token_table,
                token_indices: &tables.token_indices,
                positions: &tables.positions,
                cu_seqlens: &tables.cu_seqlens,
                context_lens: &tables.context_lens,
                rows: &tables.rows,
                slot_mapping: &tables.slot_mapping,
                block_tables: &tables.block_tables,
                max_num_blocks: self.shape.max_num_blocks(),
                kv: &mut self.kv,
            },
        )
    }

    /// Chooses tokens, a tile of logits at a time, and their log probabilities where asked.
    fn sample(&mut self, step: &mut InFlight) -> Result<(), KernelError> {
        let wants_logprobs = |batch: &InputBatch, row: u32| batch.request(row).sampling.logprobs;
        let mut first = 0;
        while first < self.batch.sampled.len() {
            let len = LOGITS_TILE.min(self.batch.sampled.len() - first);
            self.decoder.compute_logits(&mut self.backend, &self.tables.gather, first, len)?;
            let tile = &self.batch.sampled[first..first + len];
            self.scratch.sample_at.clear();
            self.scratch.sample_at.extend(tile.iter().map(|sampled| sampled.at));
            let out_offset = step.part * self.shape.max_num_seqs + first;
            self.backend.sample(Sample {
                sampler: &mut self.sampler,
                logits: self.decoder.logits(),
                rows: &self.scratch.sample_at,
                token_table: &mut self.tables.token_table,
                out: &mut self.tables.sampled,
                out_offset,
            })?;
            let base = step.logprobs.len();
            step.logprobs.resize_with(base + len, || None);
            if tile.iter().any(|sampled| wants_logprobs(&self.batch, sampled.at.row).is_some()) {
                // Their log probabilities need the tokens: the one case in which launching waits for the device.
                self.scratch.tokens.resize(len, 0);
                self.backend.read_u32(&self.tables.sampled, out_offset, &mut self.scratch.tokens)?;
                let mut asked = Vec::new();
                self.scratch.clear_logprobs();
                for (i, sampled) in self.batch.sampled[first..first + len].iter().enumerate() {
                    let token_id = self.scratch.tokens[i];
                    if let Some(num_top) = wants_logprobs(&self.batch, sampled.at.row)
                        && token_id != NON_FINITE
                    {
                        self.scratch.ask(i as u32, token_id, num_top);
                        asked.push(base + i);
                    }
                }
                self.compute_logprobs(|i, logprobs| step.logprobs[asked[i]] = Some(logprobs))?;
            }
            first += len;
        }
        step.num_sampled = self.batch.sampled.len();
        Ok(())
    }

    /// Log probabilities of prompt tokens, a tile of logits at a time.
    fn score_prompts(&mut self, step: &mut InFlight) -> Result<(), KernelError> {
        let mut first = 0;
        while first < self.batch.prompt_tokens.len() {
            let len = LOGITS_TILE.min(self.batch.prompt_tokens.len() - first);
            let offset = self.batch.sampled.len() + first;
            self.decoder.compute_logits(&mut self.backend, &self.tables.gather, offset, len)?;
            self.scratch.clear_logprobs();
            for (i, token) in self.batch.prompt_tokens[first..first + len].iter().enumerate() {
                self.scratch.ask(i as u32, token.token_id, token.num_top);
            }
            let mut scores = Vec::with_capacity(len);
            self.compute_logprobs(|_, logprobs| scores.push(logprobs))?;
            for (token, logprobs) in self.batch.prompt_tokens[first..first + len].iter().zip(scores) {
                if logprobs.logprob.is_nan() || logprobs.top.iter().any(|(_, value)| value.is_nan()) {
                    step.non_finite.push(token.sequence);
                }
                step.output.prompt_logprobs.push((token.sequence, token.position, logprobs));
            }
            first += len;
        }
        Ok(())
    }

    /// Answers what [`Scratch::ask`] asked of the present tile, in order.
    fn compute_logprobs(&mut self, mut answer: impl FnMut(usize, TokenLogprobs)) -> Result<(), KernelError> {
        let scratch = &mut self.scratch;
        // The most likely tokens come in order, so whoever asked for fewer takes the first of them.
        let Some(num_top) = scratch.num_top.iter().copied().max() else { return Ok(()) };
        let num_top = num_top.min(self.vocab_size);
        self.backend.logprobs(Logprobs {
            logits: self.decoder.logits(),
            vocab_size: self.vocab_size,
            rows: &scratch.logprobs_at,
            num_top,
            out_values: &mut self.tables.logprob_values,
            out_ids: &mut self.tables.logprob_ids,
        })?;
        let width = 1 + num_top;
        scratch.values.resize(scratch.logprobs_at.len() * width, 0.0);
        scratch.ids.resize(scratch.logprobs_at.len() * width, 0);
        self.backend.read_f32(&self.tables.logprob_values, 0, &mut scratch.values)?;
        self.backend.read_u32(&self.tables.logprob_ids, 0, &mut scratch.ids)?;
        let rows = scratch.values.chunks_exact(width).zip(scratch.ids.chunks_exact(width));
        for (i, ((values, ids), &wanted)) in rows.zip(&scratch.num_top).enumerate() {
            let top = ids[1..].iter().copied().zip(values[1..].iter().copied()).take(wanted).collect();
            answer(i, TokenLogprobs { logprob: values[0], rank: ids[0], top });
        }
        Ok(())
    }
}

/// What a step of the model moves and computes, caches left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Work {
    /// Bytes of the layers' weights, and of the output layer's; an embedding of its own is read in single rows.
    pub layer_bytes: u64,
    pub output_bytes: u64,
    /// For each token in the layers' products, and for each token that is sampled.
    pub layer_flops: u64,
    pub output_flops: u64,
    /// For each token that a token sees, in each layer.
    attention_flops: u64,
}

impl Work {
    /// Of contexts, per KV group: layers, and tokens seen.
    pub(crate) fn attention_flops(&self, contexts: &[(u64, u64)]) -> u64 {
        contexts.iter().map(|(layers, seen)| layers * seen * self.attention_flops).sum()
    }
}

impl<B: Backend> ModelExecutor<B> {
    pub(crate) fn work(&self) -> Work {
        let (config, size) = (self.decoder.config(), self.decoder.size());
        let output = (config.vocab_size * config.hidden_size) as u64;
        let embeddings = if config.tie_word_embeddings { output } else { 2 * output };
        let layers = size.num_parameters.saturating_sub(embeddings);
        // Nearly all parameters are stored alike.
        let bytes = |parameters: u64| {
            (u128::from(size.weight_bytes) * u128::from(parameters) / u128::from(size.num_parameters.max(1))) as u64
        };
        let shape = config.attention_shape();
        Work {
            layer_bytes: bytes(layers),
            output_bytes: bytes(output),
            layer_flops: 2 * layers,
            output_flops: 2 * output,
            attention_flops: 4 * (shape.num_heads * shape.head_dim) as u64,
        }
    }

    /// Takes in a plan's rows and blocks as [`Executor::launch`] does, and says that all was computed without computing
    /// it: contexts of any length in no time, where only the pace of what follows is asked for. K and V are whatever
    /// the cache holds, sampled tokens are 0.
    pub(crate) fn adopt(&mut self, plan: &StepPlan) -> Result<StepOutput, EngineError> {
        self.batch.build(plan);
        for admission in &plan.admitted {
            self.admit(admission)?;
        }
        self.upload_block_tables()?;
        let mut output = StepOutput::new(plan.step_id);
        for sequence in &plan.sequences {
            let token: &[u32] = if sequence.samples { &[0] } else { &[] };
            let next = sequence.num_computed_tokens + sequence.num_scheduled_tokens;
            let offset = sequence.row.0 as usize * self.shape.max_model_len + next as usize;
            self.backend.write_u32(&mut self.tables.token_table, offset, token)?;
            output.push_computed(sequence.num_scheduled_tokens, token);
        }
        Ok(output)
    }
}

#[cfg(feature = "testing")]
impl<B: Backend> ModelExecutor<B> {
    pub(crate) fn shape(&self) -> &TableShape {
        &self.shape
    }

    /// Logits of all positions of a prompt, computed in row 0 and the first blocks by steps of at most `chunk_len`.
    pub(crate) fn prompt_logits(&mut self, prompt: &[u32], chunk_len: usize) -> Result<Vec<f32>, KernelError> {
        use quire_scheduler::{
            BlockId, CacheSalt, Request, RequestId, RowId, SamplingParams, ScheduledSequence, TenantId,
        };
        let request = Request {
            id: RequestId(0),
            tenant: TenantId(0),
            adapter: None,
            priority: 0,
            cache_salt: CacheSalt::default(),
            prompt: prompt.into(),
            generated: Vec::new(),
            choice_offset: 0,
            sampling: SamplingParams::default(),
            max_tokens: 1,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            deadline: None,
        };
        let mut logits = vec![0.0; prompt.len() * self.vocab_size];
        let mut first = 0;
        while first < prompt.len() {
            let len = chunk_len.min(prompt.len() - first);
            let blocks = |len: usize| len.div_ceil(self.shape.block_size);
            let new_blocks: Vec<BlockId> = (blocks(first)..blocks(first + len))
                .flat_map(|block| vec![BlockId(block as u32); self.shape.num_kv_groups])
                .collect();
            let admission = Admission {
                row: RowId(0),
                request: std::sync::Arc::new(request.clone()),
                choice_index: 0,
                generated: Vec::new(),
            };
            let plan = StepPlan {
                step_id: StepId(0),
                released: Vec::new(),
                admitted: if first == 0 { vec![admission] } else { Vec::new() },
                sequences: vec![ScheduledSequence {
                    row: RowId(0),
                    num_computed_tokens: first as u32,
                    num_scheduled_tokens: len as u32,
                    new_blocks: 0..new_blocks.len() as u32,
                    samples: false,
                }],
                new_blocks,
                num_scheduled_tokens: len as u32,
            };
            self.batch.build(&plan);
            for admission in &plan.admitted {
                self.admit(admission)?;
            }
            self.batch.gather.extend(0..len as u32);
            self.forward()?;
            for offset in (0..len).step_by(LOGITS_TILE) {
                let num_rows = LOGITS_TILE.min(len - offset);
                self.decoder.compute_logits(&mut self.backend, &self.tables.gather, offset, num_rows)?;
                let rows = (first + offset) * self.vocab_size..(first + offset + num_rows) * self.vocab_size;
                self.backend.read_f32(self.decoder.logits(), 0, &mut logits[rows])?;
            }
            first += len;
        }
        Ok(logits)
    }
}

impl<B: Backend> Executor for ModelExecutor<B> {
    fn launch(&mut self, plan: &StepPlan) -> Result<(), EngineError> {
        assert!(self.in_flight.len() < MAX_IN_FLIGHT, "a step is collected before the one after the next is launched");
        let mut step = self.spare.pop().unwrap_or_default();
        step.reset(plan.step_id, self.next_part);
        self.next_part = (self.next_part + 1) % MAX_IN_FLIGHT;
        self.batch.build(plan);
        step.sequences.extend(plan.sequences.iter().map(|s| (s.num_scheduled_tokens, s.samples)));
        for admission in &plan.admitted {
            self.admit(admission)?;
        }
        if !plan.sequences.is_empty() {
            self.forward()?;
            self.sample(&mut step)?;
            self.score_prompts(&mut step)?;
        }
        self.in_flight.push_back(step);
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, EngineError> {
        let mut step = self.in_flight.pop_front().expect("a step is launched before it is collected");
        let mut output = std::mem::take(&mut step.output);
        let tokens = &mut self.scratch.tokens;
        tokens.resize(step.num_sampled, 0);
        self.backend.read_u32(&self.tables.sampled, step.part * self.shape.max_num_seqs, tokens)?;
        let mut sampled = tokens.iter().zip(step.logprobs.drain(..));
        for (index, &(num_scheduled_tokens, samples)) in step.sequences.iter().enumerate() {
            let token = if samples { Some(sampled.next().expect("one token for each")) } else { None };
            let is_finite = !step.non_finite.contains(&(index as u32));
            match token {
                _ if !is_finite => output.sequences.push(SequenceOutput::NonFinite),
                Some((&NON_FINITE, _)) => output.sequences.push(SequenceOutput::NonFinite),
                Some((&token, logprobs)) => {
                    output.push_computed(num_scheduled_tokens, &[token]);
                    output.logprobs.push(logprobs);
                }
                None => output.push_computed(num_scheduled_tokens, &[]),
            }
        }
        drop(sampled);
        self.spare.push(step);
        Ok(output)
    }

    fn recycle(&mut self, output: StepOutput) {
        if let Some(spare) = self.spare.iter_mut().find(|step| step.output.sequences.capacity() == 0) {
            spare.output = output;
        }
    }
}

impl InFlight {
    fn reset(&mut self, step_id: StepId, part: usize) {
        self.output.reset(step_id);
        self.sequences.clear();
        self.logprobs.clear();
        self.non_finite.clear();
        self.num_sampled = 0;
        self.part = part;
    }
}

impl Scratch {
    fn clear_logprobs(&mut self) {
        self.logprobs_at.clear();
        self.num_top.clear();
    }

    fn ask(&mut self, logits_row: u32, token_id: u32, num_top: u32) {
        self.logprobs_at.push(LogprobsAt { logits_row, token_id });
        self.num_top.push(num_top.min(MAX_LOGPROBS) as usize);
    }
}

impl<B: Backend> DeviceTables<B> {
    fn alloc(backend: &mut B, shape: &TableShape) -> Result<Self, KernelError> {
        let (seqs, tokens) = (shape.max_num_seqs, shape.max_num_batched_tokens);
        let num_groups = shape.num_kv_groups;
        let num_logprobs = LOGITS_TILE * (1 + MAX_LOGPROBS as usize);
        let mut alloc = |len: usize| backend.alloc(DType::U32, len);
        Ok(Self {
            token_table: alloc(seqs * shape.max_model_len)?,
            block_tables: (0..num_groups).map(|_| alloc(seqs * shape.max_num_blocks())).collect::<Result<_, _>>()?,
            token_indices: alloc(tokens)?,
            positions: alloc(tokens)?,
            cu_seqlens: alloc(seqs + 1)?,
            context_lens: alloc(seqs)?,
            rows: alloc(seqs)?,
            slot_mapping: (0..num_groups).map(|_| alloc(tokens)).collect::<Result<_, _>>()?,
            gather: alloc(seqs + tokens)?,
            sampled: alloc(MAX_IN_FLIGHT * seqs)?,
            logprob_ids: alloc(num_logprobs)?,
            logprob_values: backend.alloc(DType::F32, num_logprobs)?,
        })
    }
}

/// What the cache is stored as beside weights of `dtype`.
fn kv_dtype(choice: KvDTypeChoice, dtype: DType) -> DType {
    match choice {
        KvDTypeChoice::Auto => dtype,
        KvDTypeChoice::F32 => DType::F32,
        KvDTypeChoice::Bf16 => DType::Bf16,
        KvDTypeChoice::Int8 => DType::I8,
    }
}

/// What weights are stored as, where the files have `stored`.
pub(crate) fn dtype(choice: DTypeChoice, stored: Option<DType>) -> DType {
    match choice {
        DTypeChoice::F32 => DType::F32,
        DTypeChoice::Bf16 => DType::Bf16,
        DTypeChoice::Auto => match stored {
            Some(DType::F32) => DType::F32,
            _ => DType::Bf16,
        },
    }
}
