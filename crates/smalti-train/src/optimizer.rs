//! AdamW (arXiv 1711.05101) with the arithmetic of PyTorch's, and parameter groups by path.

use crate::ema;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use regex::Regex;
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result};
use smalti_kernels::AdamWState;
use std::collections::HashSet;

/// Settings of AdamW. All are written in the recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Peak learning rate; the schedule multiplies it.
    pub learning_rate: f64,
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    #[serde(default = "default_epsilon")]
    pub epsilon: f64,
    /// Decoupled weight decay of weight matrices and kernels; biases, norms and embeddings have none unless a group says so.
    #[serde(default)]
    pub weight_decay: f64,
    /// The global norm of the gradients is clipped to this; absent means no clipping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
    /// Exceptions; the last group whose pattern matches a parameter's path counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<GroupConfig>,
}

fn default_epsilon() -> f64 {
    1e-8
}

/// Parameters with settings of their own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// Regular expression over parameter paths such as `encoder.down.0.block.1.conv1.weight`.
    pub matches: String,
    /// Factor of the learning rate.
    #[serde(default = "one")]
    pub rate_factor: f64,
    /// Weight decay of this group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
}

fn one() -> f64 {
    1.0
}

/// The moments of every trained parameter, flattened, in the order in which the model is walked.
#[derive(Module, Debug)]
pub struct Moments {
    first: Vec<Param<Tensor<1>>>,
    second: Vec<Param<Tensor<1>>>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Group {
    rate_factor: f64,
    weight_decay: f64,
}

/// The optimiser of one model.
#[derive(Debug)]
pub struct AdamW {
    config: OptimizerConfig,
    groups: Vec<Group>,
    /// State that a checkpoint must hold, beside the number of steps.
    pub moments: Moments,
}

impl AdamW {
    /// An optimiser for the trained parameters of `model`, with moments 0.
    ///
    /// # Errors
    /// A group's pattern that is not a regular expression or that matches no parameter.
    pub fn new<M: Module>(config: &OptimizerConfig, model: &M) -> Result<Self> {
        let mut walk = Layout::default();
        model.visit(&mut walk);
        let device = walk.device.unwrap_or_else(Device::flex);
        let groups = assign_groups(config, &walk.parameters)?;
        let zeros = |n: &usize| {
            let zeros = Tensor::<1>::zeros([*n], &device);
            Param::from_tensor(zeros).set_require_grad(false)
        };
        let sizes: Vec<usize> = walk.parameters.iter().map(|p| p.size).collect();
        let moments = Moments { first: sizes.iter().map(zeros).collect(), second: sizes.iter().map(zeros).collect() };
        Ok(Self { config: config.clone(), groups, moments })
    }

    /// The same optimiser with the moments of a checkpoint.
    pub fn with_moments(&self, moments: Moments) -> Self {
        Self { config: self.config.clone(), groups: self.groups.clone(), moments }
    }

    /// One step; parameters without a gradient stay as they are. `average` has the structure of `model`, and its trained
    /// parameters follow those of the model in the same pass; for the others see [`ema::follow`].
    pub fn step<M: Module>(
        &mut self,
        model: M,
        average: Option<M>,
        gradients: &mut GradientsParams,
        pace: &Pace,
    ) -> (M, Option<M>) {
        let (beta_1, beta_2) = self.config.betas;
        let count = (pace.update + 1) as i32;
        let (average, averages) = average.map(ema::take_out).unzip();
        let mut mapper = Step {
            gradients,
            groups: &self.groups,
            moments: &mut self.moments,
            averages: averages.unwrap_or_default().into_iter(),
            followed: Vec::new(),
            index: 0,
            pace,
            settings: smalti_kernels::AdamW {
                gradient_factor: 1.0,
                rate: self.config.learning_rate * pace.rate_factor,
                betas: self.config.betas,
                corrections: (1.0 - beta_1.powi(count), 1.0 - beta_2.powi(count)),
                epsilon: self.config.epsilon,
                weight_decay: 0.0,
                average_decay: pace.average_decay,
            },
        };
        let model = model.map(&mut mapper);
        let followed = mapper.followed;
        (model, average.map(|average| average.fill(followed)))
    }
}

/// What changes from step to step.
#[derive(Debug)]
pub struct Pace {
    /// Updates before this one.
    pub update: u64,
    /// The schedule's factor of the learning rate.
    pub rate_factor: f64,
    /// The schedule's factor of the weight decay.
    pub weight_decay_factor: f64,
    /// Share of the old average of the weights.
    pub average_decay: Option<f64>,
    /// Factors of the gradients of some parameters, such as those of clipping.
    pub clip: Vec<(HashSet<ParamId>, f64)>,
}

impl Default for Pace {
    /// The first step at the peak rate.
    fn default() -> Self {
        Self { update: 0, rate_factor: 1.0, weight_decay_factor: 1.0, average_decay: None, clip: Vec::new() }
    }
}

impl Pace {
    fn gradient_factor(&self, id: ParamId) -> f64 {
        self.clip.iter().find(|(part, _)| part.contains(&id)).map_or(1.0, |(_, factor)| *factor)
    }
}

#[derive(Default)]
struct Layout {
    path: Vec<String>,
    parameters: Vec<Parameter>,
    device: Option<Device>,
}

struct Parameter {
    path: String,
    size: usize,
    rank: usize,
}

impl ModuleVisitor for Layout {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        if value.is_require_grad() {
            self.device.get_or_insert_with(|| value.clone().inner().device());
            self.parameters.push(Parameter { path: self.path.join("."), size: value.shape().num_elements(), rank: D });
        }
    }
}

fn assign_groups(config: &OptimizerConfig, parameters: &[Parameter]) -> Result<Vec<Group>> {
    let patterns = config
        .groups
        .iter()
        .map(|group| Regex::new(&group.matches).map(|regex| (regex, group)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| Error::invalid("optimizer.groups", e.to_string()))?;
    for (regex, _) in &patterns {
        if !parameters.iter().any(|p| regex.is_match(&p.path)) {
            let example = parameters.first().map(|p| p.path.as_str()).unwrap_or_default();
            return Err(Error::invalid(
                "optimizer.groups",
                format!("`{regex}` matches no parameter; paths look like `{example}`"),
            ));
        }
    }
    Ok(parameters
        .iter()
        .map(|parameter| {
            let decays = parameter.rank >= 2 && parameter.path.ends_with("weight") && !parameter.path.contains("embed");
            let group = patterns.iter().rev().find(|(regex, _)| regex.is_match(&parameter.path)).map(|(_, g)| *g);
            let default_decay = if decays { config.weight_decay } else { 0.0 };
            Group {
                rate_factor: group.map_or(1.0, |g| g.rate_factor),
                weight_decay: group.and_then(|g| g.weight_decay).unwrap_or(default_decay),
            }
        })
        .collect())
}

struct Step<'a> {
    gradients: &'a mut GradientsParams,
    groups: &'a [Group],
    moments: &'a mut Moments,
    /// Averages of all parameters, in the order of the walk.
    averages: std::vec::IntoIter<Tensor<1>>,
    followed: Vec<Tensor<1>>,
    index: usize,
    pace: &'a Pace,
    settings: smalti_kernels::AdamW,
}

impl ModuleMapper for Step<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let average = self.averages.next();
        if !param.val().is_require_grad() {
            self.followed.extend(average);
            return param;
        }
        let index = self.index;
        self.index += 1;
        let gradient = self.gradients.remove::<D>(param.id);
        let (Some(gradient), Some(group)) = (gradient, self.groups.get(index)) else {
            self.followed.extend(average.map(|average| self.blend(average, flat(param.val().inner()))));
            return param;
        };
        let settings = smalti_kernels::AdamW {
            gradient_factor: self.pace.gradient_factor(param.id),
            rate: self.settings.rate * group.rate_factor,
            weight_decay: group.weight_decay * self.pace.weight_decay_factor,
            ..self.settings
        };
        // Taken out of where they are kept so that the update works in place.
        let first = take(&mut self.moments.first[index]);
        let second = take(&mut self.moments.second[index]);
        param.map(|value| {
            let autodiff = value.is_autodiff();
            let shape = value.shape();
            let state = AdamWState { value: flat(value.inner()), first, second, average };
            let state = settings.step(state, flat(gradient));
            put(&mut self.moments.first[index], state.first);
            put(&mut self.moments.second[index], state.second);
            self.followed.extend(state.average);
            let value = state.value.reshape(shape);
            if autodiff { value.autodiff().require_grad() } else { value }
        })
    }
}

impl Step<'_> {
    fn blend(&self, average: Tensor<1>, value: Tensor<1>) -> Tensor<1> {
        match self.settings.average_decay {
            Some(decay) => average * decay + value * (1.0 - decay),
            None => average,
        }
    }
}

fn flat<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let size = tensor.shape().num_elements();
    tensor.reshape([size])
}

fn take(slot: &mut Param<Tensor<1>>) -> Tensor<1> {
    let value = slot.val();
    let device = value.device();
    *slot = Param::from_tensor(Tensor::empty([0], &device)).set_require_grad(false);
    value
}

fn put(slot: &mut Param<Tensor<1>>, value: Tensor<1>) {
    *slot = Param::from_tensor(value).set_require_grad(false);
}
