//! What a training step does after the loss, in the order of `smalti train`.

use super::{Outputs, Task, inputs};
use crate::rows::Row;
use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use serde::Deserialize;
use smalti::base::{Error, Result};
use smalti::training::optimizer::Pace;
use smalti::training::{AdamW, OptimizerConfig, gradients};

/// The optimiser's part of a row's options.
#[derive(Deserialize)]
pub struct OptimizerOptions {
    learning_rate: f64,
    betas: (f64, f64),
    #[serde(default)]
    weight_decay: f64,
}

/// A model under training.
pub struct Trained<M: Module> {
    /// Taken out while it changes, so that weights are updated in place.
    model: Option<M>,
    optimizer: AdamW,
    updates: u64,
    /// How the paths of the discriminator's parameters begin, if there is one.
    discriminator: Option<&'static str>,
}

impl<M: Module> Trained<M> {
    /// Begins with these weights.
    pub fn new(row: &Row, model: M, discriminator: Option<&'static str>) -> Result<Self> {
        let OptimizerOptions { learning_rate, betas, weight_decay } = inputs::options(row)?;
        let config =
            OptimizerConfig { learning_rate, betas, epsilon: 1e-8, weight_decay, clip_norm: None, groups: Vec::new() };
        Ok(Self { optimizer: AdamW::new(&config, &model)?, model: Some(model), updates: 0, discriminator })
    }

    /// The model as it is now.
    pub fn model(&self) -> &M {
        self.model.as_ref().expect("taken out only inside of `change`")
    }

    /// Changes the model.
    pub fn change(&mut self, change: impl FnOnce(M) -> M) {
        self.model = self.model.take().map(change);
    }

    /// Looks whether gradients are finite, as a step that is not would be skipped, and applies them.
    pub fn apply(&mut self, mut found: GradientsParams) -> Result<()> {
        let mut sum = GradientsParams::new();
        gradients::accumulate(self.model(), &mut sum, &mut found, 1.0);
        let is_discriminator = |path: &str| self.discriminator.is_some_and(|prefix| path.starts_with(prefix));
        for discriminators in [false, true] {
            let part = gradients::select(self.model(), |path| is_discriminator(path) == discriminators);
            let norm = gradients::global_norm(self.model(), &sum, &part);
            if norm.is_some_and(|norm| !norm.into_scalar::<f32>().is_finite()) {
                return Err(Error::invalid("training step", "its gradients are not finite"));
            }
        }
        let pace = Pace { update: self.updates, rate_factor: 1.0, ..Pace::default() };
        self.model = self.model.take().map(|model| self.optimizer.step(model, None, &mut sum, &pace).0);
        self.updates += 1;
        Ok(())
    }
}

/// What a generator's training step is of its own.
pub trait Lesson: Sync {
    /// The generator.
    type Model: Module + Sync;

    /// The loss of the row's batch.
    fn loss(&self, model: &Self::Model) -> Result<Tensor<1>>;

    /// The weight whose update is compared, `[inputs, outputs]`.
    fn watched(model: &Self::Model) -> Result<Tensor<2>>;
}

/// Loss, gradients, AdamW.
pub struct Step<L: Lesson> {
    trained: Trained<L::Model>,
    lesson: L,
}

impl<L: Lesson> Step<L> {
    /// Begins with these weights.
    pub fn new(row: &Row, model: L::Model, lesson: L) -> Result<Self> {
        Ok(Self { trained: Trained::new(row, model, None)?, lesson })
    }

    fn step(&mut self) -> Result<Tensor<1>> {
        let (model, lesson) = (self.trained.model(), &self.lesson);
        let (value, gradients) = smalti_kernels::on_pool(&Device::flex(), || {
            let loss = lesson.loss(model)?;
            let value = loss.clone().inner();
            Ok::<_, Error>((value, GradientsParams::from_grads(loss.backward(), model)))
        })?;
        self.trained.apply(gradients)?;
        Ok(value)
    }
}

impl<L: Lesson> Task for Step<L> {
    fn check(&mut self) -> Result<Outputs> {
        let before = L::watched(self.trained.model())?;
        let loss = self.step()?;
        let update = change(before, L::watched(self.trained.model())?).transpose();
        Ok(inputs::outputs([("loss", inputs::floats(loss)), ("update", inputs::floats(update))]))
    }

    fn run(&mut self) -> Result<()> {
        std::hint::black_box(self.step()?.into_data());
        Ok(())
    }
}

/// The device to train on.
pub fn device() -> Device {
    Device::flex().autodiff()
}

/// How a weight changed.
pub fn change<const D: usize>(before: Tensor<D>, after: Tensor<D>) -> Tensor<D> {
    after.inner() - before.inner()
}
