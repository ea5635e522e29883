//! AdamW (arXiv 1711.05101) with the arithmetic of PyTorch's, and parameter groups by path.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use regex::Regex;
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result};

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

    /// One step; `step` counts from 0 and `factor` is the schedule's. Parameters without a gradient stay as they are.
    pub fn step<M: Module>(&mut self, model: M, gradients: &mut GradientsParams, step: u64, factor: f64) -> M {
        let (beta_1, beta_2) = self.config.betas;
        let count = (step + 1) as i32;
        let mut mapper = Step {
            gradients,
            groups: &self.groups,
            moments: &mut self.moments,
            index: 0,
            rate: self.config.learning_rate * factor,
            betas: self.config.betas,
            epsilon: self.config.epsilon,
            correction_1: 1.0 - beta_1.powi(count),
            correction_2: 1.0 - beta_2.powi(count),
        };
        model.map(&mut mapper)
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
    index: usize,
    rate: f64,
    betas: (f64, f64),
    epsilon: f64,
    correction_1: f64,
    correction_2: f64,
}

impl ModuleMapper for Step<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !param.val().is_require_grad() {
            return param;
        }
        let index = self.index;
        self.index += 1;
        let (Some(gradient), Some(group)) = (self.gradients.remove::<D>(param.id), self.groups.get(index)) else {
            return param;
        };
        let group = *group;
        let gradient = flat(gradient);
        let (beta_1, beta_2) = self.betas;
        // Taken out of the state so that the updates work in place.
        let first = take(&mut self.moments.first[index]) * beta_1 + gradient.clone() * (1.0 - beta_1);
        let second = take(&mut self.moments.second[index]) * beta_2 + gradient.powi_scalar(2) * (1.0 - beta_2);
        let rate = self.rate * group.rate_factor;
        let denominator = second.clone().sqrt() / self.correction_2.sqrt() + self.epsilon;
        let change = first.clone() / denominator * (rate / self.correction_1);
        put(&mut self.moments.first[index], first);
        put(&mut self.moments.second[index], second);
        param.map(|value| {
            let autodiff = value.is_autodiff();
            let shape = value.shape();
            let value = flat(value.inner());
            let value = if group.weight_decay == 0.0 { value } else { value * (1.0 - rate * group.weight_decay) };
            let value = (value - change).reshape(shape);
            if autodiff { value.autodiff().require_grad() } else { value }
        })
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
