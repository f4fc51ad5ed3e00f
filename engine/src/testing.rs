//! For tests: an executor without a model, models that grow from a seed, and short ways to ask an engine.

pub mod gguf;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use half::bf16;
use quire_kernels::cpu::{CpuBackend, CpuConfig, Isa};
use quire_kernels::{Backend, DeviceInfo};
use quire_scheduler::{
    CacheSalt, FinishReason, KvGroup, KvGroupKind, Request, RowId, SamplingParams, Scheduler, SequenceOutput,
    StepOutput, StepPlan, TenantId, TokenLogprobs,
};
use safetensors::tensor::TensorView;

use crate::config::{EngineConfig, SchedulerSettings};
use crate::constraint::{Grammar, NotAllowed, TokenConstraint};
use crate::error::EngineError;
use crate::executor::Executor;
use crate::handle::{EngineHandle, ModelInfo, Submission, TokenEvent, TokenStream, lock};
use crate::masks::Masks;
use crate::model_executor::ModelExecutor;
use crate::model_files::ModelFiles;
use crate::observer::{StepObserver, StepReport};
use crate::places::RequestGrammar;
use crate::pooling::{PoolingFiles, PoolingHandle};
use crate::source::{EmbeddedModel, ModelSource};
use crate::weights::nearly_normal;
use crate::{scheduler_config, step_loop};

/// Called with each plan before it is computed; an error is a device that failed.
type OnStep = Box<dyn FnMut(&StepPlan) -> Result<(), EngineError> + Send>;
/// The next token, from the request, its choice index and all tokens of the sequence.
type NextToken = Box<dyn FnMut(&Request, u32, &[u32]) -> u32 + Send>;
/// Whether the logits for the token at a position are not finite.
type IsNonFinite = Box<dyn FnMut(&Request, u32) -> bool + Send>;

/// Computes nothing: tokens are a hash of the tokens before them, or whatever a test scripts.
///
/// It checks what a device could not: that plans continue where the last one ended.
pub struct FakeExecutor {
    vocab_size: u32,
    on_step: OnStep,
    next_token: NextToken,
    is_non_finite: IsNonFinite,
    rows: HashMap<u32, FakeRow>,
    entering: HashMap<u32, Arc<RequestGrammar>>,
    /// Made for the first grammar.
    masks: Option<Masks>,
    outputs: VecDeque<StepOutput>,
    spare: Vec<StepOutput>,
}

/// Most rows of an executor without a model, where grammars are followed.
const MAX_ROWS: usize = 1024;

struct FakeRow {
    request: Arc<Request>,
    choice_index: u32,
    tokens: Vec<u32>,
}

impl FakeExecutor {
    /// `token`, or the next one that the row's grammar allows.
    fn allowed(&mut self, row: RowId, token: u32) -> Result<u32, NotAllowed> {
        let row = row.0 as usize;
        let Some(masks) = &mut self.masks else { return Ok(token) };
        let Some(entry) = masks.entry(row) else { return Ok(token) };
        let mask = masks.wait(row)?;
        let is_allowed = |id: &u32| mask[*id as usize / 32] >> (id % 32) & 1 == 1;
        let token = (token..self.vocab_size).chain(0..token).find(is_allowed).ok_or(NotAllowed)?;
        masks.advance(row, entry, token);
        Ok(token)
    }
}

impl FakeExecutor {
    /// Tokens below `vocab_size`, from the whole sequence and, unless it is greedy, its seed and choice.
    pub fn new(vocab_size: u32) -> Self {
        Self {
            vocab_size,
            on_step: Box::new(|_| Ok(())),
            next_token: Box::new(move |request, choice_index, tokens| {
                hashed(request, choice_index, tokens, vocab_size)
            }),
            is_non_finite: Box::new(|_, _| false),
            rows: HashMap::new(),
            entering: HashMap::new(),
            masks: None,
            outputs: VecDeque::new(),
            spare: Vec::new(),
        }
    }

    /// Runs before each step: to count, to take time, to fail, to panic, or to wait for a [`Gate`].
    #[must_use]
    pub fn on_step(mut self, hook: impl FnMut(&StepPlan) -> Result<(), EngineError> + Send + 'static) -> Self {
        self.on_step = Box::new(hook);
        self
    }

    /// Fails the step with this number.
    #[must_use]
    pub fn fail_at(self, step: u64) -> Self {
        self.on_step(move |plan| match plan.step_id.0 == step {
            true => Err(quire_kernels::KernelError::Device { device: "fake", cause: "as scripted".to_owned() }.into()),
            false => Ok(()),
        })
    }

    /// Holds every step at `gate`.
    #[must_use]
    pub fn gated(self, gate: &Gate) -> Self {
        let gate = gate.clone();
        self.on_step(move |_| {
            gate.pass();
            Ok(())
        })
    }

    /// Replaces the hash: `next(request, choice_index, tokens so far)`.
    #[must_use]
    pub fn next_token(mut self, next: impl FnMut(&Request, u32, &[u32]) -> u32 + Send + 'static) -> Self {
        self.next_token = Box::new(next);
        self
    }

    /// Which tokens, by request and position, come out as not finite.
    #[must_use]
    pub fn non_finite(mut self, is_non_finite: impl FnMut(&Request, u32) -> bool + Send + 'static) -> Self {
        self.is_non_finite = Box::new(is_non_finite);
        self
    }
}

impl Executor for FakeExecutor {
    fn constrain(&mut self, row: RowId, grammar: &Arc<RequestGrammar>) {
        self.entering.insert(row.0, Arc::clone(grammar));
    }

    fn launch(&mut self, plan: &StepPlan) -> Result<(), EngineError> {
        (self.on_step)(plan)?;
        let mut output = self.spare.pop().unwrap_or_default();
        output.reset(plan.step_id);
        for row in &plan.released {
            self.rows.remove(&row.0);
            self.masks.iter_mut().for_each(|masks| masks.leave(row.0 as usize));
        }
        for admission in &plan.admitted {
            let tokens = admission.request.prompt.iter().chain(&admission.generated).copied().collect();
            let request = Arc::clone(&admission.request);
            let row = admission.row.0 as usize;
            if let Some(grammar) = self.entering.remove(&admission.row.0) {
                let masks = self
                    .masks
                    .get_or_insert_with(|| Masks::new(MAX_ROWS, self.vocab_size as usize, 1).expect("a thread starts"));
                masks.enter(row, grammar, admission.choice_index, &request, &admission.generated);
            } else if let Some(masks) = &mut self.masks {
                masks.leave(row);
            }
            let row = FakeRow { request, choice_index: admission.choice_index, tokens };
            self.rows.insert(admission.row.0, row);
        }
        for (index, sequence) in plan.sequences.iter().enumerate() {
            let row = self.rows.get_mut(&sequence.row.0).expect("a scheduled row was admitted");
            let first = sequence.num_computed_tokens as usize;
            let end = first + sequence.num_scheduled_tokens as usize;
            assert!(end <= row.tokens.len() && sequence.samples == (end == row.tokens.len()), "{sequence:?}");
            if let Some(num_top) = row.request.sampling.prompt_logprobs {
                for position in first..end.min(row.request.prompt.len() - 1) {
                    let logprobs = fake_logprobs(row.tokens[position + 1], num_top, self.vocab_size);
                    output.prompt_logprobs.push((index as u32, position as u32 + 1, logprobs));
                }
            }
            if !sequence.samples {
                output.push_computed(sequence.num_scheduled_tokens, &[]);
            } else if (self.is_non_finite)(&row.request, end as u32) {
                row.tokens.push(0);
                output.sequences.push(SequenceOutput::NonFinite);
            } else {
                let token = (self.next_token)(&row.request, row.choice_index, &row.tokens);
                let allowed = self.allowed(sequence.row, token);
                let row = self.rows.get_mut(&sequence.row.0).expect("a scheduled row was admitted");
                let Ok(token) = allowed else {
                    row.tokens.push(0);
                    output.sequences.push(SequenceOutput::NothingAllowed);
                    continue;
                };
                row.tokens.push(token);
                output.push_computed(sequence.num_scheduled_tokens, &[token]);
                let asked = row.request.sampling.logprobs;
                output.logprobs.push(asked.map(|num_top| fake_logprobs(token, num_top, self.vocab_size)));
            }
        }
        self.outputs.push_back(output);
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, EngineError> {
        Ok(self.outputs.pop_front().expect("a step is launched before it is collected"))
    }

    fn recycle(&mut self, output: StepOutput) {
        self.spare.push(output);
    }
}

fn hashed(request: &Request, choice_index: u32, tokens: &[u32], vocab_size: u32) -> u32 {
    let mix = |hash: u64, value: u64| (hash ^ value).wrapping_mul(0x100_0000_01b3).rotate_left(23);
    let mut hash = tokens.iter().fold(0xcbf2_9ce4_8422_2325, |hash, token| mix(hash, u64::from(*token)));
    if request.sampling.temperature > 0.0 {
        hash = mix(mix(hash, request.sampling.seed), u64::from(choice_index));
    }
    if let Some(allowed) = request.sampling.allowed_token_ids.as_deref().filter(|allowed| !allowed.is_empty()) {
        return allowed[(hash >> 17) as usize % allowed.len()];
    }
    let num_generated = tokens.len() - request.prompt.len();
    let may_stop = num_generated as u32 >= request.min_tokens;
    (0..vocab_size)
        .map(|step| ((hash >> 17) as u32).wrapping_add(step) % vocab_size)
        .find(|token| may_stop || !request.stop_token_ids.contains(token))
        .unwrap_or(0)
}

fn fake_logprobs(token: u32, num_top: u32, vocab_size: u32) -> TokenLogprobs {
    let value = |rank: u32| -0.5 - rank as f32;
    let top = (0..num_top.min(vocab_size)).map(|rank| ((token + rank) % vocab_size, value(rank))).collect();
    TokenLogprobs { logprob: value(0), rank: 1, top }
}

/// A grammar that allows some half of the tokens, by a hash of all tokens that came before; after some of them it is
/// complete and allows `end` alone.
#[derive(Debug)]
pub struct HashGrammar {
    /// Tokens are below it.
    pub vocab_size: u32,
    /// The token behind a complete output.
    pub end: u32,
}

struct HashState {
    vocab_size: u32,
    end: u32,
    hash: u64,
}

impl HashState {
    fn allows(&self, id: u32) -> bool {
        if self.hash % 23 == 7 {
            return id == self.end;
        }
        id < self.vocab_size && (self.hash >> 20 ^ u64::from(id).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) & 1 == 1
    }
}

impl Grammar for HashGrammar {
    fn begin(&self) -> Box<dyn TokenConstraint> {
        Box::new(HashState { vocab_size: self.vocab_size, end: self.end, hash: 1 })
    }
}

impl TokenConstraint for HashState {
    fn advance(&mut self, token_id: u32) -> Result<(), NotAllowed> {
        if !self.allows(token_id) {
            return Err(NotAllowed);
        }
        if self.hash % 23 != 7 {
            self.hash = (self.hash ^ u64::from(token_id)).wrapping_mul(0x100_0000_01b3).rotate_left(23);
        }
        Ok(())
    }

    fn mask(&mut self, mask: &mut [u32]) -> Result<(), NotAllowed> {
        let allowed = (0..self.vocab_size).filter(|id| self.allows(*id));
        allowed.for_each(|id| mask[id as usize / 32] |= 1 << (id % 32));
        Ok(())
    }
}

/// Holds steps until a test lets them through. A clone is the same gate.
#[derive(Clone, Default)]
pub struct Gate {
    inner: Arc<(Mutex<GateState>, Condvar)>,
}

#[derive(Default)]
struct GateState {
    is_open: bool,
    num_permits: u64,
    is_held: bool,
    num_passed: u64,
}

impl Gate {
    /// A gate that holds every step.
    pub fn closed() -> Self {
        Self::default()
    }

    /// Lets all steps through.
    pub fn open(&self) {
        self.change(|state| {
            state.is_open = true;
            state.is_held = false;
        });
    }

    /// Holds the next step.
    pub fn close(&self) {
        self.change(|state| {
            state.is_open = false;
            state.num_permits = 0;
        });
    }

    /// Lets so many more steps through.
    pub fn let_through(&self, num_steps: u64) {
        self.change(|state| {
            state.num_permits += num_steps;
            state.is_held &= num_steps == 0;
        });
    }

    /// Blocks until a step waits here.
    pub fn wait_until_held(&self) {
        let (state, wake) = &*self.inner;
        let mut state = lock(state);
        while !state.is_held {
            state = wake.wait(state).expect("no holder panics");
        }
    }

    /// Steps that passed.
    pub fn num_passed(&self) -> u64 {
        lock(&self.inner.0).num_passed
    }

    /// Waits until the gate lets the caller through.
    pub fn pass(&self) {
        let (state, wake) = &*self.inner;
        let mut state = lock(state);
        while !state.is_open && state.num_permits == 0 {
            state.is_held = true;
            wake.notify_all();
            state = wake.wait(state).expect("no holder panics");
        }
        state.is_held = false;
        if !state.is_open {
            state.num_permits -= 1;
        }
        state.num_passed += 1;
    }

    fn change(&self, change: impl FnOnce(&mut GateState)) {
        change(&mut lock(&self.inner.0));
        self.inner.1.notify_all();
    }
}

/// Keeps what the engine reports. A clone sees the same.
#[derive(Clone, Default)]
pub struct Recorder {
    inner: Arc<Mutex<Recorded>>,
}

#[derive(Default)]
struct Recorded {
    reports: Vec<StepReport>,
    cancellations: Vec<Duration>,
    failure: Option<String>,
}

impl Recorder {
    /// All steps so far.
    pub fn reports(&self) -> Vec<StepReport> {
        lock(&self.inner).reports.clone()
    }

    /// From each cancellation to its blocks being free.
    pub fn cancellations(&self) -> Vec<Duration> {
        lock(&self.inner).cancellations.clone()
    }

    /// Why the engine stopped.
    pub fn failure(&self) -> Option<String> {
        lock(&self.inner).failure.clone()
    }
}

impl StepObserver for Recorder {
    fn step(&mut self, report: &StepReport) {
        lock(&self.inner).reports.push(report.clone());
    }

    fn cancel_to_free(&mut self, elapsed: Duration) {
        lock(&self.inner).cancellations.push(elapsed);
    }

    fn failed(&mut self, cause: &str) {
        lock(&self.inner).failure = Some(cause.to_owned());
    }
}

/// What a [`FakeExecutor`] pretends to serve: 1024 blocks of 16 tokens, sequences of at most 4096.
pub fn fake_model(vocab_size: u32) -> ModelInfo {
    ModelInfo {
        architecture: "FakeForCausalLM".to_owned(),
        vocab_size,
        max_model_len: 4096,
        digest: [7; 32],
        eos_token_ids: vec![2],
        num_parameters: 0,
        weight_bytes: 0,
        kv_cache_bytes: 0,
        device_memory: None,
        weight_format: "f32",
        dtype: "f32",
        kv_dtype: "f32",
        device: DeviceInfo { kind: "cpu", name: "fake".to_owned(), isa: "none".to_owned(), num_units: 1 },
        device_note: None,
        block_size: 16,
        num_blocks: 1024,
        max_num_seqs: SchedulerSettings::default().max_num_seqs,
        max_num_batched_tokens: SchedulerSettings::default().max_num_batched_tokens,
        prefix_cache: true,
        kv_events: false,
    }
}

/// Loads a model on any backend, as [`crate::start`] does on the one that it chooses.
pub fn start_on<B: Backend>(
    backend: B,
    source: &ModelSource,
    engine: &EngineConfig,
    settings: &SchedulerSettings,
    observer: Box<dyn StepObserver>,
) -> Result<EngineHandle, EngineError> {
    crate::start_on(backend, ModelFiles::open(source, engine)?, engine, settings, observer, None, 0)
}

/// Starts an engine over any executor: lengths and blocks are those of `model`, budgets those of `settings`. Subscribers of the
/// prefix cache never wait for what it holds.
pub fn start_with(
    executor: impl Executor,
    model: ModelInfo,
    settings: &SchedulerSettings,
    pipeline_depth: u32,
    observer: Box<dyn StepObserver>,
) -> Result<EngineHandle, EngineError> {
    start_with_snapshots(executor, model, settings, pipeline_depth, Duration::ZERO, observer)
}

/// The same, where cached blocks are copied for subscribers once in `snapshot_interval` alone.
pub fn start_with_snapshots(
    executor: impl Executor,
    model: ModelInfo,
    settings: &SchedulerSettings,
    pipeline_depth: u32,
    snapshot_interval: Duration,
    observer: Box<dyn StepObserver>,
) -> Result<EngineHandle, EngineError> {
    let settings = SchedulerSettings { block_size: model.block_size, ..settings.clone() };
    let groups = vec![KvGroup { kind: KvGroupKind::Full, num_blocks: model.num_blocks }];
    let scheduler = Scheduler::new(scheduler_config(model.max_model_len, &settings, groups))?;
    let model = ModelInfo {
        max_num_seqs: settings.max_num_seqs,
        max_num_batched_tokens: settings.max_num_batched_tokens,
        prefix_cache: settings.prefix_cache,
        kv_events: settings.prefix_cache && settings.kv_events,
        ..model
    };
    step_loop::spawn(executor, scheduler, model, pipeline_depth, snapshot_interval, observer)
}

/// As [`crate::start`], on the CPU with chosen instructions.
pub fn start_on_cpu(
    source: &ModelSource,
    isa: Isa,
    engine: &EngineConfig,
    settings: &SchedulerSettings,
    observer: Box<dyn StepObserver>,
) -> Result<EngineHandle, EngineError> {
    start_on(cpu(isa, engine)?, source, engine, settings, observer)
}

/// As [`crate::pooling::start`], on the CPU with chosen instructions.
pub fn start_pooling_on_cpu(
    source: &ModelSource,
    isa: Isa,
    engine: &EngineConfig,
    settings: &SchedulerSettings,
    observer: Box<dyn StepObserver>,
) -> Result<PoolingHandle, EngineError> {
    let files = PoolingFiles::open(source, engine)?;
    crate::pooling::start_on(cpu(isa, engine)?, files, engine, settings, observer, None, 0)
}

fn cpu(isa: Isa, engine: &EngineConfig) -> Result<CpuBackend, EngineError> {
    Ok(CpuBackend::new(CpuConfig { num_threads: engine.num_threads.max(1), isa: Some(isa) })?)
}

/// Logits of all positions of each prompt, `[prompt.len(), vocab_size]`, computed in steps of at most `chunk_len`
/// tokens by the code that serves.
pub fn prompt_logits(
    source: &ModelSource,
    isa: Isa,
    engine: &EngineConfig,
    prompts: &[Vec<u32>],
    chunk_len: usize,
) -> Result<Vec<Vec<f32>>, EngineError> {
    prompt_logits_on(cpu(isa, engine)?, source, engine, prompts, chunk_len)
}

/// The same on any backend.
pub fn prompt_logits_on<B: Backend>(
    backend: B,
    source: &ModelSource,
    engine: &EngineConfig,
    prompts: &[Vec<u32>],
    chunk_len: usize,
) -> Result<Vec<Vec<f32>>, EngineError> {
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(1);
    let settings =
        SchedulerSettings { max_num_seqs: 1, max_num_batched_tokens: chunk_len as u32, ..SchedulerSettings::default() };
    let blocks = EngineConfig { kv_cache_memory: 64 << 20, ..engine.clone() };
    let files = ModelFiles::open(source, &blocks)?;
    let mut executor = ModelExecutor::load(backend, files, &blocks, &settings, None, 0)?.executor;
    assert!(longest <= executor.max_model_len(), "the cache has room for every prompt");
    prompts.iter().map(|prompt| Ok(executor.prompt_logits(prompt, chunk_len)?)).collect()
}

/// Families of models that grow from a seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TinyModel {
    /// Grouped queries, an output matrix of its own.
    Llama,
    /// A window shorter than the test's contexts, in every layer.
    MistralWindow,
    /// Two KV groups: one layer sees everything, one has a window.
    QwenMixed,
}

/// A model of some 100 000 weights, stored as `bf16`, that says much with few tokens: its logits are spread, so that any
/// change to what it sees changes what it says. It is kept until the process ends.
pub fn tiny_model(seed: u64, family: TinyModel) -> ModelSource {
    const HIDDEN: usize = 64;
    const INTERMEDIATE: usize = 96;
    const VOCAB: usize = 250;
    const KV_LEN: usize = 32;
    let (architecture, extra) = match family {
        TinyModel::Llama => ("LlamaForCausalLM", ""),
        TinyModel::MistralWindow => ("MistralForCausalLM", r#""sliding_window": 24,"#),
        TinyModel::QwenMixed => {
            ("Qwen2ForCausalLM", r#""sliding_window": 24, "use_sliding_window": true, "max_window_layers": 1,"#)
        }
    };
    let config = format!(
        r#"{{"architectures": ["{architecture}"], {extra} "hidden_size": {HIDDEN}, "intermediate_size": {INTERMEDIATE},
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": {VOCAB},
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "dtype": "bfloat16", "eos_token_id": 2}}"#
    );
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
        ("lm_head.weight".to_owned(), vec![VOCAB, HIDDEN]),
    ];
    for layer in 0..2 {
        let mut add =
            |name: &str, shape: &[usize]| shapes.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        add("input_layernorm.weight", &[HIDDEN]);
        add("post_attention_layernorm.weight", &[HIDDEN]);
        for (module, len) in [("q_proj", HIDDEN), ("k_proj", KV_LEN), ("v_proj", KV_LEN)] {
            add(&format!("self_attn.{module}.weight"), &[len, HIDDEN]);
            if family == TinyModel::QwenMixed {
                add(&format!("self_attn.{module}.bias"), &[len]);
            }
        }
        add("self_attn.o_proj.weight", &[HIDDEN, HIDDEN]);
        add("mlp.gate_proj.weight", &[INTERMEDIATE, HIDDEN]);
        add("mlp.up_proj.weight", &[INTERMEDIATE, HIDDEN]);
        add("mlp.down_proj.weight", &[HIDDEN, INTERMEDIATE]);
    }
    let mut counter = seed << 32;
    let mut draw = |name: &str, shape: &[usize]| -> Vec<u8> {
        let (mean, std) = match shape {
            _ if name.ends_with("norm.weight") => (1.0, 0.2),
            [_] => (0.0, 0.3),
            _ if name.ends_with("embed_tokens.weight") => (0.0, 0.3),
            _ => (0.0, 1.5 / (shape[shape.len() - 1] as f32).sqrt()),
        };
        let mut value = || {
            counter += 1;
            bf16::from_f32(mean + std * nearly_normal(counter)).to_le_bytes()
        };
        (0..shape.iter().product()).flat_map(|_| value()).collect()
    };
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> =
        shapes.into_iter().map(|(name, shape)| (name.clone(), shape.clone(), draw(&name, &shape))).collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes).expect("bytes fit the shape");
        (name, view)
    });
    let weights = safetensors::serialize(views, None).expect("a header of this size is fine");
    let files = vec![("config.json", &*config.into_bytes().leak()), ("model.safetensors", &*weights.leak())];
    ModelSource::Embedded(Box::leak(Box::new(EmbeddedModel { name: "tiny", files: files.leak() })))
}

/// A greedy request of tenant 0 that nothing but `max_tokens` ends.
pub fn submission(prompt: &[u32], max_tokens: u32) -> Submission {
    Submission {
        tenant: TenantId(0),
        adapter: None,
        priority: 0,
        cache_salt: CacheSalt::default(),
        prompt: prompt.into(),
        generated: Vec::new(),
        choice_offset: 0,
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        max_tokens,
        min_tokens: 0,
        stop_token_ids: Vec::new(),
        deadline: None,
        grammar: None,
    }
}

/// What one choice came to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChoiceOutcome {
    /// Generated tokens.
    pub tokens: Vec<u32>,
    /// Beside `tokens`.
    pub logprobs: Vec<Option<TokenLogprobs>>,
    /// By position, from 1.
    pub prompt_logprobs: Vec<(u32, TokenLogprobs)>,
    /// Why it ended; `None` where the stream failed.
    pub finish: Option<FinishReason>,
}

/// Reads a stream to its end: its choices in order of their index. Panics where events come in an order that is not
/// promised.
pub async fn read_all(stream: &mut TokenStream) -> Vec<ChoiceOutcome> {
    let mut choices = std::collections::BTreeMap::<u32, ChoiceOutcome>::new();
    while let Some(event) = stream.next().await {
        let index = match event {
            TokenEvent::Failed => break,
            TokenEvent::Scheduled { choice_index, .. }
            | TokenEvent::PromptLogprobs { choice_index, .. }
            | TokenEvent::Token { choice_index, .. }
            | TokenEvent::Finished { choice_index, .. } => choice_index,
        };
        let choice = choices.entry(index).or_default();
        assert_eq!(choice.finish, None, "nothing follows the end");
        match event {
            TokenEvent::PromptLogprobs { position, logprobs, .. } => choice.prompt_logprobs.push((position, logprobs)),
            TokenEvent::Token { token_id, logprobs, .. } => {
                choice.tokens.push(token_id);
                choice.logprobs.push(logprobs);
            }
            TokenEvent::Finished { reason, .. } => choice.finish = Some(reason),
            TokenEvent::Scheduled { .. } | TokenEvent::Failed => {}
        }
    }
    assert_eq!(stream.next().await, None);
    choices.into_values().collect()
}

impl<B: Backend> ModelExecutor<B> {
    pub(crate) fn max_model_len(&self) -> usize {
        self.shape().max_model_len
    }
}
