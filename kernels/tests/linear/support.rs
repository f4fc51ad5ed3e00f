//! Matrices, and `linear` beside its reference, for every backend.

use quire_kernels::ops::linear::{Epilogue, Linear, reference};
use quire_kernels::testing::{POISON, Rng, encode};
use quire_kernels::weight_format::{Codes, Grouping};
use quire_kernels::{Backend, DType, HostTensor, TensorFormat, WeightFormat, WeightLayout, WeightSource, e4m3};

/// A matrix in a file's bytes, at an odd address.
pub(crate) struct Matrix {
    format: TensorFormat,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

impl Matrix {
    pub(crate) fn new(format: TensorFormat, rows: usize, cols: usize, numbers: &[f32]) -> Self {
        assert_eq!(numbers.len(), rows * cols);
        let mut bytes = vec![0];
        for &number in numbers {
            match format {
                TensorFormat::F32 => bytes.extend(number.to_le_bytes()),
                TensorFormat::Bf16 => bytes.extend(half::bf16::from_f32(number).to_le_bytes()),
                TensorFormat::F16 => bytes.extend(half::f16::from_f32(number).to_le_bytes()),
                _ => panic!("{} is no dense format", format.name()),
            }
        }
        Self { format, rows, cols, bytes }
    }

    pub(crate) fn random(rng: &mut Rng, format: TensorFormat, rows: usize, cols: usize) -> Self {
        let numbers: Vec<f32> = rng.normals(rows * cols).iter().map(|x| x * 0.1).collect();
        Self::new(format, rows, cols, &numbers)
    }

    /// Numbers that are rounded to the blocks of a file.
    pub(crate) fn encoded(rng: &mut Rng, format: TensorFormat, rows: usize, cols: usize) -> Self {
        let numbers: Vec<f32> = rng.normals(rows * cols).iter().map(|x| x * 0.1).collect();
        Self { format, rows, cols, bytes: [vec![0], encode(format, &numbers)].concat() }
    }

    /// Blocks of any codes, with scales and minima (both f16, at `scale_places` of a block) below 0.1.
    pub(crate) fn random_blocks(rng: &mut Rng, format: TensorFormat, rows: usize, cols: usize) -> Self {
        let scale_places: &[usize] = match format {
            TensorFormat::Q4_1 | TensorFormat::Q5_1 | TensorFormat::Q4K | TensorFormat::Q5K => &[0, 2],
            TensorFormat::Q6K => &[208],
            _ => &[0],
        };
        let num_bytes = rows * format.row_bytes(cols).expect("whole blocks");
        let mut bytes: Vec<u8> = (0..=num_bytes).map(|_| rng.below(256) as u8).collect();
        for block in bytes[1..].chunks_exact_mut(format.block_bytes()) {
            for &place in scale_places {
                let scale = half::f16::from_f32(0.1 * (rng.below(2001) as f32 / 1000.0 - 1.0));
                block[place..place + 2].copy_from_slice(&scale.to_le_bytes());
            }
        }
        Self { format, rows, cols, bytes }
    }

    pub(crate) fn tensor(&self) -> HostTensor<'_> {
        HostTensor { format: self.format, rows: self.rows, cols: self.cols, bytes: &self.bytes[1..] }
    }
}

pub(crate) fn stacked(matrices: &[Matrix], format: WeightFormat) -> WeightSource<'_> {
    WeightSource { parts: matrices.iter().map(Matrix::tensor).collect(), layout: WeightLayout::Stacked, format }
}

pub(crate) fn gate_up(matrices: &[Matrix], format: WeightFormat) -> WeightSource<'_> {
    WeightSource { layout: WeightLayout::GateUp, ..stacked(matrices, format) }
}

pub(crate) fn buffer<B: Backend>(backend: &mut B, numbers: &[f32]) -> B::Buffer {
    let mut buffer = backend.alloc(DType::F32, numbers.len()).expect("small");
    backend.write_f32(&mut buffer, 0, numbers).expect("fits");
    buffer
}

/// Runs `linear` on `x`, behind which (and behind `out`) lies memory that nothing may read or write.
pub(crate) fn run<B: Backend>(
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
pub(crate) fn check<B: Backend>(
    backend: &mut B,
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
            "{} {:?} [{num_rows}, {in_features}] x [{out_features}, {in_features}], {epilogue:?}: \
             [{row}, {col}] is {actual:e}, expected {wanted:e}, off by {error:e}, allowed {allowed:e}",
            backend.info().isa,
            source.format,
        );
    }
}

pub(crate) const fn grouped(codes: Codes, group_len: usize, has_min: bool) -> WeightFormat {
    WeightFormat::Grouped(Grouping { codes, group_len, has_min })
}

/// All that numbers can be rounded to when they are packed.
pub(crate) const FORMATS: [WeightFormat; 8] = [
    WeightFormat::F32,
    WeightFormat::Bf16,
    WeightFormat::Fp8,
    grouped(Codes::Int8, 128, false),
    grouped(Codes::Int8, 32, false),
    grouped(Codes::Int8, 32, true),
    grouped(Codes::Int4, 32, false),
    grouped(Codes::Int4, 32, true),
];

/// Weights of 8-bit floats are multiplied as they are in their file; one that is no number makes its output none, and no other.
pub(crate) fn blocks_of_fp8_are_multiplied_as_they_are<B: Backend>(backend: &mut B) {
    let mut rng = Rng::new(11);
    for (num_rows, out_features, in_features) in [(1, 33, 256), (12, 140, 384)] {
        let mut matrix = [Matrix::encoded(&mut rng, TensorFormat::F8E4M3, out_features, in_features)];
        let format = WeightFormat::of_blocks(&[matrix[0].tensor()]).expect("blocks");
        assert_eq!(format, WeightFormat::Fp8);
        let x = rng.outliers(num_rows * in_features);
        check(backend, &stacked(&matrix, format), &x, num_rows, None, Epilogue::Store);
        let row_bytes = TensorFormat::F8E4M3.row_bytes(in_features).expect("whole blocks");
        matrix[0].bytes[1 + 5 * row_bytes + 132 + 4 + 77] = 0xff;
        let weight = backend.pack_weight(&stacked(&matrix, format)).expect("a good source");
        let before = vec![0.0; num_rows * out_features];
        let out = run(backend, &weight, &x, num_rows, None, Epilogue::Store, &before);
        for (index, y) in out.iter().enumerate() {
            assert_eq!(y.is_nan(), index % out_features == 5, "{index}");
        }
    }
}

/// Every code of 8-bit floats in every place of a step, alone: rows of x are one at one place, and zeros. Those that are no
/// number are left out.
pub(crate) fn every_code_of_fp8_is_what_it_stands_for<B: Backend>(backend: &mut B) {
    let (out_features, in_features) = (256, 128);
    let code_at = |feature: usize, input: usize| {
        let code = (feature + input) as u8;
        if e4m3::is_nan(code) { 0 } else { code }
    };
    let mut bytes = vec![0];
    for feature in 0..out_features {
        bytes.extend(1.0_f32.to_le_bytes());
        bytes.extend((0..in_features).map(|input| code_at(feature, input)));
    }
    let matrix = [Matrix { format: TensorFormat::F8E4M3, rows: out_features, cols: in_features, bytes }];
    let weight = backend.pack_weight(&stacked(&matrix, WeightFormat::Fp8)).expect("a good source");
    for num_rows in [8, 32, 64] {
        let mut x = vec![0.0; num_rows * in_features];
        (0..num_rows).for_each(|row| x[row * in_features + row] = 1.0);
        let before = vec![0.0; num_rows * out_features];
        let out = run(backend, &weight, &x, num_rows, None, Epilogue::Store, &before);
        for (index, &y) in out.iter().enumerate() {
            let (row, feature) = (index / out_features, index % out_features);
            assert_eq!(y, e4m3::to_f32(code_at(feature, row)), "{num_rows} rows, feature {feature}, input {row}");
        }
    }
}

/// What a file would hold of it.
pub(crate) fn file_format(format: WeightFormat) -> TensorFormat {
    if format == WeightFormat::F32 { TensorFormat::F32 } else { TensorFormat::Bf16 }
}

/// The block formats of files.
pub(crate) const BLOCKS: [TensorFormat; 9] = [
    TensorFormat::Q8_0,
    TensorFormat::Q4_0,
    TensorFormat::Q4_1,
    TensorFormat::Q5_0,
    TensorFormat::Q5_1,
    TensorFormat::Q4K,
    TensorFormat::Q5K,
    TensorFormat::Q6K,
    TensorFormat::Iq4Nl,
];
