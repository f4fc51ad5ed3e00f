//! The binary `quire`.

use std::io::Write;
use std::process::ExitCode;

use quire_router::app;
use quire_router::config::{self, Command, Environment};

fn main() -> ExitCode {
    let (file, flags, print_config) = match config::parse(std::env::args_os()) {
        Ok(Command::Serve { file, flags, print_config }) => (file, flags, print_config),
        Ok(Command::Bench(bench)) => return bench.run(),
        Err(error) => error.exit(),
    };
    let loaded = match config::load(file.as_deref(), Environment::of_process(), &flags) {
        Ok(loaded) => loaded,
        Err(error) => return refuse(&error),
    };
    if print_config {
        // A reader that has seen enough is no error.
        let _ = std::io::stdout().write_all(loaded.print().as_bytes());
    }
    match loaded.config.validate() {
        Err(error) => refuse(&error),
        Ok(()) if print_config => ExitCode::SUCCESS,
        Ok(()) => app::run(loaded),
    }
}

fn refuse(error: &config::ConfigError) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::from(2)
}
