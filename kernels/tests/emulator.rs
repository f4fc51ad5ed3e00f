//! The emulator itself: it finds what is planted, and finds nothing where nothing is wrong.

use half::bf16;
use quire_kernels::KernelError;
use quire_kernels::cuda::{Arg, Device, DevicePtr, KernelId, Launch};
use quire_kernels::testing::{Emulator, Rng};

/// A device, unless there is no compiler: then a line says so.
fn emulator() -> Option<Emulator> {
    match Emulator::new() {
        Ok(emulator) => Some(emulator),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

fn launch(
    device: &mut Emulator,
    function: &'static str,
    threads: u32,
    shared_bytes: u32,
    args: &[Arg],
) -> Result<(), String> {
    let kernel = KernelId { module: "planted", function };
    let launch = Launch { kernel, grid: [1, 1, 1], block: [threads, 1, 1], shared_bytes, args };
    // SAFETY: the emulator compares arguments with parameters, and looks at every access.
    unsafe { device.launch(&launch) }.map_err(|error| match error {
        KernelError::Device { cause, .. } => cause,
        other => panic!("{other}"),
    })
}

fn floats(device: &mut Emulator, what: &'static str, numbers: &[f32]) -> DevicePtr {
    words(device, what, &numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
}

fn words(device: &mut Emulator, what: &'static str, numbers: &[u32]) -> DevicePtr {
    let ptr = device.alloc(what, 4 * numbers.len()).expect("room");
    let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    device.upload(ptr, &bytes).expect("it fits");
    ptr
}

fn read(device: &mut Emulator, ptr: DevicePtr, len: usize) -> Vec<u32> {
    let mut bytes = vec![0; 4 * len];
    device.download(ptr, &mut bytes).expect("it is there");
    bytes.as_chunks::<4>().0.iter().map(|&word| u32::from_le_bytes(word)).collect()
}

fn read_floats(device: &mut Emulator, ptr: DevicePtr, len: usize) -> Vec<f32> {
    read(device, ptr, len).into_iter().map(f32::from_bits).collect()
}

#[track_caller]
fn assert_finds(result: Result<(), String>, parts: &[&str]) {
    let message = result.expect_err("a fault is planted");
    assert!(parts.iter().all(|part| message.contains(part)) && !message.contains('\n'), "{message}");
}

#[test]
fn memory_that_threads_share_without_barriers_is_a_race() {
    let Some(mut device) = emulator() else { return };
    let x: Vec<f32> = (0..256).map(|i| i as f32).collect();
    let (x, out) = (floats(&mut device, "x", &x), floats(&mut device, "out", &[f32::NAN; 512]));
    let mut run = |first: u32, second: u32| {
        let args = [Arg::Ptr(x), Arg::Ptr(out), Arg::U32(first), Arg::U32(second)];
        launch(&mut device, "rotate", 256, 0, &args)
    };
    assert_finds(run(0, 1), &["rotate: block (0, 0, 0)", "with no barrier between", "static shared memory"]);
    assert_finds(run(1, 0), &["writes where another thread reads, with no barrier between"]);
    // What a failed launch left behind is forgotten.
    run(1, 1).expect("nothing is wrong");
    let expected: Vec<f32> = (0..2).flat_map(|round| (0..256).map(move |i| ((i + 32) % 256 + round) as f32)).collect();
    assert_eq!(read_floats(&mut device, out, 512), expected);

    let mut lanes = |has_barrier: u32| launch(&mut device, "lanes", 32, 0, &[Arg::Ptr(out), Arg::U32(has_barrier)]);
    assert_finds(lanes(0), &["with no barrier between"]);
    lanes(1).expect("nothing is wrong");
    assert_eq!(read_floats(&mut device, out, 32), (0..32).rev().map(|i| i as f32).collect::<Vec<_>>());

    let mut both = |is_atomic: u32| launch(&mut device, "write_both", 64, 0, &[Arg::Ptr(out), Arg::U32(is_atomic)]);
    assert_finds(both(0), &["writes where another thread writes"]);
    both(1).expect("nothing is wrong");
    assert_eq!(read_floats(&mut device, out, 1), [64.0]);

    let mut through =
        |has_barrier: u32| launch(&mut device, "through_buffer", 64, 0, &[Arg::Ptr(out), Arg::U32(has_barrier)]);
    assert_finds(through(0), &["with no barrier between", "4 bytes of out at"]);
    through(1).expect("nothing is wrong");
    let twice: Vec<f32> = (0..64).chain((0..64).rev()).map(|i| i as f32).collect();
    assert_eq!(read_floats(&mut device, out, 128), twice);

    let mut hand_over = |with: u32| launch(&mut device, "hand_over", 128, 0, &[Arg::Ptr(out), Arg::U32(with)]);
    assert_finds(hand_over(0), &["reads what another thread writes"]);
    hand_over(1).expect("nothing is wrong");
    assert_eq!(read_floats(&mut device, out, 64), (0..64).rev().map(|i| i as f32).collect::<Vec<_>>());
}

#[test]
fn waiting_for_what_never_comes_is_named() {
    let Some(mut device) = emulator() else { return };
    let diverged = launch(&mut device, "diverge", 128, 0, &[Arg::U32(64)]);
    assert_finds(diverged, &["at a barrier threads 0 to 63", "ended threads 64 to 127"]);
    launch(&mut device, "diverge", 128, 0, &[Arg::U32(128)]).expect("nothing is wrong");
    launch(&mut device, "diverge", 128, 0, &[Arg::U32(0)]).expect("nothing is wrong");
    let out = floats(&mut device, "out", &[0.0; 32]);
    assert_finds(launch(&mut device, "lonely", 32, 0, &[Arg::Ptr(out)]), &["waits for lane 5, which has ended"]);

    let flags = words(&mut device, "flags", &[0; 2]);
    let unset = launch(&mut device, "flag", 64, 0, &[Arg::Ptr(flags), Arg::U32(0)]);
    assert_finds(unset, &["cannot go on", "ended threads 1 to 63"]);
    launch(&mut device, "flag", 64, 0, &[Arg::Ptr(flags), Arg::U32(1)]).expect("nothing is wrong");
    assert_eq!(read(&mut device, flags, 2), [1, 7]);
}

#[test]
fn memory_that_is_not_the_kernels_is_named() {
    let Some(mut device) = emulator() else { return };
    let out = floats(&mut device, "out", &[0.0; 8]);
    for (at, is_read, part) in [
        (8, 0, "writes 4 bytes that reach 4 bytes past the end of out (32 bytes, argument 0)"),
        (9, 1, "reads 4 bytes that reach 8 bytes past the end of out"),
        (-1, 0, "that reach 4 bytes before out"),
        (1 << 24, 0, "where no buffer is"),
    ] {
        let result = launch(&mut device, "touch_at", 32, 0, &[Arg::Ptr(out), Arg::I32(at), Arg::U32(is_read)]);
        assert_finds(result, &[part, "thread 0"]);
    }
    let args = [Arg::Ptr(out), Arg::I32(7), Arg::U32(0)];
    launch(&mut device, "touch_at", 32, 0, &args).expect("nothing is wrong");
    assert_finds(launch(&mut device, "touch_at", 32, 0, &args[..2]), &["arguments pi, the parameters are piu"]);
    assert_finds(launch(&mut device, "touch_at", 64, 0, &args), &["more than 32 threads"]);
    assert_finds(launch(&mut device, "missing", 32, 0, &[]), &["there is no kernel planted::missing"]);

    let out = floats(&mut device, "out", &[0.0; 32]);
    let mut shared = |at: u32| launch(&mut device, "touch_shared_at", 32, 8, &[Arg::Ptr(out), Arg::U32(at)]);
    assert_finds(shared(2), &["writes 4 bytes of shared memory at 8, outside of its 8 bytes"]);
    shared(1).expect("nothing is wrong");
    let after = read_floats(&mut device, out, 2);
    assert!(after[0].is_nan() && after[1] == 1.0, "shared memory that nobody wrote is poisoned: {after:?}");
}

#[test]
fn copies_are_seen_behind_their_wait_only() {
    let Some(mut device) = emulator() else { return };
    let x: Vec<f32> = (0..1024).map(|i| i as f32).collect();
    let (source, out) = (floats(&mut device, "x", &x), floats(&mut device, "out", &[f32::NAN; 256]));
    let mut copy = |steps: u32| launch(&mut device, "copy", 64, 0, &[Arg::Ptr(source), Arg::Ptr(out), Arg::U32(steps)]);
    assert_finds(copy(0), &["with no barrier between"]);
    assert_finds(copy(2), &["touches bytes of an asynchronous copy before its wait"]);
    assert_finds(copy(1), &["with no barrier between"]);
    copy(3).expect("nothing is wrong");
    let expected: Vec<f32> = x[..256].chunks(4).rev().flatten().copied().collect();
    assert_eq!(read_floats(&mut device, out, 256), expected);

    launch(&mut device, "pipeline", 32, 0, &[Arg::Ptr(source), Arg::Ptr(out)]).expect("nothing is wrong");
    let sums: Vec<f32> = (0..128).map(|i| (0..8).map(|tile| x[tile * 128 + i]).sum()).collect();
    assert_eq!(read_floats(&mut device, out, 128), sums);
}

#[test]
fn products_are_those_of_the_matrices() {
    let Some(mut device) = emulator() else { return };
    let mut rng = Rng::new(1);
    let mut matrix = |len: usize| -> Vec<bf16> { rng.normals(len).into_iter().map(bf16::from_f32).collect() };
    let pairs = |x: &[bf16]| -> Vec<u32> {
        x.chunks(2).map(|pair| u32::from(pair[1].to_bits()) << 16 | u32::from(pair[0].to_bits())).collect()
    };
    let (a, b) = (matrix(256), matrix(128));
    let out = floats(&mut device, "out", &[f32::NAN; 128]);
    let args = [words(&mut device, "a", &pairs(&a)), words(&mut device, "b", &pairs(&b)), out].map(Arg::Ptr);
    launch(&mut device, "product_bf16", 32, 0, &args).expect("nothing is wrong");
    let mut expected = vec![0.0_f32; 128];
    for (index, sum) in expected.iter_mut().enumerate() {
        for k in 0..16 {
            *sum += a[index / 8 * 16 + k].to_f32() * b[index % 8 * 16 + k].to_f32();
        }
    }
    assert_eq!(read_floats(&mut device, out, 128), expected);

    let x: Vec<u32> = (0..64).map(|i| i * 3).collect();
    let packed: Vec<u32> = x.chunks(2).map(|pair| pair[1] << 16 | pair[0]).collect();
    let out = words(&mut device, "out", &[0; 32]);
    let args = [words(&mut device, "x", &packed), out].map(Arg::Ptr);
    launch(&mut device, "transpose", 32, 0, &args).expect("nothing is wrong");
    let transposed = |row: usize, col: usize| x[col * 8 + row];
    let expected: Vec<u32> =
        (0..32).map(|i| transposed(i / 4, i % 4 * 2 + 1) << 16 | transposed(i / 4, i % 4 * 2)).collect();
    assert_eq!(read(&mut device, out, 32), expected);

    let mut rng = Rng::new(2);
    let mut bytes = |len: usize| -> Vec<i8> { (0..len).map(|_| rng.below(256) as u8 as i8).collect() };
    let (a, b) = (bytes(512), bytes(256));
    let fours = |x: &[i8]| -> Vec<u32> {
        x.as_chunks::<4>().0.iter().map(|four| u32::from_le_bytes(four.map(|x| x as u8))).collect()
    };
    let out = words(&mut device, "out", &[0; 128]);
    let args = [words(&mut device, "a", &fours(&a)), words(&mut device, "b", &fours(&b)), out].map(Arg::Ptr);
    launch(&mut device, "product_int8", 32, 0, &args).expect("nothing is wrong");
    let dot = |row: usize, col: usize| -> i32 {
        (0..32).map(|k| i32::from(a[row * 32 + k]) * i32::from(b[col * 32 + k])).sum()
    };
    let expected: Vec<u32> = (0..128).map(|i| dot(i / 8, i % 8) as u32).collect();
    assert_eq!(read(&mut device, out, 128), expected);
}

/// The nearest number of three bits of fraction, by trying all.
fn nearest_e4m3(x: f32) -> u8 {
    let value = |bits: u8| {
        let (exponent, fraction) = (i32::from(bits >> 3), f64::from(bits & 7));
        if exponent == 0 { fraction * 2f64.powi(-9) } else { (8.0 + fraction) * 2f64.powi(exponent - 10) }
    };
    let magnitude = f64::from(x.abs());
    let distance = |bits: u8| (value(bits) - magnitude).abs();
    // Of two as near, the even one.
    let by_distance = |a: &u8, b: &u8| distance(*a).total_cmp(&distance(*b)).then((a & 1).cmp(&(b & 1)));
    let best = (0..=0x7e).min_by(by_distance).expect("some");
    best | if x.is_sign_negative() { 0x80 } else { 0 }
}

#[test]
fn conversions_and_sums() {
    let Some(mut device) = emulator() else { return };
    let mut rng = Rng::new(3);
    let mut x: Vec<f32> = (0..64).map(|i| rng.normal() * 2f32.powi(i % 20 - 12)).collect();
    x[..10].copy_from_slice(&[0.0, -0.0, 1e-9, 447.0, 449.0, -1e3, 0.0009765625, 0.00293, -17.0, 0.0146484375]);
    let out = words(&mut device, "out", &[0; 512]);
    let record = words(&mut device, "record", &[0; 4]);
    let args = [floats(&mut device, "x", &x), out, record].map(Arg::Ptr);
    launch(&mut device, "convert", 64, 0, &args).expect("nothing is wrong");
    let rows = read(&mut device, out, 512);
    let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = x.iter().map(|&x| f64::from(x)).sum();
    let size: f64 = x.iter().map(|&x| f64::from(x.abs())).sum();
    for (thread, (row, &x_own)) in rows.as_chunks::<8>().0.iter().zip(&x).enumerate() {
        let bits = u32::from(bf16::from_f32(x_own).to_bits());
        assert_eq!(row[0], bits, "{x_own}");
        assert_eq!(row[1], (bits ^ 0x8000) << 16 | bits, "{x_own}");
        assert_eq!(row[2], u32::from(nearest_e4m3(x_own)), "{x_own}");
        let back = f32::from_bits(row[3]);
        assert!((back - x_own).abs() <= (x_own.abs() / 16.0).max(2f32.powi(-10)) || x_own.abs() > 448.0, "{x_own}");
        let exact = f64::from(x_own).exp2();
        let is_close = (f64::from(f32::from_bits(row[4])) - exact).abs() <= 3e-7 * exact + 1.5e-45;
        assert!(is_close || x_own > 127.0, "{x_own}");
        assert!((f64::from(f32::from_bits(row[5])) - sum).abs() <= 1e-6 * size);
        assert_eq!(row[5], rows[5], "every thread has the same sum");
        assert_eq!(f32::from_bits(row[6]), largest);
        let before: f64 = x[thread / 32 * 32..=thread].iter().map(|&x| f64::from(x)).sum();
        assert!((f64::from(f32::from_bits(row[7])) - before).abs() <= 1e-6 * size);
    }
    assert_eq!(read(&mut device, record, 4), [0; 4]);
    x[40] = f32::NAN;
    let args = [floats(&mut device, "x", &x), out, record].map(Arg::Ptr);
    launch(&mut device, "convert", 64, 0, &args).expect("nothing is wrong");
    assert_eq!(read(&mut device, record, 4), [1, 40, 64, 0]);
}

#[test]
fn graphs_do_again_what_was_recorded() {
    let Some(mut device) = emulator() else { return };
    let out = floats(&mut device, "out", &[0.0; 8]);
    device.begin_capture().expect("nothing is recorded");
    device.fill(out, 0, 32).expect("recorded");
    let args = [Arg::Ptr(out), Arg::I32(3), Arg::U32(0)];
    launch(&mut device, "touch_at", 32, 0, &args).expect("recorded");
    assert!(device.alloc("more", 4).is_err());
    let graph = device.end_capture().expect("recorded");
    assert_eq!(read_floats(&mut device, out, 8), [0.0; 8], "nothing ran");
    device.upload(out, &[0xff; 32]).expect("it fits");
    for _ in 0..2 {
        device.replay(graph).expect("nothing is wrong");
        assert_eq!(read_floats(&mut device, out, 8), [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
    }
    assert_eq!(device.alloc("too much", 2 << 30), Err(KernelError::OutOfMemory { what: "too much", bytes: 2 << 30 }));
}
