//! A model on disk: found and checked first, opened later.

use burn::tensor::Device;
use serde::Serialize;
use smalti_base::{Error, Result, TokenSpec};
use smalti_data::TextTokenizer;
use smalti_models::checkpoint::{BundlePaths, Manifest, Part, read_config, read_packed, read_weights};
use smalti_models::generators::{ConditionConfig, GeneratorConfig, GeneratorModel};
use smalti_models::tokenizers::{TokenizerConfig, TokenizerModel};
use smalti_models::{Condition, sampling::Sampling};
use smalti_nn::dense::WeightPrecision;
use std::path::{Path, PathBuf};

/// The environment variable that names the model to use when none is given.
pub const MODEL_VARIABLE: &str = "SMALTI_MODEL";
const DEMO: &str = "assets/demo";

/// A bundle whose configurations were read and fit each other. No weight was read.
#[derive(Clone, Debug, Serialize)]
pub struct ModelPlan {
    /// The bundle's folder.
    pub bundle: PathBuf,
    /// The model's name.
    pub name: String,
    /// The tokens that its parts share.
    pub tokens: TokenSpec,
    /// SHA-256 of the tokenizer's weights.
    pub tokenizer_sha256: String,
    /// SHA-256 of the generator's weights, if it has one.
    pub generator_sha256: Option<String>,
    /// What its generator can be conditioned on.
    pub condition: ConditionConfig,
    /// The bundle's manifest.
    #[serde(skip)]
    pub manifest: Manifest,
    #[serde(skip)]
    tokenizer: TokenizerConfig,
    #[serde(skip)]
    generator: Option<GeneratorConfig>,
}

/// What a picture should show, as typed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wish<'a> {
    /// A caption.
    pub prompt: Option<&'a str>,
    /// A class by number or name.
    pub class: Option<&'a str>,
}

impl ModelPlan {
    /// Reads the configurations of the bundle or run folder at `path`; without a path that of [`default_model`].
    ///
    /// # Errors
    /// [`Error::Mismatch`] with both specs if the parts do not fit, or what reading them returns.
    pub fn find(path: Option<&Path>) -> Result<Self> {
        let path = path.map_or_else(default_model, |path| Ok(path.to_path_buf()))?;
        let paths = BundlePaths::find(&path)?;
        let manifest = paths.manifest()?;
        let tokenizer: TokenizerConfig = read_config(&paths, Part::Tokenizer)?;
        let tokens = tokenizer.spec()?;
        let generator: Option<GeneratorConfig> =
            paths.has(Part::Generator).then(|| read_config(&paths, Part::Generator)).transpose()?;
        if let Some(generator) = &generator {
            let names = [Part::Tokenizer, Part::Generator].map(|part| paths.config(part).display().to_string());
            tokens.must_equal(&names[0], generator.tokens(), &names[1])?;
        }
        let sha256 = |part| manifest.parts.get(&part).map(|facts| facts.sha256.clone());
        Ok(Self {
            bundle: paths.root().to_path_buf(),
            name: manifest.name.clone(),
            tokens,
            tokenizer_sha256: sha256(Part::Tokenizer).unwrap_or_default(),
            generator_sha256: sha256(Part::Generator),
            condition: generator.as_ref().map(|g| g.condition().clone()).unwrap_or_default(),
            manifest,
            tokenizer,
            generator,
        })
    }

    /// Whether the bundle has a generator.
    pub fn has_generator(&self) -> bool {
        self.generator.is_some()
    }

    /// An error unless the bundle has a generator.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn must_generate(&self) -> Result<()> {
        match self.generator {
            Some(_) => Ok(()),
            None => Err(Error::invalid_hint(
                self.bundle.display(),
                "this bundle has no generator, so it cannot make pictures",
                "train one over this tokenizer's tokens with `smalti train`, or give another model with --model",
            )),
        }
    }

    /// The condition that a wish stands for.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the nearest class, [`Error::Invalid`] if the model does not understand such a wish.
    pub fn condition(&self, wish: Wish<'_>) -> Result<Condition> {
        match (&self.condition, wish) {
            (_, Wish { prompt: None, class: None }) => Ok(Condition::None),
            (ConditionConfig::Text { .. }, Wish { prompt: Some(prompt), class: None }) => {
                Ok(Condition::Text(self.text_tokenizer()?.encode(prompt)?))
            }
            (ConditionConfig::Class { classes }, Wish { prompt: None, class: Some(class) }) => {
                class_number(class, *classes, &self.manifest.classes).map(Condition::Class)
            }
            (takes, wish) => {
                let (takes, hint) = match takes {
                    ConditionConfig::None => ("nothing", "leave the prompt and --class away"),
                    ConditionConfig::Class { .. } => ("a class", "say it with --class, a number or a name"),
                    ConditionConfig::Text { .. } => ("a caption", "say it in words, without --class"),
                };
                let given = match (wish.prompt, wish.class) {
                    (Some(_), Some(_)) => "a caption and a class",
                    (Some(_), None) => "a caption",
                    _ => "a class",
                };
                let problem = format!("{given} was given, but this model takes {takes}");
                Err(Error::invalid_hint(self.bundle.display(), problem, hint))
            }
        }
    }

    /// What the user should know about a condition: that a caption is longer than the model reads.
    pub fn remark(&self, condition: &Condition) -> Option<String> {
        match (&self.condition, condition) {
            (ConditionConfig::Text { length, .. }, Condition::Text(ids)) if ids.len() > *length => {
                Some(format!("note: the caption has {} tokens, this model reads the first {length}", ids.len()))
            }
            _ => None,
        }
    }

    /// Channels of the tokenizer's images.
    pub fn image_channels(&self) -> usize {
        self.tokenizer.image_channels()
    }

    /// The tokenizer with its weights.
    ///
    /// # Errors
    /// As [`read_weights`].
    pub fn open_tokenizer(&self, device: &Device) -> Result<TokenizerModel> {
        read_weights(&self.paths(), Part::Tokenizer, self.tokenizer.init(device)?)
    }

    /// The generator with its weights, for inference. On the CPU its matrices are packed while they are read.
    ///
    /// # Errors
    /// As [`ModelPlan::must_generate`] and [`read_weights`]; [`Error::Unsupported`] for reduced weights on another device.
    pub fn open_generator(&self, device: &Device, weights: WeightPrecision) -> Result<GeneratorModel> {
        self.must_generate()?;
        let config: GeneratorConfig = read_config(&self.paths(), Part::Generator)?;
        let model = config.init(device)?;
        match (*device == Device::flex(), weights) {
            (true, _) => read_packed(&self.paths(), Part::Generator, model, weights),
            (false, WeightPrecision::F32) => read_weights(&self.paths(), Part::Generator, model),
            (false, _) => Err(Error::unsupported(format!("{weights} weights on this device"), "use the CPU")),
        }
    }

    /// The text tokenizer.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Invalid`] if it is missing or cannot be used.
    pub fn text_tokenizer(&self) -> Result<TextTokenizer> {
        TextTokenizer::load(&self.paths().text_tokenizer())
    }

    /// The model's sampling settings.
    pub fn sampling(&self) -> &Sampling {
        &self.manifest.sampling
    }

    /// What identifies the model in a picture's parameters.
    pub fn provenance(&self) -> serde_json::Value {
        serde_json::json!({
            "name": self.name,
            "tokenizer_sha256": self.tokenizer_sha256,
            "generator_sha256": self.generator_sha256,
        })
    }

    fn paths(&self) -> BundlePaths {
        BundlePaths::at(&self.bundle)
    }
}

/// The model to use when none is given: `$SMALTI_MODEL`, else the demo bundle in the current folder, beside the program, or in the
/// source tree that it was built from.
///
/// # Errors
/// [`Error::Invalid`] that says how to get one.
pub fn default_model() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(MODEL_VARIABLE).filter(|path| !path.is_empty()) {
        return Ok(path.into());
    }
    let program = std::env::current_exe().ok().and_then(|path| path.parent().map(Path::to_path_buf));
    let beside = program.iter().flat_map(|folder| [folder.join(DEMO), folder.join("../share/smalti/demo")]);
    let source = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join(DEMO);
    let mut candidates = [PathBuf::from(DEMO)].into_iter().chain(beside).chain([source]);
    candidates.find(|path| path.join("bundle.json").is_file()).ok_or_else(|| {
        Error::invalid_hint(
            "--model",
            format!("no model was given, and the demo bundle is not in {DEMO}"),
            format!(
                "give a bundle or a run folder with --model, set {MODEL_VARIABLE}, or train one with `smalti train`"
            ),
        )
    })
}

/// The number of a class that was typed as a number or a name.
///
/// # Errors
/// [`Error::Unknown`] with the names, [`Error::Invalid`] for a number out of range.
pub fn class_number(typed: &str, classes: usize, names: &[String]) -> Result<u32> {
    if let Some(number) = names.iter().position(|name| name.eq_ignore_ascii_case(typed)) {
        return Ok(number as u32);
    }
    match typed.parse::<u32>() {
        Ok(number) if (number as usize) < classes => Ok(number),
        Ok(number) => Err(Error::invalid("--class", format!("class {number} is not in 0..{classes}"))),
        Err(_) if names.is_empty() => Err(Error::invalid(
            "--class",
            format!("`{typed}` is not a number, and the classes of this model have no names"),
        )),
        Err(_) => Err(Error::unknown("--class", "class", typed, names.iter().cloned())),
    }
}
