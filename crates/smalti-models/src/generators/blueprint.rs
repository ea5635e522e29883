//! What the configurations of all generators have, and its checks.

use super::{ConditionConfig, Conditions};
use burn::tensor::Device;
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Layout, Result, TokenSpec, Vocabulary};
use smalti_nn::dense::Dense;
use smalti_nn::transformer::{Activation, Block, BlockConfig, NormPlacement};
use smalti_nn::vit::xavier;

/// A stack of transformer blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StackConfig {
    /// Channels of a token.
    pub width: usize,
    /// Transformer blocks.
    pub depth: usize,
    /// Attention heads; must divide the width.
    pub heads: usize,
    /// Channels inside a block's MLP where they are not a multiple of the width; the generator's `mlp_ratio` then does not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden: Option<usize>,
}

impl StackConfig {
    /// Blocks whose MLPs are as wide as the generator's `mlp_ratio` says.
    pub fn new(width: usize, depth: usize, heads: usize) -> Self {
        Self { width, depth, heads, hidden: None }
    }

    /// Fresh pre-norm blocks with timm's first values.
    pub(super) fn init(
        &self,
        epsilon: f64,
        mlp_ratio: usize,
        [dropout, attention_dropout]: [f64; 2],
        device: &Device,
    ) -> Vec<Block> {
        let w = self.width;
        let hidden = self.hidden.unwrap_or(mlp_ratio * w);
        let config = BlockConfig {
            width: w,
            heads: self.heads,
            hidden,
            norm: NormPlacement::Before,
            epsilon,
            activation: Activation::Gelu,
            dropout,
            attention_dropout,
            init: xavier(w, hidden),
        };
        let block = |_| {
            let mut block = config.init(device).with_hidden_dropout(dropout);
            // There queries, keys and values are one layer.
            let projection = || Dense::new(w, w, xavier(w, 3 * w), device);
            let attention = &mut block.attention;
            (attention.query, attention.key, attention.value) = (projection(), projection(), projection());
            attention.output = Dense::new(w, w, xavier(w, w), device);
            block
        };
        (0..self.depth).map(block).collect()
    }
}

/// Which tokens a generator predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Predicts {
    /// Codes of one grid or one sequence.
    FlatCodes,
    /// Codes in levels.
    Pyramid,
    /// Vectors of one grid or one sequence.
    Vectors,
    /// Several codes at each place of a grid, of one vocabulary or one for each depth.
    Stack,
}

/// Which conditions a generator takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takes {
    /// Any that are said by ids, several together.
    Ids,
    /// A class or a caption.
    ClassOrText,
    /// A class.
    Class,
}

/// The settings that every generator has.
pub(super) struct Blueprint<'a> {
    pub place: &'a str,
    pub predicts: Predicts,
    pub tokens: &'a TokenSpec,
    pub takes: Takes,
    pub condition: &'a Conditions,
    pub condition_dropout: f32,
    pub stacks: &'a [StackConfig],
    pub mlp_ratio: usize,
    pub dropout: [f64; 2],
}

impl Blueprint<'_> {
    /// # Errors
    /// [`Error::Invalid`] for a number out of range, [`Error::Unsupported`] for tokens or conditions of another kind.
    pub(super) fn validate(&self) -> Result<()> {
        self.check_tokens()?;
        self.check_condition()?;
        let refuse = |problem: String| Err(Error::invalid(self.place, problem));
        for StackConfig { width, depth, heads, hidden } in self.stacks {
            if *hidden == Some(0) {
                return refuse("hidden must be at least 1".into());
            }
            if [*width, *depth, *heads, self.mlp_ratio].contains(&0) {
                return refuse("width, depth, heads and mlp_ratio must be at least 1".into());
            }
            if !width.is_multiple_of(*heads) {
                return refuse(format!("width = {width} is not a multiple of heads = {heads}"));
            }
        }
        if !(0.0..=1.0).contains(&self.condition_dropout) {
            return refuse(format!("condition_dropout = {} is not in 0..=1", self.condition_dropout));
        }
        if let Some(dropout) = self.dropout.iter().find(|dropout| !(0.0..1.0).contains(*dropout)) {
            return refuse(format!("a dropout of {dropout} is not in 0 <= dropout < 1"));
        }
        Ok(())
    }

    fn check_tokens(&self) -> Result<()> {
        let Self { place, tokens, .. } = self;
        let flat = matches!(tokens.layout, Layout::Grid { .. } | Layout::Sequence { .. });
        let (fits, expected) = match self.predicts {
            Predicts::FlatCodes | Predicts::Vectors => (flat, "one grid or one sequence"),
            Predicts::Pyramid => (matches!(tokens.layout, Layout::Pyramid { .. }), "a pyramid"),
            Predicts::Stack => (matches!(tokens.layout, Layout::Stack { .. }), "a stack"),
        };
        if !fits {
            let hint = format!("its tokens must be {expected}");
            return Err(Error::unsupported(format!("a {} by {place}", tokens.layout), hint));
        }
        let hint = match (self.predicts, tokens.vocabularies()) {
            (Predicts::Vectors, Some(_)) => Some("its tokens must be vectors: use `gpt` or `maskgit` for codes"),
            (Predicts::FlatCodes | Predicts::Pyramid | Predicts::Stack, None) => {
                Some("its tokens must be codes: use `mar` for vectors")
            }
            (Predicts::FlatCodes | Predicts::Pyramid, Some(Vocabulary::Each(_))) => {
                Some("it has one vocabulary for all tokens")
            }
            _ => None,
        };
        if let Some(hint) = hint {
            return Err(Error::unsupported(format!("{} by {place}", tokens.kind), hint));
        }
        match tokens.length() == 0 || tokens.vocabulary() == Some(0) || tokens.channels() == Some(0) {
            true => Err(Error::invalid(*place, format!("no tokens to predict in {tokens}"))),
            false => Ok(()),
        }
    }

    fn check_condition(&self) -> Result<()> {
        let unsupported = |what: &str, hint: &str| {
            Err(Error::unsupported(format!("{what} as the condition of {}", self.place), hint))
        };
        if self.takes != Takes::Ids {
            self.condition.single(self.place)?;
        }
        for one in self.condition.all() {
            match (self.takes, one) {
                (_, ConditionConfig::None | ConditionConfig::Class { .. }) => {}
                (Takes::Ids | Takes::ClassOrText, ConditionConfig::Text { .. }) => {}
                (Takes::Ids, ConditionConfig::Codes { .. } | ConditionConfig::Coordinates { .. }) => {}
                (Takes::Class, ConditionConfig::Text { .. }) => {
                    return unsupported("a caption", "condition it on a class or on nothing");
                }
                (Takes::Class, _) => return unsupported(one.describe(), "condition it on a class or on nothing"),
                (Takes::ClassOrText, _) => return unsupported(one.describe(), "condition it on a class or a caption"),
                (Takes::Ids, _) => return unsupported(one.describe(), "condition it on classes, captions or codes"),
            }
        }
        self.condition.validate(self.place)
    }
}
