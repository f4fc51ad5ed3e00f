//! Memory of the bodies that were received and not turned into tokens yet: one budget for both faces.
//!
//! HTTP's handlers read their bodies themselves and grow a [`BodyShare`] as they do. gRPC's are read by tonic, so there a
//! [`CountedBody`] stands in their place; the call's extensions hold its share until its handler lets go of it.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tonic::Status;

use crate::error::ApiError;

/// Bytes that a permit stands for.
const UNIT: usize = 1024;
/// When a caller whose body finds no room should come back: bodies become tokens within milliseconds, or time out.
const RETRY_AFTER_SECONDS: u64 = 1;

/// The budget. A clone is the same one.
#[derive(Clone, Debug)]
pub struct BodyBudget(Arc<Semaphore>);

impl BodyBudget {
    /// Room for so many bytes in all bodies together.
    pub fn new(max_bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new((max_bytes / UNIT).min(Semaphore::MAX_PERMITS))))
    }

    /// An empty share.
    pub fn share(&self) -> BodyShare {
        BodyShare { budget: self.clone(), held: None }
    }
}

/// What one body takes; given back when dropped.
#[derive(Debug)]
pub struct BodyShare {
    budget: BodyBudget,
    held: Option<OwnedSemaphorePermit>,
}

impl BodyShare {
    /// Takes what is missing for a body of `bytes`. A body takes its memory as it arrives, so that one that is announced
    /// and not sent takes none.
    pub fn grow(&mut self, bytes: usize) -> Result<(), ApiError> {
        let held = self.held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let missing = bytes.div_ceil(UNIT).saturating_sub(held);
        if missing == 0 {
            return Ok(());
        }
        let missing = u32::try_from(missing).unwrap_or(u32::MAX);
        let permit = Arc::clone(&self.budget.0)
            .try_acquire_many_owned(missing)
            .map_err(|_| ApiError::Overloaded { retry_after_seconds: RETRY_AFTER_SECONDS })?;
        match &mut self.held {
            Some(held) => held.merge(permit),
            None => self.held = Some(permit),
        }
        Ok(())
    }
}

/// The share of a gRPC call's body, in the call's extensions: the body grows it, the handler drops it.
#[derive(Clone, Debug)]
pub struct HeldShare(Arc<Mutex<BodyShare>>);

impl HeldShare {
    pub fn new(budget: &BodyBudget) -> Self {
        Self(Arc::new(Mutex::new(budget.share())))
    }
}

/// What of a body is counted and timed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// All of it, from its first poll to its last byte.
    Together,
    /// Each message by itself, from its first byte to its last: between two of them a caller may be silent.
    EachMessage,
}

/// A body that takes its share of the budget as it arrives, and ends with an error when there is none left or when it
/// takes longer than it may.
pub struct CountedBody {
    inner: Body,
    counted: Counted,
    share: HeldShare,
    num_bytes: usize,
    message: MessageBorders,
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    /// An error as the face says it.
    refusal: fn(&ApiError) -> Status,
}

impl CountedBody {
    pub fn new(
        inner: Body,
        counted: Counted,
        share: HeldShare,
        limit: Duration,
        refusal: fn(&ApiError) -> Status,
    ) -> Self {
        let message = MessageBorders::default();
        Self { inner, counted, share, num_bytes: 0, message, limit, timer: None, refusal }
    }

    fn count(&mut self, bytes: &[u8]) -> Result<(), Status> {
        let refusal = self.refusal;
        self.num_bytes = self.num_bytes.saturating_add(bytes.len());
        let mut share = self.share.0.lock().unwrap_or_else(PoisonError::into_inner);
        share.grow(self.num_bytes).map_err(|error| refusal(&error))?;
        if self.counted == Counted::EachMessage && self.message.pass(bytes) {
            // Whoever reads the message has it now.
            share.held = None;
            self.num_bytes = 0;
            self.timer = None;
        }
        Ok(())
    }

    fn is_timed(&self) -> bool {
        match self.counted {
            Counted::Together => true,
            Counted::EachMessage => self.message.is_inside(),
        }
    }
}

/// Where messages of gRPC begin and end: each is a byte, its length in four, and itself ("Length-Prefixed-Message").
#[derive(Default)]
struct MessageBorders {
    /// Bytes of the prefix that were seen, and the length as far as it is known.
    prefix_len: u8,
    length: u32,
    /// Bytes of the message that are missing.
    missing: u32,
}

impl MessageBorders {
    /// Passes over these bytes. Says whether a message ended among them.
    fn pass(&mut self, mut bytes: &[u8]) -> bool {
        let mut ended = false;
        while let Some((first, rest)) = bytes.split_first() {
            if self.prefix_len < 5 {
                if self.prefix_len > 0 {
                    self.length = self.length << 8 | u32::from(*first);
                }
                self.prefix_len += 1;
                self.missing = self.length;
                bytes = rest;
            } else {
                let taken = bytes.len().min(self.missing as usize);
                self.missing -= taken as u32;
                bytes = &bytes[taken..];
            }
            if self.prefix_len == 5 && self.missing == 0 {
                *self = Self::default();
                ended = true;
            }
        }
        ended
    }

    fn is_inside(&self) -> bool {
        self.prefix_len > 0
    }
}

impl HttpBody for CountedBody {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = &mut *self;
        match Pin::new(&mut this.inner).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                let counted = frame.data_ref().map_or(Ok(()), |data| this.count(data));
                Poll::Ready(Some(counted.map(|()| frame).map_err(Into::into)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error.into()))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending if !this.is_timed() => Poll::Pending,
            Poll::Pending => {
                let limit = this.limit;
                let timer = this.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
                match timer.as_mut().poll(cx) {
                    Poll::Ready(()) => {
                        Poll::Ready(Some(Err(Status::deadline_exceeded("the message took too long").into())))
                    }
                    Poll::Pending => Poll::Pending,
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        HttpBody::size_hint(&self.inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_end_wherever_bytes_are_cut() {
        let mut bytes = vec![0, 0, 0, 0, 3, 1, 2, 3];
        bytes.extend([1, 0, 0, 0, 0]);
        bytes.extend([0, 0, 0, 1, 0]);
        bytes.extend([9; 256]);
        for size in 1..20 {
            let mut borders = MessageBorders::default();
            let ended = bytes.chunks(size).filter(|chunk| borders.pass(chunk)).count();
            // The first two end at the 8th and the 13th byte: in one piece, or in two.
            let expected = if 7 / size == 12 / size { 2 } else { 3 };
            assert!(ended == expected && !borders.is_inside(), "{size}: {ended}");
        }
        let mut borders = MessageBorders::default();
        assert!(!borders.pass(&bytes[..7]) && borders.is_inside());
    }

    #[test]
    fn shares_are_taken_as_bytes_come_and_given_back() {
        let budget = BodyBudget::new(8 * UNIT);
        let mut first = budget.share();
        for bytes in [1, UNIT, UNIT + 1, 6 * UNIT] {
            first.grow(bytes).unwrap();
        }
        let mut second = budget.share();
        second.grow(2 * UNIT).unwrap();
        assert!(matches!(second.grow(2 * UNIT + 1), Err(ApiError::Overloaded { .. })));
        drop(first);
        second.grow(8 * UNIT).unwrap();
    }
}
