//! Rows picked by index: data movement, so exact.

use quire_kernels::ops::gather_rows::{GatherRows, reference};
use quire_kernels::testing::{POISON, Rng, assert_same_bits, cpu_backends};
use quire_kernels::{Backend, DType, KernelError, device_tests};

fn rows_are_copied_exactly<B: Backend>(mut backends: Vec<B>) {
    let mut rng = Rng::new(1);
    for (dim, num_x, num_rows) in [(1, 1, 1), (8, 5, 9), (257, 5, 9), (4096, 40, 64)] {
        let x = rng.normals(num_x * dim);
        let indices: Vec<u32> = (0..num_rows).map(|_| rng.below(num_x) as u32).collect();
        let expected = reference::gather_rows(&x, dim, &indices);
        for backend in &mut backends {
            let mut x_buffer = backend.alloc(DType::F32, x.len()).expect("room");
            backend.write_f32(&mut x_buffer, 0, &x).expect("it fits");
            // What stands before the offset is no index.
            let mut index_buffer = backend.alloc(DType::U32, 2 + num_rows).expect("room");
            backend.write_u32(&mut index_buffer, 0, &[u32::MAX, u32::MAX]).expect("it fits");
            backend.write_u32(&mut index_buffer, 2, &indices).expect("it fits");
            let mut actual = vec![POISON; num_rows * dim];
            let mut out = backend.alloc(DType::F32, num_rows * dim).expect("room");
            backend.write_f32(&mut out, 0, &actual).expect("it fits");
            let args =
                GatherRows { x: &x_buffer, dim, indices: &index_buffer, indices_offset: 2, num_rows, out: &mut out };
            backend.gather_rows(args).expect("shapes fit");
            backend.read_f32(&out, 0, &mut actual).expect("it fits");
            assert_same_bits(&actual, &expected);
        }
    }
}

#[test]
fn rows_are_copied_exactly_on_the_cpu() {
    rows_are_copied_exactly(cpu_backends(&[1, 2]));
}

device_tests! {
    rows_are_copied_exactly: |open| rows_are_copied_exactly(open(None).into_iter().collect());
    an_index_past_the_end_is_told: |open| open(None).into_iter().for_each(tells_of_an_index_past_the_end);
}

/// What the operation says, what reading says after it, and what is in the results.
type Outcome = (Result<(), KernelError>, Result<(), KernelError>, Vec<f32>);

/// Rows 0 and `index` of three, where results were 7 before.
fn gather<B: Backend>(backend: &mut B, index: u32, num_rows: usize) -> Outcome {
    let x = backend.alloc(DType::F32, 3 * 4).expect("room");
    let mut indices = backend.alloc(DType::U32, 2).expect("room");
    backend.write_u32(&mut indices, 0, &[0, index]).expect("it fits");
    let mut out = backend.alloc(DType::F32, 2 * 4).expect("room");
    backend.write_f32(&mut out, 0, &[7.0; 8]).expect("it fits");
    let args = GatherRows { x: &x, dim: 4, indices: &indices, indices_offset: 0, num_rows, out: &mut out };
    let result = backend.gather_rows(args);
    let mut numbers = vec![0.0; 8];
    let read = backend.read_f32(&out, 0, &mut numbers);
    // What was found is told once.
    backend.read_f32(&out, 0, &mut numbers).expect("it fits");
    (result, read, numbers)
}

const PAST_THE_END: KernelError = KernelError::Range { op: "gather_rows", argument: "indices", value: 3, limit: 3 };
const TOO_FEW: KernelError = KernelError::Shape { op: "gather_rows", argument: "indices", expected: 3, found: 2 };

#[test]
fn an_index_past_the_end_is_refused_before_anything_is_written() {
    let backend = &mut cpu_backends(&[2])[0];
    assert_eq!(gather(backend, 3, 2), (Err(PAST_THE_END), Ok(()), vec![7.0; 8]));
    assert_eq!(gather(backend, 2, 3), (Err(TOO_FEW), Ok(()), vec![7.0; 8]));
}

fn tells_of_an_index_past_the_end<B: Backend>(mut backend: B) {
    let copied = [[0.0; 4], [7.0; 4]].concat();
    assert_eq!(gather(&mut backend, 3, 2), (Ok(()), Err(PAST_THE_END), copied));
    assert_eq!(gather(&mut backend, 2, 3), (Err(TOO_FEW), Ok(()), vec![7.0; 8]));
}
