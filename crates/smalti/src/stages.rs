//! Generating in stages: a bundle may hold another one, whose generator reads the first one's tokens.

use crate::generating::{Generating, generate};
use crate::model::ModelPlan;
use burn::tensor::Device;
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Progress, Result, Tokens};
use smalti_models::checkpoint::Part;
use smalti_models::generators::{ConditionConfig, GeneratorModel, Given};
use smalti_models::{Codes, Condition, ImageRequest, Request};

/// Keeps the random numbers of stages apart.
const STAGE_SEED: u64 = 0x9E37_79B9_7F4A_7C15;

/// Where generating stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum StopAt {
    /// After the first stage
    Base,
    /// After the last stage
    #[default]
    Last,
}

/// # Errors
/// [`Error::Invalid`] or [`Error::Unsupported`] unless `next` makes pictures of `base`'s tokens.
pub fn must_follow(base: &ModelPlan, next: &ModelPlan) -> Result<()> {
    let place = next.bundle.display().to_string();
    let takes = next.must_generate()?.conditions();
    let Some(codes) = takes.codes() else {
        return Err(Error::invalid_hint(
            &place,
            "its generator reads no tokens of another image, so it cannot be a next stage",
            "train it with the condition `codes`, of the base model's tokens",
        ));
    };
    codes.must_fit(&base.tokens, &base.bundle.display().to_string())?;
    base.must_generate()?;
    // Codes of another tokenizer mean something else, whatever their grid is.
    let learned = next.manifest.parts.get(&Part::Condition).map(|facts| &facts.sha256);
    if let Some(learned) = learned.filter(|learned| **learned != base.tokenizer_sha256) {
        return Err(Error::Mismatch {
            what: "the tokenizer of the next stage's condition".into(),
            left_name: place,
            left: format!("learned from codes of a tokenizer with weights {learned}"),
            right_name: base.bundle.display().to_string(),
            right: format!("weights {}", base.tokenizer_sha256),
            hint: Some("train the next stage on tokens of the base model's tokenizer".into()),
        });
    }
    for other in takes.all() {
        let same = match other {
            ConditionConfig::Class { classes } => base.condition.classes() == Some(*classes),
            ConditionConfig::Codes { .. } => true,
            other => other.is_silent(),
        };
        if !same {
            return Err(Error::unsupported(
                format!("a next stage that takes {}: {place}", other.describe()),
                "beside the tokens it can take the class of the base model only",
            ));
        }
    }
    Ok(())
}

/// What the stage after a picture's tokens is asked.
fn following(next: &ModelPlan, tokens: Tokens, before: &ImageRequest) -> Result<ImageRequest> {
    let Tokens::Discrete(codes) = tokens else {
        return Err(Error::invalid(next.bundle.display(), "the tokens before it are vectors; expected codes"));
    };
    let given = before.condition.given().iter();
    let class = given.filter(|given| matches!(given, Given::Class(_)) && next.condition.classes().is_some());
    let condition = class.cloned().fold(Condition::codes(codes), Condition::and);
    Ok(ImageRequest::new(condition, before.seed.wrapping_add(STAGE_SEED)))
}

/// The generators of all stages that run.
pub(crate) struct Stages<'a> {
    generating: &'a Generating,
    first: GeneratorModel,
    later: Vec<(&'a ModelPlan, GeneratorModel)>,
}

impl<'a> Stages<'a> {
    /// Opens the generators of the base and of `later`.
    ///
    /// # Errors
    /// As [`ModelPlan::open_generator`].
    pub(crate) fn open(generating: &'a Generating, later: &[&'a ModelPlan], device: &Device) -> Result<Self> {
        let open = |plan: &&'a ModelPlan| Ok((*plan, plan.open_generator(device, generating.weights)?));
        let later = later.iter().map(open).collect::<Result<_>>()?;
        Ok(Self { generating, first: generating.open_generator(device)?, later })
    }

    /// The tokens of the last stage.
    ///
    /// # Errors
    /// What generating returns.
    pub(crate) fn codes(
        &self,
        images: Vec<ImageRequest>,
        grid: Option<(usize, usize)>,
        what: &str,
        progress: &dyn Progress,
    ) -> Result<Codes> {
        let mut request = Request { grid, ..Request::new(images, self.generating.sampling.clone()) };
        let mut codes = generate(&*self.first, &request, what, progress)?;
        for (stage, (plan, model)) in self.later.iter().enumerate() {
            let tokens = codes.to_host()?.into_iter().zip(&request.images);
            let images = tokens.map(|(tokens, before)| following(plan, tokens, before)).collect::<Result<_>>()?;
            request = Request::new(images, plan.sampling().clone());
            codes = generate(&**model, &request, &format!("{what}, stage {}", stage + 2), progress)?;
        }
        Ok(codes)
    }
}
