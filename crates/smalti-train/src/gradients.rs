//! Gradients of a module: summing micro-batches, the global norm, scaling.

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use std::collections::HashSet;

/// Adds `new * weight` to `sum`, parameter by parameter.
pub fn accumulate<M: Module>(model: &M, sum: &mut GradientsParams, new: &mut GradientsParams, weight: f64) {
    struct Add<'a> {
        sum: &'a mut GradientsParams,
        new: &'a mut GradientsParams,
        weight: f64,
    }
    impl ModuleVisitor for Add<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let Some(new) = self.new.remove::<D>(param.id) else { return };
            let new = if self.weight == 1.0 { new } else { new * self.weight };
            let total = match self.sum.remove::<D>(param.id) {
                Some(sum) => sum + new,
                None => new,
            };
            self.sum.register(param.id, total);
        }
    }
    model.visit(&mut Add { sum, new, weight });
}

/// The parameters of a module whose path belongs to a part of it, such as the discriminator.
pub fn select<M: Module>(model: &M, belongs: impl Fn(&str) -> bool) -> HashSet<ParamId> {
    struct Select<F> {
        belongs: F,
        path: Vec<String>,
        found: HashSet<ParamId>,
    }
    impl<F: Fn(&str) -> bool> ModuleVisitor for Select<F> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if (self.belongs)(&self.path.join(".")) {
                self.found.insert(param.id);
            }
        }
    }
    let mut visitor = Select { belongs, path: Vec::new(), found: HashSet::new() };
    model.visit(&mut visitor);
    visitor.found
}

/// The Euclidean norm over the gradients of `part`, as PyTorch's `clip_grad_norm_` computes it. A tensor of one element on the
/// gradients' device; `None` if the part has no gradients.
pub fn global_norm<M: Module>(model: &M, gradients: &GradientsParams, part: &HashSet<ParamId>) -> Option<Tensor<1>> {
    struct Squares<'a> {
        gradients: &'a GradientsParams,
        part: &'a HashSet<ParamId>,
        sum: Option<Tensor<1>>,
    }
    impl ModuleVisitor for Squares<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let Some(gradient) = self.gradients.get::<D>(param.id).filter(|_| self.part.contains(&param.id)) else {
                return;
            };
            let squares = smalti_kernels::sum_of_squares(gradient);
            self.sum = Some(match self.sum.take() {
                Some(sum) => sum + squares,
                None => squares,
            });
        }
    }
    let mut visitor = Squares { gradients, part, sum: None };
    model.visit(&mut visitor);
    visitor.sum.map(Tensor::sqrt)
}
