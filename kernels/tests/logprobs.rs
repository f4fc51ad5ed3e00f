//! Log probabilities on every instruction set, in the emulator and on a card, against their meaning.

use quire_kernels::ops::logprobs::{Logprobs, LogprobsAt, reference};
use quire_kernels::ops::sample::NON_FINITE;
use quire_kernels::testing::{Rng, Tolerance, assert_close, cpu_backends};
use quire_kernels::{Backend, DType, KernelError, device_tests};

/// The sum of up to 152k exponentials is off by 4e-7 of itself, so its logarithm by that; the result is rounded once.
const TOLERANCE: Tolerance = Tolerance { abs: 5e-7, rel: 1e-7 };

/// Rows of logits and the tokens asked about.
fn logprobs<B: Backend>(
    backend: &mut B,
    logits: &[f32],
    vocab_size: usize,
    rows: &[(u32, u32)],
    num_top: usize,
) -> (Vec<f32>, Vec<u32>) {
    // One entry before those of the batch, and its room in the results.
    let first = 1 + num_top;
    let len = (1 + rows.len()) * (1 + num_top);
    let mut at = vec![u32::MAX; 2];
    for (index, &(logits_row, _)) in rows.iter().enumerate() {
        at.extend(LogprobsAt { logits_row, token_index: (rows.len() - 1 - index) as u32 }.words());
    }
    let tokens: Vec<u32> = rows.iter().rev().map(|&(_, token_id)| token_id).collect();
    let mut at_buffer = backend.alloc(DType::U32, at.len()).expect("room");
    backend.write_u32(&mut at_buffer, 0, &at).expect("it fits");
    let mut token_buffer = backend.alloc(DType::U32, tokens.len()).expect("room");
    backend.write_u32(&mut token_buffer, 0, &tokens).expect("it fits");
    let mut buffer = backend.alloc(DType::F32, logits.len()).expect("room");
    backend.write_f32(&mut buffer, 0, logits).expect("it fits");
    let mut out_values = backend.alloc(DType::F32, len).expect("room");
    let mut out_ids = backend.alloc(DType::U32, len).expect("room");
    let args = Logprobs {
        logits: &buffer,
        vocab_size,
        rows: &at_buffer,
        rows_offset: 1,
        num_rows: rows.len(),
        tokens: &token_buffer,
        num_top,
        out_values: &mut out_values,
        out_ids: &mut out_ids,
        out_offset: 1,
    };
    backend.logprobs(args).expect("shapes fit");
    let (mut values, mut ids) = (vec![0.0; len], vec![0; len]);
    backend.read_f32(&out_values, 0, &mut values).expect("it fits");
    backend.read_u32(&out_ids, 0, &mut ids).expect("it fits");
    assert!(values[..first].iter().all(|&x| x == 0.0) && ids[..first].iter().all(|&id| id == 0), "nobody's room");
    (values.split_off(first), ids.split_off(first))
}

#[test]
fn the_cpu_is_close_to_the_reference_with_exact_ranks() {
    check_vocabularies(cpu_backends(&[1, 2]), &[1, 5, 16, 17, 33, 1000, 151_936]);
}

device_tests! {
    close_to_the_reference_with_exact_ranks: |open| {
        check_vocabularies(open(None).into_iter().collect(), &[1, 5, 33, 1100, 4097]);
    };
    a_row_has_the_same_bits_in_any_batch: |open| open(None).into_iter().for_each(|backend| {
        same_bits_in_any_batch(&mut [backend]);
    });
    rows_that_are_not_finite_end_without_harm: |open| not_finite_rows_end(open(None).into_iter().collect());
    what_does_not_fit_is_named: |open| open(None).into_iter().for_each(name_what_does_not_fit);
}

/// All of a vocabulary in order is much work for an emulator.
const MAX_TOP: usize = 1000;

fn check_vocabularies<B: Backend>(mut backends: Vec<B>, vocab_sizes: &[usize]) {
    let mut rng = Rng::new(1);
    for &vocab_size in vocab_sizes {
        let mut logits: Vec<f32> = rng.normals(2 * vocab_size).iter().map(|x| x * 5.0).collect();
        // The second row has many equals, and tokens that cannot be.
        for x in &mut logits[vocab_size..] {
            *x = if *x > 8.0 { f32::NEG_INFINITY } else { (*x / 4.0).round() + 0.0 };
        }
        if vocab_size < 3 {
            logits[vocab_size..].fill(1.0);
        }
        for num_top in [0, 1, 5, 20, vocab_size].into_iter().filter(|&num_top| num_top <= vocab_size) {
            if backends.iter().any(|backend| backend.info().kind == "cuda") && num_top > MAX_TOP {
                continue;
            }
            let mut rows = Vec::new();
            for logits_row in [1, 0] {
                for _ in 0..3 {
                    rows.push((logits_row, rng.below(vocab_size) as u32));
                }
            }
            let (mut expected_values, mut expected_ids) = (Vec::new(), Vec::new());
            for &(logits_row, token_id) in &rows {
                let logits = &logits[logits_row as usize * vocab_size..][..vocab_size];
                let (value, rank, top) = reference::logprobs(logits, token_id, num_top);
                expected_values.push(value);
                expected_ids.push(rank);
                expected_values.extend(top.iter().map(|&(_, value)| value));
                expected_ids.extend(top.iter().map(|&(id, _)| id));
            }
            for backend in &mut backends {
                let (values, ids) = logprobs(backend, &logits, vocab_size, &rows, num_top);
                assert_close(&values, &expected_values, TOLERANCE);
                assert_eq!(ids, expected_ids, "{} {vocab_size} {num_top}", backend.info().isa);
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_batch_on_the_cpu() {
    cpu_backends(&[1, 2, 3]).chunks_mut(3).for_each(same_bits_in_any_batch);
}

/// `backends` compute alike.
fn same_bits_in_any_batch<B: Backend>(backends: &mut [B]) {
    let mut rng = Rng::new(2);
    let (vocab_size, num_rows) = (3001, 9);
    let logits = rng.outliers(num_rows * vocab_size);
    let rows: Vec<(u32, u32)> = (0..num_rows as u32).map(|row| (row, row)).collect();
    let mut alone = (Vec::new(), Vec::new());
    for (row, logits) in logits.chunks(vocab_size).enumerate() {
        let (values, ids) = logprobs(&mut backends[0], logits, vocab_size, &[(0, row as u32)], 7);
        alone.0.extend(values);
        alone.1.extend(ids);
    }
    for backend in backends {
        assert_eq!(logprobs(backend, &logits, vocab_size, &rows, 7), alone);
    }
}

#[test]
fn rows_that_are_not_finite_end_without_harm_on_the_cpu() {
    not_finite_rows_end(cpu_backends(&[1]));
}

fn not_finite_rows_end<B: Backend>(backends: Vec<B>) {
    for mut backend in backends {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for logits in [vec![bad; 40], [vec![1.0; 39], vec![bad]].concat()] {
                let (values, ids) = logprobs(&mut backend, &logits, 40, &[(0, NON_FINITE)], 40);
                assert!(values[0].is_nan() && ids[0] == 0, "no token was chosen there");
                let (_, of_token) = logprobs(&mut backend, &logits, 40, &[(0, 39)], 40);
                assert_eq!(of_token[1..], ids[1..]);
                let mut top = ids[1..].to_vec();
                top.sort_unstable();
                assert!(top.iter().copied().eq(0..40), "{ids:?}");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_named_by_the_cpu() {
    name_what_does_not_fit(cpu_backends(&[1]).remove(0));
}

fn name_what_does_not_fit<B: Backend>(mut backend: B) {
    let logits = backend.alloc(DType::F32, 2 * 10).expect("room");
    let mut out_values = backend.alloc(DType::F32, 4).expect("room");
    let mut out_ids = backend.alloc(DType::U32, 4).expect("room");
    let mut rows = backend.alloc(DType::U32, 2).expect("room");
    let mut tokens = backend.alloc(DType::U32, 2).expect("room");
    backend.write_u32(&mut tokens, 0, &[9, 10]).expect("it fits");
    let mut refused = |logits_row, token_index, num_top, rows_offset| {
        backend.write_u32(&mut rows, 0, &LogprobsAt { logits_row, token_index }.words()).expect("it fits");
        let args = Logprobs {
            logits: &logits,
            vocab_size: 10,
            rows: &rows,
            rows_offset,
            num_rows: 1,
            tokens: &tokens,
            num_top,
            out_values: &mut out_values,
            out_ids: &mut out_ids,
            out_offset: 0,
        };
        // A device tells of what lies in its memory when it is read.
        let result = backend.logprobs(args);
        result.and_then(|()| backend.read_u32(&out_ids, 0, &mut [0; 4])).expect_err("refused")
    };
    let op = "logprobs";
    assert_eq!(refused(2, 0, 1, 0), KernelError::Range { op, argument: "logits_row", value: 2, limit: 2 });
    assert_eq!(refused(1, 1, 1, 0), KernelError::Range { op, argument: "tokens", value: 10, limit: 10 });
    assert_eq!(refused(1, 2, 1, 0), KernelError::Range { op, argument: "token_index", value: 2, limit: 2 });
    assert_eq!(refused(1, 0, 1, 1), KernelError::Shape { op, argument: "rows", expected: 4, found: 2 });
    assert_eq!(refused(1, 0, 11, 0), KernelError::Range { op, argument: "num_top", value: 11, limit: 11 });
    assert_eq!(refused(1, 0, 4, 0), KernelError::Shape { op, argument: "out_values", expected: 5, found: 4 });
}
