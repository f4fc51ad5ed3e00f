//! `quire bench machine`: what the device can do at most, one core alone and all together.

use std::path::Path;

use quire_engine::bench::{self, Peaks};
use quire_engine::{DeviceChoice, EngineConfig};
use serde::Serialize;

use super::{BenchError, write_json};

/// Limits of some cores.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct PeakFigures {
    bf16_gflops: f64,
    int8_gops: f64,
    f32_gflops: f64,
    read_gb_per_second: f64,
}

impl PeakFigures {
    pub(super) fn of(peaks: &Peaks) -> Self {
        Self {
            bf16_gflops: peaks.bf16_flops_per_second / 1e9,
            int8_gops: peaks.int8_ops_per_second / 1e9,
            f32_gflops: peaks.f32_flops_per_second / 1e9,
            read_gb_per_second: peaks.read_bytes_per_second / 1e9,
        }
    }
}

impl std::fmt::Display for PeakFigures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "read {:.1} GB/s, bf16 {:.0} GFLOP/s, int8 {:.0} GOP/s, f32 {:.0} GFLOP/s",
            self.read_gb_per_second, self.bf16_gflops, self.int8_gops, self.f32_gflops
        )
    }
}

#[derive(Debug, Serialize)]
struct Figures {
    device: String,
    isa: String,
    num_threads: usize,
    one_core: PeakFigures,
    all_cores: PeakFigures,
}

pub(super) fn command() -> clap::Command {
    let threads = clap::Arg::new("threads")
        .long("threads")
        .value_name("N")
        .value_parser(clap::value_parser!(usize))
        .default_value("0")
        .help("Threads of the second column; 0 is one per core");
    clap::Command::new("machine")
        .about("The machine alone: arithmetic on registers and reading of memory, at most")
        .arg(threads)
}

pub(super) fn run(num_threads: usize, json: Option<&Path>) -> Result<(), BenchError> {
    let config = EngineConfig { device: DeviceChoice::Cpu, num_threads, ..EngineConfig::default() };
    let peaks = bench::machine(&config).map_err(|error| BenchError::Failed(error.to_string()))?;
    let figures = Figures {
        device: peaks.device.name,
        isa: peaks.device.isa,
        num_threads: peaks.device.num_units,
        one_core: PeakFigures::of(&peaks.one_core),
        all_cores: PeakFigures::of(&peaks.all_cores),
    };
    println!("{}, {}", figures.device, figures.isa);
    println!("{:<20} {:>10} {:>10}", "", "one core", format!("{} cores", figures.num_threads));
    let row = |name: &str, of: fn(&PeakFigures) -> f64| {
        println!("{name:<20} {:>10.1} {:>10.1}", of(&figures.one_core), of(&figures.all_cores));
    };
    row("bf16, GFLOP/s", |peaks| peaks.bf16_gflops);
    row("int8, GOP/s", |peaks| peaks.int8_gops);
    row("f32, GFLOP/s", |peaks| peaks.f32_gflops);
    row("memory read, GB/s", |peaks| peaks.read_gb_per_second);
    write_json(&figures, json)
}
