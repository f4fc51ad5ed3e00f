//! Rows picked by index: data movement, so exact.

use quire_kernels::ops::gather_rows::{GatherRows, reference};
use quire_kernels::testing::{Rng, assert_same_bits, cpu_backends};
use quire_kernels::{Backend, DType, KernelError};

#[test]
fn rows_are_copied_exactly() {
    let mut rng = Rng::new(1);
    for (dim, num_x, num_rows) in [(1, 1, 1), (8, 5, 9), (4096, 40, 64)] {
        let x = rng.normals(num_x * dim);
        let indices: Vec<u32> = (0..num_rows).map(|_| rng.below(num_x) as u32).collect();
        let expected = reference::gather_rows(&x, dim, &indices);
        for mut backend in cpu_backends(&[1, 2]) {
            let mut x_buffer = backend.alloc(DType::F32, x.len()).expect("room");
            backend.write_f32(&mut x_buffer, 0, &x).expect("it fits");
            // What stands before the offset is no index.
            let mut index_buffer = backend.alloc(DType::U32, 2 + num_rows).expect("room");
            backend.write_u32(&mut index_buffer, 0, &[u32::MAX, u32::MAX]).expect("it fits");
            backend.write_u32(&mut index_buffer, 2, &indices).expect("it fits");
            let mut out = backend.alloc(DType::F32, num_rows * dim).expect("room");
            let args =
                GatherRows { x: &x_buffer, dim, indices: &index_buffer, indices_offset: 2, num_rows, out: &mut out };
            backend.gather_rows(args).expect("shapes fit");
            let mut actual = vec![0.0; num_rows * dim];
            backend.read_f32(&out, 0, &mut actual).expect("it fits");
            assert_same_bits(&actual, &expected);
        }
    }
}

#[test]
fn an_index_past_the_end_is_refused_before_anything_is_written() {
    let mut backend = cpu_backends(&[2]).remove(0);
    let x = backend.alloc(DType::F32, 3 * 4).expect("room");
    let mut indices = backend.alloc(DType::U32, 2).expect("room");
    backend.write_u32(&mut indices, 0, &[0, 3]).expect("it fits");
    let mut out = backend.alloc(DType::F32, 2 * 4).expect("room");
    backend.write_f32(&mut out, 0, &[7.0; 8]).expect("it fits");
    let mut run = |num_rows| {
        backend.gather_rows(GatherRows { x: &x, dim: 4, indices: &indices, indices_offset: 0, num_rows, out: &mut out })
    };
    assert_eq!(run(2), Err(KernelError::Range { op: "gather_rows", argument: "indices", value: 3, limit: 3 }));
    let shape = KernelError::Shape { op: "gather_rows", argument: "indices", expected: 3, found: 2 };
    assert_eq!(run(3), Err(shape));
    let mut result = [0.0; 8];
    backend.read_f32(&out, 0, &mut result).expect("it fits");
    assert_eq!(result, [7.0; 8]);
}
