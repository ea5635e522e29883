//! Layers that act on each token by itself.

use crate::init::Init;
use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Shape, Tensor, module};
pub use smalti_kernels::{PackedMatrix, WeightPrecision};
use smalti_kernels::{linear, packed_linear};

/// An affine map of the last axis, `x weight + bias`.
#[derive(Module, Debug)]
pub struct Dense {
    /// `[inputs, outputs]` (PyTorch's is the transpose).
    pub weight: Param<Tensor<2>>,
    /// `[outputs]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// What [`Self::pack`] made of the weight; see [`Self::packed`].
    #[module(skip)]
    pub packed: Option<PackedMatrix>,
}

impl Dense {
    /// A map with weights drawn by `init` and a bias of zeros.
    pub fn new(inputs: usize, outputs: usize, init: Init, device: &Device) -> Self {
        let bias = Some(Init::Zeros.param([outputs], device));
        Self { bias, ..Self::without_bias(inputs, outputs, init, device) }
    }

    /// A linear map.
    pub fn without_bias(inputs: usize, outputs: usize, init: Init, device: &Device) -> Self {
        Self { weight: init.param([inputs, outputs], device), bias: None, packed: None }
    }

    /// Maps the last axis.
    ///
    /// # Shapes
    /// `[.., inputs]` to `[.., outputs]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self.packed() {
            Some(packed) => packed_linear(x, packed, self.bias_value()),
            None => linear(x, self.weight.val(), self.bias_value()),
        }
    }

    pub(crate) fn bias_value(&self) -> Option<Tensor<1>> {
        self.bias.as_ref().map(|bias| bias.val())
    }

    /// Replaces the weight by a packed one, for inference: reading it takes less time, and less memory if rounded.
    ///
    /// The parameter stays in the module, but without memory until something looks at its value: then it takes the
    /// values that the packed weight stands for, and counts in its place from then on. So saving, moving and training
    /// see these values, and never another weight than [`Self::forward`] does.
    pub fn pack(&mut self, precision: WeightPrecision) {
        self.adopt(PackedMatrix::from_tensor(self.weight.val(), precision));
    }

    /// [`Self::pack`] for values that come from elsewhere, such as a file, row by row of `[inputs, outputs]`. The
    /// parameter's own value is not looked at.
    ///
    /// # Panics
    /// If the number of values is another.
    pub fn pack_values(&mut self, values: &[f32], precision: WeightPrecision) {
        self.adopt(PackedMatrix::new(values, self.weight.lazy_shape().dims(), precision));
    }

    fn adopt(&mut self, packed: PackedMatrix) {
        let (id, device, shape) = (self.weight.id, self.weight.lazy_device(), Shape::from(packed.shape()));
        let source = packed.clone();
        let fill = move |device: &Device, require_grad: bool| source.unpack(device).set_require_grad(require_grad);
        self.weight = Param::uninitialized(id, fill, device, true, shape);
        self.packed = Some(packed);
    }

    /// The packed weight, if it counts: after [`Self::pack`], until the value of the parameter is looked at.
    pub fn packed(&self) -> Option<&PackedMatrix> {
        self.packed.as_ref().filter(|_| !self.weight.is_initialized() && self.weight.adapter().is_none())
    }
}

/// A network with [`Dense`] layers that can be packed for inference.
pub trait Pack: Module {
    /// All of its dense layers.
    fn dense_layers(&mut self) -> Vec<&mut Dense>;

    /// The network for inference, its dense layers packed; see [`Dense::pack`].
    fn pack(&self, precision: WeightPrecision) -> Self {
        let mut packed = self.valid();
        packed.dense_layers().into_iter().for_each(|dense| dense.pack(precision));
        packed
    }

    /// Memory of the packed weights in bytes.
    fn packed_bytes(&mut self) -> usize {
        self.dense_layers().iter().filter_map(|dense| dense.packed()).map(PackedMatrix::bytes).sum()
    }
}

/// Normalises each token over its channels (layer normalisation, arXiv 1607.06450).
#[derive(Module, Debug)]
pub struct TokenNorm {
    /// Scale `[d]`.
    pub gamma: Param<Tensor<1>>,
    /// Shift `[d]`.
    pub beta: Param<Tensor<1>>,
    /// Added to the variance.
    pub epsilon: f64,
}

impl TokenNorm {
    /// A norm over `width` channels with scale 1 and shift 0.
    pub fn new(width: usize, epsilon: f64, device: &Device) -> Self {
        Self { gamma: Init::Ones.param([width], device), beta: Init::Zeros.param([width], device), epsilon }
    }

    /// Normalises, scales and shifts.
    ///
    /// # Shapes
    /// `[b, n, d]` to the same.
    pub fn forward(&self, x_bnd: Tensor<3>) -> Tensor<3> {
        smalti_kernels::layer_norm(x_bnd, self.gamma.val(), self.beta.val(), self.epsilon)
    }
}

/// A vector for each of `n` ids.
#[derive(Module, Debug)]
pub struct TokenEmbedding {
    /// `[n, d]`.
    pub table: Param<Tensor<2>>,
}

impl TokenEmbedding {
    /// A table drawn by `init`.
    pub fn new(ids: usize, width: usize, init: Init, device: &Device) -> Self {
        Self { table: init.param([ids, width], device) }
    }

    /// Looks the ids up; they must be below `n`.
    ///
    /// # Shapes
    /// `ids [b, n]` to `[b, n, d]`.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        module::embedding(self.table.val(), ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::{ModuleMapper, ModuleVisitor};

    fn layer() -> (Dense, Tensor<2>) {
        let device = Device::flex();
        (Dense::new(40, 30, Init::Normal(0.3), &device), Init::Normal(1.0).draw([3, 40], &device))
    }

    fn difference(a: Tensor<2>, b: Tensor<2>) -> f32 {
        (a - b).abs().max().into_scalar()
    }

    fn packed(layer: &Dense, precision: WeightPrecision) -> Dense {
        let mut packed = layer.clone();
        packed.pack(precision);
        packed
    }

    #[test]
    fn a_packed_layer_holds_no_other_weight() {
        let (layer, x) = layer();
        for (precision, tolerance) in [(WeightPrecision::F32, 1e-5), (WeightPrecision::Int8, 0.1)] {
            let packed = packed(&layer, precision);
            assert!(difference(packed.forward(x.clone()), layer.forward(x.clone())) < tolerance);
            assert_eq!(packed.num_params(), layer.num_params());
            assert!(!packed.weight.is_initialized() && packed.packed().is_some());
        }
    }

    #[test]
    fn the_parameter_takes_over_with_the_same_values() {
        struct Look(Vec<f32>);
        impl ModuleVisitor for Look {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                self.0.extend(param.val().into_data().iter::<f32>());
            }
        }
        let (layer, x) = layer();
        let packed = packed(&layer, WeightPrecision::Int8);
        let before = packed.forward(x.clone());
        let kept = packed.packed().unwrap().unpack(&Device::flex());
        let mut look = Look(Vec::new());
        packed.visit(&mut look);
        assert_eq!(look.0[..1200], kept.into_data().try_to_vec::<f32>().unwrap());
        assert!(packed.packed().is_none());
        assert!(difference(packed.forward(x.clone()), before.clone()) < 1e-5);
        assert!(difference(packed.valid().forward(x), before) < 1e-5);
    }

    #[test]
    fn a_changed_parameter_counts() {
        struct Double;
        impl ModuleMapper for Double {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                param.map(|value| value * 2.0)
            }
        }
        let (layer, x) = layer();
        let packed = packed(&layer, WeightPrecision::F32).map(&mut Double);
        assert!(difference(packed.forward(x.clone()), layer.forward(x) * 2.0) < 1e-5);
    }

    #[test]
    fn a_packed_layer_can_be_trained_on() {
        let (layer, x) = layer();
        let training = packed(&layer, WeightPrecision::Bf16).train();
        let y = training.forward(x.clone().autodiff());
        assert!(difference(y.clone().inner(), layer.forward(x)) < 0.1);
        assert!(training.weight.grad(&y.sum().backward()).is_some());
    }
}
