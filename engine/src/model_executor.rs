//! Runs plans with a model on any backend.
//!
//! The device keeps, per row: the sequence's tokens, its block tables, and how its tokens are sampled. All are written
//! when the sequence is admitted; later steps upload positions and appended blocks only, and the sampler appends its
//! tokens itself. So a step can be launched that continues from a token nobody has read yet.

mod decode_graphs;
mod device_memory;
mod device_model;
mod masked;
mod scores;
mod tables;

use std::collections::VecDeque;
use std::sync::Arc;

use quire_kernels::ops::sample::NON_FINITE;
use quire_kernels::{Backend, DType, KernelError, StepLimits};
use quire_scheduler::{Admission, RowId, SequenceOutput, StepOutput, StepPlan};

use crate::config::{DTypeChoice, EngineConfig, KvDTypeChoice, SchedulerSettings};
use crate::error::EngineError;
use crate::executor::Executor;
use crate::handle::{MAX_LOGPROBS, ModelInfo};
use crate::input_batch::{InputBatch, TableShape, WantedLogprobs};
use crate::kv_cache::{self, Budget, KvPlan};
use crate::masks::Masks;
use crate::memory;
use crate::model_files::ModelFiles;
use crate::models::decoder::{Decoder, EMBEDDING, Output};
use crate::models::loader::WeightChoice;
use crate::places::RequestGrammar;
use crate::sampler::SamplerRows;
use decode_graphs::{DecodeGraphs, Recorded};
use device_model::DeviceModel;
use masked::MaskedRow;
use scores::Scores;

/// Most steps that are launched and not collected.
const MAX_IN_FLIGHT: usize = 2;

/// See the module's text.
pub(crate) struct ModelExecutor<B: Backend> {
    backend: B,
    model: DeviceModel<B>,
    batch: InputBatch,
    graphs: DecodeGraphs<B::Graph>,
    sampler_rows: SamplerRows,
    masks: Masks,
    /// Grammars of the sequences that enter rows with the next plan.
    entering: Vec<(RowId, Arc<RequestGrammar>)>,
    scores: Scores,
    /// Oldest first.
    in_flight: VecDeque<InFlight<B>>,
    /// Those that are not in flight.
    spare: Vec<InFlight<B>>,
}

/// A step that was launched.
struct InFlight<B: Backend> {
    /// Everything but tokens.
    output: StepOutput,
    /// Per sequence: how many tokens it computes, and whether one is sampled.
    sequences: Vec<(u32, bool)>,
    num_sampled: usize,
    /// Of sampled tokens, in order.
    wanted_logprobs: Vec<WantedLogprobs>,
    /// Tokens beside each of `wanted_logprobs`, as computed.
    num_top: usize,
    /// Sequences whose prompt had logits that are no numbers.
    non_finite: Vec<u32>,
    /// Sampled tokens that grammars were not told yet.
    masked: Vec<MaskedRow>,
    /// Of sampled tokens: those whose grammar has no way on, and those that bad words may leave nothing to choose.
    nothing_allowed: Vec<u32>,
    restricted: Vec<u32>,
    /// Sampled tokens, then values and ids of their log probabilities.
    readback: B::Readback,
}

/// A model that is ready to run, and what the scheduler must know of it.
pub(crate) struct Loaded<B: Backend> {
    pub executor: ModelExecutor<B>,
    pub info: ModelInfo,
    pub kv_plan: KvPlan,
}

impl<B: Backend> ModelExecutor<B> {
    /// Loads a model and takes all the memory that serving it needs; `reserved_bytes` of the host's are for others.
    pub(crate) fn load(
        mut backend: B,
        files: ModelFiles,
        engine: &EngineConfig,
        settings: &SchedulerSettings,
        device_note: Option<String>,
        reserved_bytes: u64,
    ) -> Result<Loaded<B>, EngineError> {
        let ModelFiles { mut config, weights, eos_token_ids } = files;
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
        let before = backend.memory()?;
        device_memory::check_weights(&mut backend, &config, &weights, choice)?;
        let decoder = Decoder::load(&mut backend, config, &weights, choice, max_num_tokens, &windows, Output::Logits)
            .map_err(|error| device_memory::explain(&mut backend, before, error))?;
        let digest = weights.digest();
        drop(weights);
        let free = memory::free_memory().saturating_sub(reserved_bytes);
        let weights = decoder.size().weight_bytes;
        let left = device_memory::left_for_cache(&mut backend)?;
        let budget = match (exact, left) {
            (Some(exact), _) => exact,
            (None, Some(left)) => Budget::UpTo(left),
            (None, None) => Budget::Default { free, weights },
        };
        let config = decoder.config().clone();
        // Tables are made for the lengths that this allows; a device's cache then gets what they leave.
        let mut kv_plan = KvPlan::new(&config, kv_dtype, settings, budget).map_err(|error| match (exact, left) {
            (None, Some(left)) => device_memory::explain_cache(before, left, error),
            _ => error,
        })?;
        let vocab_size = config.vocab_size;
        let shape = TableShape {
            max_num_seqs: settings.max_num_seqs as usize,
            max_num_batched_tokens: max_num_tokens,
            max_model_len: kv_plan.max_model_len as usize,
            block_size: settings.block_size as usize,
            num_kv_groups: windows.len(),
            logits_tile: backend.logits_tile(),
        };
        if (shape.max_num_seqs as u64) * (shape.max_model_len as u64) > u64::from(u32::MAX) {
            return Err(EngineError::Config {
                field: "scheduler.max_num_seqs".to_owned(),
                why: format!("{} sequences of {} tokens are too many", shape.max_num_seqs, shape.max_model_len),
            });
        }
        let limits = StepLimits {
            num_tokens: shape.max_num_batched_tokens,
            num_seqs: shape.max_num_seqs,
            context_len: shape.max_model_len,
            shape: config.attention_shape(),
        };
        let size = decoder.size();
        let num_mask_threads = match engine.mask_threads {
            0 => Masks::default_threads(backend.info().kind),
            chosen => chosen,
        };
        let masks = Masks::new(shape.max_num_seqs, vocab_size, num_mask_threads)?;
        let take = || -> Result<_, EngineError> {
            let mut model = DeviceModel::alloc(&mut backend, decoder, shape)?;
            backend.reserve(&limits)?;
            let spare = (0..MAX_IN_FLIGHT).map(|_| InFlight::new(&mut backend, &shape)).collect::<Result<_, _>>()?;
            let left = device_memory::left_for_cache(&mut backend)?;
            if let (None, Some(left)) = (exact, left) {
                kv_plan = KvPlan::new(&config, kv_dtype, settings, Budget::UpTo(left))
                    .map_err(|error| device_memory::explain_cache(before, left, error))?;
            }
            let free = left.unwrap_or(free);
            if kv_plan.total_bytes() > free {
                return Err(EngineError::Config {
                    field: "engine.kv_cache_memory".to_owned(),
                    why: format!("a cache of {} bytes does not fit, {free} bytes are free", kv_plan.total_bytes()),
                });
            }
            model.alloc_kv(&mut backend, &kv_plan)?;
            Ok((model, spare))
        };
        let taken = take();
        let (model, spare) = taken.map_err(|error| device_memory::explain(&mut backend, before, error))?;
        let device_memory = device_memory::use_of(&mut backend, before, size.weight_bytes, kv_plan.total_bytes())?;
        let info = ModelInfo {
            architecture: config.architecture.to_owned(),
            vocab_size: vocab_size as u32,
            max_model_len: kv_plan.max_model_len,
            digest,
            eos_token_ids,
            num_parameters: size.num_parameters,
            weight_bytes: size.weight_bytes,
            kv_cache_bytes: kv_plan.total_bytes(),
            device_memory,
            weight_format: size.format,
            dtype: dtype.name(),
            kv_dtype: kv_dtype.name(),
            device: backend.info(),
            device_note,
            block_size: settings.block_size,
            num_blocks: kv_plan.groups[0].num_blocks,
            max_num_seqs: settings.max_num_seqs,
            max_num_batched_tokens: settings.max_num_batched_tokens,
            prefix_cache: settings.prefix_cache,
            kv_events: settings.prefix_cache && settings.kv_events,
        };
        let executor = Self {
            backend,
            model,
            batch: InputBatch::new(shape),
            graphs: DecodeGraphs::new(shape.max_num_seqs),
            sampler_rows: SamplerRows::default(),
            masks,
            entering: Vec::new(),
            scores: Scores::default(),
            in_flight: VecDeque::with_capacity(MAX_IN_FLIGHT),
            spare,
        };
        Ok(Loaded { executor, info, kv_plan })
    }

    /// Writes what the device must know of a sequence that enters a row.
    fn admit(&mut self, admission: &Admission) -> Result<(), KernelError> {
        let DeviceModel { tables, sampler, shape, vocab_size, .. } = &mut self.model;
        let offset = admission.row.0 as usize * shape.max_model_len;
        let prompt = &*admission.request.prompt;
        self.backend.write_u32(&mut tables.token_table, offset, prompt)?;
        self.backend.write_u32(&mut tables.token_table, offset + prompt.len(), &admission.generated)?;
        let row = admission.row.0 as usize;
        let entering = self.entering.iter().position(|(row, _)| *row == admission.row);
        match entering {
            Some(index) => {
                let (_, grammar) = self.entering.swap_remove(index);
                let Admission { request, choice_index, generated, .. } = admission;
                self.masks.enter(row, grammar, *choice_index, request, generated);
            }
            None => self.masks.leave(row),
        }
        self.sampler_rows.set(&mut self.backend, sampler, admission, *vocab_size, entering.is_some())
    }

    /// Uploads the step's arrays, runs the layers and chooses tokens.
    fn compute(&mut self, step: &mut InFlight<B>) -> Result<(), KernelError> {
        let Self { backend, model, batch, graphs, masks, in_flight, .. } = self;
        let num_top = step.num_top;
        let num_sampled = batch.num_sampled;
        // Where logits take several tiles, the log probabilities of one come before the logits of the next.
        let is_one_tile = num_sampled <= model.shape.logits_tile;
        // Masks are written between the forward pass and sampling, which a recording does in one go.
        let has_masks = masked::has_masks(batch, masks);
        let may_replay = batch.only_decodes() && (is_one_tile || num_top == 0) && !has_masks;
        let size = match backend.can_capture() && may_replay {
            true => graphs.size_for(num_sampled),
            false => None,
        };
        let Some(size) = size else {
            model.tables.upload(backend, batch)?;
            model.forward(backend, batch.positions.len(), batch.rows.len())?;
            if has_masks {
                if let Some(last) = in_flight.back_mut() {
                    masked::tell_grammars(backend, masks, last)?;
                }
                masked::set_masks(backend, model, masks, batch, step)?;
            }
            for first in (0..num_sampled).step_by(model.shape.logits_tile) {
                let len = model.shape.logits_tile.min(num_sampled - first);
                model.choose(backend, first, len)?;
                model.score_chosen(backend, batch, first..first + len, num_top)?;
            }
            return Ok(());
        };
        batch.fill_up(size);
        model.tables.upload(backend, batch)?;
        let recorded = graphs.recorded(size);
        if let Recorded::Ran = recorded {
            let graph = backend.capture(|backend| model.decode(backend, size))?;
            *recorded = graph.map_or(Recorded::Refused, Recorded::Graph);
        }
        let has_run = match recorded {
            Recorded::Graph(graph) => match backend.replay(graph) {
                Err(KernelError::OutOfMemory { .. }) => false,
                replayed => replayed.map(|()| true)?,
            },
            _ => false,
        };
        if !has_run {
            model.decode(backend, size)?;
            *recorded = if let Recorded::Never = recorded { Recorded::Ran } else { Recorded::Refused };
        }
        model.score_chosen(backend, batch, 0..num_sampled, num_top)
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
        let (config, size) = (self.model.decoder.config(), self.model.decoder.size());
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

    /// Bytes of the weights that a step reads over the least seconds in which they can be read where they lie. `None` where
    /// the device does not measure it.
    pub(crate) fn read_bytes_per_second(&mut self) -> Option<f64> {
        let work = self.work();
        let seconds = self.backend.seconds_of_reading(&self.model.decoder.weights_of_step())?;
        Some((work.layer_bytes + work.output_bytes) as f64 / seconds)
    }

    /// Takes in a plan's rows and blocks as [`Executor::launch`] does, and says that all was computed without computing
    /// it: contexts of any length in no time, where only the pace of what follows is asked for. K and V are whatever
    /// the cache holds, sampled tokens are 0.
    pub(crate) fn adopt(&mut self, plan: &StepPlan) -> Result<StepOutput, EngineError> {
        self.batch.build(plan);
        for admission in &plan.admitted {
            self.admit(admission)?;
        }
        self.model.tables.stage_block_tables(&mut self.backend, &self.batch)?;
        self.backend.write_staged()?;
        let mut output = StepOutput::new(plan.step_id);
        for sequence in &plan.sequences {
            let token: &[u32] = if sequence.samples { &[0] } else { &[] };
            let next = sequence.num_computed_tokens + sequence.num_scheduled_tokens;
            let offset = sequence.row.0 as usize * self.model.shape.max_model_len + next as usize;
            self.backend.write_u32(&mut self.model.tables.token_table, offset, token)?;
            output.push_computed(sequence.num_scheduled_tokens, token);
        }
        Ok(output)
    }
}

#[cfg(feature = "testing")]
impl<B: Backend> ModelExecutor<B> {
    pub(crate) fn shape(&self) -> &TableShape {
        &self.model.shape
    }

    /// Logits of all positions of a prompt, computed in row 0 and the first blocks by steps of at most `chunk_len`.
    pub(crate) fn prompt_logits(&mut self, prompt: &[u32], chunk_len: usize) -> Result<Vec<f32>, KernelError> {
        use quire_scheduler::{
            BlockId, CacheSalt, Request, RequestId, RowId, SamplingParams, ScheduledSequence, StepId, TenantId,
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
        let (shape, vocab_size) = (self.model.shape, self.model.vocab_size);
        let mut logits = vec![0.0; prompt.len() * vocab_size];
        let mut first = 0;
        while first < prompt.len() {
            let len = chunk_len.min(prompt.len() - first);
            let blocks = |len: usize| len.div_ceil(shape.block_size);
            let new_blocks: Vec<BlockId> = (blocks(first)..blocks(first + len))
                .flat_map(|block| vec![BlockId(block as u32); shape.num_kv_groups])
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
            let Self { backend, model, batch, .. } = self;
            model.tables.upload(backend, batch)?;
            model.forward(backend, batch.positions.len(), batch.rows.len())?;
            for offset in (0..len).step_by(shape.logits_tile) {
                let num_rows = shape.logits_tile.min(len - offset);
                model.compute_logits(backend, offset, num_rows)?;
                let rows = (first + offset) * vocab_size..(first + offset + num_rows) * vocab_size;
                backend.read_f32(model.decoder.logits(), 0, &mut logits[rows])?;
            }
            first += len;
        }
        Ok(logits)
    }
}

impl<B: Backend> Executor for ModelExecutor<B> {
    fn constrain(&mut self, row: RowId, grammar: &Arc<RequestGrammar>) {
        self.entering.push((row, Arc::clone(grammar)));
    }

    fn launch(&mut self, plan: &StepPlan) -> Result<(), EngineError> {
        let step = self.spare.pop().expect("a step is collected before the one after the next is launched");
        // What fails ends the executor, and the step with it.
        let step = self.launch_as(step, plan)?;
        self.in_flight.push_back(step);
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, EngineError> {
        let mut step = self.in_flight.pop_front().expect("a step is launched before it is collected");
        // Before anyone hears of a token it is known to be one that its grammar allows.
        masked::tell_grammars(&mut self.backend, &mut self.masks, &mut step)?;
        let words = match step.num_sampled {
            0 => &[],
            _ => self.backend.finish_read(&mut step.readback)?,
        };
        let (tokens, logprobs) = words.split_at(step.num_sampled);
        let mut logprobs = scores::of_chosen(logprobs, &step.wanted_logprobs, step.num_top);
        let mut output = std::mem::take(&mut step.output);
        let mut sampled = (0_u32..).zip(tokens);
        for (index, &(num_scheduled_tokens, samples)) in step.sequences.iter().enumerate() {
            let token = if samples { Some(sampled.next().expect("one token for each")) } else { None };
            let is_finite = !step.non_finite.contains(&(index as u32));
            // Taken from the list in any case.
            let logprobs = token.and_then(|(index, _)| logprobs.next_if(|wanted| wanted.0 == index));
            match token {
                _ if !is_finite => output.sequences.push(SequenceOutput::NonFinite),
                Some((index, _)) if step.nothing_allowed.contains(&index) => {
                    output.sequences.push(SequenceOutput::NothingAllowed);
                }
                // Numbers that are not finite are reported so where nothing else can be the cause.
                Some((index, &NON_FINITE)) if step.restricted.contains(&index) => {
                    output.sequences.push(SequenceOutput::NothingAllowed);
                }
                Some((_, &NON_FINITE)) => output.sequences.push(SequenceOutput::NonFinite),
                Some((_, &token)) => {
                    output.push_computed(num_scheduled_tokens, &[token]);
                    output.logprobs.push(logprobs.map(|(_, logprobs)| logprobs));
                }
                None => output.push_computed(num_scheduled_tokens, &[]),
            }
        }
        drop(logprobs);
        self.spare.push(step);
        Ok(output)
    }

    fn recycle(&mut self, output: StepOutput) {
        if let Some(spare) = self.spare.iter_mut().find(|step| step.output.sequences.capacity() == 0) {
            spare.output = output;
        }
    }
}

impl<B: Backend> ModelExecutor<B> {
    fn launch_as(&mut self, mut step: InFlight<B>, plan: &StepPlan) -> Result<InFlight<B>, EngineError> {
        self.batch.build(plan);
        step.reset(plan, &self.batch);
        plan.released.iter().for_each(|row| self.masks.leave(row.0 as usize));
        for admission in &plan.admitted {
            self.admit(admission)?;
        }
        if plan.sequences.is_empty() {
            return Ok(step);
        }
        step.num_top = step.wanted_logprobs.iter().map(|wanted| wanted.num_top).max().unwrap_or(0) as usize;
        step.num_top = step.num_top.min(self.model.vocab_size);
        self.note_restricted(&mut step);
        self.compute(&mut step)?;
        let Self { backend, model, batch, scores, .. } = self;
        if step.num_sampled > 0 {
            let len = step.wanted_logprobs.len() * (1 + step.num_top);
            let tables = &model.tables;
            let parts = [
                (&tables.sampled, 0..step.num_sampled),
                (&tables.logprob_values, 0..len),
                (&tables.logprob_ids, 0..len),
            ];
            backend.start_read(&mut step.readback, &parts[..if len == 0 { 1 } else { 3 }])?;
        }
        let InFlight { output, non_finite, .. } = &mut step;
        scores.score_prompts(backend, model, batch, |token, logprobs| {
            if logprobs.logprob.is_nan() || logprobs.top.iter().any(|(_, value)| value.is_nan()) {
                non_finite.push(token.sequence);
            }
            output.prompt_logprobs.push((token.sequence, token.position, logprobs));
        })?;
        Ok(step)
    }
}

impl<B: Backend> InFlight<B> {
    fn new(backend: &mut B, shape: &TableShape) -> Result<Self, KernelError> {
        let len = shape.max_num_seqs * (1 + 2 * (1 + MAX_LOGPROBS as usize));
        Ok(Self {
            output: StepOutput::default(),
            sequences: Vec::with_capacity(shape.max_num_seqs),
            num_sampled: 0,
            wanted_logprobs: Vec::with_capacity(shape.max_num_seqs),
            num_top: 0,
            non_finite: Vec::new(),
            masked: Vec::with_capacity(shape.max_num_seqs),
            nothing_allowed: Vec::new(),
            restricted: Vec::with_capacity(shape.max_num_seqs),
            readback: backend.alloc_readback(len)?,
        })
    }

    fn reset(&mut self, plan: &StepPlan, batch: &InputBatch) {
        self.output.reset(plan.step_id);
        self.sequences.clear();
        self.sequences.extend(plan.sequences.iter().map(|s| (s.num_scheduled_tokens, s.samples)));
        self.num_sampled = batch.num_sampled;
        self.wanted_logprobs.clear();
        self.wanted_logprobs.extend_from_slice(&batch.wanted_logprobs);
        self.num_top = 0;
        self.non_finite.clear();
        self.masked.clear();
        self.nothing_allowed.clear();
        self.restricted.clear();
    }
}

/// What the cache is stored as beside weights of `dtype`.
pub(crate) fn kv_dtype(choice: KvDTypeChoice, dtype: DType) -> DType {
    match choice {
        KvDTypeChoice::Auto => dtype,
        KvDTypeChoice::F32 => DType::F32,
        KvDTypeChoice::Bf16 => DType::Bf16,
        KvDTypeChoice::Int8 => DType::I8,
        KvDTypeChoice::Fp8 => DType::F8E4M3,
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
