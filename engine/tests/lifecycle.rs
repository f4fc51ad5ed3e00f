//! How an engine starts, fails and ends, and what its callers see of it.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use quire_engine::scheduler::{FinishReason, RowId, StepOutput, StepPlan};
use quire_engine::testing::{
    FakeExecutor, Gate, Recorder, TinyModel, fake_model, read_all, start_with, submission, tiny_model,
};
use quire_engine::{
    DeviceChoice, EngineConfig, EngineError, EngineHandle, EngineHealth, Executor, LoadFormat, ModelSource,
    RequestGrammar, SchedulerSettings, StepObserver, StepReport, SubmitError, TokenEvent,
};

const LONG: Duration = Duration::from_secs(3600);

fn settings() -> SchedulerSettings {
    SchedulerSettings { max_num_seqs: 8, max_num_batched_tokens: 32, ..SchedulerSettings::default() }
}

fn start(executor: impl Executor, pipeline_depth: u32, recorder: &Recorder) -> EngineHandle {
    start_with(executor, fake_model(1000), &settings(), pipeline_depth, Box::new(recorder.clone())).unwrap()
}

/// Blocks until the thread has ended: an executor that says so when it is dropped.
struct SaysGoodbye(FakeExecutor, mpsc::Sender<()>);

impl Executor for SaysGoodbye {
    fn constrain(&mut self, row: RowId, grammar: &Arc<RequestGrammar>) {
        self.0.constrain(row, grammar);
    }
    fn launch(&mut self, plan: &StepPlan) -> Result<(), EngineError> {
        self.0.launch(plan)
    }
    fn collect(&mut self) -> Result<StepOutput, EngineError> {
        self.0.collect()
    }
    fn recycle(&mut self, output: StepOutput) {
        self.0.recycle(output);
    }
}

impl Drop for SaysGoodbye {
    fn drop(&mut self) {
        let _ = self.1.send(());
    }
}

async fn assert_stopped(handle: &EngineHandle, cause: &str, recorder: &Recorder) {
    assert_eq!(handle.health(LONG), EngineHealth::Stopped);
    assert!(handle.failure().unwrap().contains(cause), "{:?}", handle.failure());
    assert_eq!(recorder.failure(), handle.failure());
    assert_eq!(handle.submit(submission(&[1], 1)).await.err(), Some(SubmitError::Stopped));
}

#[tokio::test]
async fn a_device_error_fails_every_request_and_stops_the_engine() {
    for pipeline_depth in [0, 1] {
        let (gate, recorder) = (Gate::closed(), Recorder::default());
        let hold = gate.clone();
        let executor = FakeExecutor::new(1000).on_step(move |plan| {
            hold.pass();
            match plan.step_id.0 {
                5 => Err(EngineError::Config { field: "device".to_owned(), why: "fell off the bus".to_owned() }),
                _ => Ok(()),
            }
        });
        let handle = start(executor, pipeline_depth, &recorder);
        let mut streams = vec![handle.submit(submission(&[1, 2, 3], 100)).await.unwrap()];
        gate.open();
        for i in 0..6 {
            // From step 5 on there is nobody to take it.
            streams.extend(handle.submit(submission(&[i], 100)).await.ok());
        }
        for stream in &mut streams {
            let mut last = None;
            while let Some(event) = stream.next().await {
                assert_ne!(last, Some(TokenEvent::Failed), "it comes once");
                last = Some(event);
            }
            assert_eq!(last, Some(TokenEvent::Failed));
        }
        assert_stopped(&handle, "fell off the bus", &recorder).await;
    }
}

#[tokio::test]
async fn a_panic_in_the_thread_is_a_stop_and_not_a_death() {
    let recorder = Recorder::default();
    let executor = FakeExecutor::new(1000).on_step(|plan| {
        assert!(plan.step_id.0 < 3, "as scripted");
        Ok(())
    });
    let handle = start(executor, 0, &recorder);
    let mut stream = handle.submit(submission(&[1, 2, 3], 100)).await.unwrap();
    let outcome = read_all(&mut stream).await;
    assert_eq!((outcome[0].tokens.len(), outcome[0].finish), (3, None));
    assert_stopped(&handle, "as scripted", &recorder).await;
}

#[tokio::test]
async fn an_observer_that_panics_stops_the_engine_too() {
    struct Broken;
    impl StepObserver for Broken {
        fn step(&mut self, _: &StepReport) {
            panic!("no counter");
        }
        fn cancel_to_free(&mut self, _: Duration) {}
        fn failed(&mut self, _: &str) {
            panic!("nor a log");
        }
    }
    let handle = start_with(FakeExecutor::new(10), fake_model(10), &settings(), 0, Box::new(Broken)).unwrap();
    let mut stream = handle.submit(submission(&[1], 100)).await.unwrap();
    read_all(&mut stream).await;
    assert_eq!(handle.health(LONG), EngineHealth::Stopped);
    assert_eq!(handle.failure().as_deref(), Some("panic: no counter"));
}

#[tokio::test]
async fn shutdown_ends_everything() {
    let (goodbye, ended) = mpsc::channel();
    let gate = Gate::closed();
    let recorder = Recorder::default();
    let handle = start(SaysGoodbye(FakeExecutor::new(1000).gated(&gate), goodbye), 0, &recorder);
    let mut running = handle.submit(submission(&[1], 100)).await.unwrap();
    gate.wait_until_held();
    let waiting = {
        let handle = handle.clone();
        tokio::spawn(async move { handle.submit(submission(&[1], 100)).await.err() })
    };
    tokio::task::yield_now().await;
    handle.shutdown();
    gate.open();
    ended.recv().unwrap();
    assert_eq!(read_all(&mut running).await.last().map(|choice| choice.finish), Some(None));
    assert_eq!(waiting.await.unwrap(), Some(SubmitError::Stopped));
    assert_eq!(handle.health(LONG), EngineHealth::Stopped);
    assert_eq!((handle.failure(), recorder.failure()), (None, None));
}

#[tokio::test]
async fn the_last_handle_takes_the_thread_with_it() {
    let (goodbye, ended) = mpsc::channel();
    let handle = start(SaysGoodbye(FakeExecutor::new(1000), goodbye), 0, &Recorder::default());
    let other = handle.clone();
    drop(handle);
    let mut stream = other.submit(submission(&[1], 3)).await.unwrap();
    assert_eq!(read_all(&mut stream).await[0].tokens.len(), 3);
    assert_eq!(ended.try_recv(), Err(mpsc::TryRecvError::Empty));
    drop(other);
    ended.recv().unwrap();
}

#[tokio::test]
async fn logits_that_are_no_numbers_end_their_own_choice_only() {
    for pipeline_depth in [0, 1] {
        let clean = start(FakeExecutor::new(1000), pipeline_depth, &Recorder::default());
        let broken = FakeExecutor::new(1000).non_finite(|request, position| request.prompt[0] == 7 && position == 6);
        let broken = start(broken, pipeline_depth, &Recorder::default());
        let mut outcomes = Vec::new();
        for handle in [&clean, &broken] {
            let mut streams = Vec::new();
            for first in 5..10 {
                streams.push(handle.submit(submission(&[first, 1, 2], 20)).await.unwrap());
            }
            let mut all = Vec::new();
            for stream in &mut streams {
                all.push(read_all(stream).await.remove(0));
            }
            outcomes.push(all);
        }
        let (clean, broken) = (&outcomes[0], &outcomes[1]);
        for i in [0, 1, 3, 4] {
            assert_eq!(clean[i], broken[i]);
        }
        assert_eq!(broken[2].finish, Some(FinishReason::NonFinite));
        assert_eq!(broken[2].tokens, clean[2].tokens[..3]);
    }
}

#[tokio::test]
async fn the_step_clock_tells_work_from_rest() {
    let gate = Gate::closed();
    let handle = start(FakeExecutor::new(1000).gated(&gate), 0, &Recorder::default());
    assert_eq!(handle.health(Duration::ZERO), EngineHealth::Alive, "nothing to do is not a stall");
    let mut stream = handle.submit(submission(&[1], 3)).await.unwrap();
    gate.wait_until_held();
    assert_eq!(handle.health(LONG), EngineHealth::Alive);
    let is_stalled = || matches!(handle.health(Duration::ZERO), EngineHealth::Stalled { .. });
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_stalled() {
        assert!(Instant::now() < deadline, "the clock moves");
    }
    gate.open();
    read_all(&mut stream).await;
    while is_stalled() {
        assert!(Instant::now() < deadline, "the engine rests");
        std::thread::yield_now();
    }
}

#[tokio::test]
async fn reports_add_up() {
    for pipeline_depth in [0, 1] {
        let recorder = Recorder::default();
        let handle = start(FakeExecutor::new(1000), pipeline_depth, &recorder);
        let prompt: Vec<u32> = (0..100).collect();
        let mut stream = handle.submit(submission(&prompt, 10)).await.unwrap();
        read_all(&mut stream).await;
        handle.shutdown();
        while handle.health(LONG) != EngineHealth::Stopped {
            std::thread::yield_now();
        }
        let reports = recorder.reports();
        let sum = |part: fn(&StepReport) -> u32| reports.iter().map(part).sum::<u32>();
        assert_eq!(sum(|report| report.num_prefill_tokens), 100);
        assert_eq!(sum(|report| report.num_sampled_tokens), 10);
        assert_eq!(sum(|report| report.num_decodes), 9);
        assert_eq!(reports.last().unwrap().stats.num_generated_tokens, 10);
    }
}

#[tokio::test]
async fn a_deadline_ends_a_request() {
    let handle = start(FakeExecutor::new(1000), 0, &Recorder::default());
    let mut request = submission(&[1], 10);
    request.deadline = Some(Instant::now());
    let outcome = read_all(&mut handle.submit(request).await.unwrap()).await;
    assert_eq!(outcome[0].finish, Some(FinishReason::DeadlineExceeded));
}

#[tokio::test]
async fn what_the_model_does_not_have_is_refused_before_it_is_queued() {
    let handle = start(FakeExecutor::new(1000), 0, &Recorder::default());
    for prompt in [vec![1000], vec![1, u32::MAX], vec![]] {
        assert!(matches!(handle.submit(submission(&prompt, 1)).await.err(), Some(SubmitError::Scheduler(_))));
    }
    let mut request = submission(&[1], 1);
    request.sampling.temperature = f32::NAN;
    assert!(handle.submit(request).await.is_err());
    let mut request = submission(&[1], u32::MAX);
    request.sampling.num_choices = u32::MAX;
    assert!(handle.submit(request).await.is_err());
    assert_eq!(handle.health(LONG), EngineHealth::Alive);
}

fn load(source: &ModelSource, engine: &EngineConfig, settings: &SchedulerSettings) -> Result<EngineHandle, String> {
    quire_engine::start(source, engine, settings, Box::new(Recorder::default())).map_err(|error| error.to_string())
}

#[tokio::test]
async fn a_model_is_loaded_from_files_or_drawn_from_a_seed() {
    let source = tiny_model(1, TinyModel::Llama);
    let config = EngineConfig { kv_cache_memory: 1 << 20, num_threads: 1, ..EngineConfig::default() };
    let handle = load(&source, &config, &settings()).unwrap();
    let info = handle.model();
    assert_eq!((info.vocab_size, info.max_model_len, info.dtype), (250, 512, "bf16"));
    assert_eq!((info.kv_cache_bytes, info.num_blocks), (1 << 20, 256));
    assert_eq!(info.eos_token_ids, [2]);
    assert_eq!(info.num_parameters, 2 * 250 * 64 + 64 + 2 * (2 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64));
    assert!(info.device_note.is_some(), "auto says why it took the CPU");
    let digest = info.digest;

    let dummy = EngineConfig { load_format: LoadFormat::Dummy, ..config.clone() };
    let handle = load(&source, &dummy, &settings()).unwrap();
    assert_ne!(handle.model().digest, digest);
    let mut stream = handle.submit(submission(&[1, 2, 3], 5)).await.unwrap();
    assert_eq!(read_all(&mut stream).await[0].tokens.len(), 5);
}

#[test]
fn what_cannot_work_is_named_before_it_is_tried() {
    let source = tiny_model(1, TinyModel::Llama);
    let config = EngineConfig { num_threads: 1, kv_cache_memory: 1 << 20, ..EngineConfig::default() };
    let refused = |engine: &EngineConfig, settings: &SchedulerSettings, part: &str| {
        let error = load(&source, engine, settings).err().unwrap();
        assert!(error.contains(part), "{error}");
    };
    let cuda = EngineConfig { device: DeviceChoice::Cuda(1000), ..config.clone() };
    refused(&cuda, &settings(), "engine.device");
    refused(&EngineConfig { kv_cache_memory: 100, ..config.clone() }, &settings(), "one sequence");
    refused(&EngineConfig { pipeline_depth: 2, ..config.clone() }, &settings(), "pipeline_depth");
    refused(&config, &SchedulerSettings { max_model_len: 513, ..settings() }, "max_model_len");
    refused(&config, &SchedulerSettings { block_size: 10, ..settings() }, "block_size");
    refused(&config, &SchedulerSettings { max_num_batched_tokens: 1, ..settings() }, "max_num_batched_tokens");
    let nowhere = ModelSource::Directory("/nowhere/at/all".into());
    assert!(load(&nowhere, &config, &settings()).err().unwrap().contains("config.json"));
}

/// A setting that no model can change is refused before any file of one is looked at.
#[test]
fn a_depth_that_cannot_be_is_refused_before_the_model_is_loaded() {
    let source = ModelSource::Directory("/no/such/directory".into());
    let engine = EngineConfig { pipeline_depth: 2, ..EngineConfig::default() };
    let error = quire_engine::start(&source, &engine, &settings(), Box::new(Recorder::default())).err();
    assert!(matches!(&error, Some(EngineError::Config { field, .. }) if field == "engine.pipeline_depth"), "{error:?}");
}
