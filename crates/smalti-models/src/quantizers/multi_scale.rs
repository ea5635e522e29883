//! Multi-scale residual quantization ("Visual Autoregressive Modeling", arXiv 2404.02905): latents become token maps of growing
//! size, each of which codes what the coarser ones left over, with one table for all.
//!
//! A map is enlarged to the size of the latents and refined by a convolution; the sum over maps stands for the latents. The
//! public code of VAR only has the arithmetic: the loss here is that of its forward pass, by which no one could train.

use super::vq::{Estimator, Learning, Metric};
use super::{
    Pass, Quantized, Quantizer, QuantizerSettings, Stats, UpdateReport, Vq, VqConfig, check_parts, from_rows, to_rows,
};
use crate::losses::LossTerm;
use crate::role::Described;
use crate::systems::Facts;
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Layout, Result, Vocabulary, rng::Stream};
use smalti_kernels::nearest_code;
use smalti_nn::{Conv, Interpolation, Resize};

/// Settings of a [`MultiScale`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MultiScaleConfig {
    /// Rows and columns of each token map, coarse to fine; the last has the size of the latents.
    pub levels: Vec<(usize, usize)>,
    /// The codes, and how they learn. With the cosine metric only comparisons are by angle: codes keep their lengths.
    pub table: VqConfig,
    /// The convolutions after enlarging.
    #[serde(default)]
    pub refinement: Refinement,
}

/// What is done to an enlarged map `h`: `(1 - weight) h + weight conv(h)`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Refinement {
    /// Weight of the convolution, 0..=1; 0 leaves it out.
    pub weight: f64,
    /// Number of convolutions. Levels share them, each taking the one nearest to its place between coarse and fine.
    pub convolutions: usize,
}

impl Default for Refinement {
    fn default() -> Self {
        Self { weight: 0.5, convolutions: 4 }
    }
}

impl Refinement {
    /// The places of the convolutions between 0, the coarsest level, and 1, the finest.
    pub fn ticks(&self) -> Vec<f64> {
        let n = self.convolutions;
        // The official code sets four convolutions apart by another rule.
        let spacing = if n == 4 { 1.0 / 3.0 } else { 1.0 / 2.0 };
        let (first, last) = (spacing / n as f64, 1.0 - spacing / n as f64);
        let step = (last - first) / (n.max(2) - 1) as f64;
        (0..n).map(|i| if i > 0 && i + 1 == n { last } else { first + step * i as f64 }).collect()
    }

    /// The convolution of each of so many levels. In double precision, whose rounding decides ties as in the official code.
    pub fn choice(&self, levels: usize) -> Vec<usize> {
        let ticks = self.ticks();
        let nearest = |level: usize| {
            let at = level as f64 / levels.saturating_sub(1).max(1) as f64;
            let distance = |i: &usize| (ticks[*i] - at).abs();
            (0..ticks.len()).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(0)
        };
        (0..levels).map(nearest).collect()
    }
}

impl Described for MultiScaleConfig {
    const FACTS: Facts = Facts {
        arxiv: "2404.02905",
        tokens: "pyramid",
        about: "token maps of growing size, each coding what the coarser ones left over (VAR)",
    };
}

impl MultiScaleConfig {
    fn check(&self) -> Result<()> {
        let problem = |problem: String| Err(Error::invalid("quantizer (multi_scale)", problem));
        let grows = self.levels.is_sorted_by(|a, b| a.0 <= b.0 && a.1 <= b.1);
        if self.levels.is_empty() || !grows || self.levels[0].0 == 0 || self.levels[0].1 == 0 {
            return problem(format!("levels are {:?}, expected sizes of at least 1 that do not shrink", self.levels));
        }
        let Refinement { weight, convolutions } = self.refinement;
        if !(0.0..=1.0).contains(&weight) || convolutions == 0 {
            return problem(format!(
                "refinement has weight {weight} and {convolutions} convolutions, expected 0..=1 and at least 1"
            ));
        }
        let VqConfig { projected, depth, metric, codebook, gradient, kmeans_init, remap, .. } = &self.table;
        let by_angle = *metric != Metric::Euclidean;
        let refused = match () {
            () if projected.is_some() => "projected",
            () if *depth != 1 => "a depth",
            () if remap.is_some() => "remap",
            () if *gradient != Estimator::StraightThrough => "the gradient of rotation",
            () if *metric == Metric::CosineRaw => "the metric cosine_raw",
            () if by_angle && matches!(codebook, Learning::Ema { .. }) => "the cosine metric with moving averages",
            () if by_angle && kmeans_init.is_some() => "the cosine metric with a k-means start",
            () => return Ok(()),
        };
        Err(Error::unsupported(format!("{refused} in a multi-scale quantizer"), "leave it out of `table`"))
    }

    /// Makes the quantizer.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Unsupported`] if a setting is out of range.
    pub fn init(&self, device: &Device) -> Result<MultiScale> {
        self.check()?;
        let channels = self.table.channels;
        let sizes: Vec<[usize; 2]> = self.levels.iter().map(|(h, w)| [*h, *w]).collect();
        let latents = sizes[sizes.len() - 1];
        let convolutions = if self.refinement.weight > 0.0 { self.refinement.convolutions } else { 0 };
        Ok(MultiScale {
            table: self.table.init(device)?,
            phi: (0..convolutions).map(|_| Conv::new(channels, channels, 3, device)).collect(),
            choice: self.refinement.choice(sizes.len()),
            shrink: sizes.iter().map(|size| Resize::new(Interpolation::Area, latents, *size, device)).collect(),
            enlarge: sizes.iter().map(|size| Resize::new(Interpolation::Bicubic, *size, latents, device)).collect(),
            config: self.clone(),
        })
    }

    /// Whether codes mean the same latents, given the same weights.
    pub(crate) fn decodes_as(&self, other: &Self) -> bool {
        let facts = |config: &Self| (config.levels.clone(), config.table.codes, config.table.channels);
        facts(self) == facts(other) && self.refinement == other.refinement
    }
}

impl QuantizerSettings for MultiScaleConfig {
    fn vocabulary(&self) -> Vocabulary {
        self.table.codes.into()
    }

    fn channels(&self) -> usize {
        self.table.channels
    }

    fn layout(&self, h: usize, w: usize) -> Result<Layout> {
        match self.levels.last() == Some(&(h, w)) {
            true => Ok(Layout::Pyramid { levels: self.levels.clone() }),
            false => {
                let problem = format!("latents are {h}x{w}, but the last of the levels {:?} is not", self.levels);
                Err(Error::invalid("quantizer (multi_scale)", problem))
            }
        }
    }

    fn official(&self) -> Option<&'static str> {
        Some("var")
    }
}

/// Multi-scale residual quantization. Codes are in the order of the levels, each level in raster order.
#[derive(Module, Debug)]
pub struct MultiScale {
    /// The codes.
    pub table: Vq,
    /// The convolutions after enlarging, 3x3.
    pub phi: Vec<Conv>,
    #[module(skip)]
    choice: Vec<usize>,
    shrink: Vec<Resize>,
    enlarge: Vec<Resize>,
    /// The settings.
    #[module(skip)]
    pub config: MultiScaleConfig,
}

impl MultiScale {
    /// The code vectors, `[codes, c]`.
    pub fn vectors(&self) -> Tensor<2> {
        self.table.raw_table()
    }

    /// The code whose vector is the shortest.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the device cannot be read.
    pub(crate) fn nearest_to_nothing(&self) -> Result<u32> {
        let vectors = self.vectors();
        let zero = Tensor::zeros([1, self.channels()], &vectors.device());
        let code = nearest_code(zero, vectors).into_data().iter::<u32>().next();
        code.ok_or_else(|| Error::invalid("quantizer (multi_scale)", "the device returned no code"))
    }

    /// Number of levels.
    pub fn levels(&self) -> usize {
        self.config.levels.len()
    }

    /// Latents `[b, c, h, w]` at the size of a level.
    pub fn shrunk(&self, latents_bchw: Tensor<4>, level: usize) -> Tensor<4> {
        self.shrink[level].forward(latents_bchw)
    }

    /// What a map of code vectors `[b, c, h_k, w_k]` adds to the latents `[b, c, h, w]`.
    pub fn contribution(&self, map_bchw: Tensor<4>, level: usize) -> Tensor<4> {
        let enlarged = self.enlarge[level].forward(map_bchw);
        match self.phi.get(self.choice[level]) {
            Some(phi) => {
                let weight = self.config.refinement.weight;
                phi.forward(enlarged.clone()) * weight + enlarged * (1.0 - weight)
            }
            None => enlarged,
        }
    }

    /// The code vectors of one level's codes `[b, h_k * w_k]` as a map `[b, c, h_k, w_k]`.
    pub fn map_of(&self, codes: Tensor<2, Int>, level: usize) -> Tensor<4> {
        let [b, n] = codes.dims();
        self.map_of_rows(self.vectors().select(0, codes.reshape([b * n])), b, level)
    }

    /// Rows `[b * h_k * w_k, c]` as a map `[b, c, h_k, w_k]`.
    pub fn map_of_rows(&self, rows_nc: Tensor<2>, b: usize, level: usize) -> Tensor<4> {
        let (h, w) = self.config.levels[level];
        from_rows(rows_nc, b, h, w)
    }

    /// The sum over the levels up to each one, `[b, c, h, w]` each, of codes `[b, length]`.
    pub fn sums(&self, codes: Tensor<2, Int>) -> Vec<Tensor<4>> {
        self.first_sums(codes, self.levels())
    }

    /// [`Self::sums`] of the first levels.
    fn first_sums(&self, codes: Tensor<2, Int>, count: usize) -> Vec<Tensor<4>> {
        let mut start = 0;
        let mut sums: Vec<Tensor<4>> = Vec::with_capacity(count);
        for (level, (h, w)) in self.config.levels.iter().enumerate().take(count) {
            let added = self.contribution(self.map_of(codes.clone().narrow(1, start, h * w), level), level);
            sums.push(match sums.last() {
                Some(sum) => sum.clone() + added,
                None => added,
            });
            start += h * w;
        }
        sums
    }

    /// What is known before each level but the first: the sum of the coarser levels at its size, `[b, length - n_0, c]` for
    /// codes `[b, length]`, where `n_0` are the codes of the first level.
    pub fn known_before(&self, codes: Tensor<2, Int>) -> Option<Tensor<3>> {
        let sums = self.sums(codes);
        let rows = sums.into_iter().zip(1..self.levels()).map(|(sum, level)| tokens(self.shrunk(sum, level)));
        let rows: Vec<Tensor<3>> = rows.collect();
        (!rows.is_empty()).then(|| Tensor::cat(rows, 1))
    }

    /// The rest at a level's size as rows `[n, c]`, and their codes `[n]`; without gradient.
    fn nearest(&self, rest_bchw: Tensor<4>, level: usize) -> (Tensor<2>, Tensor<1, Int>) {
        let rows_nc = to_rows(self.shrunk(rest_bchw, level));
        let table_kc = self.table.table().inner();
        (rows_nc.clone(), nearest_code(self.table.compared(rows_nc), table_kc))
    }

    /// The same quantizer with the weights of another one, without what that needs to learn. They are on the plain device.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the two do not have the same levels, codes, channels and refinement.
    pub fn with_weights_of(self, other: &Self) -> Result<Self> {
        if !self.config.decodes_as(&other.config) {
            let describe = |config: &MultiScaleConfig| {
                let MultiScaleConfig { levels, table, refinement } = config;
                format!("levels {levels:?}, {} codes of {} channels, {refinement:?}", table.codes, table.channels)
            };
            return Err(Error::Mismatch {
                what: "two multi-scale quantizers".into(),
                left_name: "model".into(),
                left: describe(&self.config),
                right_name: "tokenizer".into(),
                right: describe(&other.config),
                hint: None,
            });
        }
        let Self { table: Vq { embedding, .. }, phi, .. } = other.valid();
        Ok(Self { table: Vq { embedding, ..self.table }, phi, ..self })
    }
}

/// Latents `[b, c, h, w]` as tokens `[b, h * w, c]`.
pub(crate) fn tokens(latents_bchw: Tensor<4>) -> Tensor<3> {
    let [b, c, h, w] = latents_bchw.dims();
    latents_bchw.reshape([b, c, h * w]).swap_dims(1, 2)
}

impl Quantizer for MultiScale {
    fn vocabulary(&self) -> Vocabulary {
        self.config.vocabulary()
    }

    fn channels(&self) -> usize {
        self.table.config.channels
    }

    fn encode(&self, latents_bchw: Tensor<4>) -> Tensor<2, Int> {
        let mut rest = latents_bchw.inner();
        let [b, ..] = rest.dims();
        let mut all = Vec::with_capacity(self.levels());
        for level in 0..self.levels() {
            let (_, codes_n) = self.nearest(rest.clone(), level);
            let [n] = codes_n.dims();
            let codes = codes_n.reshape([b, n / b]);
            if level + 1 < self.levels() {
                rest = rest - self.contribution(self.map_of(codes.clone(), level), level).inner();
            }
            all.push(codes);
        }
        Tensor::cat(all, 1)
    }

    fn decode(&self, codes: Tensor<2, Int>, h: usize, w: usize) -> Tensor<4> {
        let [b, _] = codes.dims();
        let nothing = || Tensor::zeros([b, self.channels(), h, w], &self.table.embedding.weight.val().device());
        self.sums(codes).pop().unwrap_or_else(nothing)
    }

    fn decode_prefix(&self, codes: Tensor<2, Int>, h: usize, w: usize, parts: usize) -> Result<Tensor<4>> {
        check_parts(parts, self.levels())?;
        let [b, _] = codes.dims();
        let nothing = || Tensor::zeros([b, self.channels(), h, w], &self.table.embedding.weight.val().device());
        Ok(self.first_sums(codes, parts).pop().unwrap_or_else(nothing))
    }

    fn update(&mut self, stats: &Stats, step: u64, stream: &mut Stream) -> UpdateReport {
        self.table.apply(stats, step, stream)
    }

    /// The loss is the mean over levels of `beta mean((sg s_k - f)^2) + mean((s_k - sg f)^2)` with the sum `s_k` of the levels
    /// up to `k`: through it the convolutions learn, and a table that learns by gradient.
    fn train_forward(&self, latents_bchw: Tensor<4>, _: &Pass) -> Quantized {
        let [b, ..] = latents_bchw.dims();
        let target = latents_bchw.clone().detach();
        let mut rest = latents_bchw.clone().inner();
        let (mut sum, mut loss): (Option<Tensor<4>>, Option<Tensor<1>>) = (None, None);
        let (mut latents, mut codes) = (Vec::new(), Vec::new());
        let (on_latents, on_codes) = match self.table.config.codebook {
            Learning::Gradient { legacy: true } => (1.0, self.table.config.beta),
            _ => (self.table.config.beta, 1.0),
        };
        for level in 0..self.levels() {
            let (rows_nc, codes_n) = self.nearest(rest.clone(), level);
            let chosen = self.vectors().select(0, codes_n.clone());
            let added = self.contribution(self.map_of_rows(chosen, b, level), level);
            rest = rest - added.clone().inner();
            let reached = sum.map_or(added.clone(), |sum| sum + added);
            let commitment = (reached.clone().detach() - latents_bchw.clone()).square().mean();
            let codebook = (reached.clone() - target.clone()).square().mean();
            let both = commitment.mul_scalar(on_latents) + codebook.mul_scalar(on_codes);
            loss = Some(loss.map_or(both.clone(), |loss| loss + both));
            sum = Some(reached);
            latents.push(rows_nc);
            codes.push(codes_n);
        }
        let by_level = codes.iter().map(|codes_n| codes_n.clone().reshape([b as i32, -1]));
        Quantized {
            latents_bchw: sum.map_or(target.clone(), |sum| latents_bchw + (sum - target).detach()),
            codes: Tensor::cat(by_level.collect(), 1),
            terms: loss
                .map(|loss| LossTerm::new("codebook", loss.div_scalar(self.levels() as f64)))
                .into_iter()
                .collect(),
            stats: Stats::one(Tensor::cat(latents, 0), Tensor::cat(codes, 0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Refinement;

    /// The official tables; with four convolutions and ten levels two exact ties are decided by rounding.
    #[test]
    fn levels_share_convolutions_as_in_the_official_code() {
        let choice = |convolutions, levels| Refinement { convolutions, ..Default::default() }.choice(levels);
        assert_eq!(choice(4, 10), [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]);
        assert_eq!(choice(4, 3), [0, 2, 3]);
        assert_eq!(choice(4, 4), [0, 1, 2, 3]);
        assert_eq!(choice(4, 5), [0, 1, 2, 2, 3]);
        assert_eq!(choice(4, 7), [0, 0, 1, 2, 2, 3, 3]);
        assert_eq!(choice(4, 14), [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]);
        assert_eq!(choice(1, 3), [0, 0, 0]);
        assert_eq!(choice(5, 5), [0, 1, 2, 3, 4]);
        assert_eq!(choice(4, 1), [0]);
    }
}
