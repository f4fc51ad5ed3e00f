//! Laying defaults, file, environment and flags over one another, and remembering where each value came from.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Config, Environment};

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Default,
    File,
    /// The variable.
    Env(String),
    /// The flag.
    Flag(String),
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File => f.write_str("file"),
            Self::Env(name) => write!(f, "env {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// Why the configuration cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {}: {why}", path.display())]
    File { path: PathBuf, why: String },
    #[error("{}: {why}", path.display())]
    Syntax { path: PathBuf, why: String },
    #[error("{source_name}: unknown key `{key}`{}", hint(nearest))]
    UnknownKey { source_name: String, key: String, nearest: Option<String> },
    #[error("unknown environment variable {name}{}", hint(nearest))]
    UnknownVariable { name: String, nearest: Option<String> },
    #[error("{source_name}: {key}: {why}")]
    Value { source_name: String, key: String, why: String },
    #[error("{key} {why}")]
    Invalid { key: String, why: String },
    #[error(
        "{key} = {address} can be reached from other machines, and this version has no keys to ask for: listen on \
         127.0.0.1 behind something that does, or set server.allow_unauthenticated = true \
         (--allow-unauthenticated) to let anyone in"
    )]
    Open { key: &'static str, address: SocketAddr },
}

fn hint(nearest: &Option<String>) -> String {
    nearest.as_ref().map(|nearest| format!("; did you mean `{nearest}`?")).unwrap_or_default()
}

/// A value given on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flag {
    /// As it was written, for messages.
    pub name: String,
    /// The key that it sets, `section.key`.
    pub key: String,
    pub value: String,
}

/// The configuration, where each value came from, and what else the environment had.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: Config,
    pub origins: BTreeMap<String, Origin>,
    pub environment: Environment,
    /// Variables of the environment that were passed over, to be named in the log.
    pub ignored_variables: Vec<String>,
}

/// Every key with its value, in the order in which they are shown.
fn leaves(config: &Config) -> BTreeMap<String, Value> {
    fn walk(path: &str, value: Value, out: &mut BTreeMap<String, Value>) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    walk(&if path.is_empty() { key } else { format!("{path}.{key}") }, value, out);
                }
            }
            value => {
                out.insert(path.to_owned(), value);
            }
        }
    }
    let mut out = BTreeMap::new();
    // Plain structs of numbers, strings and enums: nothing in them can fail to serialize.
    walk("", serde_json::to_value(config).unwrap_or_default(), &mut out);
    out
}

/// All keys that exist, as `section.key`.
pub(super) fn keys() -> BTreeSet<String> {
    leaves(&Config::default()).into_keys().collect()
}

/// Reads all layers. Nothing is read but `file`; [`Config::validate`] is the caller's to call.
pub fn load(file: Option<&Path>, environment: Environment, flags: &[Flag]) -> Result<Loaded, ConfigError> {
    let mut layers = Layers::new();
    if let Some(path) = file {
        layers.read_file(path)?;
    }
    let ignored_variables = layers.read_environment(&environment)?;
    for flag in flags {
        layers.set(&flag.key, Given::Text(&flag.value), Origin::Flag(flag.name.clone()), &flag.name)?;
    }
    Ok(Loaded { config: layers.config, origins: layers.origins, environment, ignored_variables })
}

/// A value as a layer has it.
enum Given<'a> {
    Text(&'a str),
    Toml(&'a toml::Value),
}

struct Layers {
    config: Config,
    values: BTreeMap<String, Value>,
    origins: BTreeMap<String, Origin>,
}

impl Layers {
    fn new() -> Self {
        let config = Config::default();
        let values = leaves(&config);
        let origins = values.keys().map(|key| (key.clone(), Origin::Default)).collect();
        Self { config, values, origins }
    }

    fn read_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError::File { path: path.to_owned(), why: error.to_string() })?;
        let table: toml::Table = text
            .parse()
            .map_err(|error: toml::de::Error| ConfigError::Syntax { path: path.to_owned(), why: error.to_string() })?;
        let source = path.display().to_string();
        let mut given = Vec::new();
        flatten("", &table, &self.values, &mut given);
        given.into_iter().try_for_each(|(key, value)| self.set(&key, Given::Toml(value), Origin::File, &source))
    }

    /// Says which variables it passed over.
    fn read_environment(&mut self, environment: &Environment) -> Result<Vec<String>, ConfigError> {
        // The hub's own variables first: where both are set, the one that is meant for this program wins.
        for (name, key, value) in
            [("HF_ENDPOINT", "hub.endpoint", &environment.hub_endpoint), ("HF_HOME", "hub.home", &environment.hub_home)]
        {
            if let Some(value) = value {
                self.set(key, Given::Text(value), Origin::Env(name.to_owned()), name)?;
            }
        }
        let by_name: BTreeMap<String, String> = self.values.keys().map(|key| (variable_of(key), key.clone())).collect();
        let mut ignored = Vec::new();
        for (name, value) in &environment.settings {
            let Some(key) = by_name.get(name) else {
                if is_service_link(name) {
                    ignored.push(name.clone());
                    continue;
                }
                let nearest = nearest(name, by_name.keys());
                return Err(ConfigError::UnknownVariable { name: name.clone(), nearest });
            };
            let Some(text) = value.to_str() else {
                let why = "is not UTF-8".to_owned();
                return Err(ConfigError::Value { source_name: name.clone(), key: key.clone(), why });
            };
            self.set(key, Given::Text(text), Origin::Env(name.clone()), name)?;
        }
        Ok(ignored)
    }

    /// Sets one key and checks that the whole still has the right types.
    fn set(&mut self, key: &str, given: Given<'_>, origin: Origin, source: &str) -> Result<(), ConfigError> {
        let fail = |why: String| ConfigError::Value { source_name: source.to_owned(), key: key.to_owned(), why };
        let Some(current) = self.values.get(key) else {
            let nearest = nearest(key, self.values.keys());
            return Err(ConfigError::UnknownKey { source_name: source.to_owned(), key: key.to_owned(), nearest });
        };
        let value = match given {
            Given::Text(text) => from_text(key, current, text).map_err(fail)?,
            Given::Toml(toml::Value::String(text)) if current.is_number() && is_size(key) => {
                from_text(key, current, text).map_err(fail)?
            }
            Given::Toml(value) => serde_json::to_value(value).map_err(|error| fail(error.to_string()))?,
        };
        let mut values = self.values.clone();
        values.insert(key.to_owned(), value);
        self.config = serde_json::from_value(nest(&values)).map_err(|error| fail(error.to_string()))?;
        self.values = values;
        self.origins.insert(key.to_owned(), origin);
        Ok(())
    }
}

/// Tables are opened only where they are sections, so that an unknown table is named, not its content.
fn flatten<'a>(
    path: &str,
    table: &'a toml::Table,
    known: &BTreeMap<String, Value>,
    out: &mut Vec<(String, &'a toml::Value)>,
) {
    for (key, value) in table {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        let section = format!("{path}.");
        match value {
            toml::Value::Table(table) if known.keys().any(|key| key.starts_with(&section)) => {
                flatten(&path, table, known, out);
            }
            value => out.push((path, value)),
        }
    }
}

fn nest(values: &BTreeMap<String, Value>) -> Value {
    let mut root = serde_json::Map::new();
    for (path, value) in values {
        let mut node = &mut root;
        let mut parts = path.split('.').peekable();
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                node.insert(part.to_owned(), value.clone());
                break;
            }
            let child = node.entry(part).or_insert_with(|| Value::Object(serde_json::Map::new()));
            let Value::Object(map) = child else { unreachable!("sections and keys have different names") };
            node = map;
        }
    }
    Value::Object(root)
}

/// Reads a text as what the key's present value is.
fn from_text(key: &str, current: &Value, text: &str) -> Result<Value, String> {
    match current {
        Value::Bool(_) => match text {
            "true" => Ok(Value::Bool(true)),
            "false" => Ok(Value::Bool(false)),
            _ => Err(format!("{text:?} is neither true nor false")),
        },
        Value::Number(_) if is_size(key) => parse_size(text).map(Value::from),
        Value::Number(number) if !number.is_f64() => {
            let digits = text.replace('_', "");
            let parsed = digits.parse::<u64>().map(Value::from).or_else(|_| digits.parse::<i64>().map(Value::from));
            parsed.map_err(|_| format!("{text:?} is not a whole number"))
        }
        Value::Number(_) => text.parse::<f64>().map(Value::from).map_err(|_| format!("{text:?} is not a number")),
        // A list as JSON has it, or its entries parted by commas.
        Value::Array(_) if text.starts_with('[') => {
            serde_json::from_str(text).map_err(|_| format!("{text:?} is not a list"))
        }
        Value::Array(_) if text.is_empty() => Ok(Value::Array(Vec::new())),
        Value::Array(_) => Ok(Value::from_iter(text.split(',').map(str::trim))),
        _ => Ok(Value::String(text.to_owned())),
    }
}

/// Keys that hold bytes accept `512MiB` and the like.
fn is_size(key: &str) -> bool {
    key.ends_with("_bytes") || key == "engine.kv_cache_memory"
}

/// `4096`, `512KiB`, `1.5 GiB`, `2GB`.
fn parse_size(text: &str) -> Result<u64, String> {
    let fail = || format!("{text:?} is not a number of bytes such as 1073741824, 512MiB or 2GiB");
    let compact = text.replace(['_', ' '], "");
    let unit_at = compact.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(compact.len());
    let (number, unit) = compact.split_at(unit_at);
    let scale: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(fail()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(scale).ok_or_else(fail);
    }
    let bytes = number.parse::<f64>().map_err(|_| fail())? * scale as f64;
    if bytes.is_finite() && bytes < 2f64.powi(63) { Ok(bytes as u64) } else { Err(fail()) }
}

fn variable_of(key: &str) -> String {
    format!("QUIRE_{}", key.replace('.', "__").to_uppercase())
}

/// Whether Kubernetes sets this variable by itself in every pod beside a service whose name begins with `quire`
/// (`QUIRE_SERVICE_HOST`, `QUIRE_HTTP_PORT_8000_TCP_ADDR`). A key's variable always has a double underscore.
fn is_service_link(name: &str) -> bool {
    if name.contains("__") {
        return false;
    }
    let numbered = |rest: &str| {
        let mut parts = rest.split('_');
        parts.next().is_some_and(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()))
            && matches!(parts.next(), Some("TCP" | "UDP" | "SCTP"))
    };
    name.contains("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.ends_with("_PORT")
        || name.split_once("_PORT_").is_some_and(|(_, rest)| numbered(rest))
}

/// The closest of `names`, if it is close enough to have been meant.
fn nearest<'a>(wrong: &str, names: impl Iterator<Item = &'a String>) -> Option<String> {
    let closest = names.map(|name| (distance(wrong, name), name)).min()?;
    // The section may be right and the rest off, or the other way round; a third of the letters is a guess still.
    (closest.0 * 3 <= wrong.chars().count()).then(|| closest.1.clone())
}

/// Edits between two words (Levenshtein 1966), in one row.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.chars().take(256).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &b) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

impl Loaded {
    /// The configuration as a TOML file with each value's origin beside it; a file of it gives the same configuration.
    pub fn print(&self) -> String {
        let mut out = String::new();
        let mut section = String::new();
        let mut settings: Vec<_> = leaves(&self.config).into_iter().collect();
        // A table's own keys together, before those of the tables in it.
        settings.sort_by_key(|(path, _)| path.rsplit_once('.').map_or("", |(table, _)| table).to_owned());
        for (path, value) in settings {
            let (table, key) = path.rsplit_once('.').unwrap_or(("", &path));
            if table != section {
                let gap = if out.is_empty() { "" } else { "\n" };
                let _ = writeln!(out, "{gap}[{table}]");
                section = table.to_owned();
            }
            let line = match toml::Value::try_from(&value) {
                Ok(value) => format!("{key} = {value}"),
                // TOML has no null: a key that is absent says so as a comment.
                Err(_) => format!("# {key} is not set"),
            };
            let origin = self.origins.get(&path).unwrap_or(&Origin::Default);
            let _ = writeln!(out, "{line:<44} # {origin}");
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_env(settings: &[(&str, &str)]) -> Environment {
        let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), value.into())).collect();
        Environment { settings, ..Environment::default() }
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    fn flag(name: &str, key: &str, value: &str) -> Flag {
        Flag { name: name.to_owned(), key: key.to_owned(), value: value.to_owned() }
    }

    #[test]
    fn later_layers_win_and_origins_are_kept() {
        let file =
            file("[scheduler]\nblock_size = 32\nmax_num_seqs = 8\nmax_model_len = 100\n[log]\nformat = 'json'\n");
        let env = with_env(&[("QUIRE_SCHEDULER__MAX_NUM_SEQS", "16"), ("QUIRE_SCHEDULER__MAX_MODEL_LEN", "200")]);
        let flags = [flag("--max-model-len", "scheduler.max_model_len", "300")];
        let loaded = load(Some(file.path()), env, &flags).unwrap();
        let scheduler = &loaded.config.scheduler;
        assert_eq!((scheduler.block_size, scheduler.max_num_seqs, scheduler.max_model_len), (32, 16, 300));
        let origin = |key: &str| loaded.origins[key].to_string();
        assert_eq!(origin("scheduler.block_size"), "file");
        assert_eq!(origin("scheduler.max_num_seqs"), "env QUIRE_SCHEDULER__MAX_NUM_SEQS");
        assert_eq!(origin("scheduler.max_model_len"), "flag --max-model-len");
        assert_eq!(origin("scheduler.policy"), "default");
        assert_eq!(loaded.origins.len(), keys().len());
    }

    #[test]
    fn what_is_printed_reads_back_as_the_same() {
        let env = with_env(&[("QUIRE_MODEL__PATH", "a \"quoted\" # path\\n"), ("QUIRE_SERVER__HTTP", "[::1]:1")]);
        let loaded = load(None, env, &[]).unwrap();
        let again = load(Some(file(&loaded.print()).path()), Environment::default(), &[]).unwrap();
        assert_eq!(again.config, loaded.config);
        assert_eq!(again.origins["server.http"], Origin::File);
    }

    #[test]
    fn lists_come_from_every_layer() {
        let named = |loaded: Loaded| loaded.config.model.named;
        let of_file = file("[model]\nnamed = ['a=./x', 'b=./y']\n");
        let expected = ["a=./x".to_owned(), "b=./y".to_owned()];
        let loaded = load(Some(of_file.path()), Environment::default(), &[]).unwrap();
        let again = load(Some(file(&loaded.print()).path()), Environment::default(), &[]).unwrap();
        assert_eq!(named(again), expected);
        assert_eq!(named(loaded), expected);
        assert_eq!(named(load(None, with_env(&[("QUIRE_MODEL__NAMED", "a=./x, b=./y")]), &[]).unwrap()), expected);
        let flags = [flag("--model", "model.named", r#"["a=./x","b=./y"]"#)];
        assert_eq!(named(load(None, Environment::default(), &flags).unwrap()), expected);
        assert!(load(None, with_env(&[("QUIRE_MODEL__NAMED", "[1]")]), &[]).is_err());
    }

    #[test]
    fn errors_name_the_source_and_the_key() {
        let of_file = |text: &str| load(Some(file(text).path()), Environment::default(), &[]).unwrap_err().to_string();
        let of_env = |name: &str, value: &str| load(None, with_env(&[(name, value)]), &[]).unwrap_err().to_string();
        let of_flag = |key: &str, value: &str| {
            load(None, Environment::default(), &[flag("--x", key, value)]).unwrap_err().to_string()
        };
        let check = |message: String, parts: &[&str]| {
            for part in parts {
                assert!(message.contains(part), "`{part}` is not in: {message}");
            }
        };
        check(of_file("[scheduler]\nblock_sise = 16\n"), &["scheduler.block_sise", "scheduler.block_size"]);
        check(of_file("[schedule]\nblock_size = 16\n"), &["unknown key `schedule`"]);
        check(of_file("verbose = true\n"), &["unknown key `verbose`"]);
        check(of_file("scheduler = 3\n"), &["unknown key `scheduler`"]);
        check(of_file("[scheduler]\nblock_size = 'big'\n"), &["scheduler.block_size", "big"]);
        check(of_file("[scheduler]\nblock_size = -1\n"), &["scheduler.block_size", "-1"]);
        check(of_file("[scheduler\n"), &["line 1"]);
        check(
            of_env("QUIRE_SCHEDULER__BLOK_SIZE", "16"),
            &["QUIRE_SCHEDULER__BLOK_SIZE", "QUIRE_SCHEDULER__BLOCK_SIZE"],
        );
        check(of_env("QUIRE_BLOCK_SIZE", "16"), &["QUIRE_BLOCK_SIZE"]);
        check(of_env("QUIRE_ENGINE__DEVICE", "gpu"), &["QUIRE_ENGINE__DEVICE", "engine.device", "cuda"]);
        check(of_env("QUIRE_SCHEDULER__PREFIX_CACHE", "yes"), &["yes", "true"]);
        check(of_flag("scheduler.block_size", "1.5"), &["--x", "1.5"]);
        check(of_flag("server.http", "localhost"), &["server.http"]);
        check(of_flag("engine.kv_cache_memory", "2 parsecs"), &["2 parsecs", "2GiB"]);
        let missing = load(Some(Path::new("/nowhere/quire.toml")), Environment::default(), &[]).unwrap_err();
        check(missing.to_string(), &["/nowhere/quire.toml"]);
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("1_000", 1000),
            ("4KiB", 4096),
            ("512MiB", 512 << 20),
            ("2GiB", 2 << 30),
            ("2 gib", 2 << 30),
            ("1.5G", 3 << 29),
            ("2GB", 2_000_000_000),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "-1", "GiB", "1..2", "1e9", "99999999999TiB", "0x10", "1.5.G", "９"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        let file = file("[engine]\nkv_cache_memory = '1MiB'\n[limits]\nmax_body_bytes = 5\n");
        let config = load(Some(file.path()), Environment::default(), &[]).unwrap().config;
        assert_eq!((config.engine.kv_cache_memory, config.limits.max_body_bytes), (1 << 20, 5));
    }

    #[test]
    fn variables_that_kubernetes_sets_are_named_not_obeyed() {
        let links = ["QUIRE_SERVICE_HOST", "QUIRE_SERVICE_PORT_HTTP", "QUIRE_PORT", "QUIRE_PORT_8000_TCP_ADDR"];
        let loaded = load(None, with_env(&links.map(|name| (name, "tcp://10.0.0.1"))), &[]).unwrap();
        assert_eq!(loaded.ignored_variables, links);
        for name in ["QUIRE_SERVER__PORT", "QUIRE_PORT_X", "QUIRE_PORTS"] {
            assert!(load(None, with_env(&[(name, "1")]), &[]).is_err(), "{name}");
        }
    }

    #[test]
    fn the_hubs_own_variables_give_way() {
        let mut env = with_env(&[("QUIRE_HUB__ENDPOINT", "http://b")]);
        env.hub_endpoint = Some("http://a".to_owned());
        env.hub_home = Some("/c".to_owned());
        let config = load(None, env, &[]).unwrap().config;
        assert_eq!((config.hub.endpoint.as_str(), config.hub.home.as_str()), ("http://b", "/c"));
    }
}
