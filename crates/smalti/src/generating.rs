//! What all verbs that generate share.

use crate::model::{ModelPlan, PlannedCondition, Wish};
use crate::{SamplingArgs, Settings, WeightsArgs};
use burn::tensor::Device;
use serde::Serialize;
use smalti_base::{Error, Progress, Result};
use smalti_models::generators::{GeneratorModel, check_sampling};
use smalti_models::sampling::Sampling;
use smalti_models::{Codes, Condition, Generator, ImageRequest, Request};
use smalti_nn::dense::WeightPrecision;
use std::path::{Path, PathBuf};

/// What is typed for every verb that generates.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Typed<'a> {
    pub model: Option<&'a Path>,
    pub wish: Wish<'a>,
    pub negative: Option<&'a str>,
    pub sampling: &'a SamplingArgs,
    pub weights: &'a WeightsArgs,
}

/// What is generated and by what: resolved and checked.
#[derive(Clone, Debug, Serialize)]
pub struct Generating {
    /// What the pictures should show.
    pub prompt: Option<String>,
    /// What guidance is to lead away from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative: Option<String>,
    /// The class as typed.
    pub class: Option<String>,
    /// The image that is the condition.
    #[serde(rename = "condition")]
    pub condition_image: Option<PathBuf>,
    /// Seed of the random draws; with several pictures, picture i has this seed + i.
    pub seed: u64,
    /// Where to compute.
    pub device: String,
    /// How the generator's weights are kept.
    #[serde(serialize_with = "crate::weights::name")]
    pub weights: WeightPrecision,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// The model.
    pub model: ModelPlan,
    #[serde(skip)]
    condition: PlannedCondition,
    #[serde(skip)]
    away_from: Condition,
}

impl Generating {
    /// Resolves and checks what was typed; reads no weight.
    ///
    /// # Errors
    /// A model that is missing, does not fit or cannot generate, a condition that it does not understand, an unknown device, or a
    /// setting out of range.
    pub(crate) fn plan(typed: Typed<'_>, settings: &Settings) -> Result<Self> {
        let device = settings.device_name()?;
        let weights = typed.weights.resolve(&device)?;
        let model = ModelPlan::find(typed.model)?;
        let generator = model.must_generate()?;
        let condition = model.condition(typed.wish)?;
        let mut sampling = typed.sampling.over(model.sampling())?;
        let away_from = typed.negative.map_or(Ok(Condition::none()), |prompt| model.negative(prompt))?;
        if condition.is_none() && away_from.is_none() {
            // Guidance strengthens a condition: without one it only doubles the work.
            sampling.guidance = 1.0;
        }
        check_sampling(&**generator, &sampling)?;
        if !away_from.is_none() && !sampling.is_guided() {
            return Err(Error::invalid_hint(
                "--negative",
                "has no effect at guidance 1",
                "add --guidance with a number above 1",
            ));
        }
        Ok(Self {
            prompt: typed.wish.prompt.map(str::to_string),
            negative: typed.negative.map(str::to_string),
            class: typed.wish.class.map(str::to_string),
            condition_image: typed.wish.image.map(Path::to_path_buf),
            seed: settings.seed(),
            device,
            weights,
            sampling,
            model,
            condition,
            away_from,
        })
    }

    /// A picture with the condition as the generator takes it, see [`ModelPlan::resolve`]; says what the user should know about it.
    ///
    /// # Errors
    /// As [`ModelPlan::resolve`].
    pub(crate) fn picture(
        &self,
        grid: Option<(usize, usize)>,
        device: &Device,
        progress: &dyn Progress,
    ) -> Result<ImageRequest> {
        let condition = self.model.resolve(&self.condition, grid, device)?;
        self.model.remark(&condition).iter().for_each(|line| progress.say(line));
        Ok(ImageRequest { negative: self.away_from.clone(), ..ImageRequest::new(condition, self.seed) })
    }

    /// The generator with its weights.
    ///
    /// # Errors
    /// As [`ModelPlan::open_generator`].
    pub(crate) fn open_generator(&self, device: &Device) -> Result<GeneratorModel> {
        self.model.open_generator(device, self.weights)
    }

    /// What a picture was made with, for its text chunk; `own` is what only this verb has.
    pub(crate) fn parameters(&self, verb: &str, seed: u64, own: serde_json::Value) -> serde_json::Value {
        let mut parameters = serde_json::json!({
            "program": concat!("smalti ", env!("CARGO_PKG_VERSION")),
            "verb": verb,
            "prompt": self.prompt,
            "class": self.class,
            "condition": self.condition_image,
            "seed": seed,
        });
        let made_by = serde_json::json!({
            "weights": self.weights.name(),
            "sampling": self.sampling,
            "model": self.model.provenance(),
        });
        if let (Some(parameters), Some(negative)) = (parameters.as_object_mut(), &self.negative) {
            parameters.insert("negative".into(), serde_json::json!(negative));
        }
        if let Some(parameters) = parameters.as_object_mut() {
            [own, made_by].into_iter().filter_map(|part| part.as_object().cloned()).for_each(|p| parameters.extend(p));
        }
        parameters
    }
}

/// Pulls a generation to its end.
///
/// # Errors
/// What starting it returns, or [`Error::Interrupted`].
pub(crate) fn generate(
    generator: &dyn Generator,
    request: &Request,
    what: &str,
    progress: &dyn Progress,
) -> Result<Codes> {
    let mut generation = generator.start(request)?;
    progress.begin(what, generation.steps() as u64, "steps");
    for done in &mut generation {
        progress.advance(done? as u64, "");
        if progress.cancelled() {
            progress.end();
            return Err(Error::Interrupted { hint: None });
        }
    }
    progress.end();
    Ok(generation.codes())
}
