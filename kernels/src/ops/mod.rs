//! The operations. Each folder holds one: its contract (`mod.rs`), its meaning (`reference.rs`), its code per device.

pub mod activation;
pub mod add_rows;
pub mod embed;
pub mod encoder_attention;
pub mod gather_rows;
pub mod layer_norm;
pub mod linear;
pub mod logprobs;
pub mod paged_attention;
pub mod peaks;
pub mod rms_norm;
pub mod rope_kv_write;
pub mod rope_table;
pub mod sample;
pub(crate) mod write_staged;

use crate::KernelError;

/// Names of the operations that have device code: their folders', which are those of their modules. What only encoders need has
/// none yet.
pub(crate) const NAMES: [&str; 10] = [
    "embed",
    "gather_rows",
    "linear",
    "logprobs",
    "paged_attention",
    "rms_norm",
    "rope_kv_write",
    "rope_table",
    "sample",
    "write_staged",
];

/// Refuses a buffer that holds less than an operation reads or writes.
pub(crate) fn at_least(
    op: &'static str,
    argument: &'static str,
    expected: usize,
    found: usize,
) -> Result<(), KernelError> {
    if found < expected { Err(KernelError::Shape { op, argument, expected, found }) } else { Ok(()) }
}

/// Refuses a value that is not below `limit`.
pub(crate) fn below(
    op: &'static str,
    argument: &'static str,
    value: impl TryInto<u64>,
    limit: usize,
) -> Result<(), KernelError> {
    let (value, limit) = (value.try_into().unwrap_or(u64::MAX), limit as u64);
    if value >= limit { Err(KernelError::Range { op, argument, value, limit }) } else { Ok(()) }
}

/// Refuses a list of indices of which one is not below `limit`, naming the first.
pub(crate) fn all_below(
    op: &'static str,
    argument: &'static str,
    values: &[u32],
    limit: usize,
) -> Result<(), KernelError> {
    match values.iter().find(|&&value| value as usize >= limit) {
        Some(&value) => below(op, argument, value, limit),
        None => Ok(()),
    }
}
