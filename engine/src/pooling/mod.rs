//! Models that answer with a vector, a score or labels of a text: encoders, and decoders that were trained as embedders,
//! rerankers or classifiers.
//!
//! One thread, as in generation, but without a scheduler: a text is computed once and gone. Waiting requests take turns, a
//! text each, until a batch is full; encoders compute whole texts, decoders long ones in chunks. What comes out of a text
//! depends on the text alone, because every operation keeps that promise (see [`quire_kernels::Backend`]).
//!
//! Queue: bounded in tokens; what finds no room is told when to come back. A caller that leaves is noticed before the next
//! batch.

mod batch_loop;
mod decoder;
mod encoder;
mod handle;
mod judge;
mod spec;

pub use handle::{PoolingError, PoolingHandle, PoolingInput};
pub use judge::PairPrompt;
pub use spec::{Pooling, PoolingInfo, PoolingTask};

use quire_kernels::Backend;

use crate::config::{DeviceChoice, EngineConfig, LoadFormat, SchedulerSettings};
use crate::error::EngineError;
use crate::executor::{self, Device};
use crate::handle::ModelInfo;
use crate::memory;
use crate::model_executor::dtype;
use crate::model_files::{DUMMY_SEED, ModelFiles};
use crate::models::encoder::{BatchLimits, EncoderConfig, encoder_architecture};
use crate::observer::StepObserver;
use crate::source::ModelSource;
use crate::weights::{self, Weights};
use spec::Spec;

/// What a model is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelKind {
    /// Generates tokens: [`crate::start`].
    Generates,
    /// Answers with a vector, a score or labels: [`start`].
    Pools,
}

/// What a model's files say it is for: encoders, whatever has a `modules.json` of sentence-transformers, and decoders that
/// judge pairs of texts or have a classification head pool.
pub fn kind_of(source: &ModelSource) -> Result<ModelKind, EngineError> {
    if matches!(source, ModelSource::Gguf(_)) {
        return Ok(ModelKind::Generates);
    }
    let is_encoder = match weights::read_config(source, "config.json")? {
        Some(json) => encoder_architecture(&json)?.is_some(),
        None => false,
    };
    let pools =
        is_encoder || Spec::is_described(source)? || judge::judges(source)? || judge::decoder_labels(source)?.is_some();
    Ok(if pools { ModelKind::Pools } else { ModelKind::Generates })
}

/// Computes vectors, scores or labels of texts.
pub(crate) trait Pooler: Send + 'static {
    /// Of each text, in order: a vector, a score alone, or a number for each label. The texts fit the limits that the batch loop was given.
    fn compute(&mut self, batch: &[&PoolingInput]) -> Result<Vec<Vec<f32>>, EngineError>;
}

/// A model that is ready to pool.
pub(crate) struct Loaded<P> {
    pub pooler: P,
    pub info: ModelInfo,
    pub pooling: PoolingInfo,
    pub limits: BatchLimits,
}

/// Loads a model and starts its thread. Returns when it is ready to serve: all memory is taken. `reserved_bytes` of the free
/// memory are for others.
///
/// Fails with what is wrong with the files, the settings or the device; nothing is left behind then.
pub fn start(
    source: &ModelSource,
    engine: &EngineConfig,
    settings: &SchedulerSettings,
    observer: Box<dyn StepObserver>,
    reserved_bytes: u64,
) -> Result<PoolingHandle, EngineError> {
    start_beside(PoolingFiles::open(source, engine)?, engine, settings, observer, reserved_bytes)
}

/// As [`start`], of files that were opened.
pub fn start_beside(
    files: PoolingFiles,
    engine: &EngineConfig,
    settings: &SchedulerSettings,
    observer: Box<dyn StepObserver>,
    reserved_bytes: u64,
) -> Result<PoolingHandle, EngineError> {
    if matches!((engine.device, &files.parts), (DeviceChoice::Cuda(_), Parts::Encoder(..))) {
        return Err(EngineError::Config {
            field: "engine.device".to_owned(),
            why: "encoders have no device code yet: they are served with --device cpu".to_owned(),
        });
    }
    let (device, note) = executor::open_device(engine)?;
    match device {
        Device::Cpu(backend) => start_on(*backend, files, engine, settings, observer, note, reserved_bytes),
        Device::Cuda(backend) => start_on(*backend, files, engine, settings, observer, note, reserved_bytes),
    }
}

pub(crate) fn start_on<B: Backend>(
    backend: B,
    files: PoolingFiles,
    engine: &EngineConfig,
    settings: &SchedulerSettings,
    observer: Box<dyn StepObserver>,
    device_note: Option<String>,
    reserved_bytes: u64,
) -> Result<PoolingHandle, EngineError> {
    let free = memory::free_memory().saturating_sub(reserved_bytes);
    let PoolingFiles { source, parts } = files;
    let plan = Plan { source: &source, engine, settings, device_note, free_bytes: free };
    match parts {
        Parts::Encoder(config, weights) => {
            let loaded = encoder::EncoderPooler::load(backend, config, &weights, &plan)?;
            drop(weights);
            batch_loop::spawn(loaded, settings, observer)
        }
        Parts::Decoder(files) => {
            batch_loop::spawn(decoder::DecoderPooler::load(backend, files, &plan)?, settings, observer)
        }
    }
}

/// What a model that pools is made of: files that are open, of which nothing but headers was read.
pub struct PoolingFiles {
    source: ModelSource,
    parts: Parts,
}

enum Parts {
    Encoder(EncoderConfig, Weights),
    Decoder(ModelFiles),
}

impl PoolingFiles {
    /// Opens and checks them.
    pub fn open(source: &ModelSource, engine: &EngineConfig) -> Result<Self, EngineError> {
        let json = match source {
            ModelSource::Gguf(_) => None,
            source => weights::read_config(source, "config.json")?,
        };
        let parts = match json {
            Some(json) if encoder_architecture(&json)?.is_some() => {
                let config = EncoderConfig::parse(&json)?;
                let weights = match engine.load_format {
                    LoadFormat::Auto => Weights::open(source, &json)?,
                    LoadFormat::Dummy => Weights::dummy(DUMMY_SEED, dtype(engine.dtype, config.dtype), &json),
                };
                Parts::Encoder(config, weights)
            }
            _ => Parts::Decoder(ModelFiles::open(source, engine)?),
        };
        Ok(Self { source: source.clone(), parts })
    }

    /// Bytes that the model takes: of its weights, and of all else.
    pub(crate) fn expected_bytes<B: Backend>(
        &self,
        backend: &B,
        engine: &EngineConfig,
        settings: &SchedulerSettings,
    ) -> Result<(u64, u64), EngineError> {
        let plan = Plan { source: &self.source, engine, settings, device_note: None, free_bytes: u64::MAX };
        match &self.parts {
            Parts::Encoder(config, weights) => encoder::expected_bytes(backend, config, weights, &plan),
            Parts::Decoder(files) => decoder::expected_bytes(backend, files, &plan),
        }
    }
}

/// What a model is loaded by.
pub(crate) struct Plan<'a> {
    pub source: &'a ModelSource,
    pub engine: &'a EngineConfig,
    pub settings: &'a SchedulerSettings,
    pub device_note: Option<String>,
    /// What the host has left for it.
    pub free_bytes: u64,
}

impl Plan<'_> {
    /// The length that is served: the model's, cut to what its makers or the operator say. The operator's is for all models of a
    /// server, of which this one may be the shortest.
    pub(crate) fn max_len(&self, own: usize, spec: &Spec) -> usize {
        let limits = [spec.max_len.unwrap_or(u32::MAX), self.settings.max_model_len];
        limits.into_iter().filter(|limit| *limit > 0).fold(own, |len, limit| len.min(limit as usize))
    }

    /// Batches of so many tokens, or a whole text where that is longer.
    pub(crate) fn batch_limits(&self, longest: usize) -> BatchLimits {
        BatchLimits {
            num_tokens: (self.settings.max_num_batched_tokens as usize).max(longest),
            num_seqs: self.settings.max_num_seqs.max(1) as usize,
        }
    }

    /// Refuses what is more than the host has left, in numbers.
    pub(crate) fn check_fits(&self, what: &str, bytes: u64) -> Result<(), EngineError> {
        if bytes <= self.free_bytes {
            return Ok(());
        }
        let why = format!("{what} take {bytes} bytes, {} bytes are free", self.free_bytes);
        Err(EngineError::Config { field: "scheduler.max_num_batched_tokens".to_owned(), why })
    }
}

/// Makes a vector as long as 1; one of zeros stays.
pub(crate) fn normalize(vector: &mut [f32]) {
    let squares: f64 = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    // sentence-transformers' own least length.
    let length = squares.sqrt().max(1e-12);
    vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
}
