//! How long the running step takes, read by whoever asks whether the engine lives.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quire_scheduler::Time;

use crate::handle::EngineHealth;

/// Written by an engine's thread, read by anyone.
pub(crate) struct StepClock {
    origin: Instant,
    /// When the running step began, in microseconds since `origin` and one; 0 while there is no work.
    busy_since: AtomicU64,
    has_stopped: AtomicBool,
}

impl StepClock {
    pub(crate) fn new() -> Self {
        Self { origin: Instant::now(), busy_since: AtomicU64::new(0), has_stopped: AtomicBool::new(false) }
    }

    /// Microseconds since this clock was made.
    pub(crate) fn time(&self, at: Instant) -> Time {
        let micros = at.saturating_duration_since(self.origin).as_micros();
        Time(u64::try_from(micros).unwrap_or(u64::MAX))
    }

    /// The engine's thread begins a step.
    pub(crate) fn begin(&self, now: Time) {
        self.busy_since.store(now.0 + 1, Ordering::Release);
    }

    /// The engine's thread has nothing to do.
    pub(crate) fn rest(&self) {
        self.busy_since.store(0, Ordering::Release);
    }

    /// The engine's thread ends.
    pub(crate) fn stop(&self) {
        self.has_stopped.store(true, Ordering::Release);
    }

    pub(crate) fn health(&self, stall_after: Duration) -> EngineHealth {
        if self.has_stopped.load(Ordering::Acquire) {
            return EngineHealth::Stopped;
        }
        let began = self.busy_since.load(Ordering::Acquire);
        let now = self.time(Instant::now()).0;
        let since = Duration::from_micros(now.saturating_sub(began.saturating_sub(1)));
        if began == 0 || since <= stall_after { EngineHealth::Alive } else { EngineHealth::Stalled { since } }
    }
}
