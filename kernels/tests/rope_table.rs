//! Rotary angles on every instruction set, in the emulator and on a card, against their meaning, and against what models' own code gives.

use quire_kernels::ops::rope_table::{RopeFrequencies, RopeTable, reference};
use quire_kernels::testing::{POISON, Rng, Tolerance, assert_close, assert_same_bits, cpu_backends};
use quire_kernels::{Backend, DType, KernelError, device_tests};

/// One rounding of the result, one of the product with the magnitude.
const TOLERANCE: Tolerance = Tolerance { abs: 1e-12, rel: 1.3e-7 };

fn rope_table<B: Backend>(
    backend: &mut B,
    positions: &[u32],
    frequencies: &RopeFrequencies,
    magnitude: f32,
) -> Vec<f32> {
    let mut buffer = backend.alloc(DType::U32, positions.len()).expect("room");
    backend.write_u32(&mut buffer, 0, positions).expect("it fits");
    let mut result = vec![POISON; positions.len() * 2 * frequencies.len()];
    let mut out = backend.alloc(DType::F32, result.len()).expect("room");
    backend.write_f32(&mut out, 0, &result).expect("it fits");
    let num_tokens = positions.len();
    let args = RopeTable { positions: &buffer, num_tokens, frequencies, magnitude, out: &mut out };
    backend.rope_table(args).expect("shapes fit");
    backend.read_f32(&out, 0, &mut result).expect("it fits");
    result
}

fn llama_frequencies(head_dim: usize, base: f64) -> RopeFrequencies {
    let inverse = (0..head_dim / 2).map(|i| 1.0 / base.powf((2 * i) as f64 / head_dim as f64) as f32).collect();
    RopeFrequencies::Fixed { inverse }
}

fn close_to_the_reference<B: Backend>(mut backends: Vec<B>) {
    let mut rng = Rng::new(1);
    let mut positions: Vec<u32> = (0..200).map(|_| rng.below(200_000) as u32).collect();
    positions.extend([0, 1, 31, 32, 33, 1_000_000]);
    for (frequencies, magnitude) in [
        (llama_frequencies(8, 1e4), 1.0),
        (llama_frequencies(128, 5e5), 1.0),
        (llama_frequencies(128, 1e6), 1.2),
        (RopeFrequencies::DynamicNtk { base: 1e4, factor: 4.0, original_len: 32, head_dim: 16 }, 1.0),
    ] {
        let expected = reference::rope_table(&positions, &frequencies, magnitude);
        for backend in &mut backends {
            assert_close(&rope_table(backend, &positions, &frequencies, magnitude), &expected, TOLERANCE);
        }
    }
}

#[test]
fn close_to_the_reference_on_the_cpu() {
    close_to_the_reference(cpu_backends(&[1, 2]));
}

device_tests! {
    close_to_the_reference: |open| close_to_the_reference(open(None).into_iter().collect());
    the_bits_of_the_cpu: |open| open(None).into_iter().for_each(check_bits);
    dynamic_frequencies: |open| open(None).iter_mut().for_each(check_dynamic_frequencies);
    wrong_shapes_are_named: |open| open(None).into_iter().for_each(wrong_shapes_are_named_by);
}

/// Whatever their size, angles are reduced alike: those of many quarter turns by other means than small ones.
fn check_bits<B: Backend>(mut backend: B) {
    let mut rng = Rng::new(2);
    // A frequency of 1 and positions of all sizes, then sizes beyond any context.
    let positions: Vec<u32> = (0..32).flat_map(|bits| [0; 20].map(|_| rng.next_u64() as u32 >> bits)).collect();
    let inverse = vec![1.0, 0.37, 1e-3, 12345.678, 1e20, 1e29, f32::MAX, f32::INFINITY];
    let frequencies = RopeFrequencies::Fixed { inverse };
    let expected = rope_table(&mut cpu_backends(&[1])[0], &positions, &frequencies, 1.0);
    for (&actual, &expected) in rope_table(&mut backend, &positions, &frequencies, 1.0).iter().zip(&expected) {
        assert!(actual.to_bits() == expected.to_bits() || (actual.is_nan() && expected.is_nan()));
    }
}

#[test]
fn dynamic_frequencies_are_fixed_ones_within_the_original_length_and_depend_on_the_position_alone() {
    check_dynamic_frequencies(&mut cpu_backends(&[1])[0]);
}

fn check_dynamic_frequencies<B: Backend>(backend: &mut B) {
    let positions: Vec<u32> = (0..100).collect();
    let dynamic = RopeFrequencies::DynamicNtk { base: 1e4, factor: 2.0, original_len: 64, head_dim: 32 };
    let all = rope_table(backend, &positions, &dynamic, 1.0);
    let fixed = rope_table(backend, &positions, &llama_frequencies(32, 1e4), 1.0);
    assert_same_bits(&all[..64 * 32], &fixed[..64 * 32]);
    assert_ne!(all[64 * 32..], fixed[64 * 32..]);
    for (position, expected) in positions.iter().zip(all.chunks(32)) {
        assert_same_bits(&rope_table(backend, &[*position], &dynamic, 1.0), expected);
    }
}

#[test]
fn wrong_shapes_are_named_by_the_cpu() {
    wrong_shapes_are_named_by(cpu_backends(&[1]).remove(0));
}

fn wrong_shapes_are_named_by<B: Backend>(mut backend: B) {
    let positions = backend.alloc(DType::U32, 3).expect("room");
    let mut out = backend.alloc(DType::F32, 3 * 8).expect("room");
    let mut run = |num_tokens, frequencies: &RopeFrequencies| {
        let args = RopeTable { positions: &positions, num_tokens, frequencies, magnitude: 1.0, out: &mut out };
        backend.rope_table(args).expect_err("refused")
    };
    let shape = |argument, expected, found| KernelError::Shape { op: "rope_table", argument, expected, found };
    assert_eq!(run(4, &llama_frequencies(8, 1e4)), shape("positions", 4, 3));
    assert_eq!(run(3, &llama_frequencies(10, 1e4)), shape("out", 30, 24));
    assert_eq!(run(3, &RopeFrequencies::Fixed { inverse: Vec::new() }), shape("frequencies", 1, 0));
    let dynamic = RopeFrequencies::DynamicNtk { base: 1e4, factor: 2.0, original_len: 4, head_dim: 2 };
    assert_eq!(run(3, &dynamic), shape("head_dim", 4, 2));
}
