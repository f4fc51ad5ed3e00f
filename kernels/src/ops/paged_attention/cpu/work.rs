//! Cutting a batch into tasks: which rows over which chunks, and which of them are parts of one.

use std::sync::atomic::{AtomicU32, Ordering};

use super::{Batch, PARTIAL_NUMBERS, UNITS_PER_THREAD};
use crate::ops::paged_attention::{CHUNK_LEN, SeqOfBatch};

/// Units that differ in the KV head only.
#[derive(Clone, Copy)]
pub(super) struct Task {
    pub(super) seq: usize,
    /// First row, and how many.
    pub(super) row_start: usize,
    pub(super) num_rows: usize,
    pub(super) chunk_start: usize,
    pub(super) chunk_end: usize,
    pub(super) split: Option<Split>,
}

/// A task that is one of several for the same rows.
#[derive(Clone, Copy)]
pub(super) struct Split {
    /// First and last chunk of all of them.
    pub(super) chunk_start: usize,
    pub(super) chunk_end: usize,
    pub(super) num_parts: u32,
    /// Chunks of the first part, which leaves one result for all of them.
    pub(super) first_len: usize,
    /// In `partials`, for head 0, and from head to head.
    pub(super) partials_start: usize,
    pub(super) head_stride: usize,
    /// In `countdowns`, for head 0.
    pub(super) countdown: usize,
}

impl Split {
    /// Index in `partials` of what a part that starts at `chunk` leaves; each further chunk is one `state_len` later.
    pub(super) fn start(&self, kv_head: usize, chunk: usize, state_len: usize) -> usize {
        let slot = if chunk == self.chunk_start { 0 } else { chunk - self.chunk_start - self.first_len + 1 };
        self.partials_start + kv_head * self.head_stride + slot * state_len
    }
}

/// Cuts the batch into tasks. How, changes no bit of the result.
pub(super) fn plan(batch: &Batch<'_>, num_threads: usize, tasks: &mut Vec<Task>, countdowns: &[AtomicU32]) {
    tasks.clear();
    let num_seqs = batch.lists.rows.len();
    let tiles = |seq: SeqOfBatch<'_>| {
        let num_rows = seq.q_len * batch.group_len;
        let max_rows = batch.max_rows;
        (0..num_rows).step_by(max_rows).map(move |row_start| (row_start, max_rows.min(num_rows - row_start)))
    };
    // Scores of a tile of rows: what its time grows with.
    let cost = |seq: SeqOfBatch<'_>, row_start: usize, num_rows: usize| {
        let visible = batch.visible(seq, row_start, num_rows);
        (visible.len() * num_rows) as u64
    };
    let can_split = num_threads > 1;
    let mut total = 0;
    if can_split {
        for seq in (0..num_seqs).map(|index| batch.lists.seq(index)) {
            total += tiles(seq).map(|(row_start, num_rows)| cost(seq, row_start, num_rows)).sum::<u64>();
        }
    }
    let target = total * batch.num_kv_heads as u64 / (num_threads * UNITS_PER_THREAD) as u64 + 1;
    let (mut next_partial, mut next_countdown) = (0, 0);
    for index in 0..num_seqs {
        let seq = batch.lists.seq(index);
        for (row_start, num_rows) in tiles(seq) {
            let visible = batch.visible(seq, row_start, num_rows);
            let (chunk_start, chunk_end) = (visible.start / CHUNK_LEN, visible.end.div_ceil(CHUNK_LEN));
            let whole = Task { seq: index, row_start, num_rows, chunk_start, chunk_end, split: None };
            let num_chunks = chunk_end - chunk_start;
            let mut num_parts = 1;
            if can_split {
                num_parts = (cost(seq, row_start, num_rows).div_ceil(target) as usize).min(num_chunks);
            }
            if num_parts == 1 {
                tasks.push(whole);
                continue;
            }
            let part_len = num_chunks.div_ceil(num_parts);
            let num_parts = num_chunks.div_ceil(part_len);
            let head_stride = (1 + num_chunks - part_len) * batch.state_len(num_rows);
            let split = Split {
                chunk_start,
                chunk_end,
                num_parts: num_parts as u32,
                first_len: part_len,
                partials_start: next_partial,
                head_stride,
                countdown: next_countdown,
            };
            let partials_end = next_partial + head_stride * batch.num_kv_heads;
            let countdowns_end = next_countdown + batch.num_kv_heads;
            if partials_end > PARTIAL_NUMBERS || countdowns_end > countdowns.len() {
                tasks.push(whole);
                continue;
            }
            for countdown in &countdowns[next_countdown..countdowns_end] {
                countdown.store(split.num_parts, Ordering::Relaxed);
            }
            (next_partial, next_countdown) = (partials_end, countdowns_end);
            for start in (chunk_start..chunk_end).step_by(part_len) {
                let chunk_end = (start + part_len).min(chunk_end);
                tasks.push(Task { chunk_start: start, chunk_end, split: Some(split), ..whole });
            }
        }
    }
}
