//! Ten times more than there is room for: what is refused is told when to come back, what was taken finishes.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use quire_engine::scheduler::{FinishReason, SubmitError as Refusal, TenantId};
use quire_engine::testing::{FakeExecutor, Gate, Recorder, fake_model, read_all, start_with, submission};
use quire_engine::{EngineHandle, ModelInfo, SchedulerSettings, Submission, SubmitError};

const PROMPT_LEN: usize = 32;
const MAX_TOKENS: u32 = 8;
const MAX_WAITING: usize = 20;

fn start(gate: &Gate, max_waiting_tokens: u64) -> EngineHandle {
    let model = ModelInfo { num_blocks: 32, max_model_len: 256, ..fake_model(1000) };
    let settings = SchedulerSettings {
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        max_waiting_tokens,
        ..SchedulerSettings::default()
    };
    start_with(FakeExecutor::new(1000).gated(gate), model, &settings, 0, Box::new(Recorder::default())).unwrap()
}

fn poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    match Pin::new(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

fn prompt(first: u32) -> Vec<u32> {
    (0..PROMPT_LEN as u32).map(|i| (first * 31 + i * 7) % 1000).collect()
}

#[tokio::test]
async fn refused_with_a_time_to_come_back() {
    let gate = Gate::closed();
    let handle = start(&gate, (MAX_WAITING * PROMPT_LEN) as u64);
    // Holds the first step, so that all others come while it runs.
    let mut first = handle.submit(submission(&prompt(0), MAX_TOKENS)).await.unwrap();
    gate.wait_until_held();
    let (mut num_finished, mut num_refused) = (0, 0);
    let mut refuse = |error: SubmitError| match error {
        SubmitError::Scheduler(
            Refusal::QueueFull { retry_after_micros, .. } | Refusal::WaitTooLong { retry_after_micros, .. },
        )
        | SubmitError::CommandQueueFull { retry_after_micros } => {
            assert!(retry_after_micros > 0);
            num_refused += 1;
        }
        other => panic!("{other:?}"),
    };
    let mut waiting = Vec::new();
    for number in 1..=10 * MAX_WAITING as u32 {
        let mut submit = Box::pin(handle.submit(submission(&prompt(number), MAX_TOKENS)));
        match poll_once(&mut submit) {
            None => waiting.push(submit),
            Some(Err(error)) => refuse(error),
            Some(Ok(_)) => panic!("nobody is taken in during a step"),
        }
    }
    gate.open();
    for submit in waiting {
        match submit.await {
            Ok(mut stream) => {
                let outcome = read_all(&mut stream).await;
                assert_eq!(outcome[0].tokens.len(), MAX_TOKENS as usize);
                assert_eq!(outcome[0].finish, Some(FinishReason::Length));
                num_finished += 1;
            }
            Err(error) => refuse(error),
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

/// Submits while a step hangs: how many are taken into the queue, and how many refused.
async fn flood(handle: &EngineHandle, gate: &Gate, prompts: impl Iterator<Item = Submission>) -> (usize, usize) {
    let _first = handle.submit(submission(&prompt(0), MAX_TOKENS)).await.unwrap();
    gate.wait_until_held();
    let mut waiting = Vec::new();
    let mut num_refused = 0;
    for submission in prompts {
        let mut submit = Box::pin(handle.submit(submission));
        // The engine answers nobody while it computes: whoever has an answer found the queue full.
        match poll_once(&mut submit) {
            None => waiting.push(submit),
            Some(Err(SubmitError::CommandQueueFull { retry_after_micros })) => {
                assert!(retry_after_micros > 0);
                num_refused += 1;
            }
            Some(other) => panic!("{:?}", other.map(drop)),
        }
    }
    let num_waiting = waiting.len();
    gate.open();
    for answer in waiting {
        let answer = answer.await.map(drop);
        assert!(matches!(answer, Ok(()) | Err(SubmitError::Scheduler(_))), "{answer:?}");
    }
    (num_waiting, num_refused)
}

/// A step that hangs does not let an unbounded number of callers pile up behind it.
#[tokio::test]
async fn the_command_queue_is_bounded_in_number() {
    let gate = Gate::closed();
    let handle = start(&gate, 1 << 40);
    let counts = flood(&handle, &gate, (0..1100).map(|i| submission(&[i % 1000], MAX_TOKENS))).await;
    assert_eq!(counts, (1024, 1100 - 1024));
}

#[tokio::test]
async fn the_command_queue_is_bounded_in_tokens() {
    let gate = Gate::closed();
    let handle = start(&gate, (MAX_WAITING * PROMPT_LEN) as u64);
    let counts = flood(&handle, &gate, (0..100).map(|i| submission(&prompt(i), MAX_TOKENS))).await;
    assert_eq!(counts, (MAX_WAITING, 100 - MAX_WAITING));
}

/// While one tenant fills it, another is still taken up to its share.
#[tokio::test]
async fn the_command_queue_is_shared_by_tenants() {
    let gate = Gate::closed();
    let handle = start(&gate, (MAX_WAITING * PROMPT_LEN) as u64);
    let of = |tenant, i| Submission { tenant: TenantId(tenant), ..submission(&prompt(i), MAX_TOKENS) };
    let submissions = (0..100).map(|i| of(1, i)).chain((0..100).map(|i| of(2, i)));
    let counts = flood(&handle, &gate, submissions).await;
    assert_eq!(counts, (MAX_WAITING + MAX_WAITING / 2, 200 - MAX_WAITING - MAX_WAITING / 2));
}
