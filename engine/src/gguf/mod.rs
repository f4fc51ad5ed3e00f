//! GGUF files: a container of metadata and tensors, read as hostile input.
//!
//! [`Container::parse`] checks a file's index; `config` says in the words of `config.json` what its metadata means;
//! `names` gives tensors the names and the order of rows that the models ask for. A model may be split over several
//! files, of which the first is named.

mod config;
mod container;
mod error;
mod metadata;
mod names;
mod split;

pub use container::{Container, MAX_HEADER_BYTES, MAX_INDEX_BYTES, TensorInfo};
pub use error::GgufError;
pub use metadata::{Metadata, Scalar};

pub(crate) use config::{has_interleaved_heads, head_counts};
#[cfg(feature = "testing")]
pub(crate) use names::of_hugging_face;
pub(crate) use names::{ROPE_FACTORS, Rows, halves_apart, hugging_face};
pub use split::stem;
pub(crate) use split::{Part, open_parts};

use std::path::Path;

use config::config_json;

use crate::error::EngineError;
use crate::models::config::ModelConfig;

/// The metadata of a model's file, or of the first of its files.
pub fn read_metadata(path: &Path) -> Result<Metadata, EngineError> {
    Ok(split::open(path)?.container.metadata)
}

/// Everything that is read of a file before its tensors' numbers: the index, and what its metadata says of the model.
/// Fails with what is wrong, whatever the bytes are; never panics.
pub fn check(file: &[u8]) -> Result<(), EngineError> {
    let path = Path::new("file");
    let container = Container::parse(file).map_err(|error| in_file(path, &error))?;
    model_config(path, &[&container])?;
    Ok(())
}

/// The configuration of the model whose first file is `path`, and its JSON.
pub(crate) fn model_config(path: &Path, parts: &[&Container]) -> Result<(ModelConfig, String), EngineError> {
    let has_tensor = |name: &str| parts.iter().flat_map(|part| &part.tensors).any(|tensor| tensor.name == name);
    let json = config_json(&parts[0].metadata, &has_tensor).map_err(|error| in_file(path, &error))?.to_string();
    let config = ModelConfig::parse(json.as_bytes()).map_err(|error| match error {
        EngineError::Unsupported { field, why } => {
            in_file(path, &format!("its metadata, as config.json: {field}: {why}"))
        }
        other => other,
    })?;
    Ok((config, json))
}

/// The name of a file in messages.
fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

/// Says of which file an error is.
pub(crate) fn in_file(path: &Path, error: &impl ToString) -> EngineError {
    EngineError::ModelFile { file: file_name(path), why: error.to_string() }
}

#[cfg(test)]
mod tests;
