//! `quire bench scheduler`: plan and apply alone, with one plan in flight and no device.

use std::path::Path;
use std::time::Instant;

use quire_scheduler::testing::{StepTiming, TimingOptions, time_decode_steps};
use serde::Serialize;

use super::{BenchError, percentile, write_json};

/// Running sequences of each row of the table.
const LOADS: [u32; 4] = [1, 32, 128, 256];
const STEPS_PER_LOAD: u32 = 4000;

/// Microseconds of scheduling in a step of so many running sequences.
#[derive(Debug, Serialize)]
struct SchedulerRow {
    num_running: u32,
    prefix_cache: bool,
    plan_p50_us: f64,
    apply_p50_us: f64,
    step_p50_us: f64,
    step_p99_us: f64,
    step_mean_us: f64,
}

pub(super) fn command() -> clap::Command {
    clap::Command::new("scheduler").about("The scheduler alone: microseconds for each step")
}

pub(super) fn run(json: Option<&Path>) -> Result<(), BenchError> {
    let rows: Vec<SchedulerRow> =
        LOADS.iter().flat_map(|&load| [true, false].map(|prefix_cache| time_load(load, prefix_cache))).collect();
    println!("running  prefix cache  plan p50  apply p50  step p50  step p99  step mean  (microseconds)");
    for row in &rows {
        println!(
            "{:>7}  {:>12}  {:>8.2}  {:>9.2}  {:>8.2}  {:>8.2}  {:>9.2}",
            row.num_running,
            if row.prefix_cache { "on" } else { "off" },
            row.plan_p50_us,
            row.apply_p50_us,
            row.step_p50_us,
            row.step_p99_us,
            row.step_mean_us
        );
    }
    write_json(&rows, json)
}

fn time_load(num_running: u32, prefix_cache: bool) -> SchedulerRow {
    let origin = Instant::now();
    let mut clock = || u64::try_from(origin.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let options = TimingOptions {
        num_seqs: num_running,
        num_steps: STEPS_PER_LOAD,
        enable_prefix_cache: prefix_cache,
        ..TimingOptions::default()
    };
    let timings = time_decode_steps(&options, &mut clock);
    let sorted = |nanos: fn(&StepTiming) -> u64| {
        let mut values: Vec<u64> = timings.iter().map(nanos).collect();
        values.sort_unstable();
        values
    };
    let (plan, apply) = (sorted(|step| step.plan_nanos), sorted(|step| step.apply_nanos));
    let step = sorted(|step| step.plan_nanos + step.apply_nanos);
    SchedulerRow {
        num_running,
        prefix_cache,
        plan_p50_us: micros(percentile(&plan, 50)),
        apply_p50_us: micros(percentile(&apply, 50)),
        step_p50_us: micros(percentile(&step, 50)),
        step_p99_us: micros(percentile(&step, 99)),
        step_mean_us: micros(step.iter().sum::<u64>()) / step.len().max(1) as f64,
    }
}

fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_is_timed_in_every_step() {
        let row = time_load(2, true);
        assert!(row.plan_p50_us > 0.0 && row.step_p99_us >= row.step_p50_us, "{row:?}");
    }
}
