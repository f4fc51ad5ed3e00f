//! End-to-end tests: real HTTP and gRPC against a running server, one binary for all of them.

mod bench;
mod crate_graph;
mod faces;
#[cfg(unix)]
mod gpu_run;
mod hostile;
mod lifecycle;
mod resume;
mod structured;
