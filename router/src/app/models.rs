//! Finding the models that are to be served, planning their memory, and loading them one after another.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quire_engine::pooling::{self, PoolingHandle, PoolingInfo, PoolingTask};
use quire_engine::{
    DeviceChoice, EngineHandle, MemoryNeed, ModelInfo, ModelSource, OpenedModel, StepObserver, StepReport, free_memory,
};

use super::AppError;
use crate::config::{Config, Environment};
use crate::lifecycle::StepPace;
use crate::metrics::StepMetrics;
use crate::served_model::{ServedModel, TextSide};
use crate::served_models::{Runner, Served, ServedModels};
use crate::worker::LocalWorker;
use crate::{demo, gguf, hub};

/// Where a path is asked for: the model that is compiled in.
const DEMO: &str = "demo";

/// What runs a model.
pub(super) enum Engine {
    Generates(EngineHandle),
    Pools(PoolingHandle),
}

impl Engine {
    fn model(&self) -> &ModelInfo {
        match self {
            Self::Generates(engine) => engine.model(),
            Self::Pools(engine) => engine.model(),
        }
    }

    /// Why it stopped, where that was not asked for.
    pub(super) fn failure(&self) -> Option<String> {
        match self {
            Self::Generates(engine) => engine.failure(),
            Self::Pools(engine) => engine.failure(),
        }
    }

    pub(super) fn shutdown(&self) {
        match self {
            Self::Generates(engine) => engine.shutdown(),
            Self::Pools(engine) => engine.shutdown(),
        }
    }

    fn runner(&self) -> Runner {
        match self {
            Self::Generates(engine) => Runner::Generates(Arc::new(LocalWorker::new(engine.clone()))),
            Self::Pools(engine) => Runner::Pools(engine.clone()),
        }
    }
}

/// Feeds metrics and the step clock.
struct Observer {
    metrics: StepMetrics,
    pace: Arc<StepPace>,
}

impl StepObserver for Observer {
    fn step(&mut self, report: &StepReport) {
        self.pace.observe(report.execute);
        self.metrics.step(report);
    }

    fn cancel_to_free(&mut self, elapsed: Duration) {
        self.metrics.cancel_to_free(elapsed);
    }
}

/// Where a model's files are, and the name that it is served under.
struct Found {
    name: String,
    source: ModelSource,
}

impl Found {
    fn refused(&self, why: &dyn std::fmt::Display) -> AppError {
        AppError::Model(format!("cannot serve {}: {why}", self.name))
    }
}

/// Finds the models' files, starts their engines and reads their text sides. Takes its time: for a thread of its own.
pub(super) fn load(config: &Config, environment: &Environment) -> Result<(Vec<Engine>, ServedModels), AppError> {
    let found = find_all(config, environment)?;
    let open = |found: &Found| OpenedModel::open(&found.source, &config.engine).map_err(|error| found.refused(&error));
    let opened: Vec<OpenedModel> = found.iter().map(open).collect::<Result<_, _>>()?;
    let needs = plan_memory(&found, &opened, config)?;
    let (mut engines, mut models) = (Vec::new(), Vec::new());
    for (index, (found, opened)) in found.iter().zip(opened).enumerate() {
        let reserved = needs.get(index + 1..).unwrap_or_default().iter().map(MemoryNeed::total_bytes).sum();
        let (engine, model) = load_one(found, opened, config, environment, reserved)?;
        engines.push(engine);
        models.push(model);
    }
    Ok((engines, ServedModels::new(models)))
}

/// The model of `model.path` where it is set, then those of `model.named`; the demo model where neither is.
fn find_all(config: &Config, environment: &Environment) -> Result<Vec<Found>, AppError> {
    let mut found = Vec::new();
    if config.model.path.is_some() || config.model.named.is_empty() {
        let (source, own_name) = find(config, environment)?;
        found.push(Found { name: config.server.model_name.clone().unwrap_or(own_name), source });
    }
    for named in &config.model.named {
        // `validate` saw that each has a name and a path.
        let (name, path) = named.split_once('=').unwrap_or((named, ""));
        found.push(Found { name: name.to_owned(), source: find_at(path, config, environment)?.0 });
    }
    for (index, Found { name, .. }) in found.iter().enumerate() {
        if found[..index].iter().any(|other| other.name == *name) {
            return Err(AppError::Model(format!("two models are named {name}: give one another name")));
        }
    }
    Ok(found)
}

/// What each of several models will take. Refuses what is more than there is, in numbers, before any is loaded. One model alone
/// plans for itself.
fn plan_memory(found: &[Found], opened: &[OpenedModel], config: &Config) -> Result<Vec<MemoryNeed>, AppError> {
    if found.len() < 2 {
        return Ok(Vec::new());
    }
    if matches!(config.engine.device, DeviceChoice::Cuda(_)) {
        let why = "several models in one server are computed on the CPU so far: --device cpu";
        return Err(AppError::Model(why.to_owned()));
    }
    let need = |(found, opened): (&Found, &OpenedModel)| {
        opened.memory_need(&config.engine, &config.scheduler).map_err(|error| found.refused(&error))
    };
    let needs: Vec<MemoryNeed> = found.iter().zip(opened).map(need).collect::<Result<_, _>>()?;
    check_fits(found.iter().map(|found| found.name.as_str()).zip(&needs), free_memory())?;
    Ok(needs)
}

fn check_fits<'a>(needs: impl Iterator<Item = (&'a str, &'a MemoryNeed)> + Clone, free: u64) -> Result<(), AppError> {
    let total: u64 = needs.clone().map(|(_, need)| need.total_bytes()).sum();
    if total <= free {
        return Ok(());
    }
    let mebibytes = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let parts: Vec<String> = needs
        .map(|(name, need)| {
            let MemoryNeed { weight_bytes, cache_bytes, working_bytes } = need;
            let [weights, cache, working] = [weight_bytes, cache_bytes, working_bytes].map(|bytes| mebibytes(*bytes));
            format!("{name} takes {weights} for weights, {cache} for its cache and {working} beside")
        })
        .collect();
    Err(AppError::Model(format!(
        "the models do not fit: {}; that is {} together, and {} are free",
        parts.join(", "),
        mebibytes(total),
        mebibytes(free)
    )))
}

fn load_one(
    found: &Found,
    opened: OpenedModel,
    config: &Config,
    environment: &Environment,
    reserved_bytes: u64,
) -> Result<(Engine, Served), AppError> {
    let Found { name, source } = found;
    let start = Instant::now();
    let pace = Arc::<StepPace>::default();
    let observer = Box::new(Observer { metrics: StepMetrics::new(), pace: Arc::clone(&pace) });
    // A large vocabulary takes as long to read as the weights of a small model: both at once.
    let (engine, text) = std::thread::scope(|scope| {
        let text = scope.spawn(|| {
            let text = TextSide::load(source, &config.limits);
            tracing::debug!(seconds = start.elapsed().as_secs_f64(), "read the tokenizer");
            text
        });
        let settings = config.engine_for(environment);
        let engine = match opened {
            OpenedModel::Generates(files) => {
                quire_engine::start_beside(files, &settings, &config.scheduler, observer, reserved_bytes)
                    .map(Engine::Generates)
            }
            OpenedModel::Pools(files) => {
                pooling::start_beside(files, &settings, &config.scheduler, observer, reserved_bytes).map(Engine::Pools)
            }
        };
        tracing::debug!(seconds = start.elapsed().as_secs_f64(), "loaded the weights and took all memory");
        (engine, text.join())
    });
    let engine = engine.map_err(|error| found.refused(&error))?;
    let text = text
        .map_err(|_| AppError::Model("reading the tokenizer failed".to_owned()))?
        .map_err(|error| AppError::Model(format!("cannot serve the model: {error}")))?;
    let model = ServedModel::new(text, name.clone(), engine.model())
        .speaking(config.model.tool_parser, config.model.reasoning_parser);
    say_what_is_served(source, model.name(), &engine, start.elapsed());
    let served = Served { model: Arc::new(model), runner: engine.runner(), pace };
    Ok((engine, served))
}

/// The model of `model.path`, or the one that is compiled in; and the name that it goes by.
pub(crate) fn find(config: &Config, environment: &Environment) -> Result<(ModelSource, String), AppError> {
    match &config.model.path {
        Some(wanted) => find_at(wanted, config, environment),
        None => Ok((ModelSource::Embedded(&demo::MODEL), demo::MODEL.name.to_owned())),
    }
}

/// A directory, a GGUF file, a name to be pulled, or `demo`; and the name that it goes by.
fn find_at(wanted: &str, config: &Config, environment: &Environment) -> Result<(ModelSource, String), AppError> {
    let path = Path::new(wanted);
    if path.is_dir() {
        let name = path.canonicalize().ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
        return Ok((ModelSource::Directory(path.to_owned()), name.unwrap_or_else(|| "model".to_owned())));
    }
    if path.exists() {
        let metadata = quire_engine::gguf::read_metadata(path)
            .map_err(|error| AppError::Model(format!("cannot serve {wanted}: {error}")))?;
        return Ok((ModelSource::Gguf(path.to_owned()), gguf::model_name(&metadata, path)));
    }
    if wanted == DEMO {
        return Ok((ModelSource::Embedded(&demo::MODEL), demo::MODEL.name.to_owned()));
    }
    let Some(name) = hub::ModelName::parse(wanted) else {
        return Err(AppError::Model(format!(
            "{wanted} is neither a directory, nor a file, nor a hub name such as owner/name"
        )));
    };
    let directory = hub::pull(&name, &config.hub, environment)
        .map_err(|error| AppError::Model(format!("cannot pull {wanted}: {error}")))?;
    Ok((ModelSource::Directory(directory), name.repository().to_owned()))
}

/// One line for each fact that an operator looks for first.
fn say_what_is_served(source: &ModelSource, name: &str, engine: &Engine, elapsed: Duration) {
    let info = engine.model();
    match source {
        ModelSource::Embedded(_) => tracing::info!(
            "model {name}: the demo model that comes with this program. It is tiny, shows that the server works, and \
             is no assistant: do not rely on what it says"
        ),
        ModelSource::Directory(path) | ModelSource::Gguf(path) => {
            tracing::info!("model {name} from {}", path.display());
        }
    }
    let mebibytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    tracing::info!(
        "{}, {} parameters, {:.1} MiB of {}, loaded in {:.2} s",
        info.architecture,
        info.num_parameters,
        mebibytes(info.weight_bytes),
        info.weight_format,
        elapsed.as_secs_f64()
    );
    let device = &info.device;
    tracing::info!("device {}: {}, {}, {} units", device.kind, device.name, device.isa, device.num_units);
    if let Some(note) = &info.device_note {
        tracing::info!("{note}");
    }
    match engine {
        Engine::Pools(engine) => say_what_is_pooled(engine.pooling()),
        Engine::Generates(_) => tracing::info!(
            "KV cache of {:.1} MiB of {}: {} blocks of {} tokens, prefix cache {}",
            mebibytes(info.kv_cache_bytes),
            info.kv_dtype,
            info.num_blocks,
            info.block_size,
            if info.prefix_cache { "on" } else { "off" }
        ),
    }
    if let Some(memory) = info.device_memory {
        tracing::info!(
            "device memory of {:.1} MiB: weights {:.1}, KV cache {:.1}, working memory {:.1}, left {:.1}",
            mebibytes(memory.total),
            mebibytes(info.weight_bytes),
            mebibytes(info.kv_cache_bytes),
            mebibytes(memory.working),
            mebibytes(memory.left)
        );
    }
    tracing::info!(
        "up to {} tokens a request, {} sequences and {} tokens a step",
        info.max_model_len,
        info.max_num_seqs,
        info.max_num_batched_tokens
    );
}

fn say_what_is_pooled(pooling: &PoolingInfo) {
    match pooling.task {
        PoolingTask::Score => tracing::info!("answers with scores of pairs of texts"),
        PoolingTask::Classify => tracing::info!("answers with {} labels of texts", pooling.labels.len()),
        PoolingTask::Embed => tracing::info!(
            "answers with vectors of {} numbers, {}",
            pooling.num_dimensions,
            if pooling.is_normalized { "of length 1" } else { "of any length" }
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_large_together_is_refused_in_numbers() {
        let need = |mebibytes: u64| MemoryNeed {
            weight_bytes: mebibytes << 20,
            cache_bytes: 64 << 20,
            working_bytes: 1 << 20,
        };
        let needs = [("chat", need(100)), ("embed", need(20))];
        let models = || needs.iter().map(|(name, need)| (*name, need));
        assert!(check_fits(models(), 250 << 20).is_ok());
        let error = check_fits(models(), 249 << 20).unwrap_err().to_string();
        for part in
            ["chat takes 100.0 MiB for weights", "embed takes 20.0 MiB", "250.0 MiB together", "249.0 MiB are free"]
        {
            assert!(error.contains(part), "{error}");
        }
    }
}
