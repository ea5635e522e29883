//! What generators of vectors share: their checks, the condition's vectors and their transformer blocks.

use super::denoiser::DiffusionConfig;
use super::{ConditionConfig, Request};
use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Layout, Result, TokenSpec};
use smalti_nn::dense::{Dense, TokenEmbedding};
use smalti_nn::init::Init;
use smalti_nn::transformer::{Activation, Block, BlockConfig, NormPlacement};
use smalti_nn::vit::xavier;

/// Epsilon of all norms.
pub(super) const EPSILON: f64 = 1e-6;
/// Deviation of the first tables.
pub(super) const TABLE: Init = Init::Normal(0.02);

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
}

impl StackConfig {
    /// Fresh pre-norm blocks with timm's first values.
    pub(super) fn init(&self, mlp_ratio: usize, [dropout, attention_dropout]: [f64; 2], device: &Device) -> Vec<Block> {
        let w = self.width;
        let config = BlockConfig {
            width: w,
            heads: self.heads,
            hidden: mlp_ratio * w,
            norm: NormPlacement::Before,
            epsilon: EPSILON,
            activation: Activation::Gelu,
            dropout,
            attention_dropout,
            init: xavier(w, mlp_ratio * w),
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

/// The numbers that every generator of vectors has.
pub(super) struct VectorSize<'a> {
    pub place: &'a str,
    pub tokens: &'a TokenSpec,
    pub condition: &'a ConditionConfig,
    pub condition_dropout: f32,
    pub stacks: &'a [StackConfig],
    pub mlp_ratio: usize,
    pub dropout: [f64; 2],
    pub diffusion: &'a DiffusionConfig,
}

impl VectorSize<'_> {
    /// Returns the channels of a token.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a number out of range, [`Error::Unsupported`] for tokens or conditions of another kind.
    pub(super) fn validate(&self) -> Result<usize> {
        let refuse = |problem: String| Err(Error::invalid(self.place, problem));
        let unsupported = |what: String, hint: &str| Err(Error::unsupported(format!("{what} by {}", self.place), hint));
        let Some(channels) = self.tokens.channels() else {
            return unsupported(
                self.tokens.kind.to_string(),
                "its tokens must be vectors: use `gpt` or `maskgit` for codes",
            );
        };
        if !matches!(self.tokens.layout, Layout::Grid { .. } | Layout::Sequence { .. }) {
            return unsupported(format!("a {}", self.tokens.layout), "its tokens must be one grid or one sequence");
        }
        if matches!(self.condition, ConditionConfig::Text { .. }) {
            return unsupported("captions".into(), "its condition is a class or nothing");
        }
        if self.tokens.length() == 0 || channels == 0 {
            return refuse(format!("no tokens to predict in {}", self.tokens));
        }
        for StackConfig { width, depth, heads } in self.stacks {
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
        self.diffusion.check(self.place)?;
        self.condition.validate(self.place)?;
        Ok(channels)
    }
}

/// A vector for each class, and one for no condition.
#[derive(Module, Debug)]
pub struct ConditionVectors {
    /// Of the classes, if there are any.
    pub classes: Option<TokenEmbedding>,
    /// Of no condition, `[1, d]`.
    pub none: Param<Tensor<2>>,
}

impl ConditionVectors {
    pub(super) fn new(condition: &ConditionConfig, width: usize, device: &Device) -> Self {
        let classes = matches!(condition, ConditionConfig::Class { .. });
        Self {
            classes: classes.then(|| TokenEmbedding::new(condition.null(), width, TABLE, device)),
            none: TABLE.param([1, width], device),
        }
    }

    /// The vectors `[b, 1, d]` of ids `[b, 1]`; the null id comes after the classes.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let none = self.none.val();
        let table = match &self.classes {
            Some(classes) => Tensor::cat(vec![classes.table.val(), none], 0),
            None => none,
        };
        burn::tensor::module::embedding(table, ids)
    }
}

/// Indices as a tensor.
pub(super) fn index(values: Vec<usize>, device: &Device) -> Tensor<1, Int> {
    let n = values.len();
    let values: Vec<i32> = values.into_iter().map(|i| i as i32).collect();
    Tensor::from_data(TensorData::new(values, [n]), device)
}

/// The rows of an image's places in a batch, one after the other: place `p` of image `i` is row `i * length + p`.
pub(super) fn rows_of(places: &[Vec<usize>], length: usize) -> Vec<usize> {
    let images = places.iter().enumerate();
    images.flat_map(|(image, places)| places.iter().map(move |place| image * length + place)).collect()
}

/// Tokens of images on the host, all of the same size, as `[b, length, channels]`.
pub(super) fn upload_vectors(values: &[&Vec<f32>], channels: usize, device: &Device) -> Tensor<3> {
    let length = values.first().map_or(0, |row| row.len() / channels.max(1));
    let flat: Vec<f32> = values.iter().flat_map(|row| row.iter().copied()).collect();
    Tensor::from_data(TensorData::new(flat, [values.len(), length, channels]), device)
}

/// Ids of conditions `[n, 1]`, and with guidance below them as many null ids.
pub(super) fn id_rows(ids: &[usize], null: Option<usize>, device: &Device) -> Tensor<2, Int> {
    let none = null.into_iter().flat_map(|null| std::iter::repeat_n(null, ids.len()));
    index(ids.iter().copied().chain(none).collect(), device).unsqueeze_dim(1)
}

/// The id of each condition of a request that was checked.
///
/// # Errors
/// As [`ConditionConfig::ids`].
pub(super) fn ids_of(config: &ConditionConfig, request: &Request) -> Result<Vec<usize>> {
    let ids = request.images.iter().map(|image| config.ids(&image.condition));
    ids.map(|ids| ids.map(|ids| ids.first().copied().unwrap_or(config.null()))).collect()
}
