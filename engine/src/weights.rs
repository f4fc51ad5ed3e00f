//! A model's tensors: from safetensors or GGUF files, mapped and read without trust, or drawn from a seed.
//!
//! Files are mapped while weights are packed and unmapped when [`Weights`] is dropped; nothing of a file stays in use.

mod fp8;

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use half::{bf16, f16};
use memmap2::Mmap;
use quire_kernels::{DType, HostTensor, TensorFormat};
use safetensors::{Dtype as FileDtype, SafeTensors};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::error::EngineError;
use crate::gguf;
use crate::source::ModelSource;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Files of other tools that hold weights in a form that can run code when it is read.
const PICKLED: [&str; 5] =
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "consolidated.00.pth"];
/// No honest JSON file of a model is larger.
const MAX_CONFIG_BYTES: u64 = 16 << 20;
const MAX_INDEX_BYTES: u64 = 100_000_000;
/// Of a piece of a tensor that the digest covers.
const SAMPLE_BYTES: usize = 4096;
/// Standard deviation of dummy weights.
const DUMMY_STD: f32 = 0.02;

/// One tensor, its shape checked.
pub(crate) struct Tensor<'a> {
    format: TensorFormat,
    rows: usize,
    cols: usize,
    bytes: Cow<'a, [u8]>,
}

impl Tensor<'_> {
    /// As the kernels take it.
    pub(crate) fn host(&self) -> HostTensor<'_> {
        HostTensor { format: self.format, rows: self.rows, cols: self.cols, bytes: &self.bytes }
    }

    /// Its values as `f32`, exactly.
    pub(crate) fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.cols];
        self.format.decode(&self.bytes, &mut values);
        values
    }
}

/// Where tensors come from.
pub(crate) struct Weights {
    values: Values,
    digest: [u8; 32],
}

enum Values {
    Files { blobs: Vec<Blob>, index: HashMap<String, Entry> },
    Dummy { dtype: DType, seed: u64 },
}

enum Blob {
    Mapped(Mmap),
    Embedded(&'static [u8]),
}

impl Blob {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Embedded(bytes) => bytes,
        }
    }
}

struct Entry {
    blob: usize,
    /// Or the type that is not served.
    format: Result<TensorFormat, FileDtype>,
    shape: Vec<usize>,
    range: Range<usize>,
    /// How many heads there are, where their rows are stored with the halves of each head interleaved.
    interleaved_heads: Option<usize>,
    is_read: Cell<bool>,
}

impl Weights {
    /// Maps the safetensors files of a model. `config_json` goes into the digest.
    pub(crate) fn open(source: &ModelSource, config_json: &[u8]) -> Result<Self, EngineError> {
        let mut digest = Sha256::new();
        digest.update(config_json);
        let mut blobs = Vec::new();
        let mut index = HashMap::new();
        if let Some(blob) = open_blob(source, SINGLE)? {
            index_blob(&blob, SINGLE, 0, None, &mut index, &mut digest)?;
            blobs.push(blob);
        } else {
            let Some(json) = read_bounded(source, INDEX, MAX_INDEX_BYTES)? else { return Err(no_weights(source)) };
            for (file, names) in shards(&json)? {
                let blob = open_blob(source, &file)?.ok_or_else(|| file_error(&file, "is missing"))?;
                index_blob(&blob, &file, blobs.len(), Some(&names), &mut index, &mut digest)?;
                blobs.push(blob);
            }
        }
        Ok(Self { values: Values::Files { blobs, index }, digest: digest.finalize().into() })
    }

    /// Takes over the files of a GGUF model.
    pub(crate) fn of_gguf(parts: Vec<gguf::Part>) -> Result<Self, EngineError> {
        let metadata = &parts[0].container.metadata;
        let heads = gguf::head_counts(metadata).map_err(|error| gguf::in_file(&parts[0].path, &error))?;
        let is_interleaved =
            gguf::has_interleaved_heads(metadata).map_err(|error| gguf::in_file(&parts[0].path, &error))?;
        let mut digest = Sha256::new();
        let mut index = HashMap::new();
        for (blob, part) in parts.iter().enumerate() {
            digest.update(part.container.metadata.header());
            for tensor in &part.container.tensors {
                sample(&part.map[tensor.range.clone()], &mut digest);
                // A name that is not known stays as it is, and is refused with all that nobody reads.
                let (name, rows) =
                    gguf::hugging_face(&tensor.name).unwrap_or_else(|| (tensor.name.clone(), gguf::Rows::Plain));
                let interleaved_heads = match rows {
                    gguf::Rows::Query if is_interleaved => Some(heads.num_heads),
                    gguf::Rows::Key if is_interleaved => Some(heads.num_kv_heads),
                    _ => None,
                };
                let entry = Entry {
                    blob,
                    format: Ok(tensor.format),
                    shape: tensor.shape.clone(),
                    range: tensor.range.clone(),
                    interleaved_heads,
                    is_read: Cell::new(false),
                };
                if index.insert(name, entry).is_some() {
                    let why = "has another name of a tensor that is there too".to_owned();
                    return Err(EngineError::Tensor { name: tensor.name.clone(), why });
                }
            }
        }
        let blobs = parts.into_iter().map(|part| Blob::Mapped(part.map)).collect();
        Ok(Self { values: Values::Files { blobs, index }, digest: digest.finalize().into() })
    }

    /// Seeded random values of whatever shape is asked for, stored as `dtype`.
    pub(crate) fn dummy(seed: u64, dtype: DType, config_json: &[u8]) -> Self {
        let digest = Sha256::new().chain_update(config_json).chain_update(b"dummy").chain_update(seed.to_le_bytes());
        Self { values: Values::Dummy { dtype, seed }, digest: digest.finalize().into() }
    }

    /// SHA-256 over `config.json`, the headers of all files, and up to 12 KiB of each tensor's values.
    pub(crate) fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// What a tensor's numbers are stored as, where it exists and is dense.
    pub(crate) fn dtype_of(&self, name: &str) -> Option<DType> {
        match &self.values {
            Values::Files { index, .. } => match index.get(name)?.format {
                Ok(TensorFormat::F32) => Some(DType::F32),
                Ok(TensorFormat::Bf16) => Some(DType::Bf16),
                Ok(TensorFormat::F16) => Some(DType::F16),
                Ok(_) | Err(_) => None,
            },
            Values::Dummy { dtype, .. } => Some(*dtype),
        }
    }

    /// What a tensor with rows of `cols` numbers is handed to the kernels as. `None` where there is none, or where reading it
    /// fails.
    pub(crate) fn format_of(&self, name: &str, cols: usize) -> Option<TensorFormat> {
        match &self.values {
            Values::Files { index, .. } => match index.get(name)?.format {
                Ok(format) => Some(format),
                Err(FileDtype::F8_E4M3) => Some(fp8::format_of_rows(cols)),
                Err(_) => None,
            },
            Values::Dummy { dtype, .. } => Some((*dtype).into()),
        }
    }

    /// Whether the files hold the tensor.
    pub(crate) fn contains(&self, name: &str) -> bool {
        matches!(&self.values, Values::Files { index, .. } if index.contains_key(name))
    }

    /// Puts `prefix` before every name: files of a model that was saved without its head leave it out.
    pub(crate) fn put_below(&mut self, prefix: &str) {
        if let Values::Files { index, .. } = &mut self.values {
            *index = index.drain().map(|(name, entry)| (format!("{prefix}{name}"), entry)).collect();
        }
    }

    /// Takes what is not needed as read: heads that a model of another purpose left in its files.
    pub(crate) fn pass_over(&self, names: &[String]) {
        if let Values::Files { index, .. } = &self.values {
            names.iter().filter_map(|name| index.get(name)).for_each(|entry| entry.is_read.set(true));
        }
    }

    /// Refuses files that hold tensors which the model did not read: they would be dropped in silence, and the model
    /// would compute something else than its makers meant. `copies` are pairs `(unread, read)` that may be the same
    /// tensor twice (a tied output layer, written out).
    pub(crate) fn refuse_unread(&self, copies: &[(&str, &str)]) -> Result<(), EngineError> {
        let Values::Files { blobs, index } = &self.values else { return Ok(()) };
        let bytes = |entry: &Entry| &blobs[entry.blob].bytes()[entry.range.clone()];
        let is_copy = |name: &str, entry: &Entry| {
            let original = copies.iter().find(|(copy, _)| *copy == name).and_then(|(_, of)| index.get(*of));
            original.is_some_and(|of| of.shape == entry.shape && bytes(of) == bytes(entry))
        };
        // Older files carry rotary frequencies and numbers of positions, which follow from config.json.
        let is_derived =
            |name: &str| name.ends_with(".rotary_emb.inv_freq") || name.ends_with("embeddings.position_ids");
        let unread =
            index.iter().filter(|(name, entry)| !entry.is_read.get() && !is_derived(name) && !is_copy(name, entry));
        match unread.map(|(name, _)| name).min() {
            None => Ok(()),
            Some(name) => Err(EngineError::Tensor {
                name: name.clone(),
                why: "is in the files, but the configuration describes a model that does not use it".to_owned(),
            }),
        }
    }

    /// A matrix `[rows, cols]`.
    pub(crate) fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Tensor<'_>, EngineError> {
        self.tensor(name, &[rows, cols])
    }

    /// A vector, as one row.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Tensor<'_>, EngineError> {
        self.tensor(name, &[len])
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, EngineError> {
        let (rows, cols) = match *shape {
            [rows, cols] => (rows, cols),
            _ => (1, shape[0]),
        };
        match &self.values {
            Values::Dummy { dtype, seed } => {
                let bytes = Cow::Owned(draw(*seed, name, rows * cols, *dtype));
                Ok(Tensor { format: (*dtype).into(), rows, cols, bytes })
            }
            Values::Files { blobs, index } => {
                let error = |why: String| EngineError::Tensor { name: name.to_owned(), why };
                let entry = index.get(name).ok_or_else(|| error("is missing from the model's files".to_owned()))?;
                if entry.shape != shape {
                    return Err(error(format!("has shape {:?}, the configuration asks for {shape:?}", entry.shape)));
                }
                entry.is_read.set(true);
                // The header's check says that the range holds exactly what shape and type ask for.
                let bytes_of = |entry: &Entry| &blobs[entry.blob].bytes()[entry.range.clone()];
                let bytes = bytes_of(entry);
                let format = match entry.format {
                    Ok(format) => format,
                    Err(FileDtype::F8_E4M3) => {
                        let scales = fp8::SCALES.iter().find_map(|suffix| index.get(&format!("{name}{suffix}")));
                        let scales = scales.ok_or_else(|| error("is stored as F8_E4M3 without scales".to_owned()))?;
                        let scale_format = scales.format.ok().filter(|format| format.is_dense());
                        let scale_format =
                            scale_format.ok_or_else(|| error("has scales that are no numbers".to_owned()))?;
                        let mut values = vec![0.0; scales.shape.iter().product()];
                        scale_format.decode(bytes_of(scales), &mut values);
                        scales.is_read.set(true);
                        // What activations were to be rounded with: here they stay bf16, which rounds them less.
                        if let Some(module) = name.strip_suffix(".weight") {
                            index.get(&format!("{module}.input_scale")).inspect(|entry| entry.is_read.set(true));
                        }
                        let scales = fp8::Scales { values, shape: scales.shape.clone() };
                        let (format, bytes) = fp8::tensor(bytes, rows, cols, &scales).map_err(error)?;
                        return Ok(Tensor { format, rows, cols, bytes: Cow::Owned(bytes) });
                    }
                    Err(format) => {
                        return Err(error(format!("is stored as {format:?}; F32, F16, BF16 and F8_E4M3 are served")));
                    }
                };
                let bytes = match entry.interleaved_heads {
                    None => Cow::Borrowed(bytes),
                    Some(num_heads) => {
                        // A bias has a row for each of its numbers.
                        let apart = gguf::halves_apart(bytes, shape[0], num_heads);
                        Cow::Owned(apart.ok_or_else(|| error(format!("does not have the rows of {num_heads} heads")))?)
                    }
                };
                Ok(Tensor { format, rows, cols, bytes })
            }
        }
    }
}

/// The whole file, or `None` where the model has none of this name; refuses what is too large to be honest.
pub(crate) fn read_config(source: &ModelSource, name: &str) -> Result<Option<Cow<'static, [u8]>>, EngineError> {
    read_bounded(source, name, MAX_CONFIG_BYTES)
}

/// A whole file of at most so many bytes; `None` where there is none of this name.
pub(crate) fn read_bounded(
    source: &ModelSource,
    name: &str,
    max_bytes: u64,
) -> Result<Option<Cow<'static, [u8]>>, EngineError> {
    if let ModelSource::Directory(directory) = source {
        match std::fs::metadata(directory.join(name)) {
            Ok(metadata) if !metadata.is_file() => return Err(file_error(name, "is not a file")),
            Ok(metadata) if metadata.len() > max_bytes => {
                return Err(file_error(name, &format!("has {} bytes, at most {max_bytes} are read", metadata.len())));
            }
            _ => {}
        }
    }
    source.read(name).map_err(|error| file_error(name, &error.to_string()))
}

fn file_error(file: &str, why: &str) -> EngineError {
    EngineError::ModelFile { file: file.to_owned(), why: why.to_owned() }
}

/// Which file is missing, or why the one that is there is not read.
fn no_weights(source: &ModelSource) -> EngineError {
    let exists = |name: &str| match source {
        ModelSource::Directory(directory) => directory.join(name).exists(),
        ModelSource::Embedded(model) => model.files.iter().any(|(file, _)| *file == name),
        ModelSource::Gguf(_) => false,
    };
    match PICKLED.iter().find(|name| exists(name)) {
        Some(name) => file_error(name, "is not read: reading it can run code. Convert the model to safetensors"),
        None => file_error(SINGLE, "is missing, and so is model.safetensors.index.json"),
    }
}

/// The shards that an index names, in order of name, each with the tensors that it should hold.
fn shards(json: &[u8]) -> Result<Vec<(String, Vec<String>)>, EngineError> {
    let root: Value = serde_json::from_slice(json).map_err(|error| file_error(INDEX, &error.to_string()))?;
    let map = root.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| file_error(INDEX, "has no weight_map"))?;
    let mut shards = std::collections::BTreeMap::<String, Vec<String>>::new();
    for (tensor, file) in map {
        let file = file.as_str().filter(|file| is_plain_shard(file));
        let file = file.ok_or_else(|| file_error(INDEX, "names a shard that is not a plain .safetensors file"))?;
        shards.entry(file.to_owned()).or_default().push(tensor.clone());
    }
    Ok(shards.into_iter().collect())
}

fn is_plain_shard(name: &str) -> bool {
    let plain = |c: char| !matches!(c, '/' | '\\' | ':' | '\0') && !c.is_control();
    name.ends_with(".safetensors") && !name.starts_with('.') && name.len() <= 255 && name.chars().all(plain)
}

fn open_blob(source: &ModelSource, name: &str) -> Result<Option<Blob>, EngineError> {
    match source {
        ModelSource::Embedded(model) => {
            Ok(model.files.iter().find(|(file, _)| *file == name).map(|(_, bytes)| Blob::Embedded(bytes)))
        }
        // Opened as a whole, see `of_gguf`.
        ModelSource::Gguf(_) => Ok(None),
        ModelSource::Directory(directory) => {
            let path = directory.join(name);
            match std::fs::metadata(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(file_error(name, &error.to_string())),
                Ok(metadata) if !metadata.is_file() => Err(file_error(name, "is not a file")),
                Ok(_) => {
                    map_file(&path).map(|map| Some(Blob::Mapped(map))).map_err(|e| file_error(name, &e.to_string()))
                }
            }
        }
    }
}

#[allow(unsafe_code)]
pub(crate) fn map_file(path: &Path) -> std::io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the mapping is private and read-only, and lives only while weights are packed. That nobody truncates or
    // rewrites a model's files in that time is the one thing no check here can show; bytes that change are caught by
    // nothing but only ever read as numbers, after their offsets were checked against a header that was copied out.
    let map = unsafe { Mmap::map(&file) }?;
    #[cfg(unix)]
    // A hint: where it is refused, pages are read as they are needed.
    let _ = map.advise(memmap2::Advice::Sequential);
    Ok(map)
}

/// Checks a file's header and adds its tensors to the index: those in `wanted`, or all.
fn index_blob(
    blob: &Blob,
    file: &str,
    blob_index: usize,
    wanted: Option<&[String]>,
    index: &mut HashMap<String, Entry>,
    digest: &mut Sha256,
) -> Result<(), EngineError> {
    let bytes = blob.bytes();
    // Checks the header's length, that tensors fill the file without holes or overlaps, and that each has the bytes
    // its shape and type ask for.
    let (header_len, metadata) =
        SafeTensors::read_metadata(bytes).map_err(|error| file_error(file, &error.to_string()))?;
    let data_start = header_len + 8;
    digest.update(&bytes[..data_start]);
    let mut tensors = metadata.tensors();
    let mut names: Vec<String> = match wanted {
        Some(wanted) => wanted.to_vec(),
        None => tensors.keys().cloned().collect(),
    };
    // The digest sees them in one order.
    names.sort_unstable();
    for name in names {
        let info = tensors.remove(&name).ok_or_else(|| EngineError::Tensor {
            name: name.clone(),
            why: format!("is missing from {file}, where {INDEX} says it is"),
        })?;
        let range = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
        sample(&bytes[range.clone()], digest);
        index.insert(
            name,
            Entry {
                blob: blob_index,
                format: format_of(info.dtype),
                shape: info.shape.clone(),
                range,
                interleaved_heads: None,
                is_read: Cell::new(false),
            },
        );
    }
    Ok(())
}

/// Takes three pieces of a tensor's values into the digest: its start, middle and end. A whole model would take as long as
/// reading it; whatever was trained further or converted anew differs nearly everywhere.
fn sample(values: &[u8], digest: &mut Sha256) {
    if values.len() <= 3 * SAMPLE_BYTES {
        digest.update(values);
        return;
    }
    let middle = (values.len() - SAMPLE_BYTES) / 2;
    for start in [0, middle, values.len() - SAMPLE_BYTES] {
        digest.update(&values[start..start + SAMPLE_BYTES]);
    }
}

fn format_of(dtype: FileDtype) -> Result<TensorFormat, FileDtype> {
    match dtype {
        FileDtype::F32 => Ok(TensorFormat::F32),
        FileDtype::BF16 => Ok(TensorFormat::Bf16),
        FileDtype::F16 => Ok(TensorFormat::F16),
        other => Err(other),
    }
}

/// Values of one dummy tensor, from the seed and its name alone: norms are 1, the rest is nearly normal.
fn draw(seed: u64, name: &str, len: usize, dtype: DType) -> Vec<u8> {
    // FNV-1a.
    let key = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325 ^ seed, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    // A model has billions of them: they are picked from a table, five with each hash. Its values come in pairs of both
    // signs, so that their mean is zero.
    let is_norm = name.ends_with("norm.weight") || name.ends_with("Norm.weight");
    let value = |i: u64| match i % 2 {
        _ if is_norm => 1.0,
        0 => DUMMY_STD * nearly_normal(i),
        _ => -DUMMY_STD * nearly_normal(i - 1),
    };
    let values = (0..1 << TABLE_BITS).map(value);
    match dtype {
        DType::F32 | DType::U32 | DType::I8 | DType::F8E4M3 => {
            pick(key, len, &values.map(f32::to_le_bytes).collect::<Vec<_>>())
        }
        DType::Bf16 => pick(key, len, &values.map(|v| bf16::from_f32(v).to_le_bytes()).collect::<Vec<_>>()),
        DType::F16 => pick(key, len, &values.map(|v| f16::from_f32(v).to_le_bytes()).collect::<Vec<_>>()),
    }
}

/// Of the table's length.
const TABLE_BITS: u32 = 12;

/// Fewest hashes that a thread is started for.
const MIN_SHARE: usize = 1 << 16;

fn pick<const N: usize>(key: u64, len: usize, table: &[[u8; N]]) -> Vec<u8> {
    let table: &[[u8; N]; 1 << TABLE_BITS] = table.try_into().expect("the table has its length");
    let mut bytes = vec![0; len * N];
    let fill = |first: usize, bytes: &mut [u8]| {
        for (i, values) in bytes.chunks_mut(5 * N).enumerate() {
            let mut hash = hash(key.wrapping_add((first + i) as u64));
            for value in values.chunks_exact_mut(N) {
                value.copy_from_slice(&table[(hash % (1 << TABLE_BITS)) as usize]);
                hash >>= TABLE_BITS;
            }
        }
    };
    // Each hash has its place, so any core may fill any part.
    let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = len.div_ceil(5).div_ceil(num_threads).max(MIN_SHARE);
    if share * 5 >= len {
        fill(0, &mut bytes);
        return bytes;
    }
    std::thread::scope(|scope| {
        for (part, bytes) in bytes.chunks_mut(share * 5 * N).enumerate() {
            scope.spawn(move || fill(part * share, bytes));
        }
    });
    bytes
}

/// A number of mean 0 and deviation 1: four uniform numbers from one hash, summed.
pub(crate) fn nearly_normal(counter: u64) -> f32 {
    let z = hash(counter);
    let sum = (z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48);
    // Each part has variance 65536^2 / 12.
    (sum as f32 - 131_070.0) / (65_536.0 * (4.0f32 / 12.0).sqrt())
}

/// SplitMix64 (Steele et al. 2014).
fn hash(counter: u64) -> u64 {
    let z = counter.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::EmbeddedModel;

    fn embedded(files: Vec<(&'static str, Vec<u8>)>) -> ModelSource {
        let files = files.into_iter().map(|(name, bytes)| (name, &*bytes.leak())).collect::<Vec<_>>();
        ModelSource::Embedded(Box::leak(Box::new(EmbeddedModel { name: "test", files: files.leak() })))
    }

    /// A file with this header and so many bytes of data.
    fn file(header: &str, data_len: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend((0..data_len).map(|i| i as u8));
        bytes
    }

    fn open(bytes: Vec<u8>) -> Result<Weights, EngineError> {
        Weights::open(&embedded(vec![(SINGLE, bytes)]), b"{}")
    }

    #[test]
    fn tensors_are_found_by_name_and_shape() {
        let header = r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[2],"data_offsets":[24,28]},"c":{"dtype":"I64","shape":[1],"data_offsets":[28,36]}}"#;
        let weights = open(file(header, 36)).unwrap();
        let a = weights.matrix("a", 2, 3).unwrap();
        assert_eq!((a.host().rows, a.host().cols, a.host().bytes.len()), (2, 3, 24));
        assert_eq!(weights.vector("b", 2).unwrap().to_f32().len(), 2);
        assert_eq!(weights.dtype_of("b"), Some(DType::Bf16));
        for (name, result) in [
            ("a", weights.matrix("a", 3, 2).err()),
            ("a", weights.vector("a", 6).err()),
            ("c", weights.vector("c", 1).err()),
            ("d", weights.vector("d", 1).err()),
        ] {
            assert!(matches!(result, Some(EngineError::Tensor { name: named, .. }) if named == name));
        }
    }

    #[test]
    fn hostile_headers_are_refused() {
        let tensor = |shape: &str, offsets: &str| {
            format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        let deep = "[".repeat(1000);
        let cases: Vec<Vec<u8>> = vec![
            Vec::new(),
            vec![1, 2, 3],
            u64::MAX.to_le_bytes().to_vec(),
            200_000_000u64.to_le_bytes().to_vec(),
            file("not json", 0),
            file("", 8),
            file(&deep, 0),
            file(&tensor("[2]", "[0,4]"), 8),
            file(&tensor("[2]", "[0,12]"), 12),
            file(&tensor("[2]", "[0,8]"), 4),
            file(&tensor("[2]", "[0,8]"), 12),
            file(&tensor("[2]", "[4,12]"), 12),
            file(&tensor("[2]", "[8,0]"), 8),
            file(&tensor("[-2]", "[0,8]"), 8),
            file(&tensor("[2]", "[-8,0]"), 8),
            file(&tensor("[2]", "[0.5,8.5]"), 8),
            file(&tensor("[18446744073709551615,18446744073709551615]", "[0,8]"), 8),
            file(&tensor("[2]", "[0,18446744073709551615]"), 8),
            file(
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
                12,
            ),
        ];
        for (i, bytes) in cases.into_iter().enumerate() {
            assert!(matches!(open(bytes), Err(EngineError::ModelFile { .. })), "case {i}");
        }
    }

    #[test]
    fn what_the_model_does_not_read_is_named() {
        let header = |second: &str| {
            format!(
                r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}},"{second}":{{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}}}"#
            )
        };
        let read_a = |bytes: Vec<u8>| {
            let weights = open(bytes).unwrap();
            weights.vector("a", 2).unwrap();
            weights
        };
        let weights = read_a(file(&header("b"), 16));
        assert!(matches!(weights.refuse_unread(&[]), Err(EngineError::Tensor { name, .. }) if name == "b"));
        // Said to be a copy, and not one.
        assert!(weights.refuse_unread(&[("b", "a")]).is_err());
        weights.vector("b", 2).unwrap();
        assert!(weights.refuse_unread(&[]).is_ok());

        let mut twice = file(&header("b"), 8);
        twice.extend(0..8);
        assert!(read_a(twice).refuse_unread(&[("b", "a")]).is_ok());
        assert!(read_a(file(&header("layers.0.rotary_emb.inv_freq"), 16)).refuse_unread(&[]).is_ok());
    }

    #[test]
    fn an_index_names_plain_files_that_hold_what_it_says() {
        let shard = || file(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4);
        let index = |entry: &str| format!(r#"{{"weight_map":{{{entry}}}}}"#).into_bytes();
        let open = |entry: &str| {
            let files = vec![(INDEX, index(entry)), ("m-1.safetensors", shard())];
            Weights::open(&embedded(files), b"{}")
        };
        assert!(open(r#""a":"m-1.safetensors""#).unwrap().vector("a", 1).is_ok());
        for entry in [
            r#""a":"../m-1.safetensors""#,
            r#""a":"/etc/passwd""#,
            r#""a":"..""#,
            r#""a":".hidden.safetensors""#,
            r#""a":"c:\\m.safetensors""#,
            r#""a":"m-1.bin""#,
            r#""a":7"#,
            r#""a":"m-2.safetensors""#,
        ] {
            assert!(matches!(open(entry), Err(EngineError::ModelFile { .. })), "{entry}");
        }
        assert!(matches!(open(r#""b":"m-1.safetensors""#), Err(EngineError::Tensor { .. })));
    }

    #[test]
    fn pickled_weights_are_refused_by_name() {
        let error = Weights::open(&embedded(vec![("pytorch_model.bin", vec![0x80])]), b"{}").err().unwrap();
        assert!(error.to_string().contains("pytorch_model.bin"), "{error}");
        let error = Weights::open(&embedded(Vec::new()), b"{}").err().unwrap();
        assert!(error.to_string().starts_with("model.safetensors: is missing"), "{error}");
    }

    #[test]
    fn dummy_values_depend_on_seed_and_name_and_look_normal() {
        let values = |seed, name: &str| Weights::dummy(seed, DType::F32, b"").vector(name, 100_000).unwrap().to_f32();
        let a = values(1, "a.weight");
        assert_eq!(a, values(1, "a.weight"));
        assert_ne!(a, values(2, "a.weight"));
        assert_ne!(a, values(1, "b.weight"));
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        let std = (a.iter().map(|value| value * value).sum::<f32>() / a.len() as f32).sqrt();
        assert!(mean.abs() < 3e-4 && (std - DUMMY_STD).abs() < 3e-4, "mean {mean}, deviation {std}");
        assert!(values(1, "model.norm.weight").iter().all(|&value| value == 1.0));
    }

    #[test]
    fn the_digest_covers_configuration_and_headers() {
        let header = |dtype: &str| {
            let len = if dtype == "F32" { 4 } else { 2 };
            file(&format!(r#"{{"a":{{"dtype":"{dtype}","shape":[1],"data_offsets":[0,{len}]}}}}"#), len)
        };
        let digest =
            |config: &[u8], bytes: Vec<u8>| Weights::open(&embedded(vec![(SINGLE, bytes)]), config).unwrap().digest();
        assert_eq!(digest(b"{}", header("F32")), digest(b"{}", header("F32")));
        assert_ne!(digest(b"{}", header("F32")), digest(b"{ }", header("F32")));
        assert_ne!(digest(b"{}", header("F32")), digest(b"{}", header("F16")));
    }

    #[test]
    fn the_digest_covers_samples_of_every_tensor() {
        let header = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[8192],"data_offsets":[4,32772]}}"#;
        let whole = file(header, 32772);
        let digest = |bytes: Vec<u8>| Weights::open(&embedded(vec![(SINGLE, bytes)]), b"{}").unwrap().digest();
        let start = whole.len() - 32772;
        let changed = |at: usize| {
            let mut bytes = whole.clone();
            bytes[start + at] ^= 1;
            digest(bytes)
        };
        for at in [0, 4, 4 + 16384, 32771] {
            assert_ne!(changed(at), digest(whole.clone()), "byte {at}");
        }
        // It is a sample: this is between the pieces.
        assert_eq!(changed(4 + 8192), digest(whole.clone()));
    }
}
