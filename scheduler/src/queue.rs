//! The waiting queue and the order of admission.
//!
//! Two kinds of sequences wait. Those that had begun (preempted ones, and further choices of a prompt that is computed)
//! stand at the head, in order of arrival. New ones stand in one lane per tenant and priority: the tenant that was served
//! least is next, of its lanes the one of the lowest priority value, within the lane the first to arrive. So a priority
//! orders a tenant's own requests and nobody else's. With one tenant and one priority that is the order of arrival.
//!
//! Once it is a tenant's turn it stays so until a sequence of it is admitted, or the one that was next leaves: a large
//! request that must wait for room is not passed by small ones of others.

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
    priority: i32,
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
    /// By tenant and priority.
    lanes: BTreeMap<(TenantIndex, i32), Lane>,
    lane_tokens: u64,
    resumed: BTreeSet<(Rank, Slot)>,
    resumed_tokens: u64,
    /// By slot.
    entries: Vec<Entry>,
    /// Whose new sequence is next.
    turn: Option<TenantIndex>,
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

    /// A new sequence, behind the others of its tenant and priority.
    pub(crate) fn push_new(&mut self, slot: Slot, priority: i32, rank: Rank, tenant: TenantIndex, num_tokens: u64) {
        let lane = self.lanes.entry((tenant, priority));
        let lane = lane.or_insert(Lane { first: NO_SLOT, last: NO_SLOT, num_tokens: 0 });
        let previous = lane.last;
        match previous {
            NO_SLOT => lane.first = slot,
            previous => self.entries[previous as usize].next = slot,
        }
        lane.last = slot;
        lane.num_tokens += num_tokens;
        self.lane_tokens += num_tokens;
        let entry = Entry { place: Place::New, priority, rank, tenant, num_tokens, previous, next: NO_SLOT };
        self.insert(slot, entry);
    }

    /// A sequence that had begun, or whose prompt another choice has computed: at the head, in order of rank.
    pub(crate) fn push_resumed(&mut self, slot: Slot, rank: Rank, tenant: TenantIndex, num_tokens: u64) {
        self.resumed.insert((rank, slot));
        self.resumed_tokens += num_tokens;
        let place = Place::Resumed;
        self.insert(slot, Entry { place, priority: 0, rank, tenant, num_tokens, previous: NO_SLOT, next: NO_SLOT });
    }

    /// A sequence that waits for another choice.
    pub(crate) fn park(&mut self, slot: Slot, rank: Rank, tenant: TenantIndex, num_tokens: u64) {
        let place = Place::Parked;
        self.insert(slot, Entry { place, priority: 0, rank, tenant, num_tokens, previous: NO_SLOT, next: NO_SLOT });
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
                if self.turn == Some(entry.tenant) && self.first_of(entry.tenant) == Some(slot) {
                    self.turn = None;
                }
                self.unlink(slot, entry);
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
        if let Some(&(_, slot)) = self.resumed.first() {
            return Some(slot);
        }
        if self.turn.is_none() {
            let key = |&tenant: &TenantIndex| {
                let first = self.first_of(tenant).expect("the tenant has a lane");
                (self.tenants.counter(tenant), self.entries[first as usize].rank)
            };
            self.turn = self.new_tenants().min_by_key(key);
        }
        self.first_of(self.turn?)
    }

    /// The tenant's next new sequence: the first of its lane of the lowest priority value.
    fn first_of(&self, tenant: TenantIndex) -> Option<Slot> {
        let (_, lane) = self.lanes.range((tenant, i32::MIN)..=(tenant, i32::MAX)).next()?;
        Some(lane.first)
    }

    /// Tenants that have a new sequence. A step for each, however many lanes they have.
    fn new_tenants(&self) -> impl Iterator<Item = TenantIndex> + '_ {
        let next = |from: TenantIndex| self.lanes.range((from, i32::MIN)..).next().map(|(&(tenant, _), _)| tenant);
        std::iter::successors(next(0), move |&tenant| next(tenant.checked_add(1)?))
    }

    /// Tokens that leave the queue before a new sequence of this priority and tenant will.
    pub(crate) fn tokens_ahead(&self, priority: i32, tenant: TenantId) -> u64 {
        let own = |priorities| {
            let lanes = self.tenants.index_of(tenant).map(|tenant| {
                let (from, to): (i32, i32) = priorities;
                self.lanes.range((tenant, from)..=(tenant, to))
            });
            lanes.into_iter().flatten().map(|(_, lane)| lane.num_tokens).sum::<u64>()
        };
        let ahead = own((i32::MIN, priority));
        let of_others = self.lane_tokens - own((i32::MIN, i32::MAX));
        // While it waits the others get as much as its tenant does, each.
        let share = ahead * u64::from(self.tenants.num_waiting_with(tenant) - 1);
        self.resumed_tokens + ahead + of_others.min(share)
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
        let key = (entry.tenant, entry.priority);
        let lane = self.lanes.get_mut(&key).expect("a waiting sequence has a lane");
        lane.num_tokens -= entry.num_tokens;
        self.lane_tokens -= entry.num_tokens;
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

    /// Panics unless nobody waits.
    pub(crate) fn check_empty(&self) {
        assert!(self.lanes.is_empty() && self.resumed.is_empty() && self.turn.is_none());
        assert_eq!((self.num_waiting, self.waiting_tokens, self.lane_tokens, self.resumed_tokens), (0, 0, 0, 0));
    }

    /// Panics where the slot waits.
    pub(crate) fn check_absent(&self, slot: usize) {
        assert!(self.entries.get(slot).is_none_or(|entry| entry.place == Place::Nowhere), "slot {slot} waits");
    }

    /// Panics unless lists and sums agree with the entries.
    pub(crate) fn check_invariants(&self) {
        let waiting = self.entries.iter().filter(|entry| entry.place != Place::Nowhere);
        assert_eq!(waiting.clone().count() as u32, self.num_waiting);
        assert_eq!(waiting.clone().map(|entry| entry.num_tokens).sum::<u64>(), self.waiting_tokens);
        let mut num_listed = waiting.filter(|entry| entry.place == Place::Parked).count();
        for (&(tenant, priority), lane) in &self.lanes {
            let mut slot = lane.first;
            let mut previous = NO_SLOT;
            let mut num_tokens = 0;
            while slot != NO_SLOT {
                let entry = self.entries[slot as usize];
                assert_eq!((entry.place, entry.priority, entry.tenant), (Place::New, priority, tenant));
                assert_eq!(entry.previous, previous);
                num_tokens += entry.num_tokens;
                num_listed += 1;
                previous = slot;
                slot = entry.next;
            }
            assert_eq!((previous, num_tokens), (lane.last, lane.num_tokens));
        }
        assert_eq!(self.lanes.values().map(|lane| lane.num_tokens).sum::<u64>(), self.lane_tokens);
        assert!(self.turn.is_none_or(|tenant| self.first_of(tenant).is_some()), "it is the turn of nobody");
        let resumed = self.resumed.iter().map(|&(_, slot)| self.entries[slot as usize]);
        assert_eq!(resumed.clone().map(|entry| entry.num_tokens).sum::<u64>(), self.resumed_tokens);
        assert!(resumed.clone().all(|entry| entry.place == Place::Resumed));
        assert_eq!((num_listed + resumed.count()) as u32, self.num_waiting);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank(arrival: u64) -> Rank {
        Rank { arrival, choice: 0 }
    }

    /// Plays arrivals (priority, tenant, tokens) and returns the order in which they leave, charged when they do.
    fn order(arrivals: &[(i32, u32, u64)]) -> Vec<u32> {
        let mut queue = WaitingQueue::default();
        for (slot, &(priority, tenant, num_tokens)) in arrivals.iter().enumerate() {
            let tenant = queue.tenants.enter(TenantId(tenant));
            queue.push_new(slot as u32, priority, rank(slot as u64), tenant, num_tokens);
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

    /// Whatever priority a tenant gives to its requests, another's do not wait longer for it.
    #[test]
    fn a_priority_orders_a_tenants_own_requests_only() {
        let mut arrivals = vec![(i32::MIN, 1, 10); 6];
        arrivals.push((0, 2, 10));
        arrivals.extend([(5, 3, 10), (4, 3, 10)]);
        assert_eq!(order(&arrivals), [0, 6, 8, 1, 7, 2, 3, 4, 5]);
    }

    #[test]
    fn a_blocked_head_stays_the_head_until_its_own_tenant_has_a_better_one() {
        let mut queue = WaitingQueue::default();
        let big = queue.tenants.enter(TenantId(1));
        let small = queue.tenants.enter(TenantId(2));
        queue.push_new(0, 0, rank(0), big, 1_000);
        assert_eq!(queue.head(), Some(0));
        queue.push_new(1, 0, rank(1), small, 1);
        queue.tenants.charge(big, 1_000_000);
        assert_eq!(queue.head(), Some(0));
        queue.push_new(2, -1, rank(2), small, 1);
        assert_eq!(queue.head(), Some(0));
        queue.push_new(4, -1, rank(4), big, 1);
        assert_eq!(queue.head(), Some(4));
        queue.check_invariants();
        // Whoever had begun goes first.
        queue.push_resumed(3, rank(3), small, 1);
        assert_eq!(queue.head(), Some(3));
        queue.remove(3);
        // Its turn is over once it was served.
        queue.remove(4);
        assert_eq!(queue.head(), Some(2));
        queue.remove(2);
        queue.remove(1);
        assert_eq!(queue.head(), Some(0));
        queue.remove(0);
        assert_eq!(queue.head(), None);
        queue.check_invariants();
    }

    #[test]
    fn whoever_leaves_from_the_middle_leaves_no_trace() {
        let mut queue = WaitingQueue::default();
        let tenant = queue.tenants.enter(TenantId(0));
        for slot in 0..5 {
            queue.push_new(slot, 0, rank(u64::from(slot)), tenant, 1);
        }
        for slot in [2, 0, 4] {
            queue.remove(slot);
            queue.check_invariants();
        }
        queue.park(2, rank(9), tenant, 1);
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
            queue.push_new(slot, 0, rank(u64::from(slot)), flood, 10);
        }
        assert_eq!(queue.tokens_ahead(0, TenantId(1)), 1_000);
        assert_eq!(queue.tokens_ahead(-1, TenantId(1)), 0);
        assert_eq!(queue.tokens_ahead(0, TenantId(2)), 0);
        let quiet = queue.tenants.enter(TenantId(2));
        queue.push_new(100, 0, rank(100), quiet, 10);
        assert_eq!(queue.tokens_ahead(0, TenantId(2)), 20);
        assert_eq!(queue.tokens_ahead(-1, TenantId(2)), 0);
    }
}
