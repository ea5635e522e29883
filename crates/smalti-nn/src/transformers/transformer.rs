//! Transformer blocks.

use crate::attention::{SelfAttention, Visible};
use crate::cache::Cache;
use crate::dense::{Dense, Pack, TokenNorm};
use crate::init::Init;
use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Device, Tensor, activation};

/// The non-linearity of an [`Mlp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x Phi(x)`, exact.
    Gelu,
    /// The approximation of GELU by a hyperbolic tangent.
    GeluTanh,
    /// The approximation of GELU by a sigmoid, `x sigmoid(1.702 x)`.
    GeluSigmoid,
}

impl Activation {
    /// Applies it to each element.
    pub fn forward<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Gelu => smalti_kernels::gelu(x, false),
            Self::GeluTanh => smalti_kernels::gelu(x, true),
            Self::GeluSigmoid => x.clone() * activation::sigmoid(x.mul_scalar(1.702)),
        }
    }
}

/// Where a block normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before each branch: `x + f(norm(x))` (GPT-2, ViT).
    Before,
    /// After each sum: `norm(x + f(x))` (the first transformer, BERT).
    After,
}

/// Two dense layers with a non-linearity between them.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[d, hidden]`.
    pub expand: Dense,
    /// `[hidden, d]`.
    pub contract: Dense,
    /// Between the two.
    #[module(skip)]
    pub activation: Activation,
    /// Of what is between the two, in training.
    pub dropout: Dropout,
}

impl Mlp {
    /// Changes each token by itself.
    ///
    /// # Shapes
    /// `[b, n, d]` to the same.
    pub fn forward(&self, x_bnd: Tensor<3>) -> Tensor<3> {
        let hidden = self.activation.forward(self.expand.forward(x_bnd));
        self.contract.forward(self.dropout.forward(hidden))
    }
}

/// Settings of a [`Block`].
#[derive(Clone, Debug, PartialEq)]
pub struct BlockConfig {
    /// Channels of a token.
    pub width: usize,
    /// Attention heads; must divide the width.
    pub heads: usize,
    /// Channels inside the [`Mlp`].
    pub hidden: usize,
    /// Where the norms are.
    pub norm: NormPlacement,
    /// Added to the variance in the norms.
    pub epsilon: f64,
    /// Of the [`Mlp`].
    pub activation: Activation,
    /// Dropout of both branches' outputs, `0..1`.
    pub dropout: f64,
    /// Dropout of the attention weights, `0..1`.
    pub attention_dropout: f64,
    /// Of all matrices; biases begin at 0.
    pub init: Init,
}

impl BlockConfig {
    /// A block with fresh parameters.
    pub fn init(&self, device: &Device) -> Block {
        Block {
            attention_norm: TokenNorm::new(self.width, self.epsilon, device),
            attention: SelfAttention::new(self.width, self.heads, self.attention_dropout, self.init, device),
            mlp_norm: TokenNorm::new(self.width, self.epsilon, device),
            mlp: Mlp {
                expand: Dense::new(self.width, self.hidden, self.init, device),
                contract: Dense::new(self.hidden, self.width, self.init, device),
                activation: self.activation,
                dropout: DropoutConfig::new(0.0).init(),
            },
            dropout: DropoutConfig::new(self.dropout).init(),
            norm: self.norm,
        }
    }
}

/// Self-attention and an [`Mlp`], each added to what went in.
#[derive(Module, Debug)]
pub struct Block {
    /// Before the attention, or after its sum.
    pub attention_norm: TokenNorm,
    /// Mixes tokens.
    pub attention: SelfAttention,
    /// Before the MLP, or after its sum.
    pub mlp_norm: TokenNorm,
    /// Works on each token.
    pub mlp: Mlp,
    /// Of both branches' outputs, in training.
    pub dropout: Dropout,
    /// Where the norms are.
    #[module(skip)]
    pub norm: NormPlacement,
}

impl Block {
    /// Sets the dropout inside the MLP, `0..1`, which is off otherwise (timm's blocks have it).
    pub fn with_hidden_dropout(mut self, dropout: f64) -> Self {
        self.mlp.dropout = DropoutConfig::new(dropout).init();
        self
    }

    /// Mixes the tokens, then changes each by itself.
    ///
    /// # Shapes
    /// `[b, n, d]` to the same.
    pub fn forward(&self, x_bnd: Tensor<3>, visible: &Visible) -> Tensor<3> {
        self.around(x_bnd, |x| x, |x_bnd| self.attention.forward(x_bnd, visible))
    }

    /// The same, all tokens seeing all, but only for those that `wanted` takes out of them: for a last block of which no more is used.
    ///
    /// # Shapes
    /// `[b, n, d]`, of which `wanted` makes `[b, m, d]`, to that.
    pub fn forward_for(&self, x_bnd: Tensor<3>, wanted: impl Fn(Tensor<3>) -> Tensor<3>) -> Tensor<3> {
        self.around(x_bnd, &wanted, |x_bnd| self.attention.forward_for(x_bnd, &wanted))
    }

    /// The same for tokens that come after those of a cache; see [`SelfAttention::decode`].
    ///
    /// # Shapes
    /// `[b, n, d]` to the same.
    pub fn decode(&self, x_bnd: Tensor<3>, cache: &mut impl Cache) -> Tensor<3> {
        self.around(x_bnd, |x| x, |x_bnd| self.attention.decode(x_bnd, cache))
    }

    /// `mix` and the MLP with norms and sums around them, for the tokens that `kept` leaves, as `mix` does.
    fn around(
        &self,
        x_bnd: Tensor<3>,
        kept: impl FnOnce(Tensor<3>) -> Tensor<3>,
        mix: impl FnOnce(Tensor<3>) -> Tensor<3>,
    ) -> Tensor<3> {
        match self.norm {
            NormPlacement::Before => {
                let mixed = mix(self.attention_norm.forward(x_bnd.clone()));
                let x = kept(x_bnd) + self.dropout.forward(mixed);
                let changed = self.mlp.forward(self.mlp_norm.forward(x.clone()));
                x + self.dropout.forward(changed)
            }
            NormPlacement::After => {
                let mixed = mix(x_bnd.clone());
                let x = self.attention_norm.forward(self.dropout.forward(mixed) + kept(x_bnd));
                let changed = self.mlp.forward(x.clone());
                self.mlp_norm.forward(self.dropout.forward(changed) + x)
            }
        }
    }
}

impl Pack for Block {
    fn dense_layers(&mut self) -> Vec<&mut Dense> {
        let SelfAttention { query, key, value, output, .. } = &mut self.attention;
        vec![query, key, value, output, &mut self.mlp.expand, &mut self.mlp.contract]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_for_some_tokens_makes_what_the_whole_makes_of_them() {
        let device = Device::flex();
        device.seed(3);
        for norm in [NormPlacement::Before, NormPlacement::After] {
            let config = BlockConfig {
                width: 16,
                heads: 2,
                hidden: 32,
                norm,
                epsilon: 1e-6,
                activation: Activation::Gelu,
                dropout: 0.0,
                attention_dropout: 0.0,
                init: Init::Normal(0.3),
            };
            let block = config.init(&device);
            let x = Tensor::<3>::random([2, 9, 16], burn::tensor::Distribution::Default, &device);
            let wanted = |x: Tensor<3>| x.slice([0..2, 3..7]);
            let whole = wanted(block.forward(x.clone(), &Visible::All));
            for block in [block.clone(), block.pack(crate::dense::WeightPrecision::F32)] {
                let some = block.forward_for(x.clone(), wanted);
                let error = (some - whole.clone()).abs().max().into_scalar::<f32>();
                assert!(error < 1e-5, "{norm:?}: {error}");
            }
        }
    }

    #[test]
    fn dropout_inside_the_mlp_acts_in_training_only() {
        let device = Device::flex().autodiff();
        let config = BlockConfig {
            width: 8,
            heads: 2,
            hidden: 16,
            norm: NormPlacement::Before,
            epsilon: 1e-6,
            activation: Activation::Gelu,
            dropout: 0.0,
            attention_dropout: 0.0,
            init: Init::Normal(0.5),
        };
        let plain = config.init(&device);
        let dropping = plain.clone().with_hidden_dropout(0.5);
        let x = Init::Normal(1.0).draw([2, 3, 8], &device);
        let run = |block: &Block, x: Tensor<3>| block.forward(x, &Visible::All).inner();
        let difference = |a: Tensor<3>, b: Tensor<3>| (a - b).abs().max().into_scalar::<f32>();
        let expected = run(&plain, x.clone());
        assert!(difference(run(&dropping.train(), x.clone()), expected.clone()) > 1e-3);
        let dropping = plain.clone().with_hidden_dropout(0.5).valid();
        assert!(difference(run(&dropping, x.inner()), expected) < 1e-5);
    }
}
