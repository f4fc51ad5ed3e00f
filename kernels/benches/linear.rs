//! `linear` at the shapes of a small model, beside what the machine can do at most.
//!
//! A table first (the fast calls, since other work disturbs single ones), then criterion's statistics.
//! `cargo bench --bench linear -- table` prints the table alone, `-- table/bf16` that of a format.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use quire_kernels::cpu::{CpuBackend, CpuBuffer, CpuConfig, CpuWeight, peaks};
use quire_kernels::ops::linear::{Epilogue, Linear};
use quire_kernels::testing::Rng;
use quire_kernels::weight_format::{Codes, Grouping};
use quire_kernels::{Backend, DType, HostTensor, TensorFormat, WeightFormat, WeightLayout, WeightSource};

/// Output and input features: projections of a model of 0.5 billion parameters, and its vocabulary.
const SHAPES: [(usize, usize); 4] = [(1152, 896), (9728, 896), (896, 4864), (151_936, 896)];
const NUM_ROWS: [usize; 4] = [1, 8, 32, 512];

/// `--quantize fp8`, `int8` and `int4`, and what `Q8_0` and `Q4_0` files hold.
const FORMATS: [(&str, WeightFormat); 6] = [
    ("bf16", WeightFormat::Bf16),
    ("fp8", WeightFormat::Fp8),
    ("int8", WeightFormat::int8(128)),
    ("q8_0", WeightFormat::Grouped(Grouping { codes: Codes::Int8, group_len: 32, has_min: false })),
    ("int4", WeightFormat::int4()),
    ("q4_0", WeightFormat::Grouped(Grouping { codes: Codes::Int4, group_len: 32, has_min: false })),
];

struct Case {
    weight: CpuWeight,
    x: CpuBuffer,
    out: CpuBuffer,
    num_rows: usize,
    num_bytes: usize,
    num_flops: usize,
}

impl Case {
    fn new(
        backend: &mut CpuBackend,
        (out_features, in_features): (usize, usize),
        format: WeightFormat,
        num_rows: usize,
    ) -> Self {
        let mut rng = Rng::new(1);
        // Speed does not depend on the numbers as long as they are normal ones: one random row, repeated.
        let row: Vec<u8> =
            rng.normals(in_features).iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
        let bytes = row.repeat(out_features);
        let part = HostTensor { format: TensorFormat::Bf16, rows: out_features, cols: in_features, bytes: &bytes };
        let source = WeightSource { parts: vec![part], layout: WeightLayout::Stacked, format };
        let weight = backend.pack_weight(&source).expect("memory");
        let mut x = backend.alloc(DType::F32, num_rows * in_features).expect("memory");
        backend.write_f32(&mut x, 0, &rng.normals(num_rows * in_features)).expect("fits");
        let out = backend.alloc(DType::F32, num_rows * out_features).expect("memory");
        let num_bytes = backend.weight_bytes(weight.shape());
        Self { weight, x, out, num_rows, num_bytes, num_flops: 2 * num_rows * out_features * in_features }
    }

    fn run(&mut self, backend: &mut CpuBackend) {
        let Self { weight, x, out, num_rows, .. } = self;
        let args = Linear { x, num_rows: *num_rows, weight, bias: None, epilogue: Epilogue::Store, out };
        backend.linear(args).expect("arguments fit");
    }
}

/// Seconds of a call: the tenth part of calls are faster. Other work on the machine slows many calls down, and now and
/// then one finds its weights in a cache by luck.
fn seconds_per_call(cases: &mut [Case], backend: &mut CpuBackend) -> f64 {
    let (start, mut seconds) = (Instant::now(), Vec::new());
    while start.elapsed() < Duration::from_millis(700) {
        for case in &mut *cases {
            let start = Instant::now();
            case.run(backend);
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 10]
}

/// More than the largest cache, to be read between runs: a step reads all other weights before it comes back to one.
const EVICT_BYTES: usize = 1 << 30;

fn main() {
    let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut backend = CpuBackend::new(CpuConfig { num_threads, isa: None }).expect("threads");
    let mut criterion = Criterion::default()
        .configure_from_args()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1));

    let limits = peaks::measure(&backend).expect("memory");
    println!("{:?}", backend.info());
    println!(
        "peaks: read {:.1} GB/s, bf16 {:.0} GFLOP/s, int8 {:.0} GOP/s, f32 {:.0} GFLOP/s",
        limits.read_bytes_per_second / 1e9,
        limits.bf16_flops_per_second / 1e9,
        limits.int8_ops_per_second / 1e9,
        limits.f32_flops_per_second / 1e9
    );
    println!(
        "{:>6} {:>5} {:>14} {:>10} {:>8} {:>6} {:>9} {:>6}",
        "format", "rows", "weight", "a call", "GB/s", "%", "GFLOP/s", "%"
    );
    let named = std::env::args().find_map(|arg| arg.strip_prefix("table/").map(str::to_owned));
    for (name, format) in FORMATS {
        if named.as_ref().is_some_and(|named| named != name) {
            continue;
        }
        let peak = match format {
            WeightFormat::Grouped(_) => limits.int8_ops_per_second,
            _ => limits.bf16_flops_per_second,
        };
        for shape in SHAPES {
            for num_rows in NUM_ROWS {
                // Enough weights in a row that none is left in a cache when its turn comes again.
                let mut cases = vec![Case::new(&mut backend, shape, format, num_rows)];
                let num_copies = if num_rows > 32 { 1 } else { EVICT_BYTES.div_ceil(cases[0].num_bytes) };
                cases.extend((1..num_copies).map(|_| Case::new(&mut backend, shape, format, num_rows)));
                let seconds = seconds_per_call(&mut cases, &mut backend);
                let (bytes, flops) = (cases[0].num_bytes as f64 / seconds, cases[0].num_flops as f64 / seconds);
                println!(
                    "{name:>6} {num_rows:>5} {:>14} {:>7.1} us {:>8.1} {:>6.1} {:>9.1} {:>6.1}",
                    format!("{}x{}", shape.0, shape.1),
                    seconds * 1e6,
                    bytes / 1e9,
                    100.0 * bytes / limits.read_bytes_per_second,
                    flops / 1e9,
                    100.0 * flops / peak,
                );
            }
        }
    }

    let mut group = criterion.benchmark_group("linear");
    for shape in SHAPES {
        for num_rows in NUM_ROWS {
            if num_rows * shape.0 > 1 << 24 {
                // Seconds each, and nobody asks for the logits of 512 tokens at once.
                continue;
            }
            let mut case = Case::new(&mut backend, shape, WeightFormat::Bf16, num_rows);
            group.throughput(Throughput::Elements(case.num_flops as u64));
            group.bench_function(BenchmarkId::new(format!("{}x{}", shape.0, shape.1), num_rows), |bencher| {
                bencher.iter(|| case.run(&mut backend));
            });
        }
    }
    group.finish();
    criterion.final_summary();
}
