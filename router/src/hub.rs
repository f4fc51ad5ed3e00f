//! Pulling a model from a hub by its name, `owner/name` or `owner/name@revision`.
//!
//! This is the only place that calls out, and only for a name that was given. What comes back is kept as other tools of
//! the hub keep it (`hub/models--owner--name/{blobs,refs,snapshots}` under `hub.home`), so that each finds what the
//! other pulled. A transfer that is cut goes on where it stopped, also in a later run.
//!
//! The hub is believed little: only plain file names of wanted kinds are taken, nothing that can hold code (`.bin`,
//! `.pt`, `.py`) is ever fetched, sizes are checked, and weights against their SHA-256.
//!
//! Why not the `hf-hub` package: version 1 needs 236 packages, a C library for TLS that is built with cmake among them;
//! version 0.5 resumes without looking at the server's answer, has no time limits, checks neither sizes nor hashes, and
//! makes paths of what the server says.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use ureq::http::header::{self, HeaderMap};
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

use crate::config::{Environment, HubConfig};

/// Most bytes of an answer that is not a file.
const MAX_ANSWER_BYTES: u64 = 16 << 20;
/// Most files of a model.
const MAX_FILES: usize = 4096;
const MAX_REDIRECTS: u32 = 5;
const CHUNK: usize = 256 << 10;
/// How often a transfer is spoken of where there is no terminal.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// A model's name on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelName {
    repository: String,
    revision: String,
}

impl ModelName {
    /// `owner/name` or `owner/name@revision`; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (owner, name) = repository.split_once('/')?;
        // Two dashes separate the parts in the cache's directory names.
        let part = |text: &str| is_plain(text) && !text.starts_with(['-', '.']) && !text.contains("--");
        let revision_ok = !revision.is_empty()
            && revision.len() <= 128
            && revision.split('/').all(|part| is_plain(part) && !part.starts_with(['-', '.']));
        (part(owner) && part(name) && revision_ok)
            .then(|| Self { repository: repository.to_owned(), revision: revision.to_owned() })
    }

    /// `owner/name`.
    pub fn repository(&self) -> &str {
        &self.repository
    }
}

/// Whether a name is one part of a path and nothing else.
fn is_plain(name: &str) -> bool {
    (1..=128).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        && !name.bytes().all(|b| b == b'.')
}

/// Why a model could not be pulled.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error("the hub says {status} to {what}{}", hint(*status))]
    Refused { what: String, status: u16 },
    #[error("{what}: {why}")]
    Transfer { what: String, why: String },
    #[error("the hub's answer to {what} cannot be used: {why}")]
    Answer { what: String, why: &'static str },
    #[error("{file} is not what the hub says it is: {why}")]
    Corrupt { file: String, why: &'static str },
    #[error("the repository has no {0}")]
    Missing(&'static str),
    #[error("HF_TOKEN is set, and {0} is not an https address: a token is not sent in the clear")]
    TokenInClear(String),
    #[error("no home directory to keep models in: set HF_HOME or hub.home")]
    NoHome,
    #[error("{}: {source}", path.display())]
    Disk { path: PathBuf, source: io::Error },
}

fn hint(status: u16) -> &'static str {
    match status {
        401 | 403 => " (a private or gated model needs HF_TOKEN, of someone who was given access)",
        404 => " (no such model, revision or file; a private one needs HF_TOKEN)",
        _ => "",
    }
}

fn disk(path: &Path) -> impl FnOnce(io::Error) -> HubError + '_ {
    move |source| HubError::Disk { path: path.to_owned(), source }
}

/// Pulls a model and says which directory holds it. Takes its time: for a thread of its own.
///
/// Where the hub cannot be reached, or fails, and the model was pulled before, the copy serves.
pub fn pull(name: &ModelName, config: &HubConfig, environment: &Environment) -> Result<PathBuf, HubError> {
    let hub = Hub::new(config, environment)?;
    let store = Store::open(name, config, environment)?;
    let listing = match hub.list(name) {
        Ok(listing) => listing,
        Err(error) => {
            let passing = match &error {
                HubError::Transfer { .. } => true,
                HubError::Refused { status, .. } => *status >= 500 || *status == 429,
                _ => false,
            };
            return match store.complete(name).filter(|_| passing) {
                Some(directory) => {
                    tracing::warn!(%error, "the hub does not answer; using the copy that was pulled before");
                    Ok(directory)
                }
                None => Err(error),
            };
        }
    };
    tracing::info!(model = name.repository(), commit = listing.commit.as_str(), "pulling from the hub");
    let get = |file: &str| store.fetch(&hub, name, &listing.commit, file);
    for file in listing.files.iter().filter(|file| is_small_file(file)) {
        get(file)?;
    }
    let directory = store.snapshot(&listing.commit);
    for shard in weights(&directory)? {
        if !listing.files.contains(&shard) {
            return Err(HubError::Missing("weight file that its index names"));
        }
        get(&shard)?;
    }
    store.remember(name, &listing.commit)?;
    Ok(directory)
}

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// Configuration, tokenizer and template: what a model is, without its weights.
fn is_small_file(name: &str) -> bool {
    is_plain(name)
        && (name.ends_with(".json")
            || matches!(name, "chat_template.jinja" | "tokenizer.model" | "merges.txt" | "vocab.txt"))
}

/// The weight files of a model whose index, if it has one, is there.
fn weights(directory: &Path) -> Result<Vec<String>, HubError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let path = directory.join(INDEX);
    let text = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![SINGLE.to_owned()]),
        text => text.map_err(disk(&path))?,
    };
    let bad = |why| HubError::Answer { what: INDEX.to_owned(), why };
    let index: Index = serde_json::from_slice(&text).map_err(|_| bad("it is not an index of weights"))?;
    let mut shards: Vec<String> = index.weight_map.into_values().collect();
    shards.sort();
    shards.dedup();
    if shards.is_empty() || shards.len() > MAX_FILES {
        return Err(bad("it names no files, or too many"));
    }
    if shards.iter().any(|shard| !is_plain(shard) || !shard.ends_with(".safetensors")) {
        return Err(bad("it names something else than safetensors files"));
    }
    Ok(shards)
}

struct Listing {
    commit: String,
    files: Vec<String>,
}

/// What is known of a file before it is fetched.
struct FileInfo {
    etag: String,
    size: u64,
}

/// The hub as it is spoken to.
struct Hub {
    agent: Agent,
    /// Does not follow redirects, and so sees the hub's own headers rather than those of its storage.
    direct: Agent,
    endpoint: String,
    authorization: Option<String>,
    max_retries: u32,
}

impl Hub {
    fn new(config: &HubConfig, environment: &Environment) -> Result<Self, HubError> {
        let timeout = Some(Duration::from_secs(config.timeout_seconds));
        let agent = |max_redirects| -> Agent {
            Agent::config_builder()
                .http_status_as_error(false)
                .timeout_connect(timeout)
                .timeout_recv_response(timeout)
                .timeout_per_read(timeout)
                .max_redirects(max_redirects)
                .max_redirects_will_error(max_redirects > 0)
                // Storage has its own signed addresses; the token is for the hub alone.
                .redirect_auth_headers(ureq::config::RedirectAuthHeaders::SameHost)
                .user_agent(concat!("quire/", env!("CARGO_PKG_VERSION")))
                .build()
                .into()
        };
        let endpoint = config.endpoint.trim_end_matches('/').to_owned();
        if environment.hub_token.is_some() && !endpoint.starts_with("https://") {
            return Err(HubError::TokenInClear(endpoint));
        }
        Ok(Self {
            agent: agent(MAX_REDIRECTS),
            direct: agent(0),
            endpoint,
            authorization: environment.hub_token.as_ref().map(|token| format!("Bearer {}", token.expose())),
            max_retries: config.max_retries,
        })
    }

    /// Files and commit of a revision.
    fn list(&self, name: &ModelName) -> Result<Listing, HubError> {
        #[derive(Deserialize)]
        struct Answer {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let what = format!("{}@{}", name.repository, name.revision);
        let revision = name.revision.replace('/', "%2F");
        let url = format!("{}/api/models/{}/revision/{revision}", self.endpoint, name.repository);
        let mut response = self.with_retries(&what, || self.get(&self.agent, &url, None))?;
        refused(&what, response.status())?;
        let text = response.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_vec();
        let text = text.map_err(|error| HubError::Transfer { what: what.clone(), why: error.to_string() })?;
        let bad = |why| HubError::Answer { what: what.clone(), why };
        let answer: Answer = serde_json::from_slice(&text).map_err(|_| bad("it does not describe a model"))?;
        if !is_hash(&answer.sha) {
            return Err(bad("its commit is no commit"));
        }
        let files: Vec<_> = answer.siblings.into_iter().map(|file| file.rfilename).collect();
        if files.len() > MAX_FILES {
            return Err(bad("it names too many files"));
        }
        if !files.iter().any(|file| file == "config.json") {
            return Err(HubError::Missing("config.json"));
        }
        if !files.iter().any(|file| file == SINGLE || file == INDEX) {
            return Err(HubError::Missing("weights in safetensors files"));
        }
        Ok(Listing { commit: answer.sha, files })
    }

    fn url(&self, name: &ModelName, commit: &str, file: &str) -> String {
        format!("{}/{}/resolve/{commit}/{file}", self.endpoint, name.repository)
    }

    /// Asks for a file's hash and size.
    fn file_info(&self, url: &str, file: &str) -> Result<FileInfo, HubError> {
        let response = self.with_retries(file, || {
            let mut request = self.direct.head(url).header(header::ACCEPT_ENCODING, "identity");
            if let Some(authorization) = &self.authorization {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            request.call()
        })?;
        if !response.status().is_redirection() {
            refused(file, response.status())?;
        }
        let headers = response.headers();
        let bad = |why| HubError::Answer { what: file.to_owned(), why };
        let etag = text_of(headers, "x-linked-etag").or_else(|| text_of(headers, "etag"));
        let etag = etag.ok_or_else(|| bad("it has no ETag"))?.trim_start_matches("W/").trim_matches('"').to_owned();
        if !is_plain(&etag) || etag.starts_with('.') {
            return Err(bad("its ETag is not a hash"));
        }
        let size = text_of(headers, "x-linked-size").or_else(|| text_of(headers, "content-length"));
        let size = size.and_then(|size| size.parse().ok()).ok_or_else(|| bad("it does not say its size"))?;
        Ok(FileInfo { etag, size })
    }

    fn get(&self, agent: &Agent, url: &str, range_from: Option<u64>) -> Result<Response<Body>, ureq::Error> {
        let mut request = agent.get(url).header(header::ACCEPT_ENCODING, "identity");
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        if let Some(start) = range_from {
            request = request.header(header::RANGE, format!("bytes={start}-"));
        }
        request.call()
    }

    fn with_retries(
        &self,
        what: &str,
        call: impl Fn() -> Result<Response<Body>, ureq::Error>,
    ) -> Result<Response<Body>, HubError> {
        let mut attempt = 0;
        loop {
            let why = match call() {
                Ok(response) if attempt < self.max_retries && is_passing(response.status()) => {
                    response.status().to_string()
                }
                Ok(response) => return Ok(response),
                Err(error) if attempt < self.max_retries => error.to_string(),
                Err(error) => return Err(HubError::Transfer { what: what.to_owned(), why: error.to_string() }),
            };
            tracing::debug!(what, why, "asking the hub again");
            pause(attempt);
            attempt += 1;
        }
    }
}

fn is_passing(status: StatusCode) -> bool {
    status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS
}

fn refused(what: &str, status: StatusCode) -> Result<(), HubError> {
    if status.is_success() {
        return Ok(());
    }
    Err(HubError::Refused { what: what.to_owned(), status: status.as_u16() })
}

fn text_of<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn is_hash(text: &str) -> bool {
    (7..=64).contains(&text.len()) && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Longer with each attempt, up to a few seconds.
fn pause(attempt: u32) {
    std::thread::sleep(Duration::from_millis(100 << attempt.min(6)));
}

/// The model's place on disk. Held by one process at a time.
struct Store {
    root: PathBuf,
    _lock: File,
}

impl Store {
    fn open(name: &ModelName, config: &HubConfig, environment: &Environment) -> Result<Self, HubError> {
        let home = match (config.home.as_str(), &environment.home) {
            ("", Some(home)) => home.join(".cache").join("huggingface"),
            ("", None) => return Err(HubError::NoHome),
            (home, _) => PathBuf::from(home),
        };
        let folder = format!("models--{}", name.repository.replace('/', "--"));
        let root = home.join("hub").join(&folder);
        let locks = home.join("hub").join(".locks");
        for directory in [&locks, &root.join("blobs"), &root.join("refs"), &root.join("snapshots")] {
            fs::create_dir_all(directory).map_err(disk(directory))?;
        }
        let path = locks.join(format!("{folder}.lock"));
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(disk(&path))?;
        if lock.try_lock().is_err() {
            tracing::info!("waiting for another process that pulls the same model");
            lock.lock().map_err(disk(&path))?;
        }
        Ok(Self { root, _lock: lock })
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    fn reference(&self, name: &ModelName) -> PathBuf {
        self.root.join("refs").join(&name.revision)
    }

    /// Notes which commit a revision is, once all of it is there.
    fn remember(&self, name: &ModelName, commit: &str) -> Result<(), HubError> {
        let path = self.reference(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(disk(parent))?;
        }
        fs::write(&path, commit).map_err(disk(&path))
    }

    /// The directory of a model that was pulled before, if nothing of it is missing.
    fn complete(&self, name: &ModelName) -> Option<PathBuf> {
        let commit = match fs::read_to_string(self.reference(name)) {
            Ok(commit) => commit.trim().to_owned(),
            Err(_) => name.revision.clone(),
        };
        let directory = is_hash(&commit).then(|| self.snapshot(&commit))?;
        let shards = weights(&directory).ok()?;
        let there = |file: &str| directory.join(file).is_file();
        (there("config.json") && shards.iter().all(|shard| there(shard))).then_some(directory)
    }

    /// Makes sure that a file of the snapshot is there and whole.
    fn fetch(&self, hub: &Hub, name: &ModelName, commit: &str, file: &str) -> Result<(), HubError> {
        let link = self.snapshot(commit).join(file);
        if link.is_file() {
            return Ok(());
        }
        let url = hub.url(name, commit, file);
        let info = hub.file_info(&url, file)?;
        let blob = self.root.join("blobs").join(&info.etag);
        if !blob.is_file() {
            download(hub, &url, file, &info, &blob)?;
        }
        let directory = self.snapshot(commit);
        fs::create_dir_all(&directory).map_err(disk(&directory))?;
        let target = Path::new("..").join("..").join("blobs").join(&info.etag);
        // A link to nowhere is what is left of a blob that somebody deleted.
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(target, &link).map_err(disk(&link))
    }
}

/// Fetches a file beside its place, going on where an earlier attempt stopped, checks it and moves it there.
fn download(hub: &Hub, url: &str, file: &str, info: &FileInfo, blob: &Path) -> Result<(), HubError> {
    let partial = blob.with_file_name(format!("{}.incomplete", info.etag));
    let mut options = OpenOptions::new();
    let mut out = options.create(true).truncate(false).read(true).write(true).open(&partial).map_err(disk(&partial))?;
    let mut have = out.metadata().map_err(disk(&partial))?.len();
    if have > info.size {
        out.set_len(0).map_err(disk(&partial))?;
        have = 0;
    }
    let mut progress = Progress::new(file, info.size, have);
    let mut attempt = 0;
    while have < info.size {
        let before = have;
        let ended = transfer(hub, url, file, info.size, &mut out, &mut have, &mut progress);
        let why = match ended {
            Ok(()) if have == info.size => break,
            Ok(()) => "the transfer ended early".to_owned(),
            // What the hub or the disk refuses now it refuses again.
            Err(error @ (HubError::Disk { .. } | HubError::Corrupt { .. })) => return Err(error),
            Err(HubError::Refused { what, status }) if status < 500 && status != 429 => {
                return Err(HubError::Refused { what, status });
            }
            Err(error) => error.to_string(),
        };
        if have > before {
            attempt = 0;
        }
        if attempt >= hub.max_retries {
            return Err(HubError::Transfer { what: file.to_owned(), why });
        }
        tracing::info!(file, bytes = have, why, "taking up the transfer again");
        pause(attempt);
        attempt += 1;
    }
    check(file, info, &mut out).inspect_err(|_| {
        // Nothing of it can be trusted: the next run begins anew.
        let _ = fs::remove_file(&partial);
    })?;
    out.sync_all().map_err(disk(&partial))?;
    fs::rename(&partial, blob).map_err(disk(blob))?;
    progress.finish();
    Ok(())
}

/// One answer's worth of a file, appended from `have` on.
fn transfer(
    hub: &Hub,
    url: &str,
    file: &str,
    size: u64,
    out: &mut File,
    have: &mut u64,
    progress: &mut Progress,
) -> Result<(), HubError> {
    let broken = |why: String| HubError::Transfer { what: file.to_owned(), why };
    let write_failed = |source| HubError::Disk { path: PathBuf::from(file), source };
    let response = hub.get(&hub.agent, url, (*have > 0).then_some(*have)).map_err(|error| broken(error.to_string()))?;
    refused(file, response.status())?;
    let start = match text_of(response.headers(), "content-range") {
        Some(range) if response.status() == StatusCode::PARTIAL_CONTENT => range
            .strip_prefix("bytes ")
            .and_then(|range| range.split('-').next()?.parse().ok())
            .ok_or_else(|| broken("its Content-Range cannot be read".to_owned()))?,
        _ => 0,
    };
    if start > *have {
        return Err(broken("it goes on behind what is there".to_owned()));
    }
    // A server that does not resume sends all of it: what is there is written again.
    out.set_len(start).and_then(|()| out.seek(SeekFrom::Start(start))).map_err(write_failed)?;
    *have = start;
    progress.at(*have);
    let mut body = response.into_body().into_reader();
    let mut chunk = vec![0; CHUNK];
    loop {
        let len = match body.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(broken(error.to_string())),
        };
        if *have + len as u64 > size {
            return Err(HubError::Corrupt { file: file.to_owned(), why: "it is longer" });
        }
        out.write_all(&chunk[..len]).map_err(write_failed)?;
        *have += len as u64;
        progress.at(*have);
    }
}

/// Large files carry their SHA-256 as ETag (64 digits); small ones another hash, of which only the size is checked.
fn check(file: &str, info: &FileInfo, content: &mut File) -> Result<(), HubError> {
    if info.etag.len() != 64 || !is_hash(&info.etag) {
        return Ok(());
    }
    let failed = |source| HubError::Disk { path: PathBuf::from(file), source };
    content.seek(SeekFrom::Start(0)).map_err(failed)?;
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    loop {
        match content.read(&mut chunk).map_err(failed)? {
            0 => break,
            len => hasher.update(&chunk[..len]),
        }
    }
    let digest: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if digest == info.etag {
        return Ok(());
    }
    Err(HubError::Corrupt { file: file.to_owned(), why: "its SHA-256 differs" })
}

/// A bar on a terminal, a line now and then elsewhere. Small files pass without a word.
struct Progress {
    file: String,
    size: u64,
    bar: Option<ProgressBar>,
    said: Instant,
}

impl Progress {
    fn new(file: &str, size: u64, have: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = "{msg:30!} {bar:30} {bytes:>10}/{total_bytes:10} {bytes_per_sec:>12} {eta:>5}";
            let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(size).with_style(style).with_message(file.to_owned()).with_position(have)
        });
        Self { file: file.to_owned(), size, bar, said: Instant::now() }
    }

    fn at(&mut self, have: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(have);
        } else if self.said.elapsed() >= SAY_EVERY {
            self.said = Instant::now();
            tracing::info!(file = self.file.as_str(), bytes = have, of = self.size, "pulling");
        }
    }

    fn finish(self) {
        match self.bar {
            Some(bar) => bar.finish(),
            None => tracing::info!(file = self.file.as_str(), bytes = self.size, "pulled"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_two_parts_and_nothing_else() {
        let parse = |text| ModelName::parse(text).map(|name| (name.repository, name.revision));
        let pair = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(parse("Qwen/Qwen2.5-0.5B-Instruct"), pair("Qwen/Qwen2.5-0.5B-Instruct", "main"));
        assert_eq!(parse("a/b@v1.0"), pair("a/b", "v1.0"));
        assert_eq!(parse("a/b@refs/pr/1"), pair("a/b", "refs/pr/1"));
        for bad in [
            "",
            "a",
            "/",
            "a/",
            "/b",
            "a/b/c",
            "../b",
            "a/..",
            "a/b@",
            "a/b@../x",
            "a/b@x/../y",
            "a b/c",
            "a/b?x",
            "a--b/c",
            "-a/b",
            ".a/b",
            "a/b@-x",
            "a/b@.git",
            "http://a/b",
            "a/b#",
            "a\\b/c",
            "a/b@main@x",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn code_is_never_wanted() {
        for wanted in ["config.json", "tokenizer.json", "chat_template.jinja", INDEX, "tokenizer.model"] {
            assert!(is_small_file(wanted), "{wanted}");
        }
        for other in [
            "pytorch_model.bin",
            "model.pt",
            "modeling.py",
            "a/config.json",
            "../config.json",
            "..",
            "model.safetensors",
            "config.json.py",
            "x.ckpt",
            "model.gguf",
            "training_args.bin",
            "README.md",
        ] {
            assert!(!is_small_file(other), "{other}");
        }
    }
}
