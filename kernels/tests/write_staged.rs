//! Staged writes arrive whole, and by one upload.

use quire_kernels::cuda::CudaBackend;
use quire_kernels::cuda::recorder::{Call, Recorder};
use quire_kernels::ops::rope_kv_write::AttentionShape;
use quire_kernels::testing::{Rng, cpu_backends};
use quire_kernels::{Backend, DType, KernelError, StepLimits, device_tests};

fn limits(num_tokens: usize) -> StepLimits {
    let shape = AttentionShape { num_heads: 2, num_kv_heads: 1, head_dim: 8 };
    StepLimits { num_tokens, num_seqs: 4, context_len: 64, shape }
}

device_tests! {
    all_that_is_staged_arrives: |open| open(None).into_iter().for_each(|mut backend| {
        // Before anything is reserved, and with little room and much.
        all_that_is_staged_arrives(&mut backend);
        for num_tokens in [1, 700] {
            backend.reserve(&limits(num_tokens)).expect("room");
            all_that_is_staged_arrives(&mut backend);
        }
    });
}

#[test]
fn all_that_is_staged_arrives_on_the_cpu() {
    cpu_backends(&[1]).iter_mut().for_each(all_that_is_staged_arrives);
}

fn all_that_is_staged_arrives<B: Backend>(backend: &mut B) {
    let mut rng = Rng::new(1);
    let lens = [1, 3, 300, 2000];
    let mut expected = lens.map(|len| vec![0; len]);
    let mut buffers = lens.map(|len| backend.alloc(DType::U32, len).expect("room"));
    for round in 0..5_u32 {
        for which in 0..4 {
            let mut start = rng.below(2);
            while start < lens[which] {
                let len = (rng.below(lens[which]) / 4 + rng.below(3)).min(lens[which] - start);
                let words: Vec<u32> = (0..len).map(|_| rng.next_u64() as u32).collect();
                backend.stage_u32(&mut buffers[which], start, &words).expect("it fits");
                expected[which][start..start + len].copy_from_slice(&words);
                start += len + rng.below(3) + 1;
            }
        }
        // What is written as usual comes behind what was staged before.
        backend.write_staged().expect("a launch");
        backend.write_u32(&mut buffers[1], 1, &[round]).expect("it fits");
        expected[1][1] = round;
        for (buffer, expected) in buffers.iter().zip(&expected) {
            let mut found = vec![7; expected.len()];
            backend.read_u32(buffer, 0, &mut found).expect("it fits");
            assert_eq!(found, *expected);
        }
    }
    let refused = backend.stage_u32(&mut buffers[1], 2, &[1, 2]);
    assert!(
        matches!(refused, Err(KernelError::Shape { argument: "buffer", expected: 4, found: 3, .. })),
        "{refused:?}"
    );
    let mut floats = backend.alloc(DType::F32, 3).expect("room");
    assert!(matches!(backend.stage_u32(&mut floats, 0, &[1]), Err(KernelError::Type { .. })));
}

#[test]
fn many_pieces_are_one_upload_and_one_launch() {
    let card = Recorder::new(1 << 20);
    let calls = card.calls();
    let mut backend = CudaBackend::new(card).expect("memory");
    backend.reserve(&limits(100)).expect("room");
    let mut buffer = backend.alloc(DType::U32, 100).expect("room");
    calls.take();
    for start in 0..20 {
        backend.stage_u32(&mut buffer, 3 * start, &[start as u32]).expect("it fits");
    }
    assert!(calls.take().is_empty());
    backend.write_staged().expect("a launch");
    backend.write_staged().expect("nothing to do");
    let calls = calls.take();
    assert!(
        matches!(&calls[..], [Call::Upload { bytes: 400, .. }, Call::Launch { grid: [20, 1, 1], .. }]),
        "{calls:?}"
    );
    let mut found = vec![7; 60];
    backend.read_u32(&buffer, 0, &mut found).expect("it fits");
    assert!(found.iter().enumerate().all(|(index, &word)| word == if index % 3 == 0 { index as u32 / 3 } else { 0 }));
}
