//! Pulling a model, from a small hub on loopback that behaves as hubs do, and as they should not.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use quire_router::config::{Environment, HubConfig, Secret};
use quire_router::hub::{ModelName, pull};
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// How the hub misbehaves.
#[derive(Clone, Default)]
struct Faults {
    /// Bytes of a weight file's answer after which the connection ends.
    cut_after: Option<usize>,
    /// Answers all of a file where a part was asked for.
    no_ranges: bool,
    /// Content that is not what the hash says.
    corrupt: bool,
    /// Answers 503 to so many requests first.
    fail_first: usize,
    /// Status of the listing.
    listing: Option<u16>,
}

struct Hub {
    address: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn serve(files: BTreeMap<String, Vec<u8>>, faults: Faults) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        let served = Arc::new(AtomicUsize::new(0));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (files, faults) = (files.clone(), faults.clone());
                let (seen, served) = (Arc::clone(&seen), Arc::clone(&served));
                std::thread::spawn(move || answer(stream, &files, &faults, &seen, &served));
            }
        });
        Self { address, requests }
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

/// One request to a connection.
fn answer(
    stream: TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    faults: &Faults,
    seen: &Mutex<Vec<String>>,
    served: &AtomicUsize,
) {
    let mut reader = BufReader::new(&stream);
    let mut head = String::new();
    while reader.read_line(&mut head).unwrap_or(0) > 0 && !head.ends_with("\r\n\r\n") {}
    let first = head.lines().next().unwrap_or("").to_owned();
    let range = head.lines().find_map(|line| line.to_lowercase().strip_prefix("range: ").map(str::to_owned));
    seen.lock().unwrap().push(match &range {
        Some(range) => format!("{first} {range}"),
        None => first.clone(),
    });
    let mut out = &stream;
    let mut say = |status: &str, headers: &str, body: &[u8]| {
        let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\n{headers}\r\n");
        out.write_all(head.as_bytes()).and_then(|()| out.write_all(body))
    };
    let _ = (|| {
        if served.fetch_add(1, Ordering::SeqCst) < faults.fail_first {
            return say("503 Later", "content-length: 0\r\n", b"");
        }
        let mut parts = first.split(' ');
        let (method, path) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
        if path.starts_with("/api/models/owner/name/revision/") {
            if let Some(status) = faults.listing {
                return say(&format!("{status} No"), "content-length: 0\r\n", b"");
            }
            let names: Vec<_> = files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
            let body = serde_json::json!({ "sha": COMMIT, "siblings": names }).to_string();
            return say("200 OK", &format!("content-length: {}\r\n", body.len()), body.as_bytes());
        }
        let Some(name) = path.rsplit_once(&format!("/{COMMIT}/")).map(|(_, name)| name) else {
            return say("404 No", "content-length: 0\r\n", b"");
        };
        let Some(content) = files.get(name) else { return say("404 No", "content-length: 0\r\n", b"") };
        let is_large = name.ends_with(".safetensors");
        if method == "HEAD" {
            // Large files lie elsewhere: their headers are on the redirect, as the real hub has it.
            let hash = sha256(content);
            return if is_large {
                let headers = format!(
                    "x-repo-commit: {COMMIT}\r\nx-linked-etag: \"{hash}\"\r\nx-linked-size: {}\r\n\
                     location: http://127.0.0.1:1/elsewhere\r\ncontent-length: 0\r\n",
                    content.len()
                );
                say("302 Found", &headers, b"")
            } else {
                let headers = format!(
                    "x-repo-commit: {COMMIT}\r\netag: \"{}\"\r\ncontent-length: {}\r\n",
                    &hash[..40],
                    content.len()
                );
                say("200 OK", &headers, b"")
            };
        }
        let start = match &range {
            Some(range) if !faults.no_ranges => {
                range.trim_start_matches("bytes=").trim_end_matches('-').parse::<usize>().unwrap()
            }
            _ => 0,
        };
        let mut body = content[start..].to_vec();
        if faults.corrupt && is_large {
            body[0] ^= 1;
        }
        let (status, mut headers) = match start {
            0 => ("200 OK", String::new()),
            _ => {
                let range = format!("content-range: bytes {start}-{}/{}\r\n", content.len() - 1, content.len());
                ("206 Partial Content", range)
            }
        };
        headers.push_str(&format!("content-length: {}\r\n", body.len()));
        if let Some(cut) = faults.cut_after.filter(|_| is_large) {
            body.truncate(cut);
        }
        say(status, &headers, &body)
    })();
}

/// A model in two shards, and what a repository has beside it.
fn model() -> BTreeMap<String, Vec<u8>> {
    let large: Vec<u8> = (0..300_000u32).flat_map(|i| i.to_le_bytes()).collect();
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    let file = |name: &str, content: &[u8]| (name.to_owned(), content.to_vec());
    BTreeMap::from([
        file("config.json", b"{}"),
        file("tokenizer.json", b"{\"a\": 1}"),
        file("chat_template.jinja", b"{{ messages }}"),
        file("generation_config.json", b""),
        file("model.safetensors.index.json", index.as_bytes()),
        file("model-00001-of-00002.safetensors", &large),
        file("model-00002-of-00002.safetensors", b"small"),
        file("consolidated.safetensors", b"not named by the index"),
        file("pytorch_model.bin", b"code"),
        file("modeling_evil.py", b"code"),
        file("original/config.json", b"of another layout"),
        file("../../escape.json", b"out"),
        file("README.md", b"words"),
    ])
}

struct Setup {
    hub: Hub,
    home: tempfile::TempDir,
}

impl Setup {
    fn new(files: BTreeMap<String, Vec<u8>>, faults: Faults) -> Self {
        Self { hub: Hub::serve(files, faults), home: tempfile::tempdir().unwrap() }
    }

    fn config(&self) -> HubConfig {
        HubConfig {
            endpoint: self.hub.address.clone(),
            home: self.home.path().to_str().unwrap().to_owned(),
            max_retries: 3,
            timeout_seconds: 10,
        }
    }

    fn pull(&self) -> Result<std::path::PathBuf, String> {
        let name = ModelName::parse("owner/name").unwrap();
        pull(&name, &self.config(), &Environment::default()).map_err(|error| error.to_string())
    }
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn takes_what_a_model_needs_and_no_code() {
    let setup = Setup::new(model(), Faults::default());
    let directory = setup.pull().unwrap();
    assert!(directory.ends_with(format!("hub/models--owner--name/snapshots/{COMMIT}")));
    let wanted = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ];
    assert_eq!(names(&directory), wanted);
    for name in wanted {
        assert_eq!(std::fs::read(directory.join(name)).unwrap(), model()[name], "{name}");
    }
    assert!(!setup.home.path().join("escape.json").exists());
    // A second time only the listing is asked for.
    let before = setup.hub.requests().len();
    assert_eq!(setup.pull().unwrap(), directory);
    assert_eq!(setup.hub.requests().len(), before + 1);
}

#[test]
fn goes_on_where_a_transfer_was_cut() {
    let setup = Setup::new(model(), Faults { cut_after: Some(500_000), ..Faults::default() });
    let directory = setup.pull().unwrap();
    let shard = "model-00001-of-00002.safetensors";
    assert_eq!(std::fs::read(directory.join(shard)).unwrap(), model()[shard]);
    let ranges: Vec<_> = setup.hub.requests().into_iter().filter(|line| line.contains("bytes=")).collect();
    assert_eq!(ranges.len(), 2, "{ranges:?}");
    assert!(ranges[0].ends_with("bytes=500000-") && ranges[1].ends_with("bytes=1000000-"), "{ranges:?}");
}

#[test]
fn a_later_run_goes_on_too() {
    let files = model();
    let shard = &files["model-00001-of-00002.safetensors"];
    let setup = Setup::new(files.clone(), Faults::default());
    let blobs = setup.home.path().join("hub/models--owner--name/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(format!("{}.incomplete", sha256(shard))), &shard[..123_456]).unwrap();
    setup.pull().unwrap();
    assert!(setup.hub.requests().iter().any(|line| line.ends_with("bytes=123456-")));
    assert!(names(&blobs).iter().all(|name| !name.ends_with(".incomplete")));
}

#[test]
fn begins_anew_where_the_hub_cannot_resume() {
    let files = model();
    let shard = &files["model-00001-of-00002.safetensors"];
    let setup = Setup::new(files.clone(), Faults { no_ranges: true, ..Faults::default() });
    let blobs = setup.home.path().join("hub/models--owner--name/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(format!("{}.incomplete", sha256(shard))), &shard[..123_456]).unwrap();
    let directory = setup.pull().unwrap();
    assert_eq!(&std::fs::read(directory.join("model-00001-of-00002.safetensors")).unwrap(), shard);
}

#[test]
fn weights_are_checked() {
    let setup = Setup::new(model(), Faults { corrupt: true, ..Faults::default() });
    let error = setup.pull().unwrap_err();
    assert!(error.contains("model-00001-of-00002.safetensors") && error.contains("SHA-256"), "{error}");
    // Nothing of it is left to be gone on with.
    let blobs = names(&setup.home.path().join("hub/models--owner--name/blobs"));
    assert!(blobs.iter().all(|name| !name.ends_with(".incomplete")), "{blobs:?}");
}

#[test]
fn passing_failures_are_waited_out() {
    let setup = Setup::new(model(), Faults { fail_first: 2, ..Faults::default() });
    setup.pull().unwrap();
}

#[test]
fn refusals_are_explained_and_not_repeated() {
    for (status, word) in [(404, "no such model"), (401, "HF_TOKEN"), (403, "gated")] {
        let setup = Setup::new(model(), Faults { listing: Some(status), ..Faults::default() });
        let error = setup.pull().unwrap_err();
        assert!(error.contains(word), "{error}");
        assert_eq!(setup.hub.requests().len(), 1);
    }
    let mut pickled = model();
    pickled.retain(|name, _| !name.contains("safetensors"));
    let error = Setup::new(pickled, Faults::default()).pull().unwrap_err();
    assert!(error.contains("safetensors"), "{error}");
}

#[test]
fn an_index_cannot_point_outside() {
    for target in ["../../../etc/passwd", "model.bin", "/etc/passwd", "a/b.safetensors", ""] {
        let mut files = model();
        let index = serde_json::json!({ "weight_map": { "a": target } }).to_string();
        files.insert("model.safetensors.index.json".to_owned(), index.into_bytes());
        let setup = Setup::new(files, Faults::default());
        assert!(setup.pull().unwrap_err().contains("index"), "{target}");
    }
}

#[test]
fn a_copy_serves_while_the_hub_does_not() {
    let setup = Setup::new(model(), Faults::default());
    let directory = setup.pull().unwrap();
    let dead = HubConfig { endpoint: "http://127.0.0.1:1".to_owned(), max_retries: 0, ..setup.config() };
    let pull_dead = |name: &str| pull(&ModelName::parse(name).unwrap(), &dead, &Environment::default());
    assert_eq!(pull_dead("owner/name").unwrap(), directory);
    assert_eq!(pull_dead(&format!("owner/name@{COMMIT}")).unwrap(), directory);
    assert!(pull_dead("owner/other").is_err());
    std::fs::remove_file(directory.join("model-00002-of-00002.safetensors")).unwrap();
    assert!(pull_dead("owner/name").is_err());
}

#[test]
fn a_token_is_not_sent_in_the_clear() {
    let setup = Setup::new(model(), Faults::default());
    let environment = Environment { hub_token: Some(Secret::new("hf_hidden".to_owned())), ..Environment::default() };
    let error = pull(&ModelName::parse("owner/name").unwrap(), &setup.config(), &environment).unwrap_err();
    assert!(!format!("{error} {error:?} {environment:?}").contains("hf_hidden"));
    assert!(setup.hub.requests().is_empty());
}
