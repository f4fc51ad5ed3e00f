//! Rotary angles on every instruction set against their meaning, and against what models' own code gives.

use quire_kernels::ops::rope_table::{RopeFrequencies, RopeTable, reference};
use quire_kernels::testing::{Rng, Tolerance, assert_close, assert_same_bits, cpu_backends};
use quire_kernels::{Backend, DType, KernelError};

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
    let mut result = vec![0.0; positions.len() * 2 * frequencies.len()];
    let mut out = backend.alloc(DType::F32, result.len()).expect("room");
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

#[test]
fn close_to_the_reference() {
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
        for mut backend in cpu_backends(&[1, 2]) {
            assert_close(&rope_table(&mut backend, &positions, &frequencies, magnitude), &expected, TOLERANCE);
        }
    }
}

#[test]
fn dynamic_frequencies_are_fixed_ones_within_the_original_length_and_depend_on_the_position_alone() {
    let positions: Vec<u32> = (0..100).collect();
    let dynamic = RopeFrequencies::DynamicNtk { base: 1e4, factor: 2.0, original_len: 64, head_dim: 32 };
    let mut backend = cpu_backends(&[1]).remove(0);
    let all = rope_table(&mut backend, &positions, &dynamic, 1.0);
    let fixed = rope_table(&mut backend, &positions, &llama_frequencies(32, 1e4), 1.0);
    assert_same_bits(&all[..64 * 32], &fixed[..64 * 32]);
    assert_ne!(all[64 * 32..], fixed[64 * 32..]);
    for (position, expected) in positions.iter().zip(all.chunks(32)) {
        assert_same_bits(&rope_table(&mut backend, &[*position], &dynamic, 1.0), expected);
    }
}

#[test]
fn wrong_shapes_are_named() {
    let mut backend = cpu_backends(&[1]).remove(0);
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
