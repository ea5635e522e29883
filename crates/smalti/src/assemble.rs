//! `assemble`: a bundle of bundles. A model gets a next stage, a judge, or weights that stay where they are.

use crate::Settings;
use crate::judge::JudgePlan;
use crate::model::ModelPlan;
use crate::output::must_be_a_name;
use crate::stages::must_follow;
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Progress, Result, files};
use smalti_models::checkpoint::bundle::{NEXT, Reference, must_have_sum};
use smalti_models::checkpoint::{BundlePaths, Manifest, Part};
use std::path::{Path, PathBuf};

/// What `assemble` is told.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct AssembleArgs {
    /// Bundle or run folder of the model that gets more parts; it is not changed
    pub base: PathBuf,
    /// The folder of the new bundle, which must not exist
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,
    /// Bundle or run folder of a next stage, whose generator is conditioned on the base's tokens
    #[arg(long, value_name = "BUNDLE")]
    pub next: Option<PathBuf>,
    /// Bundle or run folder of an encoder with a head that tells the base's classes apart
    #[arg(long, value_name = "BUNDLE")]
    pub judge: Option<PathBuf>,
    /// Refer to weights by file and checksum instead of copying them: the bundle is small, and the files must stay
    #[arg(long)]
    pub refer: bool,
}

/// A resolved and checked `assemble`.
#[derive(Clone, Debug, Serialize)]
pub struct AssemblePlan {
    /// The new bundle's folder.
    pub out: PathBuf,
    /// Whether weights stay where they are.
    pub refer: bool,
    /// The model that gets more parts.
    pub base: ModelPlan,
    /// The next stage: the given one, or else the base's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<Box<ModelPlan>>,
    /// The judge: the given one, or else the base's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub judge: Option<JudgePlan>,
}

/// What `assemble` made.
#[derive(Clone, Debug, Serialize)]
pub struct AssembleOutcome {
    /// The new bundle's folder.
    pub bundle: PathBuf,
    /// Its parts, those of next stages with `next/` in front.
    pub parts: Vec<AssembledPart>,
}

/// A part of the new bundle.
#[derive(Clone, Debug, Serialize)]
pub struct AssembledPart {
    /// Its folder inside of the bundle.
    pub part: String,
    /// SHA-256 of its weights.
    pub sha256: String,
    /// Where its weights are, if they were not copied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refers: Option<PathBuf>,
}

/// Reads all configurations and checks that they fit; reads no weights.
///
/// # Errors
/// Bundles that are missing or do not fit; a folder that is there already; nothing to do.
pub fn plan(args: &AssembleArgs, _: &Settings) -> Result<AssemblePlan> {
    if args.next.is_none() && args.judge.is_none() && !args.refer {
        return Err(Error::invalid_hint("assemble", "nothing is to be added", "give --next, --judge or --refer"));
    }
    must_be_a_name(&args.out)?;
    if args.out.exists() {
        return Err(Error::invalid_hint(args.out.display(), "is there already", "choose another folder with --out"));
    }
    let base = ModelPlan::find(Some(&args.base))?;
    let next = match &args.next {
        Some(next) => Some(Box::new(ModelPlan::find(Some(next))?)),
        None => base.next.clone(),
    };
    if let Some(next) = &next {
        must_follow(&base, next)?;
    }
    let judge = match &args.judge {
        Some(judge) => Some(JudgePlan::find(judge)?),
        None => base.judge.clone(),
    };
    if let Some(judge) = &judge {
        judge.must_suit(&base)?;
    }
    Ok(AssemblePlan { out: args.out.clone(), refer: args.refer, base, next, judge })
}

/// Writes the bundle, whole or not at all.
///
/// # Errors
/// [`Error::Mismatch`] if weights are not those of their manifest; what reading and writing return.
pub fn run(plan: &AssemblePlan, progress: &dyn Progress) -> Result<AssembleOutcome> {
    let mut parts = Vec::new();
    progress.begin("assembling", 1 + plan.next.iter().len() as u64, "bundles");
    files::write_folder(&plan.out, |inside| {
        let base = Assembly { from: &plan.base, judge: plan.judge.as_ref(), next: plan.next.as_deref() };
        write(&base, inside, "", plan.refer, &mut parts)
    })?;
    progress.end();
    Ok(AssembleOutcome { bundle: plan.out.clone(), parts })
}

/// One bundle of the new ones.
struct Assembly<'a> {
    from: &'a ModelPlan,
    judge: Option<&'a JudgePlan>,
    next: Option<&'a ModelPlan>,
}

fn write(bundle: &Assembly<'_>, folder: &Path, name: &str, refer: bool, parts: &mut Vec<AssembledPart>) -> Result<()> {
    let (from, to) = (BundlePaths::at(&bundle.from.bundle), BundlePaths::at(folder));
    files::create_folder(folder)?;
    let mut manifest = Manifest { next_sha256: None, ..from.manifest()? };
    for part in Part::ALL.into_iter().filter(|part| from.has(*part) && *part != Part::Judge) {
        parts.push(place((&from, part), (&to, part), refer, &mut manifest, name)?);
    }
    if let Some(judge) = bundle.judge {
        let source = BundlePaths::at(&judge.bundle);
        parts.push(place((&source, judge.part()), (&to, Part::Judge), refer, &mut manifest, name)?);
        if let Some(facts) = source.manifest()?.training.remove(judge.part().name()) {
            manifest.training.insert(Part::Judge.name().into(), facts);
        }
    }
    if from.text_tokenizer().is_file() {
        files::create_folder(&folder.join("text"))?;
        files::write_bytes(&to.text_tokenizer(), &files::read(&from.text_tokenizer())?)?;
        manifest.text_sha256.iter().try_for_each(|sha256| must_have_sum(&to.text_tokenizer(), sha256))?;
    }
    if let Some(next) = bundle.next {
        let inside = folder.join(NEXT);
        let stage = Assembly { from: next, judge: next.judge.as_ref(), next: next.next.as_deref() };
        write(&stage, &inside, &format!("{name}{NEXT}/"), refer, parts)?;
        manifest.next_sha256 = Some(files::sha256_file(&inside.join("bundle.json"))?);
    }
    manifest.write(folder)
}

/// Brings a part into the new bundle: its configuration, and its weights or a reference to them.
fn place(
    (from, source): (&BundlePaths, Part),
    (to, part): (&BundlePaths, Part),
    refer: bool,
    manifest: &mut Manifest,
    name: &str,
) -> Result<AssembledPart> {
    let weights = from.located(source)?;
    let Some(mut facts) = from.manifest()?.parts.remove(&source) else {
        let problem = format!("bundle.json says nothing of its {}", source.name());
        return Err(Error::file(from.root(), problem));
    };
    files::create_folder(&to.root().join(part.name()))?;
    files::write_bytes(&to.config(part), &files::read(&from.config(source))?)?;
    let kept = match refer {
        true => weights.clone(),
        false => {
            let copy = to.weights(part);
            let failed = |error| Error::io("copy", &weights, error);
            std::fs::copy(&weights, &copy).map_err(failed)?;
            std::fs::File::open(&copy).and_then(|file| file.sync_all()).map_err(failed)?;
            copy
        }
    };
    must_have_sum(&kept, &facts.sha256)?;
    let file = std::fs::canonicalize(&weights).map_err(|error| Error::io("find", &weights, error))?;
    facts.refers = refer.then(|| Reference { file: file.clone(), sha256: facts.sha256.clone() });
    let refers = refer.then_some(file);
    let assembled = AssembledPart { part: format!("{name}{}", part.name()), sha256: facts.sha256.clone(), refers };
    manifest.parts.insert(part, facts);
    Ok(assembled)
}
