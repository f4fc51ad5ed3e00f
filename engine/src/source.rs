//! Where a model's files come from: a directory, a GGUF file, or the binary itself.

use std::borrow::Cow;
use std::path::PathBuf;

/// A model compiled into the binary: file names and contents, as in a Hugging Face directory.
#[derive(Debug)]
pub struct EmbeddedModel {
    /// The name it is served under.
    pub name: &'static str,
    /// File name and content.
    pub files: &'static [(&'static str, &'static [u8])],
}

/// Where a model's files come from.
#[derive(Clone, Debug)]
pub enum ModelSource {
    /// A Hugging Face directory.
    Directory(PathBuf),
    /// A GGUF file, or the first of those that a model is split into.
    Gguf(PathBuf),
    /// Compiled in.
    Embedded(&'static EmbeddedModel),
}

impl ModelSource {
    /// The whole file, or `None` where the model has no file of this name. Names are plain file names, never paths.
    pub fn read(&self, name: &str) -> std::io::Result<Option<Cow<'static, [u8]>>> {
        match self {
            Self::Embedded(model) => {
                Ok(model.files.iter().find(|(file, _)| *file == name).map(|(_, bytes)| Cow::Borrowed(*bytes)))
            }
            // Holds all that other models have files for.
            Self::Gguf(_) => Ok(None),
            Self::Directory(directory) => match std::fs::read(directory.join(name)) {
                Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            },
        }
    }
}
