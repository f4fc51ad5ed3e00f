//! The served forward pass against what transformers answers, over every instruction set of this machine.
//!
//! Norm: the largest absolute error of a prompt's logits over the largest absolute logit of the reference.

use std::path::{Path, PathBuf};

use quire_engine::testing::{Recorder, prompt_logits, read_all, start_on_cpu, submission};
use quire_engine::{DTypeChoice, EngineConfig, ModelSource, SchedulerSettings};
use quire_kernels::cpu::Isa;
use safetensors::{Dtype, SafeTensors};

/// f32 sums of some hundred terms in another order.
const F32_TOLERANCE: f64 = 1e-4;
/// Weights, activations before each product and the cache are rounded to 8 bits; what rounding does to a tiny model is
/// measured by transformers itself, whose own bf16 deviates as much.
const BF16_TOLERANCE: f64 = 0.05;
const NUM_THREADS: usize = 2;

struct Prompt {
    tokens: Vec<u32>,
    logits: Vec<f32>,
    logits_bf16: Vec<f32>,
    greedy: Vec<u32>,
}

struct Case {
    name: String,
    source: ModelSource,
    prompts: Vec<Prompt>,
}

fn cases() -> Vec<Case> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity");
    let mut folders: Vec<PathBuf> = std::fs::read_dir(&root)
        .unwrap_or_else(|error| panic!("{}: {error}", root.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("expected.safetensors").exists())
        .collect();
    folders.sort();
    assert!(folders.len() >= 17, "{} cases", folders.len());
    folders.into_iter().map(|folder| Case::read(&folder)).collect()
}

impl Case {
    fn read(folder: &Path) -> Self {
        let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let words = |name: String, dtype| -> Vec<u32> {
            let tensor = tensors.tensor(&name).unwrap();
            assert_eq!(tensor.dtype(), dtype);
            tensor.data().chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
        };
        let floats = |name: String| words(name, Dtype::F32).into_iter().map(f32::from_bits).collect();
        let prompts = (0..2).map(|i| Prompt {
            tokens: words(format!("prompt_{i}.tokens"), Dtype::I32),
            logits: floats(format!("prompt_{i}.logits")),
            logits_bf16: floats(format!("prompt_{i}.logits_bf16")),
            greedy: words(format!("prompt_{i}.greedy"), Dtype::I32),
        });
        Self {
            name: folder.file_name().unwrap().to_string_lossy().into_owned(),
            source: ModelSource::Directory(folder.to_owned()),
            prompts: prompts.collect(),
        }
    }

    fn tokens(&self) -> Vec<Vec<u32>> {
        self.prompts.iter().map(|prompt| prompt.tokens.clone()).collect()
    }
}

fn config(dtype: DTypeChoice) -> EngineConfig {
    EngineConfig { dtype, num_threads: NUM_THREADS, kv_cache_memory: 8 << 20, ..EngineConfig::default() }
}

fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0f64, |largest, value| largest.max(f64::from(value.abs())));
    let errors = found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs());
    errors.fold(0.0, |worst: f64, error| if error.is_nan() { f64::INFINITY } else { worst.max(error) }) / largest
}

#[test]
fn f32_prefill_is_that_of_transformers() {
    for isa in Isa::available() {
        let mut worst: f64 = 0.0;
        for case in cases() {
            let found = prompt_logits(&case.source, isa, &config(DTypeChoice::F32), &case.tokens(), 256).unwrap();
            for (i, (found, prompt)) in found.iter().zip(&case.prompts).enumerate() {
                let error = relative_error(found, &prompt.logits);
                assert!(error < F32_TOLERANCE, "{} prompt {i} on {isa}: {error:.2e}", case.name);
                worst = worst.max(error);
            }
        }
        println!("{isa}: f32 deviates by {worst:.2e} at most");
    }
}

#[test]
fn bf16_prefill_is_as_near_as_that_of_transformers() {
    for isa in Isa::available() {
        let (mut worst, mut worst_reference): (f64, f64) = (0.0, 0.0);
        for case in cases() {
            let found = prompt_logits(&case.source, isa, &config(DTypeChoice::Bf16), &case.tokens(), 256).unwrap();
            for (i, (found, prompt)) in found.iter().zip(&case.prompts).enumerate() {
                let error = relative_error(found, &prompt.logits);
                let reference = relative_error(&prompt.logits_bf16, &prompt.logits);
                assert!(error < BF16_TOLERANCE, "{} prompt {i} on {isa}: {error:.2e}", case.name);
                worst = worst.max(error);
                worst_reference = worst_reference.max(reference);
            }
        }
        println!("{isa}: bf16 deviates by {worst:.2e} at most, transformers' own by {worst_reference:.2e}");
        assert!(worst < 1.5 * worst_reference, "{isa}");
    }
}

#[test]
fn a_chunked_prefill_has_the_same_bits() {
    for isa in Isa::available() {
        for case in cases() {
            for dtype in [DTypeChoice::F32, DTypeChoice::Bf16] {
                let logits =
                    |chunk_len| prompt_logits(&case.source, isa, &config(dtype), &case.tokens(), chunk_len).unwrap();
                let whole = logits(256);
                for chunk_len in [1, 7, 16, 33] {
                    let same = whole
                        .iter()
                        .flatten()
                        .zip(logits(chunk_len).iter().flatten().copied().collect::<Vec<_>>())
                        .all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{} on {isa}, {dtype:?}, chunks of {chunk_len}", case.name);
                }
            }
        }
    }
}

#[tokio::test]
async fn greedy_tokens_are_those_of_transformers() {
    for isa in Isa::available() {
        for case in cases() {
            let settings =
                SchedulerSettings { max_num_seqs: 4, max_num_batched_tokens: 48, ..SchedulerSettings::default() };
            let engine = config(DTypeChoice::F32);
            let handle = start_on_cpu(&case.source, isa, &engine, &settings, Box::new(Recorder::default())).unwrap();
            let mut streams = Vec::new();
            for prompt in &case.prompts {
                let request = submission(&prompt.tokens, prompt.greedy.len() as u32);
                streams.push(handle.submit(request).await.unwrap());
            }
            for (i, (stream, prompt)) in streams.iter_mut().zip(&case.prompts).enumerate() {
                let outcome = read_all(stream).await;
                assert_eq!(outcome[0].tokens, prompt.greedy, "{} prompt {i} on {isa}", case.name);
            }
        }
    }
}
