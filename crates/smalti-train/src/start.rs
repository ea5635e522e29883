//! What a run begins with: weights that are there already, and which of them stay as they are.

use crate::recipe::{Recipe, Task};
use crate::run_folder::RunFolder;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Device, Tensor};
use regex::Regex;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use smalti_base::{Error, Progress, Result, error::nearest, files};
use smalti_models::checkpoint::bundle::{BundlePaths, Part};
use smalti_models::checkpoint::import::{rules_of, views};
use smalti_models::checkpoint::{
    Entry, Finite, Report, Rules, Source, Stored, Values, load_from, open_weights, parameter_map,
};
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};

/// Where initial weights come from. In files it is a path, or a table with more.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StartConfig {
    /// A bundle or run folder, or a weights file in this program's layout or the official one.
    pub from: PathBuf,
    /// Regular expressions that the paths of those parameters begin with which may keep their fresh values.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<String>,
}

impl<'de> Deserialize<'de> for StartConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Table {
            from: PathBuf,
            #[serde(default)]
            allow: Vec<String>,
        }
        struct PathOrTable;
        impl<'de> Visitor<'de> for PathOrTable {
            type Value = StartConfig;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a path, or a table with the keys `from` and `allow`")
            }

            fn visit_str<E>(self, path: &str) -> Result<StartConfig, E> {
                Ok(StartConfig { from: path.into(), allow: Vec::new() })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<StartConfig, A::Error> {
                let Table { from, allow } = Table::deserialize(MapAccessDeserializer::new(map))?;
                Ok(StartConfig { from, allow })
            }
        }
        deserializer.deserialize_any(PathOrTable)
    }
}

/// What a run began with, as it is kept in its folder and told in its bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartFacts {
    /// Where the weights were.
    pub from: PathBuf,
    /// SHA-256 of the file; empty if they were in several.
    pub sha256: String,
    /// Parameters that kept their fresh values.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fresh: Vec<String>,
}

/// Regular expressions that paths begin with.
struct Patterns(Vec<Regex>);

impl Patterns {
    /// # Errors
    /// [`Error::Invalid`] for a pattern that is no regular expression or that no parameter's path begins with.
    fn new(key: &str, patterns: &[String], entries: &BTreeMap<String, Entry>) -> Result<Self> {
        let compiled = patterns.iter().map(|pattern| {
            let regex = Regex::new(&format!("^(?:{pattern})")).map_err(|e| Error::invalid(key, e.to_string()))?;
            if entries.keys().any(|path| regex.is_match(path)) {
                return Ok(regex);
            }
            let paths: Vec<String> = entries.keys().cloned().collect();
            let example = nearest(pattern, &paths).or(paths.first()).cloned().unwrap_or_default();
            let problem = format!("no parameter's path begins with `{pattern}`; paths look like `{example}`");
            Err(Error::invalid(key, problem))
        });
        compiled.collect::<Result<_>>().map(Self)
    }

    fn has(&self, path: &str) -> bool {
        self.0.iter().any(|regex| regex.is_match(path))
    }
}

/// A source as initial weights see it: without what may be left out and does not fit, with what the rules fill in.
struct Seen<'a> {
    source: &'a dyn Source,
    rules: Option<&'a Rules>,
    entries: &'a BTreeMap<String, Entry>,
    allowed: &'a Patterns,
}

impl Seen<'_> {
    fn filling(&self, name: &str) -> Option<(f32, &Entry)> {
        Some((self.rules?.filled(name)?, self.entries.get(name)?))
    }

    fn report(&self) -> Report {
        let optional = |name: &str| self.allowed.has(name) || self.rules.is_some_and(|rules| rules.is_optional(name));
        Report::compare(self.entries, &self.shapes(), &optional)
    }
}

impl Source for Seen<'_> {
    fn place(&self) -> String {
        self.source.place()
    }

    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let mut shapes = self.source.shapes();
        shapes.retain(|name, shape| {
            !self.allowed.has(name) || self.entries.get(name).is_some_and(|entry| entry.shape == *shape)
        });
        let missing: Vec<&String> = self.entries.keys().filter(|name| !shapes.contains_key(*name)).collect();
        let filled = missing.into_iter().filter_map(|name| Some((name.clone(), self.filling(name)?.1.shape.clone())));
        let filled: Vec<_> = filled.collect();
        shapes.extend(filled);
        shapes
    }

    fn read(&self, name: &str) -> Result<Stored> {
        match self.filling(name).filter(|_| !self.source.shapes().contains_key(name)) {
            Some((value, entry)) => {
                let values = Values::Floats(vec![value; entry.shape.iter().product()]);
                Ok(Stored { shape: entry.shape.clone(), values })
            }
            None => self.source.read(name),
        }
    }
}

/// A model's place in bundles and recipes.
#[derive(Clone, Copy)]
struct Kind {
    part: Part,
    official: Option<&'static str>,
}

impl Kind {
    fn of(task: &Task) -> Self {
        match task {
            Task::Tokenizer(task) => Self { part: Part::Tokenizer, official: task.model.official() },
            Task::Generator(task) => Self { part: Part::Generator, official: task.model.official() },
            Task::Encoder(task) => Self { part: Part::Encoder, official: task.model.official() },
        }
    }

    /// The file or folder of the weights that are meant.
    fn locate(self, from: &Path) -> Result<PathBuf> {
        let is_run = from.join("recipe.toml").is_file();
        let paths = match BundlePaths::find(from) {
            Ok(paths) => paths,
            Err(error) if is_run || !from.exists() => return Err(error),
            Err(_) => return Ok(from.to_path_buf()),
        };
        let is_judge = self.part == Part::Encoder && !paths.has(Part::Encoder) && paths.has(Part::Judge);
        let part = if is_judge { Part::Judge } else { self.part };
        match paths.has(part) {
            true => paths.intact(part),
            false => Err(Error::invalid_hint(
                from.display(),
                format!("this bundle has no {}, so training one cannot start from it", self.part.name()),
                "give a bundle with such a part, or a weights file",
            )),
        }
    }
}

/// Calls `then` with the view of the source that fits the parameters.
///
/// # Errors
/// [`Error::Invalid`] that names what does not fit.
fn fitting<T>(
    (source, kind): (&dyn Source, Kind),
    entries: &BTreeMap<String, Entry>,
    allowed: &Patterns,
    then: impl FnOnce(&Seen<'_>, &Report) -> Result<T>,
) -> Result<T> {
    let own = Seen { source, rules: None, entries, allowed };
    let mut nearest = (own.report(), own.place());
    if nearest.0.problems() == 0 {
        return then(&own, &nearest.0);
    }
    let name = rules_of(kind.part).name();
    if let Some(system) = kind.official.filter(|system| Rules::has(system, name).is_ok_and(|has| has)) {
        let rules = Rules::builtin(system, name)?;
        for (_, view) in views(source, kind.part) {
            let Ok(plan) = rules.plan_for(view.as_ref(), entries) else { continue };
            let seen = Seen { source: &plan, rules: Some(&rules), entries, allowed };
            let report = seen.report();
            if report.problems() == 0 {
                return then(&seen, &report);
            }
            if report.problems() < nearest.0.problems() {
                nearest = (report, view.place());
            }
        }
    }
    let problem = match nearest.0.must_fit(&nearest.1) {
        Err(Error::Invalid { problem, .. }) => problem,
        _ => "the weights do not fit the model".into(),
    };
    let hint =
        "parameters that may keep fresh values are named in the recipe: start = { from = \"...\", allow = [\"head\"] }";
    Err(Error::invalid_hint(format!("start: {}", nearest.1), problem, hint))
}

/// Checks `start` and `frozen` against the model: of weights only names and shapes are read.
///
/// # Errors
/// Weights that cannot be read or do not fit; patterns that no parameter's path begins with; a model of which nothing is trained.
pub fn check(recipe: &Recipe, resumed: bool) -> Result<()> {
    let device = Device::flex();
    let kind = Kind::of(&recipe.task);
    let entries = match &recipe.task {
        Task::Tokenizer(task) => parameter_map(&task.model.init(&device)?),
        Task::Generator(task) => parameter_map(&task.model.init(&device)?),
        Task::Encoder(task) => parameter_map(&task.model.init(&device)?),
    };
    Patterns::new("frozen", &recipe.frozen, &entries)?;
    match &recipe.start {
        Some(start) if !resumed => {
            let allowed = Patterns::new("start.allow", &start.allow, &entries)?;
            let source = open_weights(&kind.locate(&start.from)?)?;
            fitting((source.as_ref(), kind), &entries, &allowed, |_, _| Ok(()))
        }
        _ => Ok(()),
    }
}

/// The model as the run begins: with the weights that the recipe starts from, unless there are checkpoints, and without gradients where
/// it is frozen.
///
/// # Errors
/// As [`check`], and what reading returns.
pub fn prepare<M: Module>(model: M, recipe: &Recipe, folder: &RunFolder, progress: &dyn Progress) -> Result<M> {
    let entries = parameter_map(&model);
    let kind = Kind::of(&recipe.task);
    let model = match &recipe.start {
        Some(start) if folder.steps()?.is_empty() => {
            let allowed = Patterns::new("start.allow", &start.allow, &entries)?;
            let file = kind.locate(&start.from)?;
            let source = open_weights(&file)?;
            let (model, report) = fitting((source.as_ref(), kind), &entries, &allowed, |seen, report| {
                load_from(model, &Finite(seen), &|name| report.kept.iter().any(|kept| kept == name))
            })?;
            let sha256 = if file.is_file() { files::sha256_file(&file)? } else { String::new() };
            let (loaded, fresh) = (report.loaded.len(), report.kept);
            progress.say(&format!("started from {}: {loaded} tensors, {} are fresh", file.display(), fresh.len()));
            folder.write_start(&StartFacts { from: start.from.clone(), sha256, fresh })?;
            model
        }
        _ => model,
    };
    freeze(model, recipe, &entries, progress)
}

/// Takes the gradients away from the parameters that the recipe freezes.
fn freeze<M: Module>(
    model: M,
    recipe: &Recipe,
    entries: &BTreeMap<String, Entry>,
    progress: &dyn Progress,
) -> Result<M> {
    struct Freeze(HashSet<ParamId>);
    impl ModuleMapper for Freeze {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if self.0.contains(&param.id) { param.set_require_grad(false) } else { param }
        }
    }
    if recipe.frozen.is_empty() {
        return Ok(model);
    }
    let patterns = Patterns::new("frozen", &recipe.frozen, entries)?;
    let frozen: Vec<&Entry> = entries.iter().filter(|(path, _)| patterns.has(path)).map(|(_, entry)| entry).collect();
    let values = |entries: &mut dyn Iterator<Item = &Entry>| -> usize {
        entries.map(|entry| entry.shape.iter().product::<usize>()).sum()
    };
    let (still, all) = (values(&mut frozen.iter().copied()), values(&mut entries.values()));
    let model = model.map(&mut Freeze(frozen.iter().map(|entry| entry.id).collect()));
    if !is_trained(&model) {
        return Err(Error::invalid("frozen", "all parameters are frozen, so there is nothing to train"));
    }
    progress.say(&format!("frozen: {} of {} tensors, {still} of {all} values", frozen.len(), entries.len()));
    Ok(model)
}

/// Whether anything of a model has a gradient.
fn is_trained<M: Module>(model: &M) -> bool {
    struct Any(bool);
    impl ModuleVisitor for Any {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0 |= param.val().is_require_grad();
        }
    }
    let mut any = Any(false);
    model.visit(&mut any);
    any.0
}

/// Whether the recipe freezes a parameter of this path.
///
/// # Errors
/// A pattern that is no regular expression.
pub fn freezes<M: Module>(recipe: &Recipe, model: &M, chosen: impl Fn(&str) -> bool) -> Result<bool> {
    let entries = parameter_map(model);
    let patterns = Patterns::new("frozen", &recipe.frozen, &entries)?;
    Ok(entries.keys().any(|path| chosen(path) && patterns.has(path)))
}
