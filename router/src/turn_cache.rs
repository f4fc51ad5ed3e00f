//! Tokens of texts that were seen before.
//!
//! A conversation comes back with each turn, and grows: between special tokens, where a template's text is cut anyway, its
//! earlier turns are the texts that they were. What is kept is exact, text for text, so that tokens are those that the
//! tokenizer would give. Callers who share no cached blocks share no texts either: how long a request takes says nothing
//! about theirs.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use quire_scheduler::CacheSalt;

/// Bytes of a text below which looking for it is not worth it.
const MIN_BYTES: usize = 32;
/// Bytes that an entry takes beside its text and its tokens.
const ENTRY_BYTES: usize = 128;

/// A text, and whether it is the first of its prompt, which some tokenizers encode differently.
#[derive(Clone, Copy)]
pub(crate) struct Turn<'t> {
    pub(crate) salt: CacheSalt,
    pub(crate) is_first: bool,
    pub(crate) text: &'t str,
}

/// Texts with their tokens, at most so many bytes of them.
pub(crate) struct TurnCache {
    state: RandomState,
    /// Of each generation, of which there are two.
    max_bytes: usize,
    generations: Mutex<Generations>,
}

/// Entries that were used lately, and those that were not since the last change of generation, which go with the next.
#[derive(Default)]
struct Generations {
    young: HashMap<u64, Arc<Entry>>,
    old: HashMap<u64, Arc<Entry>>,
    young_bytes: usize,
}

struct Entry {
    salt: CacheSalt,
    is_first: bool,
    text: Box<str>,
    token_ids: Box<[u32]>,
}

impl Entry {
    fn is_of(&self, turn: &Turn) -> bool {
        self.is_first == turn.is_first && self.salt == turn.salt && *self.text == *turn.text
    }

    fn num_bytes(&self) -> usize {
        self.text.len() + 4 * self.token_ids.len() + ENTRY_BYTES
    }
}

impl Generations {
    fn put(&mut self, key: u64, entry: Arc<Entry>, max_bytes: usize) {
        if self.young_bytes + entry.num_bytes() > max_bytes {
            self.old = std::mem::take(&mut self.young);
            self.young_bytes = 0;
        }
        self.young_bytes += entry.num_bytes();
        // The other text of the same hash, if there is one.
        if let Some(other) = self.young.insert(key, entry) {
            self.young_bytes -= other.num_bytes();
        }
    }
}

impl TurnCache {
    /// For about `max_bytes` of texts and tokens.
    pub(crate) fn new(max_bytes: usize) -> Self {
        Self { state: RandomState::new(), max_bytes: max_bytes / 2, generations: Mutex::default() }
    }

    /// Appends the turn's tokens to `ids`; those of a new turn are asked for, and kept.
    pub(crate) fn extend<E>(
        &self,
        turn: Turn,
        ids: &mut Vec<u32>,
        encode: impl FnOnce(&mut Vec<u32>) -> Result<(), E>,
    ) -> Result<(), E> {
        if turn.text.len() < MIN_BYTES {
            return encode(ids);
        }
        let key = self.state.hash_one((turn.salt, turn.is_first, turn.text));
        if let Some(entry) = self.get(key, &turn) {
            ids.extend_from_slice(&entry.token_ids);
            return Ok(());
        }
        let begin = ids.len();
        encode(ids)?;
        let Turn { salt, is_first, text } = turn;
        let entry = Entry { salt, is_first, text: text.into(), token_ids: ids[begin..].into() };
        if entry.num_bytes() <= self.max_bytes {
            self.lock().put(key, Arc::new(entry), self.max_bytes);
        }
        Ok(())
    }

    fn get(&self, key: u64, turn: &Turn) -> Option<Arc<Entry>> {
        let mut generations = self.lock();
        if let Some(entry) = generations.young.get(&key) {
            return entry.is_of(turn).then(|| Arc::clone(entry));
        }
        let entry = generations.old.get(&key).filter(|entry| entry.is_of(turn)).map(Arc::clone)?;
        generations.old.remove(&key);
        generations.put(key, Arc::clone(&entry), self.max_bytes);
        Some(entry)
    }

    fn lock(&self) -> MutexGuard<'_, Generations> {
        // Whole at every moment.
        self.generations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn turn(text: &str) -> Turn<'_> {
        Turn { salt: CacheSalt::default(), is_first: false, text }
    }

    /// The tokens of a turn, each byte one, and whether they were made anew.
    fn ask(cache: &TurnCache, turn: Turn) -> (Vec<u32>, bool) {
        let is_new = Cell::new(false);
        let mut ids = vec![7];
        let encode = |ids: &mut Vec<u32>| {
            is_new.set(true);
            ids.extend(turn.text.bytes().map(u32::from));
            Ok::<(), ()>(())
        };
        cache.extend(turn, &mut ids, encode).unwrap();
        assert_eq!(ids.remove(0), 7);
        (ids, is_new.get())
    }

    #[test]
    fn a_turn_is_encoded_once_for_those_who_share_its_salt() {
        let cache = TurnCache::new(1 << 20);
        let text = "a turn that is long enough to be worth keeping";
        let ids: Vec<u32> = text.bytes().map(u32::from).collect();
        assert_eq!(ask(&cache, turn(text)), (ids.clone(), true));
        assert_eq!(ask(&cache, turn(text)), (ids.clone(), false));
        assert_eq!(ask(&cache, Turn { salt: CacheSalt([1; 32]), ..turn(text) }), (ids.clone(), true));
        assert_eq!(ask(&cache, Turn { is_first: true, ..turn(text) }), (ids, true));
        assert!(ask(&cache, turn("short")).1 && ask(&cache, turn("short")).1);
    }

    #[test]
    fn what_cannot_be_encoded_is_not_kept() {
        let cache = TurnCache::new(1 << 20);
        let text = "a turn that cannot be encoded, and is long enough";
        let refuse = |ids: &mut Vec<u32>| {
            ids.push(1);
            Err("no")
        };
        assert_eq!(cache.extend(turn(text), &mut Vec::new(), refuse), Err("no"));
        assert!(ask(&cache, turn(text)).1);
    }

    #[test]
    fn memory_is_bounded_and_what_is_used_stays() {
        let max_bytes = 64 << 10;
        let cache = TurnCache::new(max_bytes);
        let used = "the system prompt of somebody, which each request begins with";
        ask(&cache, turn(used));
        for number in 0..5000 {
            let text = format!("{number}: {}", "x".repeat(number % 200 + MIN_BYTES));
            assert!(ask(&cache, turn(&text)).1);
            assert!(!ask(&cache, turn(used)).1, "{number}");
            let generations = cache.lock();
            let bytes =
                |entries: &HashMap<u64, Arc<Entry>>| entries.values().map(|entry| entry.num_bytes()).sum::<usize>();
            assert_eq!(bytes(&generations.young), generations.young_bytes);
            assert!(bytes(&generations.young) + bytes(&generations.old) <= max_bytes);
        }
        let long = "y".repeat(max_bytes);
        assert!(ask(&cache, turn(&long)).1 && ask(&cache, turn(&long)).1);
    }
}
