//! `paged_attention` at the heads of a model of 1 and of 8 billion parameters, beside what the machine can do at most.
//!
//! A table first (best of several runs, since other work disturbs single ones), then criterion's statistics.
//! `cargo bench --bench paged_attention -- --quick` for a short look; the cache is bf16.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use quire_kernels::cpu::{CpuBackend, CpuBuffer, CpuConfig, CpuKv, peaks};
use quire_kernels::ops::paged_attention::PagedAttention;
use quire_kernels::ops::rope_kv_write::AttentionShape;
use quire_kernels::testing::Rng;
use quire_kernels::{Backend, DType, KvLayout};

const SHAPES: [AttentionShape; 2] = [
    AttentionShape { num_heads: 32, num_kv_heads: 8, head_dim: 64 },
    AttentionShape { num_heads: 32, num_kv_heads: 8, head_dim: 128 },
];

/// Sequences, new tokens of each, tokens in the cache of each.
const BATCHES: [(usize, usize, usize); 7] =
    [(1, 1, 512), (1, 1, 4096), (1, 1, 32_768), (32, 1, 1024), (1, 512, 512), (1, 512, 4096), (8, 64, 1024)];

const BLOCK_SIZE: usize = 16;

/// More than the largest cache: layers take turns, as in a step.
const CACHE_BYTES: usize = 96 << 20;

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
    fn new(backend: &mut CpuBackend, shape: AttentionShape, batch: (usize, usize, usize)) -> Self {
        let (num_seqs, q_len, context_len) = batch;
        let mut rng = Rng::new(1);
        let max_num_blocks = context_len.div_ceil(BLOCK_SIZE);
        let num_blocks = num_seqs * max_num_blocks;
        let AttentionShape { num_kv_heads, head_dim, .. } = shape;
        let dtype = DType::Bf16;
        let layout = KvLayout { num_layers: 1, num_blocks, block_size: BLOCK_SIZE, num_kv_heads, head_dim, dtype };
        let num_layers = CACHE_BYTES.div_ceil(layout.total_bytes());
        let mut kv = backend.alloc_kv(&KvLayout { num_layers, ..layout }).expect("memory");
        for number in kv.bf16_mut("bench").expect("bf16") {
            *number = half::bf16::from_f32(rng.uniform()).to_bits();
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
        let num_bytes = num_seqs * context_len * 2 * num_kv_heads * head_dim * 2;
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
        "peaks: read {:.1} GB/s, bf16 {:.0} GFLOP/s",
        limits.read_bytes_per_second / 1e9,
        limits.bf16_flops_per_second / 1e9
    );
    println!(
        "{:>12} {:>16} {:>12} {:>8} {:>6} {:>9} {:>6}",
        "heads", "seqs x new/all", "best", "GB/s", "%", "GFLOP/s", "%"
    );
    let name = |shape: AttentionShape| format!("{}/{}x{}", shape.num_heads, shape.num_kv_heads, shape.head_dim);
    for shape in SHAPES {
        for batch in BATCHES {
            let mut case = Case::new(&mut backend, shape, batch);
            let num_layers = case.num_layers;
            let mut layer = 0;
            let seconds = best_seconds(|| {
                case.run(&mut backend, layer % num_layers);
                layer += 1;
            });
            let (bytes, flops) = (case.num_bytes as f64 / seconds, case.num_flops as f64 / seconds);
            println!(
                "{:>12} {:>16} {:>9.1} us {:>8.1} {:>6.1} {:>9.1} {:>6.1}",
                name(shape),
                format!("{}x{}/{}", batch.0, batch.1, batch.2),
                seconds * 1e6,
                bytes / 1e9,
                100.0 * bytes / limits.read_bytes_per_second,
                flops / 1e9,
                100.0 * flops / limits.bf16_flops_per_second,
            );
        }
    }

    let mut group = criterion.benchmark_group("paged_attention");
    for shape in SHAPES {
        for batch in BATCHES {
            let mut case = Case::new(&mut backend, shape, batch);
            let (num_layers, mut layer) = (case.num_layers, 0);
            group.throughput(Throughput::Bytes(case.num_bytes as u64));
            let id = BenchmarkId::new(name(shape), format!("{}x{}/{}", batch.0, batch.1, batch.2));
            group.bench_function(id, |bencher| {
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
