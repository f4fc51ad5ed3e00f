//! `benches/gpu/run.sh` and `table.py`, where there is no card: what becomes of tests that pass, fail, hang and are skipped, of
//! figures, and of parts that have none. The program is one of a script's own making, but for the last test.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Whether this machine has a program; else a line says so.
fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        println!("skipped: no {program} here");
    }
    found
}

/// Folders of a run: binaries that are scripts, and what comes out.
struct Run {
    folder: tempfile::TempDir,
}

impl Run {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["bin/kernels", "bin/engine", "out"] {
            fs::create_dir_all(folder.path().join(name)).unwrap();
        }
        Self { folder }
    }

    fn add(&self, name: &str, script: &str) {
        let path = self.folder.path().join("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A binary of tests, each with what it does.
    fn add_tests(&self, name: &str, tests: &[(&str, &str)]) {
        let names: String = tests.iter().map(|(test, _)| format!("echo '{test}: test'\n")).collect();
        let cases: String = tests.iter().map(|(test, what)| format!("{test}) {what} ;;\n")).collect();
        self.add(name, &format!("if [ \"$1\" = --list ]; then\n{names}exit 0\nfi\ncase $2 in\n{cases}esac"));
    }

    fn start(&self, arguments: &[&str]) -> Output {
        let at = |name| self.folder.path().join(name);
        let mut command = Command::new("bash");
        command.arg(root().join("benches/gpu/run.sh")).arg("--out").arg(at("out")).arg("--bin").arg(at("bin"));
        command.args(arguments).env("TMPDIR", self.folder.path()).output().unwrap()
    }

    fn part(&self, name: &str) -> Value {
        let text = fs::read_to_string(self.folder.path().join("out").join(format!("{name}.json"))).unwrap();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }
}

#[test]
fn every_test_is_a_line_whatever_becomes_of_it() {
    if !has("bash") {
        return;
    }
    let run = Run::new();
    let bad = r#"printf 'says "no"\tor \\\n'; exit 101"#;
    run.add_tests(
        "engine/device_code",
        &[
            ("same_bits::on_a_card", "echo 'f32: 1.0e-6'"),
            ("same_bits::emulated", "exit 1"),
            ("logits::on_a_card", "exit 1"),
            ("small::same_bits_on_a_card", bad),
            ("never_same_bits_on_a_card", "sleep 60"),
            ("late_same_bits_on_a_card", "true"),
        ],
    );
    let output = run.start(&["--limit", "3", "bits"]);
    assert!(output.status.success(), "{output:?}");
    let part = run.part("bits");
    let tests: Vec<(&str, &str)> = part["tests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|test| (test["name"].as_str().unwrap(), test["status"].as_str().unwrap()))
        .collect();
    let expected = [
        ("device_code same_bits::on_a_card", "passed"),
        ("device_code small::same_bits_on_a_card", "failed"),
        ("device_code never_same_bits_on_a_card", "timed out"),
        ("device_code late_same_bits_on_a_card", "no time"),
    ];
    assert_eq!(tests, expected);
    assert_eq!((&part["passed"], &part["failed"]), (&1.into(), &3.into()));
    assert_eq!(part["tests"][0]["said"], "f32: 1.0e-6");
    assert_eq!(part["tests"][1]["said"], "says \"no\"\tor \\");
}

#[test]
fn figures_are_kept_and_parts_without_any_say_why() {
    if !has("bash") {
        return;
    }
    let run = Run::new();
    run.add_tests("kernels/embed", &[("rows::on_a_card", "echo 'skipped: cuda: no driver here'")]);
    // The last argument is the file; one part fails, one hangs.
    run.add(
        "quire",
        r#"for file; do :; done
        case "$*" in
            --version) ;;
            *128256x4096*) echo 'error: cuda: it broke'; exit 1 ;;
            *"--rows 2048"*) exec sleep 60 ;;
            *) echo 'a table'; echo '{"rows": []}' > "$file" ;;
        esac"#,
    );
    let archive = run.folder.path().join("all.tgz");
    let archived = ["--archive", archive.to_str().unwrap()];
    let parts = ["--limit", "2", "large", "attention", "skinny", "kernels", "modules"];
    let output = run.start(&[&archived[..], &parts].concat());
    assert!(output.status.success(), "{output:?}");
    let listed = Command::new("tar").arg("-tzf").arg(&archive).output().unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(
        ["large", "attention", "skinny", "kernels", "modules"].iter().all(|part| listed.contains(part)),
        "{listed}"
    );
    assert_eq!(run.part("attention")["rows"], Value::Array(Vec::new()));
    assert_eq!(run.part("skinny")["skipped"], "error: cuda: it broke");
    assert_eq!(run.part("large")["skipped"], "not done in 2 s");
    assert_eq!(run.part("kernels")["skipped"], "cuda: no driver here");
    assert!(run.part("modules")["cold_seconds"].is_number());
    // Correctness comes before figures, in whatever order parts are named.
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let places = ["modules:", "kernels:", "attention:", "skinny:", "large:"].map(|part| said.find(part).unwrap());
    assert!(places.is_sorted(), "{said}");

    let output = run.start(&["nonsense"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

#[test]
fn a_table_is_made_of_what_is_there() {
    if !has("python3") {
        return;
    }
    let fixtures = root().join("tests/fixtures/gpu");
    let output =
        Command::new("python3").arg(root().join("benches/gpu/table.py")).arg(fixtures.join("run")).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let expected = fs::read_to_string(fixtures.join("table.md")).unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
}

/// The program itself: figures where there is a card, and one line where there is none.
#[test]
fn the_program_says_that_there_is_no_driver() {
    if !has("bash") {
        return;
    }
    let run = Run::new();
    fs::copy(quire_tests::binary(), run.folder.path().join("bin/quire")).unwrap();
    let output = run.start(&["--limit", "60", "attention"]);
    assert!(output.status.success(), "{output:?}");
    let part = run.part("attention");
    match part["skipped"].as_str() {
        Some(why) => assert!(why.contains("cuda: "), "{why}"),
        None => assert!(part["rows"].as_array().is_some_and(|rows| !rows.is_empty()), "{part}"),
    }
}
