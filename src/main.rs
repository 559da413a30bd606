//! Reads the settings and runs the command.

use std::process::ExitCode;

use polylora::{cli, config};

/// A request makes some hundreds of small allocations, on one thread, and frees them on others: the system's allocator took a fifth of its CPU.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match config::parse(std::env::args_os(), &config::Environment::from_process()) {
        Ok(command) => cli::run(command),
        // Prints help and version to standard output with status 0, errors to standard error with 2.
        Err(error) => error.exit(),
    }
}
