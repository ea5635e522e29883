//! The `smalti` program: reads the command line, calls the engine, shows what came out.

mod cli;
mod render;
mod screen;
mod table;
mod terminal;
mod verbs;

use clap::Parser;
use clap::error::ErrorKind;
use screen::Screen;
use smalti::Error;
use std::process::ExitCode;
use verbs::Ending;

/// Networks ask for the same large blocks again and again.
#[global_allocator]
static ALLOCATOR: smalti::Keeping = smalti::Keeping::new();

const DONE: u8 = 0;
const FAILED: u8 = 1;
const USAGE: u8 = 2;
const NOT_IMPLEMENTED: u8 = 2;
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return ExitCode::from(usage(&error)),
    };
    let screen = Screen::new(cli.json);
    ExitCode::from(match verbs::run(cli, &screen) {
        Ok(Ending::Well) => DONE,
        Ok(Ending::Differs) => FAILED,
        Ok(Ending::NotImplemented) => NOT_IMPLEMENTED,
        Err(error) => {
            screen.error(&error.to_string());
            if matches!(error, Error::Interrupted { .. }) { INTERRUPTED } else { FAILED }
        }
    })
}

/// Shows what clap has to say: help and version are not errors.
fn usage(error: &clap::Error) -> u8 {
    let asked = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    if !asked && std::env::args_os().any(|arg| arg == "--json") {
        let text = error.render().to_string();
        let line = text.lines().next().unwrap_or_default();
        Screen::new(true).error(line.strip_prefix("error: ").unwrap_or(line));
    } else {
        // Nothing can be done if the terminal is gone.
        let _ = error.print();
    }
    if asked { DONE } else { USAGE }
}
