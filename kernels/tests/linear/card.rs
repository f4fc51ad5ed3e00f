//! CUDA at the shapes of real models, which only a card can do in time.

use quire_kernels::ops::linear::Epilogue;
use quire_kernels::testing::{Rng, assert_same_bits, card};
use quire_kernels::{Backend, WeightFormat};

use crate::support::{FORMATS, Matrix, check, file_format, run, stacked};

#[test]
fn shapes_of_models_are_near_the_reference_on_a_card() {
    let Some(mut backend) = card(None) else { return };
    let mut rng = Rng::new(1);
    for format in FORMATS {
        for (num_rows, in_features, out_features) in
            [(1, 4096, 1024), (3, 14_336, 256), (33, 4096, 384), (64, 2048, 640), (129, 1024, 512), (300, 896, 200)]
        {
            let matrix = [Matrix::random(&mut rng, file_format(format), out_features, in_features)];
            let x = rng.outliers(num_rows * in_features);
            let bias = rng.normals(out_features);
            check(&mut backend, &stacked(&matrix, format), &x, num_rows, Some(&bias), Epilogue::Add);
        }
    }
}

/// Promise 1 at the sizes of batches and prompts that are served.
#[test]
fn a_row_has_the_same_bits_in_every_batch_on_a_card() {
    let Some(mut backend) = card(None) else { return };
    let mut rng = Rng::new(2);
    for format in FORMATS {
        let (in_features, out_features) = (4096, 1280);
        let matrix = [Matrix::random(&mut rng, file_format(format), out_features, in_features)];
        let weight = backend.pack_weight(&stacked(&matrix, format)).expect("a good source");
        let row = rng.outliers(in_features);
        let mut rows = |num_rows: usize| {
            let before = vec![0.0; num_rows * out_features];
            run(&mut backend, &weight, &row.repeat(num_rows), num_rows, None, Epilogue::Store, &before)
        };
        let alone = rows(1);
        let most = if format == WeightFormat::F32 { 256 } else { 4096 };
        for num_rows in (2..=64).chain([65, 100, 128, 129, 200, 256, 1000, 4096]).filter(|&num| num <= most) {
            rows(num_rows).chunks_exact(out_features).for_each(|own| assert_same_bits(own, &alone));
        }
    }
}
