//! Metadata of a file: typed values by key, and arrays that stay as they lie in the header.

use std::collections::BTreeMap;
use std::ops::Range;

use super::container::{TEXT, scalar, scalar_size};
use super::error::{GgufError, quoted};

/// A number or a flag, of whatever width.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scalar {
    Unsigned(u64),
    /// Below zero; others are `Unsigned`.
    Negative(i64),
    Float(f64),
    Flag(bool),
}

/// Where a value lies in the header, or the value itself.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Scalar(Scalar),
    Text(Range<usize>),
    Array(Array),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Array {
    pub(super) kind: u32,
    pub(super) len: usize,
    pub(super) range: Range<usize>,
}

/// All keys of a file. A key that is there with another type than the one asked for is an error, never absent.
#[derive(Debug)]
pub struct Metadata {
    /// A copy: the file may change under its mapping.
    header: Vec<u8>,
    values: BTreeMap<String, Value>,
}

impl Metadata {
    pub(super) fn new(header: Vec<u8>, values: BTreeMap<String, Value>) -> Self {
        Self { header, values }
    }

    /// The file's bytes up to the end of its tensor table.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    pub fn contains(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    pub fn scalar(&self, key: &str) -> Result<Option<Scalar>, GgufError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Scalar(scalar)) => Ok(Some(*scalar)),
            Some(_) => Err(wrong(key, "is not one number or flag")),
        }
    }

    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, GgufError> {
        match self.scalar(key)? {
            None => Ok(None),
            Some(Scalar::Unsigned(number)) => Ok(Some(number)),
            Some(_) => Err(wrong(key, "is no whole number from 0 on")),
        }
    }

    /// A token id.
    pub fn id(&self, key: &str) -> Result<Option<u32>, GgufError> {
        let id = self.unsigned(key)?.map(u32::try_from).transpose();
        id.map_err(|_| wrong(key, "is no token id"))
    }

    pub fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        match self.scalar(key)? {
            None => Ok(None),
            Some(Scalar::Float(number)) if number.is_finite() => Ok(Some(number)),
            Some(Scalar::Unsigned(number)) => Ok(Some(number as f64)),
            Some(_) => Err(wrong(key, "is no finite number")),
        }
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        match self.scalar(key)? {
            None => Ok(None),
            Some(Scalar::Flag(flag)) => Ok(Some(flag)),
            Some(_) => Err(wrong(key, "is neither true nor false")),
        }
    }

    pub fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Text(range)) => self.text_at(range.clone()).map(Some),
            Some(_) => Err(wrong(key, "is no text")),
        }
    }

    /// How many items an array has.
    pub fn array_len(&self, key: &str) -> Result<Option<usize>, GgufError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) => Ok(Some(array.len)),
            Some(_) => Err(wrong(key, "is no array")),
        }
    }

    /// The texts of an array, in order.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, GgufError> {
        let array = match self.values.get(key) {
            None => return Ok(None),
            Some(Value::Array(array)) if array.kind == TEXT || array.len == 0 => array,
            Some(_) => return Err(wrong(key, "is no array of texts")),
        };
        let mut texts = Vec::with_capacity(array.len);
        let mut at = array.range.start;
        for _ in 0..array.len {
            // The container's check went over the same lengths.
            let len = u64::from_le_bytes(self.header[at..at + 8].try_into().expect("eight bytes")) as usize;
            texts.push(self.text_at(at + 8..at + 8 + len)?);
            at += 8 + len;
        }
        Ok(Some(texts))
    }

    /// The numbers of an array, in order.
    pub fn scalars(&self, key: &str) -> Result<Option<Vec<Scalar>>, GgufError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) if array.len == 0 => Ok(Some(Vec::new())),
            Some(Value::Array(Array { kind, range, .. })) => {
                let size = scalar_size(*kind).ok_or_else(|| wrong(key, "is no array of numbers"))?;
                let items = self.header[range.clone()].chunks_exact(size as usize);
                Ok(Some(items.map(|bytes| scalar(*kind, bytes)).collect()))
            }
            Some(_) => Err(wrong(key, "is no array")),
        }
    }

    fn text_at(&self, range: Range<usize>) -> Result<&str, GgufError> {
        std::str::from_utf8(&self.header[range]).map_err(|_| GgufError::NotUtf8 { what: "a metadata value" })
    }
}

fn wrong(key: &str, why: &str) -> GgufError {
    GgufError::Metadata { key: quoted(key), why: why.to_owned() }
}
