//! The waiting queue and the order of admission.
//!
//! Two kinds of sequences wait. Those that had begun (preempted ones, and further choices of a prompt that is computed)
//! stand at the head, in order of rank. New ones stand in one lane per priority and tenant: the lowest priority value
//! is next, within it the tenant that was served least, within its lane the first to arrive. With one tenant that is
//! the order of arrival.
//!
//! Once a new sequence was named as the head it stays the head until it is admitted or leaves, or one of a better
//! priority arrives: a large request that must wait for room is not passed by small ones.

use std::collections::{BTreeMap, BTreeSet};

use crate::TenantId;
use crate::sequence::{NO_SLOT, Rank, Slot};
use crate::tenants::{TenantIndex, TenantTable};

#[derive(Clone, Copy, Debug)]
struct Lane {
    first: Slot,
    last: Slot,
    num_tokens: u64,
}

/// Where a sequence waits. `Nowhere` for one that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Nowhere,
    /// Counted, but not to be admitted before another choice has computed the prompt.
    Parked,
    New,
    Resumed,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    place: Place,
    rank: Rank,
    tenant: TenantIndex,
    num_tokens: u64,
    previous: Slot,
    next: Slot,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct WaitingQueue {
    pub(crate) tenants: TenantTable,
    lanes: BTreeMap<(i32, TenantIndex), Lane>,
    resumed: BTreeSet<(Rank, Slot)>,
    resumed_tokens: u64,
    /// By slot.
    entries: Vec<Entry>,
    /// The new sequence that was named as the head of its priority.
    heads: BTreeMap<i32, Slot>,
    num_waiting: u32,
    waiting_tokens: u64,
}

impl WaitingQueue {
    /// Sequences that wait, wherever.
    pub(crate) fn num_waiting(&self) -> u32 {
        self.num_waiting
    }

    /// Tokens that they bring.
    pub(crate) fn waiting_tokens(&self) -> u64 {
        self.waiting_tokens
    }

    /// A new sequence, behind the others of its priority and tenant.
    pub(crate) fn push_new(&mut self, slot: Slot, rank: Rank, tenant: TenantIndex, num_tokens: u64) {
        let lane = self.lanes.entry((rank.priority, tenant));
        let lane = lane.or_insert(Lane { first: NO_SLOT, last: NO_SLOT, num_tokens: 0 });
        let previous = lane.last;
        match previous {
            NO_SLOT => lane.first = slot,
            previous => self.entries[previous as usize].next = slot,
        }
        lane.last = slot;
        lane.num_tokens += num_tokens;
        let entry = Entry { place: Place::New, rank, tenant, num_tokens, previous, next: NO_SLOT };
        self.insert(slot, entry);
    }

    /// A sequence that had begun, or whose prompt another choice has computed: at the head, in order of rank.
    pub(crate) fn push_resumed(&mut self, slot: Slot, rank: Rank, tenant: TenantIndex, num_tokens: u64) {
        self.resumed.insert((rank, slot));
        self.resumed_tokens += num_tokens;
        let place = Place::Resumed;
        self.insert(slot, Entry { place, rank, tenant, num_tokens, previous: NO_SLOT, next: NO_SLOT });
    }

    /// A sequence that waits for another choice.
    pub(crate) fn park(&mut self, slot: Slot, rank: Rank, tenant: TenantIndex, num_tokens: u64) {
        let place = Place::Parked;
        self.insert(slot, Entry { place, rank, tenant, num_tokens, previous: NO_SLOT, next: NO_SLOT });
    }

    /// Takes a sequence out, wherever it waits; returns the tokens it brought.
    pub(crate) fn remove(&mut self, slot: Slot) -> u64 {
        let entry = self.entries[slot as usize];
        match entry.place {
            Place::Nowhere => panic!("slot {slot} does not wait"),
            Place::Parked => {}
            Place::Resumed => {
                let was_there = self.resumed.remove(&(entry.rank, slot));
                assert!(was_there);
                self.resumed_tokens -= entry.num_tokens;
            }
            Place::New => {
                self.unlink(slot, entry);
                if self.heads.get(&entry.rank.priority) == Some(&slot) {
                    self.heads.remove(&entry.rank.priority);
                }
            }
        }
        self.entries[slot as usize].place = Place::Nowhere;
        self.num_waiting -= 1;
        self.waiting_tokens -= entry.num_tokens;
        self.tenants.stop_waiting(entry.tenant, entry.num_tokens);
        entry.num_tokens
    }

    /// Who is to be admitted next.
    pub(crate) fn head(&mut self) -> Option<Slot> {
        let new = self.lanes.first_key_value().map(|(&(priority, _), _)| priority);
        if let Some(&(rank, slot)) = self.resumed.first()
            && new.is_none_or(|priority| rank.priority <= priority)
        {
            return Some(slot);
        }
        let priority = new?;
        if let Some(&head) = self.heads.get(&priority) {
            return Some(head);
        }
        let lanes = self.lanes.range((priority, 0)..=(priority, TenantIndex::MAX));
        let next = lanes
            .min_by_key(|((_, tenant), lane)| (self.tenants.counter(*tenant), self.entries[lane.first as usize].rank));
        let (_, lane) = next?;
        self.heads.insert(priority, lane.first);
        Some(lane.first)
    }

    /// Tokens that leave the queue before a new sequence of this priority and tenant will.
    pub(crate) fn tokens_ahead(&self, priority: i32, tenant: TenantId) -> u64 {
        let lanes = self.lanes.range(..=(priority, TenantIndex::MAX));
        let all: u64 = lanes.map(|(_, lane)| lane.num_tokens).sum();
        // While it waits the others get as much as its tenant does, each.
        let share = self.tenants.waiting_tokens(tenant) * u64::from(self.tenants.num_waiting_with(tenant));
        self.resumed_tokens + all.min(share)
    }

    fn insert(&mut self, slot: Slot, entry: Entry) {
        if slot as usize >= self.entries.len() {
            let place = Place::Nowhere;
            self.entries.resize(slot as usize + 1, Entry { place, ..entry });
        }
        assert_eq!(self.entries[slot as usize].place, Place::Nowhere, "slot {slot} waits already");
        self.entries[slot as usize] = entry;
        self.num_waiting += 1;
        self.waiting_tokens += entry.num_tokens;
        self.tenants.wait(entry.tenant, entry.num_tokens);
    }

    fn unlink(&mut self, slot: Slot, entry: Entry) {
        let key = (entry.rank.priority, entry.tenant);
        let lane = self.lanes.get_mut(&key).expect("a waiting sequence has a lane");
        lane.num_tokens -= entry.num_tokens;
        match entry.previous {
            NO_SLOT => lane.first = entry.next,
            previous => self.entries[previous as usize].next = entry.next,
        }
        match entry.next {
            NO_SLOT => lane.last = entry.previous,
            next => self.entries[next as usize].previous = entry.previous,
        }
        if lane.first == NO_SLOT {
            self.lanes.remove(&key);
        }
        debug_assert!(self.entries[slot as usize].place == Place::New);
    }

    /// Panics unless lists and sums agree with the entries.
    pub(crate) fn check_invariants(&self) {
        let waiting = self.entries.iter().filter(|entry| entry.place != Place::Nowhere);
        assert_eq!(waiting.clone().count() as u32, self.num_waiting);
        assert_eq!(waiting.clone().map(|entry| entry.num_tokens).sum::<u64>(), self.waiting_tokens);
        let mut num_listed = waiting.filter(|entry| entry.place == Place::Parked).count();
        for (&(priority, tenant), lane) in &self.lanes {
            let mut slot = lane.first;
            let mut previous = NO_SLOT;
            let mut num_tokens = 0;
            while slot != NO_SLOT {
                let entry = self.entries[slot as usize];
                assert_eq!((entry.place, entry.rank.priority, entry.tenant), (Place::New, priority, tenant));
                assert_eq!(entry.previous, previous);
                num_tokens += entry.num_tokens;
                num_listed += 1;
                previous = slot;
                slot = entry.next;
            }
            assert_eq!((previous, num_tokens), (lane.last, lane.num_tokens));
        }
        for (&priority, &head) in &self.heads {
            let entry = self.entries[head as usize];
            assert_eq!((entry.place, entry.rank.priority), (Place::New, priority));
        }
        let resumed = self.resumed.iter().map(|&(_, slot)| self.entries[slot as usize]);
        assert_eq!(resumed.clone().map(|entry| entry.num_tokens).sum::<u64>(), self.resumed_tokens);
        assert!(resumed.clone().all(|entry| entry.place == Place::Resumed));
        assert_eq!((num_listed + resumed.count()) as u32, self.num_waiting);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank(priority: i32, arrival: u64) -> Rank {
        Rank { priority, arrival, choice: 0 }
    }

    /// Plays arrivals (priority, tenant, tokens) and returns the order in which they leave, charged when they do.
    fn order(arrivals: &[(i32, u32, u64)]) -> Vec<u32> {
        let mut queue = WaitingQueue::default();
        for (slot, &(priority, tenant, num_tokens)) in arrivals.iter().enumerate() {
            let tenant = queue.tenants.enter(TenantId(tenant));
            queue.push_new(slot as u32, rank(priority, slot as u64), tenant, num_tokens);
        }
        let mut order = Vec::new();
        while let Some(slot) = queue.head() {
            queue.check_invariants();
            let tenant = queue.entries[slot as usize].tenant;
            queue.tenants.admit(tenant);
            let num_tokens = queue.remove(slot);
            queue.tenants.charge(tenant, num_tokens as u32);
            order.push(slot);
        }
        assert_eq!((queue.num_waiting(), queue.waiting_tokens()), (0, 0));
        order
    }

    #[test]
    fn one_tenant_is_served_in_order_of_arrival_within_a_priority() {
        assert_eq!(order(&[(0, 5, 9), (0, 5, 1), (0, 5, 4), (0, 5, 2)]), [0, 1, 2, 3]);
        assert_eq!(order(&[(1, 5, 9), (0, 5, 1), (-1, 5, 4), (0, 5, 2)]), [2, 1, 3, 0]);
    }

    #[test]
    fn tenants_take_turns_by_tokens() {
        assert_eq!(order(&[(0, 1, 10), (0, 1, 10), (0, 1, 10), (0, 2, 10), (0, 3, 10)]), [0, 3, 4, 1, 2]);
        assert_eq!(order(&[(0, 1, 30), (0, 1, 10), (0, 2, 10), (0, 2, 10), (0, 2, 10), (0, 2, 10)])[..4], [0, 2, 3, 4]);
    }

    #[test]
    fn a_blocked_head_stays_the_head_until_a_better_priority_comes() {
        let mut queue = WaitingQueue::default();
        let big = queue.tenants.enter(TenantId(1));
        let small = queue.tenants.enter(TenantId(2));
        queue.push_new(0, rank(0, 0), big, 1_000);
        assert_eq!(queue.head(), Some(0));
        queue.push_new(1, rank(0, 1), small, 1);
        queue.tenants.charge(big, 1_000_000);
        assert_eq!(queue.head(), Some(0));
        queue.push_new(2, rank(-1, 2), small, 1);
        assert_eq!(queue.head(), Some(2));
        queue.push_resumed(3, rank(0, 3), small, 1);
        assert_eq!(queue.head(), Some(2));
        queue.remove(2);
        assert_eq!(queue.head(), Some(3));
        queue.remove(3);
        assert_eq!(queue.head(), Some(0));
        queue.remove(0);
        assert_eq!(queue.head(), Some(1));
    }

    #[test]
    fn whoever_leaves_from_the_middle_leaves_no_trace() {
        let mut queue = WaitingQueue::default();
        let tenant = queue.tenants.enter(TenantId(0));
        for slot in 0..5 {
            queue.push_new(slot, rank(0, u64::from(slot)), tenant, 1);
        }
        for slot in [2, 0, 4] {
            queue.remove(slot);
            queue.check_invariants();
        }
        queue.park(2, rank(0, 9), tenant, 1);
        assert_eq!((queue.head(), queue.num_waiting()), (Some(1), 3));
        for slot in [1, 3, 2] {
            queue.remove(slot);
        }
        assert_eq!((queue.head(), queue.lanes.len()), (None, 0));
    }

    #[test]
    fn a_tenant_waits_for_its_share_and_for_better_priorities_only() {
        let mut queue = WaitingQueue::default();
        let flood = queue.tenants.enter(TenantId(1));
        for slot in 0..100 {
            queue.push_new(slot, rank(0, u64::from(slot)), flood, 10);
        }
        assert_eq!(queue.tokens_ahead(0, TenantId(1)), 1_000);
        assert_eq!(queue.tokens_ahead(-1, TenantId(1)), 0);
        assert_eq!(queue.tokens_ahead(0, TenantId(2)), 0);
        let quiet = queue.tenants.enter(TenantId(2));
        queue.push_new(100, rank(0, 100), quiet, 10);
        assert_eq!(queue.tokens_ahead(0, TenantId(2)), 20);
    }
}
