//! `Scheduler::apply`: takes in what a step computed.

use std::iter;

use crate::kv_groups::FullBlock;
use crate::plan::{Event, EventKind, ScheduledSequence, SequenceOutput, StepOutput, StepPlan};
use crate::scheduler::Scheduler;
use crate::sequence::{Slot, State};
use crate::{BlockHash, FinishReason, ShortHash, Time};

impl Scheduler {
    /// Takes in the output of the oldest unapplied plan: advances lengths, publishes full blocks, finds ends.
    ///
    /// The plan's buffers serve a later plan; `output` is left empty, for the device to fill again. Panics when plan
    /// and output do not belong together: a scheduler that no longer knows what the device's cache holds must not
    /// go on.
    pub fn apply(&mut self, mut plan: StepPlan, output: &mut StepOutput, now: Time) {
        let oldest = self.next_step - u64::from(self.num_unapplied);
        assert!(self.num_unapplied > 0 && plan.step_id.0 == oldest, "{:?} is not the oldest in flight", plan.step_id);
        assert_eq!(output.step_id, plan.step_id, "the output is another step's");
        assert_eq!(output.sequences.len(), plan.sequences.len(), "the output is not the plan's");
        self.num_unapplied -= 1;
        if !output.prompt_logprobs.is_empty() {
            self.report_prompt_logprobs(&plan, output);
        }
        let mut results = std::mem::take(&mut output.sequences);
        for (scheduled, result) in plan.sequences.iter().zip(results.drain(..)) {
            self.apply_sequence(scheduled, result, output);
        }
        output.sequences = results;
        output.reset(plan.step_id);
        plan.clear();
        self.spare_plans.push(plan);
        self.pace.step(now, self.queue.waiting_tokens());
    }

    fn apply_sequence(&mut self, scheduled: &ScheduledSequence, result: SequenceOutput, output: &mut StepOutput) {
        let slot = self.row_slots[scheduled.row.0 as usize];
        let sequence = &mut self.sequences[slot as usize];
        sequence.num_in_flight -= 1;
        sequence.num_pending -= u8::from(scheduled.samples);
        if sequence.num_void > 0 || sequence.state == State::Draining {
            self.skip_void(slot);
            return;
        }
        let (num_computed_tokens, tokens) = match result {
            SequenceOutput::Computed { num_computed_tokens, tokens } => (num_computed_tokens, tokens),
            SequenceOutput::NonFinite => {
                // Its blocks may hold what is not finite, or have caused it.
                let details = &self.details[slot as usize];
                // Without a prefix cache there are no hashes.
                let num_known = details.hashes.len().min(details.num_published as usize);
                self.kv.forget(&details.hashes[..num_known]);
                self.finish(slot, FinishReason::NonFinite);
                return;
            }
            SequenceOutput::NothingAllowed => {
                self.finish(slot, FinishReason::NothingAllowed);
                return;
            }
        };
        assert!(num_computed_tokens <= scheduled.num_scheduled_tokens, "more was computed than was scheduled");
        assert!(scheduled.samples || tokens.is_empty(), "a token was sampled in the middle of a prompt");
        let went_as_expected =
            num_computed_tokens == scheduled.num_scheduled_tokens && tokens.len() == usize::from(scheduled.samples);

        let mut end = None;
        let details = &mut self.details[slot as usize];
        for index in tokens.start as usize..tokens.end as usize {
            let token_id = output.token_ids[index];
            details.generated.push(token_id);
            sequence.num_tokens += 1;
            self.counters.num_generated_tokens += 1;
            let (request, choice_index) = (sequence.request, sequence.choice_index);
            let report = |logprobs| Event { request, choice_index, kind: EventKind::Token { token_id, logprobs } };
            // `extend` makes room first and the event in its place; `push` makes the event first and moves it there,
            // which stalls on what was just written: a fifth more time for a step's `apply`.
            match output.logprobs.get_mut(index) {
                Some(logprobs) => self.events.extend(iter::once_with(|| report(logprobs.take()))),
                None => self.events.extend(iter::once_with(|| report(None))),
            }
            let may_stop = sequence.stop_filter >> (token_id % 32) & 1 == 1 && sequence.num_tokens >= sequence.min_len;
            if may_stop && details.request().stop_token_ids.contains(&token_id) {
                end = Some(FinishReason::Stop { token_id });
                break;
            }
            if sequence.num_tokens == sequence.max_len {
                end = Some(FinishReason::Length);
                break;
            }
        }
        // Where nothing was sampled the last token is computed again: there must be something to sample from.
        sequence.num_computed = (sequence.num_computed + num_computed_tokens).min(sequence.num_tokens - 1);
        if !went_as_expected {
            sequence.num_void = sequence.num_in_flight;
            if sequence.num_in_flight == 0 {
                sequence.num_planned = sequence.num_computed;
            }
        }
        let (is_last, state) = (sequence.num_in_flight == 0, sequence.state);
        if sequence.num_computed >= sequence.next_boundary {
            self.cross_boundary(slot);
        }
        if let Some(reason) = end {
            self.finish(slot, reason);
        } else if is_last && state == State::Preempting {
            self.put_back(slot);
        }
    }

    /// A plan's part that no longer counts has come back.
    #[inline(never)]
    fn skip_void(&mut self, slot: Slot) {
        let sequence = &mut self.sequences[slot as usize];
        sequence.num_void = sequence.num_void.saturating_sub(1);
        if sequence.num_in_flight > 0 {
            return;
        }
        match sequence.state {
            State::Draining => self.retire(slot),
            State::Preempting => self.put_back(slot),
            _ => {
                sequence.num_planned = sequence.num_computed;
                sequence.readmit = true;
            }
        }
    }

    /// Blocks are full that were not before, or have left the window.
    #[inline(never)]
    fn cross_boundary(&mut self, slot: Slot) {
        let block_size = self.config.block_size;
        let sequence = &mut self.sequences[slot as usize];
        let details = &mut self.details[slot as usize];
        let num_full = sequence.num_computed / block_size;
        sequence.next_boundary = (num_full + 1) * block_size;
        if self.config.enable_prefix_cache {
            details.extend_hashes(num_full, sequence.prompt_len, block_size);
            let request = details.request();
            let root = match self.kv.log.keeps_records() {
                true => BlockHash::root(&request.cache_salt, request.adapter).short(),
                false => ShortHash(0),
            };
            for position in details.num_published..num_full {
                let at = position as usize;
                let content = FullBlock {
                    hash: details.hashes[at],
                    parent: at.checked_sub(1).map(|before| details.hashes[before]),
                    root,
                    token_ids: details.block_tokens(position, sequence.prompt_len, block_size),
                };
                self.kv.publish(sequence.row, position, &content);
            }
            details.num_published = num_full;
        }
        if self.kv.has_windows() {
            let slack = if details.request().sampling.num_choices > 1 { block_size } else { 0 };
            self.kv.slide(sequence.row, sequence.num_computed, slack);
        }
        let (num_computed, prompt_len) = (sequence.num_computed, sequence.prompt_len);
        if self.details[slot as usize].leads && num_computed >= self.fork_len(prompt_len) {
            self.unpark(slot);
        }
    }

    /// Reports log probabilities of prompt tokens, each once: a preempted sequence computes them again.
    #[inline(never)]
    fn report_prompt_logprobs(&mut self, plan: &StepPlan, output: &mut StepOutput) {
        output.prompt_logprobs.sort_unstable_by_key(|&(index, position, _)| (index, position));
        for (index, position, logprobs) in output.prompt_logprobs.drain(..) {
            let slot = self.row_slots[plan.sequences[index as usize].row.0 as usize];
            let sequence = &self.sequences[slot as usize];
            let details = &mut self.details[slot as usize];
            let is_void = sequence.num_void > 0 || sequence.state == State::Draining;
            let is_refused = !matches!(output.sequences[index as usize], SequenceOutput::Computed { .. });
            if is_void || is_refused || position < details.next_prompt_logprob {
                continue;
            }
            details.next_prompt_logprob = position + 1;
            let kind = EventKind::PromptLogprobs { position, logprobs };
            self.events.push(Event { request: sequence.request, choice_index: sequence.choice_index, kind });
        }
    }
}
