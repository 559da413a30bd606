//! What each command does.

pub mod adapters;
pub mod bench;
mod engine;
mod kept;
mod lora_dirs;
pub mod serve;

use std::{
    io::{Read, Write},
    process::ExitCode,
};

use crate::config::Command;

/// Runs a command; errors are printed here.
pub fn run(command: Command) -> ExitCode {
    let result = match command {
        Command::Serve(config) => serve::run(*config),
        Command::Bench(args) => bench::run(&args),
        Command::Adapters(args) => adapters::run(&args),
        Command::HashKey => hash_key(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The chain of causes on one line, most general first.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints the SHA-256 of the key on standard input, without its line end.
fn hash_key() -> anyhow::Result<()> {
    let mut key = String::new();
    std::io::stdin().take(64 * 1024).read_to_string(&mut key)?;
    let key = key.trim_end_matches(['\r', '\n']);
    anyhow::ensure!(!key.is_empty(), "no key on standard input");
    writeln!(std::io::stdout(), "{}", crate::auth::sha256_hex(key))?;
    Ok(())
}
