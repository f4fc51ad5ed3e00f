//! `paged_attention` at the heads of a model of half a billion and of 8 billion parameters, for every type of cache, beside
//! what the machine can do at most.
//!
//! A table first (best of several runs, since other work disturbs single ones; on tiles also without them), then criterion's
//! statistics of the cases that match a filter: `cargo bench --bench paged_attention -- --quick bf16` for a short look, `-- none` for the table.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use quire_kernels::cpu::{CpuBackend, CpuBuffer, CpuConfig, CpuKv, Isa, peaks};
use quire_kernels::ops::paged_attention::PagedAttention;
use quire_kernels::ops::rope_kv_write::AttentionShape;
use quire_kernels::testing::Rng;
use quire_kernels::{Backend, DType, KvLayout};

const SHAPES: [AttentionShape; 2] = [
    AttentionShape { num_heads: 14, num_kv_heads: 2, head_dim: 64 },
    AttentionShape { num_heads: 32, num_kv_heads: 8, head_dim: 128 },
];

/// Sequences, new tokens of each, tokens in the cache of each.
const BATCHES: [(usize, usize, usize); 10] = [
    (1, 1, 1024),
    (8, 1, 1024),
    (32, 1, 1024),
    (1, 1, 8192),
    (8, 1, 8192),
    (32, 1, 8192),
    (1, 512, 512),
    (1, 2048, 2048),
    (1, 512, 8192),
    (8, 64, 1024),
];

const DTYPES: [DType; 4] = [DType::Bf16, DType::I8, DType::F8E4M3, DType::F32];

const BLOCK_SIZE: usize = 16;

/// More than the largest processor cache: layers take turns, as in a step.
const CACHE_BYTES: usize = 1 << 30;

struct Case {
    shape: AttentionShape,
    num_seqs: usize,
    num_tokens: usize,
    max_num_blocks: usize,
    num_layers: usize,
    qkv: CpuBuffer,
    out: CpuBuffer,
    lists: [CpuBuffer; 4],
    kv: CpuKv,
    /// Of K and V that are looked at, each once per group.
    num_bytes: usize,
    /// Two products per pair of query and visible token.
    num_flops: usize,
}

impl Case {
    fn new(backend: &mut CpuBackend, shape: AttentionShape, dtype: DType, batch: (usize, usize, usize)) -> Self {
        let (num_seqs, q_len, context_len) = batch;
        let mut rng = Rng::new(1);
        let max_num_blocks = context_len.div_ceil(BLOCK_SIZE);
        let num_blocks = num_seqs * max_num_blocks;
        let AttentionShape { num_kv_heads, head_dim, .. } = shape;
        let layout = KvLayout { num_layers: 1, num_blocks, block_size: BLOCK_SIZE, num_kv_heads, head_dim, dtype };
        let num_layers = CACHE_BYTES.div_ceil(layout.total_bytes());
        let mut kv = backend.alloc_kv(&KvLayout { num_layers, ..layout }).expect("memory");
        // The same numbers again and again: there are many of them, and their values do not change the pace.
        let numbers: Vec<f32> = (0..1 << 16).map(|_| rng.uniform()).collect();
        match dtype {
            DType::F32 => {
                for part in kv.f32_mut("bench").expect("f32").chunks_mut(numbers.len()) {
                    part.copy_from_slice(&numbers[..part.len()]);
                }
            }
            DType::I8 | DType::F8E4M3 => {
                // A part is whole heads of a block, so that scales are scales.
                let layout = *kv.layout();
                let mut part = vec![1; layout.head_bytes()];
                for (code, &x) in part.iter_mut().zip(numbers.iter().cycle()).take(2 * layout.v_offset()) {
                    *code = (x * 127.0) as i8;
                }
                for (code, byte) in part[2 * layout.v_offset()..].iter_mut().zip(0.01_f32.to_le_bytes().iter().cycle())
                {
                    *code = *byte as i8;
                }
                for head in kv.i8_mut("bench").expect("int8").chunks_exact_mut(part.len()) {
                    head.copy_from_slice(&part);
                }
            }
            _ => {
                let numbers: Vec<u16> = numbers.iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect();
                for part in kv.bf16_mut("bench").expect("bf16").chunks_mut(numbers.len()) {
                    part.copy_from_slice(&numbers[..part.len()]);
                }
            }
        }
        let num_tokens = num_seqs * q_len;
        let mut qkv = backend.alloc(DType::F32, num_tokens * shape.qkv_len()).expect("memory");
        backend.write_f32(&mut qkv, 0, &rng.normals(num_tokens * shape.qkv_len())).expect("fits");
        let out = backend.alloc(DType::F32, num_tokens * shape.q_len()).expect("memory");
        let lists = [
            (0..=num_seqs).map(|seq| (seq * q_len) as u32).collect(),
            vec![context_len as u32; num_seqs],
            rng.permutation(num_blocks),
            (0..num_seqs as u32).collect::<Vec<_>>(),
        ];
        let lists = lists.map(|list| {
            let mut buffer = backend.alloc(DType::U32, list.len()).expect("memory");
            backend.write_u32(&mut buffer, 0, &list).expect("fits");
            buffer
        });
        let num_bytes = layout.total_bytes();
        let num_pairs = num_seqs * (0..q_len).map(|token| context_len - token).sum::<usize>();
        let num_flops = num_pairs * shape.q_len() * 4;
        Self { shape, num_seqs, num_tokens, max_num_blocks, num_layers, qkv, out, lists, kv, num_bytes, num_flops }
    }

    fn run(&mut self, backend: &mut CpuBackend, layer: usize) {
        let [cu_seqlens_q, context_lens, block_tables, rows] = &self.lists;
        let args = PagedAttention {
            qkv: &self.qkv,
            num_tokens: self.num_tokens,
            num_seqs: self.num_seqs,
            shape: self.shape,
            scale: 0.1,
            window: None,
            cu_seqlens_q,
            context_lens,
            block_tables,
            max_num_blocks: self.max_num_blocks,
            rows,
            kv: &self.kv,
            layer,
            out: &mut self.out,
        };
        backend.paged_attention(args).expect("arguments fit");
    }
}

fn best_seconds(mut work: impl FnMut()) -> f64 {
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed() < Duration::from_millis(700) {
        let start = Instant::now();
        work();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

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
        "peaks: read {:.1} GB/s, bf16 {:.0} GFLOP/s, f32 {:.0} GFLOP/s",
        limits.read_bytes_per_second / 1e9,
        limits.bf16_flops_per_second / 1e9,
        limits.f32_flops_per_second / 1e9
    );
    // bf16 may be multiplied as such or widened, whatever is faster.
    let peak_flops = limits.bf16_flops_per_second.max(limits.f32_flops_per_second);
    let has_tiles = backend.isa() == Isa::Amx;
    let mut without_tiles =
        has_tiles.then(|| CpuBackend::new(CpuConfig { num_threads, isa: Some(Isa::Avx512) }).expect("threads"));
    println!(
        "{:>16} {:>16} {:>12} {:>8} {:>6} {:>9} {:>6}{}",
        "heads",
        "seqs x new/all",
        "best",
        "GB/s",
        "%",
        "GFLOP/s",
        "%",
        if has_tiles { "   without tiles" } else { "" }
    );
    let name = |(shape, dtype): (AttentionShape, DType)| {
        format!("{} {}/{}x{}", dtype.name(), shape.num_heads, shape.num_kv_heads, shape.head_dim)
    };
    let kinds = || SHAPES.into_iter().flat_map(|shape| DTYPES.map(|dtype| (shape, dtype)));
    for kind in kinds() {
        for batch in BATCHES {
            let mut case = Case::new(&mut backend, kind.0, kind.1, batch);
            let (num_layers, mut layer) = (case.num_layers, 0);
            let mut best = |backend: &mut CpuBackend| {
                best_seconds(|| {
                    case.run(backend, layer % num_layers);
                    layer += 1;
                })
            };
            let before = without_tiles.as_mut().map(&mut best);
            let seconds = best(&mut backend);
            let (bytes, flops) = (case.num_bytes as f64 / seconds, case.num_flops as f64 / seconds);
            println!(
                "{:>16} {:>16} {:>9.1} us {:>8.1} {:>6.1} {:>9.1} {:>6.1}{}",
                name(kind),
                format!("{}x{}/{}", batch.0, batch.1, batch.2),
                seconds * 1e6,
                bytes / 1e9,
                100.0 * bytes / limits.read_bytes_per_second,
                flops / 1e9,
                100.0 * flops / peak_flops,
                before.map_or(String::new(), |before| format!(" {:>9.1} us {:.2} x", before * 1e6, before / seconds)),
            );
        }
    }

    let mut group = criterion.benchmark_group("paged_attention");
    for kind in kinds() {
        for batch in BATCHES {
            let id = BenchmarkId::new(name(kind), format!("{}x{}/{}", batch.0, batch.1, batch.2));
            let mut case = None;
            group.bench_function(id, |bencher| {
                // Made only where the filter lets it through.
                let case = case.get_or_insert_with(|| Case::new(&mut backend, kind.0, kind.1, batch));
                let (num_layers, mut layer) = (case.num_layers, 0);
                bencher.iter(|| {
                    case.run(&mut backend, layer % num_layers);
                    layer += 1;
                });
            });
        }
    }
    group.finish();
    criterion.final_summary();
}
