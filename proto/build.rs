//! Generates the wire types with a protobuf compiler written in Rust: a build needs no `protoc`.

use std::path::PathBuf;

use prost::Message;

const PROTOS: &[&str] = &["quire/v1/quire.proto", "vllm/common.proto", "vllm/engine.proto", "inference/service.proto"];

#[allow(clippy::disallowed_methods, reason = "Cargo speaks to build scripts through the environment")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    for proto in PROTOS {
        println!("cargo::rerun-if-changed={proto}");
    }
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let descriptors = protox::compile(PROTOS, ["."])?;
    // With comments and all: what server reflection hands out.
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().emit_rerun_if_changed(false).btree_map(".").compile_fds(descriptors)?;
    Ok(())
}
