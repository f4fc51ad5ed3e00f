//! Answers that their clients do not take.
//!
//! Over HTTP/2 a client can keep the window of a stream at zero: its socket takes everything, the answer nothing. The
//! connection then stops asking the answer's body for more, and whatever the body holds (a generation, its blocks, its
//! place among the requests in flight) would be held for as long as the client likes. A [`StallBody`] is looked at from
//! outside: once something waited to be sent for longer than it may, its content is dropped.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::Response;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Puts a watched body into the place of one that is streamed. `stalled` is cancelled when it stalls.
///
/// A body of known length is left as it is: it is in memory and holds nothing else.
pub(crate) fn watch(response: Response<Body>, limit: Duration, stalled: &CancellationToken) -> Response<Body> {
    if HttpBody::size_hint(response.body()).exact().is_some() {
        return response;
    }
    response.map(|body| Body::new(StallBody::new(body, limit, stalled.clone())))
}

/// When the connection began to owe the body a poll.
struct Pulse {
    origin: Instant,
    /// Milliseconds since `origin`, and one; 0 while nothing is owed.
    owed_since: AtomicU64,
    /// The connection's own.
    waker: Mutex<Waker>,
}

impl Pulse {
    fn now(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX - 1) + 1
    }

    /// Something is there to be sent: a poll is owed from now on, if it was not before.
    fn owe(&self) {
        let _ = self.owed_since.compare_exchange(0, self.now(), Ordering::AcqRel, Ordering::Acquire);
    }

    /// How long a poll has been owed.
    fn waited(&self) -> Option<Duration> {
        match self.owed_since.load(Ordering::Acquire) {
            0 => None,
            since => Some(Duration::from_millis(self.now().saturating_sub(since))),
        }
    }
}

impl Wake for Pulse {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.owe();
        lock(&self.waker).wake_by_ref();
    }
}

/// See the module's text.
struct StallBody {
    inner: Arc<Mutex<Option<Body>>>,
    pulse: Arc<Pulse>,
    /// `pulse` as what the content wakes.
    waker: Waker,
    watchdog: AbortHandle,
}

impl StallBody {
    fn new(body: Body, limit: Duration, stalled: CancellationToken) -> Self {
        let pulse = Arc::new(Pulse {
            origin: Instant::now(),
            // The first poll is owed already: with a window of zero there is none.
            owed_since: AtomicU64::new(1),
            waker: Mutex::new(Waker::noop().clone()),
        });
        let inner = Arc::new(Mutex::new(Some(body)));
        let (watched, content) = (Arc::clone(&pulse), Arc::clone(&inner));
        let watchdog = tokio::spawn(async move {
            loop {
                let waited = watched.waited().unwrap_or_default();
                if waited >= limit {
                    break;
                }
                tokio::time::sleep(limit - waited).await;
            }
            tracing::debug!("an answer that its client does not take is ended");
            drop(lock(&content).take());
            stalled.cancel();
        });
        let waker = Waker::from(Arc::clone(&pulse));
        Self { inner, pulse, waker, watchdog: watchdog.abort_handle() }
    }
}

impl Drop for StallBody {
    fn drop(&mut self) {
        self.watchdog.abort();
    }
}

impl HttpBody for StallBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        {
            let mut waker = lock(&self.pulse.waker);
            if !waker.will_wake(cx.waker()) {
                *waker = cx.waker().clone();
            }
        }
        // Before the poll: what wakes while it runs is owed another one.
        self.pulse.owed_since.store(0, Ordering::Release);
        let mut inner = lock(&self.inner);
        let Some(body) = inner.as_mut() else {
            let error = std::io::Error::new(std::io::ErrorKind::TimedOut, "the answer was not taken in time");
            return Poll::Ready(Some(Err(axum::Error::new(error))));
        };
        let poll = Pin::new(body).poll_frame(&mut Context::from_waker(&self.waker));
        match &poll {
            Poll::Pending => {}
            // The connection asks again as soon as there is room for more.
            Poll::Ready(Some(Ok(_))) => self.pulse.owe(),
            Poll::Ready(_) => self.watchdog.abort(),
        }
        poll
    }

    fn is_end_stream(&self) -> bool {
        lock(&self.inner).as_ref().is_some_and(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        lock(&self.inner).as_ref().map(HttpBody::size_hint).unwrap_or_default()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;

    /// A watched body, what feeds it, and what says that it stalled.
    fn watched(limit: Duration) -> (Body, mpsc::Sender<&'static str>, CancellationToken) {
        let (sender, receiver) = mpsc::channel(8);
        let stream = ReceiverStream::new(receiver).map(Ok::<_, std::convert::Infallible>);
        let stalled = CancellationToken::new();
        let response = watch(Response::new(Body::from_stream(stream)), limit, &stalled);
        (response.into_body(), sender, stalled)
    }

    #[tokio::test]
    async fn what_nobody_takes_is_let_go_of() {
        let limit = Duration::from_millis(20);
        // Never asked for anything.
        let (body, sender, stalled) = watched(limit);
        sender.closed().await;
        assert!(stalled.is_cancelled());
        drop(body);
        // Asked once, and never again when there was more.
        let (body, sender, stalled) = watched(limit);
        let mut data = body.into_data_stream();
        sender.send("a").await.unwrap();
        assert_eq!(data.next().await.unwrap().unwrap(), "a");
        sender.closed().await;
        stalled.cancelled().await;
        assert!(data.next().await.unwrap().is_err());
        // Asked when there was nothing, and not when there was.
        let (body, sender, stalled) = watched(limit);
        let mut data = body.into_data_stream();
        assert!(futures::poll!(data.next()).is_pending());
        sender.send("b").await.unwrap();
        sender.closed().await;
        stalled.cancelled().await;
    }

    #[tokio::test]
    async fn a_client_may_wait_for_longer_than_it_may_keep_waiting() {
        let (body, sender, stalled) = watched(Duration::from_millis(20));
        let mut data = body.into_data_stream();
        let reader = tokio::spawn(async move {
            let first = data.next().await.map(|data| data.unwrap());
            (first, data.next().await.is_none())
        });
        tokio::task::yield_now().await;
        // The work takes its time; its client is there.
        tokio::time::sleep(Duration::from_millis(100)).await;
        sender.send("a").await.unwrap();
        drop(sender);
        assert_eq!(reader.await.unwrap(), (Some("a".into()), true));
        assert!(!stalled.is_cancelled());
    }

    #[tokio::test]
    async fn a_body_of_known_length_is_left_alone() {
        let stalled = CancellationToken::new();
        let response = watch(Response::new(Body::from("whole")), Duration::ZERO, &stalled);
        assert_eq!(HttpBody::size_hint(response.body()).exact(), Some(5));
    }
}
