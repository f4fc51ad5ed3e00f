//! A model whose files were opened once: for what it will take, and for what it is loaded from.

use crate::config::EngineConfig;
use crate::error::EngineError;
use crate::model_files::ModelFiles;
use crate::pooling::{self, ModelKind, PoolingFiles};
use crate::source::ModelSource;

/// A model of either kind, of which nothing but headers was read.
pub enum OpenedModel {
    /// For [`crate::start_beside`].
    Generates(ModelFiles),
    /// For [`pooling::start_beside`].
    Pools(PoolingFiles),
}

impl OpenedModel {
    /// Opens and checks a model's files.
    pub fn open(source: &ModelSource, engine: &EngineConfig) -> Result<Self, EngineError> {
        match pooling::kind_of(source)? {
            ModelKind::Generates => ModelFiles::open(source, engine).map(Self::Generates),
            ModelKind::Pools => PoolingFiles::open(source, engine).map(Self::Pools),
        }
    }
}
