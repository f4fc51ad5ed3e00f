//! The device code in the binary is what the sources say: a change of a source takes `just ptx`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use quire_kernels::cuda::ptx::{Arch, MODULES};
use sha2::{Digest, Sha256};

fn crate_folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn hex(digest: Sha256) -> String {
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The compiler's flags, from the script that gives them.
fn flags() -> String {
    let script = fs::read_to_string(crate_folder().join("ptx/make.py")).expect("the script is there");
    let line = script.lines().find(|line| line.starts_with("FLAGS = [")).expect("it has flags");
    line.split('"').skip(1).step_by(2).collect::<Vec<_>>().join(" ")
}

/// A source and all that it includes, depth first, each once.
fn add(digest: &mut Sha256, seen: &mut BTreeSet<PathBuf>, file: &Path) {
    if !seen.insert(file.to_owned()) {
        return;
    }
    let text = fs::read_to_string(file).expect("a source is text");
    digest.update(&text);
    for line in text.lines() {
        let Some(name) = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"')) else { continue };
        let beside = file.parent().expect("a file is in a folder").join(name);
        let shared = crate_folder().join("include").join(name);
        if let Some(path) = [beside, shared].iter().find(|path| path.exists()) {
            add(digest, seen, path);
        }
    }
}

/// `ops/<op>/<op>.cu` of every operation that has one.
fn sources() -> Vec<(String, PathBuf)> {
    let folders = fs::read_dir(crate_folder().join("src/ops")).expect("there are operations");
    let sources = folders.filter_map(|folder| {
        let folder = folder.expect("a folder").path();
        let name = folder.file_name()?.to_str()?.to_owned();
        let source = folder.join(format!("{name}.cu"));
        source.exists().then_some((name, source))
    });
    let mut sources: Vec<_> = sources.collect();
    sources.sort();
    sources
}

#[test]
fn what_is_embedded_was_made_of_the_sources_that_are_there() {
    let mut expected = Vec::new();
    for (name, source) in sources() {
        let mut digest = Sha256::new();
        digest.update(flags());
        add(&mut digest, &mut BTreeSet::new(), &source);
        let hash = hex(digest);
        let text = fs::read_to_string(&source).expect("a source is text");
        expected.push((name.clone(), Arch::Sm80, hash.clone()));
        if text.lines().any(|line| line == "// PTX: sm_90a") {
            expected.push((name, Arch::Sm90a, hash));
        }
    }
    let embedded: Vec<_> =
        MODULES.iter().map(|module| (module.name.to_owned(), module.arch, module.source_sha256.to_owned())).collect();
    assert_eq!(embedded, expected, "device code is stale: `just ptx` makes it anew");
    assert!(!embedded.is_empty());
}

#[test]
fn texts_are_whole_and_for_their_target() {
    for module in MODULES {
        let mut digest = Sha256::new();
        digest.update(module.text);
        assert_eq!(hex(digest), module.sha256, "{}", module.name);
        let text = std::str::from_utf8(module.text).expect("PTX is text");
        let target = if module.arch == Arch::Sm80 { "\n.target sm_80\n" } else { "\n.target sm_90a\n" };
        // Drivers of CUDA 13.0 know versions up to 9.0.
        assert!(text.contains("\n.version 9.0\n") && text.contains(target), "{}", module.name);
    }
}
