//! Training: the step, the optimiser, the schedule, run folders and exact resuming.

pub mod checkpoint;
pub mod conditions;
mod data;
pub mod ema;
pub mod gradients;
pub mod objective;
pub mod objectives;
pub mod optimizer;
pub mod pixels;
mod ranges;
pub mod recipe;
pub mod run_folder;
pub mod schedule;
pub mod start;
pub mod tensorboard;
pub mod trainer;

pub use optimizer::{AdamW, OptimizerConfig};
pub use recipe::{Recipe, Task};
pub use run_folder::RunFolder;
pub use schedule::Schedule;
pub use trainer::Outcome;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Int, Tensor};
use objectives::{encoder::EncoderObjective, generator::GeneratorObjective, tokenizer::TokenizerObjective};
use smalti_base::{Progress, Result};
use std::path::Path;

/// Runs a recipe in a folder, or continues the run that is there. `device` is a plain device.
///
/// # Errors
/// A folder of another recipe, in which another process works, or that began with other data; data or parts that cannot be read or
/// do not fit, files that cannot be written, or losses that are not finite.
pub fn run(recipe: &Recipe, out: &Path, device: &Device, progress: &dyn Progress) -> Result<Outcome> {
    go_on(recipe, out, Changes::Refuse, device, progress)
}

/// What a run does that finds other data than it began with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changes {
    /// It is an error.
    Refuse,
    /// It goes on with what is there now, and says so.
    Accept,
}

/// [`run`], which may go on with other data than the run began with.
///
/// # Errors
/// As [`run`].
pub fn go_on(
    recipe: &Recipe,
    out: &Path,
    changes: Changes,
    device: &Device,
    progress: &dyn Progress,
) -> Result<Outcome> {
    recipe.check(&recipe.name)?;
    let trained_on = device.clone().autodiff();
    let folder = RunFolder::open(out, &recipe.table()?)?;
    start::check(recipe, !folder.steps()?.is_empty())?;
    match &recipe.task {
        Task::Tokenizer(task) => {
            let objective = TokenizerObjective::open(recipe, task, device)?;
            data::must_be_the_same(&objective, &folder, changes, progress)?;
            device.seed(recipe.seed);
            let mut model = initialised(objective.init(&trained_on)?);
            model.model = start::prepare(model.model, recipe, &folder, progress)?;
            trainer::train(&objective, model, recipe, &folder, device, progress)
        }
        Task::Generator(task) => {
            let objective = GeneratorObjective::open(recipe, task, device)?;
            data::must_be_the_same(&objective, &folder, changes, progress)?;
            device.seed(recipe.seed);
            let model = initialised(objective.init(&trained_on)?);
            let model = start::prepare(model, recipe, &folder, progress)?;
            trainer::train(&objective, model, recipe, &folder, device, progress)
        }
        Task::Encoder(task) => {
            let objective = EncoderObjective::open(recipe, task, device)?;
            data::must_be_the_same(&objective, &folder, changes, progress)?;
            device.seed(recipe.seed);
            let mut model = initialised(objective.init(&trained_on)?);
            model.model = start::prepare(model.model, recipe, &folder, progress)?;
            trainer::train(&objective, model, recipe, &folder, device, progress)
        }
    }
}

/// Checks all that can be checked before weights are read: that the data are there, come out as the model takes them and say what
/// it is conditioned on, and that the parts and the weights to start from fit.
///
/// # Errors
/// As [`run`].
pub fn check(recipe: &Recipe, out: &Path) -> Result<()> {
    recipe.check(&recipe.name)?;
    let checkpoints = out.join("checkpoints");
    let resumed = checkpoints.read_dir().is_ok_and(|mut entries| entries.next().is_some());
    start::check(recipe, resumed)?;
    match &recipe.task {
        Task::Tokenizer(task) => TokenizerObjective::check(task),
        Task::Generator(task) => GeneratorObjective::check(task),
        Task::Encoder(task) => EncoderObjective::check(recipe, task),
    }
}

/// Draws all initial weights now, in the order of the tree: parameters are lazy, and the order in which they are first used
/// would otherwise decide which gets which numbers.
fn initialised<M: Module>(model: M) -> M {
    struct Draw;
    impl ModuleVisitor for Draw {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            param.val();
        }
        fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
            param.val();
        }
    }
    model.visit(&mut Draw);
    model
}
