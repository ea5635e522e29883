//! Judges: encoders that tell how well a picture shows what it was asked to show.

use crate::model::ModelPlan;
use burn::tensor::{Device, Tensor};
use serde::Serialize;
use smalti_base::{Error, Result};
use smalti_models::checkpoint::{BundlePaths, Part, read_config, read_weights};
use smalti_models::encoders::{EncoderConfig, EncoderModel};
use smalti_models::{Condition, host};
use std::path::{Path, PathBuf};

/// A judge whose configuration was read. No weight was read.
#[derive(Clone, Debug, Serialize)]
pub struct JudgePlan {
    /// The bundle's folder.
    pub bundle: PathBuf,
    /// The encoder's kind.
    pub kind: &'static str,
    /// SHA-256 of its weights.
    pub sha256: String,
    /// Classes that it tells apart.
    pub classes: usize,
    /// Names of the classes.
    #[serde(skip)]
    pub names: Vec<String>,
    #[serde(skip)]
    part: Part,
    #[serde(skip)]
    config: EncoderConfig,
}

impl JudgePlan {
    /// The encoder of the bundle or run folder at `path`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is none or it has no head, or what reading it returns.
    pub fn find(path: &Path) -> Result<Self> {
        let paths = BundlePaths::find(path)?;
        let part = [Part::Encoder, Part::Judge].into_iter().find(|part| paths.has(*part));
        match part {
            Some(part) => Self::read(&paths, part),
            None => Err(Error::invalid_hint(
                path.display(),
                "this bundle has no encoder, so it cannot judge pictures",
                "train one on labelled images: a recipe whose task.kind is \"encoder\"",
            )),
        }
    }

    /// The judge inside of a model's bundle, if there is one.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub(crate) fn inside(paths: &BundlePaths) -> Result<Option<Self>> {
        paths.has(Part::Judge).then(|| Self::read(paths, Part::Judge)).transpose()
    }

    fn read(paths: &BundlePaths, part: Part) -> Result<Self> {
        let manifest = paths.manifest()?;
        let config: EncoderConfig = read_config(paths, part)?;
        let Some(classes) = config.tells().classes() else {
            return Err(Error::invalid_hint(
                paths.root().display(),
                "this encoder has no head, so it cannot tell how well a picture shows its class",
                "train one with task.model.classes set; `start` and `frozen` keep its features",
            ));
        };
        let sha256 = manifest.parts.get(&part).map(|facts| facts.sha256.clone()).unwrap_or_default();
        let (bundle, kind) = (paths.root().to_path_buf(), config.kind());
        Ok(Self { bundle, kind, sha256, classes, names: manifest.classes, part, config })
    }

    /// # Errors
    /// [`Error::Mismatch`] unless the judge knows the model's classes; [`Error::Invalid`] if the model has none.
    pub fn must_suit(&self, model: &ModelPlan) -> Result<()> {
        let Some(classes) = model.condition.classes() else {
            return Err(Error::invalid_hint(
                self.bundle.display(),
                format!("this judge scores classes, and {} makes pictures of no class", model.bundle.display()),
                "give a model that is conditioned on classes",
            ));
        };
        let names = &model.manifest.classes;
        let differ = !names.is_empty() && !self.names.is_empty() && *names != self.names;
        if classes == self.classes && !differ {
            return Ok(());
        }
        let say = |classes: usize, names: &[String]| match names {
            [] => format!("{classes} classes"),
            names => format!("{classes} classes: {}", names.join(", ")),
        };
        Err(Error::Mismatch {
            what: "the classes of model and judge".into(),
            left_name: model.bundle.display().to_string(),
            left: say(classes, names),
            right_name: self.bundle.display().to_string(),
            right: say(self.classes, &self.names),
            hint: Some("train the judge on images of the same classes, in the same order".into()),
        })
    }

    /// The judge with its weights.
    ///
    /// # Errors
    /// As [`read_weights`].
    pub fn open(&self, device: &Device) -> Result<EncoderModel> {
        read_weights(&BundlePaths::at(&self.bundle), self.part, self.config.init(device)?)
    }

    /// The part of its bundle that it is.
    pub(crate) fn part(&self) -> Part {
        self.part
    }
}

/// A picture's score is the logarithm of its condition's probability, as the judge sees it.
///
/// # Shapes
/// `images_bchw` is `[b, 3, h, w]` in about -1..1.
///
/// # Errors
/// As [`smalti_models::Encoder::scores`].
pub(crate) fn scores(judge: &EncoderModel, images_bchw: Tensor<4>, condition: &Condition) -> Result<Vec<f64>> {
    let [b, ..] = images_bchw.dims();
    let scores = host::floats(judge.scores(images_bchw.clamp(-1.0, 1.0), &vec![condition.clone(); b])?)?;
    // In decimals a score has the digits that it has in 32 bits.
    Ok(scores.into_iter().map(|score| score.to_string().parse().unwrap_or(f64::from(score))).collect())
}
