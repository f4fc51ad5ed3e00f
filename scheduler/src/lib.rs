//! Continuous batching over a paged KV cache, as a pure state machine.
//!
//! The scheduler decides which tokens are computed next; it computes nothing, and has no clock, thread, lock, log or
//! device. Same calls in the same order with the same times: same plans. One owner drives it:
//!
//! ```text
//! submit(request, now) ──> plan(now) ──StepPlan──> device ──StepOutput──> apply(plan, output, now) ──> drain_events
//!                            ^                                                   │
//!                            └───────────────────────────────────────────────────┘
//! ```
//! `plan` may be called once more before the step in flight is applied, so that the device never waits: a token that
//! is not known yet is a position in the plan, which the device fills itself.
//!
//! # Life of a sequence
//!
//! ```text
//!             prompt computed               row and blocks
//!   Parked ────by another choice──> Waiting ────given────> Running ──────> finished
//!  (choices 1.. of a request)        ^   ^                 │  │  │            ^
//!                                    │   └──preempted──────┘  │  │            │ nothing in flight any more
//!                                    │                        │  └─> Draining ┘
//!                                    └──── Preempting <───────┘
//!                                          (a plan in flight still uses its blocks)
//! ```
//! Blocks and row of a sequence are freed only when no plan in flight uses them; then its `Finished` event is
//! reported, exactly once. A request can be aborted, and can run into its deadline, in every state.

mod allocator;
mod applying;
mod block;
mod config;
mod error;
mod idle_check;
mod kv_events;
mod kv_groups;
mod pace;
mod plan;
mod planning;
mod prefix_cache;
mod queue;
mod request;
mod scheduler;
mod sequence;
mod stats;
mod tenants;
#[cfg(feature = "testing")]
pub mod testing;

pub use allocator::{Allocation, BlockAllocator};
pub use block::{BlockId, num_blocks_for};
pub use config::{KvGroup, KvGroupKind, MAX_KV_GROUPS, Policy, SchedulerConfig};
pub use error::{ConfigError, SubmitError};
pub use idle_check::IdleCheck;
pub use kv_events::{FlushReport, KvBlock, KvEvent, KvEvents, ShortHash};
pub use pace::QueuePace;
pub use plan::{
    Admission, Event, EventKind, RowId, ScheduledSequence, SequenceOutput, StepId, StepOutput, StepPlan, TokenLogprobs,
};
pub use prefix_cache::{BlockHash, PrefixCache};
pub use request::{AdapterId, CacheSalt, FinishReason, Request, RequestId, SamplingParams, TenantId, Time};
pub use scheduler::Scheduler;
pub use stats::{BlockStats, SchedulerStats};
