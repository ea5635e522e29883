//! Residual quantization ("Autoregressive Image Generation using Residual Quantization", arXiv 2203.01941): each place gets
//! several codes, each for what the codes before it left over. Their vectors add up to the latent.
//!
//! Tables learn by moving averages alone. In the official code a table moves after every depth, inside of the forward pass, so
//! that with one table for all depths the deeper codes meet an already moved one. Here no pass changes the module: a training pass
//! moves values of its own, and [`Residual::update`] makes the same moves again.

use super::codebook::{moved, per_row, plain, replaced, smoothed, tally};
use super::{CodebookStats, Pass, Quantized, Quantizer, QuantizerSettings, Stats, UpdateReport, check_parts};
use crate::Codes;
use crate::losses::LossTerm;
use crate::role::Described;
use crate::systems::Facts;
use burn::module::{Module, Param};
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData, activation};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Layout, OneOrEach, Result, Vocabulary, rng::Stream};
use smalti_kernels::nearest_code;
use std::ops::Range;

/// Settings of a [`Residual`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResidualConfig {
    /// Codes of each place.
    pub depth: usize,
    /// Number of codes, or one number for each depth.
    pub codes: Vocabulary,
    /// Channels of the latents.
    pub channels: usize,
    /// Rows and columns of latents that share their codes: such a patch becomes one vector, in the order rows, columns, channels.
    #[serde(default = "unfolded", skip_serializing_if = "is_unfolded")]
    pub fold: [usize; 2],
    /// Whether all depths have one table.
    #[serde(default = "yes")]
    pub shared: bool,
    /// Share of the past kept at each move of a table, or one for each depth.
    #[serde(default = "decay")]
    pub decay: OneOrEach<f64>,
    /// Laplace smoothing of the counts.
    #[serde(default = "epsilon")]
    pub epsilon: f64,
    /// Whether codes that count less than one latent become random latents of the batch.
    #[serde(default = "yes")]
    pub restart: bool,
    /// When tables move.
    #[serde(default)]
    pub update: Moment,
    /// Weight of the commitment term.
    #[serde(default = "quarter")]
    pub beta: f64,
}

fn unfolded() -> [usize; 2] {
    [1, 1]
}

fn is_unfolded(fold: &[usize; 2]) -> bool {
    *fold == unfolded()
}

fn yes() -> bool {
    true
}

fn decay() -> OneOrEach<f64> {
    OneOrEach::One(0.99)
}

fn epsilon() -> f64 {
    1e-5
}

fn quarter() -> f64 {
    0.25
}

/// When a table moves that several depths share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Moment {
    /// After each depth, so that the next one meets the moved table (the official code).
    #[default]
    BetweenDepths,
    /// After the last depth, so that training gives the codes that encoding gives.
    After,
}

const PLACE: &str = "quantizer (residual)";

impl ResidualConfig {
    /// So many codes for each place of one shared table, learnt as in the official code.
    pub fn new(codes: usize, channels: usize, depth: usize) -> Self {
        Self {
            depth,
            codes: codes.into(),
            channels,
            fold: unfolded(),
            shared: true,
            decay: decay(),
            epsilon: epsilon(),
            restart: true,
            update: Moment::default(),
            beta: quarter(),
        }
    }

    /// Channels of the code vectors.
    pub fn width(&self) -> usize {
        self.fold[0] * self.fold[1] * self.channels
    }

    /// Number of codes at one depth.
    pub fn codes_at(&self, depth: usize) -> usize {
        self.codes.of(depth)
    }

    fn check(&self) -> Result<()> {
        let refuse = |problem: String| Err(Error::invalid(PLACE, problem));
        if self.depth == 0 || self.channels == 0 || self.fold.contains(&0) {
            return refuse("depth, channels and both numbers of fold must be at least 1".into());
        }
        let codes = if let Vocabulary::Each(codes) = &self.codes { Some(codes.len()) } else { None };
        for (name, count) in [("codes", codes), ("decay", self.decay.count())] {
            match count {
                Some(count) if count != self.depth => {
                    return refuse(format!("{name} has {count} values for {} depths", self.depth));
                }
                _ => {}
            }
        }
        let depths = || 0..self.depth;
        if let Some(codes) = depths().map(|d| self.codes_at(d)).find(|codes| *codes == 0 || *codes > i32::MAX as usize)
        {
            return refuse(format!("codes is {codes}, expected 1 to {}", i32::MAX));
        }
        let decays = || depths().map(|depth| self.decay_at(depth));
        if let Some(decay) = decays().find(|decay| !(0.0..1.0).contains(decay)) {
            return refuse(format!("decay is {decay}, expected 0 <= decay < 1"));
        }
        if self.shared && depths().any(|d| self.codes_at(d) != self.codes_at(0) || self.decay_at(d) != self.decay_at(0))
        {
            return Err(Error::invalid_hint(
                PLACE,
                "depths that share a table differ in codes or decay",
                "give one number, or set shared = false",
            ));
        }
        if !(self.epsilon > 0.0 && self.epsilon.is_finite()) {
            return refuse(format!("epsilon is {}, expected more than 0", self.epsilon));
        }
        match self.beta.is_finite() && self.beta >= 0.0 {
            true => Ok(()),
            false => refuse(format!("beta is {}, expected 0 or more", self.beta)),
        }
    }

    fn decay_at(&self, depth: usize) -> f64 {
        self.decay.at(depth).copied().unwrap_or_default()
    }

    /// Makes the quantizer. Code vectors are standard normal.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a setting is out of range.
    pub fn init(&self, device: &Device) -> Result<Residual> {
        self.check()?;
        let tables = if self.shared { 1 } else { self.depth };
        let codebook = |depth| {
            let shape = [self.codes_at(depth), self.width()];
            let weight = Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), device);
            Codebook {
                cluster_size: Param::from_tensor(Tensor::zeros([shape[0]], device)).set_require_grad(false),
                embed_avg: Param::from_tensor(weight.clone()).set_require_grad(false),
                weight: Param::from_tensor(weight).set_require_grad(false),
            }
        };
        Ok(Residual { codebooks: (0..tables).map(codebook).collect(), config: self.clone() })
    }
}

impl Described for ResidualConfig {
    const FACTS: Facts = Facts {
        arxiv: "2203.01941",
        tokens: "stack",
        about: "several codes for each place, each coding what those before it left over; learns by moving averages (RQ-VAE)",
    };
}

impl QuantizerSettings for ResidualConfig {
    fn vocabulary(&self) -> Vocabulary {
        self.codes.clone()
    }

    fn channels(&self) -> usize {
        self.channels
    }

    fn layout(&self, h: usize, w: usize) -> Result<Layout> {
        let [rows, columns] = self.fold;
        match rows * columns > 0 && h.is_multiple_of(rows) && w.is_multiple_of(columns) {
            true => Ok(Layout::Stack { h: h / rows, w: w / columns, depth: self.depth }),
            false => {
                let problem = format!("latents are {h}x{w}, which fold = {:?} does not divide", self.fold);
                Err(Error::invalid(PLACE, problem))
            }
        }
    }

    fn official(&self) -> Option<&'static str> {
        Some("rq-vae")
    }
}

/// A table of code vectors that learns by moving averages.
#[derive(Module, Debug)]
pub struct Codebook {
    /// The code vectors, `[codes, width]`.
    pub weight: Param<Tensor<2>>,
    /// Moving count of latents of each code, `[codes]`.
    pub cluster_size: Param<Tensor<1>>,
    /// Moving sum of latents of each code, `[codes, width]`.
    pub embed_avg: Param<Tensor<2>>,
}

/// A [`Codebook`] as values.
#[derive(Clone, Debug)]
struct Table {
    vectors_kc: Tensor<2>,
    counts_k: Tensor<1>,
    sums_kc: Tensor<2>,
}

/// Latents `[n, c]` and a number of codes `k` to `[k, c]`: for each code the vector that it becomes if it is not used.
pub type Replacements<'a> = dyn FnMut(&Tensor<2>, usize) -> Tensor<2> + 'a;

impl Table {
    fn of(codebook: &Codebook) -> Self {
        Self {
            vectors_kc: plain(&codebook.weight),
            counts_k: plain(&codebook.cluster_size),
            sums_kc: plain(&codebook.embed_avg),
        }
    }

    /// The table after one batch, and 1 for each code that was replaced, `[k]`.
    fn moved(
        self,
        CodebookStats { latents_nc, codes_n }: &CodebookStats,
        (decay, epsilon): (f64, f64),
        replacements: Option<&mut Replacements>,
    ) -> (Self, Option<Tensor<1, Int>>) {
        let [k, _] = self.vectors_kc.dims();
        let (counts, sums) = tally(latents_nc, codes_n, k);
        let (mut counts_k, mut sums_kc) = (moved(self.counts_k, counts, decay), moved(self.sums_kc, sums, decay));
        let replaced = replacements.map(|replacements| {
            let rows_kc = replacements(latents_nc, k);
            let unused_k = counts_k.clone().lower_elem(1.0);
            let unused_kc = unused_k.clone().unsqueeze_dim::<2>(1).expand(rows_kc.dims());
            sums_kc = sums_kc.clone().mask_where(unused_kc, rows_kc);
            counts_k = counts_k.clone().mask_fill(unused_k.clone(), 1.0);
            unused_k.int()
        });
        let vectors_kc = per_row(sums_kc.clone(), smoothed(counts_k.clone(), epsilon));
        (Self { vectors_kc, counts_k, sums_kc }, replaced)
    }
}

/// Random latents for the codes that are not used: each in a random order, or if they are fewer than the codes, copies of them
/// with a little noise.
fn drawn(stream: &mut Stream, latents_nc: &Tensor<2>, k: usize) -> Tensor<2> {
    let ([n, c], device) = (latents_nc.dims(), latents_nc.device());
    let copies = if n < k { k.div_ceil(n) } else { 1 };
    let order = stream.permutation(copies * n);
    let rows: Vec<i32> = order[..k].iter().map(|row| (row % n) as i32).collect();
    let rows_kc = latents_nc.clone().select(0, Tensor::from_data(rows.as_slice(), &device));
    if copies == 1 {
        return rows_kc;
    }
    let scale = 0.01 / (c as f32).sqrt();
    let noise: Vec<f32> = (0..k * c).map(|_| stream.uniform() * scale).collect();
    rows_kc + Tensor::from_data(TensorData::new(noise, [k, c]), &device)
}

/// Residual quantization. Codes are in raster order, those of one place in the order of depth.
#[derive(Module, Debug)]
pub struct Residual {
    /// One for each depth, or one for all.
    pub codebooks: Vec<Codebook>,
    /// The settings.
    #[module(skip)]
    pub config: ResidualConfig,
}

/// What quantizing gave, without gradient.
struct Passed {
    /// What the codes up to each depth add up to, `[n, c]` each.
    sums: Vec<Tensor<2>>,
    /// What each depth had to code, and its codes.
    parts: Vec<CodebookStats>,
}

impl Passed {
    /// `[n, depth]` as tokens `[b, length]`.
    fn tokens(&self, b: usize) -> Tensor<2, Int> {
        tokens(self.parts.iter().map(|part| part.codes_n.clone()).collect(), b)
    }
}

/// The codes of each depth, `[n]` each, as tokens `[b, length]`.
fn tokens(by_depth: Vec<Tensor<1, Int>>, b: usize) -> Tensor<2, Int> {
    let codes = Tensor::<1, Int>::stack::<2>(by_depth, 1);
    let [n, depth] = codes.dims();
    codes.reshape([b, n * depth / b.max(1)])
}

impl Residual {
    /// The code vectors of one depth, `[codes, width]`.
    pub fn vectors(&self, depth: usize) -> Tensor<2> {
        self.codebooks[self.table(depth)].weight.val().detach()
    }

    /// Which table a depth has.
    fn table(&self, depth: usize) -> usize {
        if self.config.shared { 0 } else { depth }
    }

    /// Latents `[b, channels, h, w]` as rows `[n, width]`, one for each place.
    pub fn rows(&self, latents_bchw: Tensor<4>) -> Tensor<2> {
        let [b, c, h, w] = latents_bchw.dims();
        let [rows, columns] = self.config.fold;
        let split = latents_bchw.reshape([b, c, h / rows, rows, w / columns, columns]);
        split.permute([0, 2, 4, 3, 5, 1]).reshape([(b * h * w) / (rows * columns), self.config.width()])
    }

    /// Rows `[n, width]` of a grid of `h` by `w` places as latents `[b, channels, ..]`.
    fn latents(&self, rows_nc: Tensor<2>, h: usize, w: usize) -> Tensor<4> {
        let ([rows, columns], c) = (self.config.fold, self.config.channels);
        let b = rows_nc.dims()[0] / (h * w).max(1);
        let split = rows_nc.reshape([b, h, w, rows, columns, c]);
        split.permute([0, 5, 1, 3, 2, 4]).reshape([b, c, h * rows, w * columns])
    }

    /// Quantizes rows `[n, width]`; in training a shared table may move between the depths.
    fn pass(&self, rows_nc: Tensor<2>, training: bool, mut replacements: Option<&mut Replacements>) -> Passed {
        let mut tables: Vec<Table> = self.codebooks.iter().map(Table::of).collect();
        let moves = training && self.config.shared && self.config.update == Moment::BetweenDepths;
        let mut rest_nc = rows_nc.inner();
        let mut passed = Passed { sums: Vec::new(), parts: Vec::new() };
        for depth in 0..self.config.depth {
            let table = &mut tables[self.table(depth)];
            let codes_n = nearest_code(rest_nc.clone(), table.vectors_kc.clone());
            let chosen_nc = table.vectors_kc.clone().select(0, codes_n.clone());
            let part = CodebookStats { latents_nc: rest_nc.clone(), codes_n };
            if moves && depth + 1 < self.config.depth {
                let rates = (self.config.decay_at(depth), self.config.epsilon);
                let replacements = replacements.as_mut().map(|replace| &mut **replace as &mut Replacements);
                *table = table.clone().moved(&part, rates, replacements).0;
            }
            passed.parts.push(part);
            rest_nc = rest_nc - chosen_nc.clone();
            passed.sums.push(match passed.sums.last() {
                Some(sum) => sum.clone() + chosen_nc,
                None => chosen_nc,
            });
        }
        passed
    }

    /// The training pass with what unused codes become; without it none is replaced.
    pub fn train_with(&self, latents_bchw: Tensor<4>, replacements: Option<&mut Replacements>) -> Quantized {
        let [b, ..] = latents_bchw.dims();
        let z_nc = self.rows(latents_bchw.clone());
        let passed = self.pass(z_nc.clone(), true, replacements);
        let errors = passed.sums.iter().map(|sum_nc| (z_nc.clone() - sum_nc.clone()).square().mean());
        let loss = errors.reduce(|a, b| a + b).map(|sum| sum.div_scalar(self.config.depth as f64));
        let codes = passed.tokens(b);
        let out_nc = match passed.sums.last() {
            Some(sum_nc) => z_nc.clone() + (sum_nc.clone() - z_nc.detach()),
            None => z_nc,
        };
        let (h, w) = self.grid(&latents_bchw);
        let commitment = |loss| LossTerm::weighted("commitment", loss, self.config.beta);
        Quantized {
            latents_bchw: self.latents(out_nc, h, w),
            codes,
            terms: loss.map(commitment).into_iter().collect(),
            stats: Stats { parts: passed.parts },
        }
    }

    /// Rows and columns of places of latents `[b, channels, h, w]`.
    fn grid(&self, latents_bchw: &Tensor<4>) -> (usize, usize) {
        let ([_, _, h, w], [rows, columns]) = (latents_bchw.dims(), self.config.fold);
        (h / rows, w / columns)
    }

    /// Makes the moves of a training pass, with the same replacements.
    pub fn update_with(&mut self, stats: &Stats, mut replacements: Option<&mut Replacements>) -> UpdateReport {
        let mut revived: Vec<Option<Tensor<1, Int>>> = vec![None; self.codebooks.len()];
        let mut tables: Vec<Table> = self.codebooks.iter().map(Table::of).collect();
        for (depth, part) in stats.parts.iter().enumerate().take(self.config.depth) {
            if part.codes_n.dims() == [0] {
                continue;
            }
            let rates = (self.config.decay_at(depth), self.config.epsilon);
            let replacements = replacements.as_mut().map(|replace| &mut **replace as &mut Replacements);
            let at = self.table(depth);
            (tables[at], revived[at]) = tables[at].clone().moved(part, rates, replacements);
        }
        for (codebook, table) in self.codebooks.iter_mut().zip(tables) {
            *codebook = codebook.clone().with(table);
        }
        let revived: Option<Vec<_>> = revived.into_iter().collect();
        UpdateReport { started: false, revived: revived.map(|all| Tensor::cat(all, 0)) }
    }

    /// What the codes of some depths add up to, `[n, width]`, for tokens `[b, length]`.
    fn sum(&self, codes: Tensor<2, Int>, depths: Range<usize>) -> Tensor<2> {
        let n = codes.shape().num_elements() / self.config.depth;
        let codes = codes.reshape([n, self.config.depth]);
        let chosen = |depth| self.vectors(depth).select(0, codes.clone().narrow(1, depth, 1).squeeze_dim(1));
        let sum = depths.map(chosen).reduce(|a, b| a + b);
        sum.unwrap_or_else(|| Tensor::zeros([n, self.config.width()], &self.vectors(0).device()))
    }

    /// Latents of some depths: what they add to those before them.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there are none of them.
    pub fn decode_depths(&self, codes: Tensor<2, Int>, h: usize, w: usize, depths: Range<usize>) -> Result<Tensor<4>> {
        if depths.is_empty() || depths.end > self.config.depth {
            let problem = format!("depths {depths:?} of {} are none", self.config.depth);
            return Err(Error::invalid(PLACE, problem));
        }
        Ok(self.latents(self.sum(codes, depths), h, w))
    }

    /// The vector of each code, `[b, length, width]` for codes `[b, length]`.
    pub fn embed(&self, codes: Tensor<2, Int>) -> Tensor<3> {
        let ([b, length], depth) = (codes.dims(), self.config.depth);
        let n = b * length / depth;
        let vectors = (0..depth).map(|depth| self.sum(codes.clone(), depth..depth + 1)).collect();
        Tensor::stack::<3>(vectors, 1).reshape([n * depth, self.config.width()]).reshape([
            b,
            length,
            self.config.width(),
        ])
    }

    /// Codes of latents with the distribution `softmax(-distance^2 / temperature)` of each, `[b, length, codes]`. Codes are the
    /// nearest ones, or drawn from the distributions; what is left for the next depth depends on them. Where a depth has fewer codes
    /// than another one, the rest has no probability.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a temperature that is not above 0.
    pub fn soft(
        &self,
        latents_bchw: Tensor<4>,
        temperature: f64,
        mut draw: Option<&mut Stream>,
    ) -> Result<(Tensor<2, Int>, Tensor<3>)> {
        if !(temperature > 0.0 && temperature.is_finite()) {
            return Err(Error::invalid("soft codes", format!("temperature is {temperature}, expected more than 0")));
        }
        let [b, ..] = latents_bchw.dims();
        let mut rest_nc = self.rows(latents_bchw.inner());
        let most = self.config.codes.most();
        let (mut codes, mut distributions) = (Vec::new(), Vec::new());
        for depth in 0..self.config.depth {
            let vectors_kc = self.vectors(depth).inner();
            let ([n, _], [k, _]) = (rest_nc.dims(), vectors_kc.dims());
            let products_nk = rest_nc.clone().matmul(vectors_kc.clone().transpose());
            let squares_1k = vectors_kc.clone().square().sum_dim(1).reshape([1, k]);
            let nearness_nk = (products_nk.mul_scalar(2.0) - squares_1k).div_scalar(temperature);
            let shares_nk = activation::softmax(nearness_nk, 1);
            let codes_n = match draw.as_deref_mut() {
                Some(stream) => drawn_from(&shares_nk, stream),
                None => nearest_code(rest_nc.clone(), vectors_kc.clone()),
            };
            rest_nc = rest_nc - vectors_kc.select(0, codes_n.clone());
            distributions.push(match most - k {
                0 => shares_nk,
                missing => Tensor::cat(vec![shares_nk, Tensor::zeros([n, missing], &rest_nc.device())], 1),
            });
            codes.push(codes_n);
        }
        let shares = Tensor::stack::<3>(distributions, 1);
        let codes = tokens(codes, b);
        let [_, length] = codes.dims();
        Ok((codes, shares.reshape([b, length, most])))
    }
}

impl Codebook {
    fn with(self, table: Table) -> Self {
        Self {
            weight: replaced(self.weight, table.vectors_kc),
            cluster_size: replaced(self.cluster_size, table.counts_k),
            embed_avg: replaced(self.embed_avg, table.sums_kc),
        }
    }
}

/// An index for each row of probabilities `[n, k]`, with one uniform number of the host for each.
fn drawn_from(shares_nk: &Tensor<2>, stream: &mut Stream) -> Tensor<1, Int> {
    let [n, k] = shares_nk.dims();
    let uniform: Vec<f32> = (0..n).map(|_| stream.uniform()).collect();
    let uniform = Tensor::<2>::from_data(TensorData::new(uniform, [n, 1]), &shares_nk.device());
    let cumulative = shares_nk.clone().cumsum(1);
    let target = uniform * cumulative.clone().narrow(1, k - 1, 1);
    let below = cumulative.lower_equal(target.expand([n, k]));
    below.int().sum_dim(1).squeeze_dim::<1>(1).clamp_max(k as i64 - 1)
}

impl Quantizer for Residual {
    fn vocabulary(&self) -> Vocabulary {
        self.config.vocabulary()
    }

    fn channels(&self) -> usize {
        self.config.channels
    }

    fn encode(&self, latents_bchw: Tensor<4>) -> Tensor<2, Int> {
        let [b, ..] = latents_bchw.dims();
        self.pass(self.rows(latents_bchw), false, None).tokens(b)
    }

    fn decode(&self, codes: Tensor<2, Int>, h: usize, w: usize) -> Tensor<4> {
        self.latents(self.sum(codes, 0..self.config.depth), h, w)
    }

    fn decode_prefix(&self, codes: Tensor<2, Int>, h: usize, w: usize, parts: usize) -> Result<Tensor<4>> {
        check_parts(parts, self.config.depth)?;
        self.decode_depths(codes, h, w, 0..parts)
    }

    fn soft_codes(&self, latents_bchw: Tensor<4>, temperature: f64, draw: Option<&mut Stream>) -> Result<Codes> {
        let (codes, probabilities_blv) = self.soft(latents_bchw, temperature, draw)?;
        Ok(Codes::Soft { codes, probabilities_blv })
    }

    /// Without a stream no code is replaced within the pass.
    fn train_forward(&self, latents_bchw: Tensor<4>, pass: &Pass) -> Quantized {
        match pass.stream.clone().filter(|_| self.config.restart) {
            Some(mut stream) => {
                self.train_with(latents_bchw, Some(&mut |latents_nc, k| drawn(&mut stream, latents_nc, k)))
            }
            None => self.train_with(latents_bchw, None),
        }
    }

    fn update(&mut self, stats: &Stats, _: u64, stream: &mut Stream) -> UpdateReport {
        match self.config.restart {
            true => self.update_with(stats, Some(&mut |latents_nc, k| drawn(stream, latents_nc, k))),
            false => self.update_with(stats, None),
        }
    }
}
