# Every command that the project is worked on with. `just` alone lists them.

default:
    @just --list --unsorted

# What must hold before a commit.
check: fmt-check clippy test doc deny

fmt:
    cargo fmt --all

fmt-check:
    cargo fmt --all --check

clippy:
    cargo clippy --workspace --all-targets -- -D warnings

test:
    cargo test

# Only the tests that speak HTTP and gRPC to a running server.
e2e:
    cargo test --workspace --test e2e --test process --test faces

# Published clients of every contract against the demo model; needs Python and its registry, and skips without.
clients:
    cargo build -p quire-router
    tests/clients/run.sh

# Every schema of a folder of the public JSON Schema test suite against the demo model.
schemas FOLDER:
    cargo build --release
    cargo run --release -p quire-tests --example json_schemas -- {{FOLDER}}

doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

deny:
    cargo deny check bans licenses sources

# Pace of operations, scheduler and step; figures go to benches/RESULTS.md.
bench:
    cargo bench --workspace
    cargo run --release -- bench scheduler
    cargo run --release -- bench machine
    cargo run --release -- bench model

# Draws benches/throughput.svg from benches/*.json; needs Python, nothing else.
plot:
    python3 benches/plot.py

# Makes the device code that the binary embeds; needs Python, and the registry for the pinned CUDA compiler.
ptx:
    python3 kernels/ptx/make.py

# Assembles it for every architecture; fails where registers are spilled.
ptx-check:
    python3 kernels/ptx/make.py --check

# Builds what a machine with a card is to run, into benches/gpu/bin; there benches/gpu/run.sh runs it, without cargo.
gpu PROFILE="release":
    benches/gpu/build.sh {{PROFILE}}

# The tables of benches/RESULTS.md of what run.sh wrote.
gpu-table FOLDER="benches/gpu/out":
    python3 benches/gpu/table.py {{FOLDER}}

# Remakes the parity fixtures; needs Python with torch and transformers.
fixtures:
    python3 tests/fixtures/make_parity.py

# Trains the demo model anew; at most two hours on two cores. Needs Python with torch, transformers and tokenizers.
demo:
    python3 router/demo/train.py
