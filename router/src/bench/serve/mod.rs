//! `quire bench serve`: load for any server with an OpenAI-compatible `/v1/completions`, and what its callers saw.
//!
//! Closed loop: so many callers, each with one request at a time. Open loop: requests arrive at random moments
//! (a Poisson process) whatever the server does. One thread does it all, so that little is taken from a server on the
//! same cores.

mod client;
mod prompts;
mod report;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use clap::{Arg, ArgGroup, ArgMatches};

use self::client::{Client, Outcome, Target};
use self::prompts::Prompts;
pub(super) use self::prompts::Rng;
use self::report::Report;
use super::{BenchError, number, value, write_json};

/// Longest wait that a Retry-After is obeyed for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// What to send where.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    url: String,
    model: Option<String>,
    load: Load,
    num_requests: u32,
    num_warm_up: u32,
    input_tokens: u32,
    output_tokens: u32,
    vocab_size: u32,
    text: bool,
    prompt_file: Option<PathBuf>,
    extra_body: serde_json::Map<String, serde_json::Value>,
    seed: u64,
    ttft_ms: Option<f64>,
    tpot_ms: Option<f64>,
    timeout: Duration,
    label: Option<String>,
    json: Option<PathBuf>,
}

/// When requests are sent.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Load {
    Closed { concurrency: u32 },
    Open { per_second: f64 },
}

pub(super) fn command() -> clap::Command {
    let text = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(value).help(help)
    };
    let positive = |name: &'static str, help: &'static str| {
        text(name, "X", help).value_parser(|text: &str| match text.parse::<f64>() {
            Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
            _ => Err("must be a number above 0".to_owned()),
        })
    };
    clap::Command::new("serve")
        .about("A running server: what callers see of an OpenAI-compatible one under load")
        .arg(text("url", "URL", "Where the server is").default_value("http://127.0.0.1:8000"))
        .arg(text("model", "NAME", "The model to ask for [default: the first that the server lists]"))
        .arg(number("concurrency", 1, None, "Requests at a time, the next when one ends [default: 1]"))
        .arg(positive("rate", "Requests each second instead, at random moments, however many run"))
        .group(ArgGroup::new("load").args(["concurrency", "rate"]))
        .arg(number("requests", 1, Some("64"), "Requests that are measured"))
        .arg(number("warmup", 0, Some("1"), "Requests before them, one after the other"))
        .arg(number("input-tokens", 1, Some("128"), "Tokens of each prompt; words, with --text"))
        .arg(number("output-tokens", 1, Some("64"), "Tokens of each answer"))
        .arg(number("vocab-size", 1, Some("2048"), "Token ids of prompts are below it"))
        .arg(
            Arg::new("text")
                .long("text")
                .action(clap::ArgAction::SetTrue)
                .help("Send words, for servers that take no token ids"),
        )
        .arg(
            text("prompt-file", "FILE", "Send the lines of FILE in turn instead")
                .value_parser(clap::value_parser!(PathBuf)),
        )
        .arg(text("extra-body", "JSON", "Fields of every request beside these, or in place of them").value_parser(
            |text: &str| {
                serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(text)
                    .map_err(|error| format!("must be a JSON object: {error}"))
            },
        ))
        .arg(text("seed", "N", "Of prompts and arrivals").value_parser(clap::value_parser!(u64)).default_value("0"))
        .arg(positive("ttft-ms", "Goodput counts requests whose first token came within this"))
        .arg(positive("tpot-ms", "Goodput counts requests whose later tokens came within this each, on average"))
        .arg(number("timeout", 1, Some("600"), "Seconds that a request may take"))
        .arg(text("label", "TEXT", "A name for these figures, for plots"))
}

impl Options {
    pub(super) fn read(matches: &ArgMatches, json: Option<PathBuf>) -> Result<Self, String> {
        let load = match matches.get_one::<f64>("rate") {
            Some(&per_second) => Load::Open { per_second },
            None => Load::Closed { concurrency: matches.get_one("concurrency").copied().unwrap_or(1) },
        };
        Ok(Self {
            url: value(matches, "url"),
            model: matches.get_one("model").cloned(),
            load,
            num_requests: value(matches, "requests"),
            num_warm_up: value(matches, "warmup"),
            input_tokens: value(matches, "input-tokens"),
            output_tokens: value(matches, "output-tokens"),
            vocab_size: value(matches, "vocab-size"),
            text: matches.get_flag("text"),
            prompt_file: matches.get_one("prompt-file").cloned(),
            extra_body: matches.get_one("extra-body").cloned().unwrap_or_default(),
            seed: value(matches, "seed"),
            ttft_ms: matches.get_one("ttft-ms").copied(),
            tpot_ms: matches.get_one("tpot-ms").copied(),
            timeout: Duration::from_secs(u64::from(value::<u32>(matches, "timeout"))),
            label: matches.get_one("label").cloned(),
            json,
        })
    }
}

pub(super) fn run(options: Options) -> Result<(), BenchError> {
    let target = Target::parse(&options.url).map_err(BenchError::Refused)?;
    let prompts = Prompts::new(&options).map_err(BenchError::Refused)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| BenchError::Failed(format!("cannot start: {error}")))?;
    let local = tokio::task::LocalSet::new();
    let report = local.block_on(&runtime, measure(options.clone(), target, prompts))?;
    report.print();
    write_json(&report, options.json.as_deref())?;
    match report.num_completed() {
        0 => Err(BenchError::Failed("no request was answered".to_owned())),
        _ => Ok(()),
    }
}

/// What all callers share.
struct Run {
    client: Client,
    model: String,
    prompts: Prompts,
    output_tokens: u32,
    extra_body: serde_json::Map<String, serde_json::Value>,
    timeout: Duration,
}

impl Run {
    /// Sends the request of this number. Warm-up requests have numbers of their own, so that no prompt comes twice.
    async fn send(&self, number: u64) -> Outcome {
        let body = self.prompts.body(number, &self.model, self.output_tokens, &self.extra_body);
        self.client.complete(body, self.timeout).await
    }
}

async fn measure(options: Options, target: Target, prompts: Prompts) -> Result<Report, BenchError> {
    let client = Client::new(target);
    let model = match &options.model {
        Some(model) => model.clone(),
        None => client
            .first_model(options.timeout)
            .await
            .map_err(|why| BenchError::Failed(format!("{} does not say which models it has: {why}", options.url)))?,
    };
    let Options { output_tokens, extra_body, timeout, .. } = options.clone();
    let run = Arc::new(Run { client, model, prompts, output_tokens, extra_body, timeout });
    for number in 0..options.num_warm_up {
        run.send(u64::from(options.num_requests) + u64::from(number)).await;
    }
    let busy = report::processor_seconds();
    let start = Instant::now();
    let outcomes = match options.load {
        Load::Closed { concurrency } => closed_loop(&run, options.num_requests, concurrency).await,
        Load::Open { per_second } => open_loop(&run, options.num_requests, per_second, options.seed).await,
    };
    let elapsed = start.elapsed();
    let busy = busy.zip(report::processor_seconds()).map(|(before, after)| after - before);
    Ok(Report::new(&options, &run.model, &outcomes, elapsed, busy))
}

/// Each caller sends its next request when its last one ended, or when the server that refused it said.
async fn closed_loop(run: &Arc<Run>, num_requests: u32, concurrency: u32) -> Vec<Outcome> {
    let next = Arc::new(AtomicU32::new(0));
    let callers: Vec<_> = (0..concurrency.min(num_requests))
        .map(|_| {
            let (run, next) = (Arc::clone(run), Arc::clone(&next));
            tokio::task::spawn_local(async move {
                let mut outcomes = Vec::new();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= num_requests {
                        return outcomes;
                    }
                    let outcome = run.send(u64::from(number)).await;
                    if let Some(wait) = outcome.retry_after() {
                        tokio::time::sleep(wait.min(MAX_RETRY_AFTER)).await;
                    }
                    outcomes.push(outcome);
                }
            })
        })
        .collect();
    gather(callers).await.into_iter().flatten().collect()
}

/// Requests arrive by themselves: the time between two is exponentially distributed.
async fn open_loop(run: &Arc<Run>, num_requests: u32, per_second: f64, seed: u64) -> Vec<Outcome> {
    let mut rng = Rng::new(seed ^ 0x6172_7269_7661_6c73);
    let start = tokio::time::Instant::now();
    let mut at = 0.0;
    let mut requests = Vec::with_capacity(num_requests as usize);
    for number in 0..num_requests {
        tokio::time::sleep_until(start + Duration::from_secs_f64(at)).await;
        let run = Arc::clone(run);
        requests.push(tokio::task::spawn_local(async move { run.send(u64::from(number)).await }));
        at += -(1.0 - rng.unit()).ln() / per_second;
    }
    gather(requests).await
}

async fn gather<T>(tasks: Vec<tokio::task::JoinHandle<T>>) -> Vec<T> {
    let mut results = Vec::with_capacity(tasks.len());
    for task in tasks {
        // A task that panicked has said so; the others count.
        if let Ok(result) = task.await {
            results.push(result);
        }
    }
    results
}
