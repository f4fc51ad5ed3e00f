//! What a card can do at most is measured by kernels that do what they are said to do.

use quire_kernels::cuda::peaks::{Effort, measure};
use quire_kernels::cuda::recorder::{Call, Recorder};
use quire_kernels::cuda::{CudaBackend, Device};
use quire_kernels::testing::{card, emulated};

const EFFORT: Effort = Effort { read_bytes: 20_000 * 16, rounds: 2 };

#[test]
fn every_kernel_runs_and_reads_memory_that_is_there() {
    // The emulator refuses what is past the memory, and waits that never end.
    emulated(None).into_iter().for_each(|backend| check_figures(backend, EFFORT));
}

#[test]
fn figures_on_a_card() {
    card(None).into_iter().for_each(|backend| check_figures(backend, Effort::FULL));
}

fn check_figures<D: Device>(mut backend: CudaBackend<D>, effort: Effort) {
    let peaks = measure(&mut backend, effort).expect("nothing is wrong");
    let figures = [
        peaks.read_bytes_per_second,
        peaks.bf16_flops_per_second,
        peaks.int8_ops_per_second,
        peaks.f32_flops_per_second,
    ];
    assert!(figures.iter().all(|figure| figure.is_finite() && *figure > 0.0), "{peaks:?}");
}

#[test]
fn a_try_is_timed_by_itself() {
    let card = Recorder::new(1 << 20);
    let calls = card.calls();
    let mut backend = CudaBackend::new(card).expect("memory");
    calls.take();
    measure(&mut backend, EFFORT).expect("nothing is wrong");
    let calls = calls.take();
    let launches: Vec<usize> = (0..calls.len()).filter(|&index| matches!(calls[index], Call::Launch { .. })).collect();
    assert_eq!(launches.len(), 4 * 6);
    for index in launches {
        assert_eq!([&calls[index - 1], &calls[index + 1]], [&Call::Synchronize; 2]);
    }
}
