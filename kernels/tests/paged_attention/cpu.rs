//! The CPU, on every instruction set.

use quire_kernels::cpu::CpuBackend;
use quire_kernels::ops::paged_attention::PagedAttention;
use quire_kernels::testing::{Rng, Tolerance, assert_close, assert_same_bits, cpu_backends};
use quire_kernels::{Backend, DType, KernelError, KvLayout};

use crate::support::{DTYPES, Step, World, last, shape, whole};

fn check(world: &World, backends: &mut [CpuBackend], steps: &[Step]) {
    let kv = world.cache(&mut backends[0], steps);
    let expected = world.expected(&kv, steps);
    for backend in backends {
        assert_close(&world.attend(backend, &kv, steps), &expected, world.tolerance());
    }
}

#[test]
fn one_query_over_contexts_of_all_lengths() {
    let mut rng = Rng::new(1);
    let lens = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 511, 512, 513, 1025];
    let mut backends = cpu_backends(&[1, 2]);
    for (shape, block_size) in [(shape(4, 1, 8), 16), (shape(7, 1, 64), 32), (shape(2, 2, 128), 64)] {
        for dtype in DTYPES {
            check(&World::new(&mut rng, shape, block_size, dtype, &lens), &mut backends, &last(&lens));
        }
    }
}

#[test]
fn prefills_of_all_lengths() {
    let mut rng = Rng::new(2);
    let lens = [1, 2, 15, 16, 17, 64, 65, 130];
    let mut backends = cpu_backends(&[1, 2]);
    for (shape, block_size) in [(shape(4, 1, 16), 16), (shape(7, 1, 8), 48), (shape(3, 3, 24), 16)] {
        for dtype in DTYPES {
            check(&World::new(&mut rng, shape, block_size, dtype, &lens), &mut backends, &whole(&lens));
        }
    }
}

#[test]
fn every_group_and_head_dim() {
    let mut rng = Rng::new(3);
    let lens = [70, 19];
    let mut backends = cpu_backends(&[1]);
    for head_dim in [2, 8, 14, 16, 24, 40, 64, 80, 96, 112, 128, 192, 256] {
        for (num_heads, num_kv_heads) in [(1, 1), (2, 2), (8, 2), (7, 1), (5, 1), (70, 1)] {
            for dtype in DTYPES {
                let world = World::new(&mut rng, shape(num_heads, num_kv_heads, head_dim), 16, dtype, &lens);
                let steps = [Step { seq: 0, from: 66, to: 70 }, Step { seq: 1, from: 18, to: 19 }];
                check(&world, &mut backends, &steps);
            }
        }
    }
}

#[test]
fn decodes_and_chunks_of_prompts_in_one_batch() {
    let mut rng = Rng::new(4);
    let lens = [600, 1100, 40, 5, 16, 700];
    let steps = [
        Step { seq: 0, from: 599, to: 600 },
        Step { seq: 1, from: 1000, to: 1100 },
        // A sequence without new tokens is none.
        Step { seq: 2, from: 40, to: 40 },
        Step { seq: 3, from: 0, to: 5 },
        Step { seq: 4, from: 15, to: 16 },
        Step { seq: 5, from: 480, to: 560 },
    ];
    for dtype in DTYPES {
        for block_size in [16, 80, 128] {
            let world = World::new(&mut rng, shape(4, 2, 16), block_size, dtype, &lens);
            check(&world, &mut cpu_backends(&[1, 2, 3]), &steps);
        }
    }
}

#[test]
fn windows() {
    let mut rng = Rng::new(5);
    let lens = [1, 40, 600, 1300];
    let mut backends = cpu_backends(&[1, 2]);
    for dtype in DTYPES {
        for window in [1, 5, 16, 17, 64, 100, 513, 5000] {
            let mut world = World::new(&mut rng, shape(4, 2, 8), 16, dtype, &lens);
            // Shared blocks hold tokens that one of the two must not look at, but may.
            world.seqs.truncate(4);
            world.window = Some(window);
            check(&world, &mut backends, &last(&lens));
            let chunk = |seq: usize, from| [Step { seq, from, to: lens[seq] }];
            check(&world, &mut backends, &chunk(1, 0));
            check(&world, &mut backends, &chunk(2, 450));
            check(&world, &mut backends, &chunk(3, 1190));
        }
    }
}

#[test]
fn large_outliers() {
    let mut rng = Rng::new(6);
    let lens = [600, 30];
    for dtype in DTYPES {
        let mut world = World::new(&mut rng, shape(4, 1, 64), 16, dtype, &lens);
        for seq in &mut world.seqs {
            for x in &mut seq.qkv {
                *x *= if rng.below(64) == 0 { 30.0 } else { 1.0 };
            }
        }
        // The shared block is one.
        let shared = 16 * world.shape.qkv_len();
        let (first, second) = world.seqs.split_at_mut(1);
        second[0].qkv[..shared].copy_from_slice(&first[0].qkv[..shared]);
        let steps = [Step { seq: 0, from: 590, to: 600 }, Step { seq: 1, from: 0, to: 30 }];
        let mut backends = cpu_backends(&[1]);
        let kv = world.cache(&mut backends[0], &steps);
        let expected = world.expected(&kv, &steps);
        // Scores reach hundreds, off by 1e-4, and so do weights.
        let Tolerance { abs, rel } = world.tolerance();
        let tolerance = Tolerance { abs: abs + 1e-3 * world.largest_value(), rel };
        for backend in &mut backends {
            assert_close(&world.attend(backend, &kv, &steps), &expected, tolerance);
        }
    }
}

#[test]
fn a_sequence_has_the_same_bits_alone_and_in_any_batch_on_any_number_of_threads() {
    let mut rng = Rng::new(7);
    let lens = [1025, 513, 17, 700, 64, 1600, 3];
    for (dtype, shape, window) in [
        (DType::Bf16, shape(4, 1, 24), None),
        (DType::Bf16, shape(7, 1, 64), Some(300)),
        (DType::F32, shape(4, 2, 16), None),
        (DType::F32, shape(3, 1, 8), Some(65)),
        (DType::I8, shape(7, 1, 64), None),
        (DType::F8E4M3, shape(7, 1, 64), None),
        (DType::F8E4M3, shape(4, 1, 24), Some(300)),
        (DType::I8, shape(4, 1, 24), Some(300)),
    ] {
        let mut world = World::new(&mut rng, shape, 16, dtype, &lens);
        world.window = window;
        let steps: Vec<Step> = lens
            .iter()
            .enumerate()
            .map(|(seq, &to)| Step { seq, from: to - [1, 1, 17, 150, 1, 1, 3][seq], to })
            .collect();
        for backends in cpu_backends(&[1, 2, 3]).chunks_mut(3) {
            let kv = world.cache(&mut backends[0], &steps);
            let alone: Vec<f32> = steps.iter().flat_map(|&step| world.attend(&mut backends[0], &kv, &[step])).collect();
            for backend in backends {
                assert_same_bits(&world.attend(backend, &kv, &steps), &alone);
                for &step in &steps {
                    let tokens: usize = steps[..step.seq].iter().map(|step| step.to - step.from).sum();
                    let start = tokens * world.shape.q_len();
                    let own = world.attend(backend, &kv, &[step]);
                    assert_same_bits(&own, &alone[start..start + own.len()]);
                }
            }
        }
    }
}

#[test]
fn a_prompt_has_the_same_bits_in_one_chunk_in_many_and_token_by_token() {
    let mut rng = Rng::new(8);
    for (dtype, shape, window, block_size) in [
        (DType::Bf16, shape(4, 1, 24), None, 16),
        (DType::Bf16, shape(7, 1, 16), Some(40), 32),
        (DType::Bf16, shape(2, 2, 64), Some(7), 16),
        (DType::F32, shape(4, 2, 8), None, 48),
        (DType::F32, shape(3, 1, 16), Some(100), 16),
        (DType::I8, shape(7, 1, 16), None, 32),
        (DType::F8E4M3, shape(7, 1, 16), None, 32),
        (DType::F8E4M3, shape(2, 2, 64), Some(40), 16),
        (DType::I8, shape(2, 2, 64), Some(40), 16),
    ] {
        let len = 1060;
        let mut world = World::new(&mut rng, shape, block_size, dtype, &[len]);
        world.window = window;
        let random_cuts = {
            let mut cuts: Vec<usize> = (0..12).map(|_| rng.below(len)).chain([0, len]).collect();
            cuts.sort_unstable();
            cuts.dedup();
            cuts
        };
        for backend in &mut cpu_backends(&[1, 2]) {
            let whole = Step { seq: 0, from: 0, to: len };
            let kv = world.cache(backend, &[whole]);
            let expected = world.attend(backend, &kv, &[whole]);
            for cuts in [(0..=len).collect(), random_cuts.clone(), vec![0, 512, 1024, len]] {
                // What was not computed yet is NaN.
                let mut kv = world.poisoned_cache(backend);
                for cut in cuts.windows(2) {
                    let (from, to) = (cut[0], cut[1]);
                    world.write(&mut kv, 0, from, to);
                    let actual = world.attend(backend, &kv, &[Step { seq: 0, from, to }]);
                    assert_same_bits(&actual, &expected[from * world.shape.q_len()..to * world.shape.q_len()]);
                }
            }
        }
    }
}

#[test]
fn a_token_that_is_no_number_spoils_only_those_that_see_it() {
    let mut rng = Rng::new(10);
    let len = 200;
    for (dtype, shape, window) in [
        (DType::Bf16, shape(4, 1, 24), Some(20)),
        (DType::Bf16, shape(7, 7, 64), None),
        (DType::F32, shape(70, 1, 8), Some(33)),
        (DType::F32, shape(3, 1, 16), None),
        (DType::I8, shape(7, 1, 16), Some(33)),
        (DType::F8E4M3, shape(7, 1, 16), Some(33)),
        (DType::I8, shape(2, 2, 8), None),
    ] {
        let mut world = World::new(&mut rng, shape, 16, dtype, &[len]);
        world.window = window;
        let step = [Step { seq: 0, from: 0, to: len }];
        for backend in &mut cpu_backends(&[2]) {
            let kv = world.cache(backend, &step);
            let expected = world.attend(backend, &kv, &step);
            for (position, bad) in [(77, f32::NAN), (78, f32::INFINITY), (130, f32::NAN)] {
                let start = position * world.shape.qkv_len() + world.shape.q_len();
                let good = world.seqs[0].qkv[start..start + 2 * world.shape.head_dim].to_vec();
                world.seqs[0].qkv[start..start + 2 * world.shape.head_dim].fill(bad);
                let kv = world.cache(backend, &step);
                world.seqs[0].qkv[start..start + 2 * world.shape.head_dim].copy_from_slice(&good);
                let actual = world.attend(backend, &kv, &step);
                let q_len = world.shape.q_len();
                assert_same_bits(&actual[..position * q_len], &expected[..position * q_len]);
                assert!(actual[position * q_len..][..q_len].iter().any(|x| x.is_nan()));
                if let Some(window) = window {
                    let after = (position + window as usize) * q_len;
                    assert_same_bits(&actual[after..], &expected[after..]);
                }
            }
        }
    }
}

#[test]
fn equal_values_give_that_value() {
    // Weights sum to what they are divided by, to the rounding of sums.
    let mut rng = Rng::new(9);
    let lens = [1200];
    for dtype in DTYPES {
        let mut world = World::new(&mut rng, shape(4, 1, 16), 16, dtype, &lens);
        for row in world.seqs[0].qkv.chunks_mut(world.shape.qkv_len()) {
            row[world.shape.q_len() + 16..].fill(1.5);
        }
        let steps = last(&lens);
        for backend in &mut cpu_backends(&[2]) {
            let kv = world.cache(backend, &steps);
            let actual = world.attend(backend, &kv, &steps);
            // Of fp8, weights are rounded to bf16 behind the scale of a token, 1/512 off at most, and not in the sum of all.
            let rel = if dtype == DType::F8E4M3 { 1.0 / 512.0 } else { 2e-6 };
            assert_close(&actual, &vec![1.5; actual.len()], Tolerance { abs: 0.0, rel });
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let shape = shape(2, 1, 8);
    let layout =
        KvLayout { num_layers: 2, num_blocks: 4, block_size: 16, num_kv_heads: 1, head_dim: 8, dtype: DType::Bf16 };
    let mut backend = cpu_backends(&[2]).remove(0);
    let kv = backend.alloc_kv(&layout).expect("room");
    let mut run = |cu: &[u32], context: &[u32], rows: &[u32], table: &[u32], num_tokens: usize, window| {
        let mut upload = |data: &[u32]| {
            let mut buffer = backend.alloc(DType::U32, data.len()).expect("room");
            backend.write_u32(&mut buffer, 0, data).expect("it fits");
            buffer
        };
        let (cu_seqlens_q, context_lens) = (upload(cu), upload(context));
        let (block_tables, rows) = (upload(table), upload(rows));
        let qkv = backend.alloc(DType::F32, 8 * shape.qkv_len()).expect("room");
        let mut out = backend.alloc(DType::F32, 8 * shape.q_len()).expect("room");
        backend.write_f32(&mut out, 0, &vec![7.0; 8 * shape.q_len()]).expect("it fits");
        let args = PagedAttention {
            qkv: &qkv,
            num_tokens,
            num_seqs: context.len(),
            shape,
            scale: 1.0,
            window,
            cu_seqlens_q: &cu_seqlens_q,
            context_lens: &context_lens,
            block_tables: &block_tables,
            max_num_blocks: 2,
            rows: &rows,
            kv: &kv,
            layer: 0,
            out: &mut out,
        };
        let error = backend.paged_attention(args).expect_err("refused");
        let mut result = vec![0.0; 8 * shape.q_len()];
        backend.read_f32(&out, 0, &mut result).expect("it fits");
        assert!(result.iter().all(|&x| x == 7.0));
        error
    };
    let op = "paged_attention";
    let refused = |argument, expected, found| KernelError::Shape { op, argument, expected, found };
    let range = |argument, value, limit| KernelError::Range { op, argument, value, limit };
    let table = [0, 1, 2, 3];
    assert_eq!(run(&[0, 1], &[1], &[0], &table, 9, None), refused("qkv", 9 * 32, 8 * 32));
    assert_eq!(run(&[0, 1], &[1], &[0], &table, 1, Some(0)), refused("window", 1, 0));
    assert_eq!(run(&[0], &[1], &[0], &table, 1, None), refused("cu_seqlens_q", 2, 1));
    assert_eq!(run(&[0, 1], &[1], &[0], &table, 2, None), refused("cu_seqlens_q", 2, 1));
    assert_eq!(run(&[1, 2], &[1], &[0], &table, 2, None), refused("cu_seqlens_q", 1, 1));
    assert_eq!(run(&[0, 2], &[1], &[0], &table, 2, None), refused("context_lens", 2, 1));
    assert_eq!(run(&[0, 1], &[33], &[0], &table, 1, None), refused("max_num_blocks", 3, 2));
    assert_eq!(run(&[0, 1], &[1], &[2], &table, 1, None), range("rows", 2, 2));
    assert_eq!(run(&[0, 1], &[17], &[1], &[0, 1, 2, 4], 1, None), range("block_tables", 4, 4));
}
