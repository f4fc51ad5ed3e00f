//! Root mean square normalisation on every instruction set, in the emulator and on a card, against its meaning.

use quire_kernels::ops::rms_norm::{RmsNorm, reference};
use quire_kernels::testing::{POISON, Rng, Tolerance, assert_close, assert_same_bits, cpu_backends};
use quire_kernels::{Backend, DType, KernelError, device_tests};

const EPS: f32 = 1e-5;

/// Partial sums of squares, a root and two products, each rounded to 24 bits.
const TOLERANCE: Tolerance = Tolerance { abs: 1e-30, rel: 2e-6 };

fn rms_norm<B: Backend>(backend: &mut B, x: &[f32], weight: &[f32]) -> Vec<f32> {
    let mut upload = |data: &[f32]| {
        let mut buffer = backend.alloc(DType::F32, data.len()).expect("room");
        backend.write_f32(&mut buffer, 0, data).expect("it fits");
        buffer
    };
    let (x_buffer, weight_buffer) = (upload(x), upload(weight));
    let mut result = vec![POISON; x.len()];
    let mut out = upload(&result);
    let dim = weight.len();
    let args = RmsNorm { x: &x_buffer, weight: &weight_buffer, eps: EPS, num_rows: x.len() / dim, dim, out: &mut out };
    backend.rms_norm(args).expect("shapes fit");
    backend.read_f32(&out, 0, &mut result).expect("it fits");
    result
}

fn close_to_the_reference<B: Backend>(mut backends: Vec<B>) {
    let mut rng = Rng::new(1);
    for dim in [1, 2, 8, 15, 16, 17, 24, 63, 64, 65, 100, 1024, 4099] {
        let weight = rng.normals(dim);
        for x in [rng.normals(3 * dim), rng.outliers(3 * dim), vec![0.0; 3 * dim], vec![1e-20; 3 * dim]] {
            let expected = reference::rms_norm(&x, &weight, EPS);
            for backend in &mut backends {
                assert_close(&rms_norm(backend, &x, &weight), &expected, TOLERANCE);
            }
        }
    }
}

#[test]
fn close_to_the_reference_on_the_cpu() {
    close_to_the_reference(cpu_backends(&[1]));
}

device_tests! {
    close_to_the_reference: |open| close_to_the_reference(open(None).into_iter().collect());
    a_row_has_the_same_bits_in_any_batch: |open| open(None).into_iter().for_each(|backend| {
        a_row_has_the_same_bits_in_any_batch(&mut [backend]);
    });
    wrong_shapes_are_named: |open| open(None).into_iter().for_each(wrong_shapes_are_named_by);
}

/// `backends` compute alike.
fn a_row_has_the_same_bits_in_any_batch<B: Backend>(backends: &mut [B]) {
    let mut rng = Rng::new(2);
    let (dim, num_rows) = (1000, 70);
    let (weight, x) = (rng.normals(dim), rng.outliers(num_rows * dim));
    let alone: Vec<f32> = x.chunks(dim).flat_map(|row| rms_norm(&mut backends[0], row, &weight)).collect();
    for backend in backends {
        assert_same_bits(&rms_norm(backend, &x, &weight), &alone);
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads() {
    cpu_backends(&[1, 2, 3]).chunks_mut(3).for_each(a_row_has_the_same_bits_in_any_batch);
}

#[test]
fn wrong_shapes_are_named_by_the_cpu() {
    wrong_shapes_are_named_by(cpu_backends(&[1]).remove(0));
}

fn wrong_shapes_are_named_by<B: Backend>(mut backend: B) {
    let mut buffer = |dtype, len| backend.alloc(dtype, len).expect("room");
    let (x, weight, short, ids) =
        (buffer(DType::F32, 6), buffer(DType::F32, 3), buffer(DType::F32, 2), buffer(DType::U32, 6));
    let mut run = |x, weight, num_rows, dim, out_len| {
        let mut out = backend.alloc(DType::F32, out_len).expect("room");
        backend.rms_norm(RmsNorm { x, weight, eps: EPS, num_rows, dim, out: &mut out }).expect_err("refused")
    };
    let shape = |argument, expected, found| KernelError::Shape { op: "rms_norm", argument, expected, found };
    assert_eq!(run(&x, &weight, 3, 3, 6), shape("x", 9, 6));
    assert_eq!(run(&x, &short, 2, 3, 6), shape("weight", 3, 2));
    assert_eq!(run(&x, &weight, 2, 3, 5), shape("out", 6, 5));
    assert_eq!(run(&x, &weight, 2, 0, 6), shape("dim", 1, 0));
    let found = "u32";
    assert_eq!(run(&ids, &weight, 2, 3, 6), KernelError::Type { op: "rms_norm", argument: "x", found });
}
