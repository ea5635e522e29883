//! RQ-Transformer: a transformer over the places of a stack of codes, and a small one over the codes of each place
//! ("Autoregressive Image Generation using Residual Quantization", arXiv 2203.01941).
//!
//! The first network (the body) sees a place as the sum of its code vectors and tells the second (the head) about each place what
//! came before it. The head predicts a place's codes one after the other, from that and from what the codes so far add up to. Code
//! vectors are those of the tokenizer: the model carries a frozen copy, unless it learns vectors of its own.
//!
//! The official code has no guidance; `condition_dropout` is an addition that makes it possible.

mod config;
mod generation;
mod loss;

pub use config::{CodebookConfig, Gelu, RqTransformerConfig, Vectors};
pub use generation::RqGeneration;
pub use loss::soft_cross_entropy;

use burn::module::{Module, Param};
use burn::nn::Dropout;
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use smalti_nn::attention::Visible;
use smalti_nn::dense::{Dense, TokenEmbedding, TokenNorm};
use smalti_nn::positions::LearnedPositions;
use smalti_nn::transformer::Block;
use std::ops::Range;

/// The network.
#[derive(Module, Debug)]
pub struct RqTransformer {
    /// Vectors of the condition's ids; the only one is where a picture begins, without a condition.
    pub condition: TokenEmbedding,
    /// Places of the condition.
    pub condition_positions: LearnedPositions,
    /// Places of the grid.
    pub positions: LearnedPositions,
    /// Places in the stack.
    pub depth_positions: LearnedPositions,
    /// Code vectors to the body's tokens, `[channels, width]`.
    pub body_input: Option<Dense>,
    /// Code vectors to the head's tokens, `[channels, width]`.
    pub head_input: Option<Dense>,
    /// Own vectors of codes, one table for all depths or one below the other.
    pub words: Option<TokenEmbedding>,
    /// The first row of each depth in the table of own vectors, `[depth]`, if they do not share rows.
    pub first_rows: Option<Param<Tensor<1, Int>>>,
    /// Of the embedded inputs, in training.
    pub dropout: Dropout,
    /// Pre-norm blocks over places. Nothing normalises what they give.
    pub body: Vec<Block>,
    /// Pre-norm blocks over the codes of one place.
    pub head: Vec<Block>,
    /// Before the classifiers.
    pub norm: TokenNorm,
    /// To the logits.
    pub classifier: Classifier,
    /// Predicts a caption's next token.
    pub text: Option<TextHead>,
    /// Frozen copies of the tokenizer's code vectors, `[codes, channels]`: one for all depths, or one for each.
    pub vectors: Vec<Param<Tensor<2>>>,
    /// What the network was made from.
    #[module(skip)]
    pub config: RqTransformerConfig,
}

/// Makes logits.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "a model has one of them")]
pub enum Classifier {
    /// A layer for all depths, `[width, codes]`.
    Shared(Dense),
    /// A layer for each depth.
    Each(DenseStack),
}

/// An affine map for each depth.
#[derive(Module, Debug)]
pub struct DenseStack {
    /// `[depth, width, codes]`.
    pub weight: Param<Tensor<3>>,
    /// `[depth, codes]`.
    pub bias: Param<Tensor<2>>,
}

impl DenseStack {
    /// Maps the codes of the depths from `first` on, `[n, m, width]` to `[n, m, codes]`.
    fn forward(&self, x_nmd: Tensor<3>, first: usize) -> Tensor<3> {
        let m = x_nmd.dims()[1];
        let weight = self.weight.val().narrow(0, first, m);
        let bias = self.bias.val().narrow(0, first, m);
        x_nmd.swap_dims(0, 1).matmul(weight).swap_dims(0, 1) + bias.unsqueeze()
    }
}

impl Classifier {
    /// Logits of the codes of the depths from `first` on, `[n, m, width]` to `[n, m, codes]`.
    fn forward(&self, x_nmd: Tensor<3>, first: usize) -> Tensor<3> {
        match self {
            Self::Shared(layer) => layer.forward(x_nmd),
            Self::Each(layers) => layers.forward(x_nmd, first),
        }
    }
}

/// Predicts a caption's next token.
#[derive(Module, Debug)]
pub struct TextHead {
    /// Before the layer.
    pub norm: TokenNorm,
    /// To the logits, `[width, text tokens]`.
    pub linear: Dense,
}

/// What both networks see and say of a batch.
#[derive(Clone, Debug)]
pub struct Pass {
    /// Input of the body: the condition, then all places but the last, `[b, n, width]`.
    pub body_in: Tensor<3>,
    /// What the body makes of it.
    pub body_out: Tensor<3>,
    /// Input of the head, `[b * places, depth, width]`.
    pub head_in: Tensor<3>,
    /// What the head makes of it.
    pub head_out: Tensor<3>,
}

impl RqTransformer {
    /// The tokenizer's vectors of codes `[b, m * depth]`, `[b * m, depth, channels]`.
    fn looked_up(&self, codes: Tensor<2, Int>) -> Tensor<3> {
        let ([b, length], depth) = (codes.dims(), self.config.stack());
        let codes = codes.reshape([b * length / depth, depth]);
        let vectors = (0..depth).map(|at| {
            let table = self.vectors[if self.vectors.len() == 1 { 0 } else { at }].val();
            table.select(0, codes.clone().narrow(1, at, 1).squeeze_dim(1))
        });
        Tensor::stack(vectors.collect(), 1)
    }

    /// Own vectors of codes `[b, m * depth]`, `[b * m, depth, width]`.
    fn own(&self, words: &TokenEmbedding, codes: Tensor<2, Int>) -> Tensor<3> {
        let ([b, length], depth) = (codes.dims(), self.config.stack());
        let codes = codes.reshape([b * length / depth, depth]);
        match &self.first_rows {
            Some(first) => words.forward(codes + first.val().unsqueeze()),
            None => words.forward(codes),
        }
    }

    /// Places as the body sees them, without their positions: `[b, m * depth]` to `[b, m, width]`.
    fn places(&self, codes: Tensor<2, Int>) -> Tensor<3> {
        let ([b, length], depth) = (codes.dims(), self.config.stack());
        let place = |sums: Tensor<3>| {
            let [_, _, channels] = sums.dims();
            sums.reshape([b, length / depth, channels])
        };
        match (&self.body_input, &self.words) {
            (Some(layer), _) => {
                let sums = layer.forward(place(self.looked_up(codes).sum_dim(1)));
                // The official layer comes before the sum, so that its bias counts once for each code.
                match &layer.bias {
                    Some(bias) => sums + bias.val().mul_scalar(depth as f64 - 1.0).unsqueeze(),
                    None => sums,
                }
            }
            (None, Some(words)) => place(self.own(words, codes).sum_dim(1)),
            (None, None) => Tensor::zeros([b, length / depth, self.config.width], &codes.device()),
        }
    }

    /// Codes of some depths as the head sees them, without their positions: `[b, m * depth]` to `[b * m, depths, width]`. None if
    /// there are none of them.
    fn fed(&self, codes: Tensor<2, Int>, depths: Range<usize>) -> Option<Tensor<3>> {
        let (first, count) = (depths.start, depths.len());
        match (&self.head_input, &self.words) {
            _ if count == 0 => None,
            (Some(layer), _) => {
                let vectors = self.looked_up(codes);
                let vectors = if self.config.cumulative { vectors.cumsum(1) } else { vectors };
                Some(layer.forward(vectors.narrow(1, first, count)))
            }
            (None, Some(words)) => Some(self.own(words, codes).narrow(1, first, count)),
            (None, None) => None,
        }
    }

    fn embed_condition(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        self.condition_positions.forward(self.condition.forward(ids), 0)
    }

    /// Both networks over a whole batch.
    ///
    /// # Shapes
    /// `condition_ids [b, condition length]`, `codes [b, length]`.
    pub fn pass(&self, condition_ids: Tensor<2, Int>, codes: Tensor<2, Int>) -> Pass {
        let ([b, prefix], [_, length], depth) = (condition_ids.dims(), codes.dims(), self.config.stack());
        let places = length / depth;
        let mut body_in = self.embed_condition(condition_ids);
        if places > 1 {
            let before = self.places(codes.clone().narrow(1, 0, length - depth));
            body_in = Tensor::cat(vec![body_in, self.positions.forward(before, 0)], 1);
        }
        let run = |blocks: &[Block], x: Tensor<3>| {
            blocks.iter().fold(self.dropout.forward(x), |x, block| block.forward(x, &Visible::Past))
        };
        let body_out = run(&self.body, body_in.clone());
        let d = self.config.width;
        let context = body_out.clone().narrow(1, prefix - 1, places).reshape([b * places, 1, d]);
        let head_in = match self.fed(codes, 0..depth - 1) {
            Some(codes) => Tensor::cat(vec![context, codes], 1),
            None => context,
        };
        let head_in = self.depth_positions.forward(head_in, 0);
        let head_out = run(&self.head, head_in.clone());
        Pass { body_in, body_out, head_in, head_out }
    }

    /// Logits of every code, each given the condition and the codes before it; minus infinity for codes that its depth has not.
    ///
    /// # Shapes
    /// `head_out [n, depth, width]` to `[n, depth, codes]`.
    pub fn logits(&self, head_out: Tensor<3>) -> Tensor<3> {
        let logits = self.all_logits(head_out);
        match self.missing(&logits.device()) {
            Some(missing) => logits.clone().mask_fill(missing.expand(logits.dims()), f32::NEG_INFINITY),
            None => logits,
        }
    }

    fn all_logits(&self, head_out: Tensor<3>) -> Tensor<3> {
        self.classifier.forward(self.norm.forward(head_out), 0)
    }

    /// True for codes that a depth has not, `[1, depth, codes]`; none if all have the same number.
    fn missing(&self, device: &Device) -> Option<Tensor<3, Bool>> {
        let (depth, most) = (self.config.stack(), self.config.most_codes());
        if (0..depth).all(|at| self.config.codes_at(at) == most) {
            return None;
        }
        let missing: Vec<bool> = (0..depth * most).map(|i| i % most >= self.config.codes_at(i / most)).collect();
        Some(Tensor::from_data(TensorData::new(missing, [1, depth, most]), device))
    }

    /// Logits of a caption's tokens, each given those before it; the first one is not predicted.
    ///
    /// # Shapes
    /// `body_out [b, n, width]` to `[b, caption - 1, text tokens]`.
    pub fn text_logits(&self, body_out: Tensor<3>) -> Option<Tensor<3>> {
        let (caption, text) = (self.config.caption()?, self.text.as_ref()?);
        Some(text.linear.forward(text.norm.forward(body_out.narrow(1, caption.place, caption.length - 1))))
    }
}
