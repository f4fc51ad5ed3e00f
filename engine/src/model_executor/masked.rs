//! Rows of a step whose choices obey grammars.

use quire_kernels::ops::sample::{NON_FINITE, SampleAt};
use quire_kernels::{Backend, KernelError};

use super::device_model::DeviceModel;
use super::{InFlight, ModelExecutor};
use crate::constraint::NotAllowed;
use crate::input_batch::InputBatch;
use crate::masks::Masks;

/// A sampled token that a grammar is to be told.
pub(super) struct MaskedRow {
    row: usize,
    /// See [`Masks::entry`].
    entry: u64,
    /// Which of the step's sampled tokens.
    sampled_index: usize,
}

/// Rows that the step samples in, in order.
fn sampled_rows(batch: &InputBatch) -> impl Iterator<Item = u32> + '_ {
    let rows = batch.sample_rows.chunks_exact(2).map(|words| SampleAt::of_words([words[0], words[1]]).row);
    rows.take(batch.num_sampled)
}

/// Whether any token of the step is sampled behind a mask.
pub(super) fn has_masks(batch: &InputBatch, masks: &Masks) -> bool {
    sampled_rows(batch).any(|row| masks.entry(row as usize).is_some())
}

/// Tells grammars what a launched step chose, waiting for that step alone: what they allow next is computed while the device
/// computes the next one.
pub(super) fn tell_grammars<B: Backend>(
    backend: &mut B,
    masks: &mut Masks,
    step: &mut InFlight<B>,
) -> Result<(), KernelError> {
    if step.masked.is_empty() {
        return Ok(());
    }
    let tokens = backend.finish_read(&mut step.readback)?;
    for MaskedRow { row, entry, sampled_index } in step.masked.drain(..) {
        let token_id = tokens[sampled_index];
        if token_id != NON_FINITE {
            masks.advance(row, entry, token_id);
        }
    }
    Ok(())
}

/// Hands the masks of the step's rows to the sampler. Those that nobody computed yet are computed by the threads that the
/// backend has.
pub(super) fn set_masks<B: Backend>(
    backend: &mut B,
    model: &mut DeviceModel<B>,
    masks: &mut Masks,
    batch: &InputBatch,
    step: &mut InFlight<B>,
) -> Result<(), KernelError> {
    let work = masks.work();
    backend.run_on_host(masks.num_waiting(), &|_| work.compute_next());
    for (sampled_index, row) in sampled_rows(batch).enumerate() {
        let Some(entry) = masks.entry(row as usize) else { continue };
        match masks.wait(row as usize) {
            Ok(mask) => {
                backend.set_sampler_mask(&mut model.sampler, row, mask)?;
                step.masked.push(MaskedRow { row: row as usize, entry, sampled_index });
            }
            Err(NotAllowed) => step.nothing_allowed.push(sampled_index as u32),
        }
    }
    Ok(())
}

impl<B: Backend> ModelExecutor<B> {
    /// Notes the rows that bad words may leave nothing to choose.
    pub(super) fn note_restricted(&self, step: &mut InFlight<B>) {
        let is_restricted = |row: u32| !self.batch.request(row).sampling.bad_words.is_empty();
        let restricted = sampled_rows(&self.batch).zip(0..).filter(|(row, _)| is_restricted(*row));
        step.restricted.extend(restricted.map(|(_, index)| index));
    }
}
