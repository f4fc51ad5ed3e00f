//! What the driver assembled, kept on disk, so that only the first start on a machine waits for it.
//!
//! A file is a mark, the SHA-256 of what follows, and that: code for one device. It is written beside its place and then
//! moved there. Whatever is not a whole file of this kind is ignored, as is every failure: then the driver assembles again.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

/// What a file begins with.
const MARK: &[u8; 8] = b"QUIRECU1";
const HEADER_BYTES: usize = MARK.len() + 32;

/// Largest file that is read.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Files that are kept; past it the oldest go.
const MAX_FILES: usize = 128;

const EXTENSION: &str = "cubin";

/// What decides about the code that the driver makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key<'a> {
    pub module: &'a str,
    /// Of the PTX, in lower case hexadecimal.
    pub ptx_sha256: &'a str,
    pub compute_capability: [u32; 2],
    /// Of CUDA, that the driver is for: 13000 is 13.0.
    pub driver_version: i32,
}

impl Key<'_> {
    fn file_name(&self) -> String {
        let Self { module, ptx_sha256, compute_capability: [major, minor], driver_version } = self;
        format!("{module}-{ptx_sha256}-sm_{major}{minor}-driver_{driver_version}.{EXTENSION}")
    }
}

/// A folder of such files, or none.
#[derive(Debug)]
pub struct ModuleCache {
    folder: Option<PathBuf>,
}

impl ModuleCache {
    /// Nothing is read or written without a folder. One that is not there is made with its first file.
    pub fn new(folder: Option<PathBuf>) -> Self {
        Self { folder }
    }

    /// What was stored under `key`.
    pub fn load(&self, key: &Key<'_>) -> Option<Vec<u8>> {
        let path = self.folder.as_ref()?.join(key.file_name());
        let metadata = fs::metadata(&path).ok()?;
        if !metadata.is_file() || metadata.len() > MAX_FILE_BYTES {
            return None;
        }
        let mut file = fs::read(&path).ok()?;
        let (header, code) = file.split_at_checked(HEADER_BYTES)?;
        let is_whole = header[..MARK.len()] == *MARK && header[MARK.len()..] == *Sha256::digest(code);
        is_whole.then(|| file.split_off(HEADER_BYTES))
    }

    /// Keeps `code`. Where that fails nothing is kept.
    pub fn store(&self, key: &Key<'_>, code: &[u8]) {
        if let Some(folder) = &self.folder {
            // A cache that cannot be written costs time at the next start, and nothing else.
            let _ = write(folder, &key.file_name(), code);
        }
    }
}

fn write(folder: &Path, name: &str, code: &[u8]) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    // Of two processes that store the same, each has its own file.
    let unfinished = folder.join(format!("{name}.{}", std::process::id()));
    let written = fs::File::create(&unfinished).and_then(|mut file| {
        file.write_all(MARK)?;
        file.write_all(&Sha256::digest(code))?;
        file.write_all(code)?;
        file.sync_all()
    });
    let moved = written.and_then(|()| fs::rename(&unfinished, folder.join(name)));
    if moved.is_err() {
        fs::remove_file(&unfinished)?;
    }
    moved?;
    remove_oldest(folder)
}

/// Removes what is more than [`MAX_FILES`], and what a process that died left unfinished and that is as old.
fn remove_oldest(folder: &Path) -> std::io::Result<()> {
    let mut files: Vec<(SystemTime, PathBuf)> = fs::read_dir(folder)?
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let name = entry.file_name();
            let is_ours = name.to_str()?.split('.').nth(1) == Some(EXTENSION);
            let changed_at = entry.metadata().ok().filter(std::fs::Metadata::is_file)?.modified().ok()?;
            is_ours.then(|| (changed_at, entry.path()))
        })
        .collect();
    files.sort();
    let num_many = files.len().saturating_sub(MAX_FILES);
    files.drain(..num_many).try_for_each(|(_, path)| fs::remove_file(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key<'static> =
        Key { module: "linear", ptx_sha256: "0123abc", compute_capability: [9, 0], driver_version: 13000 };

    #[test]
    fn what_was_stored_comes_back_under_its_own_key_alone() {
        let folder = tempfile::tempdir().unwrap();
        // The folder is made when it is needed.
        let cache = ModuleCache::new(Some(folder.path().join("quire/cuda")));
        assert_eq!(cache.load(&KEY), None);
        cache.store(&KEY, b"code");
        assert_eq!(cache.load(&KEY).as_deref(), Some(&b"code"[..]));
        let others = [
            Key { module: "embed", ..KEY },
            Key { ptx_sha256: "0123abd", ..KEY },
            Key { compute_capability: [8, 9], ..KEY },
            Key { driver_version: 13010, ..KEY },
        ];
        assert!(others.iter().all(|key| cache.load(key).is_none()));
        cache.store(&KEY, b"other code");
        assert_eq!(cache.load(&KEY).as_deref(), Some(&b"other code"[..]));
        let names: Vec<_> =
            fs::read_dir(folder.path().join("quire/cuda")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["linear-0123abc-sm_90-driver_13000.cubin"], "nothing unfinished stays");
    }

    #[test]
    fn a_damaged_file_is_ignored_and_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let cache = ModuleCache::new(Some(folder.path().to_owned()));
        cache.store(&KEY, b"code of a device");
        let path = folder.path().join(KEY.file_name());
        let whole = fs::read(&path).unwrap();
        for index in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[index] ^= 1;
            fs::write(&path, &damaged).unwrap();
            assert_eq!(cache.load(&KEY), None, "byte {index}");
            fs::write(&path, &whole[..index]).unwrap();
            assert_eq!(cache.load(&KEY), None, "{index} bytes");
        }
        cache.store(&KEY, b"code of a device");
        assert!(cache.load(&KEY).is_some());
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_harm() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "a file, not a folder").unwrap();
        for cache in [ModuleCache::new(Some(file)), ModuleCache::new(None)] {
            cache.store(&KEY, b"code");
            assert_eq!(cache.load(&KEY), None);
        }
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("notes.txt"), "somebody else's").unwrap();
        let cache = ModuleCache::new(Some(folder.path().to_owned()));
        let hashes: Vec<String> = (0..MAX_FILES + 3).map(|index| format!("{index:08}")).collect();
        let start = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000);
        for (index, hash) in hashes.iter().enumerate() {
            let key = Key { ptx_sha256: hash, ..KEY };
            cache.store(&key, b"code");
            let file = fs::File::options().append(true).open(folder.path().join(key.file_name())).unwrap();
            file.set_modified(start + std::time::Duration::from_secs(index as u64)).unwrap();
        }
        let num_kept = hashes.iter().filter(|hash| cache.load(&Key { ptx_sha256: hash, ..KEY }).is_some()).count();
        assert_eq!(num_kept, MAX_FILES);
        assert!(cache.load(&Key { ptx_sha256: &hashes[MAX_FILES + 2], ..KEY }).is_some());
        assert!(folder.path().join("notes.txt").exists());
    }
}
