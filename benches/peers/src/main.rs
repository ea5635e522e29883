//! smalti and PyTorch side by side: the same weights and inputs, outputs compared, runs alternating.
//!
//! ```sh
//! cargo run --release -p smalti-peers -- --rows gpt --rounds 5
//! ```
//! makes a Python environment, measures the rows whose names contain `gpt`, and writes `docs/benchmarks.md` and `.json`.

mod agreement;
mod driver;
mod machine;
mod page;
mod process;
mod python;
mod results;
mod rows;
mod systems;
mod worker;

use clap::{Parser, Subcommand};
use smalti::Result;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Measures smalti against PyTorch
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    /// Only rows whose name contains this; several are separated by commas
    #[arg(long, value_name = "FILTER", default_value = "")]
    rows: String,
    /// Rounds of each row [default: the row's]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Threads of both sides [default: one for each core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Folder of benchmarks.md and benchmarks.json
    #[arg(long, value_name = "DIR", default_value = "docs")]
    out: PathBuf,
    /// The Python interpreter that the environment is made with
    #[arg(long, value_name = "PROGRAM", default_value = "python3")]
    python: PathBuf,
    /// Rewrite the page from benchmarks.json and measure nothing
    #[arg(long)]
    render: bool,
}

/// What the program is when it starts itself.
#[derive(Subcommand)]
enum Role {
    /// Write what smalti's side of a row needs beside the shared files
    #[command(hide = true)]
    Prepare { folder: PathBuf },
    /// Write smalti's outputs
    #[command(hide = true)]
    Check { folder: PathBuf },
    /// Run when told to
    #[command(hide = true)]
    Worker { folder: PathBuf },
}

/// The folder of this crate: Python's side, rows and notes lie here.
fn home() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn run(arguments: &Arguments) -> Result<()> {
    match &arguments.role {
        Some(Role::Prepare { folder }) => worker::prepare(folder),
        Some(Role::Check { folder }) => worker::check(folder),
        Some(Role::Worker { folder }) => worker::serve(folder),
        None if arguments.render => page::write(&arguments.out),
        None => driver::measure(&driver::Wish {
            filter: arguments.rows.clone(),
            rounds: arguments.rounds,
            threads: arguments.threads,
            out: arguments.out.clone(),
            python: arguments.python.clone(),
        }),
    }
}

/// As the program `smalti` has it.
#[global_allocator]
static ALLOCATOR: smalti::Keeping = smalti::Keeping::new();

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
