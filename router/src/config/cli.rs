//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches};

use super::layers::{Flag, keys};
use crate::bench::Bench;

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    Serve { file: Option<PathBuf>, flags: Vec<Flag>, print_config: bool },
    Bench(Box<Bench>),
}

/// Flags of their own for the keys that are set most: name, key, name of the value, help.
const SHORTHANDS: &[(&str, &str, &str, &str)] = &[
    ("http", "server.http", "ADDR", "Where HTTP listens [default: 127.0.0.1:8000]"),
    ("grpc", "server.grpc", "ADDR", "Where gRPC listens [default: 127.0.0.1:50051]"),
    ("model-name", "server.model_name", "NAME", "The name that clients ask for [default: from MODEL]"),
    ("device", "engine.device", "DEVICE", "Where to compute: auto, cpu, cuda or cuda:N [default: auto]"),
    ("memory-share", "engine.memory_share", "SHARE", "Of a card: how much memory may be taken [default: 0.9]"),
    ("dtype", "engine.dtype", "TYPE", "What weights are stored as: auto, f32 or bf16 [default: auto]"),
    (
        "kv-dtype",
        "engine.kv_dtype",
        "TYPE",
        "What the KV cache is stored as: auto, f32, bf16, int8 or fp8 [default: auto]",
    ),
    ("max-model-len", "scheduler.max_model_len", "TOKENS", "Most tokens of prompt and output [default: the model's]"),
    ("max-num-seqs", "scheduler.max_num_seqs", "N", "Most sequences that run at once [default: 64]"),
    ("max-num-batched-tokens", "scheduler.max_num_batched_tokens", "N", "Most tokens in a step [default: 512]"),
    (
        "kv-cache-memory",
        "engine.kv_cache_memory",
        "BYTES",
        "Memory of the KV cache, as 512MiB or 2GiB [default: as the weights, on a card what is left]",
    ),
    ("quantize", "engine.quantize", "FORMAT", "How weights are stored: none, fp8, int8 or int4 [default: none]"),
    ("load-format", "engine.load_format", "FORMAT", "auto, or dummy for seeded random weights [default: auto]"),
];

/// Flags without a value: name, key, the value they set, help.
const SWITCHES: &[(&str, &str, &str, &str)] = &[
    ("no-prefix-cache", "scheduler.prefix_cache", "false", "Compute every prompt from its beginning"),
    (
        "allow-unauthenticated",
        "server.allow_unauthenticated",
        "true",
        "Let anyone who reaches a listener use it; needed for any address but loopback",
    ),
];

/// The key of models beside MODEL, set by a flag that may be repeated.
const NAMED: &str = "model.named";

fn command() -> clap::Command {
    let serve = with_settings(clap::Command::new("serve").about("Serve a model over HTTP and gRPC")).arg(
        Arg::new("print-config")
            .long("print-config")
            .action(ArgAction::SetTrue)
            .help("Show every setting and where it comes from, then exit"),
    );
    let serve = serve.arg(
        Arg::new(NAMED)
            .long("model")
            .value_name("NAME=PATH")
            .action(ArgAction::Append)
            .conflicts_with(generic_id(NAMED))
            .help("A model of this server, chosen by its name; may be given several times, and PATH be `demo`"),
    );
    clap::Command::new("quire")
        .about("Serve open-weights language models to many callers at once")
        .version(env!("CARGO_PKG_VERSION"))
        .after_help("Without a command: `quire serve` with the demo model.")
        .subcommand(serve)
        .subcommand(Bench::command(with_settings))
}

/// Adds MODEL and a flag for every key of the configuration.
fn with_settings(command: clap::Command) -> clap::Command {
    let mut command = command
        .after_help(
            "Every configuration key is a flag too: --section.key VALUE, for example --scheduler.block-size 32.\n\
             `quire serve --print-config` lists all keys. In the environment the same key is \
             QUIRE_SCHEDULER__BLOCK_SIZE,\nin the file it is block_size under [scheduler]. Flags override the \
             environment, which overrides the file.",
        )
        .arg(Arg::new("model.path").value_name("MODEL").conflicts_with(generic_id("model.path")).help(
            "A Hugging Face directory, a GGUF file, or a hub name owner/name[@revision]; without it the demo model",
        ));
    for (name, key, value, help) in SHORTHANDS {
        command =
            command.arg(Arg::new(*name).long(*name).value_name(*value).help(*help).conflicts_with(generic_id(key)));
    }
    for (name, key, _, help) in SWITCHES {
        command = command
            .arg(Arg::new(*name).long(*name).action(ArgAction::SetTrue).help(*help).conflicts_with(generic_id(key)));
    }
    command = command.arg(
        Arg::new("config")
            .long("config")
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help("Read settings from a TOML file"),
    );
    for key in keys() {
        let kebab = key.replace('_', "-");
        let mut arg = Arg::new(generic_id(&key)).long(kebab.clone()).value_name("VALUE").hide(true);
        if kebab != key {
            arg = arg.alias(key);
        }
        command = command.arg(arg.allow_hyphen_values(true));
    }
    command
}

fn generic_id(key: &str) -> String {
    format!("key:{key}")
}

/// Reads the command line. An error is clap's: it prints itself, and says which exit code it wants.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, clap::Error> {
    let mut args: Vec<OsString> = args.into_iter().collect();
    // `quire` and `quire --http ...` are `quire serve` too.
    let own = |arg: &OsString| ["-h", "--help", "-V", "--version"].iter().any(|own| arg == own);
    let is_flag = |arg: &OsString| arg.to_string_lossy().starts_with('-');
    if args.get(1).is_none_or(|arg| is_flag(arg) && !own(arg)) {
        args.insert(1.min(args.len()), "serve".into());
    }
    let mut command = command();
    let matches = command.try_get_matches_from_mut(args)?;
    let read = match matches.subcommand() {
        Some(("bench", bench)) => Bench::read(bench, read_settings).map(|bench| Command::Bench(Box::new(bench))),
        Some((_, serve)) => read_settings(serve).map(|(file, flags)| Command::Serve {
            file,
            flags,
            print_config: serve.get_flag("print-config"),
        }),
        None => unreachable!("serve is put in where there is no subcommand"),
    };
    read.map_err(|message| command.error(clap::error::ErrorKind::InvalidValue, message))
}

/// The configuration's file and the flags that override it.
fn read_settings(matches: &ArgMatches) -> Result<(Option<PathBuf>, Vec<Flag>), String> {
    let mut flags = Vec::new();
    for key in keys() {
        if let Some(value) = matches.get_one::<String>(&generic_id(&key)) {
            flags.push(Flag { name: format!("--{}", key.replace('_', "-")), key, value: value.clone() });
        }
    }
    for (name, key, ..) in SHORTHANDS {
        if let Some(value) = matches.get_one::<String>(name) {
            flags.push(Flag { name: format!("--{name}"), key: (*key).to_owned(), value: value.clone() });
        }
    }
    for (name, key, value, _) in SWITCHES {
        if matches.get_flag(name) {
            flags.push(Flag { name: format!("--{name}"), key: (*key).to_owned(), value: (*value).to_owned() });
        }
    }
    // Only `serve` has it.
    if let Ok(Some(named)) = matches.try_get_many::<String>(NAMED) {
        let value = serde_json::Value::from_iter(named.cloned()).to_string();
        flags.push(Flag { name: "--model".to_owned(), key: NAMED.to_owned(), value });
    }
    if let Some(model) = matches.get_one::<String>("model.path") {
        flags.push(Flag { name: "MODEL".to_owned(), key: "model.path".to_owned(), value: model.clone() });
    }
    let file = matches.get_one::<PathBuf>("config").cloned();
    Ok((file, flags))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(args: &[&str]) -> Vec<(String, String)> {
        let args = std::iter::once("quire").chain(args.iter().copied()).map(OsString::from);
        match parse(args).unwrap() {
            Command::Serve { flags, .. } => flags.into_iter().map(|flag| (flag.key, flag.value)).collect(),
            other => panic!("{other:?}"),
        }
    }

    fn error(args: &[&str]) -> String {
        let args = std::iter::once("quire").chain(args.iter().copied()).map(OsString::from);
        let error = parse(args).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn the_command_is_well_formed() {
        command().debug_assert();
    }

    #[test]
    fn every_shorthand_has_a_key() {
        let keys = keys();
        let named = SHORTHANDS.iter().map(|(_, key, ..)| key).chain(SWITCHES.iter().map(|(_, key, ..)| key));
        for key in named {
            assert!(keys.contains(*key), "{key}");
        }
    }

    #[test]
    fn serve_is_what_no_command_means() {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(flags(&[]), []);
        assert_eq!(flags(&["--http", "127.0.0.1:0"]), [pair("server.http", "127.0.0.1:0")]);
        assert_eq!(
            flags(&["serve", "./model", "--no-prefix-cache", "--scheduler.block-size", "32"]),
            [
                pair("scheduler.block_size", "32"),
                pair("scheduler.prefix_cache", "false"),
                pair("model.path", "./model"),
            ]
        );
        assert_eq!(flags(&["--model", "a=./x", "--model", "b=./y,z"]), [pair("model.named", r#"["a=./x","b=./y,z"]"#)]);
        assert_eq!(flags(&["--scheduler.block_size=48"]), [pair("scheduler.block_size", "48")]);
        assert_eq!(flags(&["--quantize", "int8"]), [pair("engine.quantize", "int8")]);
        assert_eq!(flags(&["--kv-dtype", "int8"]), [pair("engine.kv_dtype", "int8")]);
    }

    #[test]
    fn mistakes_are_named() {
        assert!(error(&["--scheduler.blocksize", "32"]).contains("--scheduler.blocksize"));
        assert!(error(&["sevre"]).contains("sevre"));
        assert!(error(&["--http", "a", "--server.http", "b"]).contains("--server.http"));
    }
}
