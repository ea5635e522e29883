//! Official weights into a bundle's part: which of several configurations do they fit, and what becomes of each tensor.

use super::bundle::Part;
use super::open::Below;
use super::rules::{Plan, Rules};
use super::tensors::{Source, Stored, Values};
use super::weights::{Entry, Kind, Report, parameter_map, parameters};
use burn::module::Module;
use smalti_base::{Error, Result};
use std::collections::BTreeMap;

/// Keys under which training programs put a model's weights beside other things; averaged weights first.
const WRAPPERS: [&str; 8] = [
    "model_ema",
    "ema",
    "trainer.vae_local",
    "trainer.var_wo_ddp",
    "state_dict",
    "model",
    "module",
    "model_state_dict",
];

/// The key below which VQGAN's second stage has the tokenizer of its conditions.
const CONDITION: &str = "cond_stage_model";

/// The views of a source that may be a part's weights: below each known key, and as it is.
pub fn views(source: &dyn Source, part: Part) -> Vec<(Option<String>, Box<dyn Source + '_>)> {
    let keys = WRAPPERS.iter().map(|key| key.to_string());
    let keys: Vec<String> = match part {
        Part::Condition => keys.map(|key| format!("{key}.{CONDITION}")).chain([CONDITION.to_string()]).collect(),
        _ => keys.collect(),
    };
    let below = |key: String| {
        let below = Below::new(source, &key)?;
        Some((Some(key), Box::new(below) as Box<dyn Source + '_>))
    };
    let mut views: Vec<_> = keys.into_iter().filter_map(below).collect();
    if part != Part::Condition {
        views.push((None, Box::new(Below::all(source))));
    }
    views
}

/// The rules of a part: those that make codes of conditions are a tokenizer's, a judge's are an encoder's.
pub fn rules_of(part: Part) -> Part {
    match part {
        Part::Condition => Part::Tokenizer,
        Part::Judge => Part::Encoder,
        part => part,
    }
}

/// How a source suits a module, by the names and shapes alone.
///
/// # Errors
/// A rule that does not suit a tensor.
pub fn compare<M: Module>(rules: &Rules, module: &M, source: &dyn Source) -> Result<Report> {
    let entries = parameter_map(module);
    let plan = rules.plan_for(source, &entries)?;
    Ok(Report::compare(&entries, &plan.shapes(), &|name| rules.is_optional(name)))
}

/// A module's parameters: those of a source by rules, and the module's own where the source may and does lack them.
pub struct Imported<'a> {
    plan: Plan<'a>,
    kept: BTreeMap<String, Stored>,
    entries: BTreeMap<String, Entry>,
    /// What was found.
    pub report: Report,
}

impl<'a> Imported<'a> {
    /// Plans the import; of the tensors only names and shapes are looked at.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names what is missing, unused or of another shape.
    pub fn new<M: Module>(rules: &Rules, module: &M, source: &'a dyn Source) -> Result<Self> {
        let entries = parameter_map(module);
        let plan = rules.plan_for(source, &entries)?;
        let report = Report::compare(&entries, &plan.shapes(), &|name| rules.is_optional(name));
        report.must_fit(&source.place())?;
        let mut kept = parameters(module, &report.kept)?;
        for (name, stored) in &mut kept {
            if let (Some(value), Values::Floats(values)) = (rules.filled(name), &mut stored.values) {
                values.fill(value);
            }
        }
        Ok(Self { kept, plan, entries, report })
    }

    /// Tensors of the source that the rules leave out.
    pub fn dropped(&self) -> &[String] {
        self.plan.dropped()
    }
}

impl Source for Imported<'_> {
    fn place(&self) -> String {
        self.plan.place()
    }

    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.entries.iter().map(|(name, entry)| (name.clone(), entry.shape.clone())).collect()
    }

    fn read(&self, name: &str) -> Result<Stored> {
        if let Some(stored) = self.kept.get(name) {
            return Ok(stored.clone());
        }
        let Some(entry) = self.entries.get(name) else {
            return Err(Error::unknown(self.place(), "tensor", name, self.entries.keys()));
        };
        let Stored { values, .. } = self.plan.read(name)?;
        let expected = match entry.kind {
            Kind::Float => "floats",
            Kind::Int => "integers",
            Kind::Bool => "booleans",
        };
        match values.kind() == expected {
            true => Ok(Stored { shape: entry.shape.clone(), values }),
            false => {
                let problem = format!("tensor `{name}` holds {}, expected {expected}", values.kind());
                Err(Error::invalid(self.place(), problem))
            }
        }
    }
}
