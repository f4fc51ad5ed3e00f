//! A model's files, whatever they are: its configuration, its weights, and which tokens end a generation.

use std::path::Path;

use crate::config::{EngineConfig, LoadFormat};
use crate::error::EngineError;
use crate::gguf;
use crate::model_executor::dtype;
use crate::models::config::{ModelConfig, generation_eos};
use crate::models::decoder::EMBEDDING;
use crate::source::ModelSource;
use crate::weights::{self, Weights};

/// Of dummy weights.
pub(crate) const DUMMY_SEED: u64 = 0;
/// Where a decoder's tensors are, beside those of its head.
const BASE: &str = "model.";

/// What a model is made of: files that are open, of which nothing but headers was read.
pub struct ModelFiles {
    pub(crate) config: ModelConfig,
    pub(crate) weights: Weights,
    pub(crate) eos_token_ids: Vec<u32>,
}

impl ModelFiles {
    /// Opens and checks them. Nothing but headers is read yet.
    pub(crate) fn open(source: &ModelSource, engine: &EngineConfig) -> Result<Self, EngineError> {
        match source {
            ModelSource::Gguf(path) => Self::open_gguf(path, engine),
            ModelSource::Directory(_) | ModelSource::Embedded(_) => Self::open_hugging_face(source, engine),
        }
    }

    fn open_hugging_face(source: &ModelSource, engine: &EngineConfig) -> Result<Self, EngineError> {
        let config_json = weights::read_config(source, "config.json")?
            .ok_or_else(|| EngineError::ModelFile { file: "config.json".to_owned(), why: "is missing".to_owned() })?;
        let config = ModelConfig::parse(&config_json)?;
        let mut weights = match engine.load_format {
            LoadFormat::Auto => Weights::open(source, &config_json)?,
            LoadFormat::Dummy => Weights::dummy(DUMMY_SEED, dtype(engine.dtype, config.dtype), &config_json),
        };
        if !weights.contains(EMBEDDING) && EMBEDDING.strip_prefix(BASE).is_some_and(|name| weights.contains(name)) {
            weights.put_below(BASE);
        }
        let mut eos_token_ids = match weights::read_config(source, "generation_config.json")? {
            Some(json) => generation_eos(&json)?,
            None => Vec::new(),
        };
        for id in &config.eos_token_ids {
            if !eos_token_ids.contains(id) {
                eos_token_ids.push(*id);
            }
        }
        Ok(Self { config, weights, eos_token_ids })
    }

    fn open_gguf(path: &Path, engine: &EngineConfig) -> Result<Self, EngineError> {
        let parts = gguf::open_parts(path)?;
        let containers: Vec<&gguf::Container> = parts.iter().map(|part| &part.container).collect();
        let (mut config, json) = gguf::model_config(path, &containers)?;
        let weights = match engine.load_format {
            LoadFormat::Auto => Weights::of_gguf(parts)?,
            LoadFormat::Dummy => Weights::dummy(DUMMY_SEED, dtype(engine.dtype, None), json.as_bytes()),
        };
        if weights.contains(gguf::ROPE_FACTORS) {
            let factors = weights.vector(gguf::ROPE_FACTORS, config.facts.head_dim / 2)?.to_f32();
            config
                .rope
                .divide_frequencies(&factors)
                .map_err(|why| EngineError::Tensor { name: gguf::ROPE_FACTORS.to_owned(), why: why.to_owned() })?;
        }
        let eos_token_ids = config.eos_token_ids.clone();
        Ok(Self { config, weights, eos_token_ids })
    }
}
