//! `quire bench model`: a model through the engine's own scheduler and executor, with no server around it.

use std::path::{Path, PathBuf};

use clap::{Arg, ArgMatches};
use quire_engine::bench::{self, Measured, ModelBench};
use serde::Serialize;

use super::machine::PeakFigures;
use super::{BenchError, list, number, value, write_json};
use crate::app;
use crate::config::{self, Environment, Flag};

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    prompt_len: u32,
    batches: Vec<u32>,
    depths: Vec<u32>,
    num_steps: u32,
    label: Option<String>,
    json: Option<PathBuf>,
}

/// One line of the table.
#[derive(Debug, Serialize)]
struct Row {
    /// `prefill` or `decode`.
    kind: &'static str,
    /// Sequences.
    batch: u32,
    /// Tokens before those that are computed.
    depth: u32,
    /// Computed in a run: a prompt, or one for each sequence.
    num_tokens: u32,
    tokens_per_second: f64,
    /// Of a prompt, or of a step.
    milliseconds: f64,
    /// Weights and KV cache.
    bytes: u64,
    gb_per_second: f64,
    /// At most, of the model's weights, right before and after; the better of both.
    read_peak_gb_per_second: f64,
    /// `gb_per_second` of it.
    read_ratio: f64,
    gflops: f64,
    /// Of the measured peak of the type that weights are multiplied as.
    compute_ratio: f64,
}

#[derive(Debug, Serialize)]
struct Figures {
    /// For plots: what this run is called.
    label: String,
    model: String,
    architecture: String,
    dtype: &'static str,
    device: String,
    isa: String,
    num_threads: usize,
    peaks: PeakFigures,
    num_parameters: u64,
    weight_bytes: u64,
    kv_cache_bytes: u64,
    resident_bytes: Option<u64>,
    /// Resident and neither weights nor KV cache.
    other_bytes: Option<u64>,
    rows: Vec<Row>,
    /// `[batch, depth]` of decodes that the KV cache or the settings had no room for.
    left_out: Vec<[u32; 2]>,
}

pub(super) fn command() -> clap::Command {
    let numbers = |name: &'static str, default: &'static str, min: i64, help: &'static str| {
        Arg::new(name)
            .long(name)
            .value_name("N,...")
            .value_delimiter(',')
            .value_parser(clap::value_parser!(u32).range(min..))
            .default_value(default)
            .help(help)
    };
    clap::Command::new("model")
        .about("A model without a server: prompts and decoding beside what the machine can do at most")
        .arg(number("prompt", 1, Some("512"), "Tokens of the prompt that is computed"))
        .arg(numbers("batch", "1,8,32", 1, "Sequences that decode together"))
        .arg(numbers("depth", "0,1024,8192", 0, "Tokens before those that are decoded, in each sequence"))
        .arg(number("steps", 1, Some("16"), "Steps of each figure, of which it is the median"))
        .arg(Arg::new("label").long("label").value_name("TEXT").help("A name for these figures, for plots"))
}

impl Options {
    pub(super) fn read(matches: &ArgMatches, json: Option<PathBuf>) -> Result<Self, String> {
        Ok(Self {
            prompt_len: value(matches, "prompt"),
            batches: list(matches, "batch"),
            depths: list(matches, "depth"),
            num_steps: value(matches, "steps"),
            label: matches.get_one::<String>("label").cloned(),
            json,
        })
    }
}

pub(super) fn run(options: &Options, file: Option<&Path>, flags: &[Flag]) -> Result<(), BenchError> {
    let loaded = config::load(file, Environment::of_process(), flags)
        .and_then(|loaded| loaded.config.validate().map(|()| loaded))
        .map_err(|error| BenchError::Refused(error.to_string()))?;
    let failed = |error: String| BenchError::Failed(error);
    let (source, name) = app::find(&loaded.config, &loaded.environment).map_err(|error| failed(error.to_string()))?;
    let (engine, scheduler) = (&loaded.config.engine_for(&loaded.environment), &loaded.config.scheduler);
    let mut model =
        ModelBench::load(&source, engine, scheduler).map_err(|error| failed(format!("cannot run {name}: {error}")))?;

    let info = model.info().clone();
    println!(
        "{name}: {}, {} parameters, weights {:.1} MB",
        info.architecture,
        info.num_parameters,
        mb(info.weight_bytes)
    );
    println!("{}, {}, {} threads", info.device.name, info.device.isa, info.device.num_units);
    let peaks = PeakFigures::of(model.peaks());
    println!("peaks: {peaks}");
    println!("   kind  batch  depth  tokens/s        ms   MB read    GB/s  of most  of it    GFLOP/s  of peak");
    let (mut rows, mut left_out) = (Vec::new(), Vec::new());
    let mut add = |model: &mut ModelBench, read_peak: f64, kind, batch, depth, measured: &Measured| {
        let read_peak = read_peak.max(model.measure_reading());
        let row = Row::new(model, read_peak, kind, batch, depth, measured);
        row.print();
        rows.push(row);
    };
    let num_runs = options.num_steps.min(5);
    let read_peak = model.measure_reading();
    if let Some(measured) = model.prefill(options.prompt_len, num_runs).map_err(|error| failed(error.to_string()))? {
        add(&mut model, read_peak, "prefill", 1, 0, &measured);
    }
    for &depth in &options.depths {
        for &batch in &options.batches {
            let read_peak = model.measure_reading();
            let measured = model.decode(batch, depth, options.num_steps).map_err(|error| failed(error.to_string()))?;
            match measured {
                None => {
                    println!(" decode {batch:>6} {depth:>6}  does not fit");
                    left_out.push([batch, depth]);
                }
                Some(measured) => add(&mut model, read_peak, "decode", batch, depth, &measured),
            }
        }
    }
    let resident_bytes = bench::resident_bytes();
    let other_bytes = resident_bytes.map(|bytes| bytes.saturating_sub(info.weight_bytes + info.kv_cache_bytes));
    if let (Some(resident), Some(other)) = (resident_bytes, other_bytes) {
        println!(
            "resident {:.1} MB: weights {:.1}, KV cache {:.1}, all else {:.1}",
            mb(resident),
            mb(info.weight_bytes),
            mb(info.kv_cache_bytes),
            mb(other)
        );
    }
    if rows.is_empty() {
        return Err(failed("nothing that was asked for fits the KV cache and the settings".to_owned()));
    }
    let figures = Figures {
        label: options.label.clone().unwrap_or_else(|| info.weight_format.to_owned()),
        model: name,
        architecture: info.architecture,
        dtype: info.weight_format,
        device: info.device.name,
        isa: info.device.isa,
        num_threads: info.device.num_units,
        peaks,
        num_parameters: info.num_parameters,
        weight_bytes: info.weight_bytes,
        kv_cache_bytes: info.kv_cache_bytes,
        resident_bytes,
        other_bytes,
        rows,
        left_out,
    };
    write_json(&figures, options.json.as_deref())
}

impl Row {
    fn new(
        model: &ModelBench,
        read_peak: f64,
        kind: &'static str,
        batch: u32,
        depth: u32,
        measured: &Measured,
    ) -> Self {
        let seconds = measured.time.as_secs_f64();
        let (bytes_per_second, flops_per_second) = (measured.bytes as f64 / seconds, measured.flops as f64 / seconds);
        let peaks = model.peaks();
        let compute_peak = match model.info().weight_format {
            "f32" => peaks.f32_flops_per_second,
            "bf16" => peaks.bf16_flops_per_second,
            _ => peaks.int8_ops_per_second,
        };
        Self {
            kind,
            batch,
            depth,
            num_tokens: measured.num_tokens,
            tokens_per_second: measured.tokens_per_second(),
            milliseconds: seconds * 1e3,
            bytes: measured.bytes,
            gb_per_second: bytes_per_second / 1e9,
            read_peak_gb_per_second: read_peak / 1e9,
            read_ratio: bytes_per_second / read_peak,
            gflops: flops_per_second / 1e9,
            compute_ratio: flops_per_second / compute_peak,
        }
    }

    fn print(&self) {
        println!(
            "{:>7} {:>6} {:>6} {:>9.1} {:>9.2} {:>9.1} {:>7.2} {:>8.2} {:>5.1}% {:>10.1} {:>7.1}%",
            self.kind,
            self.batch,
            self.depth,
            self.tokens_per_second,
            self.milliseconds,
            mb(self.bytes),
            self.gb_per_second,
            self.read_peak_gb_per_second,
            100.0 * self.read_ratio,
            self.gflops,
            100.0 * self.compute_ratio
        );
    }
}

fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
