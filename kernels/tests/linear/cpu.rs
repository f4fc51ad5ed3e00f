//! The CPU: all formats and shapes, on every instruction set.

use quire_kernels::cpu::{CpuBackend, CpuConfig, Isa};
use quire_kernels::ops::linear::{Epilogue, Linear, WeightShape, reference};
use quire_kernels::testing::{Rng, assert_same_bits, cpu_backends};
use quire_kernels::weight_format::{Codes, Grouping};
use quire_kernels::{Backend, DType, HostTensor, KernelError, TensorFormat, WeightFormat, WeightLayout, WeightSource};

use crate::support::{self, BLOCKS, FORMATS, Matrix, buffer, check, file_format, gate_up, grouped, run, stacked};

#[test]
fn every_shape_is_near_the_reference() {
    let mut rng = Rng::new(1);
    for mut backend in cpu_backends(&[2]) {
        for format in FORMATS {
            for in_features in [1, 2, 3, 31, 64, 65, 896] {
                for out_features in [1, 15, 16, 17, 63, 64, 65, 200] {
                    let matrix = [Matrix::random(&mut rng, file_format(format), out_features, in_features)];
                    for num_rows in [1, 2, 5, 6, 7, 13] {
                        let x = rng.normals(num_rows * in_features);
                        check(&mut backend, &stacked(&matrix, format), &x, num_rows, None, Epilogue::Store);
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
        for format in FORMATS {
            for (num_rows, in_features, out_features) in
                [(1, 4864, 130), (9, 4865, 70), (70, 1025, 65), (193, 2049, 20), (513, 100, 70), (1025, 33, 5)]
            {
                let matrix = [Matrix::random(&mut rng, file_format(format), out_features, in_features)];
                let x = rng.outliers(num_rows * in_features);
                let bias = rng.normals(out_features);
                for epilogue in [Epilogue::Store, Epilogue::Add] {
                    check(&mut backend, &stacked(&matrix, format), &x, num_rows, Some(&bias), epilogue);
                }
            }
        }
    }
}

#[test]
fn parts_of_every_type_are_stacked() {
    let mut rng = Rng::new(3);
    for mut backend in cpu_backends(&[2]) {
        for format in FORMATS {
            let parts = [
                Matrix::random(&mut rng, TensorFormat::F16, 40, 77),
                Matrix::random(&mut rng, TensorFormat::F32, 1, 77),
                Matrix::random(&mut rng, TensorFormat::Bf16, 90, 77),
            ];
            let x = rng.normals(8 * 77);
            let bias = rng.normals(131);
            check(&mut backend, &stacked(&parts, format), &x, 8, Some(&bias), Epilogue::Add);
        }
    }
}

#[test]
fn gate_and_up_meet() {
    let mut rng = Rng::new(4);
    for mut backend in cpu_backends(&[2]) {
        for format in FORMATS {
            for (num_rows, in_features, num_outputs) in
                [(1, 64, 1), (3, 65, 31), (8, 100, 32), (20, 896, 33), (7, 1500, 150)]
            {
                let parts = [
                    Matrix::random(&mut rng, TensorFormat::Bf16, num_outputs, in_features),
                    Matrix::random(&mut rng, TensorFormat::F32, num_outputs, in_features),
                ];
                let x = rng.normals(num_rows * in_features);
                let bias = rng.normals(2 * num_outputs);
                for bias in [None, Some(&bias[..])] {
                    for epilogue in [Epilogue::SwiGlu, Epilogue::Store, Epilogue::Add] {
                        check(&mut backend, &gate_up(&parts, format), &x, num_rows, bias, epilogue);
                    }
                }
            }
        }
    }
}

#[test]
fn swiglu_of_large_gates_has_no_overflow() {
    for mut backend in cpu_backends(&[1]) {
        let parts = [Matrix::new(TensorFormat::F32, 1, 1, &[1.0]), Matrix::new(TensorFormat::F32, 1, 1, &[1.0])];
        let weight = backend.pack_weight(&gate_up(&parts, WeightFormat::F32)).expect("a good source");
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
        for format in FORMATS {
            let matrix = [Matrix::random(&mut rng, file_format(format), 70, 67)];
            let weight = backend.pack_weight(&stacked(&matrix, format)).expect("a good source");
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
        for format in FORMATS {
            for (in_features, layout, epilogue) in [
                (131, WeightLayout::Stacked, Epilogue::Add),
                (2100, WeightLayout::Stacked, Epilogue::Store),
                (1030, WeightLayout::GateUp, Epilogue::SwiGlu),
            ] {
                let mut rng = Rng::new(7);
                let parts = [
                    Matrix::random(&mut rng, file_format(format), 70, in_features),
                    Matrix::random(&mut rng, file_format(format), 70, in_features),
                ];
                let source = WeightSource { layout, ..stacked(&parts, format) };
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

/// A weight brings its kernels along, and a backend has room for all of them.
#[test]
fn what_one_backend_packed_another_multiplies() {
    const COLS: usize = 700;
    let mut rng = Rng::new(13);
    let x = rng.outliers(600 * COLS);
    for format in FORMATS {
        let matrix = [Matrix::random(&mut rng, file_format(format), 70, COLS)];
        for isa in Isa::available() {
            let new = |isa| CpuBackend::new(CpuConfig { num_threads: 1, isa: Some(isa) }).expect("available");
            let mut owner = new(isa);
            let weight = owner.pack_weight(&stacked(&matrix, format)).expect("a good source");
            let expected = run(&mut owner, &weight, &x, 600, None, Epilogue::Store, &[0.0; 600 * 70]);
            let mut other = new(Isa::Portable);
            for num_rows in [1, 40, 600] {
                let zeros = vec![0.0; num_rows * 70];
                let found = run(&mut other, &weight, &x[..num_rows * COLS], num_rows, None, Epilogue::Store, &zeros);
                assert_same_bits(&found, &expected[..num_rows * 70]);
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_large_batches() {
    let mut rng = Rng::new(8);
    for mut backend in cpu_backends(&[1, 3]) {
        for format in FORMATS {
            // Wide matrices are walked in groups of panels, deep ones in stretches.
            for (outputs, features, rows) in [(66, 1100, &[192, 193, 513, 1025, 2100][..]), (300, 2100, &[193, 513])] {
                let matrix = [Matrix::random(&mut rng, file_format(format), outputs, features)];
                let weight = backend.pack_weight(&stacked(&matrix, format)).expect("a good source");
                let row = rng.outliers(features);
                let alone = run(&mut backend, &weight, &row, 1, None, Epilogue::Store, &vec![0.0; outputs]);
                for &num_rows in rows {
                    let (x, out) = (row.repeat(num_rows), vec![0.0; num_rows * outputs]);
                    let out = run(&mut backend, &weight, &x, num_rows, None, Epilogue::Store, &out);
                    for out in out.chunks_exact(outputs) {
                        assert_same_bits(out, &alone);
                    }
                }
            }
        }
    }
}

/// Plain fused multiplications in the same order: but for products of bf16 pairs, all vector instruction sets give the
/// same bits.
#[test]
fn vector_units_agree_to_the_bit() {
    let mut rng = Rng::new(9);
    let matrix = [Matrix::random(&mut rng, TensorFormat::F32, 70, 300)];
    let mut x = rng.outliers(5 * 300);
    // A group of zeros, and one too small to be told from it.
    x[300..428].fill(0.0);
    x[640..672].fill(1e-35);
    for format in FORMATS {
        let mut results = Vec::new();
        for mut backend in cpu_backends(&[1]) {
            let multiplies_pairs =
                backend.isa() >= Isa::Avx512Bf16 && matches!(format, WeightFormat::Bf16 | WeightFormat::Fp8);
            if backend.isa() > Isa::Portable && !multiplies_pairs {
                let weight = backend.pack_weight(&stacked(&matrix, format)).expect("a good source");
                results.push(run(&mut backend, &weight, &x, 5, None, Epilogue::Store, &[0.0; 5 * 70]));
            }
        }
        results.windows(2).for_each(|pair| assert_same_bits(&pair[0], &pair[1]));
    }
}

#[test]
fn no_rows_is_nothing_to_do() {
    for mut backend in cpu_backends(&[2]) {
        let matrix = [Matrix::new(TensorFormat::F32, 1, 2, &[1.0, 2.0])];
        let weight = backend.pack_weight(&stacked(&matrix, WeightFormat::Bf16)).expect("a good source");
        assert!(run(&mut backend, &weight, &[], 0, None, Epilogue::Store, &[]).is_empty());
    }
}

#[test]
fn wrong_arguments_are_named() {
    let shape = |op, argument, expected, found| KernelError::Shape { op, argument, expected, found };
    for mut backend in cpu_backends(&[1]) {
        let good = Matrix::new(TensorFormat::F32, 3, 2, &[1.0; 6]);
        let weight = backend.pack_weight(&stacked(std::slice::from_ref(&good), WeightFormat::Bf16)).expect("good");
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
        let stacked = |parts| WeightSource { parts, layout: WeightLayout::Stacked, format: WeightFormat::F32 };
        let gate_up = |parts| WeightSource { parts, layout: WeightLayout::GateUp, format: WeightFormat::F32 };
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
        let as_format = |format, parts| WeightSource { format, ..stacked(parts) };
        refuse(as_format(grouped(Codes::Int4, 128, false), vec![part(2, 3)]), found("format", "int4"));
        refuse(as_format(grouped(Codes::Int8, 128, true), vec![part(2, 3)]), found("format", "int8"));
        refuse(as_format(grouped(Codes::Iq4Nl, 32, false), vec![part(2, 3)]), found("parts.format", "F32"));
        let blocks = |rows, cols| HostTensor { format: TensorFormat::Q4_0, rows, cols, bytes: &bytes[..36] };
        refuse(stacked(vec![blocks(1, 63)]), shape("parts.cols", 64, 63));
        refuse(stacked(vec![blocks(1, 96)]), shape("parts.bytes", 54, 36));
    }
}

#[test]
fn packed_bytes_are_as_foretold() {
    for backend in cpu_backends(&[1]) {
        for (out_features, in_features) in [(1, 1), (64, 64), (65, 3), (200, 896), (128, 256)] {
            // Bits of a weight beside its scales.
            let bits_of_bf16 = if backend.isa() >= Isa::Avx512Bf16 { 12 } else { 16 };
            for (format, bits) in FORMATS.into_iter().zip([32, bits_of_bf16, 8, 8, 8, 8, 4, 4]) {
                let shape = WeightShape { out_features, in_features, layout: WeightLayout::Stacked, format };
                let least = out_features * in_features * bits / 8;
                let bytes = backend.weight_bytes(&shape);
                assert!(bytes >= least && bytes % 64 == 0);
                if out_features % 64 == 0 && in_features % 128 == 0 {
                    let num_scales = match format {
                        WeightFormat::Grouped(Grouping { group_len, has_min, .. }) => {
                            out_features * in_features / group_len * if has_min { 2 } else { 1 }
                        }
                        WeightFormat::Fp8 => out_features * in_features / 128,
                        _ => 0,
                    };
                    let is_short = backend.isa() >= Isa::Avx512 && format != WeightFormat::Fp8;
                    let scale_size = if is_short { 2 } else { 4 };
                    assert_eq!(bytes, least + num_scales * scale_size);
                }
            }
        }
    }
}

#[test]
fn blocks_of_files_are_multiplied_as_they_are() {
    let mut rng = Rng::new(10);
    for mut backend in cpu_backends(&[2]) {
        for block in BLOCKS {
            for (num_rows, in_features, out_features) in [(1, 256, 70), (3, 768, 64), (14, 1536, 33), (30, 256, 200)] {
                let matrix = [Matrix::random_blocks(&mut rng, block, out_features, in_features)];
                let format = WeightFormat::of_blocks(&[matrix[0].tensor()]).expect("blocks");
                let x = rng.outliers(num_rows * in_features);
                check(&mut backend, &stacked(&matrix, format), &x, num_rows, None, Epilogue::Store);
            }
            let parts = [block; 2].map(|block| Matrix::random_blocks(&mut rng, block, 40, 512));
            let format = WeightFormat::of_blocks(&[parts[0].tensor(), parts[1].tensor()]).expect("blocks");
            check(&mut backend, &gate_up(&parts, format), &rng.normals(5 * 512), 5, None, Epilogue::SwiGlu);
        }
    }
}

#[test]
fn blocks_of_fp8_are_multiplied_as_they_are() {
    cpu_backends(&[2]).iter_mut().for_each(support::blocks_of_fp8_are_multiplied_as_they_are);
}

#[test]
fn every_code_of_fp8_is_what_it_stands_for() {
    cpu_backends(&[2]).iter_mut().for_each(support::every_code_of_fp8_is_what_it_stands_for);
}

/// But for scales rounded to f16, and `Q6_K`, whose 16 weights of a scale are rounded once more.
#[test]
fn blocks_of_files_keep_their_values() {
    let mut rng = Rng::new(11);
    for block in BLOCKS {
        let matrix = [Matrix::random_blocks(&mut rng, block, 20, 512)];
        let exact = reference::weight_rows(&stacked(&matrix, WeightFormat::F32));
        let packed =
            reference::weight_rows(&stacked(&matrix, WeightFormat::of_blocks(&[matrix[0].tensor()]).expect("blocks")));
        for (exact, packed) in exact.iter().flatten().zip(packed.iter().flatten()) {
            let error = (exact.scaled - packed.scaled - packed.min).abs();
            let allowed = match block {
                // Half a step of the new codes: the largest of 32 is 127 * 32 * 0.1 at most.
                TensorFormat::Q6K => 0.51 * 128.0 * 32.0 * 0.1 / 127.0,
                TensorFormat::Q4K | TensorFormat::Q5K => {
                    2.0_f64.powi(-11) * (packed.scaled.abs() + 2.0 * packed.min.abs() + exact.scaled.abs()) + 1e-6
                }
                TensorFormat::Q4_1 | TensorFormat::Q5_1 => 2.0_f64.powi(-11) * packed.min.abs() + 1e-6,
                _ => 0.0,
            };
            assert!(error <= allowed, "{}: {exact:?} became {packed:?}", block.name());
        }
    }
}

/// What differs becomes codes of 8 bits, which hold them all.
#[test]
fn parts_of_different_blocks_share_a_format() {
    let mut rng = Rng::new(12);
    let parts = [TensorFormat::Q4K, TensorFormat::Q6K, TensorFormat::Iq4Nl, TensorFormat::Q8_0]
        .map(|block| Matrix::random_blocks(&mut rng, block, 30, 512));
    let tensors: Vec<HostTensor<'_>> = parts.iter().map(Matrix::tensor).collect();
    let format = WeightFormat::of_blocks(&tensors).expect("blocks");
    assert_eq!(format, grouped(Codes::Int8, 32, true));
    let dense = Matrix::random(&mut rng, TensorFormat::F16, 2, 512);
    assert_eq!(WeightFormat::of_blocks(&[tensors[0], dense.tensor()]), None);
    for mut backend in cpu_backends(&[2]) {
        check(&mut backend, &stacked(&parts, format), &rng.normals(7 * 512), 7, None, Epilogue::Store);
        // Blocks can be spread out, too.
        check(&mut backend, &stacked(&parts, WeightFormat::F32), &rng.normals(512), 1, None, Epilogue::Store);
    }
}

/// Weights of 12 bits a number are the same numbers, and their sums have the bits of plain ones: of the same rows, once alone
/// and once with a neighbour of so many different exponents that the matrix stays plain.
#[test]
fn compact_weights_lose_nothing() {
    const COLS: usize = 2112;
    let mut rng = Rng::new(11);
    for mut backend in cpu_backends(&[2]) {
        let mut numbers = rng.normals(64 * COLS);
        // A zero of either sign; but for them and what is tiny, all in the window.
        (numbers[5], numbers[COLS + 6]) = (0.0, -0.0);
        numbers.iter_mut().for_each(|x| *x = if *x != 0.0 && x.abs() < 1e-3 { 1e-3 } else { *x * 0.02 });
        let ours = Matrix::new(TensorFormat::Bf16, 64, COLS, &numbers);
        let wild: Vec<f32> = (0..64 * COLS).map(|i| f32::from_bits(((i % 250 + 1) as u32) << 23)).collect();
        let wild = Matrix::new(TensorFormat::Bf16, 64, COLS, &wild);
        let alone = backend.pack_weight(&stacked(std::slice::from_ref(&ours), WeightFormat::Bf16)).expect("a source");
        let both = backend.pack_weight(&stacked(&[ours, wild], WeightFormat::Bf16)).expect("a source");
        let is_compact = backend.isa() >= Isa::Avx512Bf16;
        assert_eq!(backend.packed_bytes(&alone), 64 * COLS * 2 / 4 * if is_compact { 3 } else { 4 });
        assert_eq!(backend.packed_bytes(&both), 128 * COLS * 2);
        let x = rng.outliers(13 * COLS);
        for num_rows in [1, 2, 6, 7, 13] {
            let alone = run(&mut backend, &alone, &x, num_rows, None, Epilogue::Store, &vec![0.0; 13 * 64]);
            let both = run(&mut backend, &both, &x, num_rows, None, Epilogue::Store, &vec![0.0; 13 * 128]);
            for row in 0..num_rows {
                assert_same_bits(&alone[row * 64..][..64], &both[row * 128..][..64]);
            }
        }
    }
}

/// Numbers that a panel's window of exponents does not hold are multiplied all the same, and read as they are.
#[test]
fn outliers_of_compact_weights_are_kept() {
    const ROWS: usize = 70;
    const COLS: usize = 1030;
    let mut rng = Rng::new(12);
    for mut backend in cpu_backends(&[2]) {
        let mut numbers = rng.normals(ROWS * COLS);
        for (place, outlier) in [(3, 3e12), (COLS + 7, -2e-20), (2 * COLS + 1029, 1e-39), (69 * COLS + 1028, -5e4)] {
            numbers[place] = outlier;
        }
        let matrix = [Matrix::new(TensorFormat::Bf16, ROWS, COLS, &numbers)];
        let x = rng.normals(7 * COLS);
        check(&mut backend, &stacked(&matrix, WeightFormat::Bf16), &x, 7, None, Epilogue::Add);
    }
}

/// What a panel's window does not hold, and zeros, wherever they lie in what is unpacked and multiplied at once: alone and in batches
/// of every walk the same bits.
#[test]
fn outliers_and_zeros_have_the_same_bits_in_every_batch() {
    const ROWS: usize = 140;
    const COLS: usize = 4200;
    let mut rng = Rng::new(13);
    let mut numbers = rng.normals(ROWS * COLS);
    for edge in (32..COLS).step_by(32) {
        let row = edge / 32 % ROWS;
        numbers[row * COLS + edge] = if edge % 64 == 0 { 1e-9 } else { 0.0 };
        numbers[(ROWS - 1 - row) * COLS + edge - 1] = if edge % 64 == 0 { -0.0 } else { -3e7 };
    }
    // Outputs of many zeros, some of which share panels with others.
    numbers[70 * COLS..110 * COLS].iter_mut().step_by(3).for_each(|number| *number = 0.0);
    let matrix = [Matrix::new(TensorFormat::Bf16, ROWS, COLS, &numbers)];
    let row = rng.normals(COLS);
    for mut backend in cpu_backends(&[2]) {
        let source = stacked(&matrix, WeightFormat::Bf16);
        check(&mut backend, &source, &row, 1, None, Epilogue::Store);
        let weight = backend.pack_weight(&source).expect("a good source");
        let alone = run(&mut backend, &weight, &row, 1, None, Epilogue::Store, &[0.0; ROWS]);
        for num_rows in [17, 48, 49, 130, 513] {
            let (x, out) = (row.repeat(num_rows), vec![0.0; num_rows * ROWS]);
            let out = run(&mut backend, &weight, &x, num_rows, None, Epilogue::Store, &out);
            for out in out.chunks_exact(ROWS) {
                assert_same_bits(out, &alone);
            }
        }
    }
}

/// Infinities among the weights reach their outputs and no others, whatever the other numbers' exponents are.
#[test]
fn infinite_weights_stay_in_their_output() {
    const COLS: usize = 100;
    let mut rng = Rng::new(14);
    for scale in [1e-6, 1.0, 1e6] {
        let mut numbers: Vec<f32> = rng.normals(70 * COLS).iter().map(|number| number * scale).collect();
        (numbers[5 * COLS + 99], numbers[69 * COLS]) = (f32::INFINITY, f32::NAN);
        let matrix = [Matrix::new(TensorFormat::Bf16, 70, COLS, &numbers)];
        let x = vec![1.0; 3 * COLS];
        for mut backend in cpu_backends(&[1]) {
            let weight = backend.pack_weight(&stacked(&matrix, WeightFormat::Bf16)).expect("a good source");
            let out = run(&mut backend, &weight, &x, 3, None, Epilogue::Store, &[0.0; 3 * 70]);
            for out in out.chunks_exact(70) {
                for (feature, out) in out.iter().enumerate() {
                    match feature {
                        5 => assert_eq!(*out, f32::INFINITY),
                        69 => assert!(out.is_nan()),
                        _ => assert!(out.is_finite(), "{:?}: {feature}", backend.isa()),
                    }
                }
            }
        }
    }
}
