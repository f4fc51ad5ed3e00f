//! `quire bench frontend`: what the faces can carry when the model takes no time.
//!
//! Server, callers and the idle model share this process and this machine, as they would share a small one; each has its own
//! threads. The first figure is tokens a second with as many streams as asked for. The others are the time that a first token
//! takes with few streams at a model's pace, none of which is the model's: for callers who come at any moment, and for
//! callers who come when their stream before has ended, which is when the other streams' tokens of that step come too.

mod client;
mod worker;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::ArgMatches;
use futures::future::try_join_all;
use quire_engine::ModelSource;
use serde::Serialize;
use tokio::runtime::Runtime;

use crate::body_budget::BodyBudget;
use crate::config::{Config, ServerConfig};
use crate::demo;
use crate::generation::{GenerationService, ServiceParts};
use crate::grpc::{self, GrpcLimits};
use crate::http;
use crate::inflight::Inflight;
use crate::lifecycle::{Lifecycle, Serving};
use crate::listener::Listener;
use crate::metrics::{Listener as Kind, ModelMetrics};
use crate::served_model::{ServedModel, TextSide};
use crate::served_models::ServedModels;
use crate::shutdown::Shutdown;
use crate::worker::Worker;

use client::{HttpCaller, Seen};
use worker::{IdleWorker, Pace};

use super::serve::Rng;
use super::{BenchError, number, percentile, value, write_json};

/// Streams of one gRPC connection.
const STREAMS_PER_CONNECTION: u32 = 64;
/// Streams, the fewest tokens of each and the model's pace where first tokens are timed.
const LATENCY_STREAMS: u32 = 64;
const LATENCY_TOKENS: u32 = 16;
const LATENCY_STEP: Duration = Duration::from_millis(20);
/// Threads of the server, and of its callers.
const THREADS: usize = 2;

#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    num_streams: u32,
    num_tokens: u32,
    num_rounds: u32,
    json: Option<PathBuf>,
}

impl Options {
    pub(super) fn read(matches: &ArgMatches, json: Option<PathBuf>) -> Self {
        let number = |name| value(matches, name);
        Self { num_streams: number("streams"), num_tokens: number("tokens"), num_rounds: number("rounds"), json }
    }
}

pub(super) fn command() -> clap::Command {
    clap::Command::new("frontend")
        .about("The faces alone, over a model that takes no time: tokens a second, and time to the first token")
        .arg(number("streams", 1, Some("512"), "Streams at once"))
        .arg(number("tokens", 1, Some("512"), "Tokens of each"))
        .arg(number("rounds", 2, Some("12"), "Streams in each place where first tokens are timed"))
}

/// Figures of one face.
#[derive(Debug, Serialize)]
struct Row {
    face: &'static str,
    streams: u32,
    tokens_per_second: f64,
    tokens_per_read: f64,
    /// Of callers who come at any moment.
    first_token_p50_ms: f64,
    first_token_p99_ms: f64,
    /// Of callers who come at the end of a step.
    step_end_first_token_p50_ms: f64,
    step_end_first_token_p99_ms: f64,
}

/// When a place's next stream begins.
#[derive(Clone, Copy)]
enum Arrival {
    AtOnce,
    /// After a random part of a step.
    AnyMoment,
}

impl Arrival {
    async fn wait(self, number: u64) {
        if let Self::AnyMoment = self {
            tokio::time::sleep(LATENCY_STEP.mul_f64(Rng::new(number).unit())).await;
        }
    }
}

pub(super) fn run(options: &Options) -> Result<(), BenchError> {
    let rows = measure(options).map_err(BenchError::Failed)?;
    println!("first tokens of {LATENCY_STREAMS} streams, ms:                  at any moment    at a step's end");
    println!("face  streams  tokens/s  tokens/read  first token p50  p99          p50    p99");
    for row in &rows {
        println!(
            "{:<4}  {:>7}  {:>8.0}  {:>11.1}  {:>15.2}  {:>3.2}  {:>11.2}  {:>5.2}",
            row.face,
            row.streams,
            row.tokens_per_second,
            row.tokens_per_read,
            row.first_token_p50_ms,
            row.first_token_p99_ms,
            row.step_end_first_token_p50_ms,
            row.step_end_first_token_p99_ms
        );
    }
    write_json(&rows, options.json.as_deref())
}

fn measure(options: &Options) -> Result<Vec<Row>, String> {
    let threads = |name: &str| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(THREADS).thread_name(name).enable_all().build().map_err(|error| error.to_string())
    };
    let (server, callers) = (threads("bench-server")?, threads("bench-callers")?);
    let full = Front::start(&server, Pace::Saturating)?;
    let calm = Front::start(&server, Pace::Every(LATENCY_STEP))?;
    let mut rows = Vec::new();
    for face in [Face::Http, Face::Grpc] {
        let begun = Instant::now();
        let load = Load { num_streams: options.num_streams, num_tokens: options.num_tokens, num_rounds: 1 };
        let seen = callers.block_on(face.load(&full, load, Arrival::AtOnce))?;
        let seconds = begun.elapsed().as_secs_f64();
        let num_tokens = f64::from(options.num_streams) * f64::from(options.num_tokens);
        let num_reads: u64 = seen.iter().map(|seen| seen.num_reads).sum();
        let few = Load { num_streams: LATENCY_STREAMS, num_tokens: LATENCY_TOKENS, num_rounds: options.num_rounds };
        let first_ms = |arrival| -> Result<Vec<f64>, String> {
            let seen = callers.block_on(face.load(&calm, few, arrival))?;
            let mut first: Vec<f64> = seen.iter().map(|seen| seen.first.as_secs_f64() * 1000.0).collect();
            first.sort_unstable_by(f64::total_cmp);
            Ok(first)
        };
        let (first, at_step_end) = (first_ms(Arrival::AnyMoment)?, first_ms(Arrival::AtOnce)?);
        rows.push(Row {
            face: face.name(),
            streams: options.num_streams,
            tokens_per_second: num_tokens / seconds,
            tokens_per_read: num_tokens / num_reads.max(1) as f64,
            first_token_p50_ms: percentile(&first, 50),
            first_token_p99_ms: percentile(&first, 99),
            step_end_first_token_p50_ms: percentile(&at_step_end, 50),
            step_end_first_token_p99_ms: percentile(&at_step_end, 99),
        });
    }
    Ok(rows)
}

/// So many streams at once, one after the other in each of their places.
#[derive(Clone, Copy)]
struct Load {
    num_streams: u32,
    num_tokens: u32,
    num_rounds: u32,
}

#[derive(Clone, Copy)]
enum Face {
    Http,
    Grpc,
}

impl Face {
    fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Grpc => "grpc",
        }
    }

    async fn load(self, front: &Front, load: Load, arrival: Arrival) -> Result<Vec<Seen>, String> {
        let Load { num_streams, num_tokens, num_rounds } = load;
        let mut places = Vec::new();
        let mut channel = None;
        // Where there are several rounds, streams of different lengths begin at different times, and the first round, in which
        // all begin at once, is not looked at.
        let spread = if num_rounds > 1 { num_tokens } else { 1 };
        let num_unseen = usize::from(num_rounds > 1);
        for place in 0..num_streams {
            let address = front.address(self);
            let num_tokens = num_tokens + place % spread;
            let number = move |round: u32| u64::from(place) << 32 | u64::from(round);
            match self {
                Self::Http => {
                    let mut caller = HttpCaller::connect(address, num_tokens).await?;
                    places.push(tokio::spawn(async move {
                        let mut seen = Vec::new();
                        for round in 0..num_rounds {
                            arrival.wait(number(round)).await;
                            seen.push(caller.stream(number(round)).await?);
                        }
                        Ok::<_, String>(seen)
                    }));
                }
                Self::Grpc => {
                    if place % STREAMS_PER_CONNECTION == 0 {
                        channel = Some(client::channel(address).await?);
                    }
                    let Some(channel) = channel.clone() else { continue };
                    places.push(tokio::spawn(async move {
                        let mut seen = Vec::new();
                        for round in 0..num_rounds {
                            arrival.wait(number(round)).await;
                            seen.push(client::grpc_stream(channel.clone(), num_tokens, number(round)).await?);
                        }
                        Ok(seen)
                    }));
                }
            }
        }
        let seen = try_join_all(places).await.map_err(|error| error.to_string())?;
        let seen = seen.into_iter().collect::<Result<Vec<_>, String>>()?;
        Ok(seen.into_iter().flat_map(|place| place.into_iter().skip(num_unseen)).collect())
    }
}

/// Both faces on free ports of the loopback address.
struct Front {
    http: SocketAddr,
    grpc: SocketAddr,
    shutdown: Shutdown,
}

impl Front {
    fn start(runtime: &Runtime, pace: Pace) -> Result<Self, String> {
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let config = Config {
            server: ServerConfig { http: loopback, grpc: loopback, ..ServerConfig::default() },
            ..Config::default()
        };
        let source = ModelSource::Embedded(&demo::MODEL);
        let text = TextSide::load(&source, &config.limits).map_err(|error| error.to_string())?;
        let token_id = text.token_id(" the").ok_or("the demo model has no such token")?;
        let worker = IdleWorker::start(text.num_tokens(), token_id, pace);
        let info = worker.model().clone();
        let model = ServedModel::new(text, "bench".to_owned(), &info);
        let bodies = BodyBudget::new(config.limits.max_buffered_bytes);
        let service = GenerationService::new(ServiceParts {
            models: ServedModels::one(model, Arc::new(worker)),
            limits: config.limits.clone(),
            inflight: Arc::new(Inflight::default()),
            bodies: bodies.clone(),
        });
        let lifecycle = Arc::new(Lifecycle::new(Duration::from_secs(config.server.stall_seconds)));
        let router = http::routes(service.clone());
        let metrics = ModelMetrics::new(&[("bench", &info)]);
        lifecycle.begin_serving(Serving { http: router.clone(), service, metrics });
        let limits = GrpcLimits {
            max_message_bytes: config.server.grpc_max_message_bytes,
            body_timeout: Duration::from_secs(config.limits.body_timeout_seconds),
            bodies,
        };
        let shutdown = Shutdown::default();
        let (http, grpc) = runtime.block_on(async {
            let (grpc_router, _) = grpc::routes(lifecycle, limits).map_err(|error| error.to_string())?;
            let mut addresses = Vec::new();
            for (kind, app) in [(Kind::Http, router), (Kind::Grpc, grpc_router)] {
                let listener =
                    Listener::bind(kind, loopback, &config.server).await.map_err(|error| error.to_string())?;
                addresses.push(listener.address().map_err(|error| error.to_string())?);
                tokio::spawn(listener.serve(app, shutdown.clone()));
            }
            Ok::<_, String>((addresses[0], addresses[1]))
        })?;
        Ok(Self { http, grpc, shutdown })
    }

    fn address(&self, face: Face) -> SocketAddr {
        match face {
            Face::Http => self.http,
            Face::Grpc => self.grpc,
        }
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.shutdown.stopping.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_faces_are_measured() {
        let rows = measure(&Options { num_streams: 3, num_tokens: 20, num_rounds: 2, json: None }).expect("measures");
        assert_eq!(rows.iter().map(|row| row.face).collect::<Vec<_>>(), ["http", "grpc"]);
        for row in rows {
            assert!(row.tokens_per_second > 1.0 && row.first_token_p99_ms >= row.first_token_p50_ms, "{row:?}");
        }
    }
}
