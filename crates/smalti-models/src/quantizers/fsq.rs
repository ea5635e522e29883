//! Finite scalar quantization ("VQ-VAE Made Simple", arXiv 2309.15505): each of a few numbers is bounded and rounded to one of
//! its levels. No table, no loss, no averages.

use super::{Pass, Quantized, Quantizer, QuantizerSettings, Stats, from_rows, to_rows, vq::dense};
use crate::role::Described;
use crate::systems::Facts;
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result, Vocabulary};
use smalti_nn::dense::Dense;

/// Settings of a [`Fsq`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsqConfig {
    /// Levels of each number, each at least 2; the vocabulary is their product. The paper advises 5 or more.
    pub levels: Vec<usize>,
    /// Channels of the latents. If they are not as many as the levels, two linear layers lead there and back.
    pub channels: usize,
    /// Whose arithmetic.
    #[serde(default)]
    pub dialect: FsqDialect,
}

/// How a number is bounded before it is rounded. Checkpoints of one dialect give other codes in another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FsqDialect {
    /// The authors' JAX code: `half = (L - 1)(1 - 0.001) / 2`, shift `tan(offset / half)`.
    #[default]
    Official,
    /// vector-quantize-pytorch: `half = (L - 1)(1 + 0.001) / 2`, shift `atanh(offset / half)`.
    Vqp,
    /// Its symmetric form (arXiv 2411.19842): codes are spread evenly over -1..1.
    Symmetric,
}

impl Described for FsqConfig {
    const FACTS: Facts = Facts {
        arxiv: "2309.15505",
        tokens: "grid",
        about: "finite scalar quantization: each channel rounded to a few levels, no codebook to learn",
    };
}

impl FsqConfig {
    /// The official dialect.
    pub fn new(levels: impl Into<Vec<usize>>, channels: usize) -> Self {
        Self { levels: levels.into(), channels, dialect: FsqDialect::default() }
    }

    /// Makes the quantizer.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there are no levels, one is too low, or the product is over 2^31.
    pub fn init(&self, device: &Device) -> Result<Fsq> {
        let least = if self.dialect == FsqDialect::Symmetric { 2 } else { 3 };
        let product = self.levels.iter().try_fold(1usize, |product, level| product.checked_mul(*level));
        if self.levels.is_empty() || self.levels.iter().any(|level| *level < least) || self.channels == 0 {
            return Err(Error::invalid(
                "quantizer",
                format!(
                    "levels are {:?} and channels {}; expected levels of at least {least}",
                    self.levels, self.channels
                ),
            ));
        }
        if product.is_none_or(|product| product > i32::MAX as usize) {
            return Err(Error::invalid("quantizer", format!("levels {:?} give more than 2^31 codes", self.levels)));
        }
        let d = self.levels.len();
        let projected = d != self.channels;
        Ok(Fsq {
            project_in: projected.then(|| dense(self.channels, d, device)),
            project_out: projected.then(|| dense(d, self.channels, device)),
            config: self.clone(),
        })
    }
}

impl QuantizerSettings for FsqConfig {
    fn vocabulary(&self) -> Vocabulary {
        self.levels.iter().product::<usize>().into()
    }

    fn channels(&self) -> usize {
        self.channels
    }
}

/// Finite scalar quantization.
#[derive(Module, Debug)]
pub struct Fsq {
    /// Latents to numbers.
    pub project_in: Option<Dense>,
    /// Numbers to latents.
    pub project_out: Option<Dense>,
    /// The settings.
    #[module(skip)]
    pub config: FsqConfig,
}

impl Fsq {
    /// Numbers `[n, d]` bounded to their levels, before rounding: level i spans about its number of units.
    pub fn bound(&self, numbers_nd: Tensor<2>) -> Tensor<2> {
        let device = numbers_nd.device();
        let per_level = |value: &dyn Fn(f64) -> f64| row(&self.config.levels, value, &device);
        match self.config.dialect {
            FsqDialect::Symmetric => {
                let span = per_level(&|l| (l - 1.0) / 2.0);
                numbers_nd.tanh().add_scalar(1.0) * span
            }
            dialect => {
                let half = move |l: f64| (l - 1.0) / 2.0 * if dialect == FsqDialect::Vqp { 1.001 } else { 0.999 };
                let offset = |l: f64| if l % 2.0 == 0.0 { 0.5 } else { 0.0 };
                let shift = move |l: f64| match dialect {
                    FsqDialect::Vqp => (offset(l) / half(l)).atanh(),
                    _ => (offset(l) / half(l)).tan(),
                };
                (numbers_nd + per_level(&shift)).tanh() * per_level(&half) - per_level(&offset)
            }
        }
    }

    /// Quantized numbers `[n, d]` in -1..1, with the gradient of [`Self::bound`].
    pub fn quantize(&self, numbers_nd: Tensor<2>) -> Tensor<2> {
        let bounded = self.bound(numbers_nd);
        let rounded = match self.config.dialect {
            FsqDialect::Symmetric => bounded.clone().detach().add_scalar(0.5).floor(),
            _ => bounded.clone().detach().round(),
        };
        let passed = bounded.clone() + (rounded - bounded).detach();
        self.centred(passed)
    }

    /// Rounded numbers to -1..1.
    fn centred(&self, rounded_nd: Tensor<2>) -> Tensor<2> {
        let device = rounded_nd.device();
        match self.config.dialect {
            FsqDialect::Symmetric => rounded_nd * row(&self.config.levels, &|l| 2.0 / (l - 1.0), &device) - 1.0,
            _ => rounded_nd / row(&self.config.levels, &|l| (l / 2.0).floor(), &device),
        }
    }

    /// The code `[n]` of quantized numbers `[n, d]`. The first number varies fastest.
    pub fn ids(&self, quantized_nd: Tensor<2>) -> Tensor<1, Int> {
        let ([n, _], device) = (quantized_nd.dims(), quantized_nd.device());
        let levels = &self.config.levels;
        let digits_nd = match self.config.dialect {
            FsqDialect::Symmetric => quantized_nd.add_scalar(1.0) * row(levels, &|l| (l - 1.0) / 2.0, &device),
            _ => quantized_nd.add_scalar(1.0) * row(levels, &|l| (l / 2.0).floor(), &device),
        };
        // Digits become integers before they are summed: a sum of floats is exact only up to 2^24.
        let digits_nd = digits_nd.round().int();
        let basis: Vec<i32> = basis(levels);
        let basis_1d = Tensor::<2, Int>::from_data(TensorData::new(basis, [1, levels.len()]), &device);
        (digits_nd * basis_1d).sum_dim(1).reshape([n])
    }

    /// The level `[n, d]` of each number, from 0, of codes `[n]`.
    pub fn digits(&self, codes_n: Tensor<1, Int>) -> Tensor<2, Int> {
        let levels = &self.config.levels;
        let digits = basis(levels)
            .into_iter()
            .zip(levels)
            .map(|(basis, level)| codes_n.clone().div_scalar(basis).remainder_scalar(*level as i32));
        Tensor::stack(digits.collect(), 1)
    }

    /// Quantized numbers `[n, d]` of codes `[n]`.
    pub fn numbers(&self, codes_n: Tensor<1, Int>) -> Tensor<2> {
        let device = codes_n.device();
        let digits_nd = self.digits(codes_n).float();
        match self.config.dialect {
            FsqDialect::Symmetric => self.centred(digits_nd),
            _ => self.centred(digits_nd - row(&self.config.levels, &|l| (l / 2.0).floor(), &device)),
        }
    }

    fn projected(&self, latents_bchw: Tensor<4>) -> Tensor<2> {
        let rows_nc = to_rows(latents_bchw);
        match &self.project_in {
            Some(linear) => linear.forward(rows_nc),
            None => rows_nc,
        }
    }

    fn back(&self, numbers_nd: Tensor<2>, b: usize, h: usize, w: usize) -> Tensor<4> {
        let rows_nc = match &self.project_out {
            Some(linear) => linear.forward(numbers_nd),
            None => numbers_nd,
        };
        from_rows(rows_nc, b, h, w)
    }
}

/// One value per level, `[1, d]`.
fn row(levels: &[usize], value: &dyn Fn(f64) -> f64, device: &Device) -> Tensor<2> {
    let values: Vec<f32> = levels.iter().map(|level| value(*level as f64) as f32).collect();
    Tensor::from_data(TensorData::new(values, [1, levels.len()]), device)
}

fn basis(levels: &[usize]) -> Vec<i32> {
    let products = levels.iter().scan(1i32, |product, level| {
        let basis = *product;
        *product = product.wrapping_mul(*level as i32);
        Some(basis)
    });
    products.collect()
}

impl Quantizer for Fsq {
    fn vocabulary(&self) -> Vocabulary {
        self.config.vocabulary()
    }

    fn channels(&self) -> usize {
        self.config.channels
    }

    fn encode(&self, latents_bchw: Tensor<4>) -> Tensor<2, Int> {
        let [b, _, h, w] = latents_bchw.dims();
        self.ids(self.quantize(self.projected(latents_bchw)).inner()).reshape([b, h * w])
    }

    fn decode(&self, codes: Tensor<2, Int>, h: usize, w: usize) -> Tensor<4> {
        let [b, n] = codes.dims();
        self.back(self.numbers(codes.reshape([b * n])), b, h, w)
    }

    fn train_forward(&self, latents_bchw: Tensor<4>, _: &Pass) -> Quantized {
        let [b, _, h, w] = latents_bchw.dims();
        let quantized_nd = self.quantize(self.projected(latents_bchw));
        let plain_nd = quantized_nd.clone().inner();
        let codes_n = self.ids(plain_nd);
        Quantized {
            latents_bchw: self.back(quantized_nd, b, h, w),
            codes: codes_n.reshape([b, h * w]),
            terms: Vec::new(),
            stats: Stats::default(),
        }
    }
}
