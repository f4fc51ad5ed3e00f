//! From a plan to the flat arrays that a device reads. Pure: no device, and no allocation once the vectors have grown to
//! the largest step, which they do when they are made.

use std::sync::Arc;

use quire_kernels::ops::logprobs::LogprobsAt;
use quire_kernels::ops::rope_kv_write::NO_SLOT;
use quire_kernels::ops::sample::SampleAt;
use quire_scheduler::{Request, StepPlan};

/// Sizes of the per-row tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TableShape {
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    /// Second dimension of the token table.
    pub max_model_len: usize,
    pub block_size: usize,
    pub num_kv_groups: usize,
    /// Rows of logits that exist at a time.
    pub logits_tile: usize,
}

impl TableShape {
    /// Second dimension of the block tables.
    pub(crate) fn max_num_blocks(&self) -> usize {
        self.max_model_len.div_ceil(self.block_size)
    }
}

/// A new token whose log probability is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WantedLogprobs {
    /// Which of the sampled tokens.
    pub sampled_index: u32,
    /// How many of the most likely tokens are wanted beside it.
    pub num_top: u32,
}

/// A prompt token whose log probability is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PromptToken {
    /// Index into the plan's sequences.
    pub sequence: u32,
    /// Of the token; its distribution comes from the token before it.
    pub position: u32,
    pub token_id: u32,
    /// How many of the most likely tokens are wanted beside it.
    pub num_top: u32,
}

/// Blocks that a step appended to a row's table of one KV group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TableUpdate {
    pub group: usize,
    /// Range of the flat table `[max_num_seqs, max_num_blocks]`.
    pub offset: usize,
    pub len: usize,
}

/// One step as flat arrays. See the operations that read them for their meaning.
pub(crate) struct InputBatch {
    shape: TableShape,
    /// Who is in each row.
    requests: Vec<Option<Arc<Request>>>,
    /// Which choice of its request a row is.
    choices: Vec<u32>,
    /// Per KV group the flat table `[max_num_seqs, max_num_blocks]`, as the device has it after the step's updates.
    pub block_tables: Vec<Vec<u32>>,
    /// Blocks in each row's tables.
    table_lens: Vec<u32>,
    pub table_updates: Vec<TableUpdate>,
    pub token_indices: Vec<u32>,
    pub positions: Vec<u32>,
    pub cu_seqlens: Vec<u32>,
    pub context_lens: Vec<u32>,
    pub rows: Vec<u32>,
    /// Per KV group.
    pub slot_mapping: Vec<Vec<u32>>,
    /// Tokens to choose, in plan order.
    pub num_sampled: usize,
    /// As [`SampleAt`] says, two words each.
    pub sample_rows: Vec<u32>,
    /// In the order of the sampled tokens.
    pub wanted_logprobs: Vec<WantedLogprobs>,
    /// Beside `wanted_logprobs`, as [`LogprobsAt`] says: the row in its tile of logits, and the index of the token.
    pub logprob_rows: Vec<u32>,
    /// In order of sequence and position.
    pub prompt_tokens: Vec<PromptToken>,
    /// Tokens of the step whose logits are wanted: those that are sampled from, then those of `prompt_tokens`.
    pub gather: Vec<u32>,
}

impl InputBatch {
    pub(crate) fn new(shape: TableShape) -> Self {
        let TableShape { max_num_seqs: seqs, max_num_batched_tokens: tokens, num_kv_groups, .. } = shape;
        let table_len = seqs * shape.max_num_blocks();
        Self {
            shape,
            requests: vec![None; seqs],
            choices: vec![0; seqs],
            block_tables: vec![vec![0; table_len]; num_kv_groups],
            table_lens: vec![0; seqs],
            table_updates: Vec::with_capacity(seqs * num_kv_groups),
            token_indices: Vec::with_capacity(tokens),
            positions: Vec::with_capacity(tokens),
            cu_seqlens: Vec::with_capacity(seqs + 1),
            context_lens: Vec::with_capacity(seqs),
            rows: Vec::with_capacity(seqs),
            slot_mapping: vec![Vec::with_capacity(tokens); num_kv_groups],
            num_sampled: 0,
            sample_rows: Vec::with_capacity(2 * seqs),
            wanted_logprobs: Vec::with_capacity(seqs),
            logprob_rows: Vec::with_capacity(2 * seqs),
            prompt_tokens: Vec::with_capacity(tokens),
            gather: Vec::with_capacity(seqs + tokens),
        }
    }

    /// The request whose sequence is in `row`.
    pub(crate) fn request(&self, row: u32) -> &Request {
        self.requests[row as usize].as_ref().expect("a scheduled row was admitted")
    }

    /// Makes the arrays of `plan`.
    ///
    /// # Panics
    /// Where the plan schedules a position that has no block, or a row that nobody was admitted to.
    pub(crate) fn build(&mut self, plan: &StepPlan) {
        self.clear();
        for row in &plan.released {
            self.requests[row.0 as usize] = None;
        }
        for admission in &plan.admitted {
            self.requests[admission.row.0 as usize] = Some(Arc::clone(&admission.request));
            self.choices[admission.row.0 as usize] = admission.choice_index;
            self.table_lens[admission.row.0 as usize] = 0;
        }
        let max_num_blocks = self.shape.max_num_blocks();
        let block_size = self.shape.block_size;
        for (index, sequence) in plan.sequences.iter().enumerate() {
            let row = sequence.row.0 as usize;
            let new_blocks = &plan.new_blocks[sequence.new_blocks.start as usize..sequence.new_blocks.end as usize];
            self.append_blocks(row, new_blocks.iter().map(|block| block.0));

            let first = sequence.num_computed_tokens as usize;
            let end = first + sequence.num_scheduled_tokens as usize;
            assert!(
                end <= self.table_lens[row] as usize * block_size && end <= self.shape.max_model_len,
                "row {row} has no block for position {}",
                end - 1
            );
            let flat_row = (row * self.shape.max_model_len) as u32;
            let first_token = self.positions.len();
            self.positions.extend(first as u32..end as u32);
            self.token_indices.extend((first as u32..end as u32).map(|position| flat_row + position));
            for (table, slots) in self.block_tables.iter().zip(&mut self.slot_mapping) {
                let table = &table[row * max_num_blocks..][..max_num_blocks];
                let slot =
                    |position: usize| table[position / block_size] * block_size as u32 + (position % block_size) as u32;
                slots.extend((first..end).map(slot));
            }
            self.cu_seqlens.push(self.positions.len() as u32);
            self.context_lens.push(end as u32);
            self.rows.push(row as u32);
            if sequence.samples {
                self.add_sampled(SampleAt { row: row as u32, num_tokens: end as u32 });
            }
            self.add_prompt_tokens(index as u32, row, first..end);
            debug_assert_eq!(self.positions.len() - first_token, end - first);
        }
        // The rows of `prompt_tokens` follow those that are sampled from.
        for token in &self.prompt_tokens {
            let sequence = token.sequence as usize;
            let first = plan.sequences[sequence].num_computed_tokens;
            self.gather.push(self.cu_seqlens[sequence] + token.position - 1 - first);
        }
    }

    fn clear(&mut self) {
        self.table_updates.clear();
        self.token_indices.clear();
        self.positions.clear();
        self.cu_seqlens.clear();
        self.cu_seqlens.push(0);
        self.context_lens.clear();
        self.rows.clear();
        self.slot_mapping.iter_mut().for_each(Vec::clear);
        self.num_sampled = 0;
        self.sample_rows.clear();
        self.wanted_logprobs.clear();
        self.logprob_rows.clear();
        self.prompt_tokens.clear();
        self.gather.clear();
    }

    /// Whether all that the step does is to add one token to each of its sequences.
    pub(crate) fn only_decodes(&self) -> bool {
        let num_seqs = self.rows.len();
        num_seqs > 0
            && self.positions.len() == num_seqs
            && self.num_sampled == num_seqs
            && self.prompt_tokens.is_empty()
    }

    /// Fills a batch that [`Self::only_decodes`] up to `num_seqs` with sequences that compute nothing: each has a token of
    /// its own, which is not attended to, not kept and not sampled from.
    pub(crate) fn fill_up(&mut self, num_seqs: usize) {
        debug_assert!(
            self.only_decodes() && num_seqs <= self.shape.max_num_seqs.min(self.shape.max_num_batched_tokens)
        );
        let num_tokens = self.positions.len() as u32;
        // Any token will do that is one.
        self.token_indices.resize(num_seqs, self.token_indices[0]);
        self.positions.resize(num_seqs, 0);
        self.cu_seqlens.resize(num_seqs + 1, num_tokens);
        self.context_lens.resize(num_seqs, 0);
        self.rows.resize(num_seqs, 0);
        self.slot_mapping.iter_mut().for_each(|slots| slots.resize(num_seqs, NO_SLOT));
        self.gather.resize(num_seqs, 0);
        for _ in self.num_sampled..num_seqs {
            self.sample_rows.extend(SampleAt::NOBODY.words());
        }
    }

    /// Samples from the last token that there is.
    fn add_sampled(&mut self, at: SampleAt) {
        let sampled_index = self.num_sampled;
        if let Some(num_top) = self.request(at.row).sampling.logprobs {
            let sampled_index = sampled_index as u32;
            let logits_row = sampled_index % self.shape.logits_tile as u32;
            self.wanted_logprobs.push(WantedLogprobs { sampled_index, num_top });
            self.logprob_rows.extend(LogprobsAt { logits_row, token_index: sampled_index }.words());
        }
        self.sample_rows.extend(at.words());
        self.gather.push(self.positions.len() as u32 - 1);
        self.num_sampled += 1;
    }

    /// Appends blocks that alternate between KV groups.
    fn append_blocks(&mut self, row: usize, blocks: impl ExactSizeIterator<Item = u32>) {
        let num_groups = self.shape.num_kv_groups;
        let max_num_blocks = self.shape.max_num_blocks();
        if blocks.len() == 0 {
            return;
        }
        let count = blocks.len() / num_groups;
        let start = self.table_lens[row] as usize;
        assert!(start + count <= max_num_blocks, "row {row} has {start} blocks, {count} more do not fit");
        let offset = row * max_num_blocks + start;
        for (i, block) in blocks.enumerate() {
            self.block_tables[i % num_groups][offset + i / num_groups] = block;
        }
        self.table_lens[row] += count as u32;
        self.table_updates.extend((0..num_groups).map(|group| TableUpdate { group, offset, len: count }));
    }

    /// The prompt tokens whose distribution is computed by the positions `range` of a row. The first choice scores the prompt
    /// for all of them; where tokens were generated elsewhere, it was scored there.
    fn add_prompt_tokens(&mut self, sequence: u32, row: usize, range: std::ops::Range<usize>) {
        let request = self.requests[row].as_ref().expect("a scheduled row was admitted");
        let Some(num_top) = request.sampling.prompt_logprobs else { return };
        if self.choices[row] != request.choice_offset || !request.generated.is_empty() {
            return;
        }
        let end = range.end.min(request.prompt.len().saturating_sub(1));
        self.prompt_tokens.extend((range.start..end).map(|position| PromptToken {
            sequence,
            position: position as u32 + 1,
            token_id: request.prompt[position + 1],
            num_top,
        }));
    }
}

#[cfg(test)]
mod tests {
    use quire_scheduler::{
        Admission, BlockId, CacheSalt, RequestId, RowId, SamplingParams, ScheduledSequence, StepId, TenantId,
    };

    use super::*;

    fn shape(num_kv_groups: usize) -> TableShape {
        TableShape {
            max_num_seqs: 3,
            max_num_batched_tokens: 32,
            max_model_len: 64,
            block_size: 16,
            num_kv_groups,
            logits_tile: 2,
        }
    }

    fn admission(row: u32, prompt: &[u32], generated: &[u32], prompt_logprobs: Option<u32>) -> Admission {
        let request = Request {
            id: RequestId(u64::from(row)),
            tenant: TenantId(0),
            adapter: None,
            priority: 0,
            cache_salt: CacheSalt::default(),
            prompt: prompt.into(),
            generated: Vec::new(),
            choice_offset: 0,
            sampling: SamplingParams { prompt_logprobs, ..SamplingParams::default() },
            max_tokens: 8,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            deadline: None,
        };
        Admission { row: RowId(row), request: Arc::new(request), choice_index: 0, generated: generated.to_vec() }
    }

    fn plan(admitted: Vec<Admission>, sequences: &[(u32, u32, u32, &[u32], bool)]) -> StepPlan {
        let mut new_blocks = Vec::new();
        let mut scheduled = Vec::new();
        for &(row, num_computed_tokens, num_scheduled_tokens, blocks, samples) in sequences {
            let start = new_blocks.len() as u32;
            new_blocks.extend(blocks.iter().map(|&block| BlockId(block)));
            scheduled.push(ScheduledSequence {
                row: RowId(row),
                num_computed_tokens,
                num_scheduled_tokens,
                new_blocks: start..new_blocks.len() as u32,
                samples,
            });
        }
        let num_scheduled_tokens = sequences.iter().map(|sequence| sequence.2).sum();
        StepPlan {
            step_id: StepId(0),
            released: Vec::new(),
            admitted,
            sequences: scheduled,
            new_blocks,
            num_scheduled_tokens,
        }
    }

    fn prompt(len: u32) -> Vec<u32> {
        (100..100 + len).collect()
    }

    #[test]
    fn a_decode_and_a_chunk_lie_side_by_side() {
        let mut batch = InputBatch::new(shape(1));
        batch.build(&plan(
            vec![admission(0, &prompt(17), &[], None), admission(2, &prompt(40), &[], None)],
            &[(0, 0, 17, &[5, 9], true), (2, 0, 3, &[7, 1], false)],
        ));
        batch.build(&plan(vec![], &[(0, 17, 1, &[], true), (2, 3, 18, &[], false)]));
        assert_eq!(batch.positions, [17].into_iter().chain(3..21).collect::<Vec<u32>>());
        assert_eq!(batch.token_indices[..3], [17, 2 * 64 + 3, 2 * 64 + 4]);
        assert_eq!(batch.cu_seqlens, [0, 1, 19]);
        assert_eq!(batch.context_lens, [18, 21]);
        assert_eq!(batch.rows, [0, 2]);
        let slots = [9 * 16 + 1].into_iter().chain(7 * 16 + 3..7 * 16 + 16).chain(16..16 + 5);
        assert_eq!(batch.slot_mapping[0], slots.collect::<Vec<u32>>());
        assert_eq!((batch.num_sampled, &*batch.sample_rows), (1, &SampleAt { row: 0, num_tokens: 18 }.words()[..]));
        assert_eq!(batch.gather, [0]);
        assert!(batch.table_updates.is_empty());
    }

    #[test]
    fn tables_grow_by_diffs_and_start_anew_with_an_admission() {
        let mut batch = InputBatch::new(shape(2));
        batch.build(&plan(vec![admission(1, &prompt(20), &[], None)], &[(1, 0, 20, &[3, 13, 4, 14], true)]));
        let update = |group, offset, len| TableUpdate { group, offset, len };
        assert_eq!(batch.table_updates, [update(0, 4, 2), update(1, 4, 2)]);
        assert_eq!(batch.block_tables[0][4..6], [3, 4]);
        assert_eq!(batch.block_tables[1][4..6], [13, 14]);
        assert_eq!(batch.slot_mapping[1][19], 14 * 16 + 3);

        batch.build(&plan(vec![], &[(1, 31, 2, &[5, 15], true)]));
        assert_eq!(batch.table_updates, [update(0, 6, 1), update(1, 6, 1)]);

        let mut again = plan(vec![admission(1, &prompt(2), &[], None)], &[(1, 0, 2, &[8, 18], true)]);
        again.released.push(RowId(1));
        batch.build(&again);
        assert_eq!(batch.table_updates, [update(0, 4, 1), update(1, 4, 1)]);
        assert_eq!(batch.slot_mapping, [vec![128, 129], vec![288, 289]]);
    }

    #[test]
    fn blocks_that_left_the_window_are_named_and_not_used() {
        let mut batch = InputBatch::new(shape(1));
        let none = BlockId::NONE.0;
        batch.build(&plan(vec![admission(0, &prompt(40), &[], None)], &[(0, 32, 8, &[none, none, 2], true)]));
        assert_eq!(batch.slot_mapping[0], (32..40).collect::<Vec<u32>>());
    }

    #[test]
    fn prompt_log_probabilities_come_from_the_token_before() {
        let mut batch = InputBatch::new(shape(1));
        batch.build(&plan(vec![admission(0, &prompt(5), &[], Some(2))], &[(0, 0, 3, &[1], false)]));
        let token = |position| PromptToken { sequence: 0, position, token_id: 100 + position, num_top: 2 };
        assert_eq!(batch.prompt_tokens, [token(1), token(2), token(3)]);
        assert_eq!(batch.gather, [0, 1, 2]);
        batch.build(&plan(vec![], &[(0, 3, 2, &[], true)]));
        assert_eq!(batch.prompt_tokens, [token(4)]);
        // The sampled row, then the prompt's.
        assert_eq!(batch.gather, [1, 0]);
        batch.build(&plan(vec![], &[(0, 5, 1, &[], true)]));
        assert!(batch.prompt_tokens.is_empty());
    }

    #[test]
    fn a_prompt_is_scored_once_for_all_choices() {
        let mut batch = InputBatch::new(shape(1));
        let choice = |row, choice_index| Admission { choice_index, ..admission(row, &prompt(5), &[], Some(2)) };
        batch.build(&plan(vec![choice(0, 0), choice(1, 1)], &[(0, 0, 5, &[1], true), (1, 0, 5, &[2], true)]));
        assert_eq!(batch.prompt_tokens.len(), 4);
        assert!(batch.prompt_tokens.iter().all(|token| token.sequence == 0));
    }

    #[test]
    fn wanted_log_probabilities_name_their_row_of_a_tile_and_their_token() {
        let mut batch = InputBatch::new(shape(1));
        let asking = |row, logprobs| {
            let mut admission = admission(row, &prompt(1), &[], None);
            Arc::make_mut(&mut admission.request).sampling.logprobs = logprobs;
            admission
        };
        let sequences: [(u32, u32, u32, &[u32], bool); 3] =
            [(2, 0, 1, &[1], true), (1, 0, 1, &[2], true), (0, 0, 1, &[3], true)];
        batch.build(&plan(vec![asking(0, Some(5)), asking(1, None), asking(2, Some(0))], &sequences));
        let wanted = |sampled_index, num_top| WantedLogprobs { sampled_index, num_top };
        assert_eq!(batch.wanted_logprobs, [wanted(0, 0), wanted(2, 5)]);
        // Tiles have two rows: the third is the first of the second tile.
        assert_eq!(batch.logprob_rows, [0, 0, 0, 2]);
    }

    #[test]
    fn a_batch_of_decodes_is_filled_up_with_nobody() {
        let mut batch = InputBatch::new(shape(2));
        assert!(!batch.only_decodes());
        batch.build(&plan(vec![admission(1, &prompt(2), &[], None)], &[(1, 0, 2, &[3, 4], true)]));
        assert!(!batch.only_decodes());
        batch.build(&plan(vec![], &[(1, 2, 1, &[], true)]));
        assert!(batch.only_decodes());
        batch.fill_up(3);
        assert_eq!(batch.token_indices, [66; 3]);
        assert_eq!(batch.positions, [2, 0, 0]);
        assert_eq!(batch.cu_seqlens, [0, 1, 1, 1]);
        assert_eq!(batch.context_lens, [3, 0, 0]);
        assert_eq!(batch.rows, [1, 0, 0]);
        assert_eq!(batch.slot_mapping, [[50, NO_SLOT, NO_SLOT], [66, NO_SLOT, NO_SLOT]]);
        assert_eq!(batch.gather, [0; 3]);
        let nobody = SampleAt::NOBODY.words();
        assert_eq!(batch.sample_rows, [[1, 3], nobody, nobody].as_flattened());
        assert_eq!(batch.num_sampled, 1);
    }

    #[test]
    #[should_panic(expected = "has no block for position 16")]
    fn a_position_without_a_block_is_a_bug() {
        let mut batch = InputBatch::new(shape(1));
        batch.build(&plan(vec![admission(0, &prompt(20), &[], None)], &[(0, 0, 17, &[1], false)]));
    }

    #[test]
    fn nothing_is_allocated_after_the_first_step() {
        let mut batch = InputBatch::new(shape(1));
        let capacities = |batch: &InputBatch| {
            [
                batch.table_updates.capacity(),
                batch.token_indices.capacity(),
                batch.positions.capacity(),
                batch.cu_seqlens.capacity(),
                batch.slot_mapping[0].capacity(),
                batch.prompt_tokens.capacity(),
                batch.gather.capacity(),
            ]
        };
        let before = capacities(&batch);
        let sequences: [(u32, u32, u32, &[u32], bool); 3] =
            [(0, 0, 1, &[1], true), (1, 0, 1, &[2], true), (2, 0, 30, &[3, 4], true)];
        let admitted = (0..3).map(|row| admission(row, &prompt(30), &[], Some(1))).collect();
        batch.build(&plan(admitted, &sequences));
        assert_eq!(capacities(&batch), before);
    }
}
