//! From a parsed command line to the engine and back to the screen.

use crate::cli::{Cli, Verb};
use crate::render;
use crate::screen::{self, Screen};
use crate::terminal::{Terminal, stop_flag};
use clap::CommandFactory;
use serde::Serialize;
use smalti::{Error, Progress, Result};

/// Carries out a command.
///
/// # Errors
/// What the engine returns.
pub fn run(cli: Cli, screen: &Screen) -> Result<()> {
    if let Some(threads) = cli.settings.threads {
        set_threads(threads)?;
    }
    match cli.verb {
        Verb::Systems => screen.show(&smalti::systems::run(), render::systems),
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "smalti", &mut script);
            screen::print(&String::from_utf8_lossy(&script));
        }
    }
    Ok(())
}

fn set_threads(threads: usize) -> Result<()> {
    if threads == 0 {
        return Err(Error::invalid("--threads", "0 threads can do nothing; expected 1 or more"));
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|error| Error::invalid("--threads", error.to_string()))
}
