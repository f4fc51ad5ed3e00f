//! `linear` on every backend against its reference, and its promise that a row's bits depend on nothing but the row.

use quire_kernels::cpu::{CpuBackend, CpuConfig, Isa};
use quire_kernels::ops::linear::{Epilogue, Linear, reference};
use quire_kernels::testing::{POISON, Rng, assert_same_bits, cpu_backends};
use quire_kernels::{Backend, DType, HostTensor, KernelError, TensorFormat, WeightLayout, WeightSource};

/// A matrix in a file's bytes, at an odd address.
struct Matrix {
    dtype: DType,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

impl Matrix {
    fn new(dtype: DType, rows: usize, cols: usize, numbers: &[f32]) -> Self {
        assert_eq!(numbers.len(), rows * cols);
        let mut bytes = vec![0];
        for &number in numbers {
            match dtype {
                DType::F32 => bytes.extend(number.to_le_bytes()),
                DType::Bf16 => bytes.extend(half::bf16::from_f32(number).to_le_bytes()),
                DType::F16 => bytes.extend(half::f16::from_f32(number).to_le_bytes()),
                DType::U32 => bytes.extend((number as u32).to_le_bytes()),
            }
        }
        Self { dtype, rows, cols, bytes }
    }

    fn random(rng: &mut Rng, dtype: DType, rows: usize, cols: usize) -> Self {
        let numbers: Vec<f32> = rng.normals(rows * cols).iter().map(|x| x * 0.1).collect();
        Self::new(dtype, rows, cols, &numbers)
    }

    fn tensor(&self) -> HostTensor<'_> {
        HostTensor { format: self.dtype.into(), rows: self.rows, cols: self.cols, bytes: &self.bytes[1..] }
    }
}

fn stacked(matrices: &[Matrix], dtype: DType) -> WeightSource<'_> {
    WeightSource { parts: matrices.iter().map(Matrix::tensor).collect(), layout: WeightLayout::Stacked, dtype }
}

fn gate_up(matrices: &[Matrix], dtype: DType) -> WeightSource<'_> {
    WeightSource { layout: WeightLayout::GateUp, ..stacked(matrices, dtype) }
}

fn buffer<B: Backend>(backend: &mut B, numbers: &[f32]) -> B::Buffer {
    let mut buffer = backend.alloc(DType::F32, numbers.len()).expect("small");
    backend.write_f32(&mut buffer, 0, numbers).expect("fits");
    buffer
}

/// Runs `linear` on `x`, behind which (and behind `out`) lies memory that nothing may read or write.
fn run<B: Backend>(
    backend: &mut B,
    weight: &B::Weight,
    x: &[f32],
    num_rows: usize,
    bias: Option<&[f32]>,
    epilogue: Epilogue,
    out_before: &[f32],
) -> Vec<f32> {
    let unused = [POISON; 100];
    let x = buffer(backend, &[x, &unused].concat());
    let mut out = buffer(backend, &[out_before, &unused].concat());
    let bias = bias.map(|bias| buffer(backend, bias));
    backend
        .linear(Linear { x: &x, num_rows, weight, bias: bias.as_ref(), epilogue, out: &mut out })
        .expect("arguments fit");
    let mut result = vec![0.0; out_before.len() + unused.len()];
    backend.read_f32(&out, 0, &mut result).expect("fits");
    assert!(result[out_before.len()..].iter().all(|x| x.is_nan()), "written past the rows");
    result.truncate(out_before.len());
    result
}

/// Compares with the reference. A chain of K additions in f32 is off by at most about `K * 2^-24 * sum |x w|`; rounding
/// errors have random signs, so `6 * sqrt(K)` stands for K, and at least 4 for short chains. Behind it, SwiGLU
/// multiplies two such sums, silu having a slope of at most 1.1, and rounds some times itself.
fn check(
    backend: &mut CpuBackend,
    source: &WeightSource<'_>,
    x: &[f32],
    num_rows: usize,
    bias: Option<&[f32]>,
    epilogue: Epilogue,
) {
    let weight = backend.pack_weight(source).expect("a good source");
    let in_features = source.parts[0].cols;
    let out_features: usize = source.parts.iter().map(|part| part.rows).sum();
    let out_cols = if epilogue == Epilogue::SwiGlu { out_features / 2 } else { out_features };
    // Only `Add` reads what was there.
    let before: Vec<f32> = match epilogue {
        Epilogue::Add => Rng::new(5).normals(num_rows * out_cols),
        _ => vec![POISON; num_rows * out_cols],
    };
    let actual = run(backend, &weight, x, num_rows, bias, epilogue, &before);
    let expected = reference::linear(x, num_rows, source, bias, epilogue, &before);
    let unit = 2.0_f64.powi(-24);
    for (index, (&actual, &wanted)) in actual.iter().zip(&expected.out).enumerate() {
        let (row, col) = (index / out_cols, index % out_cols);
        let sum_error = |feature: usize| {
            let index = row * out_features + feature;
            let chain = (6.0 * (in_features as f64).sqrt()).max(4.0);
            unit * (chain * expected.magnitudes[index] + 2.0 * expected.sums[index].abs())
        };
        let allowed = match epilogue {
            Epilogue::Store => sum_error(col),
            Epilogue::Add => sum_error(col) + 2.0 * unit * wanted.abs(),
            Epilogue::SwiGlu => {
                let (gate, up) =
                    (expected.sums[row * out_features + col], expected.sums[row * out_features + out_cols + col]);
                let silu = gate / (1.0 + (-gate).exp());
                1.1 * sum_error(col) * up.abs() + silu.abs() * sum_error(out_cols + col) + 16.0 * unit * wanted.abs()
            }
        };
        let error = (f64::from(actual) - wanted).abs();
        assert!(
            error <= allowed + 1e-35,
            "{:?} {:?} [{num_rows}, {in_features}] x [{out_features}, {in_features}], {epilogue:?}: \
             [{row}, {col}] is {actual:e}, expected {wanted:e}, off by {error:e}, allowed {allowed:e}",
            backend.isa(),
            source.dtype,
        );
    }
}

const WEIGHT_TYPES: [DType; 2] = [DType::F32, DType::Bf16];

#[test]
fn every_shape_is_near_the_reference() {
    let mut rng = Rng::new(1);
    for mut backend in cpu_backends(&[2]) {
        for dtype in WEIGHT_TYPES {
            for in_features in [1, 2, 3, 31, 64, 65, 896] {
                for out_features in [1, 15, 16, 17, 63, 64, 65, 200] {
                    let matrix = [Matrix::random(&mut rng, dtype, out_features, in_features)];
                    for num_rows in [1, 2, 5, 6, 7, 13] {
                        let x = rng.normals(num_rows * in_features);
                        check(&mut backend, &stacked(&matrix, dtype), &x, num_rows, None, Epilogue::Store);
                    }
                }
            }
        }
    }
}

#[test]
fn long_sums_and_many_rows_are_near_the_reference() {
    let mut rng = Rng::new(2);
    for mut backend in cpu_backends(&[3]) {
        for dtype in WEIGHT_TYPES {
            for (num_rows, in_features, out_features) in
                [(1, 4864, 130), (9, 4865, 70), (70, 1025, 65), (193, 2049, 20), (513, 100, 70), (1025, 33, 5)]
            {
                let matrix = [Matrix::random(&mut rng, dtype, out_features, in_features)];
                let x = rng.outliers(num_rows * in_features);
                let bias = rng.normals(out_features);
                for epilogue in [Epilogue::Store, Epilogue::Add] {
                    check(&mut backend, &stacked(&matrix, dtype), &x, num_rows, Some(&bias), epilogue);
                }
            }
        }
    }
}

#[test]
fn parts_of_every_type_are_stacked() {
    let mut rng = Rng::new(3);
    for mut backend in cpu_backends(&[2]) {
        for dtype in WEIGHT_TYPES {
            let parts = [
                Matrix::random(&mut rng, DType::F16, 40, 77),
                Matrix::random(&mut rng, DType::F32, 1, 77),
                Matrix::random(&mut rng, DType::Bf16, 90, 77),
            ];
            let x = rng.normals(8 * 77);
            let bias = rng.normals(131);
            check(&mut backend, &stacked(&parts, dtype), &x, 8, Some(&bias), Epilogue::Add);
        }
    }
}

#[test]
fn gate_and_up_meet() {
    let mut rng = Rng::new(4);
    for mut backend in cpu_backends(&[2]) {
        for dtype in WEIGHT_TYPES {
            for (num_rows, in_features, num_outputs) in
                [(1, 64, 1), (3, 65, 31), (8, 100, 32), (20, 896, 33), (7, 1500, 150)]
            {
                let parts = [
                    Matrix::random(&mut rng, DType::Bf16, num_outputs, in_features),
                    Matrix::random(&mut rng, DType::F32, num_outputs, in_features),
                ];
                let x = rng.normals(num_rows * in_features);
                let bias = rng.normals(2 * num_outputs);
                for bias in [None, Some(&bias[..])] {
                    for epilogue in [Epilogue::SwiGlu, Epilogue::Store, Epilogue::Add] {
                        check(&mut backend, &gate_up(&parts, dtype), &x, num_rows, bias, epilogue);
                    }
                }
            }
        }
    }
}

#[test]
fn swiglu_of_large_gates_has_no_overflow() {
    for mut backend in cpu_backends(&[1]) {
        let parts = [Matrix::new(DType::F32, 1, 1, &[1.0]), Matrix::new(DType::F32, 1, 1, &[1.0])];
        let weight = backend.pack_weight(&gate_up(&parts, DType::F32)).expect("a good source");
        let x = [-1e4, -100.0, -80.0, 0.0, 80.0, 1e4];
        let out = run(&mut backend, &weight, &x, 6, None, Epilogue::SwiGlu, &[0.0; 6]);
        assert_eq!(out, [0.0, 0.0, out[2], 0.0, 6400.0, 1e8], "{:?}", backend.isa());
        assert!(out[2] >= 0.0 && out[2] < 1e-30);
    }
}

#[test]
fn special_numbers_stay_in_their_row() {
    let mut rng = Rng::new(6);
    for mut backend in cpu_backends(&[2]) {
        for dtype in WEIGHT_TYPES {
            let matrix = [Matrix::random(&mut rng, dtype, 70, 67)];
            let weight = backend.pack_weight(&stacked(&matrix, dtype)).expect("a good source");
            let mut x = rng.normals(9 * 67);
            let clean = run(&mut backend, &weight, &x, 9, None, Epilogue::Store, &[0.0; 9 * 70]);
            x[3 * 67 + 5] = f32::NAN;
            x[5 * 67 + 66] = f32::INFINITY;
            let dirty = run(&mut backend, &weight, &x, 9, None, Epilogue::Store, &[0.0; 9 * 70]);
            for row in 0..9 {
                let (clean, dirty) = (&clean[row * 70..][..70], &dirty[row * 70..][..70]);
                match row {
                    3 => assert!(dirty.iter().all(|x| x.is_nan())),
                    5 => assert!(dirty.iter().all(|x| !x.is_finite())),
                    _ => assert_same_bits(dirty, clean),
                }
            }
        }
    }
}

/// Promise 1: a row alone has the bits that it has in every batch, at every place, with any number of threads.
#[test]
fn a_row_has_the_same_bits_in_every_batch() {
    const MAX_ROWS: usize = 70;
    for isa in Isa::available() {
        let mut backends: Vec<CpuBackend> = [1, 2, 3]
            .map(|num_threads| CpuBackend::new(CpuConfig { num_threads, isa: Some(isa) }).expect("available"))
            .into();
        for dtype in WEIGHT_TYPES {
            for (in_features, layout, epilogue) in [
                (131, WeightLayout::Stacked, Epilogue::Add),
                (2100, WeightLayout::Stacked, Epilogue::Store),
                (1030, WeightLayout::GateUp, Epilogue::SwiGlu),
            ] {
                let mut rng = Rng::new(7);
                let parts = [
                    Matrix::random(&mut rng, dtype, 70, in_features),
                    Matrix::random(&mut rng, dtype, 70, in_features),
                ];
                let source = WeightSource { layout, ..stacked(&parts, dtype) };
                let out_cols = if layout == WeightLayout::GateUp { 70 } else { 140 };
                let x = rng.outliers(MAX_ROWS * in_features);
                let bias = rng.normals(140);
                let before = rng.normals(MAX_ROWS * out_cols);
                let mut alone: Vec<f32> = Vec::new();
                for (index, backend) in backends.iter_mut().enumerate() {
                    let weight = backend.pack_weight(&source).expect("a good source");
                    let mut run_rows = |first: usize, num: usize| {
                        let x = &x[first * in_features..][..num * in_features];
                        let before = &before[first * out_cols..][..num * out_cols];
                        run(backend, &weight, x, num, Some(&bias), epilogue, before)
                    };
                    if index == 0 {
                        alone = (0..MAX_ROWS).flat_map(|row| run_rows(row, 1)).collect();
                    }
                    for num_rows in 1..=MAX_ROWS {
                        let first = (num_rows * 7) % (MAX_ROWS - num_rows + 1);
                        assert_same_bits(&run_rows(first, num_rows), &alone[first * out_cols..][..num_rows * out_cols]);
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_large_batches() {
    let mut rng = Rng::new(8);
    for mut backend in cpu_backends(&[1, 3]) {
        for dtype in WEIGHT_TYPES {
            let matrix = [Matrix::random(&mut rng, dtype, 66, 1100)];
            let weight = backend.pack_weight(&stacked(&matrix, dtype)).expect("a good source");
            let row = rng.outliers(1100);
            let alone = run(&mut backend, &weight, &row, 1, None, Epilogue::Store, &[0.0; 66]);
            for num_rows in [192, 193, 513, 1025, 2100] {
                let out = run(
                    &mut backend,
                    &weight,
                    &row.repeat(num_rows),
                    num_rows,
                    None,
                    Epilogue::Store,
                    &vec![0.0; num_rows * 66],
                );
                for out in out.chunks_exact(66) {
                    assert_same_bits(out, &alone);
                }
            }
        }
    }
}

/// Plain fused multiplications in the same order: all vector instruction sets give the same bits with f32 weights.
#[test]
fn f32_weights_have_the_same_bits_on_every_vector_unit() {
    let mut rng = Rng::new(9);
    let matrix = [Matrix::random(&mut rng, DType::F32, 70, 300)];
    let x = rng.normals(5 * 300);
    let mut results = Vec::new();
    for mut backend in cpu_backends(&[1]) {
        if backend.isa() > Isa::Portable {
            let weight = backend.pack_weight(&stacked(&matrix, DType::F32)).expect("a good source");
            results.push(run(&mut backend, &weight, &x, 5, None, Epilogue::Store, &[0.0; 5 * 70]));
        }
    }
    results.windows(2).for_each(|pair| assert_same_bits(&pair[0], &pair[1]));
}

#[test]
fn no_rows_is_nothing_to_do() {
    for mut backend in cpu_backends(&[2]) {
        let matrix = [Matrix::new(DType::F32, 1, 2, &[1.0, 2.0])];
        let weight = backend.pack_weight(&stacked(&matrix, DType::Bf16)).expect("a good source");
        assert!(run(&mut backend, &weight, &[], 0, None, Epilogue::Store, &[]).is_empty());
    }
}

#[test]
fn wrong_arguments_are_named() {
    let shape = |op, argument, expected, found| KernelError::Shape { op, argument, expected, found };
    for mut backend in cpu_backends(&[1]) {
        let good = Matrix::new(DType::F32, 3, 2, &[1.0; 6]);
        let weight = backend.pack_weight(&stacked(std::slice::from_ref(&good), DType::Bf16)).expect("good");
        let mut refuse = |num_rows, x_len, bias_len: Option<usize>, epilogue, out_len, expected: KernelError| {
            let x = backend.alloc(DType::F32, x_len).expect("small");
            let bias = bias_len.map(|len| backend.alloc(DType::F32, len).expect("small"));
            let mut out = buffer(&mut backend, &vec![7.0; out_len]);
            let args = Linear { x: &x, num_rows, weight: &weight, bias: bias.as_ref(), epilogue, out: &mut out };
            assert_eq!(backend.linear(args), Err(expected));
            let mut after = vec![0.0; out_len];
            backend.read_f32(&out, 0, &mut after).expect("fits");
            assert!(after.iter().all(|&x| x == 7.0), "a refused call wrote");
        };
        let store = Epilogue::Store;
        refuse(2, 3, None, store, 6, shape("linear", "x", 4, 3));
        refuse(2, 4, None, store, 5, shape("linear", "out", 6, 5));
        refuse(2, 4, Some(2), store, 6, shape("linear", "bias", 3, 2));
        refuse(2, 4, Some(4), store, 6, shape("linear", "bias", 3, 4));
        refuse(usize::MAX, 4, None, store, 6, shape("linear", "x", usize::MAX, 4));
        let not_gate_up = KernelError::Type { op: "linear", argument: "weight", found: "stacked" };
        refuse(2, 4, None, Epilogue::SwiGlu, 6, not_gate_up);

        let indices = backend.alloc(DType::U32, 6).expect("small");
        let floats = backend.alloc(DType::F32, 6).expect("small");
        let mut out = backend.alloc(DType::F32, 6).expect("small");
        let args = Linear { x: &indices, num_rows: 1, weight: &weight, bias: None, epilogue: store, out: &mut out };
        assert_eq!(backend.linear(args), Err(KernelError::Type { op: "linear", argument: "x", found: "u32" }));
        let args =
            Linear { x: &floats, num_rows: 1, weight: &weight, bias: Some(&indices), epilogue: store, out: &mut out };
        assert_eq!(backend.linear(args), Err(KernelError::Type { op: "linear", argument: "bias", found: "u32" }));
    }
}

#[test]
fn wrong_sources_are_named() {
    let shape = |argument, expected, found| KernelError::Shape { op: "pack_weight", argument, expected, found };
    for mut backend in cpu_backends(&[1]) {
        let mut refuse = |source: WeightSource<'_>, expected: KernelError| {
            assert_eq!(backend.pack_weight(&source).map(|_| ()), Err(expected));
        };
        let bytes = [0; 64];
        let part = |rows: usize, cols: usize| HostTensor {
            format: TensorFormat::F32,
            rows,
            cols,
            bytes: &bytes[..rows * cols * 4],
        };
        let stacked = |parts| WeightSource { parts, layout: WeightLayout::Stacked, dtype: DType::F32 };
        let gate_up = |parts| WeightSource { parts, layout: WeightLayout::GateUp, dtype: DType::F32 };
        refuse(stacked(vec![]), shape("parts", 1, 0));
        refuse(stacked(vec![part(2, 3), part(2, 4)]), shape("parts.cols", 3, 4));
        refuse(stacked(vec![part(2, 0)]), shape("parts.cols", 1, 0));
        refuse(stacked(vec![part(0, 2)]), shape("parts.rows", 1, 0));
        refuse(gate_up(vec![part(2, 3)]), shape("parts", 2, 1));
        refuse(gate_up(vec![part(2, 3), part(1, 3)]), shape("parts.rows", 2, 1));
        refuse(stacked(vec![HostTensor { bytes: &bytes[..23], ..part(2, 3) }]), shape("parts.bytes", 24, 23));
        let huge = HostTensor { format: TensorFormat::F32, rows: usize::MAX, cols: 3, bytes: &bytes };
        refuse(stacked(vec![huge]), shape("parts.bytes", usize::MAX, 64));
        let found = |argument, found| KernelError::Type { op: "pack_weight", argument, found };
        refuse(WeightSource { dtype: DType::F16, ..stacked(vec![part(2, 3)]) }, found("dtype", "f16"));
        let blocks = |rows, cols| HostTensor { format: TensorFormat::Q4_0, rows, cols, bytes: &bytes[..36] };
        refuse(stacked(vec![blocks(1, 63)]), shape("parts.cols", 64, 63));
        refuse(stacked(vec![blocks(1, 96)]), shape("parts.bytes", 54, 36));
        refuse(stacked(vec![blocks(1, 64)]), found("parts.format", "Q4_0"));
    }
}

#[test]
fn packed_bytes_are_as_foretold() {
    for backend in cpu_backends(&[1]) {
        for (out_features, in_features) in [(1, 1), (64, 64), (65, 3), (200, 896)] {
            for dtype in WEIGHT_TYPES {
                let least = out_features * in_features * dtype.size();
                let bytes = backend.weight_bytes(out_features, in_features, dtype);
                assert!(bytes >= least && bytes % 64 == 0);
                if out_features % 64 == 0 && in_features % 2 == 0 {
                    assert_eq!(bytes, least);
                }
            }
        }
    }
}
