//! A model on disk: found and checked first, opened later.

use crate::judge::JudgePlan;
use crate::stages::must_follow;
use burn::tensor::Device;
use serde::Serialize;
use smalti_base::{Error, Layout, Planes, Progress, Result, TokenSpec, Tokens};
use smalti_data::TextTokenizer;
use smalti_data::image::{Image, Limits, open_as};
use smalti_data::transforms::{Filter, resize};
use smalti_models::checkpoint::bundle::must_have_sum;
use smalti_models::checkpoint::{BundlePaths, Manifest, Part, read_config, read_decoder, read_packed, read_weights};
use smalti_models::generators::{ConditionConfig, Conditions, GeneratorConfig, GeneratorModel, Given};
use smalti_models::tokenizers::{TokenDecoder, TokenizerConfig, TokenizerModel};
use smalti_models::{Condition, sampling::Sampling};
use smalti_nn::dense::WeightPrecision;
use smalti_train::pixels;
use std::path::{Path, PathBuf};

/// The environment variable that names the model to use when none is given.
pub const MODEL_VARIABLE: &str = "SMALTI_MODEL";
const DEMO: &str = "assets/demo";
/// Most pixels of a picture that is larger than the model's own.
const MOST_PIXELS: usize = 16 << 20;

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
    pub condition: Conditions,
    /// What scores its pictures.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub judge: Option<JudgePlan>,
    /// The next stage, which makes pictures of its tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<Box<ModelPlan>>,
    /// The bundle's manifest.
    #[serde(skip)]
    pub manifest: Manifest,
    #[serde(skip)]
    tokenizer: TokenizerConfig,
    #[serde(skip)]
    generator: Option<GeneratorConfig>,
    /// What makes codes of the images that condition the generator.
    #[serde(skip)]
    condition_tokenizer: Option<TokenizerConfig>,
}

/// What a picture should show, as typed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wish<'a> {
    /// A caption.
    pub prompt: Option<&'a str>,
    /// A class by number or name.
    pub class: Option<&'a str>,
    /// An image such as a depth map.
    pub image: Option<&'a Path>,
}

/// The condition of pictures, checked; the codes of an image are made when its tokenizer is opened.
#[derive(Clone, Debug, Default)]
pub struct PlannedCondition {
    /// As the generator takes it.
    given: Condition,
    /// Whose codes are given, too.
    image: Option<Image>,
}

impl PlannedCondition {
    /// Whether the picture may show anything.
    pub fn is_none(&self) -> bool {
        self.given.is_none() && self.image.is_none()
    }
}

impl ModelPlan {
    /// Reads the configurations of the bundle or run folder at `path`; without a path that of [`default_model`].
    ///
    /// # Errors
    /// [`Error::Mismatch`] with both specs if the parts do not fit, or what reading them returns.
    pub fn find(path: Option<&Path>) -> Result<Self> {
        let path = path.map_or_else(default_model, |path| Ok(path.to_path_buf()))?;
        Self::read(&BundlePaths::find(&path)?)
    }

    fn read(paths: &BundlePaths) -> Result<Self> {
        let manifest = paths.manifest()?;
        if !paths.has(Part::Tokenizer) && paths.has(Part::Encoder) {
            return Err(Error::invalid_hint(
                paths.root().display(),
                "this bundle is an encoder: it has no tokenizer and makes no pictures",
                "give it with --judge beside a model, or as `teacher` or `start` in a recipe",
            ));
        }
        let tokenizer: TokenizerConfig = read_config(paths, Part::Tokenizer)?;
        let tokens = tokenizer.spec()?;
        let generator: Option<GeneratorConfig> =
            paths.has(Part::Generator).then(|| read_config(paths, Part::Generator)).transpose()?;
        if let Some(generator) = &generator {
            let names = [Part::Tokenizer, Part::Generator].map(|part| paths.config(part).display().to_string());
            tokens.must_equal(&names[0], generator.tokens(), &names[1])?;
        }
        let condition_tokenizer: Option<TokenizerConfig> =
            paths.has(Part::Condition).then(|| read_config(paths, Part::Condition)).transpose()?;
        if let (Some(generator), Some(tokenizer)) = (&generator, &condition_tokenizer) {
            generator
                .conditions()
                .must_fit(&tokenizer.spec()?, &paths.config(Part::Condition).display().to_string())?;
        }
        let sha256 = |part| manifest.parts.get(&part).map(|facts| facts.sha256.clone());
        let plan = Self {
            judge: JudgePlan::inside(paths)?,
            next: paths.next().map(|next| Self::read(&next).map(Box::new)).transpose()?,
            bundle: paths.root().to_path_buf(),
            name: manifest.name.clone(),
            tokens,
            tokenizer_sha256: sha256(Part::Tokenizer).unwrap_or_default(),
            generator_sha256: sha256(Part::Generator),
            condition: generator.as_ref().map(|generator| generator.conditions().clone()).unwrap_or_default(),
            manifest,
            tokenizer,
            generator,
            condition_tokenizer,
        };
        if plan.next.is_none() && plan.manifest.next_sha256.is_some() {
            let problem = "its bundle.json tells of a next stage, but the folder `next` holds no bundle";
            return Err(Error::invalid_hint(plan.bundle.display(), problem, "copy the bundle again, whole"));
        }
        if let Some(judge) = &plan.judge {
            judge.must_suit(&plan)?;
        }
        if let Some((next, sha256)) = paths.next().zip(plan.manifest.next_sha256.as_ref()) {
            must_have_sum(&next.root().join("bundle.json"), sha256)?;
        }
        if let Some(next) = &plan.next {
            must_follow(&plan, next)?;
        }
        Ok(plan)
    }

    /// The stages after this one, in order.
    pub fn later(&self) -> Vec<&Self> {
        std::iter::successors(self.next.as_deref(), |plan| plan.next.as_deref()).collect()
    }

    /// Whether the bundle has a generator.
    pub fn has_generator(&self) -> bool {
        self.generator.is_some()
    }

    /// The generator's configuration.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the bundle has no generator.
    pub fn must_generate(&self) -> Result<&GeneratorConfig> {
        match &self.generator {
            Some(generator) => Ok(generator),
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
    pub fn condition(&self, wish: Wish<'_>) -> Result<PlannedCondition> {
        if let Wish { prompt: None, class: None, image: None } = wish {
            return self.must_not_need_a_condition().map(|()| PlannedCondition::default());
        }
        let (classes, codes) = (self.condition.classes(), self.condition.codes());
        let understood = (wish.prompt.is_none() || self.condition.text().is_some())
            && (wish.class.is_none() || classes.is_some())
            && (wish.image.is_none() || codes.is_some());
        if !understood {
            return Err(self.not_understood(wish));
        }
        let mut given = Condition::none();
        if let Some((class, classes)) = wish.class.zip(classes) {
            given = given.and(Condition::class(class_number(class, classes, &self.manifest.classes)?));
        }
        if let Some(prompt) = wish.prompt {
            given = given.and(Condition::text(self.text_tokenizer()?.encode(prompt)?));
        }
        Ok(PlannedCondition { given, image: wish.image.map(|path| self.condition_image(path)).transpose()? })
    }

    /// What guidance is to lead away from.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the model reads no captions.
    pub fn negative(&self, prompt: &str) -> Result<Condition> {
        match self.condition.text() {
            Some(_) => Ok(Condition::text(self.text_tokenizer()?.encode(prompt)?)),
            None => Err(Error::invalid_hint(
                self.bundle.display(),
                "a negative prompt was given, but this model reads no captions",
                "leave out --negative",
            )),
        }
    }

    fn condition_image(&self, path: &Path) -> Result<Image> {
        match &self.condition_tokenizer {
            Some(tokenizer) => open_as(tokenizer.planes()?, path, [255; 3], &Limits::default()),
            None => Err(Error::invalid_hint(
                self.bundle.display(),
                "this model reads codes of an image, and the bundle has no tokenizer that makes them",
                "import or copy one into the bundle's folder `condition`",
            )),
        }
    }

    fn not_understood(&self, wish: Wish<'_>) -> Error {
        let say = |one: &ConditionConfig| match one {
            ConditionConfig::None | ConditionConfig::Coordinates { .. } => {
                ("nothing", "leave out the prompt and --class")
            }
            ConditionConfig::Class { .. } => ("a class", "give it with --class, as a number or a name"),
            ConditionConfig::Text { .. } => ("a caption", "give it as the prompt, without --class"),
            ConditionConfig::Codes { .. } => ("an image", "give it with --condition"),
            ConditionConfig::Features { .. } => ("features", "give them through the library"),
            ConditionConfig::Numbers { .. } => ("numbers", "give them through the library"),
        };
        let said: Vec<(&str, &str)> = match self.condition.is_none() {
            true => vec![say(&ConditionConfig::None)],
            false => self.condition.all().iter().map(say).collect(),
        };
        let takes: Vec<&str> = said.iter().map(|(takes, _)| *takes).collect();
        let hint = match said.as_slice() {
            [(_, hint)] => hint,
            _ => "give what it takes, and nothing else",
        };
        let given = [
            wish.prompt.map(|_| "a caption"),
            wish.class.map(|_| "a class"),
            wish.image.map(|_| "an image as the condition"),
        ];
        let given = given.into_iter().flatten().collect::<Vec<_>>().join(" and ");
        let problem = format!("{given} was given, but this model takes {}", takes.join(" and "));
        Error::invalid_hint(self.bundle.display(), problem, hint)
    }

    /// The grid of tokens of pictures of this size, height and width, if it is another than the model's.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the model makes pictures of one size only, [`Error::Invalid`] for a size that is not a whole
    /// number of tokens, too small or too large.
    pub fn grid_of(&self, (height, width): (usize, usize)) -> Result<Option<(usize, usize)>> {
        let (least, layout) = (self.tokens.image_size, &self.tokens.layout);
        if (height, width) == least {
            return Ok(None);
        }
        let slides = self.generator.as_ref().is_some_and(|generator| generator.abilities().slides_a_window);
        let (Layout::Grid { h, w }, true, true) = (layout, self.tokenizer.any_size(), slides) else {
            return Err(Error::unsupported(
                format!("pictures of a size other than {}x{} by this model", least.0, least.1),
                "only gpt over a convolutional tokenizer can slide a window; --scale enlarges the pixels",
            ));
        };
        let (rows, columns) = (least.0 / h, least.1 / w);
        let is_whole = height.is_multiple_of(rows) && width.is_multiple_of(columns);
        let few = height.checked_mul(width).is_some_and(|pixels| pixels <= MOST_PIXELS);
        if !is_whole || height < least.0 || width < least.1 || !few {
            let expected = format!("multiples of {rows}x{columns}, at least {}x{}", least.0, least.1);
            let problem =
                format!("{height}x{width}; expected {expected}, and at most {} million pixels", MOST_PIXELS >> 20);
            return Err(Error::invalid("--size", problem));
        }
        Ok(Some((height / rows, width / columns)))
    }

    /// An error if the generator always needs a condition.
    fn must_not_need_a_condition(&self) -> Result<()> {
        let needs = self.generator.as_ref().is_some_and(|generator| generator.abilities().needs_a_condition);
        match (needs, self.condition.classes()) {
            (false, _) => Ok(()),
            (true, Some(classes)) => Err(Error::invalid_hint(
                self.bundle.display(),
                "this model makes pictures of a class only",
                format!("give one with --class, a number below {classes} or a name"),
            )),
            (true, None) => Err(Error::invalid_hint(
                self.bundle.display(),
                "this model makes pictures of another image only, such as a depth map",
                "give it with --condition",
            )),
        }
    }

    /// The condition as the generator takes it; an image is stretched to the pictures' size, `grid` tokens.
    ///
    /// # Errors
    /// What opening the condition's tokenizer returns.
    pub fn resolve(
        &self,
        condition: &PlannedCondition,
        grid: Option<(usize, usize)>,
        device: &Device,
    ) -> Result<Condition> {
        let given = condition.given.clone();
        let Some(image) = &condition.image else { return Ok(given) };
        let config = self.condition_tokenizer.as_ref().ok_or_else(|| {
            Error::invalid(self.bundle.display(), "has no tokenizer that makes codes of the condition's image")
        })?;
        let size = match grid {
            None => config.spec()?.image_size,
            Some((h, w)) if config.any_size() => config.spec()?.on_grid(h, w).image_size,
            Some(_) => {
                return Err(Error::unsupported(
                    "conditions of another size by this model",
                    "only a convolutional tokenizer reads images of any size",
                ));
            }
        };
        let tokenizer = read_weights(&self.paths(), Part::Condition, config.init(device)?)?;
        let planes = tokenizer.planes();
        let image = resize(image, size, Filter::of(planes))?;
        let codes = tokenizer.encode(pixels::upload(&[image], planes, device)?)?.to_host()?.swap_remove(0);
        match codes {
            Tokens::Discrete(codes) => Ok(given.and(Condition::codes(codes))),
            Tokens::Continuous(_) => {
                Err(Error::invalid(self.bundle.display(), "the condition's tokens are vectors; expected codes"))
            }
        }
    }

    /// What the user should know about a condition: that a caption is longer than the model reads.
    pub fn remark(&self, condition: &Condition) -> Option<String> {
        let (_, length) = self.condition.text()?;
        let ids = condition
            .given()
            .iter()
            .find_map(|given| if let Given::Text(ids) = given { Some(ids.len()) } else { None })?;
        (ids > length).then(|| format!("note: the caption has {ids} tokens, this model reads the first {length}"))
    }

    /// Says so if a verb uses the first of several stages only.
    pub(crate) fn say_first_stage(&self, progress: &dyn Progress) {
        if self.next.is_some() {
            progress.say("note: this model has a next stage; only its first stage is used here");
        }
    }

    /// What the tokenizer's images are.
    ///
    /// # Errors
    /// As [`smalti_models::tokenizers::TokenizerSettings::planes`].
    pub fn planes(&self) -> Result<Planes> {
        self.tokenizer.planes()
    }

    /// The tokenizer with its weights.
    ///
    /// # Errors
    /// As [`read_weights`].
    pub fn open_tokenizer(&self, device: &Device) -> Result<TokenizerModel> {
        read_weights(&self.paths(), Part::Tokenizer, self.tokenizer.init(device)?)
    }

    /// What makes images of codes; the weights of the encoder are not read.
    ///
    /// # Errors
    /// As [`read_decoder`].
    pub fn open_decoder(&self, device: &Device) -> Result<TokenDecoder> {
        read_decoder(&self.paths(), self.tokenizer.init(device)?)
    }

    /// The generator with its weights, for inference. On the CPU its matrices are packed while they are read.
    ///
    /// # Errors
    /// As [`ModelPlan::must_generate`] and [`read_weights`]; [`Error::Unsupported`] for reduced weights on another device.
    pub fn open_generator(&self, device: &Device, weights: WeightPrecision) -> Result<GeneratorModel> {
        let model = self.must_generate()?.init(device)?;
        match (*device == Device::flex(), weights) {
            (true, _) => read_packed(&self.paths(), Part::Generator, model, weights),
            (false, WeightPrecision::F32) => read_weights(&self.paths(), Part::Generator, model),
            (false, _) => Err(Error::unsupported(format!("{weights} weights on this device"), "use the CPU")),
        }
    }

    /// The text tokenizer.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Invalid`] if it is missing or cannot be used, [`Error::Mismatch`] if it is not the bundle's.
    pub fn text_tokenizer(&self) -> Result<TextTokenizer> {
        let path = self.paths().text_tokenizer();
        self.manifest.text_sha256.iter().try_for_each(|sha256| must_have_sum(&path, sha256))?;
        TextTokenizer::load(&path)
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

/// The number of a class that was typed as its name, its number, or `#` and its number.
///
/// The exact name comes first, then a name that differs in upper and lower case only. A number without `#` counts if no class has
/// a number for its name.
///
/// # Errors
/// [`Error::Unknown`] with the names, [`Error::Invalid`] for a number out of range, or for what can mean several classes: then with
/// all of them.
pub fn class_number(typed: &str, classes: usize, names: &[String]) -> Result<u32> {
    let number = |typed: &str| match typed.parse::<usize>() {
        Ok(number) if number < classes => Some(Ok(number as u32)),
        Ok(number) => Some(Err(Error::invalid("--class", format!("class {number} is not in 0..{classes}")))),
        Err(_) => None,
    };
    if let Some(found) = typed.strip_prefix('#').and_then(number) {
        return found;
    }
    let those = |is: &dyn Fn(&str) -> bool| names.iter().enumerate().filter(|(_, name)| is(name)).collect::<Vec<_>>();
    let lower = typed.to_lowercase();
    for candidates in [those(&|name| name == typed), those(&|name| name.to_lowercase() == lower)] {
        match candidates.as_slice() {
            [] => {}
            [(number, _)] => return Ok(*number as u32),
            several => {
                let several: Vec<String> =
                    several.iter().map(|(number, name)| format!("`{name}` (#{number})")).collect();
                let problem = format!("`{typed}` can mean {}", several.join(" or "));
                return Err(Error::invalid_hint("--class", problem, "give the name exactly, or # and the number"));
            }
        }
    }
    let are_numbers = names.iter().any(|name| name.parse::<u64>().is_ok());
    match number(typed) {
        Some(_) if are_numbers => Err(Error::invalid_hint(
            "--class",
            format!("no class has the name `{typed}`, and here numbers are names: {}", listed(names)),
            format!("give one of the names, or #{typed} for the class that is at place {typed}, counted from 0"),
        )),
        Some(found) => found,
        None if names.is_empty() => Err(Error::invalid(
            "--class",
            format!("`{typed}` is not a number, and the classes of this model have no names"),
        )),
        None => Err(Error::unknown("--class", "class", typed, names.iter().cloned())),
    }
}

/// The first names of a list.
fn listed(names: &[String]) -> String {
    const LISTED: usize = 12;
    let first: Vec<String> = names.iter().take(LISTED).map(|name| format!("`{name}`")).collect();
    let more = names.len().checked_sub(LISTED).filter(|more| *more > 0);
    first.join(", ") + &more.map(|more| format!(" and {more} more")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::class_number;

    #[test]
    fn a_class_is_what_was_typed_or_an_error_that_lists_what_it_could_be() {
        let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let cases = names(&["A", "Cat", "a", "crane", "crane"]);
        let of = |typed: &str| class_number(typed, cases.len(), &cases);
        assert_eq!((of("A").unwrap(), of("a").unwrap(), of("cat").unwrap()), (0, 2, 1));
        assert_eq!((of("1").unwrap(), of("#4").unwrap()), (1, 4));
        let refused = of("crane").unwrap_err().to_string();
        assert!(refused.contains("`crane` (#3) or `crane` (#4)"), "{refused}");
        assert!(class_number("b", 2, &names(&["B", "\u{212a}elvin"])).is_ok());
        let both = class_number("cAT", 2, &names(&["cat", "CAT"])).unwrap_err().to_string();
        assert!(both.contains("`cat` (#0) or `CAT` (#1)"), "{both}");
        assert!(of("7").unwrap_err().to_string().contains("class 7 is not in 0..5"));
        assert!(of("#7").unwrap_err().to_string().contains("class 7 is not in 0..5"));
        // Folders that are called by numbers: a number is a name, wherever the folder stands.
        let numbers = names(&["1", "10", "11", "12", "2", "3"]);
        assert_eq!(class_number("2", 6, &numbers).unwrap(), 4);
        assert_eq!(class_number("#2", 6, &numbers).unwrap(), 2);
        let refused = class_number("0", 6, &numbers).unwrap_err().to_string();
        assert!(refused.contains("numbers are names: `1`, `10`") && refused.contains("#0"), "{refused}");
        // Without names a number is the number.
        assert_eq!(class_number("3", 10, &[]).unwrap(), 3);
        assert!(class_number("cat", 10, &[]).unwrap_err().to_string().contains("have no names"));
    }
}
