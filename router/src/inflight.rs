//! Requests alive now: how to end one of them, or all.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use dashmap::DashMap;
use futures::task::AtomicWaker;
use tokio_util::sync::CancellationToken;

use crate::error::ApiError;

/// Ids of clients are not always unique (a gateway that tries again reuses them), so requests are told apart by a number.
#[derive(Default)]
pub struct Inflight {
    requests: DashMap<u64, Arc<Control>>,
    next_key: AtomicU64,
    draining: AtomicBool,
    /// Cancelled when the drain begins: for streams that are no requests and have no end of their own.
    drain: CancellationToken,
    /// Set once the drain limit has passed.
    failed: OnceLock<&'static str>,
}

/// How a request is told to end.
struct Control {
    request_id: String,
    /// Set once; the request's stream ends with it.
    end: OnceLock<ApiError>,
    waker: AtomicWaker,
}

impl Control {
    fn end(&self, error: ApiError) {
        if self.end.set(error).is_ok() {
            self.waker.wake();
        }
    }
}

impl Inflight {
    /// Enters a request. Fails while draining.
    pub(crate) fn enter(self: &Arc<Self>, request_id: &str) -> Result<Entered, ApiError> {
        let key = self.next_key.fetch_add(1, Ordering::Relaxed);
        let control =
            Arc::new(Control { request_id: request_id.to_owned(), end: OnceLock::new(), waker: AtomicWaker::new() });
        self.requests.insert(key, Arc::clone(&control));
        let entered = Entered { inflight: Arc::clone(self), key, control };
        // Asked after entering, so that whoever starts to drain either is seen here or sees this request.
        if self.is_draining() {
            return Err(ApiError::Unavailable { why: "draining" });
        }
        Ok(entered)
    }

    /// Ends the requests of this id with [`ApiError::Cancelled`]. Says whether there were any.
    pub fn abort(&self, request_id: &str) -> bool {
        let mut found = false;
        for request in self.requests.iter().filter(|request| request.request_id == request_id) {
            request.end(ApiError::Cancelled);
            found = true;
        }
        found
    }

    /// Ends all requests with [`ApiError::Unavailable`]; from now on none enters.
    pub fn fail_all(&self, why: &'static str) {
        let why = *self.failed.get_or_init(|| why);
        self.begin_drain();
        for request in &self.requests {
            request.end(ApiError::Unavailable { why });
        }
    }

    /// From now on no request enters; those that run go on.
    pub fn begin_drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        self.drain.cancel();
    }

    /// Ready once the drain begins.
    pub(crate) async fn drain_begins(&self) {
        self.drain.cancelled().await;
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// Requests alive now.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }
}

/// A request's place among those alive; given up when dropped.
pub(crate) struct Entered {
    inflight: Arc<Inflight>,
    key: u64,
    control: Arc<Control>,
}

impl Entered {
    /// The error that the request is to end with, once it was told to.
    pub(crate) fn poll_end(&self, cx: &mut Context<'_>) -> Poll<ApiError> {
        self.control.waker.register(cx.waker());
        match self.end() {
            Some(error) => Poll::Ready(error),
            None => Poll::Pending,
        }
    }

    pub(crate) fn end(&self) -> Option<ApiError> {
        self.control.end.get().cloned()
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.inflight.requests.remove(&self.key);
    }
}
