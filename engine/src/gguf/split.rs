//! A model in several files: `name-00001-of-00003.gguf` and its siblings.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::error::{GgufError, quoted};
use super::in_file;
use super::{Container, file_name};
use crate::error::EngineError;
use crate::weights::map_file;

/// Most files of one model.
const MAX_PARTS: u64 = 1000;

/// One file, mapped, its index checked.
pub(crate) struct Part {
    pub path: PathBuf,
    pub map: Mmap,
    pub container: Container,
}

pub(super) fn open(path: &Path) -> Result<Part, EngineError> {
    let metadata = std::fs::metadata(path).map_err(|error| in_file(path, &error))?;
    if !metadata.is_file() {
        return Err(in_file(path, &"is not a file"));
    }
    if metadata.len() == 0 {
        return Err(in_file(path, &GgufError::NotGguf));
    }
    let map = map_file(path).map_err(|error| in_file(path, &error))?;
    let container = Container::parse(&map).map_err(|error| in_file(path, &error))?;
    Ok(Part { path: path.to_owned(), map, container })
}

/// All files of the model whose first (or only) one is `path`, in order.
pub(crate) fn open_parts(path: &Path) -> Result<Vec<Part>, EngineError> {
    let first = open(path)?;
    let split = Split::of(&first.container).map_err(|error| in_file(path, &error))?;
    if split.index != 0 {
        let why = format!("is number {} of {} files; the first is what is served", split.index + 1, split.count);
        return Err(in_file(path, &why));
    }
    let mut parts = vec![first];
    if split.count > 1 {
        let stem = first_stem(path, split.count)
            .ok_or_else(|| in_file(path, &format!("is one of {} files, but not named as the first", split.count)))?;
        for index in 1..split.count {
            let part = open(&path.with_file_name(name_of(&stem, index, split.count)))?;
            let found = Split::of(&part.container).map_err(|error| in_file(&part.path, &error))?;
            if (found.index, found.count) != (index, split.count) {
                let why = format!("says that it is number {} of {} files", found.index + 1, found.count);
                return Err(in_file(&part.path, &why));
            }
            parts.push(part);
        }
    }
    let mut names = HashSet::new();
    for part in &parts {
        if let Some(twice) = part.container.tensors.iter().find(|tensor| !names.insert(tensor.name.as_str())) {
            return Err(in_file(&part.path, &GgufError::Duplicate { what: "tensor", name: quoted(&twice.name) }));
        }
    }
    if split.num_tensors.is_some_and(|expected| expected != names.len() as u64) {
        let why =
            format!("says that there are {} tensors, its files hold {}", split.num_tensors.unwrap_or(0), names.len());
        return Err(in_file(path, &why));
    }
    Ok(parts)
}

/// What a file says of its place among others.
struct Split {
    index: u64,
    count: u64,
    num_tensors: Option<u64>,
}

impl Split {
    fn of(container: &Container) -> Result<Self, GgufError> {
        let metadata = &container.metadata;
        let count = metadata.unsigned("split.count")?.unwrap_or(1).max(1);
        let index = metadata.unsigned("split.no")?.unwrap_or(0);
        if count > MAX_PARTS || index >= count {
            return Err(GgufError::Split { why: format!("says that it is number {index} of {count} files") });
        }
        Ok(Self { index, count, num_tensors: metadata.unsigned("split.tensors.count")?.filter(|_| count > 1) })
    }
}

fn name_of(stem: &str, index: u64, count: u64) -> String {
    format!("{stem}-{:05}-of-{count:05}.gguf", index + 1)
}

/// The part of the first file's name that all share.
fn first_stem(path: &Path, count: u64) -> Option<String> {
    let name = file_name(path);
    let stem = name.strip_suffix(&name_of("", 0, count))?;
    Some(stem.to_owned())
}

/// The name that the model goes by where its metadata has none: the file's, without what marks it as one of several.
pub fn stem(path: &Path) -> String {
    let name = file_name(path);
    let name = name.strip_suffix(".gguf").unwrap_or(&name);
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let unsplit = name.rsplit_once("-of-").filter(|(_, count)| digits(count)).and_then(|(rest, _)| {
        let (stem, index) = rest.rsplit_once('-')?;
        digits(index).then_some(stem)
    });
    unsplit.unwrap_or(name).to_owned()
}
