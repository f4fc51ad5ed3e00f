//! What stage the process is in, and what it says of itself: alive, ready, or why not.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use quire_engine::EngineHealth;

use crate::error::ApiError;
use crate::generation::GenerationService;
use crate::metrics::ModelMetrics;
use crate::served_models::ByPace;

/// A step may take this many times the longest one of late before the server is not ready.
const STALL_FACTOR: u32 = 3;
/// And never less than this: a busy machine can hold up any thread for a while.
const MIN_STALL: Duration = Duration::from_secs(5);

/// How long steps take: the longest of late, forgotten by a thousandth with each step. Written by the engine's thread,
/// read by probes.
#[derive(Debug, Default)]
pub struct StepPace(AtomicU64);

impl StepPace {
    /// Takes a step in.
    pub fn observe(&self, execute: Duration) {
        let micros = u64::try_from(execute.as_micros()).unwrap_or(u64::MAX);
        let faded = self.0.load(Ordering::Relaxed) / 1000 * 999;
        self.0.store(faded.max(micros), Ordering::Relaxed);
    }

    /// How long a step may take before the server is not ready, but at most `limit`; `limit` before the first step.
    pub(crate) fn stall_after(&self, limit: Duration) -> Duration {
        match self.0.load(Ordering::Relaxed) {
            0 => limit,
            longest => (Duration::from_micros(longest) * STALL_FACTOR).max(MIN_STALL).min(limit),
        }
    }
}

/// What loaded models are served with.
pub struct Serving {
    pub service: GenerationService,
    pub metrics: ModelMetrics,
    /// The OpenAI-compatible face of `service`.
    pub http: axum::Router,
}

/// Why the server does not take requests now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotReady {
    /// The model is being loaded.
    Starting,
    /// Asked to stop; what runs goes on.
    Draining,
    /// A step takes much longer than steps do.
    Stalled,
    /// The engine ended.
    Stopped,
}

impl NotReady {
    pub fn why(self) -> &'static str {
        match self {
            Self::Starting => "the model is being loaded",
            Self::Draining => "the server is shutting down",
            Self::Stalled => "a step takes too long",
            Self::Stopped => "the engine is stopped",
        }
    }
}

impl From<NotReady> for ApiError {
    fn from(reason: NotReady) -> Self {
        Self::Unavailable { why: reason.why() }
    }
}

/// The state of the process, shared by everything that answers.
pub struct Lifecycle {
    serving: OnceLock<Serving>,
    draining: AtomicBool,
    stall: Duration,
}

impl Lifecycle {
    /// A process that is starting. `stall`: how long a step may take before the process counts as hung.
    pub fn new(stall: Duration) -> Self {
        Self { serving: OnceLock::new(), draining: AtomicBool::new(false), stall }
    }

    /// All models are loaded.
    pub fn begin_serving(&self, serving: Serving) {
        if self.draining.load(Ordering::SeqCst) {
            serving.service.begin_drain();
        }
        let _ = self.serving.set(serving);
    }

    /// No request is taken from now on; running ones go on.
    pub fn begin_drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        if let Some(serving) = self.serving.get() {
            serving.service.begin_drain();
        }
    }

    /// What is served, from when the model is loaded until the process ends.
    pub fn serving(&self) -> Option<&Serving> {
        self.serving.get()
    }

    /// The service, for a request: an error while the model is being loaded.
    pub fn service(&self) -> Result<&GenerationService, ApiError> {
        self.serving.get().map(|serving| &serving.service).ok_or_else(|| NotReady::Starting.into())
    }

    /// Whether the model is loaded.
    pub fn started(&self) -> Result<(), NotReady> {
        if self.serving.get().is_some() { Ok(()) } else { Err(NotReady::Starting) }
    }

    /// Whether a request sent now would be served.
    pub fn ready(&self) -> Result<(), NotReady> {
        if self.draining.load(Ordering::SeqCst) {
            return Err(NotReady::Draining);
        }
        self.started()?;
        self.engine_health(ByPace::Yes)
    }

    /// Whether the process does its work: a step ends in the time that it may take, or there is no work.
    pub fn live(&self) -> Result<(), NotReady> {
        self.engine_health(ByPace::No)
    }

    /// Of all models: an engine that stopped is worse than one that stalls.
    fn engine_health(&self, by_pace: ByPace) -> Result<(), NotReady> {
        let Some(serving) = self.serving.get() else { return Ok(()) };
        let mut health = Ok(());
        for served in serving.service.models().iter() {
            match served.health(self.stall, by_pace) {
                EngineHealth::Alive => {}
                EngineHealth::Stalled { .. } => health = Err(NotReady::Stalled),
                EngineHealth::Stopped => return Err(NotReady::Stopped),
            }
        }
        health
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_follows_the_slowest_steps_and_forgets_them() {
        let limit = Duration::from_secs(60);
        let pace = StepPace::default();
        assert_eq!(pace.stall_after(limit), limit);
        pace.observe(Duration::from_millis(2));
        assert_eq!(pace.stall_after(limit), MIN_STALL);
        pace.observe(Duration::from_secs(4));
        assert_eq!(pace.stall_after(limit), Duration::from_secs(12));
        pace.observe(Duration::from_secs(40));
        assert_eq!(pace.stall_after(limit), limit);
        for _ in 0..4000 {
            pace.observe(Duration::from_millis(2));
        }
        assert_eq!(pace.stall_after(limit), MIN_STALL);
    }
}
