//! What the host decides for a card, against a device that computes nothing and remembers what it was asked to do: recordings of
//! decode steps, memory, uploads, and what comes of failures.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use quire_engine::scheduler::FinishReason;
use quire_engine::testing::{self, TinyModel, read_all, start_on, submission, tiny_model};
use quire_engine::{
    DTypeChoice, EngineConfig, EngineError, EngineHandle, EngineHealth, LoadFormat, QuantizeChoice, SchedulerSettings,
    TokenEvent,
};
use quire_kernels::KernelError;
use quire_kernels::cuda::recorder::{Call, Calls, Memory, Recorder};
use quire_kernels::cuda::{Arg, CudaBackend, DevicePtr, KernelId, Launch};
use quire_kernels::ops::sample::{NON_FINITE, SampleAt};

const LONG: Duration = Duration::from_secs(3600);
const CARD_BYTES: u64 = 1 << 30;
const SAMPLE: KernelId = KernelId { module: "sample", function: "sample" };

fn settings() -> SchedulerSettings {
    SchedulerSettings {
        max_num_seqs: 8,
        max_num_batched_tokens: 32,
        max_model_len: 256,
        ..SchedulerSettings::default()
    }
}

/// What the sampler does: `choose(row, tokens held)` is the token.
fn sample(
    launch: &Launch<'_>,
    memory: &mut Memory,
    choose: impl Fn(u32, u32) -> Result<u32, KernelError>,
) -> Result<(), KernelError> {
    let ptr = |index: usize| match launch.args[index] {
        Arg::Ptr(ptr) => ptr,
        arg => panic!("{arg:?}"),
    };
    let word = |index: usize| match launch.args[index] {
        Arg::U32(word) => word,
        arg => panic!("{arg:?}"),
    };
    let (max_model_len, token_table, out) = (word(7), ptr(10), ptr(11));
    let rows = memory.words(ptr(1), 2 * launch.grid[0] as usize);
    for (index, words) in rows.as_chunks::<2>().0.iter().enumerate() {
        let SampleAt { row, num_tokens } = SampleAt::of_words(*words);
        if row == SampleAt::NOBODY.row {
            continue;
        }
        let token = choose(row, num_tokens)?;
        memory.set_words(out.offset(4 * index), &[token]);
        let place: DevicePtr = token_table.offset(4 * (row * max_model_len + num_tokens) as usize);
        memory.set_words(place, &[if token == NON_FINITE { 0 } else { token }]);
    }
    Ok(())
}

/// An engine over a device whose sampler chooses so; its calls, and what its observer was told.
fn start_card(
    choose: impl Fn(u32, u32) -> Result<u32, KernelError> + Send + 'static,
) -> (EngineHandle, Calls, testing::Recorder) {
    let engine = EngineConfig { load_format: LoadFormat::Dummy, ..EngineConfig::default() };
    start_card_with(&engine, &settings(), choose)
}

fn start_card_with(
    engine: &EngineConfig,
    settings: &SchedulerSettings,
    choose: impl Fn(u32, u32) -> Result<u32, KernelError> + Send + 'static,
) -> (EngineHandle, Calls, testing::Recorder) {
    let mut card = Recorder::new(CARD_BYTES);
    let calls = card.calls();
    card.set_effect(SAMPLE, move |launch, memory| sample(launch, memory, &choose));
    let observer = testing::Recorder::default();
    let backend = CudaBackend::new(card).unwrap();
    let source = tiny_model(1, TinyModel::Llama);
    let handle = start_on(backend, &source, engine, settings, Box::new(observer.clone())).unwrap();
    (handle, calls, observer)
}

/// A token that depends on its place alone.
fn plain(_row: u32, num_tokens: u32) -> Result<u32, KernelError> {
    Ok(10 + num_tokens % 200)
}

fn count(calls: &[Call], is_counted: impl Fn(&Call) -> bool) -> usize {
    calls.iter().filter(|call| is_counted(call)).count()
}

fn is_launch_of_sample(call: &Call) -> bool {
    matches!(call, Call::Launch { kernel, .. } if *kernel == SAMPLE)
}

async fn generate(handle: &EngineHandle, prompt: &[u32], max_tokens: u32) -> Vec<u32> {
    let mut stream = handle.submit(submission(prompt, max_tokens)).await.unwrap();
    read_all(&mut stream).await.remove(0).tokens
}

#[tokio::test]
async fn decode_steps_are_recorded_when_they_come_again_and_then_replayed() {
    let (handle, calls, _) = start_card(plain);
    calls.take();
    let tokens = generate(&handle, &[5, 6, 7], 10).await;
    assert_eq!(tokens, (3..13).map(|position| 10 + position).collect::<Vec<u32>>());
    let first = calls.take();
    assert_eq!(count(&first, is_launch_of_sample), 2, "the prompt's step, and the first that decodes");
    assert_eq!(count(&first, |call| matches!(call, Call::Capture { .. })), 1);
    assert_eq!(count(&first, |call| matches!(call, Call::Replay(_))), 8);

    // Known sizes are replayed at once.
    assert_eq!(generate(&handle, &[9; 4], 10).await.len(), 10);
    let second = calls.take();
    assert_eq!(count(&second, is_launch_of_sample), 1, "the prompt's step");
    assert_eq!(count(&second, |call| matches!(call, Call::Capture { .. })), 0);
    assert_eq!(count(&second, |call| matches!(call, Call::Replay(_))), 9);
}

#[tokio::test]
async fn a_step_takes_no_memory_and_uploads_what_is_new() {
    let (handle, calls, _) = start_card(plain);
    generate(&handle, &[5, 6, 7], 10).await;
    calls.take();
    generate(&handle, &[1; 20], 30).await;
    let calls = calls.take();
    assert_eq!(count(&calls, |call| matches!(call, Call::Alloc { .. })), 0);
    // Between two replays lies the one upload of a step: a few words for one sequence and where they go, no whole tables.
    let replays: Vec<usize> = (0..calls.len()).filter(|&index| matches!(calls[index], Call::Replay(_))).collect();
    for pair in replays.windows(2) {
        let uploads: Vec<usize> = calls[pair[0]..pair[1]]
            .iter()
            .filter_map(|call| match call {
                Call::Upload { bytes, .. } => Some(*bytes),
                _ => None,
            })
            .collect();
        assert!(uploads.len() == 1 && uploads[0] <= 240, "{uploads:?} bytes for one token");
        let num_waits =
            count(&calls[pair[0]..pair[1]], |call| matches!(call, Call::Download { .. } | Call::Synchronize));
        assert_eq!(num_waits, 0, "nothing waits for all that is queued");
    }
    // The next step is launched before the tokens of the one before are waited for.
    let order: Vec<bool> = calls
        .iter()
        .filter_map(|call| match call {
            Call::Replay(_) => Some(true),
            Call::FinishDownload => Some(false),
            _ => None,
        })
        .collect();
    let end = order.len() - 2;
    assert!(order[4..end].chunks_exact(2).all(|pair| pair[0] != pair[1]), "{order:?}");
}

#[tokio::test]
async fn batches_are_filled_up_to_sizes_and_everyone_gets_their_own_tokens() {
    let (handle, calls, _) = start_card(|row, num_tokens| Ok(row * 20 + num_tokens % 20));
    let mut streams = Vec::new();
    for index in 0..3 {
        streams.push(handle.submit(submission(&vec![7; 2 + index], 12)).await.unwrap());
    }
    for (index, stream) in streams.iter_mut().enumerate() {
        let tokens = read_all(stream).await.remove(0).tokens;
        let row = tokens[0] / 20;
        let first = 2 + index as u32;
        assert_eq!(tokens, (first..first + 12).map(|position| row * 20 + position % 20).collect::<Vec<u32>>());
    }
    for call in calls.take() {
        if let Call::Launch { kernel: SAMPLE, grid, .. } = call {
            assert!([1, 2, 3, 4].contains(&grid[0]), "{grid:?}");
        }
    }
}

#[tokio::test]
async fn a_row_without_a_number_ends_its_request_alone() {
    let (handle, _, _) =
        start_card(|_, num_tokens| if num_tokens == 7 { Ok(NON_FINITE) } else { plain(0, num_tokens) });
    // The short prompt's sequence meets it with its fifth token, the long one's not at all.
    let mut short = handle.submit(submission(&[1, 2, 3], 20)).await.unwrap();
    let mut long = handle.submit(submission(&[1; 12], 20)).await.unwrap();
    let short = read_all(&mut short).await.remove(0);
    assert_eq!((short.tokens.len(), short.finish), (4, Some(FinishReason::NonFinite)));
    let long = read_all(&mut long).await.remove(0);
    assert_eq!((long.tokens.len(), long.finish), (20, Some(FinishReason::Length)));
    assert_ne!(handle.health(LONG), EngineHealth::Stopped);
}

#[tokio::test]
async fn a_card_that_fails_ends_its_requests_and_the_engine_with_the_reason() {
    let is_broken = Arc::new(AtomicBool::new(false));
    let broken = Arc::clone(&is_broken);
    let (handle, _, observer) = start_card(move |row, num_tokens| match broken.load(Ordering::Relaxed) {
        true => Err(KernelError::Device { device: "cuda", cause: "an illegal memory access".to_owned() }),
        false => plain(row, num_tokens),
    });
    generate(&handle, &[5, 6, 7], 4).await;
    is_broken.store(true, Ordering::Relaxed);
    let mut stream = handle.submit(submission(&[5, 6, 7], 4)).await.unwrap();
    let mut last = None;
    while let Some(event) = stream.next().await {
        last = Some(event);
    }
    assert!(matches!(last, Some(TokenEvent::Failed)), "{last:?}");
    assert_eq!(handle.health(LONG), EngineHealth::Stopped);
    assert_eq!(observer.failure().as_deref(), Some("cuda: an illegal memory access"));
    assert!(handle.submit(submission(&[5], 1)).await.is_err());
}

#[test]
fn all_memory_that_is_left_becomes_cache_and_the_plan_adds_up() {
    let (handle, _, _) = start_card(plain);
    let info = handle.model();
    let memory = info.device_memory.expect("a card has memory of its own");
    assert_eq!(memory.total, CARD_BYTES);
    let taken = info.weight_bytes + info.kv_cache_bytes + memory.working;
    // Fault records and frequencies were taken before the model was.
    assert!(CARD_BYTES - (taken + memory.left) < 16 << 10, "{taken} + {}", memory.left);
    assert!(memory.working > 1 << 20);
}

#[test]
fn a_model_that_does_not_fit_is_refused_with_the_numbers() {
    let source = tiny_model(1, TinyModel::Llama);
    let engine = EngineConfig { load_format: LoadFormat::Dummy, ..EngineConfig::default() };
    let observer = || Box::new(testing::Recorder::default());
    // Not even the weights; then weights, but no cache beside them.
    for (bytes, part) in [(100_000, "its weights take"), (1 << 20, "are left")] {
        let backend = CudaBackend::new(Recorder::new(bytes)).unwrap();
        let error = start_on(backend, &source, &engine, &settings(), observer()).err().unwrap();
        let EngineError::Config { field, why } = error else { panic!("{error}") };
        assert_eq!(field, "engine.memory_share");
        assert!(why.starts_with("the model does not fit the device: ") && why.contains(part), "{why}");
        assert!(why.contains("GiB") && !why.contains('\n'), "{why}");
    }
}

#[test]
fn a_share_of_memory_is_not_passed() {
    let source = tiny_model(1, TinyModel::Llama);
    let engine = EngineConfig { load_format: LoadFormat::Dummy, ..EngineConfig::default() };
    // More than the cache of all sequences would take is never taken, so the share is small here.
    let share = 16 << 20;
    let settings = SchedulerSettings { max_num_seqs: 64, max_num_batched_tokens: 64, ..settings() };
    let mut backend = CudaBackend::new(Recorder::new(4 << 30)).unwrap();
    backend.limit_memory(share).unwrap();
    let error = start_on(backend, &source, &engine, &settings, Box::new(testing::Recorder::default())).err();
    let Some(EngineError::Config { field, why }) = error else { panic!("a cache needs more than that leaves") };
    assert!(field == "engine.kv_cache_memory" || field == "engine.memory_share", "{field}: {why}");

    let share = 512 << 20;
    let mut backend = CudaBackend::new(Recorder::new(4 << 30)).unwrap();
    backend.limit_memory(share).unwrap();
    let handle = start_on(backend, &source, &engine, &settings, Box::new(testing::Recorder::default())).unwrap();
    let info = handle.model();
    let memory = info.device_memory.unwrap();
    assert!(info.weight_bytes + info.kv_cache_bytes + memory.working + memory.left <= share);
}

/// A layer is six launches, whatever its weights are stored as and however many rows there are: norms and rounding come with
/// products. The first has its norm for itself, since embeddings have no sums of squares.
#[tokio::test]
async fn a_layer_is_six_launches_in_every_format_and_at_every_number_of_rows() {
    use {DTypeChoice::Bf16, DTypeChoice::F32, QuantizeChoice as Q};
    // Products of one row, of 7, of 20, and of 60.
    let formats = [
        (F32, Q::None, ["linear_f32"; 4]),
        (Bf16, Q::None, ["linear_bf16_x8", "linear_bf16_x8", "linear_bf16_x32", "linear_bf16_t64"]),
        (Bf16, Q::Fp8, ["linear_fp8_t8", "linear_fp8_t8", "linear_fp8_t32", "linear_fp8_t64"]),
        // Of 64 and 96 input features, no whole number of 128.
        (
            Bf16,
            Q::Int8,
            ["linear_int8_short_t8", "linear_int8_short_t8", "linear_int8_short_t32", "linear_int8_short_t64"],
        ),
        (Bf16, Q::Int4, ["linear_int4_t8", "linear_int4_t8", "linear_int4_t32", "linear_int4_t64"]),
    ];
    let settings = SchedulerSettings { max_num_batched_tokens: 64, ..settings() };
    for (dtype, quantize, functions) in formats {
        let engine = EngineConfig { dtype, quantize, load_format: LoadFormat::Dummy, ..EngineConfig::default() };
        let (handle, calls, _) = start_card_with(&engine, &settings, plain);
        for (prompt_len, of_prompt) in [7, 20, 60].into_iter().zip(&functions[1..]) {
            calls.take();
            generate(&handle, &vec![5; prompt_len], 2).await;
            let calls = calls.take();
            let kernels = calls.iter().filter_map(|call| match call {
                Call::Launch { kernel, .. } => Some(*kernel),
                _ => None,
            });
            let kernels: Vec<KernelId> = kernels.collect();
            // The prompt's step, then one that decodes unless it is replayed.
            let steps: Vec<&[KernelId]> = kernels
                .split(|kernel| kernel.module == "embed")
                .skip(1)
                .map(|step| &step[..step.iter().position(|kernel| kernel.module == "gather_rows").unwrap()])
                .collect();
            assert!((1..=2).contains(&steps.len()));
            for (step, function) in steps.into_iter().zip([of_prompt, &functions[0]]) {
                let modules: Vec<&str> = step.iter().map(|kernel| kernel.module).collect();
                let layer = ["linear", "rope_kv_write", "paged_attention", "linear", "linear", "linear"];
                assert_eq!(modules, [&["rms_norm"][..], &layer, &layer].concat());
                let products = step.iter().filter(|kernel| kernel.module == "linear");
                for kernel in products {
                    assert_eq!(kernel.function.trim_end_matches("_norm"), *function, "{quantize:?}");
                }
            }
        }
    }
}
