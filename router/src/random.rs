//! Numbers that nobody outside can guess: seeds of requests without one, request ids, marks around user text.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};

static COUNTER: AtomicU64 = AtomicU64::new(0);

/// A keyed hash (SipHash) of a counter; its key comes from the operating system.
pub(crate) fn random_u64() -> u64 {
    RandomState::new().hash_one(COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// A seed that survives JSON: clients that read numbers as f64 get it back whole.
pub(crate) fn random_seed() -> u64 {
    random_u64() >> 11
}

/// An id for a request whose client gave none.
pub(crate) fn request_id() -> String {
    format!("{:016x}{:016x}", random_u64(), random_u64())
}

/// Whether a client's id can be used: `[A-Za-z0-9._-]{1,128}`.
/// Gateways put two ids of their own into one.
pub(crate) fn is_request_id(id: &str) -> bool {
    (1..=128).contains(&id.len())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}
