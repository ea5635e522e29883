//! From a parsed command line to the engine and back to the screen.

use crate::cli::{Cli, Verb};
use crate::render;
use crate::screen::{self, Screen};
use crate::terminal::{Terminal, stop_flag};
use clap::CommandFactory;
use serde::Serialize;
use smalti::parity::Status;
use smalti::{
    Progress, Result, assemble, bench, edit, evaluate, export, generate, import, parity, reconstruct, tokenize, train,
};

/// How a command that met no error ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All is well.
    Well,
    /// What was compared differs.
    Differs,
    /// Something that this build does not have was asked for.
    NotImplemented,
}

/// Carries out a command.
///
/// # Errors
/// What the engine returns.
pub fn run(cli: Cli, screen: &Screen) -> Result<Ending> {
    cli.settings.apply()?;
    let terminal = Terminal::new(cli.quiet, cli.verbose, stop_flag());
    let settings = &cli.settings;
    let session = Session { screen, progress: &terminal, dry_run: cli.dry_run };
    let mut ending = Ending::Well;
    match cli.verb {
        Verb::Train(args) => session.carry_out(train::plan(&args, settings), train::run, render::train),
        Verb::Tokenize(args) => session.carry_out(tokenize::plan(&args, settings), tokenize::run, render::tokenize),
        Verb::Generate(args) => session.carry_out(generate::plan(&args, settings), generate::run, render::generate),
        Verb::Edit(args) => session.carry_out(edit::plan(&args, settings), edit::run, render::edit),
        Verb::Reconstruct(args) => {
            session.carry_out(reconstruct::plan(&args, settings), reconstruct::run, render::reconstruct)
        }
        Verb::Evaluate(args) => session.carry_out(evaluate::plan(&args, settings), evaluate::run, render::evaluate),
        Verb::Bench(args) => session.carry_out(bench::plan(&args, settings), bench::run, render::bench),
        Verb::Import(args) => session.carry_out(import::plan(&args, settings, &terminal), import::run, render::import),
        Verb::Export(args) => session.carry_out(export::plan(&args, settings), export::run, render::export),
        Verb::Assemble(args) => session.carry_out(assemble::plan(&args, settings), assemble::run, render::assemble),
        Verb::Parity(args) => {
            let run = |plan: &parity::ParityPlan, progress: &dyn Progress| {
                let outcome = parity::run(plan, progress)?;
                ending = match outcome.status() {
                    Status::Passed => Ending::Well,
                    Status::Failed => Ending::Differs,
                    Status::NotImplemented => Ending::NotImplemented,
                };
                Ok(outcome)
            };
            session.carry_out(parity::plan(&args, settings), run, render::parity)
        }
        Verb::Inspect(args) => screen.show(&smalti::inspect::run(&args)?, render::inspect),
        Verb::Systems => screen.show(&smalti::systems::run(), render::systems),
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "smalti", &mut script);
            screen::print(&String::from_utf8_lossy(&script))
        }
    }?;
    Ok(ending)
}

/// What carrying out a plan needs.
struct Session<'a> {
    screen: &'a Screen,
    progress: &'a Terminal,
    dry_run: bool,
}

impl Session<'_> {
    /// Shows the plan, or carries it out and shows what came of it.
    fn carry_out<P: Serialize, O: Serialize>(
        &self,
        plan: Result<P>,
        run: impl FnOnce(&P, &dyn Progress) -> Result<O>,
        text: impl FnOnce(&O) -> String,
    ) -> Result<()> {
        let plan = plan?;
        match self.dry_run {
            true => self.screen.plan(&plan),
            false => self.screen.show(&run(&plan, self.progress)?, text),
        }
    }
}
