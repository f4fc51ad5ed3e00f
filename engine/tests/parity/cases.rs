//! Models, prompts, and what transformers answered.

use std::path::{Path, PathBuf};

use quire_engine::{DTypeChoice, EngineConfig, ModelSource};
use safetensors::{Dtype, SafeTensors};

const NUM_THREADS: usize = 2;

pub(crate) struct Prompt {
    pub(crate) tokens: Vec<u32>,
    pub(crate) logits: Vec<f32>,
    pub(crate) logits_bf16: Vec<f32>,
    pub(crate) greedy: Vec<u32>,
}

pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) source: ModelSource,
    pub(crate) prompts: Vec<Prompt>,
}

pub(crate) fn cases() -> Vec<Case> {
    // Of the crate's folder, which tests run in: wherever that is on the machine that they run on.
    let root = Path::new("../tests/fixtures/parity");
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root)
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

    pub(crate) fn tokens(&self) -> Vec<Vec<u32>> {
        self.prompts.iter().map(|prompt| prompt.tokens.clone()).collect()
    }
}

pub(crate) fn config(dtype: DTypeChoice) -> EngineConfig {
    EngineConfig { dtype, num_threads: NUM_THREADS, kv_cache_memory: 8 << 20, ..EngineConfig::default() }
}

pub(crate) fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0f64, |largest, value| largest.max(f64::from(value.abs())));
    let errors = found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs());
    errors.fold(0.0, |worst: f64, error| if error.is_nan() { f64::INFINITY } else { worst.max(error) }) / largest
}
