//! What only the device can find wrong: indices and lengths that lie in its own memory.
//!
//! Each has a record on the device, [`RECORD_BYTES`] long: `u32` words `{seen, value, limit, 0}`. A kernel that meets a bad
//! number sets its record (see `report_fault` in `include/fault.cuh`), leaves the number's row alone and goes on. The host
//! gets all records with whatever it reads next.

use crate::KernelError;
use crate::cuda::device::DevicePtr;

/// Something a kernel looks at before it uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    EmbedTokenIndices,
    EmbedTokenTable,
    GatherRowsIndices,
    RopeKvWriteSlotMapping,
    PagedAttentionContextLens,
    PagedAttentionRows,
    PagedAttentionBlockTables,
    SampleRow,
    SampleNumTokens,
    LogprobsLogitsRow,
    LogprobsTokenIndex,
    LogprobsTokens,
}

/// Bytes of a record.
pub const RECORD_BYTES: usize = 16;

/// In the order of their records: operation and argument.
const FAULTS: [(Fault, &str, &str); 12] = [
    (Fault::EmbedTokenIndices, "embed", "token_indices"),
    (Fault::EmbedTokenTable, "embed", "token_table"),
    (Fault::GatherRowsIndices, "gather_rows", "indices"),
    (Fault::RopeKvWriteSlotMapping, "rope_kv_write", "slot_mapping"),
    (Fault::PagedAttentionContextLens, "paged_attention", "context_lens"),
    (Fault::PagedAttentionRows, "paged_attention", "rows"),
    (Fault::PagedAttentionBlockTables, "paged_attention", "block_tables"),
    (Fault::SampleRow, "sample", "row"),
    (Fault::SampleNumTokens, "sample", "num_tokens"),
    (Fault::LogprobsLogitsRow, "logprobs", "logits_row"),
    (Fault::LogprobsTokenIndex, "logprobs", "token_index"),
    (Fault::LogprobsTokens, "logprobs", "tokens"),
];

/// Bytes of all records.
pub const ALL_RECORDS_BYTES: usize = FAULTS.len() * RECORD_BYTES;

impl Fault {
    /// Where the record lies, given where the first does.
    pub const fn record(self, records: DevicePtr) -> DevicePtr {
        records.offset(self as usize * RECORD_BYTES)
    }
}

/// The first fault that `records` show.
pub fn check(records: &[u8]) -> Result<(), KernelError> {
    for ((_, op, argument), record) in FAULTS.iter().zip(records.chunks_exact(RECORD_BYTES)) {
        let word = |index: usize| u32::from_le_bytes(record[4 * index..][..4].try_into().expect("four bytes"));
        if word(0) != 0 {
            let (value, limit) = (u64::from(word(1)), u64::from(word(2)));
            return Err(KernelError::Range { op, argument, value, limit });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_the_error_of_its_argument() {
        let mut records = [0; ALL_RECORDS_BYTES];
        assert_eq!(check(&records), Ok(()));
        for (index, (fault, op, argument)) in FAULTS.into_iter().enumerate() {
            let at = fault.record(DevicePtr(0)).0 as usize;
            assert_eq!(at, index * RECORD_BYTES, "records lie in the order of the table");
            records[at..][..12].copy_from_slice(&[1, 0, 0, 0, 7, 0, 0, 0, 5, 0, 0, 0]);
            assert_eq!(check(&records), Err(KernelError::Range { op, argument, value: 7, limit: 5 }));
            records.fill(0);
        }
    }
}
