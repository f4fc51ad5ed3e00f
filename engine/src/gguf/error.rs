//! Why a GGUF file is refused.

/// What is wrong with a file. Names from the file are quoted, escaped and cut short.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GgufError {
    #[error("is no GGUF file")]
    NotGguf,
    #[error("is a big-endian GGUF file; little-endian ones are read")]
    BigEndian,
    #[error("is GGUF version {0}; versions 2 and 3 are read")]
    Version(u32),
    #[error("ends inside {what}")]
    Truncated { what: &'static str },
    #[error("{what}: {found} is more than {limit}")]
    TooMany { what: &'static str, found: u64, limit: u64 },
    #[error("{what} is not UTF-8")]
    NotUtf8 { what: &'static str },
    #[error("metadata key {key} has the unknown type {kind}")]
    ValueType { key: String, kind: u32 },
    #[error("metadata key {key} holds arrays in an array, which is not read")]
    Nested { key: String },
    #[error("{what} {name} is there twice")]
    Duplicate { what: &'static str, name: String },
    #[error("general.alignment is no power of two from 8 to 65536")]
    Alignment,
    #[error("tensor {name}: {why}")]
    Tensor { name: String, why: String },
    #[error("metadata key {key}: {why}")]
    Metadata { key: String, why: String },
    #[error("{why}")]
    Split { why: String },
}

/// A name from the file as it may stand in a message.
pub(super) fn quoted(name: &str) -> String {
    const MOST: usize = 64;
    match name.char_indices().nth(MOST) {
        Some((end, _)) => format!("{:?}...", &name[..end]),
        None => format!("{name:?}"),
    }
}
