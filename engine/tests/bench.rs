//! A model driven without a server: what is counted, and what does not fit.

use std::path::Path;

use quire_engine::bench::ModelBench;
use quire_engine::{EngineConfig, ModelSource, SchedulerSettings};

fn model(name: &str, max_num_seqs: u32, kv_cache_memory: u64) -> ModelBench {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity").join(name);
    let engine = EngineConfig { num_threads: 2, kv_cache_memory, ..EngineConfig::default() };
    let scheduler = SchedulerSettings { max_num_seqs, max_num_batched_tokens: 16, ..SchedulerSettings::default() };
    ModelBench::load(&ModelSource::Directory(directory), &engine, &scheduler).expect("it loads")
}

#[test]
fn a_window_bounds_what_a_step_reads() {
    let mut windowed = model("mistral-window", 2, 1 << 20);
    let mut bytes = |depth| windowed.decode(2, depth, 1).expect("computes").expect("fits").bytes;
    let (short, long, longer) = (bytes(4), bytes(60), bytes(70));
    assert!(short < long, "{short} {long}");
    assert!(longer - long < long - short, "only layers without a window read more: {short} {long} {longer}");

    let mut full = model("llama-gqa1", 2, 0);
    let mut bytes = |batch, depth| full.decode(batch, depth, 1).expect("computes").expect("fits").bytes;
    let for_ten = bytes(1, 30) - bytes(1, 20);
    assert_eq!(bytes(1, 40) - bytes(1, 30), for_ten);
    assert_eq!(bytes(2, 30) - bytes(2, 20), 2 * for_ten);
}

#[test]
fn prompts_longer_than_a_step_are_computed_in_chunks() {
    let mut model = model("llama-gqa1", 2, 0);
    let mut prefill = |len| model.prefill(len, 1).expect("computes").expect("fits");
    let (one, three) = (prefill(16), prefill(40));
    assert_eq!((one.num_tokens, three.num_tokens), (16, 40));
    assert!(three.bytes > 2 * one.bytes, "the layers are read three times: {one:?} {three:?}");
    assert!(three.flops > 2 * one.flops && three.time.as_nanos() > 0);
}

#[test]
fn what_does_not_fit_is_left_out_and_what_follows_still_runs() {
    let mut model = model("llama-gqa1", 3, 1 << 16);
    let room = model.info().num_blocks * model.info().block_size;
    let max_len = model.info().max_model_len;
    assert!(room < 3 * max_len, "the cache holds less than three of the longest: {room} {max_len}");
    assert_eq!(model.decode(4, 1, 1).expect("no failure"), None, "more than max_num_seqs");
    assert_eq!(model.decode(1, max_len, 1).expect("no failure"), None, "no room for a token");
    assert_eq!(model.decode(3, max_len - 8, 1).expect("no failure"), None, "not enough blocks");
    assert!(model.decode(1, max_len - 8, 1).expect("no failure").is_some());
    assert_eq!(model.prefill(max_len + 1, 1).expect("no failure"), None);
    assert!(model.prefill(8, 1).expect("no failure").is_some());
}
