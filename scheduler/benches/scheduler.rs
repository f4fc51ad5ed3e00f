//! Plan and apply at several loads, and the block bookkeeping alone.
//!
//! `cargo bench -p quire-scheduler`. The target is 20 microseconds a step at 256 running sequences.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use quire_scheduler::testing::{TimingOptions, time_decode_steps};
use quire_scheduler::{BlockAllocator, BlockHash, CacheSalt, PrefixCache};

/// Steps timed in one run, so that the cache of a run stays as small as a server's.
const MAX_STEPS: u64 = 1024;

fn steps(criterion: &mut Criterion) {
    for (name, enable_prefix_cache) in [("plan+apply", true), ("plan+apply, no prefix cache", false)] {
        let mut group = criterion.benchmark_group(name);
        for num_seqs in [1, 32, 256] {
            group.throughput(Throughput::Elements(u64::from(num_seqs)));
            group.bench_function(BenchmarkId::from_parameter(num_seqs), |bencher| {
                bencher.iter_custom(|num_iterations| {
                    let origin = Instant::now();
                    let mut clock = || origin.elapsed().as_nanos() as u64;
                    let mut nanos = 0;
                    let mut num_left = num_iterations;
                    while num_left > 0 {
                        let num_steps = num_left.min(MAX_STEPS) as u32;
                        let options = TimingOptions { num_seqs, num_steps, enable_prefix_cache, ..Default::default() };
                        let timings = time_decode_steps(&options, &mut clock);
                        nanos += timings.iter().map(|timing| timing.plan_nanos + timing.apply_nanos).sum::<u64>();
                        num_left -= u64::from(num_steps);
                    }
                    Duration::from_nanos(nanos)
                });
            });
        }
    }
}

fn blocks(criterion: &mut Criterion) {
    let tokens: Vec<u32> = (0..16).collect();
    let root = BlockHash::root(&CacheSalt::default(), None);
    criterion.bench_function("hash of a block of 16", |bencher| {
        let mut parent = root;
        bencher.iter(|| parent = parent.child([black_box(&tokens), &[]]));
    });
    criterion.bench_function("allocate and release a block", |bencher| {
        let mut allocator = BlockAllocator::new(4096);
        bencher.iter(|| {
            let allocation = allocator.allocate().expect("all are free");
            allocator.release(black_box(allocation.block))
        });
    });
    criterion.bench_function("look up a prefix block", |bencher| {
        let mut cache = PrefixCache::new(4096);
        let mut allocator = BlockAllocator::new(4096);
        let chain: Vec<BlockHash> =
            std::iter::successors(Some(root), |parent| Some(parent.child([&tokens, &[]]))).take(4096).collect();
        for hash in &chain {
            cache.insert(*hash, allocator.allocate().expect("one for each").block);
        }
        let mut hashes = chain.iter().cycle();
        bencher.iter(|| cache.get(hashes.next().expect("endless")));
    });
}

criterion_group!(benches, steps, blocks);
criterion_main!(benches);
