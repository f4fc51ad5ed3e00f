//! What an operation refuses, and what a device can fail with.

/// Every device rejects the same inputs with the same variant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// An argument's length, shape or type does not fit the others.
    #[error("{op}: {argument} has {found}, expected {expected}")]
    Shape { op: &'static str, argument: &'static str, expected: usize, found: usize },
    /// An argument holds a type that the operation does not take.
    #[error("{op}: {argument} has type {found}")]
    Type { op: &'static str, argument: &'static str, found: &'static str },
    /// A value inside an argument is out of range (an index past the end of a table, say).
    #[error("{op}: {argument} holds {value}, must be below {limit}")]
    Range { op: &'static str, argument: &'static str, value: u64, limit: u64 },
    /// The device has no room for so many bytes.
    #[error("{what}: no memory for {bytes} bytes")]
    OutOfMemory { what: &'static str, bytes: u64 },
    /// The device is absent or failed.
    #[error("{device}: {cause}")]
    Device { device: &'static str, cause: String },
}
