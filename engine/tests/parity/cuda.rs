//! CUDA: a short look at every model in the emulator, all of them to their ends on a card.

use quire_engine::testing::{Recorder, prompt_logits_on, read_all, start_on, submission};
use quire_engine::{DTypeChoice, EngineConfig, KvDTypeChoice, SchedulerSettings};
use quire_kernels::cuda::{CudaBackend, Device};
use quire_kernels::device_tests;
use quire_kernels::testing::OpenDevice;

use crate::cases::{Case, cases, config, relative_error};
use crate::{BF16_TOLERANCE, F32_TOLERANCE};

/// How much of each model.
struct Extent {
    prompts: usize,
    /// Of a prompt.
    tokens: usize,
    /// That are generated.
    new_tokens: usize,
}

/// All of it on a card; what an emulator does in some seconds.
fn extent<D: Device>(backend: &CudaBackend<D>) -> Extent {
    match quire_kernels::Backend::info(backend).name == "emulator" {
        true => Extent { prompts: 2, tokens: 20, new_tokens: 4 },
        false => Extent { prompts: usize::MAX, tokens: usize::MAX, new_tokens: usize::MAX },
    }
}

/// Logits of the first tokens of each prompt against those of transformers.
fn check_logits<D: Device>(open: OpenDevice<D>, engine: &EngineConfig, tolerance: f64) {
    let mut worst: f64 = 0.0;
    for case in cases() {
        let Some(backend) = open(None) else { return };
        let extent = extent(&backend);
        let prompts = case.prompts.iter().take(extent.prompts);
        let (tokens, expected): (Vec<Vec<u32>>, Vec<&[f32]>) = prompts
            .map(|prompt| {
                let width = prompt.logits.len() / prompt.tokens.len();
                let len = extent.tokens.min(prompt.tokens.len());
                (prompt.tokens[..len].to_vec(), &prompt.logits[..len * width])
            })
            .unzip();
        let found = prompt_logits_on(backend, &case.source, engine, &tokens, 256).unwrap();
        for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
            let error = relative_error(found, expected);
            assert!(error < tolerance, "{} prompt {index}: {error:.2e}", case.name);
            worst = worst.max(error);
        }
    }
    println!("deviates by {worst:.2e} at most");
}

/// Greedy tokens of both prompts at the same time, which are transformers' own and so the CPU's.
async fn check_tokens<D: Device>(open: OpenDevice<D>) {
    for case in cases() {
        let Some(backend) = open(None) else { return };
        let extent = extent(&backend);
        check_tokens_of(backend, &case, &extent).await;
    }
}

async fn check_tokens_of<D: Device>(backend: CudaBackend<D>, case: &Case, extent: &Extent) {
    let settings = SchedulerSettings { max_num_seqs: 4, max_num_batched_tokens: 48, ..SchedulerSettings::default() };
    let engine = config(DTypeChoice::F32);
    let handle = start_on(backend, &case.source, &engine, &settings, Box::new(Recorder::default())).unwrap();
    let mut streams = Vec::new();
    for prompt in case.prompts.iter().take(extent.prompts) {
        let num_new = prompt.greedy.len().min(extent.new_tokens);
        streams.push((
            handle.submit(submission(&prompt.tokens, num_new as u32)).await.unwrap(),
            &prompt.greedy[..num_new],
        ));
    }
    for (index, (stream, expected)) in streams.iter_mut().enumerate() {
        assert_eq!(read_all(stream).await[0].tokens, *expected, "{} prompt {index}", case.name);
    }
}

fn wait_for<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

device_tests! {
    f32_prefill: |open| check_logits(open, &config(DTypeChoice::F32), F32_TOLERANCE);
    bf16_prefill: |open| check_logits(open, &config(DTypeChoice::Bf16), BF16_TOLERANCE);
    f32_prefill_over_a_cache_of_int8: |open| {
        let engine = EngineConfig { kv_dtype: KvDTypeChoice::Int8, ..config(DTypeChoice::F32) };
        check_logits(open, &engine, BF16_TOLERANCE);
    };
    greedy_tokens: |open| wait_for(check_tokens(open));
}
