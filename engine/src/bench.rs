//! Measuring without a server: the device alone, and a model driven step by step through plans of its scheduler.

mod ops;

use std::sync::Arc;
use std::time::{Duration, Instant};

pub use ops::{OpCase, OpEffort, OpFigure, ops};
pub use quire_kernels::ops::rope_kv_write::AttentionShape;
pub use quire_kernels::{DType, WeightFormat, WeightLayout};

use quire_kernels::cpu::peaks;
pub use quire_kernels::cpu::peaks::Peaks;
use quire_kernels::cuda;
use quire_kernels::cuda::peaks::Effort;
use quire_kernels::{Backend, DeviceInfo};
use quire_scheduler::{
    CacheSalt, EventKind, KvGroupKind, Request, RequestId, SamplingParams, Scheduler, SchedulerConfig, StepOutput,
    StepPlan, TenantId, Time,
};

use crate::config::{EngineConfig, SchedulerSettings};
use crate::error::EngineError;
use crate::executor::{self, Device, Executor};
use crate::handle::ModelInfo;
use crate::kv_cache::KvPlan;
use crate::model_executor::{Loaded, ModelExecutor, Work};
use crate::model_files::ModelFiles;
use crate::source::ModelSource;

/// Steps before those that are timed: caches, frequencies and sleeping threads settle.
const NUM_WARM_UP_STEPS: u32 = 2;

/// What a device can do at most.
#[derive(Clone, Debug)]
pub struct MachinePeaks {
    pub device: DeviceInfo,
    /// Of one core, alone.
    pub one_core: Peaks,
    /// Of all threads that `engine.num_threads` asks for.
    pub all_cores: Peaks,
}

/// Measures the device that `config` asks for, some two seconds. Fails where it cannot be had.
pub fn machine(config: &EngineConfig) -> Result<MachinePeaks, EngineError> {
    let one_core = with_device(&EngineConfig { num_threads: 1, ..config.clone() }, Describe)?.1;
    let (device, all_cores) = with_device(config, Describe)?;
    Ok(MachinePeaks { device, one_core, all_cores })
}

/// Something to be done on whatever device is opened.
trait OnDevice {
    type Output;

    /// With the device's limits, and what is to be known of it.
    fn run<B: Backend>(self, backend: B, peaks: Peaks, note: Option<String>) -> Result<Self::Output, EngineError>;
}

/// Opens and measures the device that `config` asks for.
fn with_device<R: OnDevice>(config: &EngineConfig, task: R) -> Result<R::Output, EngineError> {
    let (device, note) = executor::open_device(config)?;
    match device {
        Device::Cpu(backend) => {
            let peaks = peaks::measure(&backend)?;
            task.run(*backend, peaks, note)
        }
        Device::Cuda(mut backend) => {
            let peaks = cuda::peaks::measure(&mut backend, Effort::FULL)?;
            task.run(*backend, peaks, note)
        }
    }
}

struct Describe;

impl OnDevice for Describe {
    type Output = (DeviceInfo, Peaks);

    fn run<B: Backend>(self, backend: B, peaks: Peaks, _note: Option<String>) -> Result<Self::Output, EngineError> {
        Ok((backend.info(), peaks))
    }
}

struct Load<'a> {
    source: &'a ModelSource,
    engine: &'a EngineConfig,
    settings: &'a SchedulerSettings,
}

impl OnDevice for Load<'_> {
    type Output = ModelBench;

    fn run<B: Backend>(self, backend: B, peaks: Peaks, note: Option<String>) -> Result<ModelBench, EngineError> {
        let Self { source, engine, settings } = self;
        let files = ModelFiles::open(source, engine)?;
        let Loaded { executor, info, kv_plan } = ModelExecutor::load(backend, files, engine, settings, note, 0)?;
        let work = executor.work();
        let executor = Box::new(executor);
        Ok(ModelBench { executor, info, peaks, kv_plan, settings: settings.clone(), work, num_requests: 0 })
    }
}

/// Steps of one kind, timed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Tokens that one run of `time` computes: those of the prompt, or one for each sequence.
    pub num_tokens: u32,
    /// Median over the runs: a whole prompt, or one step of decoding, planning and applying included.
    pub time: Duration,
    /// Weights and KV cache that a run reads; a prompt reads the weights once for each of its chunks.
    pub bytes: u64,
    /// Multiplications and additions of products and attention in a run.
    pub flops: u64,
}

impl Measured {
    pub fn tokens_per_second(&self) -> f64 {
        f64::from(self.num_tokens) / self.time.as_secs_f64()
    }
}

/// A loaded model without a server around it.
pub struct ModelBench {
    executor: Box<dyn BenchExecutor>,
    info: ModelInfo,
    peaks: Peaks,
    kv_plan: KvPlan,
    settings: SchedulerSettings,
    work: Work,
    num_requests: u64,
}

/// An executor whose contexts need not be computed.
trait BenchExecutor: Executor {
    /// See [`ModelExecutor::adopt`].
    fn adopt(&mut self, plan: &StepPlan) -> Result<StepOutput, EngineError>;
    /// See [`ModelExecutor::read_bytes_per_second`].
    fn read_bytes_per_second(&mut self) -> Option<f64>;
}

impl<B: Backend> BenchExecutor for ModelExecutor<B> {
    fn adopt(&mut self, plan: &StepPlan) -> Result<StepOutput, EngineError> {
        Self::adopt(self, plan)
    }

    fn read_bytes_per_second(&mut self) -> Option<f64> {
        Self::read_bytes_per_second(self)
    }
}

impl ModelBench {
    /// Measures the device, then loads the model as [`crate::start`] does.
    pub fn load(
        source: &ModelSource,
        engine: &EngineConfig,
        settings: &SchedulerSettings,
    ) -> Result<Self, EngineError> {
        with_device(engine, Load { source, engine, settings })
    }

    /// The model as it is served.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// What the device did at most, right before the model was loaded.
    pub fn peaks(&self) -> &Peaks {
        &self.peaks
    }

    /// What it reads at most of the model's own weights, measured now: memory is not equally fast everywhere, nor always. The
    /// figure of [`ModelBench::peaks`] where the device measures no other.
    pub fn measure_reading(&mut self) -> f64 {
        self.executor.read_bytes_per_second().unwrap_or(self.peaks.read_bytes_per_second)
    }

    /// Computes a prompt of `prompt_len` random tokens `num_runs` times, in chunks of `max_num_batched_tokens`. `None`
    /// where it does not fit.
    pub fn prefill(&mut self, prompt_len: u32, num_runs: u32) -> Result<Option<Measured>, EngineError> {
        let prompt_len = prompt_len.max(1);
        let mut times = Vec::with_capacity(num_runs as usize);
        for run in 0..=num_runs.max(1) {
            let max_num_batched_tokens = self.settings.max_num_batched_tokens;
            let Some(mut scheduler) = self.scheduler_with(1, prompt_len, 1, max_num_batched_tokens)? else {
                return Ok(None);
            };
            let start = Instant::now();
            while scheduler.has_work() {
                let plan = scheduler.plan(Time(0));
                self.compute(&mut scheduler, plan)?;
            }
            // The first warms up.
            if run > 0 {
                times.push(start.elapsed());
            }
        }
        let num_chunks = u64::from(prompt_len.div_ceil(self.settings.max_num_batched_tokens));
        let contexts = self.sum_contexts(1..=u64::from(prompt_len));
        let measured = Measured {
            num_tokens: prompt_len,
            time: median(&mut times),
            bytes: num_chunks * self.work.layer_bytes + self.work.output_bytes + self.kv_bytes(u64::from(prompt_len)),
            flops: u64::from(prompt_len) * self.work.layer_flops
                + self.work.output_flops
                + self.work.attention_flops(&contexts),
        };
        Ok(Some(measured))
    }

    /// Decodes `num_steps` steps of `batch` sequences behind contexts of `depth` tokens each, which share no blocks.
    /// `None` where they do not fit.
    ///
    /// The contexts are not computed: see `ModelExecutor::adopt`. They are taken in all at once, so that layers with
    /// a window need blocks for whole contexts too.
    pub fn decode(&mut self, batch: u32, depth: u32, num_steps: u32) -> Result<Option<Measured>, EngineError> {
        let (batch, depth, num_steps) = (batch.max(1), depth.max(1), num_steps.max(1));
        let num_new = NUM_WARM_UP_STEPS + num_steps + 1;
        let all_prompts = batch.saturating_mul(depth);
        let Some(mut scheduler) = self.scheduler_with(batch, depth, num_new, all_prompts)? else { return Ok(None) };
        let plan = scheduler.plan(Time(0));
        let is_whole = plan.sequences.len() == batch as usize && plan.num_scheduled_tokens == all_prompts;
        let mut output = self.executor.adopt(&plan)?;
        scheduler.apply(plan, &mut output, Time(0));
        if !is_whole {
            return Ok(None);
        }
        let mut times = Vec::with_capacity(num_steps as usize);
        let mut events = Vec::new();
        for step in 0..NUM_WARM_UP_STEPS + num_steps {
            let start = Instant::now();
            let plan = scheduler.plan(Time(0));
            let num_decodes = plan.num_decodes();
            self.compute(&mut scheduler, plan)?;
            events.clear();
            scheduler.drain_events(&mut events);
            if step >= NUM_WARM_UP_STEPS {
                times.push(start.elapsed());
            }
            if num_decodes != batch as usize || events.iter().any(|event| event.kind == EventKind::Preempted) {
                return Ok(None);
            }
        }
        let context = u64::from(depth + 1 + NUM_WARM_UP_STEPS + num_steps / 2);
        let batch_of = |each: u64| u64::from(batch) * each;
        let contexts = self.sum_contexts(context..=context);
        Ok(Some(Measured {
            num_tokens: batch,
            time: median(&mut times),
            bytes: self.work.layer_bytes + self.work.output_bytes + batch_of(self.kv_bytes(context)),
            flops: batch_of(self.work.layer_flops + self.work.output_flops + self.work.attention_flops(&contexts)),
        }))
    }

    /// A scheduler that was given `batch` requests of random tokens. `None` where one of them is too long, or they are
    /// too many.
    fn scheduler_with(
        &mut self,
        batch: u32,
        prompt_len: u32,
        max_tokens: u32,
        max_num_batched_tokens: u32,
    ) -> Result<Option<Scheduler>, EngineError> {
        let fits = u64::from(prompt_len) + u64::from(max_tokens) <= u64::from(self.info.max_model_len)
            && batch <= self.info.max_num_seqs;
        let config = SchedulerConfig {
            max_num_batched_tokens: max_num_batched_tokens.max(self.settings.max_num_seqs),
            enable_prefix_cache: false,
            max_waiting_tokens: u64::MAX / 4,
            max_waiting_micros: None,
            ..crate::scheduler_config(self.info.max_model_len, &self.settings, self.kv_plan.groups.clone())
        };
        if !fits || config.validate().is_err() {
            return Ok(None);
        }
        let mut scheduler = Scheduler::new(config)?;
        for _ in 0..batch {
            let id = self.num_requests;
            self.num_requests += 1;
            let prompt: Arc<[u32]> =
                (0..prompt_len).map(|position| random_token(id, position, self.info.vocab_size)).collect();
            let request = Request {
                id: RequestId(id),
                tenant: TenantId(0),
                adapter: None,
                priority: 0,
                cache_salt: CacheSalt::default(),
                prompt,
                generated: Vec::new(),
                choice_offset: 0,
                sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
                max_tokens,
                min_tokens: 0,
                stop_token_ids: Vec::new(),
                deadline: None,
            };
            if scheduler.submit(request, Time(0)).is_err() {
                return Ok(None);
            }
        }
        Ok(Some(scheduler))
    }

    /// One step, as the engine's thread does it.
    fn compute(&mut self, scheduler: &mut Scheduler, plan: StepPlan) -> Result<(), EngineError> {
        self.executor.launch(&plan)?;
        let mut output = self.executor.collect()?;
        scheduler.apply(plan, &mut output, Time(0));
        self.executor.recycle(output);
        Ok(())
    }

    /// Bytes of K and V that a context of so many tokens reads, in all layers.
    fn kv_bytes(&self, context: u64) -> u64 {
        let groups = self.kv_plan.groups.iter().zip(&self.kv_plan.layouts);
        groups
            .map(|(group, layout)| seen(group.kind, context) * layout.block_bytes() as u64 / layout.block_size as u64)
            .sum()
    }

    /// Per KV group: how many layers it has, and how many tokens the positions see, added up.
    fn sum_contexts(&self, contexts: std::ops::RangeInclusive<u64>) -> Vec<(u64, u64)> {
        let groups = self.kv_plan.groups.iter().zip(&self.kv_plan.layouts);
        groups
            .map(|(group, layout)| {
                (layout.num_layers as u64, contexts.clone().map(|context| seen(group.kind, context)).sum())
            })
            .collect()
    }
}

/// Tokens of a context that a layer of this kind reads.
fn seen(kind: KvGroupKind, context: u64) -> u64 {
    match kind {
        KvGroupKind::SlidingWindow { window } => context.min(u64::from(window)),
        _ => context,
    }
}

/// Bytes of this process that are in memory; `None` where the system does not say.
pub fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// A hash of request and position: prompts that have nothing in common.
fn random_token(request: u64, position: u32, vocab_size: u32) -> u32 {
    let mut x = (request << 32 | u64::from(position)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ x >> 31) % u64::from(vocab_size.max(1))) as u32
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}
