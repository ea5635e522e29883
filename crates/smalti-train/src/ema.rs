//! Exponential moving average of a model's weights, kept on the plain device.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// How weights are averaged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmaConfig {
    /// Share of the old average at each step, below 1. It is warmed up as `min(decay, (1 + step) / (10 + step))`.
    pub decay: f64,
}

/// Moves `average` towards `model` after optimiser step `step`, counted from 0. Both have the same structure; what is not
/// trained (running statistics, EMA codebooks) is copied.
pub fn update<M: Module>(config: &EmaConfig, average: M, model: &M, step: u64) -> M {
    let decay = config.decay.min((1.0 + step as f64) / (10.0 + step as f64));
    let mut collected = Collect::default();
    model.visit(&mut collected);
    average.map(&mut Blend { source: collected.values.into_iter(), decay })
}

#[derive(Default)]
struct Collect {
    values: Vec<(Tensor<1>, bool)>,
}

impl ModuleVisitor for Collect {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        let trained = value.is_require_grad();
        let size = value.shape().num_elements();
        self.values.push((value.inner().reshape([size]), trained));
    }
}

struct Blend {
    source: std::vec::IntoIter<(Tensor<1>, bool)>,
    decay: f64,
}

impl ModuleMapper for Blend {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some((new, trained)) = self.source.next() else { return param };
        let decay = self.decay;
        param.map(|old| {
            let shape = old.shape();
            if !trained {
                return new.reshape(shape);
            }
            let size = shape.num_elements();
            (old.reshape([size]) * decay + new * (1.0 - decay)).reshape(shape)
        })
    }
}
