//! Every metric: its name, its help, its unit and its buckets, and the recorder that renders them for Prometheus.
//!
//! Values are written through handles made once in [`install`], so recording costs an atomic operation and takes no lock.
//! All series exist from the start, at zero, so that rates are defined before the first request. Without [`install`]
//! recording does nothing: tests of other parts need no recorder.

mod labels;
mod request;

use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use metrics::{Counter, Gauge, Histogram, Unit};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use quire_engine::scheduler::{BlockStats, SchedulerStats};
use quire_engine::{ModelInfo, StepObserver, StepReport};

pub use labels::{Endpoint, Listener, Outcome};
pub use request::RequestMetrics;

const REQUESTS: &str = "quire_requests_total";
const REQUESTS_WAITING: &str = "quire_requests_waiting";
const REQUESTS_RUNNING: &str = "quire_requests_running";
const REQUESTS_IN_FLIGHT: &str = "quire_requests_in_flight";
const TTFT: &str = "quire_time_to_first_token_seconds";
const TPOT: &str = "quire_time_per_output_token_seconds";
const ITL: &str = "quire_inter_token_latency_seconds";
const DURATION: &str = "quire_request_duration_seconds";
const QUEUE: &str = "quire_queue_seconds";
const PROMPT_TOKENS: &str = "quire_prompt_tokens_total";
const CACHED_PROMPT_TOKENS: &str = "quire_cached_prompt_tokens_total";
const GENERATION_TOKENS: &str = "quire_generation_tokens_total";
const CACHE_QUERIED: &str = "quire_prefix_cache_queried_tokens_total";
const CACHE_HIT: &str = "quire_prefix_cache_hit_tokens_total";
const KV_BLOCKS: &str = "quire_kv_blocks";
const KV_USAGE: &str = "quire_kv_cache_usage_ratio";
const PREEMPTIONS: &str = "quire_preemptions_total";
const STEP: &str = "quire_step_duration_seconds";
const CANCEL_TO_FREE: &str = "quire_cancel_to_free_seconds";
const BUILD_INFO: &str = "quire_build_info";
const MODEL_INFO: &str = "quire_model_info";
const READY: &str = "quire_ready";
const CONNECTIONS: &str = "quire_connections";
const CONNECTIONS_REFUSED: &str = "quire_connections_refused_total";
const PANICS: &str = "quire_panics_total";
const PROCESS_RSS: &str = "process_resident_memory_bytes";
const PROCESS_START: &str = "process_start_time_seconds";
const PROCESS_FDS: &str = "process_open_fds";
const PROCESS_THREADS: &str = "process_threads";
// Names that gateways and dashboards expect of any model server (Gateway API Inference Extension, proposal 003).
const VLLM_WAITING: &str = "vllm:num_requests_waiting";
const VLLM_RUNNING: &str = "vllm:num_requests_running";
const VLLM_KV_USAGE: &str = "vllm:kv_cache_usage_perc";
const VLLM_CACHE_CONFIG: &str = "vllm:cache_config_info";
const VLLM_LORA: &str = "vllm:lora_requests_info";

#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
    Histogram(&'static [f64]),
}

/// Small models answer in milliseconds, large ones under load in minutes.
const TTFT_BUCKETS: &[f64] = &[
    0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0,
];
/// Tokens of small models are a fraction of a millisecond apart.
const TOKEN_BUCKETS: &[f64] = &[
    0.000_25, 0.000_5, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
    0.5, 1.0, 2.5, 5.0, 10.0,
];
const DURATION_BUCKETS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0, 960.0];
const QUEUE_BUCKETS: &[f64] =
    &[0.000_5, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];
/// Planning takes microseconds, computing a step up to seconds.
const STEP_BUCKETS: &[f64] = &[
    0.000_005, 0.000_01, 0.000_02, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
    0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];

/// The one table of metrics.
const METRICS: &[(&str, Kind, Option<Unit>, &str)] = &[
    (REQUESTS, Kind::Counter, None, "Requests that ended, by endpoint and by how they ended."),
    (REQUESTS_WAITING, Kind::Gauge, None, "Sequences that wait for their first step or to be resumed."),
    (REQUESTS_RUNNING, Kind::Gauge, None, "Sequences that take part in steps."),
    (REQUESTS_IN_FLIGHT, Kind::Gauge, None, "Requests that were accepted and have not ended."),
    (TTFT, Kind::Histogram(TTFT_BUCKETS), Some(Unit::Seconds), "Time from accepting a request to its first token."),
    (
        TPOT,
        Kind::Histogram(TOKEN_BUCKETS),
        Some(Unit::Seconds),
        "Time from the first to the last token, divided by the tokens after the first; one value per choice.",
    ),
    (ITL, Kind::Histogram(TOKEN_BUCKETS), Some(Unit::Seconds), "Time between two tokens of one choice."),
    (DURATION, Kind::Histogram(DURATION_BUCKETS), Some(Unit::Seconds), "Time from accepting a request to its end."),
    (QUEUE, Kind::Histogram(QUEUE_BUCKETS), Some(Unit::Seconds), "Time from accepting a request to its first step."),
    (PROMPT_TOKENS, Kind::Counter, None, "Tokens of prompts, cached ones counted in."),
    (CACHED_PROMPT_TOKENS, Kind::Counter, None, "Tokens of prompts that came from the prefix cache."),
    (GENERATION_TOKENS, Kind::Counter, None, "Tokens generated."),
    (CACHE_QUERIED, Kind::Counter, None, "Prompt tokens that were looked up in the prefix cache."),
    (CACHE_HIT, Kind::Counter, None, "Prompt tokens that were found in the prefix cache."),
    (KV_BLOCKS, Kind::Gauge, None, "Blocks of the KV cache by state: used, cached (reusable) and free."),
    (KV_USAGE, Kind::Gauge, None, "Share of the KV cache that running sequences hold, 0 to 1."),
    (PREEMPTIONS, Kind::Counter, None, "Sequences whose blocks were taken back, to be computed again later."),
    (STEP, Kind::Histogram(STEP_BUCKETS), Some(Unit::Seconds), "Time of a step by phase: plan, execute, apply."),
    (
        CANCEL_TO_FREE,
        Kind::Histogram(STEP_BUCKETS),
        Some(Unit::Seconds),
        "Time from a request's cancellation until its blocks are free.",
    ),
    (BUILD_INFO, Kind::Gauge, None, "Always 1; the labels say what runs."),
    (MODEL_INFO, Kind::Gauge, None, "Always 1; the labels say what is served."),
    (READY, Kind::Gauge, None, "1 when the server takes requests, 0 while it starts, drains or is stalled."),
    (CONNECTIONS, Kind::Gauge, None, "Open connections by listener."),
    (CONNECTIONS_REFUSED, Kind::Counter, None, "Connections closed because too many were open, by listener."),
    (PANICS, Kind::Counter, None, "Panics in any thread or task; each is a bug."),
    (PROCESS_RSS, Kind::Gauge, Some(Unit::Bytes), "Resident memory of the process."),
    (PROCESS_START, Kind::Gauge, Some(Unit::Seconds), "When the process started, in seconds since 1970."),
    (PROCESS_FDS, Kind::Gauge, None, "Open file descriptors."),
    (PROCESS_THREADS, Kind::Gauge, None, "Threads of the process."),
    (VLLM_WAITING, Kind::Gauge, None, "The same as quire_requests_waiting, under the name that gateways read."),
    (VLLM_RUNNING, Kind::Gauge, None, "The same as quire_requests_running, under the name that gateways read."),
    (VLLM_KV_USAGE, Kind::Gauge, None, "The same as quire_kv_cache_usage_ratio, under the name that gateways read."),
    (VLLM_CACHE_CONFIG, Kind::Gauge, None, "Always 1; the labels describe the KV cache, as gateways read them."),
    (VLLM_LORA, Kind::Gauge, None, "When the adapters last changed, in seconds since 1970; the labels name them."),
];

/// Name, type and help of every metric, for whoever checks what dashboards ask for.
pub fn catalogue() -> impl Iterator<Item = (&'static str, &'static str, &'static str)> {
    METRICS.iter().map(|(name, kind, _, help)| {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
        };
        (*name, kind, *help)
    })
}

/// Handles of every series whose labels are known before a model is.
struct Handles {
    requests: Vec<Vec<Counter>>,
    in_flight: Gauge,
    ttft: Histogram,
    tpot: Histogram,
    itl: Histogram,
    duration: Histogram,
    queue: Histogram,
    prompt_tokens: Counter,
    cached_prompt_tokens: Counter,
    generation_tokens: Counter,
    connections: Vec<Gauge>,
    refused: Vec<Counter>,
    ready: Gauge,
    panics: Counter,
    rss: Gauge,
    fds: Gauge,
    threads: Gauge,
    render: PrometheusHandle,
}

static HANDLES: OnceLock<Handles> = OnceLock::new();

/// Installs the recorder of this process, once; later calls change nothing. Fails where another recorder is installed.
pub fn install() -> Result<(), String> {
    if HANDLES.get().is_some() {
        return Ok(());
    }
    let mut builder = PrometheusBuilder::new();
    for (name, kind, _, _) in METRICS {
        if let Kind::Histogram(buckets) = kind {
            builder = builder
                .set_buckets_for_metric(Matcher::Full((*name).to_owned()), buckets)
                .map_err(|error| error.to_string())?;
        }
    }
    let recorder = builder.build_recorder();
    let render = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|error| error.to_string())?;
    for (name, kind, unit, help) in METRICS {
        let unit = unit.unwrap_or(Unit::Count);
        match kind {
            Kind::Counter => metrics::describe_counter!(*name, unit, *help),
            Kind::Gauge => metrics::describe_gauge!(*name, unit, *help),
            Kind::Histogram(_) => metrics::describe_histogram!(*name, unit, *help),
        }
    }
    let requests = Endpoint::ALL
        .iter()
        .map(|endpoint| {
            Outcome::ALL
                .iter()
                .map(
                    |outcome| metrics::counter!(REQUESTS, "endpoint" => endpoint.label(), "outcome" => outcome.label()),
                )
                .collect()
        })
        .collect();
    let handles = Handles {
        requests,
        in_flight: metrics::gauge!(REQUESTS_IN_FLIGHT),
        ttft: metrics::histogram!(TTFT),
        tpot: metrics::histogram!(TPOT),
        itl: metrics::histogram!(ITL),
        duration: metrics::histogram!(DURATION),
        queue: metrics::histogram!(QUEUE),
        prompt_tokens: metrics::counter!(PROMPT_TOKENS),
        cached_prompt_tokens: metrics::counter!(CACHED_PROMPT_TOKENS),
        generation_tokens: metrics::counter!(GENERATION_TOKENS),
        connections: Listener::ALL.iter().map(|l| metrics::gauge!(CONNECTIONS, "listener" => l.label())).collect(),
        refused: Listener::ALL
            .iter()
            .map(|l| metrics::counter!(CONNECTIONS_REFUSED, "listener" => l.label()))
            .collect(),
        ready: metrics::gauge!(READY),
        panics: metrics::counter!(PANICS),
        rss: metrics::gauge!(PROCESS_RSS),
        fds: metrics::gauge!(PROCESS_FDS),
        threads: metrics::gauge!(PROCESS_THREADS),
        render,
    };
    handles.in_flight.set(0.0);
    handles.ready.set(0.0);
    handles.connections.iter().for_each(|gauge| gauge.set(0.0));
    metrics::gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    metrics::gauge!(PROCESS_START).set(seconds_since_1970());
    let _ = HANDLES.set(handles);
    Ok(())
}

/// The text that Prometheus scrapes; empty before [`install`].
pub fn render() -> String {
    let Some(handles) = HANDLES.get() else { return String::new() };
    read_process(handles);
    handles.render.render()
}

/// Moves recorded values into their buckets. Called every few seconds, so that values do not pile up unread where
/// nobody scrapes.
pub fn upkeep() {
    if let Some(handles) = HANDLES.get() {
        handles.render.run_upkeep();
    }
}

/// Says whether requests are taken.
pub fn set_ready(ready: bool) {
    if let Some(handles) = HANDLES.get() {
        handles.ready.set(f64::from(u8::from(ready)));
    }
}

/// Counts a panic.
pub fn count_panic() {
    if let Some(handles) = HANDLES.get() {
        handles.panics.increment(1);
    }
}

/// A connection refused because too many are open.
pub fn count_refused_connection(listener: Listener) {
    if let Some(handles) = HANDLES.get() {
        handles.refused[listener as usize].increment(1);
    }
}

/// Counts one open connection for as long as it lives.
#[derive(Debug)]
pub struct OpenConnection(Listener);

impl OpenConnection {
    pub fn new(listener: Listener) -> Self {
        if let Some(handles) = HANDLES.get() {
            handles.connections[listener as usize].increment(1.0);
        }
        Self(listener)
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        if let Some(handles) = HANDLES.get() {
            handles.connections[self.0 as usize].decrement(1.0);
        }
    }
}

/// Feeds the histograms of steps, on the engine's thread.
pub struct StepMetrics {
    plan: Histogram,
    execute: Histogram,
    apply: Histogram,
    cancel_to_free: Histogram,
}

impl StepMetrics {
    #[allow(clippy::new_without_default, reason = "it registers series: not a value to make in passing")]
    pub fn new() -> Self {
        Self {
            plan: metrics::histogram!(STEP, "phase" => "plan"),
            execute: metrics::histogram!(STEP, "phase" => "execute"),
            apply: metrics::histogram!(STEP, "phase" => "apply"),
            cancel_to_free: metrics::histogram!(CANCEL_TO_FREE),
        }
    }
}

impl StepObserver for StepMetrics {
    fn step(&mut self, report: &StepReport) {
        self.plan.record(report.plan);
        self.execute.record(report.execute);
        self.apply.record(report.apply);
    }

    fn cancel_to_free(&mut self, elapsed: Duration) {
        self.cancel_to_free.record(elapsed);
    }
}

/// The state of the served models' schedulers, as gauges that are set when they are read: a scrape sees the last step, and
/// steps pay nothing for it. Our own names have sums over all models, those that gateways read a series for each.
pub struct ModelMetrics {
    waiting: Gauge,
    running: Gauge,
    kv_usage: Gauge,
    used: Gauge,
    cached: Gauge,
    free: Gauge,
    preemptions: Counter,
    queried: Counter,
    hit: Counter,
    models: Vec<Aliases>,
}

/// A model's state under the names that gateways read.
struct Aliases {
    waiting: Gauge,
    running: Gauge,
    kv_usage: Gauge,
}

impl ModelMetrics {
    /// Registers everything that needs models to be named.
    pub fn new(models: &[(&str, &ModelInfo)]) -> Self {
        let aliases = |engine: usize, model_name: &str| {
            let gauge = |name: &'static str| metrics::gauge!(name, "model_name" => model_name.to_owned(), "engine" => engine.to_string());
            Aliases { waiting: gauge(VLLM_WAITING), running: gauge(VLLM_RUNNING), kv_usage: gauge(VLLM_KV_USAGE) }
        };
        let metrics = Self {
            waiting: metrics::gauge!(REQUESTS_WAITING),
            running: metrics::gauge!(REQUESTS_RUNNING),
            kv_usage: metrics::gauge!(KV_USAGE),
            used: metrics::gauge!(KV_BLOCKS, "state" => "used"),
            cached: metrics::gauge!(KV_BLOCKS, "state" => "cached"),
            free: metrics::gauge!(KV_BLOCKS, "state" => "free"),
            preemptions: metrics::counter!(PREEMPTIONS),
            queried: metrics::counter!(CACHE_QUERIED),
            hit: metrics::counter!(CACHE_HIT),
            models: models.iter().enumerate().map(|(engine, (name, _))| aliases(engine, name)).collect(),
        };
        for (engine, (model_name, model)) in models.iter().enumerate() {
            describe_model(engine, model_name, model);
        }
        metrics::gauge!(
            VLLM_LORA,
            "max_lora" => "0",
            "running_lora_adapters" => "",
            "waiting_lora_adapters" => "",
        )
        .set(seconds_since_1970());
        metrics.update(&vec![SchedulerStats::default(); models.len()]);
        metrics
    }

    /// Takes over the schedulers' states, in the order of the models.
    pub fn update(&self, stats: &[SchedulerStats]) {
        for (aliases, stats) in self.models.iter().zip(stats) {
            aliases.waiting.set(f64::from(stats.num_waiting));
            aliases.running.set(f64::from(stats.num_running));
            aliases.kv_usage.set(usage(std::slice::from_ref(stats)));
        }
        let sum = |part: fn(&SchedulerStats) -> u64| stats.iter().map(part).sum::<u64>();
        self.waiting.set(sum(|stats| u64::from(stats.num_waiting)) as f64);
        self.running.set(sum(|stats| u64::from(stats.num_running)) as f64);
        self.kv_usage.set(usage(stats));
        self.used.set(blocks(stats, |group| group.num_used));
        self.cached.set(blocks(stats, |group| group.num_cached));
        self.free.set(blocks(stats, |group| group.num_free));
        self.preemptions.absolute(sum(|stats| stats.num_preemptions));
        self.queried.absolute(sum(|stats| stats.prefix_query_tokens));
        self.hit.absolute(sum(|stats| stats.prefix_hit_tokens));
    }
}

/// Series that are always 1 and say what is served.
fn describe_model(engine: usize, model_name: &str, model: &ModelInfo) {
    // Models that pool keep no blocks.
    if model.num_blocks > 0 {
        metrics::gauge!(
            VLLM_CACHE_CONFIG,
            "engine" => engine.to_string(),
            "block_size" => model.block_size.to_string(),
            "num_gpu_blocks" => model.num_blocks.to_string(),
            "cache_dtype" => model.kv_dtype,
            "enable_prefix_caching" => if model.prefix_cache { "True" } else { "False" },
        )
        .set(1.0);
    }
    metrics::gauge!(
        MODEL_INFO,
        "model_name" => model_name.to_owned(),
        "architecture" => model.architecture.clone(),
        "dtype" => model.weight_format,
        "max_model_len" => model.max_model_len.to_string(),
    )
    .set(1.0);
}

/// Blocks of all groups of all models.
fn blocks(stats: &[SchedulerStats], part: fn(&BlockStats) -> u32) -> f64 {
    stats.iter().flat_map(SchedulerStats::kv_groups).map(|group| u64::from(part(group))).sum::<u64>() as f64
}

/// The share of blocks that are used.
fn usage(stats: &[SchedulerStats]) -> f64 {
    let (used, total) = (blocks(stats, |group| group.num_used), blocks(stats, |group| group.num_total));
    if total > 0.0 { used / total } else { 0.0 }
}

fn seconds_since_1970() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Reads what the kernel says about this process; where there is no such file the gauges stay at zero.
fn read_process(handles: &Handles) {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return };
    let field = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok())
    };
    if let Some(kilobytes) = field("VmRSS:") {
        handles.rss.set((kilobytes * 1024) as f64);
    }
    if let Some(threads) = field("Threads:") {
        handles.threads.set(threads as f64);
    }
    if let Ok(entries) = std::fs::read_dir("/proc/self/fd") {
        // The directory being read is one of them.
        handles.fds.set(entries.count().saturating_sub(1) as f64);
    }
}
