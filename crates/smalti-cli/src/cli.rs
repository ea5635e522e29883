//! The command line. What a verb takes is declared once, beside the verb, in the engine.

use clap::{Parser, Subcommand};
use clap_complete::Shell;
use smalti::Settings;

/// Image tokenizers and generators over their tokens: train, tokenize, generate, edit, evaluate.
#[derive(Debug, Parser)]
#[command(name = "smalti", version, propagate_version = true, max_term_width = 110, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
    /// What all verbs share.
    #[command(flatten, next_help_heading = "Global options")]
    pub settings: Settings,
    /// Print one JSON document on standard output; progress and messages go to standard error
    #[arg(long, global = true)]
    pub json: bool,
    /// Show no progress and no messages, only results and errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Without a terminal: a line for every step
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// Resolve and check everything, print the plan, and do nothing
    #[arg(long, global = true)]
    pub dry_run: bool,
}

const EXAMPLES: &str = "\
Examples:
  smalti generate \"a red heart\" -o heart.png
  smalti train recipes/vqgan/tiny.toml --out runs/tokenizer
  smalti reconstruct photos/ --model runs/tokenizer -o out/
  smalti systems

Every verb has its own examples: smalti VERB --help";

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the systems that exist, with their papers
    #[command(after_help = "Examples:\n  smalti systems\n  smalti systems --json")]
    Systems,
    /// Print a completion script for a shell
    #[command(
        after_help = "Examples:\n  smalti completions bash > ~/.local/share/bash-completion/completions/smalti\n  \
                            smalti completions zsh > ~/.zfunc/_smalti"
    )]
    Completions {
        /// The shell
        shell: Shell,
    },
}
