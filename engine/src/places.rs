//! How far choices came in their grammar, kept while they are in no row.
//!
//! A choice that is preempted comes back with the tokens that it had. To go through its grammar again costs a mask for each of
//! them, all in one step, which everyone in that step waits for: microseconds each with most grammars, milliseconds with some.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use crate::constraint::{Grammar, NotAllowed, TokenConstraint};
use crate::handle::lock;

/// What all choices of a request obey, and the places of those that wait to come back. Lives as long as its request.
pub struct RequestGrammar {
    grammar: Arc<dyn Grammar>,
    /// By choice. At most one for each, and none of those that ended.
    kept: Mutex<BTreeMap<u32, Kept>>,
}

enum Kept {
    Place(Place),
    /// It will not come back.
    Ended,
}

/// A choice's place in its grammar.
pub(crate) struct Place {
    /// `None` until it was begun.
    pub constraint: Option<Box<dyn TokenConstraint>>,
    /// Tokens that the grammar was told.
    pub told: Vec<u32>,
    /// What may come behind them, where `is_masked`.
    pub mask: Vec<u32>,
    pub is_masked: bool,
    pub result: Result<(), NotAllowed>,
}

impl Place {
    /// At the beginning, with room for a mask of so many words.
    pub(crate) fn new(num_words: usize) -> Self {
        Self { constraint: None, told: Vec::new(), mask: vec![0; num_words], is_masked: false, result: Ok(()) }
    }
}

impl RequestGrammar {
    pub(crate) fn new(grammar: Arc<dyn Grammar>) -> Self {
        Self { grammar, kept: Mutex::default() }
    }

    pub(crate) fn begin(&self) -> Box<dyn TokenConstraint> {
        self.grammar.begin()
    }

    /// Keeps the place of a choice that leaves its row. Of two the one that is further on stays: one of them is of an earlier
    /// time in a row, whose thread was slow.
    pub(crate) fn keep(&self, choice: u32, place: Place) {
        let mut kept = lock(&self.kept);
        let is_further = match kept.get(&choice) {
            None => true,
            Some(Kept::Place(other)) => other.told.len() < place.told.len(),
            Some(Kept::Ended) => false,
        };
        if is_further {
            kept.insert(choice, Kept::Place(place));
        }
    }

    /// The place of a choice that comes back with these tokens, if one was kept that is on the way to them.
    pub(crate) fn take(&self, choice: u32, generated: &[u32]) -> Option<Place> {
        let mut kept = lock(&self.kept);
        match kept.get(&choice) {
            Some(Kept::Place(_)) => {}
            Some(Kept::Ended) | None => return None,
        }
        match kept.remove(&choice) {
            Some(Kept::Place(place)) if generated.starts_with(&place.told) => Some(place),
            _ => None,
        }
    }

    /// A choice ended: nothing of it is kept any more.
    pub(crate) fn end(&self, choice: u32) {
        lock(&self.kept).insert(choice, Kept::Ended);
    }
}

impl fmt::Debug for RequestGrammar {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("RequestGrammar")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Nothing;

    impl Grammar for Nothing {
        fn begin(&self) -> Box<dyn TokenConstraint> {
            unreachable!("nobody begins")
        }
    }

    #[test]
    fn the_furthest_place_is_kept_until_its_choice_ends() {
        let request = RequestGrammar::new(Arc::new(Nothing));
        let place = |told: &[u32]| Place { told: told.to_vec(), ..Place::new(1) };
        let told = |choice, generated: &[u32]| request.take(choice, generated).map(|place| place.told);
        assert_eq!(told(0, &[1, 2]), None);
        request.keep(0, place(&[1, 2]));
        request.keep(0, place(&[1]));
        request.keep(1, place(&[7]));
        assert_eq!(told(0, &[1, 2, 3]), Some(vec![1, 2]));
        assert_eq!(told(0, &[1, 2, 3]), None, "it is taken");
        assert_eq!(told(1, &[8]), None, "on another way");
        request.keep(0, place(&[1, 2, 3]));
        request.end(0);
        request.keep(0, place(&[1, 2, 3, 4]));
        assert_eq!(told(0, &[1, 2, 3, 4]), None, "it ended");
    }
}
