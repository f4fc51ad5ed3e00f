//! Responses that are kept for a while: to be read again, gone on with, or cancelled.
//!
//! Bounded in entries, bytes and time; the oldest go first. What is lost when the process ends was never promised.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::generation::{ChatMessage, Limits};

/// What is kept of a response.
#[derive(Clone)]
pub(super) struct Kept {
    pub(super) response: Arc<Value>,
    /// What a next response goes on from; `None` while it is not there.
    pub(super) conversation: Option<Arc<[ChatMessage]>>,
}

struct Entry {
    kept: Kept,
    num_bytes: usize,
    expires: Instant,
}

#[derive(Default)]
struct Entries {
    by_id: HashMap<String, Entry>,
    /// Oldest first. Ids of entries that were deleted stay until it is their turn.
    order: VecDeque<String>,
    num_bytes: usize,
}

/// A clone is the same store.
#[derive(Clone)]
pub(super) struct Store {
    entries: Arc<Mutex<Entries>>,
    max_entries: usize,
    max_bytes: usize,
    time_to_live: Duration,
}

impl Store {
    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            entries: Arc::default(),
            max_entries: limits.max_stored_responses,
            max_bytes: limits.max_stored_response_bytes,
            time_to_live: Duration::from_secs(limits.stored_response_seconds),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a response that has just begun.
    pub(super) fn begin(&self, id: &str, response: Value) {
        let mut entries = self.lock();
        let now = Instant::now();
        let kept = Kept { response: Arc::new(response), conversation: None };
        let num_bytes = bytes_of(&kept);
        entries.num_bytes += num_bytes;
        entries.by_id.insert(id.to_owned(), Entry { kept, num_bytes, expires: now + self.time_to_live });
        entries.order.push_back(id.to_owned());
        self.trim(&mut entries, now);
    }

    /// Puts the response's last state into its place, unless it was deleted or has expired.
    pub(super) fn finish(&self, id: &str, response: Value, conversation: Option<Vec<ChatMessage>>) {
        let mut entries = self.lock();
        let now = Instant::now();
        let kept = Kept { response: Arc::new(response), conversation: conversation.map(Into::into) };
        let num_bytes = bytes_of(&kept);
        let Some(entry) = entries.by_id.get_mut(id) else { return };
        let before = std::mem::replace(&mut entry.num_bytes, num_bytes);
        entry.kept = kept;
        entry.expires = now + self.time_to_live;
        entries.num_bytes = entries.num_bytes - before + num_bytes;
        self.trim(&mut entries, now);
    }

    pub(super) fn get(&self, id: &str) -> Option<Kept> {
        let entries = self.lock();
        entries.by_id.get(id).filter(|entry| entry.expires > Instant::now()).map(|entry| entry.kept.clone())
    }

    /// Says whether there was one.
    pub(super) fn delete(&self, id: &str) -> bool {
        let mut entries = self.lock();
        match entries.by_id.remove(id) {
            Some(entry) => {
                entries.num_bytes -= entry.num_bytes;
                entry.expires > Instant::now()
            }
            None => false,
        }
    }

    fn trim(&self, entries: &mut Entries, now: Instant) {
        // Entries are in the order of their beginning; one that ended late can outlive a younger one by its own time.
        while let Some(id) = entries.order.front() {
            let over = entries.by_id.len() > self.max_entries || entries.num_bytes > self.max_bytes;
            let is_gone = entries.by_id.get(id).is_none_or(|entry| entry.expires <= now);
            // Deleted ids must not pile up behind one that stays.
            if !over && !is_gone && entries.order.len() <= self.max_entries.saturating_mul(2) {
                return;
            }
            let Some(id) = entries.order.pop_front() else { return };
            if let Some(entry) = entries.by_id.remove(&id) {
                entries.num_bytes -= entry.num_bytes;
            }
        }
    }
}

/// About what an entry takes.
fn bytes_of(kept: &Kept) -> usize {
    let of_message = |message: &ChatMessage| {
        let calls = message.tool_calls.iter().map(|call| call.id.len() + call.name.len() + call.arguments.len() + 96);
        let reasoning = message.reasoning.as_ref().map_or(0, String::len);
        let id = message.tool_call_id.as_ref().map_or(0, String::len);
        message.content.len() + message.role.len() + reasoning + id + calls.sum::<usize>() + 256
    };
    let messages = kept.conversation.iter().flat_map(|messages| messages.iter());
    let text: usize = messages.map(of_message).sum();
    // The response holds the output once more, and the instructions.
    text + kept.response.to_string().len() + 1024
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn store(max_entries: usize, max_bytes: usize, seconds: u64) -> Store {
        let limits = Limits {
            max_stored_responses: max_entries,
            max_stored_response_bytes: max_bytes,
            stored_response_seconds: seconds,
            ..Limits::default()
        };
        Store::new(&limits)
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many_or_too_large_ones() {
        let store = store(3, 1 << 20, 60);
        for id in ["a", "b", "c", "d"] {
            store.begin(id, json!({"id": id}));
        }
        assert!(store.get("a").is_none() && store.get("b").is_some() && store.get("d").is_some());
        let message = ChatMessage { role: "user".into(), content: "x".repeat(1 << 20), ..ChatMessage::default() };
        store.finish("d", json!({}), Some(vec![message]));
        // Alone it is over the limit.
        assert!(["b", "c", "d"].iter().all(|id| store.get(id).is_none()));
        assert_eq!(store.lock().num_bytes, 0);
        store.finish("d", json!({}), None);
        assert!(store.get("d").is_none());
    }

    #[test]
    fn deleted_and_expired_ones_are_gone_and_leave_nothing() {
        let store = store(100, 1 << 20, 60);
        for round in 0..1000 {
            let id = round.to_string();
            store.begin(&id, json!({}));
            assert!(store.delete(&id) && !store.delete(&id));
        }
        let entries = store.lock();
        assert!(entries.order.len() <= 200 && entries.by_id.is_empty() && entries.num_bytes == 0);
        drop(entries);
        let store = self::store(100, 1 << 20, 0);
        store.begin("a", json!({}));
        assert!(store.get("a").is_none());
    }
}
