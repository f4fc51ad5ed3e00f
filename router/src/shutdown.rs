//! How the process is asked to stop, and the order in which it does.
//!
//! 1. SIGTERM or SIGINT: readiness fails, new requests are refused, connections are asked to finish (GOAWAY).
//! 2. Running requests go on until they end, at most `drain_timeout_seconds`. A second signal ends the wait.
//! 3. What still runs then ends with an error that says why, and gets a moment to reach its client. Answers that are
//!    complete and on their way have until the limit.
//! 4. Listeners close, the engine's thread ends, the process exits with 0.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::lifecycle::Lifecycle;

/// What is left to say is said within this, where the limit has passed.
const FLUSH: Duration = Duration::from_secs(1);
/// How often a drain looks whether requests are left.
const POLL: Duration = Duration::from_millis(5);

/// The stages of the end, for everything that holds connections.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Finish what runs, begin nothing.
    pub draining: CancellationToken,
    /// Let go.
    pub stopping: CancellationToken,
    /// A token per connection on which something was said.
    pub tasks: TaskTracker,
}

/// SIGTERM and SIGINT, caught from when this is made.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub fn catch() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// The next one's name.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Steps 1 to 4, but for the engine: that is its owner's to stop, afterwards.
pub async fn drain(shutdown: &Shutdown, lifecycle: &Lifecycle, signals: &mut Signals, limit: Duration) {
    lifecycle.begin_drain();
    shutdown.draining.cancel();
    let Some(serving) = lifecycle.serving() else {
        shutdown.stopping.cancel();
        return;
    };
    let service = &serving.service;
    let deadline = Instant::now() + limit;
    tracing::info!(requests = service.num_inflight(), seconds = limit.as_secs(), "draining");
    let drained = async {
        while service.num_inflight() > 0 {
            tokio::time::sleep(POLL).await;
        }
    };
    let left = tokio::select! {
        () = drained => None,
        () = tokio::time::sleep(limit) => Some("the drain timeout passed"),
        name = signals.next() => Some(name),
    };
    if let Some(why) = left {
        tracing::warn!(why, requests = service.num_inflight(), "ending the requests that are left");
        service.fail_all("the server is shutting down");
    }
    shutdown.tasks.close();
    // A connection ends by itself once its last answer is sent. Listeners answer probes until here.
    let flushed = async {
        while service.num_inflight() > 0 {
            tokio::time::sleep(POLL).await;
        }
        shutdown.tasks.wait().await;
    };
    let moment = Instant::now() + FLUSH;
    let until = if left.is_some() { moment } else { moment.max(deadline) };
    let is_flushed = tokio::select! {
        () = flushed => true,
        () = tokio::time::sleep_until(until) => false,
        _ = signals.next(), if left.is_none() => false,
    };
    if !is_flushed {
        tracing::debug!(connections = shutdown.tasks.len(), "closing connections that do not finish");
    }
    shutdown.stopping.cancel();
}
