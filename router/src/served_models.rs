//! The models of one server, and which of them a request is for.

use std::sync::Arc;
use std::time::Duration;

use quire_engine::EngineHealth;
use quire_engine::pooling::{PoolingHandle, PoolingTask};
use quire_engine::scheduler::SchedulerStats;

use crate::error::ApiError;
use crate::generation::invalid;
use crate::lifecycle::StepPace;
use crate::served_model::ServedModel;
use crate::worker::Worker;

/// What a request wants of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// What every model does: tokens of a text, and facts about itself.
    Any,
    /// Text.
    Generate,
    /// A vector of a text.
    Embed,
    /// How near two texts are: a reranker's score, or the cosine of an embedder's vectors.
    Score,
    /// How likely each label is for a text.
    Classify,
    /// A vector or labels, whichever it is.
    Pool,
}

/// What runs a model's requests.
#[derive(Clone)]
pub enum Runner {
    Generates(Arc<dyn Worker>),
    Pools(PoolingHandle),
}

/// One model of the server.
pub struct Served {
    pub model: Arc<ServedModel>,
    pub runner: Runner,
    /// How long its steps take.
    pub pace: Arc<StepPace>,
}

impl Served {
    fn does(&self, task: Task) -> bool {
        match (task, &self.runner) {
            (Task::Any, _) | (Task::Generate, Runner::Generates(_)) => true,
            (Task::Embed, Runner::Pools(engine)) => engine.pooling().task == PoolingTask::Embed,
            (Task::Score, Runner::Pools(engine)) => engine.pooling().task != PoolingTask::Classify,
            (Task::Classify, Runner::Pools(engine)) => !engine.pooling().labels.is_empty(),
            (Task::Pool, Runner::Pools(_)) => self.does(Task::Embed) || self.does(Task::Classify),
            (Task::Generate, Runner::Pools(_)) | (_, Runner::Generates(_)) => false,
        }
    }

    /// Counters as of its last step.
    pub fn stats(&self) -> SchedulerStats {
        match &self.runner {
            Runner::Generates(worker) => worker.stats(),
            Runner::Pools(engine) => engine.stats(),
        }
    }

    /// What its step clock says, where a step may take `limit`, or less by the pace of late.
    pub fn health(&self, limit: Duration, by_pace: ByPace) -> EngineHealth {
        let stall_after = match by_pace {
            ByPace::Yes => self.pace.stall_after(limit),
            ByPace::No => limit,
        };
        match &self.runner {
            Runner::Generates(worker) => worker.health(stall_after),
            Runner::Pools(engine) => engine.health(stall_after),
        }
    }
}

/// Whether steps of late say how long one may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByPace {
    No,
    Yes,
}

/// All models of the server, at least one, in the order in which they were named. Names are unique.
pub struct ServedModels {
    models: Vec<Served>,
}

impl ServedModels {
    /// # Panics
    /// Where there is none.
    pub fn new(models: Vec<Served>) -> Self {
        assert!(!models.is_empty(), "a server has a model");
        Self { models }
    }

    /// A server of one model that generates.
    pub fn one(model: ServedModel, worker: Arc<dyn Worker>) -> Self {
        let pace = Arc::default();
        Self::new(vec![Served { model: Arc::new(model), runner: Runner::Generates(worker), pace }])
    }

    pub fn iter(&self) -> impl Iterator<Item = &Served> {
        self.models.iter()
    }

    pub(crate) fn get(&self, index: usize) -> &Served {
        &self.models[index]
    }

    /// The place of the model that a request is for: the one that it names, or the first that does what it wants. Fails where
    /// there is none of that name, or it does something else.
    pub(crate) fn find(&self, name: Option<&str>, task: Task) -> Result<usize, ApiError> {
        let Some(name) = name else {
            return self.models.iter().position(|served| served.does(task)).ok_or_else(|| invalid("model", none(task)));
        };
        let named = self.models.iter().position(|served| served.model.name() == name);
        let index = named.ok_or_else(|| ApiError::ModelNotFound { model: printable(name) })?;
        if self.models[index].does(task) { Ok(index) } else { Err(invalid("model", other(task))) }
    }
}

fn none(task: Task) -> &'static str {
    match task {
        Task::Any | Task::Generate => "is needed: no model of this server generates text",
        Task::Embed => "is needed: no model of this server makes embeddings",
        Task::Score => "is needed: no model of this server scores texts",
        Task::Classify => "is needed: no model of this server classifies texts",
        Task::Pool => "is needed: no model of this server makes embeddings or classifies texts",
    }
}

fn other(task: Task) -> &'static str {
    match task {
        Task::Any | Task::Generate => "names a model that does not generate text",
        Task::Embed => "names a model that does not make embeddings",
        Task::Score => "names a model that does not score texts",
        Task::Classify => "names a model that does not classify texts: it has no classification head",
        Task::Pool => "names a model that neither makes embeddings nor classifies texts",
    }
}

/// A name that a client made up, short and without control characters, to be repeated to that client.
fn printable(name: &str) -> String {
    name.chars().take(128).map(|character| if character.is_control() { '?' } else { character }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_repeated_without_control_characters() {
        assert_eq!(printable("gpt\n\u{1b}[0m"), "gpt??[0m");
        assert_eq!(printable(&"x".repeat(1000)).len(), 128);
    }
}
