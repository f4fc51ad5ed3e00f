//! `Scheduler::plan`: who runs in the next step, and on which blocks.
//!
//! Blocks are given out in order of first admission, so the oldest can take from everybody behind it and always proceeds,
//! and nobody loses blocks to a newcomer, of whatever tenant or priority; each preemption shortens the list of those who could be preempted. Nobody is admitted in a step in which a running
//! sequence did not get its blocks.

use std::sync::Arc;

use crate::Time;
use crate::kv_groups::Source;
use crate::plan::{Admission, Event, EventKind, RowId, ScheduledSequence, StepId, StepPlan};
use crate::scheduler::Scheduler;
use crate::sequence::{Slot, State};

/// Room for generated tokens that a sequence gets when it starts to run; past it, its vector doubles now and then.
const RESERVED_TOKENS: u32 = 4096;

impl Scheduler {
    /// Decides the next step. At most one plan may be unapplied when this is called.
    ///
    /// Running sequences come first: one token for each that decodes, then chunks of prompts within what the budget
    /// leaves; then waiting ones are admitted. Sequences whose deadline is `now` or before end here.
    pub fn plan(&mut self, now: Time) -> StepPlan {
        assert!(self.num_unapplied <= 1, "two plans are in flight: apply one before the next is made");
        self.expire(now);
        let mut plan = self.spare_plans.pop().unwrap_or_else(|| StepPlan::with_capacity(0, 0));
        plan.step_id = StepId(self.next_step);
        self.next_step += 1;
        self.num_unapplied += 1;

        self.kv.clear_promises();
        let is_decode = |&&slot: &&Slot| self.sequences[slot as usize].num_schedulable() == 1;
        let num_decodes = self.running.iter().filter(is_decode).count() as u32;
        let mut chunk_budget = self.config.max_num_batched_tokens - num_decodes;
        let all_fit = self.plan_running(&mut chunk_budget, &mut plan);
        if all_fit {
            self.plan_waiting(chunk_budget, &mut plan);
        }
        plan.sequences.append(&mut self.chunks);
        // Only now: whoever was preempted for this plan gives up its row in this plan.
        std::mem::swap(&mut plan.released, &mut self.released);
        self.counters.num_scheduled_tokens += u64::from(plan.num_scheduled_tokens);
        plan
    }

    /// Schedules running sequences, in order of first admission. False when one of them did not get its blocks.
    fn plan_running(&mut self, chunk_budget: &mut u32, plan: &mut StepPlan) -> bool {
        let mut all_fit = true;
        let mut index = 0;
        // Preemption shortens the list, behind the sequence that it serves.
        while let Some(&slot) = self.running.get(index) {
            index += 1;
            let sequence = &self.sequences[slot as usize];
            let wanted = sequence.num_schedulable();
            let count = if wanted == 1 { 1 } else { wanted.min(*chunk_budget) };
            let start = plan.new_blocks.len() as u32;
            if count > 0 {
                let end = sequence.num_planned + count;
                if sequence.readmit {
                    self.kv.copy_tables(sequence.row, &mut plan.new_blocks);
                }
                // Where somebody before it waits for blocks, it takes none.
                if end > sequence.capacity && !(all_fit && self.cover(slot, end, plan)) {
                    plan.new_blocks.truncate(start as usize);
                    all_fit = false;
                    continue;
                }
                if self.sequences[slot as usize].readmit {
                    self.readmit(slot, plan);
                }
                self.schedule(slot, count, start, plan);
            }
            if wanted > 1 {
                *chunk_budget -= count;
                if wanted > count {
                    let sequence = &self.sequences[slot as usize];
                    self.kv.promise(sequence.row, sequence.num_tokens);
                }
            }
        }
        all_fit
    }

    /// Makes the sequence's tables reach `end` positions, at the cost of those admitted later. False when blocks
    /// are missing that only the plans in flight will give back.
    #[inline(never)]
    fn cover(&mut self, slot: Slot, end: u32, plan: &mut StepPlan) -> bool {
        let block_size = self.config.block_size;
        let sequence = &self.sequences[slot as usize];
        let (row, num_blocks) = (sequence.row, (end - sequence.capacity).div_ceil(block_size));
        loop {
            if self.kv.append(row, num_blocks, &mut plan.new_blocks) {
                self.sequences[slot as usize].capacity += num_blocks * block_size;
                return true;
            }
            // Blocks are on their way back: wait for them before taking from others.
            if self.num_preempting + self.num_draining > 0 {
                return false;
            }
            match self.running.last() {
                Some(&victim) if victim != slot => self.preempt(victim),
                // The newest keeps what it has; those before it will take it if they need it.
                _ => return false,
            }
        }
    }

    fn preempt(&mut self, slot: Slot) {
        self.leave_running(slot);
        if self.sequences[slot as usize].num_in_flight == 0 {
            self.put_back(slot);
        } else {
            self.sequences[slot as usize].transition(State::Preempting);
            self.num_preempting += 1;
        }
    }

    /// Preempted, and used by no plan in flight: back to the head of waiting, to be computed again.
    pub(crate) fn put_back(&mut self, slot: Slot) {
        self.release_row(slot);
        let sequence = &mut self.sequences[slot as usize];
        if sequence.state == State::Preempting {
            self.num_preempting -= 1;
        }
        sequence.transition(State::Waiting);
        sequence.num_computed = 0;
        sequence.num_planned = 0;
        sequence.capacity = 0;
        sequence.readmit = false;
        let details = &mut self.details[slot as usize];
        details.num_published = 0;
        details.blocked_epoch = None;
        self.queue.push_resumed(slot, details.rank, sequence.tenant, u64::from(sequence.num_tokens));
        self.counters.num_preemptions += 1;
        let (request, choice_index) = (sequence.request, sequence.choice_index);
        self.events.push(Event { request, choice_index, kind: EventKind::Preempted });
    }

    /// The device's row went on from something that did not come true: it starts anew from what is known.
    fn readmit(&mut self, slot: Slot, plan: &mut StepPlan) {
        let sequence = &mut self.sequences[slot as usize];
        sequence.readmit = false;
        self.released.push(RowId(sequence.row));
        plan.admitted.push(self.admission(slot));
    }

    fn admission(&self, slot: Slot) -> Admission {
        let (sequence, details) = (&self.sequences[slot as usize], &self.details[slot as usize]);
        Admission {
            row: RowId(sequence.row),
            request: Arc::clone(details.request()),
            choice_index: sequence.choice_index,
            generated: details.generated.clone(),
        }
    }

    /// Adds the sequence to the plan; its blocks are there.
    fn schedule(&mut self, slot: Slot, count: u32, first_new_block: u32, plan: &mut StepPlan) {
        let sequence = &mut self.sequences[slot as usize];
        let samples = sequence.num_planned + count == sequence.expected_len();
        let scheduled = ScheduledSequence {
            row: RowId(sequence.row),
            num_computed_tokens: sequence.num_planned,
            num_scheduled_tokens: count,
            new_blocks: first_new_block..plan.new_blocks.len() as u32,
            samples,
        };
        sequence.num_planned += count;
        sequence.num_in_flight += 1;
        sequence.num_pending += u8::from(samples);
        self.queue.tenants.charge(sequence.tenant, count);
        plan.num_scheduled_tokens += count;
        if count == 1 {
            plan.sequences.push(scheduled);
        } else {
            self.chunks.push(scheduled);
        }
    }

    /// Admits waiting sequences, strictly in the queue's order, while there are rows, blocks and budget.
    fn plan_waiting(&mut self, mut chunk_budget: u32, plan: &mut StepPlan) {
        while chunk_budget > 0 && !self.free_rows.is_empty() {
            let Some(slot) = self.queue.head() else { return };
            let Some(count) = self.admit(slot, chunk_budget, plan) else { return };
            chunk_budget -= count;
        }
    }

    /// Gives a waiting sequence a row and schedules its first tokens. `None` when there is no room for all its tokens.
    #[inline(never)]
    fn admit(&mut self, slot: Slot, chunk_budget: u32, plan: &mut StepPlan) -> Option<u32> {
        let block_size = self.config.block_size;
        let sequence = &self.sequences[slot as usize];
        let details = &mut self.details[slot as usize];
        if details.blocked_epoch == Some(self.kv.release_epoch()) {
            return None;
        }
        let (num_tokens, prompt_len) = (sequence.num_tokens, sequence.prompt_len);
        // Log probabilities of the prompt's tokens come from computing them.
        let must_compute = details.next_prompt_logprob < prompt_len;
        // One token at least is computed, to sample from.
        let max_hit = (num_tokens - 1) / block_size;
        let looks_up = self.config.enable_prefix_cache && !must_compute;
        let mut num_hit = 0;
        if looks_up {
            details.extend_hashes(max_hit, prompt_len, block_size);
            num_hit = self.kv.longest_prefix(&details.hashes[..max_hit as usize]);
        }
        let donor = if must_compute { None } else { self.find_donor(slot, num_hit) };
        let source = match donor {
            Some((row, len)) => Source::Row { row, len },
            None => Source::Cache(&self.details[slot as usize].hashes[..num_hit as usize]),
        };
        // Each running sequence may need a block soon: without this, the newcomer would be preempted at once.
        if !self.kv.has_room(source, num_tokens, self.running.len() as u32) {
            self.details[slot as usize].blocked_epoch = Some(self.kv.release_epoch());
            return None;
        }

        let row = self.free_rows.pop()?;
        self.kv.share(row, source);
        let num_shared = source.len();
        let num_cached_tokens = num_shared * block_size;
        if looks_up {
            self.counters.prefix_query_tokens += u64::from(num_tokens);
            self.counters.prefix_hit_tokens += u64::from(num_hit * block_size);
        }
        let drained_tokens = self.queue.remove(slot);
        self.pace.drain(drained_tokens);
        self.row_slots[row as usize] = slot;
        let sequence = &mut self.sequences[slot as usize];
        sequence.transition(State::Running);
        sequence.row = row;
        sequence.num_computed = num_cached_tokens;
        sequence.num_planned = num_cached_tokens;
        sequence.next_boundary = num_cached_tokens + block_size;
        let count = chunk_budget.min(num_tokens - num_cached_tokens);
        let num_new = count.div_ceil(block_size);
        sequence.capacity = num_cached_tokens + num_new * block_size;
        self.queue.tenants.admit(sequence.tenant);
        let details = &mut self.details[slot as usize];
        details.num_published = num_shared;
        details.blocked_epoch = None;
        let num_left = sequence.max_len - num_tokens;
        details.generated.reserve(num_left.min(RESERVED_TOKENS) as usize);
        if self.config.enable_prefix_cache {
            let max_blocks = (num_tokens + num_left.min(RESERVED_TOKENS)) / block_size;
            details.hashes.reserve((max_blocks as usize).saturating_sub(details.hashes.len()));
        }
        if !std::mem::replace(&mut details.was_scheduled, true) {
            details.admission = self.num_admissions;
            self.num_admissions += 1;
            let kind = EventKind::Scheduled { num_cached_tokens };
            self.events.push(Event { request: sequence.request, choice_index: sequence.choice_index, kind });
        }
        let admission = details.admission;
        let index = self.running.partition_point(|&other| self.details[other as usize].admission < admission);
        self.running.insert(index, slot);

        let start = plan.new_blocks.len() as u32;
        self.kv.copy_tables(row, &mut plan.new_blocks);
        let is_covered = self.kv.append(row, num_new, &mut plan.new_blocks);
        assert!(is_covered, "has_room counted the blocks");
        plan.admitted.push(self.admission(slot));
        self.schedule(slot, count, start, plan);
        if num_cached_tokens + count < num_tokens {
            self.kv.promise(row, num_tokens);
        }
        if self.details[slot as usize].leads && num_cached_tokens >= self.fork_len(prompt_len) {
            self.unpark(slot);
        }
        Some(count)
    }

    /// Another choice of the request from whose row more than `num_hit` blocks of the prompt can be shared.
    fn find_donor(&self, slot: Slot, num_hit: u32) -> Option<(u32, u32)> {
        let request = self.details[slot as usize].request();
        let fork_len = self.fork_len(request.prompt.len() as u32);
        let num_blocks = fork_len / self.config.block_size;
        if request.sampling.num_choices == 1 || num_blocks <= num_hit {
            return None;
        }
        let is_donor = |&other: &Slot| {
            let sequence = &self.sequences[other as usize];
            sequence.state == State::Running
                && sequence.num_computed >= fork_len
                && self.kv.can_fork(sequence.row, num_blocks)
        };
        let donor = self.choices(slot).find(is_donor)?;
        Some((self.sequences[donor as usize].row, num_blocks))
    }
}
