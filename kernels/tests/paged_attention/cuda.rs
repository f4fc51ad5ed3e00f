//! CUDA: the device code in the emulator, at sizes that it can do, and on a card.

use quire_kernels::cpu::{CpuBackend, CpuKv};
use quire_kernels::cuda::{CudaBackend, CudaKv, Device};
use quire_kernels::testing::{OpenDevice, Rng, Tolerance, assert_close, assert_same_bits, cpu_backends};
use quire_kernels::{Backend, DType, device_tests};

use crate::support::{DTYPES, Step, World, last, shape, whole};

/// A device with so many multiprocessors, and a backend to write caches with.
fn backends<D: Device>(open: OpenDevice<D>, num_multiprocessors: u32) -> Option<(CudaBackend<D>, CpuBackend)> {
    Some((open(Some(num_multiprocessors))?, cpu_backends(&[1]).remove(0)))
}

device_tests! {
    one_query_over_contexts_of_all_lengths: |open| one_query_over_contexts_of_all_lengths(open);
    prefills_of_all_lengths: |open| prefills_of_all_lengths(open);
    every_group_and_head_dim: |open| every_group_and_head_dim(open);
    decodes_and_chunks_of_prompts_in_one_batch: |open| decodes_and_chunks_of_prompts_in_one_batch(open);
    windows: |open| windows(open);
    large_outliers: |open| large_outliers(open);
    a_sequence_has_the_same_bits_in_every_batch_and_chunk: |open| a_sequence_has_the_same_bits_in_every_batch_and_chunk(open);
    a_token_that_is_no_number_spoils_only_those_that_see_it: |open| a_token_that_is_no_number_spoils_only_those_that_see_it(open);
    equal_values_give_that_value: |open| equal_values_give_that_value(open);
}

/// The same cache on the device.
pub(crate) fn upload<D: Device>(cuda: &mut CudaBackend<D>, kv: &CpuKv) -> CudaKv {
    let device_kv = cuda.alloc_kv(kv.layout()).expect("room");
    let bytes: Vec<u8> = match kv.layout().dtype {
        DType::F32 => kv.f32("upload").expect("f32").iter().flat_map(|x| x.to_ne_bytes()).collect(),
        DType::I8 | DType::F8E4M3 => kv.i8("upload").expect("int8").iter().flat_map(|x| x.to_ne_bytes()).collect(),
        _ => kv.bf16("upload").expect("bf16").iter().flat_map(|x| x.to_ne_bytes()).collect(),
    };
    cuda.device().upload(device_kv.ptr(), &bytes).expect("it fits");
    device_kv
}

fn check<D: Device>(world: &World, (cuda, cpu): &mut (CudaBackend<D>, CpuBackend), steps: &[Step]) {
    let kv = world.cache(cpu, steps);
    let expected = world.expected(&kv, steps);
    let device_kv = upload(cuda, &kv);
    assert_close(&world.attend(cuda, &device_kv, steps), &expected, world.tolerance());
}

fn one_query_over_contexts_of_all_lengths<D: Device>(open: OpenDevice<D>) {
    let Some(mut backends) = backends(open, 2) else { return };
    let mut rng = Rng::new(1);
    let lens = [1, 2, 15, 16, 17, 31, 33, 64, 511, 512, 513, 1025];
    for (shape, block_size) in [(shape(4, 1, 8), 16), (shape(7, 1, 64), 32), (shape(2, 2, 16), 64)] {
        for dtype in DTYPES {
            check(&World::new(&mut rng, shape, block_size, dtype, &lens), &mut backends, &last(&lens));
        }
    }
}

fn prefills_of_all_lengths<D: Device>(open: OpenDevice<D>) {
    let Some(mut backends) = backends(open, 2) else { return };
    let mut rng = Rng::new(2);
    let lens = [1, 2, 15, 16, 17, 65, 130];
    for (shape, block_size) in [(shape(4, 1, 16), 16), (shape(7, 1, 8), 48), (shape(3, 3, 24), 16)] {
        for dtype in DTYPES {
            check(&World::new(&mut rng, shape, block_size, dtype, &lens), &mut backends, &whole(&lens));
        }
    }
}

fn every_group_and_head_dim<D: Device>(open: OpenDevice<D>) {
    let Some(mut backends) = backends(open, 1) else { return };
    let mut rng = Rng::new(3);
    let lens = [70, 19];
    for head_dim in [2, 14, 40, 64, 80, 96, 112, 128, 192, 256] {
        for (num_heads, num_kv_heads) in [(2, 2), (8, 2), (70, 1)] {
            for dtype in DTYPES {
                let world = World::new(&mut rng, shape(num_heads, num_kv_heads, head_dim), 16, dtype, &lens);
                let steps = [Step { seq: 0, from: 68, to: 70 }, Step { seq: 1, from: 18, to: 19 }];
                check(&world, &mut backends, &steps);
            }
        }
    }
}

fn decodes_and_chunks_of_prompts_in_one_batch<D: Device>(open: OpenDevice<D>) {
    let Some(mut backends) = backends(open, 3) else { return };
    let mut rng = Rng::new(4);
    let lens = [600, 1100, 40, 5, 16, 700];
    let steps = [
        Step { seq: 0, from: 599, to: 600 },
        Step { seq: 1, from: 1050, to: 1100 },
        // A sequence without new tokens is none.
        Step { seq: 2, from: 40, to: 40 },
        Step { seq: 3, from: 0, to: 5 },
        Step { seq: 4, from: 15, to: 16 },
        Step { seq: 5, from: 500, to: 530 },
    ];
    for dtype in DTYPES {
        for block_size in [16, 80] {
            let world = World::new(&mut rng, shape(4, 2, 16), block_size, dtype, &lens);
            check(&world, &mut backends, &steps);
        }
    }
}

fn windows<D: Device>(open: OpenDevice<D>) {
    let Some(mut backends) = backends(open, 2) else { return };
    let mut rng = Rng::new(5);
    let lens = [1, 40, 600, 1300];
    for dtype in DTYPES {
        for window in [1, 5, 17, 64, 513, 5000] {
            let mut world = World::new(&mut rng, shape(4, 2, 8), 16, dtype, &lens);
            world.window = Some(window);
            check(&world, &mut backends, &last(&lens));
            check(&world, &mut backends, &[Step { seq: 2, from: 570, to: 600 }]);
            check(&world, &mut backends, &[Step { seq: 1, from: 0, to: 40 }]);
        }
    }
}

fn large_outliers<D: Device>(open: OpenDevice<D>) {
    let Some((mut cuda, mut cpu)) = backends(open, 2) else { return };
    let mut rng = Rng::new(6);
    for dtype in DTYPES {
        let mut world = World::new(&mut rng, shape(4, 1, 64), 16, dtype, &[600]);
        for x in &mut world.seqs[0].qkv {
            *x *= if rng.below(64) == 0 { 30.0 } else { 1.0 };
        }
        let steps = [Step { seq: 0, from: 590, to: 600 }];
        let kv = world.cache(&mut cpu, &steps);
        let expected = world.expected(&kv, &steps);
        // Scores reach hundreds, off by 1e-4, and so do weights.
        let Tolerance { abs, rel } = world.tolerance();
        let tolerance = Tolerance { abs: abs + 1e-3 * world.largest_value(), rel };
        let device_kv = upload(&mut cuda, &kv);
        assert_close(&world.attend(&mut cuda, &device_kv, &steps), &expected, tolerance);
    }
}

/// Alone, in a batch, in one chunk or in many, split over thread blocks or not.
fn a_sequence_has_the_same_bits_in_every_batch_and_chunk<D: Device>(open: OpenDevice<D>) {
    let Some((mut cuda, mut cpu)) = backends(open, 3) else { return };
    let mut rng = Rng::new(7);
    let lens = [1100, 17, 600];
    for (dtype, shape, window) in [
        (DType::Bf16, shape(4, 1, 24), None),
        (DType::Bf16, shape(7, 1, 16), Some(300)),
        (DType::I8, shape(2, 1, 16), Some(530)),
        (DType::F8E4M3, shape(2, 1, 16), Some(530)),
        (DType::F32, shape(2, 1, 8), Some(65)),
    ] {
        let mut world = World::new(&mut rng, shape, 16, dtype, &lens);
        world.window = window;
        let steps = [
            Step { seq: 0, from: 1060, to: 1100 },
            Step { seq: 1, from: 0, to: 17 },
            Step { seq: 2, from: 599, to: 600 },
        ];
        let kv = upload(&mut cuda, &world.cache(&mut cpu, &steps));
        let together = world.attend(&mut cuda, &kv, &steps);
        let mut start = 0;
        for step in steps {
            let len = (step.to - step.from) * world.shape.q_len();
            let own = world.attend(&mut cuda, &kv, &[step]);
            assert_same_bits(&own, &together[start..start + len]);
            // Token by token near both ends, and in chunks of 3: what fits 16 rows is split, the rest is not.
            for chunk in [1, 3] {
                for from in [step.from, (step.to - chunk.min(step.to)).max(step.from)] {
                    let part = Step { seq: step.seq, from, to: (from + chunk).min(step.to) };
                    let actual = world.attend(&mut cuda, &kv, &[part]);
                    let at = start + (from - step.from) * world.shape.q_len();
                    assert_same_bits(&actual, &together[at..at + actual.len()]);
                }
            }
            start += len;
        }
    }
}

fn a_token_that_is_no_number_spoils_only_those_that_see_it<D: Device>(open: OpenDevice<D>) {
    let Some((mut cuda, mut cpu)) = backends(open, 2) else { return };
    let mut rng = Rng::new(10);
    let len = 100;
    for (dtype, shape, window) in [
        (DType::Bf16, shape(4, 1, 24), Some(20)),
        (DType::Bf16, shape(2, 2, 8), None),
        (DType::I8, shape(3, 1, 16), Some(33)),
        (DType::F8E4M3, shape(3, 1, 16), Some(33)),
        (DType::F32, shape(2, 1, 8), Some(33)),
    ] {
        let mut world = World::new(&mut rng, shape, 16, dtype, &[len]);
        world.window = window;
        let step = [Step { seq: 0, from: 0, to: len }];
        let q_len = world.shape.q_len();
        let kv = upload(&mut cuda, &world.cache(&mut cpu, &step));
        let expected = world.attend(&mut cuda, &kv, &step);
        for (position, bad) in [(37, f32::NAN), (38, f32::INFINITY), (64, f32::NAN)] {
            let start = position * world.shape.qkv_len() + q_len;
            // Keys and values, then values alone.
            for first in [0, world.shape.num_kv_heads * world.shape.head_dim] {
                let range = start + first..start + 2 * world.shape.num_kv_heads * world.shape.head_dim;
                let good = world.seqs[0].qkv[range.clone()].to_vec();
                world.seqs[0].qkv[range.clone()].fill(bad);
                let kv = upload(&mut cuda, &world.cache(&mut cpu, &step));
                world.seqs[0].qkv[range].copy_from_slice(&good);
                let actual = world.attend(&mut cuda, &kv, &step);
                assert_same_bits(&actual[..position * q_len], &expected[..position * q_len]);
                for row in position..window.map_or(len, |window| (position + window as usize).min(len)) {
                    assert!(
                        actual[row * q_len..][..q_len].iter().any(|x| !x.is_finite()),
                        "{dtype:?} {position} {row}"
                    );
                }
                if let Some(window) = window {
                    let after = (position + window as usize) * q_len;
                    assert_same_bits(&actual[after..], &expected[after..]);
                }
            }
        }
    }
}

fn equal_values_give_that_value<D: Device>(open: OpenDevice<D>) {
    // Weights sum to what they are divided by, to the rounding of sums.
    let Some((mut cuda, mut cpu)) = backends(open, 2) else { return };
    let mut rng = Rng::new(9);
    for dtype in DTYPES {
        let mut world = World::new(&mut rng, shape(4, 1, 16), 16, dtype, &[1200]);
        for row in world.seqs[0].qkv.chunks_mut(world.shape.qkv_len()) {
            row[world.shape.q_len() + 16..].fill(1.5);
        }
        let steps = last(&[1200]);
        let kv = upload(&mut cuda, &world.cache(&mut cpu, &steps));
        let actual = world.attend(&mut cuda, &kv, &steps);
        // Of codes, probabilities are rounded once with the scale of a token and once without: of int8 to 16 bits, of fp8 to 8.
        let rel = match dtype {
            DType::I8 => 1e-5,
            DType::F8E4M3 => 1.0 / 256.0,
            _ => 2e-6,
        };
        assert_close(&actual, &vec![1.5; actual.len()], Tolerance { abs: 0.0, rel });
    }
}
