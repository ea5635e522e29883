//! GPT: a decoder-only transformer that predicts an image's tokens one after the other, each from those before it.
//!
//! VQGAN's second stage (arXiv 2012.09841, `Net2NetTransformer` over the minGPT network): the condition's tokens come first, and
//! the last of them predicts the first image token. There the condition's ids are rows of the token table; by default they
//! have a table of their own, as in LlamaGen (arXiv 2406.06525), with a null vector for guidance.
//!
//! Pictures larger than the model's grid are made through a window of its size that follows the next token (section 3.2 of
//! the paper).

use super::blueprint::{Blueprint, Predicts, StackConfig, Takes};
use super::upload::upload;
use super::{
    Abilities, Condition, ConditionConfig, Conditions, Draw, Generation, Generator, GeneratorLoss, GeneratorSettings,
    Predictions, Request, TokenOrder, codes_of,
};
use crate::role::Described;
use crate::sampling::{Draws, Sampling, Seeded, decide_rows, filter, guide};
use crate::systems::Facts;
use crate::{Codes, host};
use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Layout, Result, TokenSpec, rng::Stream};
use smalti_nn::attention::Visible;
use smalti_nn::cache::{Cache, KeyValueCache};
use smalti_nn::dense::{Dense, Pack, TokenEmbedding, TokenNorm};
use smalti_nn::init::Init;
use smalti_nn::positions::LearnedPositions;
use smalti_nn::transformer::{Activation, Block, BlockConfig, NormPlacement};

/// Everything that changes the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GptConfig {
    /// The tokens it predicts: a grid or a sequence.
    pub tokens: TokenSpec,
    /// What it is conditioned on.
    #[serde(default)]
    pub condition: Conditions,
    /// How often training hides the condition, 0..=1. Guidance needs it above 0.
    #[serde(default, serialize_with = "smalti_base::config::decimal")]
    pub condition_dropout: f32,
    /// Channels of a token.
    pub width: usize,
    /// Transformer blocks.
    pub depth: usize,
    /// Attention heads; must divide the width.
    pub heads: usize,
    /// Channels inside a block's MLP, in widths.
    #[serde(default = "four")]
    pub mlp_ratio: usize,
    /// Dropout of embeddings and of each branch, 0 <= dropout < 1.
    #[serde(default)]
    pub dropout: f64,
    /// Dropout of attention weights, 0 <= dropout < 1.
    #[serde(default)]
    pub attention_dropout: f64,
    /// Whether the condition's tokens see each other in both directions.
    #[serde(default)]
    pub visible_prefix: bool,
    /// How many of them do, from the first; all if it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub visible_places: Option<usize>,
    /// The order in which the tokens are predicted.
    #[serde(default)]
    pub order: TokenOrder,
    /// Whether the condition's ids are rows of the token table. Then there is no null vector, so no guidance.
    #[serde(default)]
    pub shared_table: bool,
    /// The token in front of the image tokens if they share a table and there is no condition.
    #[serde(default)]
    pub start_token: usize,
    /// Places of the position table, minGPT's block size; as many as the longest input needs, if not given.
    #[serde(default)]
    pub block_size: Option<usize>,
    /// How often training feeds the true token and not one drawn from all codes, 0..=1. The targets are always the true ones.
    #[serde(default = "one", serialize_with = "smalti_base::config::decimal")]
    pub pkeep: f32,
}

fn four() -> usize {
    4
}

fn one() -> f32 {
    1.0
}

impl Described for GptConfig {
    const FACTS: Facts = Facts {
        arxiv: "2012.09841",
        tokens: "grid, sequence",
        about: "decoder-only transformer, one token after another; larger pictures through a sliding window (VQGAN)",
    };
}

impl GptConfig {
    /// minGPT's network over these tokens, with a condition that has its own table, and no dropout of any kind.
    pub fn new(tokens: TokenSpec, condition: impl Into<Conditions>, width: usize, depth: usize, heads: usize) -> Self {
        Self {
            tokens,
            condition: condition.into(),
            condition_dropout: 0.0,
            width,
            depth,
            heads,
            mlp_ratio: four(),
            dropout: 0.0,
            attention_dropout: 0.0,
            visible_prefix: false,
            visible_places: None,
            order: TokenOrder::Raster,
            shared_table: false,
            start_token: 0,
            block_size: None,
            pkeep: one(),
        }
    }

    /// A model with minGPT's first values: normal with deviation 0.02, biases and positions 0.
    ///
    /// # Errors
    /// [`smalti_base::Error::Invalid`] or [`smalti_base::Error::Unsupported`] for settings out of range.
    pub fn init(&self, device: &Device) -> Result<Gpt> {
        Blueprint {
            place: "gpt",
            predicts: Predicts::FlatCodes,
            tokens: &self.tokens,
            takes: Takes::Ids,
            condition: &self.condition,
            condition_dropout: self.condition_dropout,
            stacks: &[StackConfig::new(self.width, self.depth, self.heads)],
            mlp_ratio: self.mlp_ratio,
            dropout: [self.dropout, self.attention_dropout],
        }
        .validate()?;
        self.validate()?;
        let init = Init::Normal(0.02);
        let block = BlockConfig {
            width: self.width,
            heads: self.heads,
            hidden: self.mlp_ratio * self.width,
            norm: NormPlacement::Before,
            epsilon: 1e-5,
            activation: Activation::Gelu,
            dropout: self.dropout,
            attention_dropout: self.attention_dropout,
            init,
        };
        Ok(Gpt {
            condition: (!self.shared_table)
                .then(|| TokenEmbedding::new(self.condition.rows(), self.width, init, device)),
            tokens: TokenEmbedding::new(self.codes(), self.width, init, device),
            positions: LearnedPositions::new(
                self.block_size.unwrap_or_else(|| self.places()),
                self.width,
                Init::Zeros,
                device,
            ),
            dropout: DropoutConfig::new(self.dropout).init(),
            blocks: (0..self.depth).map(|_| block.init(device)).collect(),
            norm: TokenNorm::new(self.width, 1e-5, device),
            head: Dense::without_bias(self.width, self.codes(), init, device),
            order: self.order.places(&self.tokens.layout)?,
            config: self.clone(),
        })
    }

    fn validate(&self) -> Result<()> {
        let refuse = |problem: String| Err(Error::invalid("gpt", problem));
        if !(0.0..=1.0).contains(&self.pkeep) {
            return refuse(format!("pkeep = {} is not in 0..=1", self.pkeep));
        }
        if let Some(places) = self.block_size.filter(|places| *places < self.places()) {
            return refuse(format!("block_size = {places}, but condition and tokens need {}", self.places()));
        }
        if let Some(places) =
            self.visible_places.filter(|places| !self.visible_prefix || *places > self.condition.length())
        {
            return refuse(format!(
                "visible_places = {places}; expected visible_prefix and at most the condition's {} tokens",
                self.condition.length()
            ));
        }
        if !self.shared_table {
            return Ok(());
        }
        let condition = self.condition.single("gpt with shared_table")?;
        let (ids, codes) = (condition.null(), self.codes());
        match condition {
            _ if self.start_token >= codes => refuse(format!("start_token = {} is not in 0..{codes}", self.start_token)),
            ConditionConfig::Text { .. } => {
                refuse("shared_table with text: padding needs a null vector, which only an own table has".into())
            }
            _ if ids > codes => refuse(format!("shared_table: the condition has {ids} ids, the table {codes} rows")),
            _ if self.condition_dropout > 0.0 => refuse(
                "shared_table with condition_dropout: a hidden condition needs a null vector, which only an own table has"
                    .into(),
            ),
            _ => Ok(()),
        }
    }

    /// Tokens and condition of pictures with another grid of tokens.
    fn on_grid(&self, grid: (usize, usize)) -> Result<(TokenSpec, Conditions)> {
        let refuse = |problem: String, hint: &str| Err(Error::invalid_hint("request: grid", problem, hint));
        let Layout::Grid { h, w } = self.tokens.layout else {
            return refuse(format!("the tokens are a {}", self.tokens.layout), "a window can only slide over a grid");
        };
        if self.order != TokenOrder::Raster {
            return refuse("the tokens are not predicted row by row".into(), "only then can a window follow them");
        }
        if grid.0 < h || grid.1 < w {
            let hint = format!("ask for at least {h}x{w}, the generator's own grid");
            return refuse(format!("{}x{} tokens", grid.0, grid.1), &hint);
        }
        let condition = match *self.condition.single("a window of gpt")? {
            ConditionConfig::Codes { codes, h: rows, w: columns } if (rows, columns) == (h, w) => {
                ConditionConfig::Codes { codes, h: grid.0, w: grid.1 }
            }
            ConditionConfig::Coordinates { codes, h: rows, w: columns, pixels } if (rows, columns) == (h, w) => {
                ConditionConfig::Coordinates { codes, h: grid.0, w: grid.1, pixels }
            }
            ConditionConfig::Codes { .. } | ConditionConfig::Coordinates { .. } => {
                return refuse("the condition's grid is not that of the tokens".into(), "a window needs both alike");
            }
            ref other => other.clone(),
        };
        Ok((self.tokens.on_grid(grid.0, grid.1), condition.into()))
    }

    /// The ids of a batch of conditions, each dropped with probability `dropout`, `[b, length]`.
    fn condition_ids(
        &self,
        config: &Conditions,
        conditions: &[Condition],
        dropout: Option<(f32, &mut Stream)>,
        device: &Device,
    ) -> Result<Tensor<2, Int>> {
        let ids = config.batch(conditions, dropout, device)?;
        match () {
            () if !self.shared_table => Ok(ids),
            () if config.is_none() => Ok(ids.zeros_like() + self.start_token as i32),
            () if !config.is_silent() && conditions.iter().any(Condition::is_none) => Err(Error::invalid_hint(
                "condition",
                "none was given, and this generator has no vector for a missing condition",
                "say what the picture should show",
            )),
            () => Ok(ids),
        }
    }

    /// Number of codes; 0 for tokens that are refused.
    fn codes(&self) -> usize {
        self.tokens.vocabulary().unwrap_or_default()
    }

    /// How many of so many tokens of the condition see each other.
    fn visible_places(&self, condition: usize) -> usize {
        if self.visible_prefix { self.visible_places.unwrap_or(condition).min(condition) } else { 0 }
    }

    /// Length of the longest input: the last image token is never fed.
    fn places(&self) -> usize {
        self.condition.length() + self.tokens.length() - 1
    }
}

impl GeneratorSettings for GptConfig {
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
            slides_a_window: true,
            needs_a_condition: self.shared_table && !self.condition.is_silent(),
            ..Abilities::default()
        }
    }

    /// The official network has no table for the condition alone.
    fn official(&self) -> Option<&'static str> {
        self.shared_table.then_some("vqgan")
    }
}

/// The network.
#[derive(Module, Debug)]
pub struct Gpt {
    /// Vectors of the condition's ids, the last one the null id's, unless they are rows of the token table.
    pub condition: Option<TokenEmbedding>,
    /// Vectors of the image tokens.
    pub tokens: TokenEmbedding,
    /// Places of the condition, then of the image tokens.
    pub positions: LearnedPositions,
    /// Of the embedded input, in training.
    pub dropout: Dropout,
    /// Pre-norm blocks.
    pub blocks: Vec<Block>,
    /// Before the head.
    pub norm: TokenNorm,
    /// To the logits, `[width, vocabulary]`.
    pub head: Dense,
    /// Places of the row-by-row grid in the order of prediction.
    #[module(skip)]
    pub order: Vec<usize>,
    /// What the network was made from.
    #[module(skip)]
    pub config: GptConfig,
}

impl Gpt {
    /// Codes that are stored row by row, in the order of prediction.
    ///
    /// # Shapes
    /// `[b, length]` to the same.
    pub fn ordered(&self, codes: Tensor<2, Int>) -> Tensor<2, Int> {
        if self.config.order == TokenOrder::Raster {
            return codes;
        }
        let order: Vec<i32> = self.order.iter().map(|place| *place as i32).collect();
        let order = Tensor::from_data(TensorData::new(order, [self.order.len()]), &codes.device());
        codes.select(1, order)
    }

    /// Logits of every image token, each given the condition and the tokens before it.
    ///
    /// # Shapes
    /// `condition_ids [b, condition length]`, `codes [b, length]` in the order of prediction, to `[b, length, vocabulary]`.
    pub fn logits(&self, condition_ids: Tensor<2, Int>, codes: Tensor<2, Int>) -> Tensor<3> {
        let [_, length] = codes.dims();
        let prefix = condition_ids.dims()[1];
        let mut x = self.embed_condition(condition_ids);
        if length > 1 {
            x = Tensor::cat(vec![x, self.tokens.forward(codes.narrow(1, 0, length - 1))], 1);
        }
        let visible = Visible::past_and_prefix(x.dims()[1], self.config.visible_places(prefix), &x.device());
        x = self.dropout.forward(self.positions.forward(x, 0));
        for block in &self.blocks {
            x = block.forward(x, &visible);
        }
        self.head.forward(self.norm.forward(x.narrow(1, prefix - 1, length)))
    }

    fn embed_condition(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        self.condition.as_ref().unwrap_or(&self.tokens).forward(ids)
    }

    /// In training, conditions are hidden and tokens replaced by random numbers of `stream`.
    fn predict(&self, codes: Codes, conditions: &[Condition], stream: Option<&mut Stream>) -> Result<Predictions> {
        let GptConfig { tokens, condition, .. } = &self.config;
        let codes = self.ordered(codes_of(codes, conditions, tokens)?);
        let device = codes.device();
        let (condition_ids, fed) = match stream {
            None => (self.config.condition_ids(condition, conditions, None, &device)?, codes.clone()),
            Some(stream) => {
                let dropout = Some((self.config.condition_dropout, &mut *stream));
                (self.config.condition_ids(condition, conditions, dropout, &device)?, self.perturbed(&codes, stream))
            }
        };
        let logits = self.logits(condition_ids, fed).flatten(0, 1);
        Ok(Predictions { logits, targets: codes.flatten(0, 1), weights: None })
    }

    /// Codes of which all but a share of `pkeep` are drawn at random again.
    fn perturbed(&self, codes: &Tensor<2, Int>, stream: &mut Stream) -> Tensor<2, Int> {
        if self.config.pkeep >= 1.0 {
            return codes.clone();
        }
        let [b, length] = codes.dims();
        let mut draw = || match stream.uniform() < self.config.pkeep {
            true => -1,
            false => stream.below(self.config.codes()) as i32,
        };
        let drawn: Vec<i32> = std::iter::repeat_with(&mut draw).take(b * length).collect();
        let drawn = Tensor::<2, Int>::from_data(TensorData::new(drawn, [b, length]), &codes.device());
        let keep = drawn.clone().lower_elem(0);
        drawn.mask_where(keep, codes.clone())
    }

    /// [`Generator::start`] with random draws from elsewhere.
    ///
    /// # Errors
    /// As [`Generator::start`].
    pub fn start_with(&self, request: &Request, draws: Box<dyn Draws>) -> Result<GptGeneration> {
        let GptConfig { tokens, condition, .. } = &self.config;
        let (tokens, condition) = match request.grid {
            None => (tokens.clone(), condition.clone()),
            Some(grid) => self.config.on_grid(grid)?,
        };
        let known = request.check_on(&self.config, &tokens, &condition)?;
        // A packed model is for inference already, and would be unpacked by `valid`.
        let model = if self.head.packed().is_some() { self.clone() } else { self.valid() };
        let device = model.norm.gamma.val().device();
        let prefix = self.config.visible_places(condition.length());
        let window = request.grid.map(|grid| Window { grid, size: self.config.tokens.layout.finest() });
        Ok(GptGeneration {
            condition_rows: self.config.condition_ids(&condition, &request.conditions(), None, &device)?,
            moves_condition: window.is_some() && condition.all().iter().any(|one| one.length() == tokens.length()),
            caches: (0..self.config.depth).map(|_| KeyValueCache::new(self.config.places(), prefix)).collect(),
            codes: vec![vec![0; tokens.length()]; known.len()],
            sampling: request.sampling.clone(),
            origin: (0, 0),
            seen: Vec::new(),
            done: 0,
            model,
            device,
            known,
            draws,
            window,
        })
    }
}

/// A window that follows the next token over a grid that is larger: the token is in its middle, but near the grid's rim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Rows and columns of the grid.
    pub grid: (usize, usize),
    /// Rows and columns of the window, at most those of the grid.
    pub size: (usize, usize),
}

impl Window {
    /// Row and column of the window's first place when this place's token is next.
    pub fn origin(&self, row: usize, column: usize) -> (usize, usize) {
        let first = |at: usize, size: usize, grid: usize| at.saturating_sub(size / 2).min(grid - size);
        (first(row, self.size.0, self.grid.0), first(column, self.size.1, self.grid.1))
    }

    /// The places of the grid that the window shows, row by row.
    fn places(&self, origin: (usize, usize)) -> impl Iterator<Item = usize> {
        let (columns, (h, w)) = (self.grid.1, self.size);
        (0..h * w).map(move |i| (origin.0 + i / w) * columns + origin.1 + i % w)
    }
}

impl Generator for Gpt {
    fn settings(&self) -> &dyn GeneratorSettings {
        &self.config
    }

    /// The mean cross-entropy of all image tokens.
    fn loss(&self, codes: Codes, given: &[Condition], draw: &mut Draw<'_>) -> Result<GeneratorLoss> {
        Ok(self.predict(codes, given, Some(draw.stream))?.loss())
    }

    fn predictions(&self, codes: Codes, given: &[Condition], _: u64) -> Result<Predictions> {
        self.predict(codes, given, None)
    }

    fn dense_layers(&mut self) -> Vec<&mut Dense> {
        self.blocks.iter_mut().flat_map(Pack::dense_layers).chain([&mut self.head]).collect()
    }

    fn start(&self, request: &Request) -> Result<Box<dyn Generation + '_>> {
        let draws = Seeded::new(request.images.iter().map(|image| image.seed));
        Ok(Box::new(self.start_with(request, Box::new(draws))?))
    }
}

/// Decoding under way: one image token at each step. Tokens that are known for every image are fed together with the next
/// one that must be drawn.
pub struct GptGeneration {
    model: Gpt,
    device: Device,
    sampling: Sampling,
    condition_rows: Tensor<2, Int>,
    /// Whether the window also shows only a part of the condition.
    moves_condition: bool,
    caches: Vec<KeyValueCache>,
    /// By place, row by row, as the codes.
    known: Vec<Vec<Option<u32>>>,
    codes: Vec<Vec<u32>>,
    draws: Box<dyn Draws>,
    window: Option<Window>,
    /// The window's first place when the caches were filled.
    origin: (usize, usize),
    /// Places whose tokens the caches have seen after the condition.
    seen: Vec<usize>,
    done: usize,
}

impl GptGeneration {
    /// The place of the next token.
    fn place(&self) -> usize {
        if self.window.is_some() { self.done } else { self.model.order[self.done] }
    }

    /// The places whose tokens come before the next one, where the window is.
    fn before(&mut self) -> Vec<usize> {
        let Some(window) = self.window else {
            return self.model.order[..self.done].to_vec();
        };
        let columns = window.grid.1;
        let origin = window.origin(self.done / columns, self.done % columns);
        if origin != self.origin {
            self.origin = origin;
            self.seen.clear();
            self.caches.iter_mut().for_each(KeyValueCache::clear);
        }
        window.places(origin).take_while(|place| *place != self.done).collect()
    }

    /// The condition's ids, where the window is.
    fn condition(&self) -> Tensor<2, Int> {
        match self.window.filter(|_| self.moves_condition) {
            None => self.condition_rows.clone(),
            Some(window) => {
                let places: Vec<i32> = window.places(self.origin).map(|place| place as i32).collect();
                let count = places.len();
                self.condition_rows.clone().select(1, Tensor::from_data(TensorData::new(places, [count]), &self.device))
            }
        }
    }

    /// Feeds what the caches have not seen; returns the logits of the next token, `[rows, 1, vocabulary]`.
    fn predict(&mut self) -> Tensor<3> {
        let before = self.before();
        let first = self.caches.first().map_or(0, KeyValueCache::length);
        let mut parts = Vec::new();
        if first == 0 {
            parts.push(self.model.embed_condition(self.condition()));
        }
        let new = &before[self.seen.len()..];
        if !new.is_empty() {
            let row = |codes: &Vec<u32>| new.iter().map(|place| codes[*place]).collect();
            let mut rows: Vec<Vec<u32>> = self.codes.iter().map(row).collect();
            if self.sampling.is_guided() {
                rows.extend_from_within(..);
            }
            parts.push(self.model.tokens.forward(upload(&rows, &self.device)));
        }
        self.seen = before;
        let mut x = self.model.positions.forward(Tensor::cat(parts, 1), first);
        for (block, cache) in self.model.blocks.iter().zip(&mut self.caches) {
            x = block.decode(x, cache);
        }
        let n = x.dims()[1];
        let x = self.model.norm.forward(x.narrow(1, n - 1, 1));
        self.model.head.forward(match self.sampling.is_guided() {
            true => guide(x, self.sampling.guidance_at(self.done, self.steps())),
            false => x,
        })
    }

    fn sample(&mut self) -> Result<()> {
        let (device, place) = (self.device.clone(), self.place());
        let decided = smalti_kernels::on_pool(&device, || {
            let mut logits = host::floats(self.predict())?;
            let decided =
                decide_rows(&mut logits, self.model.config.codes(), |image, row| match self.known[image][place] {
                    Some(code) => code,
                    None => {
                        filter(row, &self.sampling);
                        self.draws.token(image, self.done, 0, row) as u32
                    }
                });
            Ok(decided)
        })?;
        for (codes, code) in self.codes.iter_mut().zip(decided) {
            codes[place] = code;
        }
        Ok(())
    }
}

impl Generation for GptGeneration {
    fn steps(&self) -> usize {
        self.codes.first().map_or(0, Vec::len)
    }

    fn done(&self) -> usize {
        self.done
    }

    fn step(&mut self) -> Result<()> {
        if self.done == self.steps() {
            return Ok(());
        }
        let place = self.place();
        if self.known.iter().all(|known| known[place].is_some()) {
            for (codes, known) in self.codes.iter_mut().zip(&self.known) {
                codes[place] = known[place].unwrap_or_default();
            }
        } else {
            self.sample()?;
        }
        self.done += 1;
        Ok(())
    }

    fn codes(&self) -> Codes {
        Codes::Discrete(upload(&self.codes, &self.device))
    }
}
