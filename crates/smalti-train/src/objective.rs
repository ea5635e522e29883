//! What a run trains: the only thing in which runs differ.

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Int, Tensor};
use smalti_base::{Progress, Result};
use smalti_data::image::Image;
use smalti_models::quantizers::Stats;
use std::collections::BTreeMap;
use std::path::Path;

/// A model with its data and loss.
pub trait Objective {
    /// Everything that is trained or averaged, a discriminator included.
    type Model: Module;
    /// One micro-batch on the host.
    type Batch;

    /// What the run learns from and is measured on, by the key in the recipe: a run that goes on must find the same.
    ///
    /// # Errors
    /// Data that cannot be read.
    fn inputs(&self) -> Result<BTreeMap<String, String>> {
        Ok(BTreeMap::new())
    }

    /// What was found wrong in the data but did not hinder opening them.
    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }

    /// Endless micro-batches, beginning at the `start`-th training example. They depend on the recipe and on `start` only.
    ///
    /// # Errors
    /// Data that cannot be opened.
    fn batches(&self, start: u64) -> Result<Box<dyn Iterator<Item = Result<Self::Batch>> + '_>>;

    /// Examples in one epoch.
    fn epoch(&self) -> u64;

    /// Images that could not be used, each with its reason, since the last call; one may come again.
    fn skipped(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    /// Number of codes whose use is logged, if steps return codes.
    fn vocabulary(&self) -> Option<usize> {
        None
    }

    /// How the paths of the discriminator's parameters begin, if there is one: its gradients are clipped by themselves.
    fn discriminator_prefix(&self) -> Option<&'static str> {
        None
    }

    /// Gradients and loss terms of one micro-batch at an optimiser step.
    ///
    /// # Errors
    /// A batch that does not fit the model.
    fn step(&self, model: &Self::Model, batch: Self::Batch, step: u64, micro: u64) -> Result<StepOutput>;

    /// Applies what a step did to buffers that no gradient reaches, such as EMA codebooks. Returns
    /// counts to log, tensors of one element.
    fn update(&self, model: Self::Model, _: Option<Stats>, _: u64) -> (Self::Model, Vec<(&'static str, Tensor<1>)>) {
        (model, Vec::new())
    }

    /// Measures a model on validation data; `model` is on the plain device.
    ///
    /// # Errors
    /// Data that cannot be read.
    fn evaluate(&self, model: &Self::Model, progress: &dyn Progress) -> Result<Evaluation>;

    /// Writes the model as a bundle into the folder; `model` is on the plain device.
    ///
    /// # Errors
    /// Files that cannot be written.
    fn export(&self, model: &Self::Model, folder: &Path, facts: &serde_json::Value) -> Result<()>;
}

/// What one micro-batch gives.
pub struct StepOutput {
    /// Gradients of all trained parameters.
    pub gradients: GradientsParams,
    /// Named loss terms, tensors of one element, on the device.
    pub terms: Vec<(&'static str, Tensor<1>)>,
    /// What [`Objective::update`] needs.
    pub stats: Option<Stats>,
    /// Codes of the batch, for codebook usage.
    pub codes: Option<Tensor<2, Int>>,
}

/// What an evaluation found.
pub struct Evaluation {
    /// Named values for the log.
    pub values: Vec<(String, f64)>,
    /// The value that decides which checkpoint is best; lower is better.
    pub score: f64,
    /// A picture to look at, if there is one.
    pub picture: Option<Image>,
}
