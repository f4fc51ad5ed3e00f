//! What `/metrics` shows: every metric described, there from the start, and in a form that Prometheus takes.

use quire_engine::scheduler::SchedulerStats;
use quire_engine::{DeviceInfo, ModelInfo};
use quire_router::metrics::{Endpoint, ModelMetrics, Outcome, RequestMetrics, StepMetrics, catalogue, install, render};

fn model() -> ModelInfo {
    ModelInfo {
        architecture: "LlamaForCausalLM".to_owned(),
        vocab_size: 32,
        max_model_len: 128,
        digest: [0; 32],
        eos_token_ids: vec![2],
        num_parameters: 1,
        weight_bytes: 1,
        kv_cache_bytes: 1,
        device_memory: None,
        weight_format: "f32",
        dtype: "f32",
        kv_dtype: "int8",
        device: DeviceInfo { kind: "cpu", name: String::new(), isa: String::new(), num_units: 1 },
        device_note: None,
        block_size: 16,
        num_blocks: 8,
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        prefix_cache: true,
        kv_events: false,
    }
}

/// Splits a sample line into its name and value, and fails on anything that Prometheus would not take.
fn sample(line: &str) -> (&str, f64) {
    let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no value: {line}"));
    let name = series.split('{').next().unwrap_or(series);
    assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':'), "name: {line}");
    if let Some(labels) = series.strip_prefix(name).filter(|rest| !rest.is_empty()) {
        assert!(labels.starts_with('{') && labels.ends_with('}'), "labels: {line}");
        let quotes = labels.replace(r"\\", "").replace("\\\"", "").matches('"').count();
        assert_eq!(quotes % 2, 0, "quotes: {line}");
    }
    (name, value.parse().unwrap_or_else(|_| panic!("value: {line}")))
}

// One test, and a process of its own, because the recorder is the process's.
#[test]
fn every_metric_is_described_and_there_from_the_start() {
    install().unwrap();
    install().unwrap();
    let _steps = StepMetrics::new();
    let model_metrics = ModelMetrics::new(&[("hostile\"name\n\\", &model())]);
    let text = render();
    for (name, kind, help) in catalogue() {
        assert!(text.contains(&format!("# HELP {name} {help}\n")), "{name} has no help");
        assert!(text.contains(&format!("# TYPE {name} {kind}\n")), "{name} has no type");
        let series = |line: &&str| line.starts_with(name) && !line.starts_with('#');
        assert!(text.lines().any(|line| series(&line)), "{name} has no series");
    }
    let known: Vec<_> = catalogue().map(|(name, ..)| name).collect();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (name, _) = sample(line);
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        assert!(known.contains(&name) || base.is_some_and(|base| known.contains(&base)), "unlisted: {name}");
    }

    let value = |text: &str, series: &str| {
        text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse::<f64>().ok())
    };
    let mut request = RequestMetrics::start(Endpoint::Chat);
    request.scheduled();
    request.scheduled();
    request.prompt_tokens(7, 3);
    // Two choices: the time between their tokens is none of either's.
    request.token(0);
    request.token(1);
    request.token(0);
    request.finish(Outcome::Finished);
    drop(RequestMetrics::start(Endpoint::GrpcChat));
    let mut stats = SchedulerStats { num_waiting: 2, num_running: 3, num_kv_groups: 1, ..Default::default() };
    stats.blocks[0].num_total = 8;
    stats.blocks[0].num_used = 4;
    model_metrics.update(&[stats]);
    let text = render();
    let chat = "quire_requests_total{endpoint=\"chat\",outcome=\"finished\"}";
    let left = "quire_requests_total{endpoint=\"grpc_chat\",outcome=\"cancelled\"}";
    for (series, expected) in [
        (chat, 1.0),
        (left, 1.0),
        ("quire_prompt_tokens_total", 7.0),
        ("quire_generation_tokens_total", 3.0),
        ("quire_requests_in_flight", 0.0),
        ("quire_requests_waiting", 2.0),
        ("quire_kv_cache_usage_ratio", 0.5),
        ("quire_time_to_first_token_seconds_count", 1.0),
        ("quire_inter_token_latency_seconds_count", 1.0),
        ("quire_time_per_output_token_seconds_count", 1.0),
        ("quire_queue_seconds_count", 1.0),
    ] {
        assert_eq!(value(&text, series), Some(expected), "{series}");
    }
    assert!(text.contains("vllm:num_requests_running{model_name=\"hostile\\\"name\\n"), "labels are not escaped");
}
