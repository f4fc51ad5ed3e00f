//! The scheduler's state, and how sequences enter and leave it. `planning.rs` decides what runs, `applying.rs` takes
//! in what came back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::kv_groups::KvGroups;
use crate::pace::Pace;
use crate::plan::{Event, EventKind, RowId, ScheduledSequence, StepPlan};
use crate::queue::WaitingQueue;
use crate::sequence::{Details, NO_ROW, NO_SLOT, Rank, Sequence, Slot, State};
use crate::stats::{BlockStats, SchedulerStats};
use crate::{ConfigError, FinishReason, MAX_KV_GROUPS, Policy, Request, RequestId, SchedulerConfig, SubmitError, Time};

/// Vectors of ended sequences up to this capacity are kept for the next one.
const MAX_KEPT_CAPACITY: usize = 4096;

/// Decides what runs in each step. See the crate's text for how it is driven.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) config: SchedulerConfig,
    pub(crate) kv: KvGroups,
    pub(crate) queue: WaitingQueue,
    pub(crate) pace: Pace,

    /// State of all live sequences, by slot: what every step reads, and the rest.
    pub(crate) sequences: Vec<Sequence>,
    pub(crate) details: Vec<Details>,
    vacant_slots: Vec<Slot>,
    num_live: u32,
    /// First live choice of each live request.
    requests: BTreeMap<RequestId, Slot>,
    num_arrivals: u64,
    pub(crate) num_admissions: u64,
    deadlines: BTreeSet<(Time, Slot)>,

    /// Slots in state `Running`, in order of their first admission.
    pub(crate) running: Vec<Slot>,
    pub(crate) num_preempting: u32,
    pub(crate) num_draining: u32,
    /// Slot that has the row.
    pub(crate) row_slots: Vec<Slot>,
    pub(crate) free_rows: Vec<u32>,
    /// Rows given up since the last plan.
    pub(crate) released: Vec<RowId>,

    pub(crate) next_step: u64,
    pub(crate) num_unapplied: u32,
    /// Buffers of applied plans.
    pub(crate) spare_plans: Vec<StepPlan>,
    /// Entries of the plan in the making that have more than one token: they follow the others.
    pub(crate) chunks: Vec<ScheduledSequence>,
    pub(crate) events: Vec<Event>,
    pub(crate) counters: SchedulerStats,
}

impl Scheduler {
    /// Reserves what the steps will need. Fails when the configuration cannot work.
    pub fn new(config: SchedulerConfig) -> Result<Self, ConfigError> {
        config.validate()?;
        let num_rows = config.max_num_seqs as usize;
        // Between two plans every row can be given up, and be admitted anew within the plan.
        let num_released = 2 * num_rows;
        // A step appends one block a row, and as many as its tokens fill; tables that are shared or read again grow
        // the buffer when it happens.
        let num_new_blocks =
            (num_rows + (config.max_num_batched_tokens / config.block_size) as usize + 1) * config.kv_groups.len();
        let spare_plans = (0..3).map(|_| {
            let mut plan = StepPlan::with_capacity(num_rows, num_new_blocks);
            plan.released.reserve(num_released);
            plan
        });
        Ok(Self {
            kv: KvGroups::new(&config),
            queue: WaitingQueue::default(),
            pace: Pace::default(),
            sequences: Vec::with_capacity(num_rows),
            details: Vec::with_capacity(num_rows),
            vacant_slots: Vec::with_capacity(num_rows),
            num_live: 0,
            requests: BTreeMap::new(),
            num_arrivals: 0,
            num_admissions: 0,
            deadlines: BTreeSet::new(),
            running: Vec::with_capacity(num_rows),
            num_preempting: 0,
            num_draining: 0,
            row_slots: vec![NO_SLOT; num_rows],
            free_rows: (0..config.max_num_seqs).rev().collect(),
            released: Vec::with_capacity(num_released),
            next_step: 0,
            num_unapplied: 0,
            spare_plans: spare_plans.collect(),
            chunks: Vec::with_capacity(num_rows),
            events: Vec::with_capacity(4 * num_rows),
            counters: SchedulerStats::default(),
            config,
        })
    }

    /// What it was made with.
    #[must_use]
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// Takes a request into the queue, or says why not. Choices of a taken request end with one `Finished` event each.
    pub fn submit(&mut self, request: Request, now: Time) -> Result<(), SubmitError> {
        // Deadlines are looked at when a plan is made: one that has passed ends the request there, like any other.
        let _ = now;
        self.check(&request)?;
        if let Some(reason) = ended_before(&request) {
            self.events.push(Event {
                request: request.id,
                choice_index: request.choice_offset,
                kind: EventKind::Finished { reason, num_generated_tokens: request.generated.len() as u32 },
            });
            return Ok(());
        }
        let num_tokens = (request.prompt.len() + request.generated.len()) as u32;
        let fork_len = self.fork_len(request.prompt.len() as u32);
        let tail_tokens = u64::from(num_tokens - fork_len.min(num_tokens));
        let num_others = request.sampling.num_choices - 1;
        self.check_queue(&request, u64::from(num_tokens) + u64::from(num_others) * tail_tokens)?;

        let request = Arc::new(request);
        let arrival = self.num_arrivals;
        self.num_arrivals += 1;
        let priority = self.priority(&request);
        let mut previous = NO_SLOT;
        for choice in 0..=num_others {
            let rank = Rank { arrival, choice };
            let slot = self.occupy(&request, rank);
            self.details[slot as usize].previous_choice = previous;
            match previous {
                NO_SLOT => drop(self.requests.insert(request.id, slot)),
                previous => self.details[previous as usize].next_choice = slot,
            }
            previous = slot;
            let tenant = self.sequences[slot as usize].tenant;
            if choice == 0 || fork_len == 0 {
                self.sequences[slot as usize].transition(State::Waiting);
                self.queue.push_new(slot, priority, rank, tenant, u64::from(num_tokens));
                self.details[slot as usize].leads = num_others > 0 && fork_len > 0;
            } else {
                self.sequences[slot as usize].transition(State::Parked);
                self.queue.park(slot, rank, tenant, tail_tokens);
            }
        }
        Ok(())
    }

    /// Ends a request, in whatever state its choices are. Those that no plan in flight uses are finished at once, the
    /// others when the plans in flight are applied. False when there was nothing to end.
    pub fn abort(&mut self, id: RequestId) -> bool {
        let mut slot = self.requests.get(&id).copied().unwrap_or(NO_SLOT);
        let mut has_ended = false;
        while slot != NO_SLOT {
            let next = self.details[slot as usize].next_choice;
            if self.sequences[slot as usize].state != State::Draining {
                self.finish(slot, FinishReason::Cancelled);
                has_ended = true;
            }
            slot = next;
        }
        has_ended
    }

    /// Ends one choice of a request, as [`Scheduler::abort`] ends all of them. False when there was nothing to end.
    pub fn abort_choice(&mut self, id: RequestId, choice_index: u32) -> bool {
        let mut slot = self.requests.get(&id).copied().unwrap_or(NO_SLOT);
        while slot != NO_SLOT && self.sequences[slot as usize].choice_index != choice_index {
            slot = self.details[slot as usize].next_choice;
        }
        if slot == NO_SLOT || self.sequences[slot as usize].state == State::Draining {
            return false;
        }
        self.finish(slot, FinishReason::Cancelled);
        true
    }

    /// Moves what happened since the last call to the end of `out`, in order. Costs nothing where `out` is empty.
    pub fn drain_events(&mut self, out: &mut Vec<Event>) {
        if out.is_empty() {
            std::mem::swap(out, &mut self.events);
        } else {
            out.append(&mut self.events);
        }
    }

    /// Whether any sequence is alive, or a plan is in flight.
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.num_live > 0 || self.num_unapplied > 0
    }

    /// State and counters now. Cheap: a few dozen loads, no allocation.
    #[must_use]
    pub fn stats(&self) -> SchedulerStats {
        let mut blocks = [BlockStats::default(); MAX_KV_GROUPS];
        for (group, stats) in blocks.iter_mut().enumerate().take(self.kv.num_groups()) {
            *stats = self.kv.stats(group);
        }
        SchedulerStats {
            num_waiting: self.queue.num_waiting(),
            num_running: self.config.max_num_seqs - self.free_rows.len() as u32,
            waiting_tokens: self.queue.waiting_tokens(),
            queue_pace: self.pace.measured(),
            num_tenants: self.queue.tenants.num_live(),
            blocks,
            num_kv_groups: self.kv.num_groups() as u32,
            num_steps: self.next_step,
            ..self.counters
        }
    }

    /// Panics unless the state is sound. Looks at every block: for tests. An idle engine asks [`Scheduler::check_idle`].
    pub fn check_invariants(&self) {
        self.queue.check_invariants();
        let rows = (0..self.config.max_num_seqs).filter(|&row| self.row_slots[row as usize] != NO_SLOT);
        self.kv.check_invariants(rows.clone());
        assert_eq!(rows.clone().count() + self.free_rows.len(), self.row_slots.len(), "a row is lost");
        for row in rows {
            let slot = self.row_slots[row as usize];
            let sequence = &self.sequences[slot as usize];
            assert_eq!(sequence.row, row);
            assert_eq!(sequence.capacity, self.kv.len(row) * self.config.block_size);
            assert!(sequence.num_planned <= sequence.capacity);
        }
        let mut counts = [0; 6];
        for (slot, sequence) in self.sequences.iter().enumerate() {
            counts[sequence.state as usize] += 1;
            let details = &self.details[slot];
            assert_eq!(sequence.state == State::Vacant, details.request.is_none());
            if sequence.state == State::Vacant {
                continue;
            }
            let request = details.request();
            assert_eq!(sequence.num_tokens as usize, request.prompt.len() + details.generated.len());
            assert!(u32::from(sequence.num_in_flight) <= self.num_unapplied);
            assert!(sequence.num_pending <= sequence.num_in_flight && sequence.num_void <= sequence.num_in_flight);
            let has_row = matches!(sequence.state, State::Running | State::Preempting | State::Draining);
            assert_eq!(sequence.row != NO_ROW, has_row);
            if sequence.num_in_flight == 0 {
                assert!(matches!(sequence.state, State::Running | State::Waiting | State::Parked));
                assert_eq!((sequence.num_planned, sequence.num_pending), (sequence.num_computed, 0));
            }
            if sequence.state != State::Draining {
                assert!(sequence.num_tokens < sequence.max_len && sequence.num_computed < sequence.num_tokens);
            }
            let deadline = request.deadline.filter(|_| sequence.state != State::Draining);
            assert!(deadline.is_none_or(|deadline| self.deadlines.contains(&(deadline, slot as Slot))));
        }
        let count = |state: State| counts[state as usize];
        assert_eq!(count(State::Running), self.running.len() as u32);
        assert_eq!(count(State::Preempting), self.num_preempting);
        assert_eq!(count(State::Draining), self.num_draining);
        assert_eq!(count(State::Parked) + count(State::Waiting), self.queue.num_waiting());
        assert_eq!(count(State::Vacant), self.vacant_slots.len() as u32);
        assert_eq!(counts.iter().sum::<u32>() - count(State::Vacant), self.num_live);
        assert!(self.running.is_sorted_by_key(|&slot| self.details[slot as usize].admission));
        self.check_choices();
    }

    /// Panics unless every list of live things is empty, and every list of free ones full.
    pub(crate) fn check_nothing_is_listed(&self) {
        self.queue.check_empty();
        assert!(self.requests.is_empty() && self.deadlines.is_empty() && self.running.is_empty());
        assert_eq!((self.num_preempting, self.num_draining, self.queue.tenants.num_live()), (0, 0, 0));
        assert_eq!(self.vacant_slots.len(), self.sequences.len(), "a slot is lost");
        assert_eq!(self.free_rows.len(), self.row_slots.len(), "a row is lost");
    }

    /// Every live choice is in its request's list, and while one is parked exactly one leads.
    fn check_choices(&self) {
        let mut num_listed = 0;
        for (id, &first) in &self.requests {
            let (mut slot, mut previous) = (first, NO_SLOT);
            let (mut num_parked, mut num_leading) = (0, 0);
            while slot != NO_SLOT {
                let (sequence, details) = (&self.sequences[slot as usize], &self.details[slot as usize]);
                assert_eq!((sequence.request, details.previous_choice), (*id, previous));
                num_parked += u32::from(sequence.state == State::Parked);
                num_leading += u32::from(details.leads);
                num_listed += 1;
                previous = slot;
                slot = details.next_choice;
            }
            assert!(num_leading <= 1 && (num_parked == 0 || num_leading == 1), "nobody leads {num_parked} choices");
        }
        assert_eq!(num_listed, self.num_live);
    }

    /// Tokens at the front of a prompt that its choices share: all full blocks, as long as one token remains.
    pub(crate) fn fork_len(&self, prompt_len: u32) -> u32 {
        (prompt_len - 1) / self.config.block_size * self.config.block_size
    }

    fn priority(&self, request: &Request) -> i32 {
        match self.config.policy {
            Policy::Fcfs => 0,
            Policy::Priority => request.priority,
        }
    }

    /// Whether the request could be served by an empty server.
    fn check(&self, request: &Request) -> Result<(), SubmitError> {
        let invalid = |field, why| Err(SubmitError::Invalid { field, why });
        if request.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if request.max_tokens == 0 {
            return invalid("max_tokens", "must be at least 1");
        }
        let num_tokens = request.prompt.len() as u64 + u64::from(request.max_tokens);
        if num_tokens > u64::from(self.config.max_model_len) {
            return Err(SubmitError::TooLong { num_tokens, max_model_len: self.config.max_model_len });
        }
        if request.generated.len() as u64 > u64::from(request.max_tokens) {
            return invalid("generated", "must not be longer than max_tokens");
        }
        let num_choices = request.sampling.num_choices;
        if num_choices == 0 {
            return invalid("num_choices", "must be at least 1");
        }
        if !request.generated.is_empty() && num_choices != 1 {
            return invalid("num_choices", "must be 1 for a request that continues one choice");
        }
        if request.choice_offset.checked_add(num_choices).is_none() {
            return invalid("choice_offset", "must leave room for num_choices");
        }
        if self.requests.contains_key(&request.id) {
            return invalid("id", "is in use by a live request");
        }
        Ok(())
    }

    /// Whether the queue has room for `num_tokens` more of the request's tenant.
    fn check_queue(&self, request: &Request, num_tokens: u64) -> Result<(), SubmitError> {
        let limit = self.config.max_waiting_tokens;
        if num_tokens > limit {
            return Err(SubmitError::Invalid { field: "num_choices", why: "must fit into the queue all together" });
        }
        let tenants = &self.queue.tenants;
        let waiting_tokens = self.queue.waiting_tokens();
        let total = waiting_tokens + num_tokens;
        let share = limit / u64::from(tenants.num_waiting_with(request.tenant));
        let is_in_share = tenants.waiting_tokens(request.tenant) + num_tokens <= share && total <= 2 * limit;
        if total > limit && !is_in_share {
            let retry_after_micros = self.pace.retry_after_micros(total - limit);
            return Err(SubmitError::QueueFull { waiting_tokens, limit, retry_after_micros });
        }
        let ahead = self.queue.tokens_ahead(self.priority(request), request.tenant);
        if let (Some(limit_micros), Some(wait_micros)) = (self.config.max_waiting_micros, self.pace.predict(ahead))
            && wait_micros > limit_micros
        {
            let retry_after_micros = Pace::clamp_retry(wait_micros - limit_micros);
            return Err(SubmitError::WaitTooLong { wait_micros, limit_micros, retry_after_micros });
        }
        Ok(())
    }

    /// Sets up a slot for one choice; the caller gives it its state.
    fn occupy(&mut self, request: &Arc<Request>, rank: Rank) -> Slot {
        let slot = self.vacant_slots.pop().unwrap_or_else(|| {
            self.sequences.push(Sequence::VACANT);
            self.details.push(Details::default());
            self.sequences.len() as Slot - 1
        });
        let prompt_len = request.prompt.len() as u32;
        self.sequences[slot as usize] = Sequence {
            prompt_len,
            num_tokens: prompt_len + request.generated.len() as u32,
            max_len: prompt_len + request.max_tokens,
            min_len: prompt_len.saturating_add(request.min_tokens),
            tenant: self.queue.tenants.enter(request.tenant),
            request: request.id,
            choice_index: request.choice_offset + rank.choice,
            stop_filter: request.stop_token_ids.iter().fold(0, |filter, token| filter | 1 << (token % 32)),
            ..Sequence::VACANT
        };
        let details = &mut self.details[slot as usize];
        details.generated.extend_from_slice(&request.generated);
        details.rank = rank;
        details.next_choice = NO_SLOT;
        // The first choice reports the prompt's, once: where tokens were generated elsewhere, they were reported there.
        let reports_prompt =
            request.sampling.prompt_logprobs.is_some() && rank.choice == 0 && request.generated.is_empty();
        details.next_prompt_logprob = if reports_prompt { 1 } else { u32::MAX };
        details.request = Some(Arc::clone(request));
        if let Some(deadline) = request.deadline {
            self.deadlines.insert((deadline, slot));
        }
        self.num_live += 1;
        slot
    }

    /// Ends sequences whose deadline has passed.
    pub(crate) fn expire(&mut self, now: Time) {
        while let Some(&(deadline, slot)) = self.deadlines.first()
            && deadline <= now
        {
            self.finish(slot, FinishReason::DeadlineExceeded);
        }
    }

    /// Ends a sequence: at once when no plan in flight uses it, otherwise it drains.
    pub(crate) fn finish(&mut self, slot: Slot, reason: FinishReason) {
        let sequence = &self.sequences[slot as usize];
        match sequence.state {
            State::Parked | State::Waiting => drop(self.queue.remove(slot)),
            State::Running => self.leave_running(slot),
            State::Preempting => self.num_preempting -= 1,
            State::Draining | State::Vacant => panic!("{:?} cannot end", sequence.state),
        }
        let details = &mut self.details[slot as usize];
        details.finish = Some(reason);
        let deadline = details.request().deadline;
        let leads = std::mem::take(&mut details.leads);
        if let Some(deadline) = deadline {
            self.deadlines.remove(&(deadline, slot));
        }
        if leads {
            self.promote(slot);
        }
        let sequence = &mut self.sequences[slot as usize];
        if sequence.num_in_flight > 0 {
            sequence.transition(State::Draining);
            self.num_draining += 1;
        } else {
            self.retire(slot);
        }
    }

    /// Frees all that an ended sequence had, and reports its end.
    pub(crate) fn retire(&mut self, slot: Slot) {
        if self.sequences[slot as usize].row != NO_ROW {
            self.release_row(slot);
        }
        let sequence = &mut self.sequences[slot as usize];
        if sequence.state == State::Draining {
            self.num_draining -= 1;
        }
        sequence.transition(State::Vacant);
        let details = &mut self.details[slot as usize];
        self.events.push(Event {
            request: sequence.request,
            choice_index: sequence.choice_index,
            kind: EventKind::Finished {
                reason: details.finish.take().expect("finish set it"),
                num_generated_tokens: details.generated.len() as u32,
            },
        });
        self.queue.tenants.leave(sequence.tenant);
        let (request, previous, next) = (sequence.request, details.previous_choice, details.next_choice);
        // Keep the vectors' memory for the slot's next sequence, but not that of an uncommonly long one.
        let mut generated = std::mem::take(&mut details.generated);
        let mut hashes = std::mem::take(&mut details.hashes);
        generated.clear();
        hashes.clear();
        generated.shrink_to(MAX_KEPT_CAPACITY);
        hashes.shrink_to(MAX_KEPT_CAPACITY / 16);
        *details = Details { generated, hashes, ..Details::default() };
        match (previous, next) {
            (NO_SLOT, NO_SLOT) => drop(self.requests.remove(&request)),
            (NO_SLOT, next) => drop(self.requests.insert(request, next)),
            (previous, next) => self.details[previous as usize].next_choice = next,
        }
        if next != NO_SLOT {
            self.details[next as usize].previous_choice = previous;
        }
        self.vacant_slots.push(slot);
        self.num_live -= 1;
    }

    pub(crate) fn leave_running(&mut self, slot: Slot) {
        let index = self.running.iter().position(|&other| other == slot).expect("a running sequence is listed");
        self.running.remove(index);
    }

    /// Gives back row and blocks.
    pub(crate) fn release_row(&mut self, slot: Slot) {
        let sequence = &mut self.sequences[slot as usize];
        let row = std::mem::replace(&mut sequence.row, NO_ROW);
        self.kv.release_row(row);
        self.row_slots[row as usize] = NO_SLOT;
        self.free_rows.push(row);
        self.released.push(RowId(row));
    }

    /// The choice that computed the prompt is gone before it was done: another one takes over.
    fn promote(&mut self, slot: Slot) {
        let Some(heir) = self.choices(slot).find(|&other| self.sequences[other as usize].state == State::Parked) else {
            return;
        };
        self.queue.remove(heir);
        let sequence = &mut self.sequences[heir as usize];
        sequence.transition(State::Waiting);
        let details = &mut self.details[heir as usize];
        details.leads = true;
        self.queue.push_resumed(heir, details.rank, sequence.tenant, u64::from(sequence.num_tokens));
    }

    /// The prompt is computed: the other choices may fork from it.
    pub(crate) fn unpark(&mut self, leader: Slot) {
        self.details[leader as usize].leads = false;
        let fork_len = self.fork_len(self.sequences[leader as usize].prompt_len);
        let num_hashes = self.details[leader as usize].hashes.len().min((fork_len / self.config.block_size) as usize);
        let mut slot = self.choices(leader).next().unwrap_or(NO_SLOT);
        while slot != NO_SLOT {
            let next = self.details[slot as usize].next_choice;
            if self.sequences[slot as usize].state == State::Parked {
                let num_tokens = self.queue.remove(slot);
                let sequence = &mut self.sequences[slot as usize];
                sequence.transition(State::Waiting);
                let [of_leader, details] =
                    self.details.get_disjoint_mut([leader as usize, slot as usize]).expect("the leader is not parked");
                details.hashes.extend_from_slice(&of_leader.hashes[..num_hashes]);
                self.queue.push_resumed(slot, details.rank, sequence.tenant, num_tokens);
            }
            slot = next;
        }
    }

    /// All live choices of the slot's request, from the first on.
    pub(crate) fn choices(&self, slot: Slot) -> impl Iterator<Item = Slot> + '_ {
        let first = self.requests.get(&self.sequences[slot as usize].request).copied();
        let next = |&slot: &Slot| Some(self.details[slot as usize].next_choice).filter(|&slot| slot != NO_SLOT);
        std::iter::successors(first, next)
    }
}

/// Why a request that continues another replica's output has nothing left to generate.
fn ended_before(request: &Request) -> Option<FinishReason> {
    let num_generated = request.generated.len() as u64;
    let token_id = *request.generated.last()?;
    if num_generated >= u64::from(request.min_tokens) && request.stop_token_ids.contains(&token_id) {
        return Some(FinishReason::Stop { token_id });
    }
    (num_generated == u64::from(request.max_tokens)).then_some(FinishReason::Length)
}
