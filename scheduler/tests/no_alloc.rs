//! Decode steps allocate nothing.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use quire_scheduler::testing::request;
use quire_scheduler::{KvGroup, KvGroupKind, Scheduler, SchedulerConfig, StepOutput, StepPlan, Time};

/// The system's allocator, which counts how often the test's own thread asked it: the test runner has threads, too.
struct Counting;

thread_local! {
    static IS_COUNTED: Cell<bool> = const { Cell::new(false) };
}

static NUM_ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

#[expect(unsafe_code, reason = "an allocator can only be counted by being one")]
// SAFETY: every call is handed to `System` unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if IS_COUNTED.try_with(Cell::get).unwrap_or(false) {
            NUM_ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller keeps the promises of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the promises of `GlobalAlloc::dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn compute(plan: &StepPlan, output: &mut StepOutput) {
    output.reset(plan.step_id);
    for sequence in &plan.sequences {
        output.push_computed(sequence.num_scheduled_tokens, if sequence.samples { &[7] } else { &[] });
    }
}

#[test]
fn decode_steps_allocate_nothing() {
    IS_COUNTED.set(true);
    assert!(NUM_ALLOCATIONS.load(Ordering::Relaxed) == 0 && !vec![0_u8; 64].is_empty());
    assert_eq!(NUM_ALLOCATIONS.swap(0, Ordering::Relaxed), 1, "allocations are counted");
    let num_seqs = 64;
    let kinds = [KvGroupKind::Full, KvGroupKind::SlidingWindow { window: 100 }];
    let config = SchedulerConfig {
        max_num_seqs: num_seqs,
        max_num_batched_tokens: 2048,
        max_model_len: 2048,
        kv_groups: kinds.iter().map(|&kind| KvGroup { kind, num_blocks: num_seqs * 128 }).collect(),
        ..SchedulerConfig::default()
    };
    // With what listeners would be told, and nobody listening.
    for (depth, kv_events) in [(0, false), (1, false), (1, true)] {
        let mut scheduler = Scheduler::new(SchedulerConfig { kv_events, ..config.clone() }).unwrap();
        for id in 0..num_seqs {
            let prompt: Vec<u32> = (0..100 + id).map(|position| id * 1000 + position).collect();
            scheduler.submit(request(u64::from(id), &prompt, 1500), Time(0)).unwrap();
        }
        let mut in_flight = Vec::with_capacity(2);
        let mut output = StepOutput::default();
        let mut events = Vec::new();
        let mut before = 0;
        let mut num_new_blocks = 0;
        for step in 0..1000 {
            if step == 100 {
                before = NUM_ALLOCATIONS.load(Ordering::Relaxed);
            }
            let plan = scheduler.plan(Time(step));
            if step >= 100 {
                assert_eq!(plan.num_decodes(), num_seqs as usize);
                num_new_blocks += plan.new_blocks.len();
            }
            in_flight.push(plan);
            if in_flight.len() > depth {
                let plan = in_flight.remove(0);
                compute(&plan, &mut output);
                scheduler.apply(plan, &mut output, Time(step));
            }
            events.clear();
            scheduler.drain_events(&mut events);
            let _ = scheduler.stats();
        }
        assert_eq!(NUM_ALLOCATIONS.load(Ordering::Relaxed) - before, 0, "depth {depth}");
        assert!(num_new_blocks > 2 * 64 * 900 / 17, "blocks were appended");
    }
}
