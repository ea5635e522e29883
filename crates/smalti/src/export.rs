//! `export`: a part of a bundle in the layout of the official code.

use crate::Settings;
use crate::output::{is_inside, is_same, prepare_folder};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Layout, Progress, Result};
use smalti_models::checkpoint::import::rules_of;
use smalti_models::checkpoint::tensors::Precision;
use smalti_models::checkpoint::{BundlePaths, Finite, Part, Rules, Source, WeightsFile, copy_tensors, read_config};
use smalti_models::encoders::EncoderConfig;
use smalti_models::generators::GeneratorConfig;
use smalti_models::tokenizers::TokenizerConfig;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Whose names the weights get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum OutputLayout {
    /// The code that the system was published with
    #[default]
    Official,
}

/// What `export` is told.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct ExportArgs {
    /// Bundle or run folder
    pub bundle: PathBuf,
    /// Which names the weights get
    #[arg(long, value_enum, default_value_t = OutputLayout::Official)]
    pub layout: OutputLayout,
    /// Which part, of a bundle that has several
    #[arg(long, value_name = "tokenizer|generator|condition|encoder|judge", value_parser = part)]
    pub part: Option<Part>,
    /// The file to write, which ends in .safetensors
    #[arg(short, long, value_name = "FILE")]
    pub out: PathBuf,
}

fn part(name: &str) -> Result<Part, String> {
    let found = Part::ALL.into_iter().find(|part| part.name() == name);
    found.ok_or_else(|| "expected tokenizer, generator, condition, encoder or judge".into())
}

/// A resolved and checked `export`.
#[derive(Clone, Debug, Serialize)]
pub struct ExportPlan {
    /// The bundle's folder.
    pub bundle: PathBuf,
    /// Which part.
    pub part: Part,
    /// The rules file whose layout it gets.
    pub system: &'static str,
    /// Codes at each place: the official layout holds a table that they share so many times.
    pub depth: usize,
    /// The file.
    pub out: PathBuf,
}

/// What `export` made.
#[derive(Clone, Debug, Serialize)]
pub struct ExportOutcome {
    /// The file.
    pub file: PathBuf,
    /// Whose layout it has.
    pub system: &'static str,
    /// Number of tensors in it.
    pub tensors: usize,
    /// Tensors of the bundle that the official layout does not have.
    pub dropped: Vec<String>,
}

/// Finds the part and the layout; reads no weights.
///
/// # Errors
/// A bundle without the part, or with two and no choice; a system without official layout; a file of another kind.
pub fn plan(args: &ExportArgs, _: &Settings) -> Result<ExportPlan> {
    let paths = BundlePaths::find(&args.bundle)?;
    let there: Vec<Part> = Part::ALL.into_iter().filter(|part| paths.has(*part)).collect();
    let part = match (args.part, there.as_slice()) {
        (Some(part), _) => part,
        (None, [part]) => *part,
        (None, _) => {
            let names: Vec<&str> = there.iter().map(|part| part.name()).collect();
            let problem = format!("its parts are {}", names.join(", "));
            return Err(Error::invalid_hint(paths.root().display(), problem, "choose one with --part"));
        }
    };
    if is_inside(&args.out, paths.root()) || is_same(&args.out, &paths.located(part)?) {
        return Err(Error::invalid_hint(
            args.out.display(),
            "would be written into the bundle that is read",
            "choose a name outside of it",
        ));
    }
    if args.out.extension().is_none_or(|ending| ending != "safetensors") {
        return Err(Error::file(&args.out, "must end in .safetensors, the only format that is written"));
    }
    let (kind, depth) = match part {
        Part::Tokenizer | Part::Condition => {
            let config: TokenizerConfig = read_config(&paths, part)?;
            (config.official(), depth(&config.spec()?.layout))
        }
        Part::Generator => {
            let config: GeneratorConfig = read_config(&paths, part)?;
            (config.official(), depth(&config.tokens().layout))
        }
        Part::Encoder | Part::Judge => (read_config::<EncoderConfig>(&paths, part)?.official(), 1),
    };
    let system = kind.ok_or_else(|| {
        Error::unsupported(
            format!("an official layout for this {}", part.name()),
            "vqgan, vit with codes by angle, kl, var, mar, rq_transformer, mobilenet_v2 and gpt with shared_table have one; the bundle's own file is also a plain safetensors file",
        )
    })?;
    Ok(ExportPlan { bundle: paths.root().to_path_buf(), part, system, depth, out: args.out.clone() })
}

/// Codes of each place.
fn depth(layout: &Layout) -> usize {
    if let Layout::Stack { depth, .. } = layout { *depth } else { 1 }
}

/// Writes the file, one tensor in memory at a time.
///
/// # Errors
/// What reading and writing return.
pub fn run(plan: &ExportPlan, _: &dyn Progress) -> Result<ExportOutcome> {
    prepare_folder(plan.out.parent().unwrap_or(Path::new("")))?;
    let weights = WeightsFile::open(&BundlePaths::at(&plan.bundle).intact(plan.part)?)?;
    let rules = Rules::export(plan.system, rules_of(plan.part).name())?.with_numbers([("depth", plan.depth)]);
    let weights = Finite(&weights);
    let official = rules.plan(&weights)?;
    copy_tensors(&plan.out, &official, Precision::F32, &BTreeMap::from([("format".into(), "pt".into())]))?;
    Ok(ExportOutcome {
        file: plan.out.clone(),
        system: plan.system,
        tensors: official.shapes().len(),
        dropped: official.dropped().to_vec(),
    })
}
