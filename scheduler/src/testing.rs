//! Seeded workloads, a fake model over a real paged cache, a naive twin of the block bookkeeping, and a harness that
//! plays them against a [`Scheduler`](crate::Scheduler) (feature `testing`).
//!
//! The fake model makes wrong bookkeeping visible: what a token leaves in the cache is a hash of all tokens up to it,
//! and the next token is derived from what is read back through the block tables. A block that was shared wrongly,
//! given away too early or never written changes the output, and the output is known beforehand ([`expected_output`]).

mod device;
mod kv_replay;
mod naive;
mod rng;
mod simulation;
mod timing;
mod workload;

pub use device::{FakeDevice, FaultRates, expected_output};
pub use naive::{BlockOperation, NaiveBlocks, compare_blocks};
pub use rng::Rng;
pub use simulation::{Outcome, Report, Sabotage, Simulation, simulate};
pub use timing::{StepTiming, TimingOptions, time_decode_steps};
pub use workload::{RequestMix, Workload, request};
