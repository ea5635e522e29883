//! Vector quantization: each latent becomes the nearest row of a table ("Neural Discrete Representation Learning",
//! arXiv 1711.00937), with the variants of VQGAN (arXiv 2012.09841), ViT-VQGAN (arXiv 2110.04627) and the rotation trick
//! (arXiv 2410.06424). What changes the table outside the gradient is in [`codebook`](super::codebook).

use super::{
    CodebookStats, Pass, Quantized, Quantizer, QuantizerSettings, Remap, RemapConfig, Stats, UpdateReport, check_parts,
    from_rows, to_rows,
};
use crate::losses::LossTerm;
use crate::role::Described;
use crate::systems::Facts;
use burn::module::{Module, Param};
use burn::nn::Embedding;
use burn::tensor::{Device, Distribution, Int, Tensor};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Layout, Result, Vocabulary, rng::Stream};
use smalti_kernels::nearest_code;
use smalti_nn::{dense::Dense, init::Init};

/// Settings of a [`Vq`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VqConfig {
    /// Number of codes.
    pub codes: usize,
    /// Channels of the latents.
    pub channels: usize,
    /// Channels of the code vectors if not those of the latents: two linear layers lead there and back (ViT-VQGAN's
    /// factorised codes).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub projected: Option<usize>,
    /// Codes of each place: the table is read so many times, each time for what the codes before left over, and their vectors add
    /// up (the residual option of ViT-VQGAN's public code).
    #[serde(default = "once", skip_serializing_if = "is_once")]
    pub depth: usize,
    /// What "nearest" means.
    #[serde(default)]
    pub metric: Metric,
    /// How the table learns.
    #[serde(default)]
    pub codebook: Learning,
    /// Weight of the commitment term.
    #[serde(default = "quarter")]
    pub beta: f64,
    /// How the gradient passes the table.
    #[serde(default)]
    pub gradient: Estimator,
    /// Start the table from the first batch, with so many rounds of k-means.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kmeans_init: Option<usize>,
    /// Replace codes that are hardly used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revive: Option<Revive>,
    /// Keep numbers only for some of the codes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remap: Option<RemapConfig>,
}

fn once() -> usize {
    1
}

fn is_once(depth: &usize) -> bool {
    *depth == 1
}

fn quarter() -> f64 {
    0.25
}

/// What "nearest" means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Least distance.
    #[default]
    Euclidean,
    /// Least angle. Latents and codes are scaled to unit length first; the unit code comes out.
    Cosine,
    /// As `cosine`, but the straight-through gradient skips the scaling of the latents (ViT-VQGAN's public code).
    CosineRaw,
}

/// How the table learns.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Learning {
    /// By gradient: `mean((sg q - z)^2)` weighted with beta, plus `mean((q - sg z)^2)`.
    Gradient {
        /// Put beta on the other term, as the released VQGAN models were trained.
        #[serde(default)]
        legacy: bool,
    },
    /// By moving averages of the latents of each code; the loss is `beta * mean((sg q - z)^2)`.
    Ema {
        /// Share of the past kept at each step.
        #[serde(default = "decay")]
        decay: f64,
        /// Laplace smoothing of the counts.
        #[serde(default = "epsilon")]
        epsilon: f64,
        /// Whose arithmetic.
        #[serde(default)]
        dialect: EmaDialect,
    },
}

fn decay() -> f64 {
    0.99
}

fn epsilon() -> f64 {
    1e-5
}

impl Default for Learning {
    fn default() -> Self {
        Self::Gradient { legacy: false }
    }
}

/// Whose arithmetic moving averages follow. With decay g, batch counts n and sums s, smoothing
/// `smooth(N) = (N + eps) / (sum N + codes * eps) * sum N`, and code = sums / smooth(counts).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EmaDialect {
    /// Counts start at 1 and sums at the codes, so an unused code stays where it is (vector-quantize-pytorch).
    #[default]
    Counting,
    /// Counts start at 0 and sums at the codes (taming, RQ-VAE, the common VQ-VAE-2 code): a code that the first batch does not
    /// use moves far away and needs revival.
    Empty,
    /// As `empty`, and the smoothed counts are stored, so that smoothing compounds (a common PyTorch VQ-VAE).
    Compounding,
    /// Counts and sums start at 0 and are divided by `1 - g^t` (Sonnet, Haiku).
    Sonnet,
}

/// How the gradient passes the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Estimator {
    /// The identity.
    #[default]
    StraightThrough,
    /// The rotation and scaling that takes the latent to its code, held constant.
    Rotation,
}

/// When a code counts as dead. It then becomes a random latent of the batch, and its averages start afresh.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revive {
    /// A code is dead if its moving count is lower.
    pub threshold: f64,
    /// What the threshold is measured in.
    #[serde(default)]
    pub unit: ReviveUnit,
    /// Look for dead codes every so many steps.
    #[serde(default = "one")]
    pub every: u64,
}

fn one() -> u64 {
    1
}

/// What a revival threshold is measured in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReviveUnit {
    /// The mean count over all codes, so the threshold suits any batch and table. A revived code starts at the mean.
    #[default]
    Mean,
    /// Latents of one batch. A revived code starts at the threshold.
    Latents,
}

impl Described for VqConfig {
    const FACTS: Facts = Facts {
        arxiv: "1711.00937",
        tokens: "grid, stack",
        about: "learned codebook: by gradient or moving averages, l2 or cosine, k-means start, dead codes revived, several codes a place",
    };
}

impl VqConfig {
    /// A table of `codes` vectors for latents of `channels` channels, learnt by gradient, with no extras.
    pub fn new(codes: usize, channels: usize) -> Self {
        Self {
            codes,
            channels,
            projected: None,
            depth: 1,
            metric: Metric::default(),
            codebook: Learning::default(),
            beta: quarter(),
            gradient: Estimator::default(),
            kmeans_init: None,
            revive: None,
            remap: None,
        }
    }

    fn check(&self) -> Result<()> {
        let problem = |problem: String| Err(Error::invalid("quantizer", problem));
        if self.codes == 0 || self.codes > i32::MAX as usize {
            return problem(format!("codes is {}, expected 1 to {}", self.codes, i32::MAX));
        }
        if self.channels == 0 || self.projected == Some(0) || self.depth == 0 {
            return problem("channels, projected and depth must be at least 1".into());
        }
        self.check_depth()?;
        if !(self.beta.is_finite() && self.beta >= 0.0) {
            return problem(format!("beta is {}, expected 0 or more", self.beta));
        }
        if let Learning::Ema { decay, epsilon, .. } = self.codebook
            && !((0.0..1.0).contains(&decay) && epsilon > 0.0)
        {
            return problem(format!(
                "decay is {decay}, expected 0 <= decay < 1; epsilon is {epsilon}, expected more than 0"
            ));
        }
        match self.revive {
            Some(Revive { threshold, every, .. }) if !(threshold > 0.0 && every > 0) => {
                problem(format!("revive: threshold is {threshold} and every is {every}, expected more than 0"))
            }
            _ => Ok(()),
        }
    }

    /// What moves a table outside the gradient is for tables that are read once.
    fn check_depth(&self) -> Result<()> {
        let refused = match () {
            () if self.depth == 1 => return Ok(()),
            () if matches!(self.codebook, Learning::Ema { .. }) => "moving averages",
            () if self.kmeans_init.is_some() => "kmeans_init",
            () if self.revive.is_some() => "revive",
            () if self.gradient != Estimator::StraightThrough => "the gradient of rotation",
            () => return Ok(()),
        };
        let hint = "leave it out, or use the quantizer `residual`, whose tables learn by moving averages";
        Err(Error::unsupported(format!("{refused} in a quantizer `vq` with depth = {}", self.depth), hint))
    }

    /// Makes the quantizer. Codes are uniform in `-1/codes..1/codes`, or random unit vectors for the cosine metrics.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a setting is out of range.
    pub fn init(&self, device: &Device) -> Result<Vq> {
        self.check()?;
        let (k, c) = (self.codes, self.projected.unwrap_or(self.channels));
        let table_kc = match self.metric {
            Metric::Euclidean => {
                let bound = 1.0 / k as f64;
                Tensor::random([k, c], Distribution::Uniform(-bound, bound), device)
            }
            Metric::Cosine | Metric::CosineRaw => {
                unit_rows(Tensor::random([k, c], Distribution::Normal(0.0, 1.0), device))
            }
        };
        let buffer = |tensor: Tensor<1>| Param::from_tensor(tensor).set_require_grad(false);
        let (ema, dialect) = match self.codebook {
            Learning::Ema { dialect, .. } => (true, Some(dialect)),
            Learning::Gradient { .. } => (false, None),
        };
        let first_count = if dialect.is_none_or(|d| d == EmaDialect::Counting) { 1.0 } else { 0.0 };
        let first_sum = if dialect == Some(EmaDialect::Sonnet) { 0.0 } else { 1.0 };
        Ok(Vq {
            cluster_size: (ema || self.revive.is_some()).then(|| buffer(Tensor::full([k], first_count, device))),
            embed_avg: ema.then(|| Param::from_tensor(table_kc.clone().mul_scalar(first_sum)).set_require_grad(false)),
            updates: (dialect == Some(EmaDialect::Sonnet)).then(|| buffer(Tensor::zeros([1], device))),
            started: self.kmeans_init.map(|_| buffer(Tensor::zeros([1], device))),
            embedding: Embedding { weight: Param::from_tensor(table_kc).set_require_grad(!ema) },
            project_in: self.projected.map(|c| dense(self.channels, c, device)),
            project_out: self.projected.map(|c| dense(c, self.channels, device)),
            start_known: false,
            remap: self.remap.as_ref().map(|remap| remap.init(k, device)).transpose()?,
            config: self.clone(),
        })
    }
}

impl QuantizerSettings for VqConfig {
    /// That of the codes, or of those that have a number.
    fn vocabulary(&self) -> Vocabulary {
        self.remap.as_ref().map_or(self.codes, RemapConfig::vocabulary).into()
    }

    fn channels(&self) -> usize {
        self.channels
    }

    fn layout(&self, h: usize, w: usize) -> Result<Layout> {
        Ok(match self.depth {
            1 => Layout::Grid { h, w },
            depth => Layout::Stack { h, w, depth },
        })
    }

    fn official(&self) -> Option<&'static str> {
        Some("vqgan")
    }
}

/// A map with PyTorch's first values.
pub(super) fn dense(inputs: usize, outputs: usize, device: &Device) -> Dense {
    let init = Init::Uniform(1.0 / (inputs as f64).sqrt());
    Dense { bias: Some(init.param([outputs], device)), ..Dense::without_bias(inputs, outputs, init, device) }
}

/// Vector quantization.
#[derive(Module, Debug)]
pub struct Vq {
    /// The codes, `weight [codes, c]`.
    pub embedding: Embedding,
    /// Latents to the space of the codes.
    pub project_in: Option<Dense>,
    /// Codes to the space of the latents.
    pub project_out: Option<Dense>,
    /// Moving count of latents of each code, `[codes]`; there with EMA or revival.
    pub cluster_size: Option<Param<Tensor<1>>>,
    /// Moving sum of latents of each code, `[codes, c]`; there with EMA.
    pub embed_avg: Option<Param<Tensor<2>>>,
    /// Number of updates, `[1]`; there in the Sonnet dialect.
    pub updates: Option<Param<Tensor<1>>>,
    /// `[1]`: 1 after the k-means start; there if one is asked for.
    pub started: Option<Param<Tensor<1>>>,
    /// Codes to tokens, if not all codes have a number.
    pub remap: Option<Remap>,
    /// Whether `started` is known to be 1, so that it need not be read from the device again.
    pub(super) start_known: bool,
    /// The settings.
    #[module(skip)]
    pub config: VqConfig,
}

impl Vq {
    /// The codes as they are compared and returned, `[codes, c]`; scaled to unit length for the cosine metrics.
    pub fn table(&self) -> Tensor<2> {
        self.compared(self.raw_table())
    }

    /// The codes as they are kept, `[codes, c]`.
    pub(super) fn raw_table(&self) -> Tensor<2> {
        let table_kc = self.embedding.weight.val();
        match self.config.codebook {
            Learning::Gradient { .. } => table_kc,
            Learning::Ema { .. } => table_kc.detach(),
        }
    }

    /// Rows as the metric compares them.
    pub(super) fn compared(&self, rows_nc: Tensor<2>) -> Tensor<2> {
        match self.config.metric {
            Metric::Euclidean => rows_nc,
            Metric::Cosine | Metric::CosineRaw => unit_rows(rows_nc),
        }
    }

    fn projected(&self, latents_bchw: Tensor<4>) -> Tensor<2> {
        let rows_nc = to_rows(latents_bchw);
        match &self.project_in {
            Some(linear) => linear.forward(rows_nc),
            None => rows_nc,
        }
    }

    fn back(&self, rows_nc: Tensor<2>, b: usize, h: usize, w: usize) -> Tensor<4> {
        let rows_nc = match &self.project_out {
            Some(linear) => linear.forward(rows_nc),
            None => rows_nc,
        };
        from_rows(rows_nc, b, h, w)
    }

    /// Codes of the table, a tensor `[n]` for each depth, as tokens `[b, length]`.
    fn tokens(&self, by_depth: Vec<Tensor<1, Int>>, b: usize) -> Tensor<2, Int> {
        let codes_nd = Tensor::stack::<2>(by_depth, 1);
        let length = codes_nd.shape().num_elements() / b.max(1);
        let codes_n = codes_nd.flatten(0, 1);
        let tokens_n = match &self.remap {
            Some(remap) => remap.tokens(codes_n),
            None => codes_n,
        };
        tokens_n.reshape([b, length])
    }

    /// The vectors of tokens `[b, length]`, those of the first `parts` depths added up, `[n, c]`.
    fn sum(&self, tokens: Tensor<2, Int>, parts: usize) -> Tensor<2> {
        let n = tokens.shape().num_elements() / self.config.depth;
        let tokens_n = tokens.reshape([n, self.config.depth]).narrow(1, 0, parts).flatten(0, 1);
        let codes_n = match &self.remap {
            Some(remap) => remap.codes(tokens_n),
            None => tokens_n,
        };
        let vectors_nc = self.table().select(0, codes_n);
        match parts {
            1 => vectors_nc,
            _ => {
                let [_, c] = vectors_nc.dims();
                vectors_nc.reshape([n, parts, c]).sum_dim(1).squeeze_dim(1)
            }
        }
    }

    /// The nearest codes of rows, as the metric compares them.
    fn nearest(&self, rows_nc: Tensor<2>, table_kc: &Tensor<2>) -> Nearest {
        let z_nc = self.compared(rows_nc);
        let plain_nc = z_nc.clone().inner();
        let codes_n = nearest_code(plain_nc.clone(), table_kc.clone().inner());
        let q_nc = table_kc.clone().select(0, codes_n.clone());
        Nearest { z_nc, q_nc, part: CodebookStats { latents_nc: plain_nc, codes_n } }
    }

    fn loss(&self, z_nc: Tensor<2>, q_nc: Tensor<2>) -> Tensor<1> {
        let beta = self.config.beta;
        let commitment = (q_nc.clone().detach() - z_nc.clone()).square().mean();
        match self.config.codebook {
            Learning::Ema { .. } => commitment.mul_scalar(beta),
            Learning::Gradient { legacy } => {
                let codes = (q_nc - z_nc.detach()).square().mean();
                let (on_latents, on_codes) = if legacy { (1.0, beta) } else { (beta, 1.0) };
                commitment.mul_scalar(on_latents) + codes.mul_scalar(on_codes)
            }
        }
    }
}

/// One reading of the table.
struct Nearest {
    /// What was compared.
    z_nc: Tensor<2>,
    /// What was found.
    q_nc: Tensor<2>,
    part: CodebookStats,
}

impl Quantizer for Vq {
    fn vocabulary(&self) -> Vocabulary {
        self.config.vocabulary()
    }

    fn channels(&self) -> usize {
        self.config.channels
    }

    fn encode(&self, latents_bchw: Tensor<4>) -> Tensor<2, Int> {
        let [b, ..] = latents_bchw.dims();
        let table_kc = self.table().inner();
        let mut rest_nc = self.projected(latents_bchw).inner();
        let mut codes = Vec::new();
        for depth in 1..=self.config.depth {
            let Nearest { q_nc, part, .. } = self.nearest(rest_nc.clone(), &table_kc);
            codes.push(part.codes_n);
            if depth < self.config.depth {
                rest_nc = rest_nc - q_nc;
            }
        }
        self.tokens(codes, b)
    }

    fn decode(&self, codes: Tensor<2, Int>, h: usize, w: usize) -> Tensor<4> {
        let [b, _] = codes.dims();
        self.back(self.sum(codes, self.config.depth), b, h, w)
    }

    fn decode_prefix(&self, codes: Tensor<2, Int>, h: usize, w: usize, parts: usize) -> Result<Tensor<4>> {
        check_parts(parts, self.config.depth)?;
        let [b, _] = codes.dims();
        Ok(self.back(self.sum(codes, parts), b, h, w))
    }

    /// At a depth of several codes the rest is cut off from the latents, which therefore have a gradient of the straight-through
    /// estimator alone, as in the public code; the codes before are not cut off, and learn from what they leave over too.
    fn train_forward(&self, latents_bchw: Tensor<4>, _: &Pass) -> Quantized {
        let ([b, _, h, w], depth) = (latents_bchw.dims(), self.config.depth);
        let raw_nc = self.projected(latents_bchw);
        let table_kc = self.table();
        let mut rest_nc = if depth > 1 { raw_nc.clone().detach() } else { raw_nc.clone() };
        let mut readings = Vec::with_capacity(depth);
        for at in 1..=depth {
            let reading = self.nearest(rest_nc.clone(), &table_kc);
            if at < depth {
                rest_nc = rest_nc - reading.q_nc.clone();
            }
            readings.push(reading);
        }
        let passed_nc = match (self.config.metric, readings.as_slice()) {
            (Metric::Euclidean | Metric::Cosine, [only]) => only.z_nc.clone(),
            (Metric::Cosine, _) => self.compared(raw_nc),
            (Metric::Euclidean | Metric::CosineRaw, _) => raw_nc,
        };
        let losses = readings.iter().map(|reading| self.loss(reading.z_nc.clone(), reading.q_nc.clone()));
        let loss = losses.reduce(|a, b| a + b).map(|sum| if depth > 1 { sum.div_scalar(depth as f64) } else { sum });
        let q_nc = readings.iter().map(|reading| reading.q_nc.clone()).reduce(|a, b| a + b);
        let out_nc = match (self.config.gradient, q_nc) {
            (_, None) => passed_nc,
            (Estimator::StraightThrough, Some(q_nc)) => passed_nc.clone() + (q_nc - passed_nc).detach(),
            (Estimator::Rotation, Some(q_nc)) => rotate(passed_nc, q_nc.detach()),
        };
        let parts: Vec<CodebookStats> = readings.into_iter().map(|reading| reading.part).collect();
        Quantized {
            latents_bchw: self.back(out_nc, b, h, w),
            codes: self.tokens(parts.iter().map(|part| part.codes_n.clone()).collect(), b),
            terms: loss.map(|loss| LossTerm::new("codebook", loss)).into_iter().collect(),
            stats: Stats { parts },
        }
    }

    fn update(&mut self, stats: &Stats, step: u64, stream: &mut Stream) -> UpdateReport {
        self.apply(stats, step, stream)
    }
}

/// Rows scaled to unit length; a zero row stays zero, with a finite gradient.
pub(super) fn unit_rows(rows_nc: Tensor<2>) -> Tensor<2> {
    let norms_n1 = rows_nc.clone().square().sum_dim(1).clamp_min(1e-24).sqrt();
    rows_nc / norms_n1
}

/// The value of `q`, with the gradient of the rotation and scaling that takes `z` to `q` (arXiv 2410.06424).
fn rotate(z_nc: Tensor<2>, q_nc: Tensor<2>) -> Tensor<2> {
    let norm = |rows: Tensor<2>| rows.square().sum_dim(1).sqrt().clamp_min(1e-6);
    let fixed_nc = z_nc.clone().detach();
    let (z_norm, q_norm) = (norm(fixed_nc.clone()), norm(q_nc.clone()));
    let u = fixed_nc / z_norm.clone();
    let v = q_nc / q_norm.clone();
    let sum = u.clone() + v.clone();
    let w = sum.clone() / norm(sum);
    let along_w = (z_nc.clone() * w.clone()).sum_dim(1);
    let along_u = (z_nc.clone() * u).sum_dim(1);
    (z_nc - (along_w * w).mul_scalar(2.0) + (along_u * v).mul_scalar(2.0)) * (q_norm / z_norm)
}
