//! Everything an operator can choose, in one place: [`Config`], made of each crate's own struct.
//!
//! Values come from defaults, then one TOML file, then the environment (`QUIRE_SCHEDULER__BLOCK_SIZE`), then flags
//! (`--scheduler.block-size`); later ones win. A key that does not exist, a value of the wrong type or an unknown
//! `QUIRE_` variable stops the start with a message that names it. [`Loaded::print`] shows each value and its origin.

mod cli;
mod environment;
mod layers;

use std::net::SocketAddr;

use quire_engine::{EngineConfig, SchedulerSettings};
use serde::{Deserialize, Serialize};

use crate::dialect::{ReasoningParserChoice, ToolParserChoice};
use crate::generation::Limits;

pub use cli::{Command, parse};
pub use environment::{Environment, Secret};
pub use layers::{ConfigError, Flag, Loaded, Origin, load};

/// Most models of a server beside `model.path`.
const MAX_NAMED_MODELS: usize = 64;

/// All settings. A section is a table of the file, a key a leaf of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub server: ServerConfig,
    pub model: ModelConfig,
    pub engine: EngineConfig,
    pub scheduler: SchedulerSettings,
    pub limits: Limits,
    pub log: LogConfig,
    pub hub: HubConfig,
}

impl Config {
    /// The engine's settings, with folders that follow from the environment filled in.
    pub fn engine_for(&self, environment: &Environment) -> EngineConfig {
        let mut engine = self.engine.clone();
        if engine.module_cache.is_empty()
            && let Some(home) = &environment.home
        {
            engine.module_cache = home.join(".cache").join("quire").join("cuda").to_string_lossy().into_owned();
        }
        engine
    }
}

/// Listeners, and how the process lives and dies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Where HTTP listens: the OpenAI API, health and metrics. Port 0 takes a free one and says which.
    pub http: SocketAddr,
    /// Where gRPC listens.
    pub grpc: SocketAddr,
    /// The name that clients ask for; without one it is the model's directory, hub or embedded name.
    pub model_name: Option<String>,
    /// Lets anyone who reaches a listener use the server. Needed for any address but loopback, as long as there are no
    /// keys to ask for; set it only behind something that asks in the server's place.
    pub allow_unauthenticated: bool,
    /// How long running requests may go on after SIGTERM. A little under what the supervisor waits before it kills.
    pub drain_timeout_seconds: u64,
    /// How long a step may take before the process counts as hung and `/health/live` fails. Several times the longest
    /// step that this model takes on this device; readiness fails earlier, by the pace measured.
    pub stall_seconds: u64,
    /// Connections open at once, per listener; past it new ones are closed at once.
    pub max_connections: usize,
    /// How long a client may take to send a request's header, and an unused connection may stay open.
    pub header_timeout_seconds: u64,
    /// Bytes of a request's header.
    pub max_header_bytes: u32,
    /// Header fields of a request.
    pub max_headers: usize,
    /// How long a client may read nothing while there is something to read: of its connection, or over HTTP/2 of a
    /// stream, whose request then ends.
    pub write_stall_seconds: u64,
    /// Requests open at once on one HTTP/2 connection. A client that sends more waits on its side, unseen by the queue. Each
    /// may send 64 KiB before it is read, all of a connection together 1 MiB.
    pub max_concurrent_streams: u32,
    /// Bytes of a gRPC message that comes in.
    pub grpc_max_message_bytes: usize,
    /// How often a silent HTTP/2 connection is asked whether it is alive; it has as long again to answer.
    pub keepalive_seconds: u64,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            http: SocketAddr::from(([127, 0, 0, 1], 8000)),
            grpc: SocketAddr::from(([127, 0, 0, 1], 50051)),
            model_name: None,
            allow_unauthenticated: false,
            drain_timeout_seconds: 30,
            stall_seconds: 60,
            max_connections: 4096,
            header_timeout_seconds: 10,
            max_header_bytes: 64 << 10,
            max_headers: 100,
            write_stall_seconds: 30,
            max_concurrent_streams: 256,
            grpc_max_message_bytes: 4 << 20,
            keepalive_seconds: 20,
        }
    }
}

/// What is served.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// A Hugging Face directory, or a hub name `owner/name` or `owner/name@revision`; without it the demo model.
    pub path: Option<String>,
    /// Further models of this server, `NAME=PATH` each (`--model`, once for each); without `path` they are all there is. Requests
    /// choose by name; one that names none gets the first model that can do what it asks for. In the environment they are
    /// parted by commas. All run with the same settings of `engine` and `scheduler`.
    pub named: Vec<String>,
    /// How the model writes tool calls: `auto` sees it in its chat template. One of `hermes`, `llama3_json`, `pythonic`,
    /// `mistral`, `deepseek_v3`, `qwen3_coder`, `harmony` where the template does not show it.
    pub tool_parser: ToolParserChoice,
    /// How the model marks its reasoning: `auto` sees it in its chat template; `none` leaves it in the text; `think`,
    /// `harmony`.
    pub reasoning_parser: ReasoningParserChoice,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people on a terminal, JSON elsewhere.
    #[default]
    Auto,
    Human,
    Json,
}

/// What the process says on standard error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    pub format: LogFormat,
    /// `error`, `warn`, `info`, `debug` or `trace`, or a list of these by module (`info,quire_router::grpc=debug`).
    /// Nothing is logged per token, and no level logs prompts or answers.
    pub level: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::Auto, level: "info".to_owned() }
    }
}

/// Where models with a hub name come from. Nothing is asked for unless such a name is given. A proxy is taken from the
/// usual variables (`HTTPS_PROXY`, `NO_PROXY`), a token from `HF_TOKEN`; it is sent over TLS only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HubConfig {
    /// The hub's address; `HF_ENDPOINT` sets it too.
    pub endpoint: String,
    /// Where downloads are kept, laid out as other tools of the hub lay it out, so that they share them; `HF_HOME`
    /// sets it too. Empty is `~/.cache/huggingface`.
    pub home: String,
    /// How often a transfer that was cut is taken up again, without any byte having come in between.
    pub max_retries: u32,
    /// How long the hub may be silent.
    pub timeout_seconds: u64,
}

impl Default for HubConfig {
    fn default() -> Self {
        Self { endpoint: "https://huggingface.co".to_owned(), home: String::new(), max_retries: 5, timeout_seconds: 30 }
    }
}

impl Config {
    /// Fails with the first setting that cannot work; what depends on the model is checked when it is loaded.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let server = &self.server;
        let invalid = |key: &str, why: &str| Err(ConfigError::Invalid { key: key.to_owned(), why: why.to_owned() });
        for (key, value) in [
            ("server.drain_timeout_seconds", server.drain_timeout_seconds),
            ("server.stall_seconds", server.stall_seconds),
            ("server.max_connections", server.max_connections as u64),
            ("server.header_timeout_seconds", server.header_timeout_seconds),
            ("server.max_headers", server.max_headers as u64),
            ("server.write_stall_seconds", server.write_stall_seconds),
            ("server.max_concurrent_streams", u64::from(server.max_concurrent_streams)),
            ("server.grpc_max_message_bytes", server.grpc_max_message_bytes as u64),
            ("server.keepalive_seconds", server.keepalive_seconds),
            ("hub.timeout_seconds", self.hub.timeout_seconds),
        ] {
            // A day and a half in seconds is past any use, and keeps every sum of durations in range.
            match value {
                0 if key != "server.drain_timeout_seconds" => return invalid(key, "must be at least 1"),
                131_073.. if key.ends_with("_seconds") => return invalid(key, "must be at most 131072"),
                _ => {}
            }
        }
        if server.max_header_bytes < 8192 {
            // The least that the HTTP/1 reader works with.
            return invalid("server.max_header_bytes", "must be at least 8192");
        }
        if server.max_connections > 1 << 20 {
            return invalid("server.max_connections", "must be at most 1048576");
        }
        if server.model_name.as_ref().is_some_and(|name| name.is_empty() || name.len() > 256) {
            return invalid("server.model_name", "must have 1 to 256 bytes");
        }
        let is_named = |named: &String| {
            named.split_once('=').is_some_and(|(name, path)| (1..=256).contains(&name.len()) && !path.is_empty())
        };
        if !self.model.named.iter().all(is_named) {
            return invalid("model.named", "must hold NAME=PATH, with a name of 1 to 256 bytes");
        }
        if self.model.named.len() > MAX_NAMED_MODELS {
            return invalid("model.named", &format!("must hold at most {MAX_NAMED_MODELS} models"));
        }
        if crate::telemetry::parse_level(&self.log.level).is_err() {
            return invalid(
                "log.level",
                "is not a level (error, warn, info, debug, trace) or a list of them by module",
            );
        }
        if let Err((field, why)) = self.limits.validate() {
            return invalid(&format!("limits.{field}"), why);
        }
        if let Err((field, why)) = self.limits.grammar.validate() {
            return invalid(&format!("limits.grammar.{field}"), why);
        }
        if server.grpc_max_message_bytes > self.limits.max_buffered_bytes {
            return invalid("server.grpc_max_message_bytes", "must be at most limits.max_buffered_bytes");
        }
        if !server.allow_unauthenticated {
            for (key, address) in [("server.http", server.http), ("server.grpc", server.grpc)] {
                if !address.ip().is_loopback() {
                    return Err(ConfigError::Open { key, address });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_without_keys() {
        let mut config = Config::default();
        assert_eq!(config.validate(), Ok(()));
        for open in ["0.0.0.0:8000", "[::]:8000", "192.168.0.1:1", "[::ffff:127.0.0.1]:1"] {
            config.server.http = open.parse().unwrap();
            let message = config.validate().unwrap_err().to_string();
            assert!(message.contains("server.http") && message.contains("--allow-unauthenticated"), "{message}");
        }
        config.server.allow_unauthenticated = true;
        assert_eq!(config.validate(), Ok(()));
        config.server = ServerConfig { grpc: "0.0.0.0:1".parse().unwrap(), ..ServerConfig::default() };
        assert!(config.validate().unwrap_err().to_string().contains("server.grpc"));
    }

    #[test]
    fn refuses_what_cannot_work() {
        let refused = |change: fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(refused(|c| c.server.stall_seconds = 0).contains("server.stall_seconds"));
        assert!(refused(|c| c.server.drain_timeout_seconds = u64::MAX).contains("drain_timeout_seconds"));
        assert!(refused(|c| c.server.max_header_bytes = 1).contains("max_header_bytes"));
        assert!(refused(|c| c.log.level = "loud!".to_owned()).contains("log.level"));
        assert!(refused(|c| c.limits.max_choices = 0).contains("limits.max_choices"));
        assert!(refused(|c| c.server.model_name = Some(String::new())).contains("model_name"));
        for wrong in ["./x", "=./x", "a="] {
            let mut config = Config::default();
            config.model.named = vec!["fine=./x".to_owned(), wrong.to_owned()];
            assert!(config.validate().unwrap_err().to_string().contains("model.named"), "{wrong}");
        }
    }
}
