//! `quire bench ops`: single operations at the shapes of a model, beside what the device can do at most.

use std::path::{Path, PathBuf};

use clap::{Arg, ArgMatches};
use quire_engine::bench::{self, AttentionShape, DType, OpCase, OpEffort, OpFigure, Peaks, WeightFormat, WeightLayout};
use serde::Serialize;

use super::machine::PeakFigures;
use super::{BenchError, list, number, value, write_json};
use crate::config::{self, Environment, Flag};

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    cases: Vec<OpCase>,
    effort: OpEffort,
    json: Option<PathBuf>,
}

/// One line of the table.
#[derive(Debug, Serialize)]
struct Row {
    /// `linear` or `attention`.
    op: &'static str,
    /// Of a product `OUT x IN`, with `gate-up` behind where SwiGLU follows; of attention `HEADS/KV_HEADS x DIM, block N`.
    shape: String,
    /// What weights or cache are stored as.
    format: &'static str,
    /// Rows of a product; sequences.
    batch: usize,
    /// Of attention: new tokens of each sequence, and all that it has.
    new_tokens: Option<usize>,
    context: Option<usize>,
    microseconds: f64,
    gb_per_second: f64,
    /// Of what the device read at most in this run.
    read_ratio: f64,
    gflops: f64,
    /// Of the measured peak of the type that is multiplied.
    compute_ratio: f64,
}

#[derive(Debug, Serialize)]
struct Figures {
    device: String,
    isa: String,
    peaks: PeakFigures,
    rows: Vec<Row>,
    /// Cases that the device had no memory for.
    left_out: Vec<String>,
}

/// The products of Llama-3.1-8B: queries, keys and values; output; gate and up; down.
const LINEAR: &str = "6144x4096,4096x4096,28672x4096:gate-up,4096x14336";

pub(super) fn command() -> clap::Command {
    let text = |name: &'static str, value: &'static str, default: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(value).value_delimiter(',').default_value(default).help(help)
    };
    let numbers = |name: &'static str, default: &'static str, help: &'static str| {
        text(name, "N,...", default, help).value_parser(clap::value_parser!(u32).range(1..=1 << 20))
    };
    clap::Command::new("ops")
        .about("Single operations at a model's shapes, beside what the device can do at most")
        .arg(text("op", "OP,...", "linear,attention", "Which").value_parser(["linear", "attention"]))
        .arg(text("linear", "OUTxIN[:gate-up],...", LINEAR, "Weights of products"))
        .arg(
            text("formats", "F,...", "bf16", "What weights are stored as")
                .value_parser(["f32", "bf16", "fp8", "int8", "int4"]),
        )
        .arg(numbers("rows", "1,8,32,64", "Rows of products"))
        .arg(text("heads", "Q/KVxDIM", "32/8x128", "Heads of attention: queries, keys and values, dimensions"))
        .arg(
            text("cache", "TYPE,...", "bf16", "What K and V are stored as")
                .value_parser(["f32", "bf16", "int8", "fp8"]),
        )
        .arg(text(
            "sequences",
            "SEQS[xNEW]xCONTEXT,...",
            "32x4096,256x1024",
            "Sequences, their new tokens [1], all of theirs",
        ))
        .arg(numbers("blocks", "16,64", "Tokens in a block of the cache"))
        .arg(number("data-mib", 1, Some("512"), "Data that runs take turns with; more than caches hold"))
        .arg(number("milliseconds", 1, Some("300"), "Of each case"))
}

/// Numbers with `x` between them.
fn sizes(text: &str) -> Option<Vec<usize>> {
    let sizes: Vec<usize> = text.split('x').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    sizes.iter().all(|size| (1..=1 << 20).contains(size)).then_some(sizes)
}

fn texts<'a>(matches: &'a ArgMatches, name: &str) -> impl Iterator<Item = &'a str> {
    matches.get_many::<String>(name).into_iter().flatten().map(String::as_str)
}

fn linear_cases(matches: &ArgMatches) -> Result<Vec<OpCase>, String> {
    let mut cases = Vec::new();
    for text in texts(matches, "linear") {
        let (shape, layout) = match text.strip_suffix(":gate-up") {
            Some(shape) => (shape, WeightLayout::GateUp),
            None => (text, WeightLayout::Stacked),
        };
        let Some(&[out_features, in_features]) = sizes(shape).as_deref() else {
            return Err(format!("--linear {text}: not OUTxIN or OUTxIN:gate-up"));
        };
        if layout == WeightLayout::GateUp && out_features % 2 != 0 {
            return Err(format!("--linear {text}: gate and up are two of equal size"));
        }
        for format in texts(matches, "formats") {
            let format = match format {
                "f32" => WeightFormat::F32,
                "fp8" => WeightFormat::Fp8,
                "int8" => WeightFormat::int8(in_features),
                "int4" => WeightFormat::int4(),
                _ => WeightFormat::Bf16,
            };
            let rows = list(matches, "rows");
            cases.extend(rows.into_iter().map(|rows| OpCase::Linear {
                out_features,
                in_features,
                layout,
                format,
                rows: rows as usize,
            }));
        }
    }
    Ok(cases)
}

fn attention_cases(matches: &ArgMatches) -> Result<Vec<OpCase>, String> {
    let mut cases = Vec::new();
    for heads in texts(matches, "heads") {
        let parts = heads.split_once('/').and_then(|(q, rest)| Some((sizes(q)?, sizes(rest)?)));
        let shape = match parts.as_ref().map(|(q, rest)| (q.as_slice(), rest.as_slice())) {
            Some((&[num_heads], &[num_kv_heads, head_dim])) if num_heads % num_kv_heads == 0 && head_dim % 2 == 0 => {
                AttentionShape { num_heads, num_kv_heads, head_dim }
            }
            _ => return Err(format!("--heads {heads}: not Q/KVxDIM, Q a multiple of KV and DIM even")),
        };
        for cache in texts(matches, "cache") {
            let dtype = match cache {
                "f32" => DType::F32,
                "int8" => DType::I8,
                "fp8" => DType::F8E4M3,
                _ => DType::Bf16,
            };
            for text in texts(matches, "sequences") {
                let (num_seqs, new_tokens, context_len) = match sizes(text).as_deref() {
                    Some(&[seqs, context]) => (seqs, 1, context),
                    Some(&[seqs, new, context]) if new <= context => (seqs, new, context),
                    _ => return Err(format!("--sequences {text}: not SEQSxCONTEXT or SEQSxNEWxCONTEXT")),
                };
                for block_size in list(matches, "blocks") {
                    let block_size = block_size as usize;
                    cases.push(OpCase::Attention { shape, block_size, dtype, num_seqs, new_tokens, context_len });
                }
            }
        }
    }
    Ok(cases)
}

impl Options {
    pub(super) fn read(matches: &ArgMatches, json: Option<PathBuf>) -> Result<Self, String> {
        let mut cases = Vec::new();
        for op in texts(matches, "op") {
            cases.extend(if op == "linear" { linear_cases(matches)? } else { attention_cases(matches)? });
        }
        let effort = OpEffort {
            data_bytes: value::<u32>(matches, "data-mib") as usize * (1 << 20),
            milliseconds: value(matches, "milliseconds"),
        };
        Ok(Self { cases, effort, json })
    }
}

pub(super) fn run(options: &Options, file: Option<&Path>, flags: &[Flag]) -> Result<(), BenchError> {
    let loaded = config::load(file, Environment::of_process(), flags)
        .and_then(|loaded| loaded.config.validate().map(|()| loaded))
        .map_err(|error| BenchError::Refused(error.to_string()))?;
    let engine = loaded.config.engine_for(&loaded.environment);
    let mut figures: Option<Figures> = None;
    let measured = bench::ops(&engine, &options.cases, options.effort, |peaks, device, case, figure| {
        let figures = figures.get_or_insert_with(|| {
            let peaks = PeakFigures::of(peaks);
            println!("{}, {}", device.name, device.isa);
            println!("peaks: {peaks}");
            println!("       op                          shape  format  batch    new context         us     GB/s  of it    GFLOP/s  of it");
            let (device, isa) = (device.name.clone(), device.isa.clone());
            Figures { device, isa, peaks, rows: Vec::new(), left_out: Vec::new() }
        });
        let row = Row::new(peaks, case, figure);
        match figure {
            Some(_) => {
                row.print();
                figures.rows.push(row);
            }
            None => figures.left_out.push(format!("{} {} {} x {}", row.op, row.shape, row.format, row.batch)),
        }
    });
    measured.map_err(|error| BenchError::Failed(error.to_string()))?;
    let Some(figures) = figures else { return Err(BenchError::Failed("there is nothing to measure".to_owned())) };
    figures.left_out.iter().for_each(|case| println!("no memory for {case}"));
    write_json(&figures, options.json.as_deref())
}

impl Row {
    fn new(peaks: &Peaks, case: &OpCase, figure: Option<OpFigure>) -> Self {
        let figure = figure.unwrap_or(OpFigure { seconds: f64::INFINITY, bytes: 0, flops: 0, num_times: 0 });
        let (bytes, flops) = (figure.bytes as f64 / figure.seconds, figure.flops as f64 / figure.seconds);
        let (op, shape, format, batch, new_tokens, context) = match *case {
            OpCase::Linear { out_features, in_features, layout, format, rows } => {
                let suffix = if layout == WeightLayout::GateUp { " gate-up" } else { "" };
                ("linear", format!("{out_features}x{in_features}{suffix}"), format.name(), rows, None, None)
            }
            OpCase::Attention { shape, block_size, dtype, num_seqs, new_tokens, context_len } => {
                let AttentionShape { num_heads, num_kv_heads, head_dim } = shape;
                let name = format!("{num_heads}/{num_kv_heads}x{head_dim}, block {block_size}");
                ("attention", name, dtype.name(), num_seqs, Some(new_tokens), Some(context_len))
            }
        };
        let compute_peak = match (op, format) {
            (_, "f32") => peaks.f32_flops_per_second,
            ("linear", "bf16") | ("attention", _) => peaks.bf16_flops_per_second,
            _ => peaks.int8_ops_per_second,
        };
        Self {
            op,
            shape,
            format,
            batch,
            new_tokens,
            context,
            microseconds: figure.seconds * 1e6,
            gb_per_second: bytes / 1e9,
            read_ratio: bytes / peaks.read_bytes_per_second,
            gflops: flops / 1e9,
            compute_ratio: flops / compute_peak,
        }
    }

    fn print(&self) {
        let or_none = |number: Option<usize>| number.map_or_else(String::new, |number| number.to_string());
        println!(
            "{:>9} {:>30} {:>7} {:>6} {:>6} {:>7} {:>10.1} {:>8.1} {:>5.1}% {:>10.1} {:>5.1}%",
            self.op,
            self.shape,
            self.format,
            self.batch,
            or_none(self.new_tokens),
            or_none(self.context),
            self.microseconds,
            self.gb_per_second,
            100.0 * self.read_ratio,
            self.gflops,
            100.0 * self.compute_ratio
        );
    }
}
