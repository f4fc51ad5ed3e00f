//! What the callers of a load saw, in figures.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::client::{Failure, Outcome, Timing};
use super::{Load, Options};
use crate::bench::percentile;

/// Milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Percentiles {
    p50: f64,
    p90: f64,
    p99: f64,
}

impl Percentiles {
    fn of(durations: impl Iterator<Item = Duration>) -> Self {
        let mut sorted: Vec<Duration> = durations.collect();
        sorted.sort_unstable();
        let milliseconds = |percent| percentile(&sorted, percent).as_secs_f64() * 1e3;
        Self { p50: milliseconds(50), p90: milliseconds(90), p99: milliseconds(99) }
    }
}

/// Requests that were refused because there are too many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct Refused {
    num_requests: usize,
    /// How many were told when to come back, and the longest wait among them.
    num_with_retry_after: usize,
    max_retry_after_seconds: u64,
}

/// The figures of a load.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// For plots: what this run is called.
    label: String,
    url: String,
    model: String,
    /// Closed loop.
    concurrency: Option<u32>,
    /// Open loop.
    requests_per_second_sent: Option<f64>,
    num_requests: usize,
    num_completed: usize,
    /// By status, or by how they broke.
    failures: BTreeMap<String, usize>,
    refused: Refused,
    seconds: f64,
    prompt_tokens: u64,
    output_tokens: u64,
    output_tokens_per_second: f64,
    total_tokens_per_second: f64,
    requests_per_second: f64,
    /// Sent to first token; later tokens, each request's mean; gaps between events.
    ttft_ms: Percentiles,
    tpot_ms: Percentiles,
    itl_ms: Percentiles,
    goodput: Option<Goodput>,
    /// What this client itself took, in percent of a core.
    client_core_percent: Option<f64>,
}

/// Requests a second that met all targets.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Goodput {
    ttft_ms: Option<f64>,
    tpot_ms: Option<f64>,
    num_requests: usize,
    requests_per_second: f64,
}

/// Time per output token: of a request with one token, none.
fn tpot(timing: &Timing) -> Option<Duration> {
    let num_gaps = u32::try_from(timing.completion_tokens.saturating_sub(1)).ok().filter(|num_gaps| *num_gaps > 0)?;
    Some((timing.last - timing.first) / num_gaps)
}

impl Report {
    pub(super) fn new(
        options: &Options,
        model: &str,
        outcomes: &[Outcome],
        elapsed: Duration,
        busy_seconds: Option<f64>,
    ) -> Self {
        let (mut completed, mut failures, mut refused) = (Vec::new(), BTreeMap::new(), Refused::default());
        for outcome in outcomes {
            match outcome {
                Outcome::Completed(timing) => completed.push(timing),
                Outcome::Failed(failure) => {
                    *failures.entry(failure.name()).or_insert(0) += 1;
                    if let Failure::Status { code: 429, retry_after } = failure {
                        refused.num_requests += 1;
                        refused.num_with_retry_after += usize::from(retry_after.is_some());
                        let seconds = retry_after.unwrap_or_default().as_secs();
                        refused.max_retry_after_seconds = refused.max_retry_after_seconds.max(seconds);
                    }
                }
            }
        }
        let seconds = elapsed.as_secs_f64();
        let prompt_tokens: u64 = completed.iter().map(|timing| timing.prompt_tokens).sum();
        let output_tokens: u64 = completed.iter().map(|timing| timing.completion_tokens).sum();
        let (concurrency, rate) = match options.load {
            Load::Closed { concurrency } => (Some(concurrency), None),
            Load::Open { per_second } => (None, Some(per_second)),
        };
        let met = |target: Option<f64>, duration: Duration| target.is_none_or(|ms| duration.as_secs_f64() * 1e3 <= ms);
        let goodput = (options.ttft_ms.is_some() || options.tpot_ms.is_some()).then(|| {
            let is_good = |timing: &&&Timing| {
                met(options.ttft_ms, timing.first) && met(options.tpot_ms, tpot(timing).unwrap_or_default())
            };
            let num_requests = completed.iter().filter(is_good).count();
            Goodput {
                ttft_ms: options.ttft_ms,
                tpot_ms: options.tpot_ms,
                num_requests,
                requests_per_second: num_requests as f64 / seconds,
            }
        });
        Self {
            label: options.label.clone().unwrap_or_else(|| model.to_owned()),
            url: options.url.clone(),
            model: model.to_owned(),
            concurrency,
            requests_per_second_sent: rate,
            num_requests: outcomes.len(),
            num_completed: completed.len(),
            failures,
            refused,
            seconds,
            prompt_tokens,
            output_tokens,
            output_tokens_per_second: output_tokens as f64 / seconds,
            total_tokens_per_second: (prompt_tokens + output_tokens) as f64 / seconds,
            requests_per_second: completed.len() as f64 / seconds,
            ttft_ms: Percentiles::of(completed.iter().map(|timing| timing.first)),
            tpot_ms: Percentiles::of(completed.iter().filter_map(|timing| tpot(timing))),
            itl_ms: Percentiles::of(completed.iter().flat_map(|timing| timing.gaps.iter().copied())),
            goodput,
            client_core_percent: busy_seconds.map(|busy| 100.0 * busy / seconds),
        }
    }

    pub(super) fn num_completed(&self) -> usize {
        self.num_completed
    }

    pub(super) fn print(&self) {
        println!("{} at {}", self.model, self.url);
        println!("requests   {} completed of {} in {:.2} s", self.num_completed, self.num_requests, self.seconds);
        for (name, count) in &self.failures {
            println!("failed     {count} ({name})");
        }
        let refused = &self.refused;
        if refused.num_requests > 0 {
            println!(
                "refused    {}, {} with Retry-After, at most {} s",
                refused.num_requests, refused.num_with_retry_after, refused.max_retry_after_seconds
            );
        }
        println!("tokens     {} in, {} out", self.prompt_tokens, self.output_tokens);
        println!(
            "pace       {:.1} output tokens/s, {:.1} total tokens/s, {:.2} requests/s",
            self.output_tokens_per_second, self.total_tokens_per_second, self.requests_per_second
        );
        println!("{:<10} {:>9} {:>9} {:>9}  (milliseconds)", "", "p50", "p90", "p99");
        for (name, values) in [("TTFT", self.ttft_ms), ("TPOT", self.tpot_ms), ("ITL", self.itl_ms)] {
            println!("{name:<10} {:>9.2} {:>9.2} {:>9.2}", values.p50, values.p90, values.p99);
        }
        if let Some(goodput) = &self.goodput {
            println!("goodput    {:.2} requests/s ({})", goodput.requests_per_second, goodput.num_requests);
        }
        if let Some(percent) = self.client_core_percent {
            println!("client     {percent:.1} % of a core");
        }
    }
}

/// Seconds of processor time that this process has had; `None` where the system does not say.
pub(super) fn processor_seconds() -> Option<f64> {
    // Nanoseconds of the one thread that does the work.
    let text = std::fs::read_to_string("/proc/self/schedstat").ok()?;
    let nanos: u64 = text.split_whitespace().next()?.parse().ok()?;
    Some(nanos as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completed(first_ms: u64, last_ms: u64, completion_tokens: u64) -> Outcome {
        let (first, last) = (Duration::from_millis(first_ms), Duration::from_millis(last_ms));
        let timing = Timing { first, last, gaps: vec![last - first], prompt_tokens: 10, completion_tokens };
        Outcome::Completed(timing)
    }

    fn refused(retry_after: Option<u64>) -> Outcome {
        Outcome::Failed(Failure::Status { code: 429, retry_after: retry_after.map(Duration::from_secs) })
    }

    #[test]
    fn figures_follow_from_what_was_seen() {
        let outcomes = [
            completed(100, 500, 5),
            completed(200, 300, 5),
            completed(900, 900, 1),
            refused(Some(3)),
            refused(None),
            Outcome::Failed(Failure::BrokenStream),
        ];
        let options = Options {
            url: "http://x".to_owned(),
            model: None,
            load: Load::Closed { concurrency: 2 },
            num_requests: 6,
            num_warm_up: 0,
            input_tokens: 10,
            output_tokens: 5,
            vocab_size: 9,
            text: false,
            prompt_file: None,
            extra_body: serde_json::Map::new(),
            seed: 0,
            ttft_ms: Some(200.0),
            tpot_ms: Some(50.0),
            timeout: Duration::from_secs(1),
            label: None,
            json: None,
        };
        let report = Report::new(&options, "m", &outcomes, Duration::from_secs(2), Some(0.5));
        assert_eq!((report.num_requests, report.num_completed), (6, 3));
        assert_eq!(report.failures, BTreeMap::from([("429".to_owned(), 2), ("broken stream".to_owned(), 1)]));
        assert_eq!(report.refused, Refused { num_requests: 2, num_with_retry_after: 1, max_retry_after_seconds: 3 });
        assert_eq!((report.prompt_tokens, report.output_tokens), (30, 11));
        assert_eq!((report.output_tokens_per_second, report.total_tokens_per_second), (5.5, 20.5));
        assert_eq!(report.ttft_ms.p50, 200.0);
        // 400 ms and 100 ms over four tokens each; one token has no pace.
        assert_eq!((report.tpot_ms.p50, report.itl_ms.p99), (100.0, 400.0));
        // The first is too slow, the third began too late.
        let goodput = report.goodput.expect("targets were given");
        assert_eq!((goodput.num_requests, goodput.requests_per_second), (1, 0.5));
        assert_eq!(report.client_core_percent, Some(25.0));
    }
}
