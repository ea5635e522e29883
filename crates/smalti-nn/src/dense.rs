//! Layers that act on each token by itself.

use crate::init::Init;
use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, module};

/// An affine map of the last axis, `x weight + bias`.
#[derive(Module, Debug)]
pub struct Dense {
    /// `[inputs, outputs]` (PyTorch's is the transpose).
    pub weight: Param<Tensor<2>>,
    /// `[outputs]`.
    pub bias: Option<Param<Tensor<1>>>,
}

impl Dense {
    /// A map with weights drawn by `init` and a bias of zeros.
    pub fn new(inputs: usize, outputs: usize, init: Init, device: &Device) -> Self {
        let bias = Some(Init::Zeros.param([outputs], device));
        Self { bias, ..Self::without_bias(inputs, outputs, init, device) }
    }

    /// A linear map.
    pub fn without_bias(inputs: usize, outputs: usize, init: Init, device: &Device) -> Self {
        Self { weight: init.param([inputs, outputs], device), bias: None }
    }

    /// Maps the last axis.
    ///
    /// # Shapes
    /// `[.., inputs]` to `[.., outputs]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        smalti_kernels::linear(x, self.weight.val(), self.bias.as_ref().map(|bias| bias.val()))
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
