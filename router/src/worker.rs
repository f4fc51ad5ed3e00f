//! Where a request can be sent.

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use quire_engine::scheduler::{FlushReport, SchedulerStats};
use quire_engine::{
    EngineHandle, EngineHealth, KvEventStream, ModelInfo, Submission, SubmitError, SubscribeError, TokenEvent,
    TokenStream,
};

/// What a worker sends back for one request. Dropping it before its last event cancels the request.
pub trait TokenSource: Send + 'static {
    /// The next event; `None` after the last one.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<TokenEvent>>;

    /// Ends one choice: nothing more is wanted of it. Its last event still comes.
    fn end_choice(&mut self, choice_index: u32);
}

/// A place that runs requests of one model.
pub trait Worker: Send + Sync + 'static {
    /// Hands a request over; the answer comes by the next step boundary.
    fn submit(&self, submission: Submission) -> BoxFuture<'_, Result<Box<dyn TokenSource>, SubmitError>>;

    /// Lets go of all cached blocks that no request holds.
    fn flush_cache(&self) -> BoxFuture<'_, Result<FlushReport, SubmitError>>;

    /// What happens to cached blocks, from batch `start` on or from all blocks of now on.
    fn subscribe_kv_events(&self, start: u64) -> BoxFuture<'_, Result<KvEventStream, SubscribeError>>;

    /// The model it runs.
    fn model(&self) -> &ModelInfo;

    /// Counters as of its last step.
    fn stats(&self) -> SchedulerStats;

    /// What its step clock says; `stall_after` is how long a step may take.
    fn health(&self, stall_after: Duration) -> EngineHealth;
}

/// The engine in this process.
pub struct LocalWorker {
    engine: EngineHandle,
}

impl LocalWorker {
    pub fn new(engine: EngineHandle) -> Self {
        Self { engine }
    }
}

impl Worker for LocalWorker {
    fn submit(&self, submission: Submission) -> BoxFuture<'_, Result<Box<dyn TokenSource>, SubmitError>> {
        Box::pin(async move {
            let stream = self.engine.submit(submission).await?;
            Ok(Box::new(LocalSource(stream)) as Box<dyn TokenSource>)
        })
    }

    fn flush_cache(&self) -> BoxFuture<'_, Result<FlushReport, SubmitError>> {
        Box::pin(self.engine.flush_cache())
    }

    fn subscribe_kv_events(&self, start: u64) -> BoxFuture<'_, Result<KvEventStream, SubscribeError>> {
        Box::pin(self.engine.subscribe_kv_events(start))
    }

    fn model(&self) -> &ModelInfo {
        self.engine.model()
    }

    fn stats(&self) -> SchedulerStats {
        self.engine.stats()
    }

    fn health(&self, stall_after: Duration) -> EngineHealth {
        self.engine.health(stall_after)
    }
}

struct LocalSource(TokenStream);

impl TokenSource for LocalSource {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<TokenEvent>> {
        // `next` keeps no state of its own between polls, so a future made for one poll loses nothing when dropped.
        let next: Pin<&mut _> = pin!(self.0.next());
        next.poll(cx)
    }

    fn end_choice(&mut self, choice_index: u32) {
        self.0.end_choice(choice_index);
    }
}
