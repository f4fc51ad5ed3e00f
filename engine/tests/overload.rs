//! Ten times more than there is room for: what is refused is told when to come back, what was taken finishes.

use quire_engine::scheduler::{FinishReason, SubmitError as Refusal};
use quire_engine::testing::{FakeExecutor, Gate, Recorder, fake_model, read_all, start_with, submission};
use quire_engine::{EngineHandle, ModelInfo, SchedulerSettings, SubmitError};

const PROMPT_LEN: usize = 32;
const MAX_TOKENS: u32 = 8;
const MAX_WAITING: usize = 20;

fn start(gate: &Gate) -> EngineHandle {
    let model = ModelInfo { num_blocks: 32, max_model_len: 256, ..fake_model(1000) };
    let settings = SchedulerSettings {
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        max_waiting_tokens: (MAX_WAITING * PROMPT_LEN) as u64,
        ..SchedulerSettings::default()
    };
    start_with(FakeExecutor::new(1000).gated(gate), model, &settings, 0, Box::new(Recorder::default())).unwrap()
}

fn prompt(first: u32) -> Vec<u32> {
    (0..PROMPT_LEN as u32).map(|i| (first * 31 + i * 7) % 1000).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_with_a_time_to_come_back() {
    let gate = Gate::closed();
    let handle = start(&gate);
    // Holds the first step, so that all others come while it runs.
    let mut first = handle.submit(submission(&prompt(0), MAX_TOKENS)).await.unwrap();
    gate.wait_until_held();
    let callers: Vec<_> = (1..=10 * MAX_WAITING as u32)
        .map(|i| {
            let handle = handle.clone();
            tokio::spawn(async move {
                let mut stream = handle.submit(submission(&prompt(i), MAX_TOKENS)).await?;
                Ok::<_, SubmitError>(read_all(&mut stream).await)
            })
        })
        .collect();
    gate.open();
    let (mut num_finished, mut num_refused) = (0, 0);
    for caller in callers {
        match caller.await.unwrap() {
            Ok(outcome) => {
                assert_eq!(outcome[0].tokens.len(), MAX_TOKENS as usize);
                assert_eq!(outcome[0].finish, Some(FinishReason::Length));
                num_finished += 1;
            }
            Err(SubmitError::Scheduler(
                Refusal::QueueFull { retry_after_micros, .. } | Refusal::WaitTooLong { retry_after_micros, .. },
            )) => {
                assert!(retry_after_micros > 0);
                num_refused += 1;
            }
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(read_all(&mut first).await[0].finish, Some(FinishReason::Length));
    assert_eq!(num_finished + num_refused, 10 * MAX_WAITING);
    assert!(num_finished >= MAX_WAITING - 1, "{num_finished} finished");
    assert!(num_refused > MAX_WAITING, "{num_refused} refused");
    assert_eq!(handle.stats().num_waiting, 0);
    // With the load gone there is room again.
    let mut after = handle.submit(submission(&prompt(9), MAX_TOKENS)).await.unwrap();
    assert_eq!(read_all(&mut after).await[0].finish, Some(FinishReason::Length));
}

/// A step that hangs does not let an unbounded number of callers pile up behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_queue_is_bounded() {
    let gate = Gate::closed();
    let handle = start(&gate);
    let _first = handle.submit(submission(&prompt(0), MAX_TOKENS)).await.unwrap();
    gate.wait_until_held();
    let (answers, mut answered) = tokio::sync::mpsc::channel(4096);
    for i in 0..1100 {
        let (handle, answers) = (handle.clone(), answers.clone());
        tokio::spawn(async move {
            let answer = handle.submit(submission(&prompt(i), MAX_TOKENS)).await.map(drop);
            answers.send(answer).await.unwrap();
        });
    }
    // The engine answers nobody while it computes, so these are the ones that found the queue full.
    for _ in 0..1100 - 1024 {
        assert_eq!(answered.recv().await.unwrap(), Err(SubmitError::CommandQueueFull));
    }
    gate.open();
    for _ in 0..1024 {
        let answer = answered.recv().await.unwrap();
        assert!(matches!(answer, Ok(()) | Err(SubmitError::Scheduler(_))), "{answer:?}");
    }
}
