//! CUDA with the heads and contexts of real models, which only a card can do in time.

use quire_kernels::testing::{Rng, assert_close, assert_same_bits, card, cpu_backends};

use crate::cuda::upload;
use crate::support::{DTYPES, Step, World, last, shape, whole};

#[test]
fn long_contexts_are_near_the_reference_on_a_card() {
    let (Some(mut cuda), mut cpu) = (card(None), cpu_backends(&[1]).remove(0)) else { return };
    let mut rng = Rng::new(1);
    let lens = [4096, 4097, 1000, 8191];
    for dtype in DTYPES {
        for (shape, block_size) in [(shape(8, 2, 128), 16), (shape(7, 1, 64), 64), (shape(2, 2, 96), 32)] {
            let world = World::new(&mut rng, shape, block_size, dtype, &lens);
            let steps = last(&lens);
            let kv = world.cache(&mut cpu, &steps);
            let device_kv = upload(&mut cuda, &kv);
            let found = world.attend(&mut cuda, &device_kv, &steps);
            assert_close(&found, &world.expected(&kv, &steps), world.tolerance());
        }
    }
}

#[test]
fn a_prompt_of_a_thousand_tokens_is_near_the_reference_on_a_card() {
    let (Some(mut cuda), mut cpu) = (card(None), cpu_backends(&[1]).remove(0)) else { return };
    let mut rng = Rng::new(2);
    for dtype in DTYPES {
        let world = World::new(&mut rng, shape(8, 2, 128), 16, dtype, &[1024]);
        let steps = whole(&[1024]);
        let kv = world.cache(&mut cpu, &steps);
        let device_kv = upload(&mut cuda, &kv);
        assert_close(&world.attend(&mut cuda, &device_kv, &steps), &world.expected(&kv, &steps), world.tolerance());
    }
}

/// Promise 1: alone, in a batch of 256, and in chunks.
#[test]
fn a_sequence_has_the_same_bits_in_every_batch_on_a_card() {
    let (Some(mut cuda), mut cpu) = (card(None), cpu_backends(&[1]).remove(0)) else { return };
    let mut rng = Rng::new(3);
    for dtype in DTYPES {
        let lens: Vec<usize> = (0..256).map(|index| 1 + (index * 37) % 700).collect();
        let world = World::new(&mut rng, shape(8, 2, 64), 16, dtype, &lens);
        let steps = last(&lens);
        let kv = upload(&mut cuda, &world.cache(&mut cpu, &steps));
        let together = world.attend(&mut cuda, &kv, &steps);
        for (step, expected) in steps.iter().zip(together.chunks(world.shape.q_len())) {
            assert_same_bits(&world.attend(&mut cuda, &kv, &[*step]), expected);
        }
        let whole = [Step { seq: 255, from: 0, to: lens[255] }];
        let kv = upload(&mut cuda, &world.cache(&mut cpu, &whole));
        let found = world.attend(&mut cuda, &kv, &whole);
        assert_same_bits(&found[found.len() - world.shape.q_len()..], &together[255 * world.shape.q_len()..]);
    }
}
