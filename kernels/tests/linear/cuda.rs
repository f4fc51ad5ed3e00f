//! CUDA: the device code in the emulator, at sizes that it can do, and on a card.

use quire_kernels::cuda::Device;
use quire_kernels::ops::linear::{Epilogue, Linear, NormLinear, SQUARES_FEATURES, WeightShape, reference};
use quire_kernels::testing::{OpenDevice, POISON, Rng, Tolerance, assert_close, assert_same_bits};
use quire_kernels::weight_format::Codes;
use quire_kernels::{Backend, TensorFormat, WeightFormat, WeightLayout, WeightSource, device_tests};

use crate::support::{self, BLOCKS, FORMATS, Matrix, buffer, check, file_format, gate_up, grouped, run, stacked};

device_tests! {
    every_format_and_edge_is_near_the_reference: |open| every_format_and_edge_is_near_the_reference(open);
    gate_and_up_meet: |open| gate_and_up_meet(open);
    blocks_of_files_are_multiplied_as_they_are: |open| blocks_of_files_are_multiplied_as_they_are(open);
    blocks_of_fp8_are_multiplied_as_they_are: |open| open(None).iter_mut().for_each(support::blocks_of_fp8_are_multiplied_as_they_are);
    every_code_of_fp8_is_what_it_stands_for: |open| {
        open(None).iter_mut().for_each(support::every_code_of_fp8_is_what_it_stands_for);
    };
    swiglu_of_large_gates_has_no_overflow: |open| swiglu_of_large_gates_has_no_overflow(open);
    special_numbers_stay_in_their_row: |open| special_numbers_stay_in_their_row(open);
    a_row_has_the_same_bits_in_every_batch: |open| a_row_has_the_same_bits_in_every_batch(open);
    table_codes_and_minima_reach_every_lane: |open| table_codes_and_minima_reach_every_lane(open);
    packed_bytes_are_as_foretold: |open| packed_bytes_are_as_foretold(open);
    norms_come_with_products: |open| norms_come_with_products(open);
    a_row_has_the_same_bits_behind_a_norm: |open| a_row_has_the_same_bits_behind_a_norm(open);
}

fn every_format_and_edge_is_near_the_reference<D: Device>(open: OpenDevice<D>) {
    let Some(mut backend) = open(None) else { return };
    let mut rng = Rng::new(1);
    for format in FORMATS {
        for (num_rows, in_features, out_features) in
            [(1, 1, 1), (2, 31, 17), (5, 64, 129), (8, 260, 16), (9, 67, 15), (16, 132, 40), (17, 36, 33)]
        {
            let matrix = [Matrix::random(&mut rng, file_format(format), out_features, in_features)];
            let x = rng.outliers(num_rows * in_features);
            let bias = rng.normals(out_features);
            check(&mut backend, &stacked(&matrix, format), &x, num_rows, None, Epilogue::Store);
            check(&mut backend, &stacked(&matrix, format), &x, num_rows, Some(&bias), Epilogue::Add);
        }
    }
}

fn gate_and_up_meet<D: Device>(open: OpenDevice<D>) {
    let Some(mut backend) = open(None) else { return };
    let mut rng = Rng::new(2);
    for format in FORMATS {
        for (num_rows, in_features, num_outputs) in [(1, 64, 1), (3, 65, 31), (12, 132, 70)] {
            let parts = [TensorFormat::Bf16, TensorFormat::F32]
                .map(|part| Matrix::random(&mut rng, part, num_outputs, in_features));
            let x = rng.normals(num_rows * in_features);
            let bias = rng.normals(2 * num_outputs);
            let source = gate_up(&parts, format);
            check(&mut backend, &source, &x, num_rows, Some(&bias), Epilogue::SwiGlu);
            check(&mut backend, &source, &x, num_rows, Some(&bias), Epilogue::Add);
            check(&mut backend, &source, &x, num_rows, None, Epilogue::SwiGlu);
        }
    }
}

fn blocks_of_files_are_multiplied_as_they_are<D: Device>(open: OpenDevice<D>) {
    let Some(mut backend) = open(None) else { return };
    let mut rng = Rng::new(3);
    for block in BLOCKS {
        let matrix = [Matrix::random_blocks(&mut rng, block, 33, 512)];
        let format = WeightFormat::of_blocks(&[matrix[0].tensor()]).expect("blocks");
        check(&mut backend, &stacked(&matrix, format), &rng.outliers(3 * 512), 3, None, Epilogue::Store);
    }
}

fn swiglu_of_large_gates_has_no_overflow<D: Device>(open: OpenDevice<D>) {
    let Some(mut backend) = open(None) else { return };
    let parts = [Matrix::new(TensorFormat::F32, 1, 1, &[1.0]), Matrix::new(TensorFormat::F32, 1, 1, &[1.0])];
    for format in [WeightFormat::F32, WeightFormat::Bf16] {
        let weight = backend.pack_weight(&gate_up(&parts, format)).expect("a good source");
        let x = [-1e4, -100.0, -80.0, 0.0, 80.0, 1e4];
        let rounded = x.map(|x| if format == WeightFormat::Bf16 { half::bf16::from_f32(x).to_f32() } else { x });
        let out = run(&mut backend, &weight, &x, 6, None, Epilogue::SwiGlu, &[0.0; 6]);
        assert_eq!(out, [0.0, 0.0, out[2], 0.0, 6400.0, rounded[5] * rounded[5]]);
        assert!(out[2] >= 0.0 && out[2] < 1e-30);
    }
}

fn special_numbers_stay_in_their_row<D: Device>(open: OpenDevice<D>) {
    let Some(mut backend) = open(None) else { return };
    let mut rng = Rng::new(4);
    for format in FORMATS {
        let matrix = [Matrix::random(&mut rng, file_format(format), 20, 68)];
        let weight = backend.pack_weight(&stacked(&matrix, format)).expect("a good source");
        let mut x = rng.normals(9 * 68);
        let clean = run(&mut backend, &weight, &x, 9, None, Epilogue::Store, &[0.0; 9 * 20]);
        x[3 * 68 + 5] = f32::NAN;
        x[5 * 68 + 66] = f32::INFINITY;
        let dirty = run(&mut backend, &weight, &x, 9, None, Epilogue::Store, &[0.0; 9 * 20]);
        for row in 0..9 {
            let (clean, dirty) = (&clean[row * 20..][..20], &dirty[row * 20..][..20]);
            match row {
                3 => assert!(dirty.iter().all(|x| x.is_nan())),
                5 => assert!(dirty.iter().all(|x| !x.is_finite())),
                _ => assert_same_bits(dirty, clean),
            }
        }
    }
}

/// Promise 1: a row alone has the bits that it has in every batch, whichever kernel takes it, and whether one thread block
/// goes through all slices of a sum or each has its own.
fn a_row_has_the_same_bits_in_every_batch<D: Device>(open: OpenDevice<D>) {
    for (index, format) in FORMATS.into_iter().enumerate() {
        // Several slices, and a width whose rows cannot be copied 16 bytes at a time.
        let in_features = if index % 2 == 0 { 580 } else { 577 };
        let mut rng = Rng::new(5);
        let parts = [0, 1].map(|_| Matrix::random(&mut rng, file_format(format), 9, in_features));
        let row = rng.outliers(in_features);
        let before = rng.normals(18);
        for (layout, epilogue) in [(WeightLayout::Stacked, Epilogue::Add), (WeightLayout::GateUp, Epilogue::SwiGlu)] {
            let source = WeightSource { layout, ..stacked(&parts, format) };
            let out_cols = if layout == WeightLayout::GateUp { 9 } else { 18 };
            let mut alone: Option<Vec<f32>> = None;
            // So many multiprocessors that sums are cut, and so few that they are not.
            for mut backend in [1000, 1].into_iter().filter_map(|number| open(Some(number))) {
                let weight = backend.pack_weight(&source).expect("a good source");
                // The last of a tile that is not full, and one in the midst of a full one.
                for (num_rows, place) in [(1, 0), (8, 3), (9, 8), (20, 17), (33, 32), (70, 41), (130, 129)] {
                    // Rows around it that nobody looks at.
                    let mut x = vec![0.0; num_rows * in_features];
                    x[place * in_features..][..in_features].copy_from_slice(&row);
                    let before = before[..out_cols].repeat(num_rows);
                    let out = run(&mut backend, &weight, &x, num_rows, None, epilogue, &before);
                    let own = &out[place * out_cols..][..out_cols];
                    match &alone {
                        None => alone = Some(own.to_vec()),
                        Some(alone) => assert_same_bits(own, alone),
                    }
                }
            }
        }
    }
}

fn table_codes_and_minima_reach_every_lane<D: Device>(open: OpenDevice<D>) {
    let Some(mut backend) = open(None) else { return };
    let mut rng = Rng::new(6);
    for (format, block) in [
        (grouped(Codes::Iq4Nl, 32, false), TensorFormat::Iq4Nl),
        (grouped(Codes::Int4, 32, true), TensorFormat::Q4K),
        (grouped(Codes::Int8, 32, true), TensorFormat::Q5K),
    ] {
        let matrix = [Matrix::random_blocks(&mut rng, block, 140, 256)];
        for num_rows in [2, 40] {
            let x = rng.normals(num_rows * 256);
            check(&mut backend, &stacked(&matrix, format), &x, num_rows, None, Epilogue::Store);
        }
    }
}

fn packed_bytes_are_as_foretold<D: Device>(open: OpenDevice<D>) {
    let Some(backend) = open(None) else { return };
    for (format, bits) in FORMATS.into_iter().zip([32, 16, 8, 8, 8, 8, 4, 4]) {
        let shape = WeightShape { out_features: 256, in_features: 256, layout: WeightLayout::Stacked, format };
        let num_scales = match format {
            WeightFormat::Grouped(grouping) => 256 * 256 / grouping.group_len * if grouping.has_min { 2 } else { 1 },
            // Of four bytes.
            WeightFormat::Fp8 => 2 * 256 * 256 / 128,
            _ => 0,
        };
        assert_eq!(backend.weight_bytes(&shape), 256 * 256 * bits / 8 + num_scales * 2);
    }
}

const EPS: f32 = 1e-5;

/// What is added to a residual stream, and the product of what a norm makes of it.
struct Pair<'a> {
    adding: WeightSource<'a>,
    behind: WeightSource<'a>,
    norm_weight: &'a [f32],
    bias: &'a [f32],
    epilogue: Epilogue,
}

impl Pair<'_> {
    /// The stream after `a` was multiplied and added to `before`, its sums of squares, and the product behind the norm.
    fn run<B: Backend>(&self, backend: &mut B, a: &[f32], before: &[f32], num_rows: usize) -> [Vec<f32>; 3] {
        let [adding, behind] = [&self.adding, &self.behind].map(|source| backend.pack_weight(source).expect("good"));
        let (dim, num_squares) = (self.norm_weight.len(), self.norm_weight.len().div_ceil(SQUARES_FEATURES));
        let out_cols = self.bias.len() / if self.epilogue == Epilogue::SwiGlu { 2 } else { 1 };
        let a = buffer(backend, a);
        let mut stream = buffer(backend, before);
        let mut squares = buffer(backend, &vec![POISON; num_rows * num_squares]);
        let args = Linear { x: &a, num_rows, weight: &adding, bias: None, epilogue: Epilogue::Add, out: &mut stream };
        assert_eq!(backend.add_linear(args, &mut squares), Ok(true));
        let norm_weight = buffer(backend, self.norm_weight);
        let bias = buffer(backend, self.bias);
        let mut normed = buffer(backend, &vec![POISON; num_rows * dim]);
        let mut out = buffer(backend, &vec![POISON; num_rows * out_cols]);
        backend
            .norm_linear(NormLinear {
                x: &stream,
                squares: Some(&squares),
                norm_weight: &norm_weight,
                eps: EPS,
                normed: &mut normed,
                num_rows,
                in_features: dim,
                weight: &behind,
                bias: Some(&bias),
                epilogue: self.epilogue,
                out: &mut out,
            })
            .expect("arguments fit");
        [(&stream, dim), (&squares, num_squares), (&out, out_cols)].map(|(buffer, width)| {
            let mut numbers = vec![0.0; num_rows * width];
            backend.read_f32(buffer, 0, &mut numbers).expect("fits");
            numbers
        })
    }
}

fn norms_come_with_products<D: Device>(open: OpenDevice<D>) {
    let Some(mut backend) = open(None) else { return };
    let mut rng = Rng::new(8);
    for format in FORMATS {
        for (num_rows, dim, num_outputs) in [(1, 64, 33), (8, 260, 16), (9, 67, 17), (20, 132, 9), (40, 96, 20)] {
            let adding = [Matrix::random(&mut rng, file_format(format), dim, 50)];
            let behind = [Matrix::random(&mut rng, file_format(format), num_outputs, dim)];
            let (norm_weight, bias) = (rng.normals(dim), rng.normals(num_outputs));
            let pair = Pair {
                adding: stacked(&adding, format),
                behind: stacked(&behind, format),
                norm_weight: &norm_weight,
                bias: &bias,
                epilogue: Epilogue::Store,
            };
            let (a, before) = (rng.normals(num_rows * 50), rng.outliers(num_rows * dim));
            let [stream, squares, out] = pair.run(&mut backend, &a, &before, num_rows);
            // The stream is what a plain product adds.
            let weight = backend.pack_weight(&pair.adding).expect("a good source");
            assert_same_bits(&stream, &run(&mut backend, &weight, &a, num_rows, None, Epilogue::Add, &before));
            let scaled: Vec<f32> =
                stream.chunks(dim).flat_map(|row| row.iter().zip(&norm_weight).map(|(x, w)| x * w)).collect();
            let zeros = vec![0.0; num_rows * num_outputs];
            let expected = reference::linear(&scaled, num_rows, &pair.behind, None, Epilogue::Store, &zeros);
            for (row, x) in stream.chunks(dim).enumerate() {
                let sums =
                    x.chunks(SQUARES_FEATURES).map(|part| part.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>());
                let sums: Vec<f64> = sums.collect();
                let tolerance = Tolerance { abs: 0.0, rel: 1e-6 };
                assert_close(&squares[row * sums.len()..][..sums.len()], &sums, tolerance);
                let factor = (sums.iter().sum::<f64>() / dim as f64 + f64::from(EPS)).sqrt().recip();
                for (col, &bias) in bias.iter().enumerate() {
                    let index = row * num_outputs + col;
                    let wanted = factor * expected.sums[index] + f64::from(bias);
                    let chain = (6.0 * (dim as f64).sqrt()).max(4.0) + 16.0;
                    let allowed =
                        2.0_f64.powi(-24) * (chain * factor * expected.magnitudes[index] + 4.0 * wanted.abs());
                    let error = (f64::from(out[index]) - wanted).abs();
                    assert!(
                        error <= allowed,
                        "{format:?} {num_rows} {dim} [{row}, {col}]: {error:e}, allowed {allowed:e}"
                    );
                }
            }
        }
    }
}

/// Promise 1 with a norm on the way, whichever kernel takes a row and however many thread blocks share a sum.
fn a_row_has_the_same_bits_behind_a_norm<D: Device>(open: OpenDevice<D>) {
    for (index, format) in FORMATS.into_iter().enumerate() {
        let mut rng = Rng::new(9);
        let dim = if index % 2 == 0 { 580 } else { 577 };
        let adding = [Matrix::random(&mut rng, file_format(format), dim, 40)];
        let parts = [0, 1].map(|_| Matrix::random(&mut rng, file_format(format), 9, dim));
        let (norm_weight, bias) = (rng.normals(dim), rng.normals(18));
        let (a, before) = (rng.normals(40), rng.outliers(dim));
        for epilogue in [Epilogue::SwiGlu, Epilogue::Store] {
            let behind = if epilogue == Epilogue::SwiGlu { gate_up(&parts, format) } else { stacked(&parts, format) };
            let adding = stacked(&adding, format);
            let pair = Pair { adding, behind, norm_weight: &norm_weight, bias: &bias, epilogue };
            let mut alone: Option<Vec<f32>> = None;
            for mut backend in [1000, 1].into_iter().filter_map(|number| open(Some(number))) {
                for num_rows in [1, 8, 9, 17, 33, 70] {
                    let [_, _, out] = pair.run(&mut backend, &a.repeat(num_rows), &before.repeat(num_rows), num_rows);
                    let alone = alone.get_or_insert_with(|| out.clone());
                    out.chunks(alone.len()).for_each(|own| assert_same_bits(own, alone));
                }
            }
        }
    }
}
