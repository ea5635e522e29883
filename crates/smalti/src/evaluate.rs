//! `evaluate`: numbers of a model on images.

use crate::model::ModelPlan;
use crate::source::{Images, SourceArgs};
use crate::weights::{Differences, WeightsEffect};
use crate::{Settings, WeightsArgs};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Progress, Result, TokenKind, TokenSpec, Tokens, device};
use smalti_data::ImageBatch;
use smalti_data::loader::Skipped;
use smalti_eval::{Compared, Fidelity, FidelitySum};
use smalti_models::generators::{GeneratorModel, Predictions};
use smalti_models::host;
use smalti_models::quantizers::usage::Usage;
use smalti_models::{Codes, Condition, GeneratorLoss};
use smalti_nn::dense::{Pack, WeightPrecision};
use smalti_train::conditions::{ConditionReader, Facts};
use smalti_train::pixels;
use std::path::PathBuf;

/// What `evaluate` is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluateArgs {
    /// Bundle or run folder
    #[arg(value_name = "BUNDLE")]
    pub model: PathBuf,
    /// An image, a folder of images, WebDataset tars or IDX files
    #[arg(long, value_name = "SRC")]
    pub data: PathBuf,
    /// Number of images to process at once
    #[arg(long, value_name = "N", default_value_t = EvaluateArgs::default().batch)]
    pub batch: usize,
    /// Measure the generator without any condition, whatever the data says of its images
    #[arg(long)]
    pub unconditional: bool,
    /// How the generator's weights are kept: a reduced precision is compared with f32.
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// Which images.
    #[command(flatten)]
    pub images: SourceArgs,
}

impl Default for EvaluateArgs {
    fn default() -> Self {
        Self {
            model: PathBuf::new(),
            data: PathBuf::new(),
            batch: 32,
            unconditional: false,
            weights: WeightsArgs::default(),
            images: SourceArgs::default(),
        }
    }
}

/// A resolved and checked `evaluate`.
#[derive(Clone, Debug, Serialize)]
pub struct EvaluatePlan {
    /// Images at the same time.
    pub batch: usize,
    /// Whether the generator is measured without any condition.
    pub unconditional: bool,
    /// Where to compute.
    pub device: String,
    /// How the generator's weights are kept, beside `f32`.
    #[serde(serialize_with = "crate::weights::name")]
    pub weights: WeightPrecision,
    /// The images.
    pub data: Images,
    /// The model.
    pub model: ModelPlan,
}

/// The numbers of a model.
#[derive(Clone, Debug, Serialize)]
pub struct EvaluateOutcome {
    /// The model's name.
    pub model: String,
    /// Number of images.
    pub images: usize,
    /// Images that could not be used.
    pub skipped: Vec<Skipped>,
    /// How near reconstructions are, and how the codebook is used.
    pub tokenizer: TokenizerNumbers,
    /// How well the generator predicts the images' tokens, if the model has one.
    pub generator: Option<GeneratorNumbers>,
    /// Whether the generator was told nothing of the images, although it takes a condition.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub unconditional: bool,
    /// What reduced weights do to the generator, if they were asked for.
    pub weights: Option<WeightsEffect>,
}

/// Numbers of a tokenizer.
#[derive(Clone, Debug, Serialize)]
pub struct TokenizerNumbers {
    /// Of 8-bit pixels at the model's size: means over images; of label maps over all pixels.
    #[serde(flatten)]
    pub scores: Fidelity,
    /// How the codebook is used, if tokens are codes.
    #[serde(flatten)]
    pub codebook: Option<CodebookNumbers>,
}

/// How a codebook is used.
#[derive(Clone, Debug, Serialize)]
pub struct CodebookNumbers {
    /// Share of the codes that occur.
    pub usage: f64,
    /// Perplexity of the code frequencies: as many equally frequent codes would be as hard to guess.
    pub perplexity: f64,
    /// Number of codes.
    pub vocabulary: usize,
}

/// Numbers of a generator: its mean validation loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum GeneratorNumbers {
    /// Of codes, in bits.
    Bits(BitNumbers),
    /// Of vectors, which have no probability: the diffusion loss. It compares models of the same tokens only.
    Diffusion {
        /// Mean over tokens.
        diffusion_loss: f64,
    },
}

/// A cross-entropy in bits.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BitNumbers {
    /// Per token.
    pub bits_per_token: f64,
    /// Per pixel: tokens of an image times bits per token, divided by height times width.
    pub bits_per_pixel: f64,
    /// Per colour value: bits per pixel divided by the image's channels.
    pub bits_per_dimension: f64,
}

impl GeneratorNumbers {
    fn of(loss: f64, tokens: &TokenSpec, channels: usize) -> Self {
        match &tokens.kind {
            TokenKind::Discrete { .. } => Self::Bits(BitNumbers::of(loss, tokens, channels)),
            TokenKind::Continuous { .. } => Self::Diffusion { diffusion_loss: loss },
        }
    }
}

impl BitNumbers {
    fn of(nats_per_token: f64, tokens: &TokenSpec, channels: usize) -> Self {
        let bits_per_token = nats_per_token / std::f64::consts::LN_2;
        let (height, width) = tokens.image_size;
        let bits_per_pixel = bits_per_token * tokens.length() as f64 / (height * width) as f64;
        Self { bits_per_token, bits_per_pixel, bits_per_dimension: bits_per_pixel / channels as f64 }
    }
}

/// Resolves and checks everything; reads no weight and no image.
///
/// # Errors
/// A model that is missing or does not fit, a source that cannot be used, an unknown device, or reduced weights where they cannot be.
pub fn plan(args: &EvaluateArgs, settings: &Settings) -> Result<EvaluatePlan> {
    let model = ModelPlan::find(Some(&args.model))?;
    let classes = (!model.manifest.classes.is_empty()).then_some(model.manifest.classes.as_slice());
    let planes = model.planes()?;
    let data = Images::open(args.images.config(&args.data, model.tokens.image_size, planes)?, planes, classes)?;
    let device = settings.device_name()?;
    let weights = args.weights.resolve(&device)?;
    if weights != WeightPrecision::F32 {
        model.must_generate()?;
        if model.tokens.vocabulary().is_none() {
            return Err(Error::unsupported(
                format!("comparing {weights} weights of a generator of vectors"),
                "its predictions have no probabilities to compare: leave out --weights",
            ));
        }
        if needs_images(&model) {
            return Err(Error::unsupported(
                "comparing weights of a generator that is conditioned on images",
                "the data does not contain these conditions: leave out --weights",
            ));
        }
    }
    must_say_conditions(&model, &data, args.unconditional)?;
    Ok(EvaluatePlan { batch: args.batch.max(1), unconditional: args.unconditional, device, weights, data, model })
}

/// Without its condition a generator has another loss: it must not go by the same name unasked.
fn must_say_conditions(model: &ModelPlan, data: &Images, unconditional: bool) -> Result<()> {
    let Some(generator) = model.has_generator().then(|| model.must_generate()).transpose()? else { return Ok(()) };
    let (takes_class, takes_text) = (model.condition.classes().is_some(), model.condition.text().is_some());
    if unconditional {
        let hint = "leave out --unconditional";
        return match (takes_class || takes_text, generator.abilities().needs_a_condition) {
            (false, _) => Err(Error::invalid_hint("--unconditional", "this model takes no class and no caption", hint)),
            (true, true) => {
                Err(Error::invalid_hint("--unconditional", "this model makes nothing without a condition", hint))
            }
            (true, false) => Ok(()),
        };
    }
    if !(takes_class || takes_text) || needs_images(model) {
        return Ok(());
    }
    let dataset = data.dataset();
    let (mut unlabelled, mut silent) = (0, 0);
    for index in 0..dataset.len() {
        let about = dataset.about(index)?;
        unlabelled += usize::from(takes_class && about.label.is_none());
        silent += usize::from(takes_text && about.text.is_none());
    }
    match [(unlabelled, "class"), (silent, "caption")].into_iter().find(|(missing, _)| *missing > 0) {
        None => Ok(()),
        Some((missing, what)) => Err(Error::invalid_hint(
            dataset.path().display(),
            format!(
                "{missing} of its {} images have no {what}, which the generator of this model takes",
                dataset.len()
            ),
            "give data in which each image has one, or measure without any condition by --unconditional",
        )),
    }
}

/// Whether the generator's conditions are images, which a data set does not hold beside its own.
fn needs_images(model: &ModelPlan) -> bool {
    model.condition.codes().is_some()
}

/// Computes the numbers.
///
/// # Errors
/// What reading and computing return, or [`Error::Interrupted`].
pub fn run(plan: &EvaluatePlan, progress: &dyn Progress) -> Result<EvaluateOutcome> {
    plan.model.say_first_stage(progress);
    let device = device::open(&plan.device)?;
    let tokenizer = plan.model.open_tokenizer(&device)?;
    if needs_images(&plan.model) {
        progress.say("note: the generator is not measured: its conditions are images, which the data does not contain");
    }
    let is_judged = plan.model.has_generator() && !needs_images(&plan.model);
    let mut judge = is_judged.then(|| Judge::open(plan, &device)).transpose()?;
    let mut usage = plan.model.tokens.vocabulary().map(Usage::new);
    let planes = tokenizer.planes();
    let (mut images, mut fidelity) = (0, FidelitySum::new(planes, Compared::Levels));
    let mut batches = plan.data.batches("evaluating", 0, plan.batch, progress)?;
    while let Some(batch) = batches.next() {
        let batch = batch?;
        let codes = tokenizer.encode(pixels::upload_batch(&batch, &device))?;
        codes.must_be_whole(&batch.keys)?;
        let reconstructions = pixels::download(tokenizer.decode(&codes)?, planes)?;
        for (original, reconstruction) in pixels::batch_images(&batch)?.iter().zip(&reconstructions) {
            fidelity.add(original, reconstruction)?;
            images += 1;
        }
        if let Some(usage) = &mut usage {
            for tokens in codes.clone().to_host()? {
                if let Tokens::Discrete(codes) = tokens {
                    usage.add(codes.into_iter().map(i64::from));
                }
            }
        }
        if let Some(judge) = &mut judge {
            judge.add(codes, &batch)?;
        }
        batches.done(&fidelity.mean().note());
    }
    let skipped = batches.finish()?;
    Ok(EvaluateOutcome {
        model: plan.model.name.clone(),
        images,
        skipped,
        tokenizer: TokenizerNumbers {
            scores: fidelity.mean(),
            codebook: usage.map(|usage| CodebookNumbers {
                usage: usage.used_fraction(),
                perplexity: usage.perplexity(),
                vocabulary: usage.histogram().len(),
            }),
        },
        unconditional: plan.unconditional,
        generator: judge
            .as_ref()
            .map(|judge| GeneratorNumbers::of(judge.exact.mean(), &plan.model.tokens, planes.count())),
        weights: judge.and_then(Judge::effect),
    })
}

/// A generator and its summed loss.
struct Judged {
    generator: GeneratorModel,
    images: u64,
    /// Sum over images.
    loss: f64,
}

impl Judged {
    fn new(generator: GeneratorModel) -> Self {
        Self { generator, images: 0, loss: 0.0 }
    }

    fn add(&mut self, codes: Codes, conditions: &[Condition]) -> Result<()> {
        let loss = self.generator.validation_loss(codes, conditions, self.images)?;
        self.count(loss, conditions.len())
    }

    /// [`Self::add`] by way of the predictions, which come back.
    fn predict(&mut self, codes: Codes, conditions: &[Condition]) -> Result<Predictions> {
        let predictions = self.generator.predictions(codes, conditions, self.images)?;
        self.count(predictions.loss(), conditions.len())?;
        Ok(predictions)
    }

    fn count(&mut self, loss: GeneratorLoss, images: usize) -> Result<()> {
        self.loss += f64::from(host::float(loss.nats_per_token.unwrap_or(loss.loss))?) * images as f64;
        self.images += images as u64;
        Ok(())
    }

    fn mean(&self) -> f64 {
        self.loss / self.images as f64
    }
}

/// Sums a generator's loss over images, and what reduced weights change.
struct Judge {
    exact: Judged,
    reduced: Option<(Judged, Differences, WeightPrecision)>,
    reader: ConditionReader,
    unconditional: bool,
}

impl Judge {
    fn open(plan: &EvaluatePlan, device: &burn::tensor::Device) -> Result<Self> {
        let EvaluatePlan { model, weights, .. } = plan;
        let text = model.condition.text().map(|_| model.text_tokenizer()).transpose()?;
        let reader = ConditionReader::new(&model.condition, text)?;
        let open = |weights| model.open_generator(device, weights).map(Judged::new);
        let reduced = match weights {
            WeightPrecision::F32 => None,
            weights => Some((open(*weights)?, Differences::default(), *weights)),
        };
        Ok(Self { exact: open(WeightPrecision::F32)?, reduced, reader, unconditional: plan.unconditional })
    }

    fn add(&mut self, codes: Codes, batch: &ImageBatch) -> Result<()> {
        let condition = |i: usize| match self.unconditional {
            true => Ok(Condition::none()),
            false => {
                let facts = Facts { label: batch.labels[i], text: batch.texts[i].as_deref(), codes: None };
                self.reader.whole(&batch.keys[i], facts)
            }
        };
        let conditions = (0..batch.len()).map(condition).collect::<Result<Vec<_>>>()?;
        let Some((reduced, differences, _)) = &mut self.reduced else {
            return self.exact.add(codes, &conditions);
        };
        let vocabulary = reduced.generator.spec().vocabulary().unwrap_or_default();
        let exact = self.exact.predict(codes.clone(), &conditions)?;
        differences.add(exact, reduced.predict(codes, &conditions)?, vocabulary)
    }

    fn effect(mut self) -> Option<WeightsEffect> {
        let (mut reduced, differences, weights) = self.reduced?;
        let [logit_difference_mean, logit_difference_max, changed_argmax] = differences.summary();
        Some(WeightsEffect {
            weights,
            bytes: reduced.generator.packed_bytes(),
            bytes_f32: self.exact.generator.packed_bytes(),
            bits_per_token: reduced.mean() / std::f64::consts::LN_2,
            bits_per_token_f32: self.exact.mean() / std::f64::consts::LN_2,
            logit_difference_mean,
            logit_difference_max,
            changed_argmax,
        })
    }
}
