//! The container: header, metadata and tensor table of one file, versions 2 and 3.
//!
//! The file is hostile until shown otherwise. Every count and length is held against the bytes that are left and against
//! a bound before anything is allocated for it; the whole index takes at most the header's own bytes and
//! [`MAX_INDEX_BYTES`] on top. What is returned was checked in full: all text is UTF-8, all tensors lie inside the file
//! and do not overlap.

use std::collections::btree_map::{BTreeMap, Entry};
use std::ops::Range;

use quire_kernels::TensorFormat;

use super::error::{GgufError, quoted};
use super::metadata::{Array, Metadata, Scalar, Value};

const MAGIC: &[u8; 4] = b"GGUF";
/// Largest header (metadata and tensor table) that is read: vocabularies of a million tokens fit.
pub const MAX_HEADER_BYTES: u64 = 256 << 20;
/// What the index takes beside the header at most.
pub const MAX_INDEX_BYTES: u64 = 64 << 20;
const MAX_KEYS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 16;
const MAX_KEY_BYTES: u64 = 256;
const MAX_TENSOR_NAME_BYTES: u64 = 256;
/// Vocabularies and their merges are the longest.
const MAX_ARRAY_LEN: u64 = 1 << 22;
const MAX_DIMS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
const ALIGNMENTS: std::ops::RangeInclusive<u64> = 8..=1 << 16;

/// The checked index of one file.
#[derive(Debug)]
pub struct Container {
    pub metadata: Metadata,
    /// In the file's order.
    pub tensors: Vec<TensorInfo>,
}

/// One tensor, inside the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    pub format: TensorFormat,
    /// Rows before columns, as matrices are written; the file has them the other way round.
    pub shape: Vec<usize>,
    /// Bytes of the file.
    pub range: Range<usize>,
}

impl Container {
    /// Reads the index of a whole file.
    pub fn parse(file: &[u8]) -> Result<Self, GgufError> {
        let bounded = &file[..file.len().min(MAX_HEADER_BYTES as usize)];
        let header_len = match Index::read(bounded) {
            Err(GgufError::Truncated { .. }) if bounded.len() < file.len() => {
                return Err(too_many("header bytes", file.len() as u64, MAX_HEADER_BYTES));
            }
            index => index?.header_len,
        };
        // The file may change under its mapping: what is kept is read from a copy alone.
        let header = file[..header_len].to_vec();
        let Index { values, listed, alignment, .. } = Index::read(&header)?;
        let data_start = (header_len as u64).next_multiple_of(alignment);
        let data_len = (file.len() as u64).saturating_sub(data_start);
        let tensors = place(listed, alignment, data_start, data_len)?;
        Ok(Self { metadata: Metadata::new(header, values), tensors })
    }
}

/// What the header says, tensors not yet placed.
struct Index {
    values: BTreeMap<String, Value>,
    listed: Vec<Listed>,
    alignment: u64,
    header_len: usize,
}

impl Index {
    fn read(bytes: &[u8]) -> Result<Self, GgufError> {
        let mut reader = Reader { bytes, at: 0 };
        if reader.take(4, "the magic number")? != MAGIC {
            return Err(GgufError::NotGguf);
        }
        match reader.u32("the version")? {
            2 | 3 => {}
            other if matches!(other.swap_bytes(), 1..=3) => return Err(GgufError::BigEndian),
            other => return Err(GgufError::Version(other)),
        }
        let num_tensors = reader.count("tensors", MAX_TENSORS, MIN_TENSOR_BYTES)?;
        let num_keys = reader.count("metadata keys", MAX_KEYS, MIN_KEY_BYTES)?;

        let mut values = BTreeMap::new();
        for _ in 0..num_keys {
            let key = reader.text("a metadata key", MAX_KEY_BYTES)?;
            let value = reader.value(&key)?;
            match values.entry(key) {
                Entry::Vacant(entry) => entry.insert(value),
                Entry::Occupied(entry) => {
                    return Err(GgufError::Duplicate { what: "metadata key", name: quoted(entry.key()) });
                }
            };
        }
        let alignment = match values.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Scalar(Scalar::Unsigned(alignment)))
                if alignment.is_power_of_two() && ALIGNMENTS.contains(alignment) =>
            {
                *alignment
            }
            Some(_) => return Err(GgufError::Alignment),
        };
        let mut listed = Vec::with_capacity(num_tensors);
        for _ in 0..num_tensors {
            listed.push(reader.tensor()?);
        }
        Ok(Self { values, listed, alignment, header_len: reader.at })
    }
}

/// A tensor as the table has it: checked on its own, not yet against the others.
struct Listed {
    name: String,
    format: TensorFormat,
    shape: Vec<usize>,
    offset: u64,
    num_bytes: u64,
}

/// Checks that tensors are aligned, inside the file, apart from each other and of different names.
fn place(listed: Vec<Listed>, alignment: u64, data_start: u64, data_len: u64) -> Result<Vec<TensorInfo>, GgufError> {
    let fault = |tensor: &Listed, why: String| GgufError::Tensor { name: quoted(&tensor.name), why };
    for tensor in &listed {
        if !tensor.offset.is_multiple_of(alignment) {
            return Err(fault(tensor, format!("offset {} is no multiple of {alignment}", tensor.offset)));
        }
        match tensor.offset.checked_add(tensor.num_bytes) {
            Some(end) if end <= data_len => {}
            _ => {
                let why = format!("{} bytes from {} on, of {data_len}", tensor.num_bytes, tensor.offset);
                return Err(fault(tensor, why));
            }
        }
    }
    let mut by_offset: Vec<&Listed> = listed.iter().collect();
    by_offset.sort_unstable_by_key(|tensor| tensor.offset);
    for pair in by_offset.windows(2) {
        if pair[0].offset + pair[0].num_bytes > pair[1].offset {
            return Err(fault(pair[1], format!("lies over tensor {}", quoted(&pair[0].name))));
        }
    }
    let mut by_name: Vec<&Listed> = listed.iter().collect();
    by_name.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = by_name.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(GgufError::Duplicate { what: "tensor", name: quoted(&pair[0].name) });
    }
    // Inside the file, so it fits a usize.
    let range = |tensor: &Listed| {
        let start = (data_start + tensor.offset) as usize;
        start..start + tensor.num_bytes as usize
    };
    let ranges: Vec<Range<usize>> = listed.iter().map(range).collect();
    let placed = listed.into_iter().zip(ranges);
    Ok(placed.map(|(Listed { name, format, shape, .. }, range)| TensorInfo { name, format, shape, range }).collect())
}

/// Bytes of a key and its value, and of a tensor's entry, at least.
const MIN_KEY_BYTES: u64 = 8 + 4 + 1;
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

/// Takes numbers off the front of the file.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn take(&mut self, len: u64, what: &'static str) -> Result<&'a [u8], GgufError> {
        if len > self.left() {
            return Err(GgufError::Truncated { what });
        }
        let taken = &self.bytes[self.at..self.at + len as usize];
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], GgufError> {
        Ok(self.take(N as u64, what)?.try_into().expect("so many were taken"))
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, GgufError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, GgufError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A number of items that are still to come, of at least `min_bytes` each.
    fn count(&mut self, what: &'static str, limit: u64, min_bytes: u64) -> Result<usize, GgufError> {
        let count = self.u64(what)?;
        if count > limit {
            return Err(too_many(what, count, limit));
        }
        if count > self.left() / min_bytes {
            return Err(GgufError::Truncated { what });
        }
        Ok(count as usize)
    }

    /// Where a text lies, its length and encoding checked.
    fn text_range(&mut self, what: &'static str, limit: u64) -> Result<Range<usize>, GgufError> {
        let len = self.u64(what)?;
        if len > limit {
            return Err(too_many(what, len, limit));
        }
        let start = self.at;
        match std::str::from_utf8(self.take(len, what)?) {
            Ok(_) => Ok(start..self.at),
            Err(_) => Err(GgufError::NotUtf8 { what }),
        }
    }

    fn text(&mut self, what: &'static str, limit: u64) -> Result<String, GgufError> {
        let range = self.text_range(what, limit)?;
        String::from_utf8(self.bytes[range].to_vec()).map_err(|_| GgufError::NotUtf8 { what })
    }

    fn value(&mut self, key: &str) -> Result<Value, GgufError> {
        const WHAT: &str = "a metadata value";
        let kind = self.u32(WHAT)?;
        match kind {
            TEXT => Ok(Value::Text(self.text_range(WHAT, MAX_HEADER_BYTES)?)),
            ARRAY => {
                let kind = self.u32(WHAT)?;
                let len = self.u64(WHAT)?;
                if len > MAX_ARRAY_LEN {
                    return Err(too_many("items of an array", len, MAX_ARRAY_LEN));
                }
                let start = self.at;
                match kind {
                    TEXT => {
                        if len > self.left() / 8 {
                            return Err(GgufError::Truncated { what: WHAT });
                        }
                        for _ in 0..len {
                            self.text_range(WHAT, MAX_HEADER_BYTES)?;
                        }
                    }
                    ARRAY => return Err(GgufError::Nested { key: quoted(key) }),
                    _ => {
                        let size = scalar_size(kind).ok_or_else(|| unknown_type(key, kind))?;
                        let num_bytes = len.checked_mul(size).ok_or(GgufError::Truncated { what: WHAT })?;
                        self.take(num_bytes, WHAT)?;
                    }
                }
                Ok(Value::Array(Array { kind, len: len as usize, range: start..self.at }))
            }
            _ => {
                let size = scalar_size(kind).ok_or_else(|| unknown_type(key, kind))?;
                Ok(Value::Scalar(scalar(kind, self.take(size, WHAT)?)))
            }
        }
    }

    fn tensor(&mut self) -> Result<Listed, GgufError> {
        const WHAT: &str = "the tensor table";
        let name = self.text(WHAT, MAX_TENSOR_NAME_BYTES)?;
        let num_dims = self.u32(WHAT)?;
        if !(1..=MAX_DIMS).contains(&num_dims) {
            let why = format!("{num_dims} dimensions, 1 to {MAX_DIMS} are read");
            return Err(GgufError::Tensor { name: quoted(&name), why });
        }
        let mut shape = Vec::with_capacity(num_dims as usize);
        for _ in 0..num_dims {
            shape.push(self.u64(WHAT)?);
        }
        let format = self.u32(WHAT)?;
        let offset = self.u64(WHAT)?;
        let fault = |why: String| GgufError::Tensor { name: quoted(&name), why };
        let format = tensor_format(format).map_err(fault)?;
        let whole = |dim: &u64| usize::try_from(*dim).ok().filter(|dim| *dim > 0);
        let dims: Option<Vec<usize>> = shape.iter().map(whole).collect();
        let num_bytes = dims.as_ref().and_then(|dims| {
            let row_bytes = format.row_bytes(dims[0])? as u64;
            dims[1..].iter().try_fold(row_bytes, |bytes, dim| bytes.checked_mul(*dim as u64))
        });
        let (Some(mut shape), Some(num_bytes)) = (dims, num_bytes) else {
            return Err(fault(format!("{shape:?} is no shape of whole {} blocks", format.name())));
        };
        shape.reverse();
        Ok(Listed { name, format, shape, offset, num_bytes })
    }
}

fn too_many(what: &'static str, found: u64, limit: u64) -> GgufError {
    GgufError::TooMany { what, found, limit }
}

fn unknown_type(key: &str, kind: u32) -> GgufError {
    GgufError::ValueType { key: quoted(key), kind }
}

pub(super) const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// Bytes of a number or a flag; `None` for types that are neither.
pub(super) fn scalar_size(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// A number or a flag from its [`scalar_size`] bytes.
pub(super) fn scalar(kind: u32, bytes: &[u8]) -> Scalar {
    let word = bytes.iter().rev().fold(0_u64, |word, byte| word << 8 | u64::from(*byte));
    let shift = 64 - 8 * bytes.len() as u32;
    let signed = (word << shift) as i64 >> shift;
    match kind {
        6 => Scalar::Float(f64::from(f32::from_bits(word as u32))),
        12 => Scalar::Float(f64::from_bits(word)),
        7 => Scalar::Flag(word != 0),
        1 | 3 | 5 | 11 if signed < 0 => Scalar::Negative(signed),
        _ => Scalar::Unsigned(word),
    }
}

/// The formats that are served, by ggml's numbers; an error names the others.
fn tensor_format(kind: u32) -> Result<TensorFormat, String> {
    use TensorFormat::{Bf16, F16, F32, Iq4Nl, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    let format = match kind {
        0 => F32,
        1 => F16,
        2 => Q4_0,
        3 => Q4_1,
        6 => Q5_0,
        7 => Q5_1,
        8 => Q8_0,
        12 => Q4K,
        13 => Q5K,
        14 => Q6K,
        20 => Iq4Nl,
        30 => Bf16,
        _ => {
            let name = OTHER_FORMATS.iter().find(|(other, _)| *other == kind);
            let name = name.map_or_else(|| format!("unknown type {kind}"), |(_, name)| (*name).to_owned());
            let served: Vec<&str> = TensorFormat::ALL.iter().map(|format| format.name()).collect();
            return Err(format!("is stored as {name}; {} are served", served.join(", ")));
        }
    };
    Ok(format)
}

/// What ggml has beside them.
const OTHER_FORMATS: [(u32, &str); 23] = [
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
    (31, "Q4_0_4_4"),
];
