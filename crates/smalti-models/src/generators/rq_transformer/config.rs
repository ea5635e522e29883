//! Settings and first values.

use super::{Classifier, DenseStack, RqTransformer, TextHead};
use crate::generators::blueprint::{Blueprint, Predicts, StackConfig, Takes};
use crate::generators::{Abilities, Condition, ConditionConfig, Conditions, GeneratorSettings, SoftTargets};
use crate::role::Described;
use crate::systems::Facts;
use burn::module::{Param, ParamId};
use burn::nn::DropoutConfig;
use burn::tensor::{Device, Int, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Layout, Result, TokenSpec, rng::Stream};
use smalti_nn::dense::{Dense, TokenEmbedding, TokenNorm};
use smalti_nn::init::Init;
use smalti_nn::positions::LearnedPositions;
use smalti_nn::transformer::{Activation, BlockConfig, NormPlacement};

/// Added to variances.
const EPSILON: f64 = 1e-5;

/// Everything that changes the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RqTransformerConfig {
    /// The tokens it predicts: a stack.
    pub tokens: TokenSpec,
    /// What it is conditioned on. The tokens of a caption are predicted too.
    #[serde(default)]
    pub condition: Conditions,
    /// How often training hides the condition, 0..=1. Guidance needs it above 0; without it there is no vector for that.
    #[serde(default, serialize_with = "smalti_base::config::decimal")]
    pub condition_dropout: f32,
    /// Channels of a token.
    pub width: usize,
    /// Blocks of the body.
    pub depth: usize,
    /// Blocks of the head.
    pub head_depth: usize,
    /// Attention heads of the body; must divide the width.
    pub heads: usize,
    /// Attention heads of the head's blocks; as many as the body's, if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_heads: Option<usize>,
    /// Channels inside a block's MLP, in widths.
    #[serde(default = "four")]
    pub mlp_ratio: usize,
    /// Non-linearity of the MLPs.
    #[serde(default)]
    pub activation: Gelu,
    /// Dropout of each branch, 0 <= dropout < 1.
    #[serde(default)]
    pub dropout: f64,
    /// Dropout of embeddings, 0 <= dropout < 1.
    #[serde(default)]
    pub embedding_dropout: f64,
    /// Dropout of attention weights, 0 <= dropout < 1.
    #[serde(default)]
    pub attention_dropout: f64,
    /// What codes are to the body.
    #[serde(default)]
    pub body_vectors: Vectors,
    /// What codes are to the head.
    #[serde(default)]
    pub head_vectors: Vectors,
    /// The tokenizer's code vectors, if they are used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub codebook: Option<CodebookConfig>,
    /// Whether all depths have one table of own vectors.
    #[serde(default = "yes")]
    pub shared_vectors: bool,
    /// Whether the head sees the sum of a place's codes so far, and not the last one's vector alone.
    #[serde(default = "yes")]
    pub cumulative: bool,
    /// Whether all depths have one layer that makes logits.
    #[serde(default = "yes")]
    pub shared_classifier: bool,
    /// Share of the loss that is the prediction of a caption's tokens, 0 <= share < 1.
    #[serde(default = "tenth")]
    pub text_share: f64,
    /// What codes are predicted as in training; the codes themselves, if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soft_targets: Option<SoftTargets>,
}

fn four() -> usize {
    4
}

fn yes() -> bool {
    true
}

fn tenth() -> f64 {
    0.1
}

/// The non-linearity of an MLP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gelu {
    /// `x Phi(x)` (the official `v1`).
    #[default]
    Exact,
    /// `x sigmoid(1.702 x)` (the official `v2`).
    Sigmoid,
}

/// What a code is to a network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Vectors {
    /// Its vector in the tokenizer, through a layer.
    #[default]
    Codebook,
    /// A vector that is learnt.
    Own,
}

/// The tables of a tokenizer's residual quantizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CodebookConfig {
    /// Channels of a code vector.
    pub channels: usize,
    /// Whether all depths have one table.
    #[serde(default = "yes")]
    pub shared: bool,
}

const PLACE: &str = "rq_transformer";

impl RqTransformerConfig {
    /// A model with normal first values of deviation 0.02, biases 0. Its code vectors wait for the tokenizer's; see
    /// [`Generator::adopt`](crate::Generator::adopt).
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Unsupported`] for settings out of range.
    pub fn init(&self, device: &Device) -> Result<RqTransformer> {
        let (h, w, depth) = self.check()?;
        let (d, init) = (self.width, Init::Normal(0.02));
        let uses = |vectors| [self.body_vectors, self.head_vectors].contains(&vectors);
        let input = |vectors: Vectors, channels: usize| {
            (vectors == Vectors::Codebook).then(|| Dense::new(channels, d, init, device))
        };
        let codebook = self.codebook.filter(|_| uses(Vectors::Codebook));
        let channels = codebook.map_or(0, |codebook| codebook.channels);
        let tables = codebook.map_or(0, |codebook| if codebook.shared { 1 } else { depth });
        let plain = device.clone().without_autodiff();
        let frozen = |depth| init.param([self.codes_at(depth), channels], &plain).set_require_grad(false);
        let rows = if self.shared_vectors { self.most_codes() } else { (0..depth).map(|d| self.codes_at(d)).sum() };
        let classifier = match self.shared_classifier {
            true => Classifier::Shared(Dense::new(d, self.most_codes(), init, device)),
            false => Classifier::Each(DenseStack {
                weight: init.param([depth, d, self.most_codes()], device),
                bias: Init::Zeros.param([depth, self.most_codes()], device),
            }),
        };
        let text = self.caption().map(|Caption { vocabulary, .. }| TextHead {
            norm: TokenNorm::new(d, EPSILON, device),
            linear: Dense::new(d, vocabulary, init, device),
        });
        Ok(RqTransformer {
            condition: TokenEmbedding::new(self.condition_rows(), d, init, device),
            condition_positions: LearnedPositions::new(self.condition.length(), d, init, device),
            positions: LearnedPositions::new(h * w, d, init, device),
            depth_positions: LearnedPositions::new(depth, d, init, device),
            body_input: input(self.body_vectors, channels),
            head_input: input(self.head_vectors, channels),
            words: uses(Vectors::Own).then(|| TokenEmbedding::new(rows, d, init, device)),
            first_rows: (uses(Vectors::Own) && !self.shared_vectors).then(|| self.first_rows(&plain)),
            dropout: DropoutConfig::new(self.embedding_dropout).init(),
            body: (0..self.depth).map(|_| self.block(self.heads).init(device)).collect(),
            head: (0..self.head_depth)
                .map(|_| self.block(self.head_heads.unwrap_or(self.heads)).init(device))
                .collect(),
            norm: TokenNorm::new(d, EPSILON, device),
            classifier,
            text,
            vectors: (0..tables).map(frozen).collect(),
            config: self.clone(),
        })
    }

    fn first_rows(&self, device: &Device) -> Param<Tensor<1, Int>> {
        let before = |depth| (0..depth).map(|at| self.codes_at(at) as i32).sum();
        let rows: Vec<i32> = (0..self.stack()).map(before).collect();
        Param::initialized(ParamId::new(), Tensor::from_data(rows.as_slice(), device))
    }

    fn block(&self, heads: usize) -> BlockConfig {
        BlockConfig {
            width: self.width,
            heads,
            hidden: self.mlp_ratio * self.width,
            norm: NormPlacement::Before,
            epsilon: EPSILON,
            activation: match self.activation {
                Gelu::Exact => Activation::Gelu,
                Gelu::Sigmoid => Activation::GeluSigmoid,
            },
            dropout: self.dropout,
            attention_dropout: self.attention_dropout,
            init: Init::Normal(0.02),
        }
    }

    /// Rows, columns and depth of the tokens.
    fn check(&self) -> Result<(usize, usize, usize)> {
        let refuse = |problem: String| Err(Error::invalid(PLACE, problem));
        let stack = |depth, heads| StackConfig { width: self.width, depth, heads, hidden: None };
        Blueprint {
            place: PLACE,
            predicts: Predicts::Stack,
            tokens: &self.tokens,
            takes: Takes::Ids,
            condition: &self.condition,
            condition_dropout: self.condition_dropout,
            stacks: &[stack(self.depth, self.heads), stack(self.head_depth, self.head_heads.unwrap_or(self.heads))],
            mlp_ratio: self.mlp_ratio,
            dropout: [self.dropout, self.attention_dropout],
        }
        .validate()?;
        let Layout::Stack { h, w, depth } = self.tokens.layout else { return refuse("its tokens are no stack".into()) };
        if let Some(problem) = self.tokens.vocabulary_misfit() {
            return refuse(problem);
        }
        if (0..depth).any(|depth| self.codes_at(depth) == 0) {
            return refuse(format!("no tokens to predict in {}", self.tokens));
        }
        let shares = [self.embedding_dropout, self.text_share];
        if let Some(share) = shares.iter().find(|share| !(0.0..1.0).contains(*share)) {
            return refuse(format!("an embedding_dropout or text_share of {share} is not in 0 <= share < 1"));
        }
        self.check_vectors(depth)?;
        match self.soft_targets {
            Some(SoftTargets { temperature, .. }) if !(temperature > 0.0 && temperature.is_finite()) => {
                refuse(format!("soft_targets: temperature = {temperature}, expected more than 0"))
            }
            _ => Ok((h, w, depth)),
        }
    }

    fn check_vectors(&self, depth: usize) -> Result<()> {
        let refuse = |problem: String| Err(Error::invalid(PLACE, problem));
        let differ = (0..depth).any(|depth| self.codes_at(depth) != self.codes_at(0));
        match self.codebook {
            _ if self.head_vectors == Vectors::Own && self.cumulative => {
                refuse("cumulative with own vectors of the head: only the tokenizer's vectors add up".into())
            }
            Some(CodebookConfig { channels: 0, .. }) => refuse("codebook: channels = 0; expected at least 1".into()),
            Some(CodebookConfig { shared: true, .. }) if differ => {
                refuse("codebook: shared = true, but depths have different numbers of codes".into())
            }
            None if [self.body_vectors, self.head_vectors].contains(&Vectors::Codebook) => Err(Error::invalid_hint(
                PLACE,
                "no codebook is given for the vectors of codes",
                "add `codebook = { channels = ... }`, those of the tokenizer's quantizer",
            )),
            _ => Ok(()),
        }
    }

    /// Codes of each place.
    pub(super) fn stack(&self) -> usize {
        match self.tokens.layout {
            Layout::Stack { depth, .. } => depth,
            _ => 1,
        }
    }

    /// Number of codes at one depth; 0 for tokens that are refused.
    pub(super) fn codes_at(&self, depth: usize) -> usize {
        self.tokens.codes_at(depth).unwrap_or_default()
    }

    pub(super) fn most_codes(&self) -> usize {
        self.tokens.vocabulary().unwrap_or_default()
    }

    /// Rows of the condition's table: that of no condition is missing if training never hides it, as in the official code.
    fn condition_rows(&self) -> usize {
        self.condition.rows() - usize::from(self.needs_a_condition())
    }

    /// Whether there is no vector for a missing condition.
    fn needs_a_condition(&self) -> bool {
        let fills = |one: &ConditionConfig| matches!(one, ConditionConfig::Text { .. });
        self.condition_dropout == 0.0 && matches!(self.condition.all(), [one] if !one.is_silent() && !fills(one))
    }

    /// The caption, if one is predicted.
    pub(super) fn caption(&self) -> Option<Caption> {
        let (mut place, mut id) = (0, 0);
        for one in self.condition.all() {
            if let ConditionConfig::Text { vocabulary, length, .. } = one {
                let caption = Caption { place, id, vocabulary: *vocabulary, length: *length };
                return (*length > 1).then_some(caption);
            }
            place += one.length();
            id += one.rows();
        }
        None
    }

    /// The ids of a batch of conditions, each dropped with probability `dropout`, `[b, length]`.
    pub(super) fn condition_ids(
        &self,
        conditions: &[Condition],
        dropout: Option<(f32, &mut Stream)>,
        device: &Device,
    ) -> Result<Tensor<2, Int>> {
        if self.needs_a_condition() && conditions.iter().any(Condition::is_none) {
            return Err(Error::invalid_hint(
                "condition",
                "none was given, and this generator has no vector for a missing condition",
                "say what the picture should show",
            ));
        }
        self.condition.batch(conditions, dropout, device)
    }
}

/// Where a caption is in the condition.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caption {
    /// Place of its first token.
    pub place: usize,
    /// The id of the first text token.
    pub id: usize,
    /// Text tokens.
    pub vocabulary: usize,
    /// Places.
    pub length: usize,
}

impl Described for RqTransformerConfig {
    const FACTS: Facts = Facts {
        arxiv: "2203.01941",
        tokens: "stack",
        about: "a transformer over the places and a small one over the codes of each place (RQ-Transformer)",
    };
}

impl GeneratorSettings for RqTransformerConfig {
    fn tokens(&self) -> &TokenSpec {
        &self.tokens
    }

    fn conditions(&self) -> &Conditions {
        &self.condition
    }

    fn condition_dropout(&self) -> f32 {
        self.condition_dropout
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            needs_a_condition: self.needs_a_condition(),
            reads_code_vectors: [self.body_vectors, self.head_vectors].contains(&Vectors::Codebook),
            ..Abilities::default()
        }
    }

    fn soft_targets(&self) -> Option<SoftTargets> {
        self.soft_targets
    }

    fn official(&self) -> Option<&'static str> {
        Some("rq-vae")
    }
}
