//! Gradients of parameters, whichever a case holds: official names and layouts become ours by the rules of import.

use super::case::Case;
use super::comparison::Comparison;
use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use smalti_base::{Error, Result};
use smalti_models::checkpoint::weights::{Entry, parameter_map};
use smalti_models::checkpoint::{Rules, Source, Stored, Values};
use std::collections::BTreeMap;

/// How a case names the gradients of a module's parameters.
pub(crate) struct Official {
    rules: Rules,
    /// All weights, for their names.
    weights: BTreeMap<String, Stored>,
    prefix: String,
    scale: f32,
}

impl Official {
    /// Gradients `grad.NAME` of the parameters that this part's rules make of the case's weights.
    ///
    /// # Errors
    /// As [`Rules::builtin`] and [`Case::weights`].
    pub(crate) fn new(case: &Case, system: &str, part: &str) -> Result<Self> {
        let rules = Rules::builtin(system, part)?;
        Ok(Self { rules, weights: case.weights("")?, prefix: "grad.".into(), scale: 1.0 })
    }

    /// The same with another word than `grad.` in front of the names.
    pub(crate) fn after(self, prefix: &str) -> Self {
        Self { prefix: prefix.into(), ..self }
    }

    /// The same where the case's loss is ours times `scale`.
    pub(crate) fn scaled(self, scale: f64) -> Self {
        Self { scale: scale as f32, ..self }
    }

    /// Compares each gradient of the case whose parameter is the module's.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a gradient of another shape than its parameter, or one that is not 0 where ours is missing.
    pub(crate) fn compare<M: Module>(
        &self,
        case: &Case,
        compare: &mut Comparison,
        module: &M,
        gradients: &GradientsParams,
    ) -> Result<()> {
        let mut source = self.weights.clone();
        let mut wanted = BTreeMap::new();
        for name in case.names().filter(|name| name.starts_with(&self.prefix)) {
            let official = self.official(&name[self.prefix.len()..]);
            let values = case.peek(name).filter(|stored| matches!(stored.values, Values::Floats(_)));
            if let (Some(official), Some(stored)) = (official, values) {
                source.insert(official.to_string(), stored.clone());
                wanted.insert(official, name);
            }
        }
        let plan = self.rules.plan(&source)?;
        let (entries, ours) = (parameter_map(module), plan.shapes());
        for (official, name) in wanted {
            // One official tensor may be several of ours.
            let made = |ours: &&String| plan.origins(ours) == [official] && entries.contains_key(*ours);
            let (mut found, mut expected) = (Vec::new(), Vec::new());
            for target in ours.keys().filter(made) {
                let stored = plan.read(target)?;
                let values = stored.floats().unwrap_or_default();
                found.extend(self.values(name, module, gradients, &entries[target], values)?);
                expected.extend_from_slice(values);
            }
            if !expected.is_empty() {
                compare.same_count(name, expected.len(), case.floats(name)?.len())?;
                compare.against(name, &found, &expected);
            }
        }
        Ok(())
    }

    /// The weight that a gradient is of, whose name may have more in front.
    fn official(&self, name: &str) -> Option<&str> {
        let fits = |full: &&str| {
            let front = full.strip_suffix(name);
            front.is_some_and(|front| front.is_empty() || front.ends_with(['.', '/']))
        };
        let mut names = self.weights.keys().map(String::as_str);
        if self.weights.contains_key(name) {
            return names.find(|full| *full == name);
        }
        let fitting: Vec<&str> = names.filter(fits).collect();
        (fitting.len() == 1).then(|| fitting[0])
    }

    fn values<M: Module>(
        &self,
        name: &str,
        module: &M,
        gradients: &GradientsParams,
        entry: &Entry,
        expected: &[f32],
    ) -> Result<Vec<f32>> {
        let mut walk = Download { gradients, id: entry.id, found: None };
        module.visit(&mut walk);
        match walk.found {
            Some(found) if found.len() != expected.len() => {
                let problem = format!("{} values, the parameter has {:?}", expected.len(), entry.shape);
                Err(Error::invalid(name, problem))
            }
            Some(found) => Ok(found.into_iter().map(|value| value * self.scale).collect()),
            None if expected.iter().all(|value| *value == 0.0) => Ok(vec![0.0; expected.len()]),
            None => Err(Error::invalid(name, "no gradient reached it")),
        }
    }
}

/// Brings one parameter's gradient to the host.
struct Download<'a> {
    gradients: &'a GradientsParams,
    id: ParamId,
    found: Option<Vec<f32>>,
}

impl ModuleVisitor for Download<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if param.id == self.id
            && let Some(gradient) = self.gradients.get::<D>(param.id)
        {
            self.found = Some(gradient.into_data().iter::<f32>().collect());
        }
    }
}
