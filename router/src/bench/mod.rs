//! `quire bench`: figures of this machine, this build and any server, as a table and as JSON.

mod frontend;
mod machine;
mod model;
mod ops;
mod scheduler;
mod serve;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Arg, ArgMatches};
use serde::Serialize;

use crate::config::Flag;

/// What to measure.
#[derive(Clone, Debug, PartialEq)]
pub enum Bench {
    /// Plan and apply alone.
    Scheduler { json: Option<PathBuf> },
    /// The device's limits.
    Machine { json: Option<PathBuf>, num_threads: usize },
    /// A model without a server; settings are those of `serve`.
    Model { options: model::Options, file: Option<PathBuf>, flags: Vec<Flag> },
    /// Single operations; settings are those of `serve`.
    Ops { options: ops::Options, file: Option<PathBuf>, flags: Vec<Flag> },
    /// The faces, over a model that takes no time.
    Frontend(frontend::Options),
    /// A server, by load.
    Serve(serve::Options),
}

/// Why there are no figures. The second kind is a wrong command line or configuration.
enum BenchError {
    Failed(String),
    Refused(String),
}

impl Bench {
    /// The subcommand. `with_settings` adds MODEL and the configuration's flags.
    pub(crate) fn command(with_settings: impl Fn(clap::Command) -> clap::Command) -> clap::Command {
        let json = || {
            Arg::new("json")
                .long("json")
                .value_name("FILE")
                .value_parser(clap::value_parser!(PathBuf))
                .help("Write the figures as JSON to FILE, and not behind the table")
        };
        clap::Command::new("bench")
            .about("Measure this machine, this build, or a server")
            .subcommand_required(true)
            .arg_required_else_help(true)
            .subcommand(scheduler::command().arg(json()))
            .subcommand(machine::command().arg(json()))
            .subcommand(with_settings(model::command().arg(json())))
            .subcommand(with_settings(ops::command().arg(json())))
            .subcommand(frontend::command().arg(json()))
            .subcommand(serve::command().arg(json()))
    }

    /// What the command line asks for. `read_settings` reads what `with_settings` added.
    pub(crate) fn read(
        matches: &ArgMatches,
        read_settings: impl Fn(&ArgMatches) -> Result<(Option<PathBuf>, Vec<Flag>), String>,
    ) -> Result<Self, String> {
        let (name, matches) = matches.subcommand().ok_or("bench needs to know what to measure")?;
        let json = matches.get_one::<PathBuf>("json").cloned();
        match name {
            "scheduler" => Ok(Self::Scheduler { json }),
            "machine" => Ok(Self::Machine { json, num_threads: value(matches, "threads") }),
            "model" => {
                let (file, flags) = read_settings(matches)?;
                Ok(Self::Model { options: model::Options::read(matches, json)?, file, flags })
            }
            "ops" => {
                let (file, flags) = read_settings(matches)?;
                Ok(Self::Ops { options: ops::Options::read(matches, json)?, file, flags })
            }
            "frontend" => Ok(Self::Frontend(frontend::Options::read(matches, json))),
            _ => Ok(Self::Serve(serve::Options::read(matches, json)?)),
        }
    }

    /// Measures, prints, and says how it went: 0, 1 where it failed, 2 where it was not begun.
    pub fn run(self) -> ExitCode {
        let done = match self {
            Self::Scheduler { json } => scheduler::run(json.as_deref()),
            Self::Machine { json, num_threads } => machine::run(num_threads, json.as_deref()),
            Self::Model { options, file, flags } => model::run(&options, file.as_deref(), &flags),
            Self::Ops { options, file, flags } => ops::run(&options, file.as_deref(), &flags),
            Self::Frontend(options) => frontend::run(&options),
            Self::Serve(options) => serve::run(options),
        };
        match done {
            Ok(()) => ExitCode::SUCCESS,
            Err(BenchError::Failed(why)) => {
                eprintln!("error: {why}");
                ExitCode::FAILURE
            }
            Err(BenchError::Refused(why)) => {
                eprintln!("error: {why}");
                ExitCode::from(2)
            }
        }
    }
}

/// Of an option that has a default.
fn value<T: Clone + Send + Sync + 'static>(matches: &ArgMatches, name: &str) -> T {
    matches.get_one::<T>(name).cloned().expect("clap fills in the default")
}

/// Numbers with commas between them.
fn list(matches: &ArgMatches, name: &str) -> Vec<u32> {
    matches.get_many::<u32>(name).into_iter().flatten().copied().collect()
}

/// An option for a number from `min` on.
fn number(name: &'static str, min: u32, default: Option<&'static str>, help: &'static str) -> Arg {
    let parser = clap::value_parser!(u32).range(i64::from(min)..);
    let arg = Arg::new(name).long(name).value_name("N").value_parser(parser).help(help);
    match default {
        Some(default) => arg.default_value(default),
        None => arg,
    }
}

/// The figures as JSON: to a file, or as the last line on standard output.
fn write_json(figures: &impl Serialize, file: Option<&Path>) -> Result<(), BenchError> {
    let failed = |why: String| BenchError::Failed(why);
    match file {
        None => println!("{}", serde_json::to_string(figures).map_err(|error| failed(error.to_string()))?),
        Some(path) => {
            let mut text = serde_json::to_string_pretty(figures).map_err(|error| failed(error.to_string()))?;
            text.push('\n');
            std::fs::write(path, text).map_err(|error| failed(format!("cannot write {}: {error}", path.display())))?;
        }
    }
    Ok(())
}

/// Of ascending values; 0 where there are none.
fn percentile<T: Copy + Default>(sorted: &[T], percent: usize) -> T {
    let index = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(index).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_of_the_list() {
        let values: Vec<u64> = (1..=100).collect();
        assert_eq!((percentile(&values, 50), percentile(&values, 99), percentile::<u64>(&[], 50)), (51, 100, 0));
    }
}
