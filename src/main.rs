//! Reads the settings and runs the command.

use std::process::ExitCode;

use polylora::{cli, config};

fn main() -> ExitCode {
    match config::parse(std::env::args_os(), &config::Environment::from_process()) {
        Ok(command) => cli::run(command),
        // Prints help and version to standard output with status 0, errors to standard error with 2.
        Err(error) => error.exit(),
    }
}
