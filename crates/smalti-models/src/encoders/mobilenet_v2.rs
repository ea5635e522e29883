//! MobileNetV2 (arXiv 1801.04381): features of images, and with a head the class of what they show.
//!
//! The trunk is [`smalti_nn::MobileNetV2`]: batch normalisations use their stored statistics, in training too. The features are the
//! mean over places of its last layer, the head is one linear map of them.

use super::{Encoder, EncoderLoss, EncoderSettings};
use crate::generators::{Condition, ConditionConfig, Conditions, Draw};
use crate::role::Described;
use crate::systems::Facts;
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData, activation::log_softmax};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result};
use smalti_nn::dense::Dense;
use smalti_nn::init::Init;
use smalti_nn::{Interpolation, MobileNetV2, Resize};

/// ImageNet's mean and deviation for values in -1..1, per channel.
const MEAN: [f32; 3] = [-0.03, -0.088, -0.188];
const DEVIATION: [f32; 3] = [0.458, 0.448, 0.45];
/// Images are halved five times.
const SMALLEST: usize = 8;

/// Settings of [`MobileNetEncoder`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MobileNetEncoderConfig {
    /// Side of the images that the network looks at, in pixels; others are stretched to it.
    pub image_size: usize,
    /// Classes that the head tells apart; without a head there are features only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classes: Option<usize>,
    /// Share of the features that training leaves out in front of the head.
    #[serde(default, serialize_with = "smalti_base::config::decimal")]
    pub dropout: f32,
}

impl Described for MobileNetEncoderConfig {
    const FACTS: Facts = Facts {
        arxiv: "1801.04381",
        tokens: "features of images",
        about: "MobileNetV2: depthwise convolutions, with a head a classifier and judge",
    };
}

impl EncoderSettings for MobileNetEncoderConfig {
    fn image_size(&self) -> (usize, usize) {
        (self.image_size, self.image_size)
    }

    fn width(&self) -> usize {
        MobileNetV2::WIDTH
    }

    fn tells(&self) -> Conditions {
        self.classes.map_or_else(Conditions::none, |classes| ConditionConfig::Class { classes }.into())
    }

    fn official(&self) -> Option<&'static str> {
        Some("mobilenet_v2")
    }
}

impl MobileNetEncoderConfig {
    /// A network with fresh weights.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the setting that is out of range.
    pub fn init(&self, device: &Device) -> Result<MobileNetEncoder> {
        let problem = match self {
            Self { image_size: 0..SMALLEST, .. } => {
                format!("image_size = {}; expected at least {SMALLEST}", self.image_size)
            }
            Self { classes: Some(0 | 1), .. } => {
                "classes is below 2; leave it out for an encoder without a head".into()
            }
            Self { dropout, .. } if !(0.0..1.0).contains(dropout) => {
                format!("dropout = {dropout}; expected 0 <= x < 1")
            }
            _ => {
                let head = |classes| Dense::new(MobileNetV2::WIDTH, classes, Init::Normal(0.01), device);
                let (network, head) = (MobileNetV2::new(device), self.classes.map(head));
                return Ok(MobileNetEncoder { network, head, config: self.clone() });
            }
        };
        Err(Error::invalid("encoder (mobilenet_v2)", problem))
    }
}

/// MobileNetV2 with an optional head.
#[derive(Module, Debug)]
pub struct MobileNetEncoder {
    /// The trunk.
    pub network: MobileNetV2,
    /// From features to a logit for each class.
    pub head: Option<Dense>,
    #[module(skip)]
    config: MobileNetEncoderConfig,
}

impl MobileNetEncoder {
    /// What the trunk sees of images in -1..1: of its size, with ImageNet's mean 0 and deviation 1.
    ///
    /// # Shapes
    /// `[b, 3, h, w]` to `[b, 3, image_size, image_size]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another number of channels.
    pub fn prepare(&self, images_bchw: Tensor<4>) -> Result<Tensor<4>> {
        let [_, c, h, w] = images_bchw.dims();
        if c != 3 {
            return Err(Error::invalid("images for mobilenet_v2", format!("{c} channels; expected 3")));
        }
        let device = images_bchw.device().without_autodiff();
        let side = self.config.image_size;
        let images = Resize::new(Interpolation::Bilinear, [h, w], [side; 2], &device).forward(images_bchw);
        let constant = |values: [f32; 3]| Tensor::<1>::from_floats(values, &device).reshape([1, 3, 1, 1]);
        Ok((images - constant(MEAN)) / constant(DEVIATION))
    }

    /// Logits `[b, classes]` of features `[b, width]`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] without a head.
    pub fn logits(&self, features_bd: Tensor<2>) -> Result<Tensor<2>> {
        match &self.head {
            Some(head) => Ok(head.forward(features_bd)),
            None => Err(Error::unsupported(
                "what an image shows, by an encoder without a head",
                "set `classes` and train it, for example over frozen features",
            )),
        }
    }

    /// The class of each condition, `[b]`.
    fn classes(&self, given: &[Condition], images: usize, device: &Device) -> Result<Tensor<1, Int>> {
        if given.len() != images {
            let problem = format!("{} conditions for {images} images; expected one for each", given.len());
            return Err(Error::invalid("encoder batch", problem));
        }
        let (takes, classes) = (self.config.tells(), self.config.classes.unwrap_or_default());
        let class = |condition: &Condition| match takes.ids(condition)?.as_slice() {
            [class] if *class < classes => Ok(*class as i32),
            _ => Err(Error::invalid("encoder batch", "an image has no class; expected one for each")),
        };
        let ids = given.iter().map(class).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::from_data(TensorData::new(ids, [images]), device))
    }
}

impl Encoder for MobileNetEncoder {
    fn settings(&self) -> &dyn EncoderSettings {
        &self.config
    }

    fn features(&self, images_bchw: Tensor<4>) -> Result<Tensor<2>> {
        Ok(self.network.pooled(self.prepare(images_bchw)?))
    }

    fn scores(&self, images_bchw: Tensor<4>, given: &[Condition]) -> Result<Tensor<1>> {
        let logits_bk = self.logits(self.features(images_bchw)?)?;
        let [b, _] = logits_bk.dims();
        let classes = self.classes(given, b, &logits_bk.device())?;
        Ok(log_softmax(logits_bk, 1).gather(1, classes.reshape([b, 1])).reshape([b]))
    }

    fn loss(&self, images_bchw: Tensor<4>, given: &[Condition], draw: Option<&mut Draw<'_>>) -> Result<EncoderLoss> {
        let features_bd = self.features(images_bchw)?;
        let [b, d] = features_bd.dims();
        let device = features_bd.device();
        let classes = self.classes(given, b, &device)?;
        let kept = match draw {
            Some(draw) if self.config.dropout > 0.0 => {
                let share = self.config.dropout;
                let mut mask = || if draw.stream.uniform() < share { 0.0 } else { 1.0 / (1.0 - share) };
                let mask: Vec<f32> = (0..b * d).map(|_| mask()).collect();
                features_bd.clone() * Tensor::from_data(TensorData::new(mask, [b, d]), &device)
            }
            _ => features_bd.clone(),
        };
        let logits_bk = self.logits(kept)?;
        let hits = logits_bk.clone().detach().argmax(1).reshape([b]).equal(classes.clone());
        let loss = smalti_kernels::softmax_cross_entropy(logits_bk, classes, None, 0.0);
        Ok(EncoderLoss { loss, features_bd, accuracy: hits.float().mean() })
    }
}
