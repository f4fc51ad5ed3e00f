//! The command line and the configuration, through the real binary.

mod support;

use std::process::Output;

use support::quire;

fn run(args: &[&str], environment: &[(&str, &str)]) -> Output {
    quire().args(args).envs(environment.iter().copied()).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Fails as a wrong configuration does, with a message that has all of `parts`.
fn refused(args: &[&str], environment: &[(&str, &str)], parts: &[&str]) {
    let output = run(args, environment);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
    for part in parts {
        assert!(message.contains(part), "{args:?}: `{part}` is not in: {message}");
    }
}

#[test]
fn says_its_version_and_how_it_is_used() {
    let version = run(&["--version"], &[]);
    assert_eq!(stdout(&version), concat!("quire ", env!("CARGO_PKG_VERSION"), "\n"));
    assert!(stdout(&run(&["--help"], &[])).contains("serve"));
    let serve = stdout(&run(&["serve", "--help"], &[]));
    for flag in [
        "--http",
        "--grpc",
        "--model-name",
        "--device",
        "--dtype",
        "--kv-dtype",
        "--quantize",
        "--max-model-len",
        "--max-num-seqs",
        "--max-num-batched-tokens",
        "--kv-cache-memory",
        "--no-prefix-cache",
        "--load-format",
        "--config",
        "--print-config",
        "--allow-unauthenticated",
    ] {
        assert!(serve.contains(flag), "{flag}");
    }
}

#[test]
fn print_config_shows_each_value_and_its_origin() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "[scheduler]\nblock_size = 32\nmax_num_seqs = 1\n").unwrap();
    let path = file.path().to_str().unwrap();
    let output = run(
        &["serve", "--config", path, "--kv-cache-memory", "512MiB", "--no-prefix-cache", "--print-config"],
        &[("QUIRE_SCHEDULER__MAX_NUM_SEQS", "7"), ("HF_ENDPOINT", "http://127.0.0.1:1"), ("HF_TOKEN", "hf_hidden")],
    );
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    let line = |key: &str| text.lines().find(|line| line.starts_with(key)).unwrap_or_else(|| panic!("{key}: {text}"));
    for (key, value, origin) in [
        ("block_size", "= 32", "# file"),
        ("max_num_seqs", "= 7", "# env QUIRE_SCHEDULER__MAX_NUM_SEQS"),
        ("kv_cache_memory", "= 536870912", "# flag --kv-cache-memory"),
        ("prefix_cache", "= false", "# flag --no-prefix-cache"),
        ("endpoint", "= \"http://127.0.0.1:1\"", "# env HF_ENDPOINT"),
        ("http", "= \"127.0.0.1:8000\"", "# default"),
        ("# path", "is not set", "# default"),
    ] {
        assert!(line(key).contains(value) && line(key).ends_with(origin), "{}", line(key));
    }
    assert!(!text.contains("hf_hidden"));
    // What it shows is a file that means the same.
    std::fs::write(file.path(), &text).unwrap();
    let again = stdout(&run(&["serve", "--config", path, "--print-config"], &[]));
    let values = |text: &str| {
        text.lines().map(|line| line.split("  #").next().unwrap().trim_end().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(values(&again), values(&text));
}

#[test]
fn what_is_not_understood_stops_the_start() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    std::fs::write(file.path(), "[scheduler]\nblok_size = 32\n").unwrap();
    refused(&["serve", "--config", path], &[], &[path, "scheduler.blok_size", "scheduler.block_size"]);
    std::fs::write(file.path(), "[scheduler]\nblock_size = true\n").unwrap();
    refused(&["serve", "--config", path], &[], &[path, "scheduler.block_size"]);
    refused(&["serve", "--config", "/nowhere.toml"], &[], &["/nowhere.toml"]);
    refused(&[], &[("QUIRE_SCHEDULER__BLOK_SIZE", "1")], &["QUIRE_SCHEDULER__BLOK_SIZE"]);
    refused(&[], &[("QUIRE_SCHEDULER__BLOCK_SIZE", "x")], &["QUIRE_SCHEDULER__BLOCK_SIZE", "x"]);
    refused(&["serve", "--scheduler.block-sise", "1"], &[], &["--scheduler.block-sise"]);
    refused(&["serve", "--max-num-seqs", "many"], &[], &["--max-num-seqs", "many"]);
    refused(&["serve", "--quantize", "int3"], &[], &["--quantize", "int4"]);
    refused(&["serve", "--kv-dtype", "fp4"], &[], &["--kv-dtype", "fp8"]);
    refused(&["serve", "--device", "tpu"], &[], &["--device", "cuda"]);
    refused(&["sevre"], &[], &["sevre"]);
}

#[test]
fn listens_to_strangers_only_when_told_to() {
    for args in [["--http", "0.0.0.0:0"], ["--grpc", "[::]:0"]] {
        refused(&["serve", args[0], args[1]], &[], &[args[1], "--allow-unauthenticated"]);
    }
    let allowed = run(&["serve", "--http", "0.0.0.0:0", "--allow-unauthenticated", "--print-config"], &[]);
    assert_eq!(allowed.status.code(), Some(0));
}

#[test]
fn a_model_that_is_not_there_is_named() {
    let ports = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    for model in ["no-such-directory", "/no/such/directory", "a/b/c"] {
        let output = run(&[&["serve", model][..], &ports].concat(), &[]);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.contains(model), "{message}");
    }
}

#[test]
fn models_need_names_of_their_own() {
    refused(&["serve", "--model", "./x"], &[], &["model.named", "NAME=PATH"]);
    let ports = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    for (args, part) in [
        (&["--model", "a=demo", "--model", "a=demo"][..], "two models are named a"),
        (&["--model", "a=demo", "--model", "b=/no/such/directory"], "/no/such/directory"),
        (&["--model", "a=demo", "--model", "b=demo", "--device", "cuda"], "--device cpu"),
        (&["--model", "a=demo", "--model", "b=demo", "--kv-cache-memory", "100TiB"], "the models do not fit"),
    ] {
        let output = run(&[&["serve"][..], args, &ports].concat(), &[]);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.contains(part), "{part} is not in: {message}");
    }
}
