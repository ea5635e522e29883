//! The training loop: one visible straight line of batch, gradients, clip, step, EMA, log. What is trained comes in through
//! [`Objective`], how through the [`Recipe`].

use crate::checkpoint::{self, State};
use crate::objective::{Evaluation, Objective, StepOutput};
use crate::optimizer::Pace;
use crate::run_folder::{Metrics, RunFolder};
use crate::tensorboard::EventWriter;
use crate::{AdamW, Recipe, ema, gradients};
use burn::module::{Module, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor};
use serde::Serialize;
use serde_json::json;
use smalti_base::{Error, Progress, Result, files};
use smalti_data::image::encode_png;
use smalti_models::checkpoint::weights::{Precision, load_module, save_module};
use smalti_models::host;
use smalti_models::quantizers::{Stats, usage::Usage};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// After so many skipped steps in a row a run stops.
const SKIPS_IN_A_ROW: u64 = 10;

/// What a run came to.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Steps done in all.
    pub step: u64,
    /// Steps skipped because something was not finite.
    pub skipped: u64,
    /// Images left out because they could not be used; `skipped.tsv` in the run's folder lists them.
    pub skipped_images: usize,
    /// Whether all steps of the recipe are done; otherwise the run was interrupted and can be continued.
    pub finished: bool,
    /// Seconds of this call.
    pub seconds: f64,
    /// Values of the last evaluation.
    pub evaluation: serde_json::Map<String, serde_json::Value>,
    /// The finished bundle.
    pub bundle: Option<PathBuf>,
    /// The run's folder.
    pub folder: PathBuf,
}

/// Factors of the gradients of parts of the model.
type Clip = Vec<(HashSet<ParamId>, f64)>;

struct Trainer<'a, O: Objective> {
    objective: &'a O,
    recipe: &'a Recipe,
    folder: &'a RunFolder,
    progress: &'a dyn Progress,
    model: O::Model,
    average: Option<O::Model>,
    optimizer: AdamW,
    state: State,
    metrics: Metrics,
    events: EventWriter,
    window: Window,
    /// Key and reason of images that could not be used, those before a pause included.
    skipped_images: BTreeSet<(String, String)>,
    /// Whether some of them are not listed on the disk.
    has_new_skips: bool,
    /// The step whose checkpoint is there.
    saved: Option<u64>,
}

/// What was seen since the last line of the log, still on the device.
#[derive(Default)]
struct Window {
    terms: Vec<(&'static str, Tensor<1>)>,
    /// How often each term was there: some are only at some steps.
    seen: BTreeMap<&'static str, usize>,
    counts: Vec<(&'static str, Tensor<1>)>,
    norms: Vec<f64>,
    codes: Vec<Tensor<2, Int>>,
    since: Option<Instant>,
    steps: u64,
}

/// Trains `model` until the recipe's last step, or until the user stops it. Goes on from the newest checkpoint in the
/// folder, and then ends with the same bytes as a run that was never stopped.
///
/// # Errors
/// Data, checkpoints or logs that cannot be read or written; too many steps that are not finite.
pub fn train<O: Objective>(
    objective: &O,
    model: O::Model,
    recipe: &Recipe,
    folder: &RunFolder,
    device: &Device,
    progress: &dyn Progress,
) -> Result<Outcome> {
    let began = Instant::now();
    let mut trainer = Trainer::open(objective, model, recipe, folder, progress)?;
    let per_step = recipe.batch.size as u64 * recipe.batch.accumulate as u64;
    let mut batches = objective.batches(trainer.state.step * per_step)?;
    warn_of_warmup(recipe, progress);
    progress.begin(&recipe.name, recipe.schedule.steps, "steps");
    progress.resume(trainer.state.step);
    trainer.window.since = Some(Instant::now());
    let mut skips = 0;
    trainer.catch_up()?;
    while trainer.state.step < recipe.schedule.steps && !progress.cancelled() {
        let step = trainer.state.step;
        // Draws of layers such as dropout come from the device: a step's draws depend on nothing but the step.
        device.seed(recipe.seed.wrapping_add(step.wrapping_mul(0x9E37_79B9_7F4A_7C15)));
        let mut sum = GradientsParams::new();
        let mut stats = None;
        for micro in 0..recipe.batch.accumulate {
            let batch = batches.next().ok_or_else(|| Error::invalid("data", "ended unexpectedly"))??;
            let mut output = objective.step(&trainer.model, batch, step, micro as u64)?;
            let weight = 1.0 / recipe.batch.accumulate as f64;
            gradients::accumulate(&trainer.model, &mut sum, &mut output.gradients, weight);
            stats = merge(stats, output.stats.take());
            trainer.window.see(output);
        }
        match trainer.clip(&sum) {
            Some(clip) => {
                trainer = trainer.apply(sum, clip, stats, step);
                skips = 0;
            }
            None => {
                trainer.state.skipped += 1;
                skips += 1;
                progress.say(&format!("step {step} skipped: its loss or gradient is not finite"));
            }
        }
        trainer.state.step += 1;
        trainer.window.steps += 1;
        if skips >= SKIPS_IN_A_ROW {
            let checkpoint = folder.checkpoint(folder.steps()?.last().copied().unwrap_or(0));
            return Err(Error::NonFinite { step, skipped: skips, checkpoint });
        }
        trainer.after_step()?;
    }
    progress.end();
    trainer.finish(began)
}

fn warn_of_warmup(recipe: &Recipe, progress: &dyn Progress) {
    let schedule = &recipe.schedule;
    if !schedule.reaches_its_peak() {
        let share = 100.0 * schedule.factor(schedule.steps.saturating_sub(1));
        progress.say(&format!(
            "warning: the warm-up takes {} steps, the run {}: the learning rate reaches {share:.0} % of its peak",
            schedule.warmup, schedule.steps
        ));
    }
}

impl<'a, O: Objective> Trainer<'a, O> {
    fn open(
        objective: &'a O,
        model: O::Model,
        recipe: &'a Recipe,
        folder: &'a RunFolder,
        progress: &'a dyn Progress,
    ) -> Result<Self> {
        let average = recipe.ema.as_ref().map(|_| model.valid());
        let optimizer = AdamW::new(&recipe.optimizer, &model)?;
        let fresh = Weights { model, average, optimizer };
        let found = newest(&fresh, folder, progress)?;
        let saved = found.as_ref().map(|(_, state)| state.step);
        let (Weights { model, average, optimizer }, state) = found.unwrap_or((fresh, State::default()));
        let measured = state.measured == Some(state.step);
        let metrics = folder.metrics(state.step, measured)?;
        let events = EventWriter::open(folder.root(), saved, measured)?;
        if let Some(step) = saved {
            progress.say(&format!("continuing from step {step}"));
        }
        Ok(Self {
            objective,
            recipe,
            folder,
            progress,
            model,
            average,
            optimizer,
            state,
            metrics,
            events,
            window: Window::default(),
            skipped_images: folder.skipped()?.into_iter().collect(),
            has_new_skips: false,
            saved,
        })
    }

    fn save(&mut self) -> Result<()> {
        let step = self.state.step;
        self.list_skipped()?;
        if self.saved == Some(step) {
            return Ok(());
        }
        self.metrics.sync()?;
        let none = std::collections::BTreeMap::new();
        let mut state = self.state.clone();
        files::write_folder(&self.folder.checkpoint(step), |inside| {
            save_module(&self.model, &inside.join("model.safetensors"), Precision::F32, &none)?;
            if let Some(average) = &self.average {
                save_module(average, &inside.join("ema.safetensors"), Precision::F32, &none)?;
            }
            save_module(&self.optimizer.moments, &inside.join("optimizer.safetensors"), Precision::F32, &none)?;
            checkpoint::seal(inside, &mut state)
        })?;
        (self.state, self.saved) = (state, Some(step));
        Ok(())
    }

    /// Factors that clip each optimiser's gradients; `None` if any is not finite. Reading the norms is the one wait for the
    /// device in a step: without it a step that must be skipped would already have been applied.
    fn clip(&mut self, sum: &GradientsParams) -> Option<Clip> {
        let discriminator = self.objective.discriminator_prefix();
        let is_discriminator = |path: &str| discriminator.is_some_and(|prefix| path.starts_with(prefix));
        let mut factors = Vec::new();
        for discriminators in [false, true] {
            let part = gradients::select(&self.model, |path| is_discriminator(path) == discriminators);
            let Some(norm) = gradients::global_norm(&self.model, sum, &part) else { continue };
            let norm = f64::from(norm.into_scalar::<f32>());
            if !norm.is_finite() {
                return None;
            }
            if !discriminators {
                self.window.norms.push(norm);
            }
            if let Some(limit) = self.recipe.optimizer.clip_norm.filter(|limit| norm > *limit) {
                factors.push((part, limit / (norm + 1e-6)));
            }
        }
        Some(factors)
    }

    /// Owns the trainer while weights and averages are updated in place.
    fn apply(mut self, mut sum: GradientsParams, clip: Clip, stats: Option<Stats>, step: u64) -> Self {
        let rate_factor = self.recipe.schedule.factor(step);
        let average_decay = self.recipe.ema.as_ref().map(|ema| ema.decay_at(step));
        let weight_decay_factor = self.recipe.schedule.weight_decay_factor(step);
        let pace = Pace { update: self.state.updates, rate_factor, weight_decay_factor, average_decay, clip };
        // The average follows in the optimiser's pass, unless the objective changes weights after it, such as codes that revive.
        let (in_pass, after) = if stats.is_none() { (self.average, None) } else { (None, self.average) };
        let (model, average) = self.optimizer.step(self.model, in_pass, &mut sum, &pace);
        let (model, counts) = self.objective.update(model, stats, step);
        self.average = match after {
            Some(average) => Some(ema::follow(average, &model, average_decay)),
            None => average.map(|average| ema::follow(average, &model, None)),
        };
        self.model = model;
        for (name, count) in counts {
            add(&mut self.window.counts, name, count);
        }
        self.state.updates += 1;
        self
    }

    fn after_step(&mut self) -> Result<()> {
        let step = self.state.step;
        self.note_skipped();
        if step.is_multiple_of(self.recipe.logging.every) || self.is_last() {
            self.list_skipped()?;
            self.log()?;
        } else {
            self.progress.advance(step, "");
        }
        // Saved first: an evaluation that fails loses no step.
        if self.is_measured() || self.is_saved() {
            self.save()?;
        }
        if self.is_measured() {
            self.evaluate()?;
        }
        if self.is_measured() || self.is_saved() { self.tidy() } else { Ok(()) }
    }

    fn is_last(&self) -> bool {
        self.state.step == self.recipe.schedule.steps
    }

    fn is_measured(&self) -> bool {
        self.state.step > 0 && (self.state.step.is_multiple_of(self.recipe.evaluation.every) || self.is_last())
    }

    fn is_saved(&self) -> bool {
        self.state.step.is_multiple_of(self.recipe.checkpoint.every) || self.is_last()
    }

    /// Does what a run that was killed after a checkpoint did not come to.
    fn catch_up(&mut self) -> Result<()> {
        if self.is_measured() && self.state.measured != Some(self.state.step) {
            self.evaluate()?;
        }
        self.tidy()
    }

    /// Keeps the checkpoints that the recipe asks for, and the best.
    fn tidy(&mut self) -> Result<()> {
        let step = self.state.step;
        let is_best = self.state.best.is_some_and(|(_, best)| best == step);
        // Only there until the evaluation was done. A run that stops here saves it again.
        if self.saved == Some(step) && self.is_measured() && !self.is_saved() && !is_best {
            self.folder.remove(step)?;
            self.saved = None;
        }
        self.prune()
    }

    fn prune(&self) -> Result<()> {
        self.folder.prune(self.recipe.checkpoint.keep, self.state.best.map(|(_, step)| step))
    }

    /// Says which images could not be used.
    fn note_skipped(&mut self) {
        let one_line = |text: String| text.replace(['\t', '\n', '\r'], " ");
        for (key, error) in self.objective.skipped() {
            let line = format!("skipped {key}: {error}");
            if self.skipped_images.insert((one_line(key), one_line(error))) {
                self.progress.say(&line);
                self.has_new_skips = true;
            }
        }
    }

    /// Lists them in the folder. What is not listed when a run is killed was skipped after its last checkpoint, and will be again.
    fn list_skipped(&mut self) -> Result<()> {
        if std::mem::take(&mut self.has_new_skips) {
            let all: Vec<_> = self.skipped_images.iter().cloned().collect();
            self.folder.write_skipped(&all)?;
        }
        Ok(())
    }

    fn log(&mut self) -> Result<()> {
        let step = self.state.step;
        let window = std::mem::replace(&mut self.window, Window { since: Some(Instant::now()), ..Window::default() });
        let seconds = window.since.map(|since| since.elapsed().as_secs_f64()).unwrap_or_default().max(1e-9);
        let images = window.steps * self.recipe.batch.size as u64 * self.recipe.batch.accumulate as u64;
        let mut line = serde_json::Map::new();
        line.insert("step".into(), json!(step));
        let mut note = Vec::new();
        for (name, value) in window.values() {
            line.insert(name.to_string(), json!(value));
            self.events.scalar(&format!("train/{name}"), step, value)?;
            if name == "loss" {
                note.push(format!("loss {value:.4}"));
            }
        }
        let rate = self.recipe.optimizer.learning_rate * self.recipe.schedule.factor(step.saturating_sub(1));
        line.insert("learning_rate".into(), json!(rate));
        self.events.scalar("train/learning_rate", step, rate)?;
        if let Some(usage) = self.objective.vocabulary().map(|codes| window.usage(codes)).transpose()?.flatten() {
            line.insert("codebook_usage".into(), json!(usage.used_fraction()));
            line.insert("codebook_perplexity".into(), json!(usage.perplexity()));
            self.events.scalar("train/codebook_usage", step, usage.used_fraction())?;
            self.events.scalar("train/codebook_perplexity", step, usage.perplexity())?;
            note.push(format!("codes {:.0}%", 100.0 * usage.used_fraction()));
            let counts: Vec<f64> = usage.histogram().iter().map(|c| *c as f64).collect();
            let limits: Vec<f64> = (1..=counts.len()).map(|i| i as f64).collect();
            self.events.histogram("train/code_use", step, &limits, &counts)?;
        }
        let speed = images as f64 / seconds;
        line.insert("skipped".into(), json!(self.state.skipped));
        line.insert("images_per_second".into(), json!(speed));
        self.metrics.line(&serde_json::Value::Object(line))?;
        note.push(format!("{speed:.1} img/s"));
        self.progress.advance(step, &note.join(", "));
        Ok(())
    }

    /// The model as it is used: averaged if the recipe says so, on the plain device.
    fn model_in_use(&self) -> O::Model {
        self.average.clone().unwrap_or_else(|| self.model.valid())
    }

    fn evaluate(&mut self) -> Result<()> {
        let step = self.state.step;
        let Evaluation { values, score, picture } =
            self.objective.evaluate(&self.model_in_use(), &smalti_base::progress::Silent)?;
        self.note_skipped();
        self.list_skipped()?;
        let mut found = serde_json::Map::new();
        let mut line = serde_json::Map::from_iter([("step".to_string(), json!(step))]);
        for (name, value) in &values {
            self.events.scalar(&format!("validation/{name}"), step, *value)?;
            line.insert(format!("validation_{name}"), json!(value));
            found.insert(name.clone(), json!(value));
        }
        self.metrics.line(&serde_json::Value::Object(line))?;
        let shown: Vec<String> = values.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        self.progress.say(&format!("step {step}, validation: {}", shown.join(", ")));
        if let Some(picture) = picture {
            let path = self.folder.samples().join(format!("step-{step:08}.png"));
            let png = encode_png(&picture, None)?;
            files::write_bytes(&path, &png)?;
            let channels = if picture.grey { 1 } else { 3 };
            self.events.picture("validation/samples", step, [channels, picture.height, picture.width], &png)?;
        }
        if self.state.best.is_none_or(|(best, _)| score < best) {
            self.state.best = Some((score, step));
        }
        (self.state.measured, self.state.evaluation) = (Some(step), found);
        // A checkpoint tells what its evaluation found: a run that goes on from it has the same to tell.
        self.metrics.sync()?;
        checkpoint::write_state(&self.folder.checkpoint(step), &self.state)
    }

    fn finish(mut self, began: Instant) -> Result<Outcome> {
        let step = self.state.step;
        let finished = step >= self.recipe.schedule.steps;
        self.save()?;
        self.prune()?;
        let bundle = self.folder.bundle();
        if finished {
            let mut facts = json!({
                "recipe": self.recipe.name,
                "steps": step,
                "seed": self.recipe.seed,
                "validation": self.state.evaluation,
            });
            if let Some(start) = self.folder.start()? {
                facts["start"] = json!(start);
            }
            let model = self.model_in_use();
            files::write_folder(&bundle, |inside| self.objective.export(&model, inside, &facts))?;
        }
        Ok(Outcome {
            step,
            skipped: self.state.skipped,
            skipped_images: self.skipped_images.len(),
            finished,
            seconds: began.elapsed().as_secs_f64(),
            evaluation: self.state.evaluation,
            bundle: finished.then_some(bundle),
            folder: self.folder.root().to_path_buf(),
        })
    }
}

/// What a checkpoint holds as tensors.
struct Weights<M: Module> {
    model: M,
    average: Option<M>,
    optimizer: AdamW,
}

impl<M: Module> Weights<M> {
    /// The same with the values of a checkpoint.
    fn load(&self, folder: &Path) -> Result<(Self, State)> {
        let state = checkpoint::open(folder)?;
        let load = |module: &M, name: &str| load_module(module.clone(), &folder.join(name));
        let model = load(&self.model, "model.safetensors")?;
        let average = self.average.as_ref().map(|average| load(average, "ema.safetensors")).transpose()?;
        let moments = load_module(self.optimizer.moments.clone(), &folder.join("optimizer.safetensors"))?;
        Ok((Self { model, average, optimizer: self.optimizer.with_moments(moments) }, state))
    }
}

/// The newest checkpoint that is whole, if there is any. Damaged ones that are newer are taken out of the way.
///
/// # Errors
/// The newest one's damage if none is whole; [`Error::Io`].
fn newest<M: Module>(
    fresh: &Weights<M>,
    folder: &RunFolder,
    progress: &dyn Progress,
) -> Result<Option<(Weights<M>, State)>> {
    let mut damaged: Vec<(u64, Error)> = Vec::new();
    for step in folder.steps()?.into_iter().rev() {
        match fresh.load(&folder.checkpoint(step)) {
            Err(error) => damaged.push((step, error)),
            Ok(found) => {
                for (step, error) in damaged {
                    let aside = folder.set_aside(step)?;
                    progress.say(&format!(
                        "warning: the checkpoint of step {step} cannot be used: {error}; it is now {}",
                        aside.display()
                    ));
                }
                return Ok(Some(found));
            }
        }
    }
    match damaged.into_iter().next() {
        None => Ok(None),
        Some((step, error)) => Err(Error::invalid_hint(
            folder.checkpoint(step).display(),
            format!("no checkpoint can be used; of the newest: {error}"),
            "to begin anew, choose another folder with --out or remove this one",
        )),
    }
}

impl Window {
    fn see(&mut self, output: StepOutput) {
        for (name, value) in output.terms {
            add(&mut self.terms, name, value);
            *self.seen.entry(name).or_default() += 1;
        }
        self.codes.extend(output.codes);
    }

    /// Means of the terms and norms, and sums of the counts.
    fn values(&self) -> Vec<(&'static str, f64)> {
        let mut values: Vec<(&'static str, f64)> = self
            .terms
            .iter()
            .map(|(name, sum)| (*name, f64::from(sum.clone().into_scalar::<f32>()) / self.seen[name] as f64))
            .collect();
        if !self.norms.is_empty() {
            values.push(("gradient_norm", self.norms.iter().sum::<f64>() / self.norms.len() as f64));
        }
        values.extend(self.counts.iter().map(|(name, sum)| (*name, f64::from(sum.clone().into_scalar::<f32>()))));
        values
    }

    fn usage(&self, vocabulary: usize) -> Result<Option<Usage>> {
        if self.codes.is_empty() {
            return Ok(None);
        }
        let mut usage = Usage::new(vocabulary);
        usage.add(host::ints(Tensor::cat(self.codes.clone(), 0))?);
        Ok(Some(usage))
    }
}

fn add(sums: &mut Vec<(&'static str, Tensor<1>)>, name: &'static str, value: Tensor<1>) {
    match sums.iter_mut().find(|(known, _)| *known == name) {
        Some((_, sum)) => *sum = sum.clone() + value,
        None => sums.push((name, value)),
    }
}

/// Statistics of micro-batches together.
fn merge(old: Option<Stats>, new: Option<Stats>) -> Option<Stats> {
    match (old, new) {
        (Some(old), Some(new)) => Some(old.merge(new)),
        (old, new) => new.or(old),
    }
}
