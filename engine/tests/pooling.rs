//! Embedders and rerankers against what transformers answers, on every instruction set of this machine; the same bits alone,
//! in a batch and in chunks; queues that have bounds; callers that leave.

use std::path::Path;
use std::time::{Duration, Instant};

use quire_engine::pooling::{ModelKind, PoolingError, PoolingHandle, PoolingInput, PoolingTask, kind_of};
use quire_engine::testing::{Recorder, start_pooling_on_cpu};
use quire_engine::{DTypeChoice, EngineConfig, LoadFormat, ModelSource, OpenedModel, SchedulerSettings, pooling};
use quire_kernels::cpu::Isa;
use serde_json::Value;

/// f32 sums of some hundred terms in another order.
const TOLERANCE: f64 = 1e-4;
const CASES: [&str; 10] = [
    "bert-classify",
    "bert-cls-raw",
    "bert-mean",
    "bert-rerank",
    "qwen3-classify",
    "qwen3-last",
    "qwen3-rerank",
    "xlmr-classify",
    "xlmr-cls",
    "xlmr-rerank",
];

fn source(name: &str) -> ModelSource {
    ModelSource::Directory(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/embedders").join(name))
}

fn expected(name: &str) -> Value {
    let ModelSource::Directory(folder) = source(name) else { unreachable!("a directory") };
    serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap()
}

fn inputs(expected: &Value) -> Vec<PoolingInput> {
    let ids = |list: &Value| list.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    let second = |index: usize| expected["second_from"][index].as_u64().map(|from| from as u32);
    let texts = expected["token_ids"].as_array().unwrap().iter().enumerate();
    texts.map(|(index, list)| PoolingInput { token_ids: ids(list), second_from: second(index) }).collect()
}

/// What transformers answers: vectors, probabilities of labels, or scores as vectors of one number.
fn answers(expected: &Value) -> Vec<Vec<f64>> {
    let numbers = |value: &Value| match value {
        Value::Array(list) => list.iter().map(|number| number.as_f64().unwrap()).collect(),
        number => vec![number.as_f64().unwrap()],
    };
    let key = ["vectors", "probs", "scores"].into_iter().find(|key| expected.get(key).is_some()).unwrap();
    expected[key].as_array().unwrap().iter().map(numbers).collect()
}

fn engine() -> EngineConfig {
    EngineConfig { num_threads: 2, ..EngineConfig::default() }
}

fn settings(max_num_batched_tokens: u32, max_num_seqs: u32) -> SchedulerSettings {
    SchedulerSettings { max_num_batched_tokens, max_num_seqs, ..SchedulerSettings::default() }
}

fn start(name: &str, isa: Isa, settings: &SchedulerSettings) -> PoolingHandle {
    start_pooling_on_cpu(&source(name), isa, &engine(), settings, Box::new(Recorder::default())).unwrap()
}

fn bits(vectors: &[Vec<f32>]) -> Vec<Vec<u32>> {
    vectors.iter().map(|vector| vector.iter().map(|number| number.to_bits()).collect()).collect()
}

#[tokio::test]
async fn vectors_and_scores_are_those_of_transformers_and_the_same_bits_in_any_batch() {
    for isa in Isa::available() {
        let mut worst: f64 = 0.0;
        for name in CASES {
            let expected = expected(name);
            let (inputs, answers) = (inputs(&expected), answers(&expected));
            let together = start(name, isa, &settings(512, 8)).compute(inputs.clone(), None).await.unwrap();
            assert_eq!(together.len(), answers.len());
            for (index, (found, answer)) in together.iter().zip(&answers).enumerate() {
                assert_eq!(found.len(), answer.len());
                for (found, answer) in found.iter().zip(answer) {
                    let error = (f64::from(*found) - answer).abs();
                    assert!(error < TOLERANCE, "{name} on {isa}, text {index}: {found} for {answer}");
                    worst = worst.max(error);
                }
            }
            // Alone, and in batches (or chunks) of other sizes.
            for (tokens, seqs) in [(512, 1), (7, 8), (40, 3)] {
                let handle = start(name, isa, &settings(tokens, seqs));
                let found = handle.compute(inputs.clone(), None).await.unwrap();
                assert_eq!(bits(&found), bits(&together), "{name} on {isa}, batches of {tokens} tokens, {seqs} texts");
            }
        }
        println!("{isa}: f32 deviates by {worst:.2e} at most");
    }
}

#[tokio::test]
async fn requests_side_by_side_get_their_own_answers() {
    let expected = expected("bert-mean");
    let (inputs, answers) = (inputs(&expected), answers(&expected));
    let handle = start("bert-mean", Isa::detect(), &settings(64, 4));
    let asked = (0..40).map(|turn| {
        let (handle, picked) = (handle.clone(), turn % inputs.len());
        let texts = vec![inputs[picked].clone(); 1 + turn % 3];
        tokio::spawn(async move { (picked, handle.compute(texts, None).await.unwrap()) })
    });
    for answer in asked.collect::<Vec<_>>() {
        let (picked, found) = answer.await.unwrap();
        for vector in found {
            let error = vector.iter().zip(&answers[picked]).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
            assert!(error < TOLERANCE, "{picked}: {error}");
        }
    }
    let stats = handle.stats();
    assert_eq!((stats.num_waiting, stats.waiting_tokens), (0, 0));
}

#[tokio::test]
async fn what_cannot_be_computed_is_refused() {
    let handle = start("bert-rerank", Isa::detect(), &settings(512, 8));
    let text = |ids: Vec<u32>, second_from| PoolingInput { token_ids: ids, second_from };
    let max_len = handle.model().max_model_len as usize;
    for input in [
        text(vec![], None),
        text(vec![1; max_len + 1], None),
        text(vec![handle.model().vocab_size], None),
        text(vec![1, 2], Some(3)),
    ] {
        let asked = handle.compute(vec![text(vec![1], None), input], None).await;
        assert!(matches!(asked, Err(PoolingError::Invalid { index: 1, .. })), "{asked:?}");
    }
    assert_eq!(handle.compute(vec![text(vec![1; max_len], Some(2))], None).await.unwrap().len(), 1);
    assert_eq!(handle.compute(Vec::new(), None).await, Ok(Vec::new()));
    let late = handle.compute(vec![text(vec![1], None)], Some(Instant::now() - Duration::from_millis(1))).await;
    assert_eq!(late, Err(PoolingError::DeadlineExceeded));
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back_and_a_caller_that_leaves_makes_room() {
    let settings = SchedulerSettings { max_waiting_tokens: 2000, ..settings(64, 4) };
    let handle = start("bert-mean", Isa::detect(), &settings);
    let texts = |count: usize| vec![PoolingInput { token_ids: vec![5; 60], second_from: None }; count];
    let mut refused = 0;
    let mut waiting = Vec::new();
    for _ in 0..200 {
        let handle = handle.clone();
        let mut asked = Box::pin(async move { handle.compute(texts(10), None).await });
        match futures::poll!(&mut asked) {
            std::task::Poll::Ready(Err(PoolingError::QueueFull { retry_after_micros })) => {
                assert!(retry_after_micros >= 1000);
                refused += 1;
            }
            std::task::Poll::Ready(other) => panic!("{other:?}"),
            std::task::Poll::Pending => waiting.push(asked),
        }
    }
    assert!(refused > 100, "{refused} of 200 requests of 600 tokens were refused");
    // All leave; who comes then is served.
    drop(waiting);
    let answer = loop {
        match handle.compute(texts(1), None).await {
            Err(PoolingError::QueueFull { .. }) => tokio::task::yield_now().await,
            answer => break answer,
        }
    };
    assert_eq!(answer.unwrap().len(), 1);
    handle.shutdown();
    assert_eq!(handle.compute(texts(1), None).await, Err(PoolingError::Stopped));
}

#[test]
fn files_say_what_a_model_is_for() {
    for name in CASES {
        assert_eq!(start(name, Isa::detect(), &settings(512, 8)).model().weight_format, "f32", "{name}");
        assert_eq!(kind_of(&source(name)).unwrap(), ModelKind::Pools, "{name}");
        let handle = start(name, Isa::detect(), &settings(512, 8));
        let labels: Vec<String> = match expected(name).get("labels") {
            Some(labels) => serde_json::from_value(labels.clone()).unwrap(),
            // The head of one that judges is the vocabulary's.
            None if name.ends_with("rerank") && name != "qwen3-rerank" => vec!["LABEL_0".to_owned()],
            None => Vec::new(),
        };
        let (task, num_dimensions) = match name.rsplit_once('-').unwrap().1 {
            "rerank" => (PoolingTask::Score, 1),
            "classify" => (PoolingTask::Classify, labels.len() as u32),
            _ => (PoolingTask::Embed, 32),
        };
        let pooling = handle.pooling();
        assert_eq!(
            (pooling.task, pooling.num_dimensions, &*pooling.labels),
            (task, num_dimensions, &*labels),
            "{name}"
        );
        let opened = OpenedModel::open(&source(name), &engine()).unwrap();
        let need = opened.memory_need(&engine(), &settings(512, 8)).unwrap();
        let weights = handle.model().weight_bytes;
        let is_near = need.weight_bytes >= weights / 2 && need.weight_bytes <= 2 * weights;
        assert!(is_near && need.working_bytes > 0, "{name}: {need:?} for {weights} bytes of weights");
    }
    let chat = ModelSource::Directory(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity/qwen3"));
    assert_eq!(kind_of(&chat).unwrap(), ModelKind::Generates);
}

#[tokio::test]
async fn weights_of_fewer_bits_point_the_same_way() {
    let expected = expected("bert-mean");
    for dtype in [DTypeChoice::Bf16, DTypeChoice::F32] {
        let engine = EngineConfig { dtype, ..engine() };
        let handle = pooling::start(&source("bert-mean"), &engine, &settings(512, 8), Box::new(Recorder::default()), 0);
        let found = handle.unwrap().compute(inputs(&expected), None).await.unwrap();
        for (found, answer) in found.iter().zip(answers(&expected)) {
            let cosine: f64 = found.iter().zip(&answer).map(|(a, b)| f64::from(*a) * b).sum();
            assert!(cosine > 0.999, "{dtype:?}: {cosine}");
        }
    }
    // A shape without its files, to measure.
    let engine = EngineConfig { load_format: LoadFormat::Dummy, ..engine() };
    for name in ["bert-mean", "xlmr-rerank", "qwen3-last", "qwen3-rerank", "qwen3-classify"] {
        let handle = pooling::start(&source(name), &engine, &settings(512, 8), Box::new(Recorder::default()), 0);
        let input = PoolingInput { token_ids: vec![5, 6, 7], second_from: None };
        assert_eq!(handle.unwrap().compute(vec![input], None).await.unwrap().len(), 1, "{name}");
    }
}

#[test]
fn what_is_too_large_is_refused_in_numbers() {
    let settings = settings(512, 8);
    let observer = || Box::new(Recorder::default());
    let refused = pooling::start(&source("bert-mean"), &engine(), &settings, observer(), u64::MAX);
    let error = refused.err().unwrap().to_string();
    assert!(error.contains("bytes, 0 bytes are free"), "{error}");
    // Before anyone looks for a card.
    let on_card = EngineConfig { device: quire_engine::DeviceChoice::Cuda(0), ..engine() };
    let error = pooling::start(&source("bert-mean"), &on_card, &settings, observer(), 0).err().unwrap().to_string();
    assert!(error.contains("encoders have no device code yet") && error.contains("--device cpu"), "{error}");
}
