//! The engine over a CUDA driver without a card: decode steps are recorded, and memory that runs out or a device that is lost, at
//! whatever moment, ends in what is promised.
#![cfg(unix)]

use std::time::Duration;

use quire_engine::scheduler::FinishReason;
use quire_engine::testing::{Recorder, TinyModel, read_all, start_on, submission, tiny_model};
use quire_engine::{EngineConfig, EngineError, EngineHandle, EngineHealth, SchedulerSettings, TokenEvent};
use quire_kernels::cuda::{CudaBackend, Driver};
use quire_kernels::testing::fake_driver::{FakeDriver, ILLEGAL_ADDRESS, OUT_OF_MEMORY};

fn start(observer: &Recorder) -> Result<EngineHandle, EngineError> {
    let settings = SchedulerSettings {
        max_num_seqs: 4,
        max_num_batched_tokens: 32,
        max_model_len: 128,
        ..SchedulerSettings::default()
    };
    let engine = EngineConfig { kv_cache_memory: 1 << 20, ..EngineConfig::default() };
    let backend = CudaBackend::new(Driver::open(0, None)?)?;
    start_on(backend, &tiny_model(1, TinyModel::Llama), &engine, &settings, Box::new(observer.clone()))
}

/// Tokens of a request of three; kernels do nothing, so all of them are 0.
async fn generate(handle: &EngineHandle, num_tokens: u32) {
    let mut stream = handle.submit(submission(&[5, 6, 7], num_tokens)).await.unwrap();
    let outcome = read_all(&mut stream).await.remove(0);
    assert_eq!(outcome.finish, Some(FinishReason::Length));
    assert_eq!(outcome.tokens, vec![0; num_tokens as usize]);
}

/// Waits until the engine's thread, and its device with it, is gone.
fn wait_until_nothing_lives(fake: &FakeDriver) {
    for _ in 0..2000 {
        if fake.count("living") == 0 {
            return;
        }
        std::thread::yield_now();
        std::thread::park_timeout(Duration::from_millis(1));
    }
    panic!("{} handles live on", fake.count("living"));
}

#[tokio::test]
async fn decode_steps_are_recorded_and_all_is_given_back() {
    let Some(fake) = FakeDriver::get() else { return };
    let handle = start(&Recorder::default()).unwrap();
    let num_allocations = fake.count("cuMemAlloc_v2");
    generate(&handle, 20).await;
    assert_eq!((fake.count("cuGraphInstantiateWithFlags"), fake.count("replays")), (1, 18));
    assert_eq!(fake.count("cuMemAlloc_v2"), num_allocations, "all memory was taken before");
    drop(handle);
    wait_until_nothing_lives(&fake);
}

#[tokio::test]
async fn steps_that_cannot_be_recorded_run_as_they_are() {
    let Some(fake) = FakeDriver::get() else { return };
    let functions = ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags", "cuGraphLaunch"];
    for function in functions {
        let (captures, replays) = (fake.count("cuStreamBeginCapture_v2"), fake.count("replays"));
        let observer = Recorder::default();
        let handle = start(&observer).unwrap();
        // Again and again, as memory that is gone stays gone.
        fake.fail(function, 0, u64::from(u32::MAX), OUT_OF_MEMORY);
        generate(&handle, 20).await;
        assert_eq!(fake.count("cuStreamBeginCapture_v2") - captures, 1, "{function}: a size is tried once");
        assert_eq!(fake.count("replays"), replays);
        assert_eq!(observer.failure(), None);
        fake.fail(function, 0, 0, OUT_OF_MEMORY);
        drop(handle);
        wait_until_nothing_lives(&fake);
    }
}

#[test]
fn memory_that_runs_out_at_any_allocation_refuses_the_start_in_numbers() {
    let Some(fake) = FakeDriver::get() else { return };
    for (function, what) in [("cuMemAlloc_v2", "the model does not fit"), ("cuMemHostAlloc", "no memory for")] {
        let before = fake.count(function);
        drop(start(&Recorder::default()).unwrap());
        wait_until_nothing_lives(&fake);
        let num_calls = fake.count(function) - before;
        assert!(num_calls > 1, "{function}: {num_calls}");
        for passing in 0..num_calls {
            fake.fail(function, passing, 1, OUT_OF_MEMORY);
            let error = start(&Recorder::default()).err().unwrap_or_else(|| panic!("{function} {passing}"));
            let line = error.to_string();
            let is_refusal = matches!(&error, EngineError::Config { .. } | EngineError::Kernel(_));
            let has_numbers = line.contains("GiB") || line.contains("bytes");
            assert!(is_refusal && has_numbers && !line.contains('\n'), "{function} {passing}, {what}: {line}");
            wait_until_nothing_lives(&fake);
        }
    }
}

#[tokio::test]
async fn a_device_that_is_lost_in_any_call_of_a_step_ends_its_requests_with_the_reason() {
    let Some(fake) = FakeDriver::get() else { return };
    let functions = [
        "cuMemcpyHtoDAsync_v2",
        "cuLaunchKernel",
        "cuMemcpyDtoHAsync_v2",
        "cuEventRecord",
        "cuEventSynchronize",
        "cuGraphLaunch",
    ];
    for (function, passing) in functions.into_iter().flat_map(|function| [(function, 0), (function, 7)]) {
        let observer = Recorder::default();
        let handle = start(&observer).unwrap();
        fake.fail(function, passing, 1, ILLEGAL_ADDRESS);
        let mut stream = handle.submit(submission(&[5, 6, 7], 60)).await.unwrap();
        let mut last = None;
        while let Some(event) = stream.next().await {
            last = Some(event);
        }
        assert!(matches!(last, Some(TokenEvent::Failed)), "{function} {passing}: {last:?}");
        assert_eq!(handle.health(Duration::from_secs(3600)), EngineHealth::Stopped);
        let failure = observer.failure().expect("the observer is told");
        assert!(failure.contains("CUDA_ERROR_ILLEGAL_ADDRESS") && !failure.contains('\n'), "{failure}");
        assert!(handle.submit(submission(&[5], 1)).await.is_err());
        drop((stream, handle));
        wait_until_nothing_lives(&fake);
        fake.set("broken", 0);
    }
    // A device that was broken is no worse for the next engine.
    let handle = start(&Recorder::default()).unwrap();
    generate(&handle, 5).await;
    drop(handle);
    wait_until_nothing_lives(&fake);
}
