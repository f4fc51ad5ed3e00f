//! Every instruction set of this machine.

use quire_engine::testing::{Recorder, prompt_logits, read_all, start_on_cpu, submission};
use quire_engine::{DTypeChoice, SchedulerSettings};
use quire_kernels::cpu::Isa;

use crate::cases::{cases, config, relative_error};
use crate::{BF16_TOLERANCE, F32_TOLERANCE};

#[test]
fn f32_prefill_is_that_of_transformers() {
    for isa in Isa::available() {
        let mut worst: f64 = 0.0;
        for case in cases() {
            let found = prompt_logits(&case.source, isa, &config(DTypeChoice::F32), &case.tokens(), 256).unwrap();
            for (i, (found, prompt)) in found.iter().zip(&case.prompts).enumerate() {
                let error = relative_error(found, &prompt.logits);
                assert!(error < F32_TOLERANCE, "{} prompt {i} on {isa}: {error:.2e}", case.name);
                worst = worst.max(error);
            }
        }
        println!("{isa}: f32 deviates by {worst:.2e} at most");
    }
}

#[test]
fn bf16_prefill_is_as_near_as_that_of_transformers() {
    for isa in Isa::available() {
        let (mut worst, mut worst_reference): (f64, f64) = (0.0, 0.0);
        for case in cases() {
            let found = prompt_logits(&case.source, isa, &config(DTypeChoice::Bf16), &case.tokens(), 256).unwrap();
            for (i, (found, prompt)) in found.iter().zip(&case.prompts).enumerate() {
                let error = relative_error(found, &prompt.logits);
                let reference = relative_error(&prompt.logits_bf16, &prompt.logits);
                assert!(error < BF16_TOLERANCE, "{} prompt {i} on {isa}: {error:.2e}", case.name);
                worst = worst.max(error);
                worst_reference = worst_reference.max(reference);
            }
        }
        println!("{isa}: bf16 deviates by {worst:.2e} at most, transformers' own by {worst_reference:.2e}");
        assert!(worst < 1.5 * worst_reference, "{isa}");
    }
}

#[test]
fn a_chunked_prefill_has_the_same_bits() {
    for isa in Isa::available() {
        for case in cases() {
            for dtype in [DTypeChoice::F32, DTypeChoice::Bf16] {
                let logits =
                    |chunk_len| prompt_logits(&case.source, isa, &config(dtype), &case.tokens(), chunk_len).unwrap();
                let whole = logits(256);
                for chunk_len in [1, 7, 16, 33] {
                    let same = whole
                        .iter()
                        .flatten()
                        .zip(logits(chunk_len).iter().flatten().copied().collect::<Vec<_>>())
                        .all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{} on {isa}, {dtype:?}, chunks of {chunk_len}", case.name);
                }
            }
        }
    }
}

#[tokio::test]
async fn greedy_tokens_are_those_of_transformers() {
    for isa in Isa::available() {
        for case in cases() {
            let settings =
                SchedulerSettings { max_num_seqs: 4, max_num_batched_tokens: 48, ..SchedulerSettings::default() };
            let engine = config(DTypeChoice::F32);
            let handle = start_on_cpu(&case.source, isa, &engine, &settings, Box::new(Recorder::default())).unwrap();
            let mut streams = Vec::new();
            for prompt in &case.prompts {
                let request = submission(&prompt.tokens, prompt.greedy.len() as u32);
                streams.push(handle.submit(request).await.unwrap());
            }
            for (i, (stream, prompt)) in streams.iter_mut().zip(&case.prompts).enumerate() {
                let outcome = read_all(stream).await;
                assert_eq!(outcome[0].tokens, prompt.greedy, "{} prompt {i} on {isa}", case.name);
            }
        }
    }
}
