//! Damaged GGUF files: none makes the reader panic, and none makes it take more memory than it says.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use quire_engine::gguf::{MAX_INDEX_BYTES, check};
use quire_engine::testing::gguf::{GgufWriter, gguf_twins};
use quire_engine::testing::{TinyModel, tiny_model};
use quire_kernels::TensorFormat;
use quire_kernels::testing::Rng;

const NUM_DAMAGED: usize = 20_000;

/// The system's allocator, which counts what each thread holds.
struct Counting;

thread_local! {
    static HELD: Cell<i64> = const { Cell::new(0) };
    static MOST: Cell<i64> = const { Cell::new(0) };
}

fn count(change: i64) {
    // A thread that is ending has no counters any more.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + change);
        let _ = MOST.try_with(|most| most.set(most.get().max(held.get())));
    });
}

#[expect(unsafe_code, reason = "an allocator can only be counted by being one")]
// SAFETY: every call is handed to `System` unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller keeps the promises of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller keeps the promises of `GlobalAlloc::dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that were held at a time while `f` ran, beyond those before.
fn most_held(f: impl FnOnce()) -> i64 {
    let before = HELD.get();
    MOST.set(before);
    f();
    MOST.get() - before
}

fn model() -> GgufWriter {
    let mut file = gguf_twins(&tiny_model(3, TinyModel::Llama), |_, _| TensorFormat::Q8_0).file;
    file.texts("tokenizer.ggml.tokens", &["<s>", "a", "b"]).f32s("tokenizer.ggml.scores", &[0.0, -1.0, -2.0]);
    file
}

#[test]
fn damaged_files_cost_little_and_panic_nowhere() {
    let good = model().bytes();
    check(&good).expect("the undamaged file is fine");
    // Most of the file is weights, which are not looked at: damage goes to the header.
    let header_len = good.windows(18).position(|window| window == b"output_norm.weight").expect("a name") + 64;
    let mut rng = Rng::new(20_261_124);
    let mut file = good.clone();
    let mut num_refused = 0;
    for _ in 0..NUM_DAMAGED {
        file.copy_from_slice(&good);
        for _ in 0..=rng.below(4) {
            let at = rng.below(header_len);
            match rng.below(4) {
                0 => file[at] ^= 1 << rng.below(8),
                1 => file[at] = rng.below(256) as u8,
                // A whole number, as a count, a length or an offset would be.
                2 => {
                    let number = [0, 1, u64::MAX, 1 << 63, 1 << 32, (1 << 22) - 1, 1 << 16][rng.below(7)];
                    file[at..at + 8].copy_from_slice(&number.to_le_bytes());
                }
                _ => file.copy_within(at..at + 16, rng.below(header_len)),
            }
        }
        let len = if rng.below(8) == 0 { rng.below(file.len()) } else { file.len() };
        let held = most_held(|| num_refused += usize::from(check(&file[..len]).is_err()));
        assert!(held < (2 * len) as i64 + (1 << 20), "{held} bytes for a file of {len}");
    }
    // Damage in a number or a key that is not read is no reason to refuse.
    assert!(num_refused > NUM_DAMAGED / 2 && num_refused < NUM_DAMAGED, "{num_refused}");
}

#[test]
fn the_largest_index_stays_within_its_bound() {
    let mut file = GgufWriter::default();
    for i in 0..1 << 16 {
        file.raw(&format!("{i:x}"), 0, &[0]);
    }
    for i in 0..1u64 << 16 {
        file.raw_tensor(&format!("{i:x}"), 0, &[1, 1, 1, 1], 32 * i, &[0; 32]);
    }
    let bytes = file.bytes();
    let held = most_held(|| assert!(check(&bytes).is_err_and(|error| error.to_string().contains("architecture"))));
    assert!(held < bytes.len() as i64 + MAX_INDEX_BYTES as i64, "{held} bytes for a file of {}", bytes.len());
}
