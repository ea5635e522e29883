//! Exponential moving average of a model's weights, kept on the plain device. The optimiser's step moves it; see
//! [`crate::AdamW::step`].

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Shape, Tensor};
use serde::{Deserialize, Serialize};

/// How weights are averaged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmaConfig {
    /// Share of the old average at each step, below 1. It is warmed up as `min(decay, (1 + step) / (10 + step))`.
    pub decay: f64,
}

impl EmaConfig {
    /// Share of the old average after step `step`, counted from 0.
    pub fn decay_at(&self, step: u64) -> f64 {
        self.decay.min((1.0 + step as f64) / (10.0 + step as f64))
    }
}

/// A module whose float parameters were taken out, so that they can be updated in place.
#[derive(Debug)]
pub struct Emptied<M> {
    module: M,
    shapes: Vec<Shape>,
}

/// Takes all float parameters out, flattened, in the order of the walk.
pub fn take_out<M: Module>(module: M) -> (Emptied<M>, Vec<Tensor<1>>) {
    #[derive(Default)]
    struct Take {
        shapes: Vec<Shape>,
        values: Vec<Tensor<1>>,
    }
    impl ModuleMapper for Take {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|value| {
                let (shape, device) = (value.shape(), value.device());
                self.values.push(value.reshape([shape.num_elements()]));
                self.shapes.push(shape);
                Tensor::empty([0; D], &device)
            })
        }
    }
    let mut taken = Take::default();
    let module = module.map(&mut taken);
    (Emptied { module, shapes: taken.shapes }, taken.values)
}

impl<M: Module> Emptied<M> {
    /// The module with parameters again: as many values as were taken out, in their order.
    pub fn fill(self, values: Vec<Tensor<1>>) -> M {
        struct Put(std::iter::Zip<std::vec::IntoIter<Tensor<1>>, std::vec::IntoIter<Shape>>);
        impl ModuleMapper for Put {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                match self.0.next() {
                    Some((value, shape)) => param.map(|_| value.reshape(shape)),
                    None => param,
                }
            }
        }
        self.module.map(&mut Put(values.into_iter().zip(self.shapes)))
    }
}

/// Moves `average` towards `model`, for what [`crate::AdamW::step`] did not: trained parameters by `decay`, or not at all; what is
/// not trained (running statistics, EMA codebooks) is copied. Both have the same structure.
pub fn follow<M: Module>(average: M, model: &M, decay: Option<f64>) -> M {
    #[derive(Default)]
    struct Collect(Vec<(Tensor<1>, bool)>);
    impl ModuleVisitor for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.val();
            let (size, trained) = (value.shape().num_elements(), value.is_require_grad());
            self.0.push((value.inner().reshape([size]), trained));
        }
    }
    let mut collected = Collect::default();
    model.visit(&mut collected);
    let (emptied, averages) = take_out(average);
    let followed = averages.into_iter().zip(collected.0).map(|(old, (new, trained))| match (trained, decay) {
        (false, _) => new,
        (true, Some(decay)) => old * decay + new * (1.0 - decay),
        (true, None) => old,
    });
    let followed = followed.collect();
    emptied.fill(followed)
}
