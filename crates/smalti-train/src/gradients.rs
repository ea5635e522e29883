//! Gradients of a module: summing micro-batches, the global norm, scaling.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;

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

/// The Euclidean norm over the gradients of those parameters of `model` whose path `belongs`, as PyTorch's
/// `clip_grad_norm_` computes it. A tensor of one element on the gradients' device; `None` if there are no gradients.
pub fn global_norm<M: Module>(
    model: &M,
    gradients: &GradientsParams,
    belongs: impl Fn(&str) -> bool,
) -> Option<Tensor<1>> {
    struct Squares<'a, F> {
        gradients: &'a GradientsParams,
        belongs: F,
        path: Vec<String>,
        sum: Option<Tensor<1>>,
    }
    impl<F: Fn(&str) -> bool> ModuleVisitor for Squares<'_, F> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if !(self.belongs)(&self.path.join(".")) {
                return;
            }
            let Some(gradient) = self.gradients.get::<D>(param.id) else { return };
            let squares = gradient.powi_scalar(2).sum();
            self.sum = Some(match self.sum.take() {
                Some(sum) => sum + squares,
                None => squares,
            });
        }
    }
    let mut visitor = Squares { gradients, belongs, path: Vec::new(), sum: None };
    model.visit(&mut visitor);
    visitor.sum.map(Tensor::sqrt)
}

/// Multiplies the gradients of those parameters of `model` whose path `belongs` by `factor`.
pub fn scale<M: Module>(model: &M, gradients: &mut GradientsParams, factor: f64, belongs: impl Fn(&str) -> bool) {
    struct Scale<'a, F> {
        gradients: &'a mut GradientsParams,
        belongs: F,
        path: Vec<String>,
        factor: f64,
    }
    impl<F: Fn(&str) -> bool> ModuleVisitor for Scale<'_, F> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if !(self.belongs)(&self.path.join(".")) {
                return;
            }
            if let Some(gradient) = self.gradients.remove::<D>(param.id) {
                self.gradients.register(param.id, gradient * self.factor);
            }
        }
    }
    model.visit(&mut Scale { gradients, belongs, path: Vec::new(), factor });
}
