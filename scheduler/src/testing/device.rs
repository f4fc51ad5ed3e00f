//! A device that keeps rows and a paged cache as a real one does, and computes hashes instead of tokens.

use std::sync::Arc;

use super::Rng;
use super::rng::mix;
use crate::{
    BlockId, FinishReason, KvGroupKind, Request, ScheduledSequence, SchedulerConfig, SequenceOutput, StepId,
    StepOutput, StepPlan, TokenLogprobs,
};

/// Content of a slot that was never written, or whose writing went wrong.
const POISON: u64 = u64::MAX;

/// How often, in a thousand sampled sequences, the device does something uncommon.
#[derive(Clone, Copy, Debug, Default)]
pub struct FaultRates {
    /// Yields several tokens.
    pub several_tokens: u32,
    /// Takes computed tokens back and yields none.
    pub taken_back: u32,
    /// Computes what is not finite.
    pub non_finite: u32,
}

#[derive(Debug, Default)]
struct Row {
    request: Option<Arc<Request>>,
    choice_index: u32,
    tokens: Vec<u32>,
    /// What each known token's slots must hold: a hash of the token and all before it.
    contents: Vec<u64>,
    /// Per KV group; entries before `first_live` are not read any more.
    tables: Vec<Vec<BlockId>>,
    first_live: Vec<usize>,
    num_computed: u32,
    starts_anew: bool,
    /// Step in which it did something that the next plan, in flight already, could not expect.
    surprised: Option<StepId>,
}

/// See the module's text. Panics when a plan breaks a promise: a budget, a block written by two sequences, a read of a
/// slot that does not hold what it should.
#[derive(Debug)]
pub struct FakeDevice {
    block_size: u32,
    kinds: Vec<KvGroupKind>,
    max_num_batched_tokens: u32,
    vocab_size: u32,
    fault_rates: FaultRates,
    rng: Rng,
    rows: Vec<Row>,
    /// Per KV group and slot.
    cache: Vec<Vec<u64>>,
    /// Per KV group and block: rows whose table reads it.
    holders: Vec<Vec<u32>>,
    next_step: u64,
}

impl FakeDevice {
    /// A device with the rows and blocks that the scheduler was told of, its cache full of poison.
    #[must_use]
    pub fn new(config: &SchedulerConfig, vocab_size: u32, fault_rates: FaultRates, seed: u64) -> Self {
        let num_groups = config.kv_groups.len();
        let new_row =
            || Row { tables: vec![Vec::new(); num_groups], first_live: vec![0; num_groups], ..Row::default() };
        let num_slots = |num_blocks: u32| (num_blocks * config.block_size) as usize;
        Self {
            block_size: config.block_size,
            kinds: config.kv_groups.iter().map(|group| group.kind).collect(),
            max_num_batched_tokens: config.max_num_batched_tokens,
            vocab_size,
            fault_rates,
            rng: Rng::new(seed),
            rows: (0..config.max_num_seqs).map(|_| new_row()).collect(),
            cache: config.kv_groups.iter().map(|group| vec![POISON; num_slots(group.num_blocks)]).collect(),
            holders: config.kv_groups.iter().map(|group| vec![0; group.num_blocks as usize]).collect(),
            next_step: 0,
        }
    }

    /// Runs a plan; plans come in order.
    pub fn execute(&mut self, plan: &StepPlan, output: &mut StepOutput) {
        assert_eq!(plan.step_id.0, self.next_step, "plans come in order, without gaps");
        self.next_step += 1;
        output.reset(plan.step_id);
        for row in &plan.released {
            self.release(row.0 as usize);
        }
        for admission in &plan.admitted {
            let row = &mut self.rows[admission.row.0 as usize];
            assert!(row.request.is_none(), "{:?} is in use", admission.row);
            row.request = Some(Arc::clone(&admission.request));
            row.choice_index = admission.choice_index;
            row.tokens.clear();
            row.contents.clear();
            row.starts_anew = true;
            row.surprised = None;
            let known = admission.request.prompt.iter().chain(&admission.generated);
            for &token in known {
                row.push(token);
            }
        }
        let mut num_tokens = 0;
        let num_decodes = plan.num_decodes();
        for (index, scheduled) in plan.sequences.iter().enumerate() {
            assert!(scheduled.num_scheduled_tokens > 0, "an empty range");
            assert!(index < num_decodes || scheduled.num_scheduled_tokens > 1, "decodes come first");
            num_tokens += scheduled.num_scheduled_tokens;
            self.run(plan, index, scheduled, output);
            // What nothing to come sees may be another's from the next step on.
            let row = scheduled.row.0 as usize;
            self.slide(row, self.rows[row].num_computed);
        }
        assert_eq!(num_tokens, plan.num_scheduled_tokens);
        assert!(num_tokens <= self.max_num_batched_tokens, "{num_tokens} tokens are over the budget");
        assert!(plan.sequences.len() <= self.rows.len());
    }

    /// Changes all contents, as a wild write would.
    pub fn corrupt(&mut self) {
        for content in self.cache.iter_mut().flatten() {
            *content ^= 1;
        }
    }

    fn release(&mut self, row: usize) {
        let row = &mut self.rows[row];
        assert!(row.request.take().is_some(), "a row is released that is not in use");
        for (group, table) in row.tables.iter_mut().enumerate() {
            for block in &table[row.first_live[group]..] {
                self.holders[group][block.0 as usize] -= 1;
            }
            table.clear();
            row.first_live[group] = 0;
        }
    }

    fn append_blocks(&mut self, row: usize, blocks: &[BlockId]) {
        let row = &mut self.rows[row];
        let num_groups = self.kinds.len();
        assert_eq!(blocks.len() % num_groups, 0);
        for (index, &block) in blocks.iter().enumerate() {
            let group = index % num_groups;
            let table = &mut row.tables[group];
            if block.is_none() {
                assert_eq!(row.first_live[group], table.len(), "a gap in a table");
                row.first_live[group] += 1;
            } else {
                self.holders[group][block.0 as usize] += 1;
            }
            table.push(block);
        }
    }

    /// Forgets entries that no token from `start` on sees.
    fn slide(&mut self, row: usize, start: u32) {
        let row = &mut self.rows[row];
        for (group, kind) in self.kinds.iter().enumerate() {
            let first = first_visible(*kind, start) / self.block_size;
            while row.first_live[group] < row.tables[group].len().min(first as usize) {
                let block = row.tables[group][row.first_live[group]];
                self.holders[group][block.0 as usize] -= 1;
                row.first_live[group] += 1;
            }
        }
    }

    fn run(&mut self, plan: &StepPlan, index: usize, scheduled: &ScheduledSequence, output: &mut StepOutput) {
        let row_index = scheduled.row.0 as usize;
        let (start, count) = (scheduled.num_computed_tokens, scheduled.num_scheduled_tokens);
        let end = start + count;
        let row = &mut self.rows[row_index];
        assert!(row.request.is_some(), "{:?} is scheduled and not in use", scheduled.row);
        if std::mem::take(&mut row.starts_anew) {
            row.num_computed = start;
        }
        let blocks = &plan.new_blocks[scheduled.new_blocks.start as usize..scheduled.new_blocks.end as usize];
        self.append_blocks(row_index, blocks);
        let row = &self.rows[row_index];
        let samples = end as usize == row.tokens.len();
        if start != row.num_computed || scheduled.samples != samples {
            let surprised = row.surprised.expect("a range that does not continue the row");
            assert_eq!(surprised.0 + 1, plan.step_id.0, "a row goes on that is off");
            self.write(row_index, start..end, Some(POISON));
            output.push_computed(count, if scheduled.samples { &[0] } else { &[] });
            return;
        }

        self.slide(row_index, start);
        // What the first token of the range sees must be there; what the last one sees decides the next token.
        self.read(row_index, start);
        self.write(row_index, start..end, None);
        let sum = self.read(row_index, end - 1);
        self.report_prompt_logprobs(row_index, index as u32, start, end, output);
        let row = &mut self.rows[row_index];
        row.num_computed = end;
        if !samples {
            if count > 1 && self.rng.chance(self.fault_rates.taken_back) {
                let kept = self.rng.below(count);
                row.num_computed = start + kept;
                row.surprised = Some(plan.step_id);
                output.push_computed(kept, &[]);
            } else {
                output.push_computed(count, &[]);
            }
            return;
        }
        if self.rng.chance(self.fault_rates.non_finite) {
            self.write(row_index, start..end, Some(POISON));
            self.rows[row_index].surprised = Some(plan.step_id);
            output.sequences.push(SequenceOutput::NonFinite);
            return;
        }
        if self.rng.chance(self.fault_rates.taken_back) {
            // All or some of the range is taken back; where nothing is, the last token is computed again.
            let kept = self.rng.below(count + 1);
            row.num_computed = (start + kept).min(end - 1);
            row.surprised = Some(plan.step_id);
            output.push_computed(kept, &[]);
            return;
        }
        let request = Arc::clone(row.request.as_ref().expect("checked above"));
        let token = next_token(sum, &request, row.choice_index, end, self.vocab_size);
        row.push(token);
        let mut tokens = [token; 4];
        let mut num_tokens = 1;
        if self.rng.chance(self.fault_rates.several_tokens) {
            row.surprised = Some(plan.step_id);
            num_tokens = 2 + self.rng.below(3) as usize;
            for token in &mut tokens[1..num_tokens] {
                let len = row.tokens.len() as u32;
                let sum = visible_sum(&self.kinds, &row.contents, len - 1);
                *token = next_token(sum, &request, row.choice_index, len, self.vocab_size);
                row.push(*token);
            }
        }
        output.push_computed(count, &tokens[..num_tokens]);
    }

    fn slot(&self, row: &Row, group: usize, position: u32) -> usize {
        let block = row.tables[group][(position / self.block_size) as usize];
        (block.0 * self.block_size + position % self.block_size) as usize
    }

    /// Writes the contents of the row's tokens, or what is given, to their slots.
    fn write(&mut self, row: usize, range: std::ops::Range<u32>, content: Option<u64>) {
        let row = &self.rows[row];
        for group in 0..self.kinds.len() {
            for position in range.clone() {
                let slot = self.slot(row, group, position);
                let block = slot as u32 / self.block_size;
                assert_eq!(
                    self.holders[group][block as usize], 1,
                    "block {block} of group {group} is written and shared"
                );
                self.cache[group][slot] = content.unwrap_or_else(|| row.contents[position as usize]);
            }
        }
    }

    /// Reads what a token at `position` sees in the cache, itself not counted when it is not written yet.
    fn read(&self, row: usize, position: u32) -> u64 {
        let row = &self.rows[row];
        let mut sum = 0_u64;
        for (group, kind) in self.kinds.iter().enumerate() {
            let is_written = position < row.num_computed || self.cache_holds(row, group, position);
            let end = if is_written { position + 1 } else { position };
            let mut part = 0_u64;
            let mut next = first_visible(*kind, position);
            while next < end {
                let block_end = (next / self.block_size + 1) * self.block_size;
                let count = block_end.min(end) - next;
                let slot = self.slot(row, group, next);
                for (offset, &content) in self.cache[group][slot..slot + count as usize].iter().enumerate() {
                    let expected = row.contents[next as usize + offset];
                    assert_eq!(content, expected, "group {group} holds something else at position {next}");
                    part = part.wrapping_add(content);
                }
                next += count;
            }
            sum = mix(sum, part);
        }
        sum
    }

    fn cache_holds(&self, row: &Row, group: usize, position: u32) -> bool {
        self.cache[group][self.slot(row, group, position)] == row.contents[position as usize]
    }

    fn report_prompt_logprobs(&self, row: usize, index: u32, start: u32, end: u32, output: &mut StepOutput) {
        let row = &self.rows[row];
        let request = row.request.as_ref().expect("the row is in use");
        if request.sampling.prompt_logprobs.is_some() {
            for position in start + 1..(end + 1).min(request.prompt.len() as u32) {
                let logprobs = TokenLogprobs { logprob: -(position as f32), rank: 1, top: Vec::new() };
                output.prompt_logprobs.push((index, position, logprobs));
            }
        }
    }
}

impl Row {
    fn push(&mut self, token: u32) {
        let request = self.request.as_ref().expect("the row is in use");
        let parent = self.contents.last().copied().unwrap_or_else(|| first_content(request));
        self.contents.push(next_content(parent, token));
        self.tokens.push(token);
    }
}

/// All that one choice generates when nothing cuts it short, those tokens left out that it came with, and why it ends.
#[must_use]
pub fn expected_output(
    request: &Request,
    choice_index: u32,
    config: &SchedulerConfig,
    vocab_size: u32,
) -> (Vec<u32>, FinishReason) {
    let kinds: Vec<KvGroupKind> = config.kv_groups.iter().map(|group| group.kind).collect();
    let mut content = first_content(request);
    let mut contents = Vec::new();
    for &token in request.prompt.iter().chain(&request.generated) {
        content = next_content(content, token);
        contents.push(content);
    }
    let mut tokens = Vec::new();
    // A request can come complete: what it came with is looked at like any token.
    let mut last = request.generated.last().copied();
    loop {
        let num_generated = (request.generated.len() + tokens.len()) as u32;
        if let Some(token_id) = last {
            if num_generated >= request.min_tokens && request.stop_token_ids.contains(&token_id) {
                return (tokens, FinishReason::Stop { token_id });
            }
            if num_generated >= request.max_tokens {
                return (tokens, FinishReason::Length);
            }
        }
        let len = contents.len() as u32;
        let token = next_token(visible_sum(&kinds, &contents, len - 1), request, choice_index, len, vocab_size);
        content = next_content(content, token);
        contents.push(content);
        tokens.push(token);
        last = Some(token);
    }
}

fn first_content(request: &Request) -> u64 {
    let salt = request.cache_salt.0.iter().fold(0, |sum, &byte| mix(sum, u64::from(byte)));
    mix(salt, request.adapter.map_or(0, |adapter| 1 + u64::from(adapter.0)))
}

fn next_content(parent: u64, token: u32) -> u64 {
    mix(parent, u64::from(token)) & (POISON >> 1)
}

fn next_token(sum: u64, request: &Request, choice_index: u32, len: u32, vocab_size: u32) -> u32 {
    let key = mix(mix(request.sampling.seed, u64::from(choice_index)), u64::from(len));
    (mix(sum, key) % u64::from(vocab_size)) as u32
}

/// First position that a token at `position` sees.
fn first_visible(kind: KvGroupKind, position: u32) -> u32 {
    match kind {
        KvGroupKind::Full => 0,
        KvGroupKind::SlidingWindow { window } => (position + 1).saturating_sub(window),
    }
}

/// What [`FakeDevice::read`] finds when all is well.
fn visible_sum(kinds: &[KvGroupKind], contents: &[u64], position: u32) -> u64 {
    kinds.iter().fold(0, |sum, &kind| {
        let visible = &contents[first_visible(kind, position) as usize..=position as usize];
        mix(sum, visible.iter().fold(0, |part, &content| part.wrapping_add(content)))
    })
}
