//! Encoders: networks that make features of images. They are neither tokenizers nor generators: they judge pictures, teach other
//! networks, or stand in front of a generator as they are.

use crate::generators::{Condition, Conditions, Draw};
use crate::role::role;
use burn::tensor::Tensor;
use smalti_base::{Error, Result};

pub mod mobilenet_v2;

pub use mobilenet_v2::{MobileNetEncoder, MobileNetEncoderConfig};

role! {
    /// Settings of any encoder; `kind` names it.
    EncoderConfig: EncoderSettings;
    /// Any encoder.
    EncoderModel: Encoder;
    /// What there is.
    SYSTEMS: Encoder;
    /// Convolutional classifier for small devices.
    "mobilenet_v2" => MobileNetEncoder(MobileNetEncoderConfig),
}

/// What is known of an encoder before it has weights.
pub trait EncoderSettings {
    /// Height and width of the images that it looks at; others are stretched to it.
    fn image_size(&self) -> (usize, usize);

    /// Numbers of the features of an image.
    fn width(&self) -> usize;

    /// What it can tell of an image, and so judge or learn; nothing if it has no head.
    fn tells(&self) -> Conditions {
        Conditions::none()
    }

    /// The rules file that exports its weights, if the official layout can hold them.
    fn official(&self) -> Option<&'static str> {
        None
    }
}

/// Makes features of images.
pub trait Encoder: Send + Sync {
    /// What the model was made from.
    fn settings(&self) -> &dyn EncoderSettings;

    /// Features of images.
    ///
    /// # Shapes
    /// `images_bchw` is `[b, 3, h, w]` in -1..1, of any size; the features are `[b, width]`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] by an encoder of something else than images.
    fn features(&self, _images_bchw: Tensor<4>) -> Result<Tensor<2>> {
        Err(Error::unsupported("features of images by this encoder", "it reads no images"))
    }

    /// How well each image shows its condition: the logarithm of the condition's probability given the image, `[b]`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] by an encoder without a head, [`Error::Invalid`] unless there is one fitting condition for each image.
    fn scores(&self, _images_bchw: Tensor<4>, _given: &[Condition]) -> Result<Tensor<1>> {
        Err(Error::unsupported(
            "scores by this encoder",
            "it has no head that tells what an image shows: train one, for example over its frozen features",
        ))
    }

    /// The training loss of a batch. Without `draw` it is deterministic, as for validation.
    ///
    /// # Errors
    /// As [`Self::scores`].
    fn loss(&self, _images_bchw: Tensor<4>, _given: &[Condition], _draw: Option<&mut Draw<'_>>) -> Result<EncoderLoss> {
        Err(Error::unsupported(
            "training of this encoder on what images show",
            "it has no head: give it one, or a teacher whose features it learns",
        ))
    }
}

/// What an encoder loses on a batch. Nothing waits for the device.
#[derive(Clone, Debug)]
pub struct EncoderLoss {
    /// What training makes small, one element: the mean of `-scores`.
    pub loss: Tensor<1>,
    /// The features that it was computed from, `[b, width]`.
    pub features_bd: Tensor<2>,
    /// The share of the images whose condition was the most likely one, one element without gradient.
    pub accuracy: Tensor<1>,
}
