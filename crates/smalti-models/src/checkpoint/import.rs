//! Official weights into a bundle's part: which of several configurations do they fit, and what becomes of each tensor.

use super::bundle::Part;
use super::finite::Finite;
use super::rules::{Plan, Rules};
use super::tensors::{Source, Stored, Values};
use super::weights::{Entry, Kind, Report, parameter_map, parameters};
use burn::module::Module;
use smalti_base::{Error, Result};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Keys under which training programs put a model's weights beside other things, as a dictionary's key or as the beginning of names;
/// averaged weights first.
const WRAPPERS: [&str; 19] = [
    "model_ema",
    "ema",
    "trainer.vae_local",
    "trainer.var_wo_ddp",
    "state_dict",
    "model",
    "module",
    "model_state_dict",
    "params_ema",
    "ema_model",
    "ema_state_dict",
    "state_dict_ema",
    "model_state",
    "params",
    "weights",
    "net",
    "network",
    "generator",
    "online_model",
];

/// What compilers and programs for several devices put into names, wherever a module begins.
const INSIDE: [&str; 4] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"];

/// How often one wrapper may be inside of another.
const WRAPPED: usize = 6;

/// The key below which VQGAN's second stage has the tokenizer of its conditions.
const CONDITION: &str = "cond_stage_model";

/// The views of a source that may be a part's weights: below each known key, as it is, and below keys inside of keys. What comes first
/// counts if several fit.
pub fn views(source: &dyn Source, part: Part) -> Vec<(Option<String>, Box<dyn Source + '_>)> {
    let all = Arc::new(plain_names(source));
    let has = |key: &str| {
        let start = format!("{key}.");
        all.range(start.clone()..).next().is_some_and(|(name, _)| name.starts_with(&start))
    };
    let mut keys: Vec<Option<String>> = Vec::new();
    let mut level: Vec<String> = WRAPPERS.iter().filter(|key| has(key)).map(|key| key.to_string()).collect();
    keys.extend(level.iter().cloned().map(Some));
    keys.push(None);
    for _ in 1..WRAPPED {
        let inside = |key: &String| WRAPPERS.map(|inside| format!("{key}.{inside}"));
        level = level.iter().flat_map(inside).filter(|key| has(key)).collect();
        keys.extend(level.iter().cloned().map(Some));
    }
    if part == Part::Condition {
        let inside = |key: Option<String>| Some(key.map_or(CONDITION.into(), |key| format!("{key}.{CONDITION}")));
        keys = keys.into_iter().map(inside).filter(|key| key.as_deref().is_some_and(has)).collect();
    }
    let view = |key: Option<String>| {
        let prefix = key.as_ref().map_or(String::new(), |key| format!("{key}."));
        let view = View { source, names: all.clone(), prefix };
        (key, Box::new(view) as Box<dyn Source + '_>)
    };
    keys.into_iter().map(view).collect()
}

/// The names of a source's tensors without what is put inside of them, and what they are in the source. As they are, if two became one.
fn plain_names(source: &dyn Source) -> BTreeMap<String, String> {
    let names: Vec<String> = source.shapes().into_keys().collect();
    let plain = |name: &String| name.split('.').filter(|word| !INSIDE.contains(word)).collect::<Vec<_>>().join(".");
    let found: BTreeMap<String, String> = names.iter().map(|name| (plain(name), name.clone())).collect();
    match found.len() == names.len() {
        true => found,
        false => names.into_iter().map(|name| (name.clone(), name)).collect(),
    }
}

/// The tensors below a key, without what wraps them.
struct View<'a> {
    source: &'a dyn Source,
    names: Arc<BTreeMap<String, String>>,
    prefix: String,
}

impl Source for View<'_> {
    fn place(&self) -> String {
        if self.prefix.is_empty() {
            return self.source.place();
        }
        format!("{}: {}", self.source.place(), self.prefix.trim_end_matches('.'))
    }

    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let mut shapes = self.source.shapes();
        let below = self.names.range(self.prefix.clone()..).take_while(|(name, _)| name.starts_with(&self.prefix));
        below.filter_map(|(name, own)| Some((name[self.prefix.len()..].to_string(), shapes.remove(own)?))).collect()
    }

    fn read(&self, name: &str) -> Result<Stored> {
        match self.names.get(&format!("{}{name}", self.prefix)) {
            Some(own) => self.source.read(own),
            None => Err(Error::unknown(self.place(), "tensor", name, self.shapes().into_keys())),
        }
    }
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
        let Stored { values, .. } = Finite(&self.plan).read(name)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrappers_come_off_in_any_order() {
        let view_of = |prefix: &str| {
            let tensor = Stored { shape: vec![1], values: Values::Floats(vec![1.0]) };
            let names = ["encoder.weight", "decoder.weight"].map(|name| (format!("{prefix}{name}"), tensor.clone()));
            let mut source = BTreeMap::from(names);
            source.insert("optimizer.0".into(), tensor);
            let views = views(&source, Part::Tokenizer);
            let found = views.iter().find(|(_, view)| view.shapes().contains_key("encoder.weight"));
            found.map(|(_, view)| (view.shapes().len(), view.read("decoder.weight").is_ok()))
        };
        for prefix in [
            "state_dict.module.",
            "model.module.",
            "_orig_mod.",
            "module._orig_mod.",
            "_fsdp_wrapped_module.module._orig_mod.",
            "state_dict.model.module.",
            "params_ema.",
            "ema.module.net.",
            "state_dict.net.module.model.",
        ] {
            let (found, reads) = view_of(prefix).unwrap_or_default();
            assert!(reads && found <= 3, "{prefix}: {found}");
        }
        assert_eq!(view_of("elsewhere."), None);
    }

    #[test]
    fn averaged_weights_come_first() {
        let tensor = Stored { shape: vec![1], values: Values::Floats(vec![1.0]) };
        let source = BTreeMap::from(["model.a", "model_ema.a", "params.a"].map(|name| (name.into(), tensor.clone())));
        let keys: Vec<Option<String>> = views(&source, Part::Generator).into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys[..2], [Some("model_ema".into()), Some("model".into())]);
        // Two tensors that would become one keep their names.
        let source = BTreeMap::from(["a", "_orig_mod.a"].map(|name| (name.into(), tensor.clone())));
        assert_eq!(views(&source, Part::Generator)[0].1.shapes().len(), 2);
    }
}
