//! `import`: official weights to a bundle.

use crate::Settings;
use crate::output::{is_inside, must_be_a_name};
use crate::variants::{self, PartConfig, Variant};
use burn::tensor::Device;
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Progress, Result, files};
use smalti_models::checkpoint::import::{Imported, compare, rules_of, views};
use smalti_models::checkpoint::{
    BundlePaths, Manifest, Part, PartFacts, Precision, Report, Rules, Source, copy_part, open_weights, read_config,
    read_weights,
};
use smalti_models::generators::{GeneratorConfig, GeneratorModel};
use smalti_models::tokenizers::TokenizerConfig;
use std::path::PathBuf;

/// What `import` is told.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct ImportArgs {
    /// Official weights: a .safetensors, .ckpt, .pth, .pt or .bin file, an index of safetensors files, or their folder;
    /// on the hub hf://ORG/NAME/PATH or hf://ORG/NAME@REVISION/PATH, a file, a folder, or without PATH the whole
    pub source: PathBuf,
    /// The system whose layout the weights have: a rules file in checkpoints/
    #[arg(long, value_name = "NAME")]
    pub system: String,
    /// Which model they are: a recipe by name or file [default: the one that fits]
    #[arg(long, value_name = "RECIPE")]
    pub variant: Option<String>,
    /// The bundle's folder; an existing bundle gets another part
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,
    /// Store floats in 16 bits; without it the import is lossless
    #[arg(long)]
    pub f16: bool,
    /// Take weights on the hub from the cache, without the network; HF_HUB_OFFLINE=1 does the same
    #[arg(long)]
    pub offline: bool,
}

/// A resolved and checked `import`.
#[derive(Clone, Debug, Serialize)]
pub struct ImportPlan {
    /// Where the weights are.
    pub source: PathBuf,
    /// Where they come from: the same, or an address on the hub with its commit.
    pub origin: String,
    /// Whose layout they have.
    pub system: String,
    /// The bundle's folder.
    pub out: PathBuf,
    /// How floats are stored.
    pub precision: Precision,
    /// The parts that are in the weights.
    pub parts: Vec<PartPlan>,
}

/// A part of the weights.
#[derive(Clone, Debug, Serialize)]
pub struct PartPlan {
    /// Which one.
    pub part: Part,
    /// The recipe whose model it is.
    pub variant: String,
    /// The key below which its tensors are.
    pub key: Option<String>,
    #[serde(skip)]
    fits: Variant,
}

/// What `import` made.
#[derive(Clone, Debug, Serialize)]
pub struct ImportOutcome {
    /// The bundle's folder.
    pub bundle: PathBuf,
    /// What became of each part.
    pub parts: Vec<ImportedPart>,
}

/// What became of a part.
#[derive(Clone, Debug, Serialize)]
pub struct ImportedPart {
    /// Which one.
    pub part: Part,
    /// The recipe whose model it is.
    pub variant: String,
    /// Its checksum and number of parameters.
    pub facts: PartFacts,
    /// Parameters that were found.
    pub loaded: usize,
    /// Parameters that the weights lack and that keep their initial values.
    pub kept: Vec<String>,
    /// Tensors of the weights that the rules leave out.
    pub dropped: Vec<String>,
}

/// One attempt to see the weights as a model.
struct Attempt {
    part: Part,
    variant: Variant,
    key: Option<String>,
    report: Report,
    place: String,
}

/// Brings weights of the hub into its cache, and finds the parts and variants that fit. Of the weights only names and shapes are read.
///
/// # Errors
/// What `hub::fetch` returns; weights that cannot be read; a system without rules; [`Error::Invalid`] that says what does not fit, and
/// which variant would; parts that do not suit the bundle that is there.
pub fn plan(args: &ImportArgs, _: &Settings, progress: &dyn Progress) -> Result<ImportPlan> {
    // A judge is an encoder that `assemble` puts beside a generator.
    let parts: Vec<Part> = Part::ALL
        .into_iter()
        .filter(|part| *part != Part::Judge)
        .map(|part| Ok((part, Rules::has(&args.system, rules_of(part).name())?)))
        .filter_map(|found: Result<(Part, bool)>| match found {
            Ok((part, has)) => has.then_some(Ok(part)),
            Err(error) => Some(Err(error)),
        })
        .collect::<Result<_>>()?;
    let wished = args.variant.as_deref().map(variants::find).transpose()?;
    let all = variants::all()?;
    let (path, origin) = locate(args, progress)?;
    let source = open_weights(&path)?;
    let mut attempts = Vec::new();
    for part in parts {
        for variant in wished.iter().chain(&all).filter(|variant| variant.part() == rules_of(part)) {
            attempts.extend(attempt(args, part, variant, source.as_ref())?);
        }
    }
    let fits = |attempt: &&Attempt| attempt.report.problems() == 0;
    let is_wished = |attempt: &&Attempt| wished.as_ref().is_none_or(|wished| wished.name == attempt.variant.name);
    let mut found: Vec<PartPlan> = Vec::new();
    for part in Part::ALL {
        let fitting = attempts.iter().filter(|attempt| attempt.part == part).filter(fits).filter(is_wished);
        found.extend(choose(args, fitting.collect())?);
    }
    if found.is_empty() {
        return Err(refused(args, &attempts, wished.as_ref()));
    }
    must_be_a_name(&args.out)?;
    if is_inside(&path, &args.out) {
        let problem = format!("holds the weights that are read, {}", path.display());
        return Err(Error::invalid_hint(args.out.display(), problem, "choose another folder with --out"));
    }
    must_suit(&BundlePaths::at(&args.out), &found)?;
    let precision = if args.f16 { Precision::F16 } else { Precision::F32 };
    Ok(ImportPlan { source: path, origin, system: args.system.clone(), out: args.out.clone(), precision, parts: found })
}

/// Where the weights are on this machine, and where they come from.
fn locate(args: &ImportArgs, progress: &dyn Progress) -> Result<(PathBuf, String)> {
    match args.source.to_str().filter(|source| source.starts_with("hf:")) {
        Some(address) => fetch(address, args.offline, progress),
        None => Ok((args.source.clone(), args.source.display().to_string())),
    }
}

#[cfg(feature = "hub")]
fn fetch(address: &str, offline: bool, progress: &dyn Progress) -> Result<(PathBuf, String)> {
    let fetched = crate::hub::fetch(&address.parse()?, offline, progress)?;
    Ok((fetched.path, fetched.origin.to_string()))
}

#[cfg(not(feature = "hub"))]
fn fetch(address: &str, _: bool, _: &dyn Progress) -> Result<(PathBuf, String)> {
    let what = format!("{address}: the hub, in this build,");
    Err(Error::unsupported(what, "build with the feature `hub`, or give a file"))
}

/// The views of the source that the rules of this part can be applied to, compared with a variant.
fn attempt(args: &ImportArgs, part: Part, variant: &Variant, source: &dyn Source) -> Result<Vec<Attempt>> {
    let rules = Rules::builtin(&args.system, rules_of(part).name())?;
    let mut attempts = Vec::new();
    for (key, view) in views(source, part) {
        let report = match &variant.config {
            PartConfig::Tokenizer(config) => compare(&rules, &config.init(&Device::flex())?, view.as_ref()),
            PartConfig::Generator(config) => compare(&rules, &config.init(&Device::flex())?, view.as_ref()),
            PartConfig::Encoder(config) => compare(&rules, &config.init(&Device::flex())?, view.as_ref()),
        };
        if let Ok(report) = report {
            attempts.push(Attempt { part, variant: variant.clone(), key, report, place: view.place() });
        }
    }
    Ok(attempts)
}

/// The first view of the one variant that fits.
fn choose(args: &ImportArgs, fitting: Vec<&Attempt>) -> Result<Option<PartPlan>> {
    let Some(first) = fitting.first() else { return Ok(None) };
    let mut others: Vec<&str> = fitting.iter().map(|attempt| attempt.variant.name.as_str()).collect();
    others.dedup();
    if fitting.iter().any(|attempt| attempt.variant.config != first.variant.config) {
        let problem = format!("the weights fit several variants: {}", others.join(", "));
        return Err(Error::invalid_hint(args.source.display(), problem, "choose one with --variant"));
    }
    let (part, key) = (first.part, first.key.clone());
    Ok(Some(PartPlan { part, variant: first.variant.name.clone(), key, fits: first.variant.clone() }))
}

/// Why nothing fits: the nearest attempt, and what would fit instead.
fn refused(args: &ImportArgs, attempts: &[Attempt], wished: Option<&Variant>) -> Error {
    let near = |attempt: &&Attempt| wished.is_none_or(|wished| wished.name == attempt.variant.name);
    let nearest = attempts.iter().filter(near).min_by_key(|attempt| attempt.report.problems());
    let others: Vec<&str> = attempts
        .iter()
        .filter(|attempt| attempt.report.problems() == 0)
        .map(|attempt| attempt.variant.name.as_str())
        .collect();
    let Some(nearest) = nearest else {
        let problem = format!("nothing in it can be read by the rules of `{}`", args.system);
        return Error::invalid_hint(
            args.source.display(),
            problem,
            "if it belongs to another system, name that with --system",
        );
    };
    let problem = match nearest.report.must_fit(&nearest.place) {
        Err(Error::Invalid { problem, .. }) => problem,
        _ => "the weights do not fit".into(),
    };
    let hint = match others.first() {
        Some(other) => format!("the variant `{other}` would fit"),
        None => "for a model of other sizes, give its recipe as a file with --variant".into(),
    };
    Error::invalid_hint(
        &nearest.place,
        format!("as {} `{}`: {problem}", nearest.part.name(), nearest.variant.name),
        hint,
    )
}

/// Writes the parts and the manifest into a new folder, which takes the place of the bundle that was there in one step.
///
/// # Errors
/// Weights that are not finite; another process in the folder; what reading and writing return.
pub fn run(plan: &ImportPlan, progress: &dyn Progress) -> Result<ImportOutcome> {
    let source = open_weights(&plan.source)?;
    let is_new = !plan.out.exists();
    files::create_folder(&plan.out)?;
    // A link is followed: what it leads to is replaced, not the link.
    let out = std::fs::canonicalize(&plan.out).map_err(|error| Error::io("find", &plan.out, error))?;
    let held = files::FolderLock::take(&out, "importing")?;
    let mut parts = Vec::new();
    let written = files::write_folder(&out, |inside| {
        files::link_folder(&out, inside)?;
        parts = write_parts(plan, source.as_ref(), &BundlePaths::at(inside), progress)?;
        Ok(())
    });
    drop(held);
    if let (Err(_), true) = (&written, is_new) {
        // Goes only if it is empty.
        let _ = std::fs::remove_dir(&out);
    }
    written?;
    progress.end();
    let bundle = BundlePaths::at(&plan.out);
    if !bundle.has(Part::Tokenizer) && !bundle.has(Part::Encoder) {
        progress.say("the bundle has no tokenizer yet: import one into the same folder");
    }
    Ok(ImportOutcome { bundle: plan.out.clone(), parts })
}

fn write_parts(
    plan: &ImportPlan,
    source: &dyn Source,
    bundle: &BundlePaths,
    progress: &dyn Progress,
) -> Result<Vec<ImportedPart>> {
    let mut manifest = match bundle.root().join("bundle.json").is_file() {
        true => bundle.manifest()?,
        false => Manifest::new(plan.parts.first().map_or("imported", |part| part.variant.as_str())),
    };
    let mut parts = Vec::new();
    progress.begin("importing", plan.parts.len() as u64, "parts");
    for (done, part) in plan.parts.iter().enumerate() {
        let views = views(source, part.part);
        let view = views.iter().find(|(key, _)| *key == part.key).map(|(_, view)| view.as_ref());
        let view = view.ok_or_else(|| Error::file(&plan.source, "the file changed while it was read"))?;
        // What the weights lack keeps its initial values: the same ones each time.
        Device::flex().seed(0);
        let rules = Rules::builtin(&plan.system, rules_of(part.part).name())?;
        let imported = match &part.fits.config {
            PartConfig::Tokenizer(config) => {
                write(plan, part, bundle, config, &Imported::new(&rules, &config.init(&Device::flex())?, view)?)?
            }
            PartConfig::Generator(config) => {
                let model = with_tokenizer(bundle, config)?;
                manifest.sampling = part.fits.sampling.clone();
                write(plan, part, bundle, config, &Imported::new(&rules, &model, view)?)?
            }
            PartConfig::Encoder(config) => {
                write(plan, part, bundle, config, &Imported::new(&rules, &config.init(&Device::flex())?, view)?)?
            }
        };
        manifest.parts.insert(part.part, imported.facts.clone());
        let facts = serde_json::json!({
            "imported_from": plan.origin, "system": plan.system, "variant": part.variant,
            "sha256": if plan.source.is_file() { files::sha256_file(&plan.source)? } else { String::new() },
        });
        manifest.training.insert(part.part.name().into(), facts);
        // The parts after this one read it, and its checksum.
        manifest.write(bundle.root())?;
        parts.push(imported);
        progress.advance(done as u64 + 1, "");
    }
    Ok(parts)
}

/// An error unless the new parts suit each other and what stays in the bundle beside them.
fn must_suit(bundle: &BundlePaths, new: &[PartPlan]) -> Result<()> {
    const NEW: &str = "the imported weights";
    let place = |part| bundle.config(part).display().to_string();
    let imported = |part| new.iter().find(|plan| plan.part == part).map(|plan| &plan.fits.config);
    let tokenizer = |part| match imported(part) {
        Some(PartConfig::Tokenizer(config)) => Ok(Some((config.clone(), true))),
        _ if bundle.has(part) => Ok(Some((read_config::<TokenizerConfig>(bundle, part)?, false))),
        _ => Ok(None),
    };
    let generator = match imported(Part::Generator) {
        Some(PartConfig::Generator(config)) => Some((config.clone(), true)),
        _ if bundle.has(Part::Generator) => Some((read_config::<GeneratorConfig>(bundle, Part::Generator)?, false)),
        _ => None,
    };
    let (own, condition): (Option<(TokenizerConfig, bool)>, _) =
        (tokenizer(Part::Tokenizer)?, tokenizer(Part::Condition)?);
    let Some((generator, is_new)) = generator else { return Ok(()) };
    match &own {
        Some((tokenizer, true)) => {
            let other = if is_new { NEW.to_string() } else { place(Part::Generator) };
            tokenizer.spec()?.must_equal(NEW, generator.tokens(), &other)?;
        }
        Some((tokenizer, false)) if is_new => {
            generator.tokens().must_equal(NEW, &tokenizer.spec()?, &place(Part::Tokenizer))?;
        }
        None if is_new && generator.abilities().reads_code_vectors => {
            return Err(Error::invalid_hint(
                bundle.root().display(),
                "this generator reads the tokenizer's code vectors, and the bundle has no tokenizer",
                "import the tokenizer into the same folder first",
            ));
        }
        _ => {}
    }
    match condition {
        Some((condition, of_new)) if is_new || of_new => {
            let name = if of_new { NEW.to_string() } else { place(Part::Condition) };
            generator.conditions().must_fit(&condition.spec()?, &name)
        }
        _ => Ok(()),
    }
}

/// A generator with what it takes from the tokenizer beside it.
fn with_tokenizer(bundle: &BundlePaths, config: &GeneratorConfig) -> Result<GeneratorModel> {
    let mut model = config.init(&Device::flex())?;
    if bundle.has(Part::Tokenizer) {
        let tokenizer: TokenizerConfig = read_config(bundle, Part::Tokenizer)?;
        let tokenizer = read_weights(bundle, Part::Tokenizer, tokenizer.init(&Device::flex())?)?;
        model.adopt(&*tokenizer)?;
    }
    Ok(model)
}

fn write<C: Serialize>(
    plan: &ImportPlan,
    part: &PartPlan,
    bundle: &BundlePaths,
    config: &C,
    imported: &Imported<'_>,
) -> Result<ImportedPart> {
    let facts = copy_part(bundle, part.part, config, imported, plan.precision)?;
    Ok(ImportedPart {
        part: part.part,
        variant: part.variant.clone(),
        facts,
        loaded: imported.report.loaded.len(),
        kept: imported.report.kept.clone(),
        dropped: imported.dropped().to_vec(),
    })
}
