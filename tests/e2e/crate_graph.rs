//! The house stands as ARCHITECTURE.md draws it: crates use only what is below them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Who may use whom. `tests` sits on top of everything and is no part of the product.
const ALLOWED: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("scheduler", &[]),
    ("kernels", &[]),
    ("engine", &["scheduler", "kernels"]),
    ("router", &["engine", "proto", "scheduler"]),
];

fn manifest(crate_dir: &str) -> toml::Table {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let path = root.join(crate_dir).join("Cargo.toml");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.parse().unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Our own crates among the dependencies of the given kinds.
fn own_dependencies(manifest: &toml::Table, kinds: &[&str]) -> BTreeSet<String> {
    kinds
        .iter()
        .filter_map(|kind| manifest.get(*kind)?.as_table())
        .flat_map(|table| table.keys())
        .filter_map(|name| name.strip_prefix("quire-").map(str::to_owned))
        .collect()
}

#[test]
fn crates_use_only_what_is_below_them() {
    for (name, allowed) in ALLOWED {
        let used = own_dependencies(&manifest(name), &["dependencies", "build-dependencies"]);
        let allowed: BTreeSet<String> = allowed.iter().map(|name| (*name).to_owned()).collect();
        let forbidden: Vec<_> = used.difference(&allowed).collect();
        assert!(forbidden.is_empty(), "{name} must not use {forbidden:?}");
    }
}

/// A crate's tests may turn on `testing` features below it (and its own), never reach upwards.
#[test]
fn tests_do_not_reach_upwards_either() {
    let allowed: BTreeMap<_, _> = ALLOWED.iter().copied().collect();
    for (name, below) in ALLOWED {
        let mut reachable: BTreeSet<String> = BTreeSet::from([(*name).to_owned()]);
        for direct in *below {
            reachable.insert((*direct).to_owned());
            reachable.extend(allowed[direct].iter().map(|name| (*name).to_owned()));
        }
        let used = own_dependencies(&manifest(name), &["dev-dependencies"]);
        let forbidden: Vec<_> = used.difference(&reachable).collect();
        assert!(forbidden.is_empty(), "tests of {name} must not use {forbidden:?}");
    }
}

#[test]
fn every_crate_of_the_workspace_is_in_the_house() {
    let members = manifest(".");
    let members: BTreeSet<&str> = members["workspace"]["members"]
        .as_array()
        .expect("members is a list")
        .iter()
        .map(|member| member.as_str().expect("a member is a path"))
        .collect();
    let house: BTreeSet<&str> = ALLOWED.iter().map(|(name, _)| *name).chain(["tests"]).collect();
    assert_eq!(members, house);
}

/// The scheduler decides from its arguments alone: no clock, thread, lock, log or randomly ordered map.
#[test]
fn the_scheduler_is_pure() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scheduler/src");
    let forbidden = [
        "std::time",
        "Instant::",
        "SystemTime",
        "std::thread",
        "Mutex",
        "RwLock",
        "HashMap",
        "HashSet",
        "async fn",
        "println!",
        "eprintln!",
        "tracing::",
        "std::env",
        "std::fs",
        "std::net",
    ];
    let mut files = vec![root];
    let mut seen = 0;
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(&path).expect("a folder").map(|entry| entry.expect("an entry").path()));
            continue;
        }
        seen += 1;
        let text = std::fs::read_to_string(&path).expect("a source file");
        for (index, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            for word in forbidden {
                assert!(!code.contains(word), "{}:{}: {word}", path.display(), index + 1);
            }
        }
    }
    assert!(seen >= 5, "read only {seen} files of the scheduler");
}
