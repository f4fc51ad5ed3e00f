//! Fields of a JSON body, one at a time: typed, bounded, and refused by name.
//!
//! A body is first cut into its fields without looking into them, so its memory is about twice its bytes whatever it
//! holds. Each field is then read as the type that it must have; the message of a refusal says what that is and never
//! what was sent.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::error::ApiError;
use crate::generation::invalid;

/// Deepest nesting of arrays and objects.
const MAX_DEPTH: usize = 64;
/// Most fields of a body or a message.
const MAX_FIELDS: usize = 256;
/// Most names, and bytes of a name, that are told back.
const MAX_NAMED: usize = 32;
const MAX_NAME_BYTES: usize = 64;

/// The fields of one JSON object.
pub(super) struct Fields<'b> {
    /// Where it is in the body: empty, or a path that names are put behind.
    path: String,
    entries: Vec<Entry<'b>>,
}

struct Entry<'b> {
    name: String,
    value: &'b RawValue,
    known: bool,
}

/// Names of fields that nobody looked at.
#[derive(Default)]
pub(super) struct Ignored {
    names: Vec<String>,
}

impl Ignored {
    /// The names as a header's value: no character that could not stand in one, and not many.
    pub(super) fn header(&self) -> Option<String> {
        (!self.names.is_empty()).then(|| self.names.join(","))
    }

    pub(super) fn first(&self) -> Option<&str> {
        self.names.first().map(String::as_str)
    }

    pub(super) fn for_each(&self, mut each: impl FnMut(&str)) {
        self.names.iter().for_each(|name| each(name));
    }

    pub(super) fn add(&mut self, name: &str) {
        let name: String = name
            .chars()
            .take(MAX_NAME_BYTES)
            .map(|character| match character {
                'a'..='z' | 'A'..='Z' | '0'..='9' | '_' | '-' | '.' | '[' | ']' => character,
                _ => '?',
            })
            .collect();
        if self.names.len() < MAX_NAMED && !self.names.contains(&name) {
            self.names.push(name);
        }
    }
}

impl<'b> Fields<'b> {
    /// The fields of a whole body.
    pub(super) fn of_body(body: &'b [u8]) -> Result<Self, ApiError> {
        let refused = |message: &str| ApiError::InvalidRequest { param: None, message: format!("the body {message}") };
        let text = std::str::from_utf8(body).map_err(|_| refused("is not UTF-8"))?;
        if depth(body) > MAX_DEPTH {
            return Err(refused(&format!("nests arrays and objects deeper than {MAX_DEPTH}")));
        }
        Self::parse(text, String::new(), MAX_FIELDS).map_err(|cause| match cause {
            ObjectError::NotAnObject => refused("is not a JSON object"),
            ObjectError::TooMany => refused(&format!("has more than {MAX_FIELDS} fields")),
            ObjectError::Twice => refused("names a field twice"),
        })
    }

    /// The fields of an object inside a body.
    pub(super) fn of_value(raw: &'b RawValue, path: &str) -> Result<Self, ApiError> {
        Self::of_value_bounded(raw, path, MAX_FIELDS)
    }

    fn of_value_bounded(raw: &'b RawValue, path: &str, limit: usize) -> Result<Self, ApiError> {
        Self::parse(raw.get(), path.to_owned(), limit).map_err(|cause| match cause {
            ObjectError::NotAnObject => invalid(path, "must be an object"),
            ObjectError::TooMany => invalid(path, format_args!("must have at most {limit} entries")),
            ObjectError::Twice => invalid(path, "must not name a field twice"),
        })
    }

    fn parse(text: &'b str, path: String, limit: usize) -> Result<Self, ObjectError> {
        let problem = Cell::new(ObjectError::NotAnObject);
        let mut deserializer = serde_json::Deserializer::from_str(text);
        let entries =
            ObjectSeed { limit, problem: &problem }.deserialize(&mut deserializer).map_err(|_| problem.get())?;
        deserializer.end().map_err(|_| ObjectError::NotAnObject)?;
        Ok(Self { path, entries })
    }

    /// The field's full name.
    pub(super) fn name(&self, field: &str) -> String {
        if self.path.is_empty() { field.to_owned() } else { format!("{}.{field}", self.path) }
    }

    /// The field's value; `None` where it is absent or null.
    pub(super) fn raw(&mut self, field: &str) -> Option<&'b RawValue> {
        let entry = self.entries.iter_mut().find(|entry| entry.name == field)?;
        entry.known = true;
        (entry.value.get() != "null").then_some(entry.value)
    }

    fn typed<T: DeserializeOwned>(&mut self, field: &str, must_be: &str) -> Result<Option<T>, ApiError> {
        let Some(raw) = self.raw(field) else { return Ok(None) };
        serde_json::from_str(raw.get())
            .map(Some)
            .map_err(|_| invalid(&self.name(field), format_args!("must be {must_be}")))
    }

    pub(super) fn bool(&mut self, field: &str) -> Result<Option<bool>, ApiError> {
        self.typed(field, "true or false")
    }

    /// A whole number that is not negative.
    pub(super) fn count(&mut self, field: &str) -> Result<Option<u64>, ApiError> {
        self.typed(field, "a whole number from 0 on")
    }

    pub(super) fn integer(&mut self, field: &str) -> Result<Option<i64>, ApiError> {
        self.typed(field, "a whole number of at most 63 bits")
    }

    pub(super) fn number(&mut self, field: &str) -> Result<Option<f64>, ApiError> {
        self.typed(field, "a number")
    }

    pub(super) fn string(&mut self, field: &str) -> Result<Option<String>, ApiError> {
        self.typed(field, "a string")
    }

    /// An array with at most `limit` entries; no more than those are read.
    pub(super) fn list<T: DeserializeOwned>(
        &mut self,
        field: &str,
        limit: usize,
        must_hold: &str,
    ) -> Result<Option<Vec<T>>, ApiError> {
        let Some(raw) = self.raw(field) else { return Ok(None) };
        list(raw, &self.name(field), limit, must_hold).map(Some)
    }

    /// A string, or an array of them.
    pub(super) fn strings(&mut self, field: &str, limit: usize) -> Result<Vec<String>, ApiError> {
        match self.raw(field) {
            None => Ok(Vec::new()),
            Some(raw) if raw.get().starts_with('"') => Ok(self.string(field)?.into_iter().collect()),
            Some(raw) => list(raw, &self.name(field), limit, "be a string or a list of strings"),
        }
    }

    /// An object with a number for each token id.
    pub(super) fn numbers_by_token(
        &mut self,
        field: &str,
        limit: usize,
    ) -> Result<std::collections::BTreeMap<u32, f64>, ApiError> {
        let Some(raw) = self.raw(field) else { return Ok(Default::default()) };
        let name = self.name(field);
        let wrong = || invalid(&name, "must map token ids to numbers");
        let fields = Fields::of_value_bounded(raw, &name, limit)?;
        fields
            .entries
            .iter()
            .map(|entry| {
                let id = entry.name.parse().map_err(|_| wrong())?;
                let number = serde_json::from_str(entry.value.get()).map_err(|_| wrong())?;
                Ok((id, number))
            })
            .collect()
    }

    /// Refuses a field that is understood but not served, unless its value asks for nothing.
    pub(super) fn refuse_unless(
        &mut self,
        field: &str,
        asks_for_nothing: impl FnOnce(&str) -> bool,
    ) -> Result<(), ApiError> {
        match self.raw(field) {
            Some(raw) if !asks_for_nothing(raw.get()) => Err(invalid(&self.name(field), "is not supported")),
            _ => Ok(()),
        }
    }

    /// Refuses fields that are understood but not served, unless they are false or empty.
    pub(super) fn refuse(&mut self, fields: &[&str]) -> Result<(), ApiError> {
        fields.iter().try_for_each(|field| {
            self.refuse_unless(field, |raw| {
                let compact: String =
                    raw.chars().filter(|character| !character.is_ascii_whitespace()).take(6).collect();
                matches!(compact.as_str(), "false" | "[]" | "{}" | "\"\"")
            })
        })
    }

    /// A message's content as a string.
    pub(super) fn typed_content(&mut self) -> Result<String, ApiError> {
        Ok(self.typed("content", "a string or a list of parts")?.unwrap_or_default())
    }

    /// The same fields, named as if they were a body's own.
    pub(super) fn without_path(mut self) -> Self {
        self.path.clear();
        self
    }

    /// Notes the names that nobody asked for.
    pub(super) fn note_ignored(&self, ignored: &mut Ignored) {
        for entry in self.entries.iter().filter(|entry| !entry.known) {
            ignored.add(&self.name(&entry.name));
        }
    }
}

/// An array with at most `limit` entries; no more than those are read.
pub(super) fn list<T: DeserializeOwned>(
    raw: &RawValue,
    name: &str,
    limit: usize,
    must: &str,
) -> Result<Vec<T>, ApiError> {
    let too_many = Cell::new(false);
    let mut deserializer = serde_json::Deserializer::from_str(raw.get());
    ListSeed { limit, too_many: &too_many, item: PhantomData }.deserialize(&mut deserializer).map_err(|_| {
        if too_many.get() {
            invalid(name, format_args!("must have at most {limit} entries"))
        } else {
            invalid(name, format_args!("must {must}"))
        }
    })
}

/// An array's entries as they stand in the body.
pub(super) fn raw_list<'b>(raw: &'b RawValue, name: &str, limit: usize) -> Result<Vec<&'b RawValue>, ApiError> {
    let too_many = Cell::new(false);
    let mut deserializer = serde_json::Deserializer::from_str(raw.get());
    ListSeed { limit, too_many: &too_many, item: PhantomData }.deserialize(&mut deserializer).map_err(|_| {
        if too_many.get() {
            invalid(name, format_args!("must have at most {limit} entries"))
        } else {
            invalid(name, "must be a list")
        }
    })
}

/// How deep arrays and objects nest. Brackets inside strings do not count; whether the JSON is well formed is for the
/// parser to say.
fn depth(body: &[u8]) -> usize {
    let (mut depth, mut deepest) = (0usize, 0usize);
    let mut bytes = body.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b'"' => {
                while let Some(byte) = bytes.next() {
                    match byte {
                        b'\\' => {
                            bytes.next();
                        }
                        b'"' => break,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    deepest
}

#[derive(Clone, Copy, Debug)]
enum ObjectError {
    NotAnObject,
    TooMany,
    Twice,
}

struct ObjectSeed<'p> {
    limit: usize,
    problem: &'p Cell<ObjectError>,
}

impl<'de> DeserializeSeed<'de> for ObjectSeed<'_> {
    type Value = Vec<Entry<'de>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for ObjectSeed<'_> {
    type Value = Vec<Entry<'de>>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut names = std::collections::BTreeSet::new();
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            let problem = if entries.len() == self.limit {
                ObjectError::TooMany
            } else if !names.insert(name.clone()) {
                ObjectError::Twice
            } else {
                entries.push(Entry { name, value: map.next_value()?, known: false });
                continue;
            };
            self.problem.set(problem);
            return Err(A::Error::custom("refused"));
        }
        Ok(entries)
    }
}

struct ListSeed<'p, T> {
    limit: usize,
    too_many: &'p Cell<bool>,
    item: PhantomData<T>,
}

impl<'de, T: serde::Deserialize<'de>> DeserializeSeed<'de> for ListSeed<'_, T> {
    type Value = Vec<T>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, T: serde::Deserialize<'de>> Visitor<'de> for ListSeed<'_, T> {
    type Value = Vec<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            if items.len() == self.limit {
                self.too_many.set(true);
                return Err(A::Error::custom("refused"));
            }
            items.push(item);
        }
        Ok(items)
    }
}
