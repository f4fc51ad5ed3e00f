//! What is served: one decoder, and the facts of each architecture that uses it; one encoder.

pub(crate) mod config;
pub(crate) mod decoder;
pub(crate) mod encoder;
pub(crate) mod labels;
mod llama;
pub(crate) mod loader;
mod mistral;
mod qwen2;
mod qwen3;
pub(crate) mod rope;

use config::{Facts, Fields, Shape};

use crate::error::EngineError;

/// Reads an architecture's facts from its configuration.
type FactsOf = fn(&Fields<'_>, &Shape) -> Result<Facts, EngineError>;

/// Every architecture that is served, by the name that `config.json` has for it.
const ARCHITECTURES: [(&str, FactsOf); 4] = [
    (llama::NAME, llama::facts),
    (mistral::NAME, mistral::facts),
    (qwen2::NAME, qwen2::facts),
    (qwen3::NAME, qwen3::facts),
];
