//! A cancelled request's blocks are free at the next step boundary, in whatever state the request was.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use quire_engine::scheduler::FinishReason;
use quire_engine::testing::{FakeExecutor, Gate, Recorder, fake_model, read_all, start_with, submission};
use quire_engine::{EngineHandle, ModelInfo, SchedulerSettings, SubmitError, TokenEvent, TokenStream};
use quire_scheduler::testing::Rng;

const NUM_CANCELS: usize = 2_000;
const NUM_BLOCKS: u32 = 13;

type PendingSubmit<'a> = Pin<Box<dyn Future<Output = Result<TokenStream, SubmitError>> + 'a>>;

/// Small enough for prompts to take several steps, and for sequences to be preempted.
fn start(gate: &Gate, pipeline_depth: u32, recorder: &Recorder) -> EngineHandle {
    let model = ModelInfo { num_blocks: NUM_BLOCKS, max_model_len: 200, ..fake_model(1000) };
    let settings = SchedulerSettings {
        max_num_seqs: 6,
        max_num_batched_tokens: 20,
        prefix_cache: false,
        ..SchedulerSettings::default()
    };
    let executor = FakeExecutor::new(1000).gated(gate);
    start_with(executor, model, &settings, pipeline_depth, Box::new(recorder.clone())).unwrap()
}

fn poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    match Pin::new(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

fn num_used(handle: &EngineHandle) -> u32 {
    handle.stats().kv_groups()[0].num_used
}

/// Random requests, some steps, and then all of them cancelled in some way. Gives how many there were.
async fn play_round(handle: &EngineHandle, gate: &Gate, rng: &mut Rng, most_steps: u64) -> usize {
    let request = |rng: &mut Rng| {
        let prompt: Vec<u32> = (0..1 + rng.below(50)).map(|_| rng.below(1000)).collect();
        // Longer than any round.
        let mut request = submission(&prompt, 100);
        request.priority = rng.below(3) as i32;
        request.sampling.num_choices = if rng.below(5) == 0 { 3 } else { 1 };
        request
    };
    // The engine is idle: this one is answered at once, and the step that follows waits at the gate.
    let mut streams = vec![handle.submit(request(rng)).await.unwrap()];
    gate.wait_until_held();
    // These are answered at the end of that step, or never.
    let mut pending: Vec<PendingSubmit<'_>> = Vec::new();
    for _ in 0..rng.below(5) {
        let mut submit: PendingSubmit<'_> = Box::pin(handle.submit(request(rng)));
        assert!(poll_once(&mut submit).is_none());
        pending.push(submit);
    }
    let num_steps = u64::from(rng.below(50));
    gate.let_through(num_steps);
    gate.wait_until_held();
    for mut submit in pending {
        match poll_once(&mut submit) {
            Some(answer) => streams.push(answer.unwrap()),
            // Cancelled in the inbox.
            None => drop(submit),
        }
    }
    let num_cancelled = streams.len();
    let num_passed = gate.num_passed();
    let mut aborted = Vec::new();
    for stream in streams {
        match rng.below(3) {
            0 => drop(stream),
            1 => {
                handle.abort(stream.id());
                aborted.push(stream);
            }
            _ => {
                handle.abort(stream.id());
                handle.abort(stream.id());
                drop(stream);
            }
        }
    }
    gate.let_through(most_steps);
    for stream in &mut aborted {
        for choice in read_all(stream).await {
            assert_eq!(choice.finish, Some(FinishReason::Cancelled));
        }
    }
    // Streams that were dropped have nobody to tell: the counters of the last step boundary say it.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while handle.stats().num_running + handle.stats().num_waiting + num_used(handle) > 0 {
        assert!(std::time::Instant::now() < deadline, "{:?}", handle.stats());
        std::thread::yield_now();
    }
    assert!(gate.num_passed() <= num_passed + most_steps);
    gate.close();
    num_cancelled
}

fn play(pipeline_depth: u32, most_steps: u64, seed: u64) {
    let (gate, recorder) = (Gate::closed(), Recorder::default());
    let handle = start(&gate, pipeline_depth, &recorder);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut rng = Rng::new(seed);
    let mut num_cancelled = 0;
    while num_cancelled < NUM_CANCELS {
        num_cancelled += runtime.block_on(play_round(&handle, &gate, &mut rng, most_steps));
        let blocks = handle.stats().kv_groups()[0];
        assert_eq!((blocks.num_free, blocks.num_total), (NUM_BLOCKS, NUM_BLOCKS));
    }
    assert!(handle.stats().num_preemptions > 50, "{:?}", handle.stats());
    assert!(recorder.cancellations().len() >= NUM_CANCELS);
    assert_eq!(handle.failure(), None);
}

#[test]
fn blocks_are_free_within_a_step() {
    play(0, 1, 1);
}

#[test]
fn blocks_are_free_within_the_steps_in_flight() {
    play(1, 2, 2);
}

/// A cancellation that comes too late, or twice, or for nobody, changes nothing.
#[tokio::test]
async fn late_cancellations_are_ignored() {
    let gate = Gate::default();
    gate.open();
    let handle = start(&gate, 0, &Recorder::default());
    let mut stream = handle.submit(submission(&[1, 2, 3], 4)).await.unwrap();
    let outcome = read_all(&mut stream).await;
    assert_eq!(outcome[0].finish, Some(FinishReason::Length));
    handle.abort(stream.id());
    handle.abort(quire_engine::scheduler::RequestId(u64::MAX));
    drop(stream);
    let mut next = handle.submit(submission(&[1, 2, 3], 4)).await.unwrap();
    assert_eq!(read_all(&mut next).await, outcome);
    assert_eq!(next.next().await, None::<TokenEvent>);
}
