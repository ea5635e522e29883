//! Perceptual distances: how far two images are apart in the features of a network trained to classify photographs.
//!
//! For feature maps `f_l` of both images, unit-normalised over channels at each place,
//! `d = sum_l mean_hw sum_c w_lc (f_lc(a) - f_lc(b))^2`. With the learned `w` of LPIPS (arXiv 1801.03924) and VGG16 this is
//! LPIPS; with MobileNetV2 all `w` are 1, which is LPIPS without its heads.

use crate::checkpoint::Finite;
use crate::checkpoint::tensors::{Source, Stored, Values, WeightsFile};
use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result};
use smalti_nn::{MobileNetV2, Vgg16, vgg16};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Which network judges, and where its weights are (safetensors files).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum PerceptualConfig {
    /// LPIPS with VGG16.
    LpipsVgg16 {
        /// The trunk in the layout of the `lpips` package (`net.slice1.0.weight`), of torchvision (`features.0.weight`) or of
        /// a VQGAN checkpoint (`loss.perceptual_loss.net.slice1.0.weight`).
        weights: PathBuf,
        /// The learned heads, if they are in a file of their own (`lin0.model.1.weight` or `v0.1.vgg.lin0.model.1.weight`).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        heads: Option<PathBuf>,
    },
    /// MobileNetV2 without heads.
    MobilenetV2 {
        /// torchvision's weights; `features` suffices.
        weights: PathBuf,
    },
}

impl PerceptualConfig {
    /// Opens the network on a plain device: its weights are never trained.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Invalid`] if a file cannot be read or lacks a tensor.
    pub fn init(&self, device: &Device) -> Result<Perceptual> {
        let device = &device.clone().without_autodiff();
        match self {
            Self::LpipsVgg16 { weights, heads } => {
                let weights = WeightsFile::open(weights)?;
                match heads {
                    Some(heads) => Perceptual::lpips(&Finite(&weights), &Finite(&WeightsFile::open(heads)?), device),
                    None => Perceptual::lpips(&Finite(&weights), &Finite(&weights), device),
                }
            }
            Self::MobilenetV2 { weights } => Perceptual::mobilenet_v2(&Finite(&WeightsFile::open(weights)?), device),
        }
    }

    /// The files that are read.
    pub fn files(&self) -> Vec<&Path> {
        match self {
            Self::LpipsVgg16 { weights, heads } => {
                std::iter::once(weights).chain(heads).map(PathBuf::as_path).collect()
            }
            Self::MobilenetV2 { weights } => vec![weights],
        }
    }
}

/// ImageNet's mean and deviation for values in -1..1, per channel.
const SHIFT: [f32; 3] = [-0.030, -0.088, -0.188];
const SCALE: [f32; 3] = [0.458, 0.448, 0.450];

/// Stages of MobileNetV2 that are compared: halved, quartered, an eighth, a sixteenth of the image's side.
const MOBILENET_TAPS: [usize; 4] = [1, 3, 6, 13];

/// A network that judges how alike images look.
#[derive(Clone, Debug)]
pub struct Perceptual {
    network: Network,
    shift: Tensor<4>,
    scale: Tensor<4>,
}

#[derive(Clone, Debug)]
enum Network {
    Lpips { trunk: Vgg16, heads: Vec<Tensor<4>> },
    MobileNet(Box<MobileNetV2>),
    Given(Box<Tensor<1>>),
}

impl Perceptual {
    /// LPIPS from a trunk and its heads.
    ///
    /// # Errors
    /// [`Error::Unknown`] if a tensor is missing, [`Error::Invalid`] if shapes do not fit.
    pub fn lpips(trunk: &dyn Source, heads: &dyn Source, device: &Device) -> Result<Self> {
        let named = trunk.shapes();
        let trunk = Vgg16::load(
            |slice, layer, part| {
                let names = PREFIXES.iter().map(|prefix| format!("{prefix}net.slice{slice}.{layer}.{part}"));
                data(first(trunk, &named, names.chain([format!("features.{layer}.{part}")]))?)
            },
            device,
        )?;
        let named = heads.shapes();
        let heads = trunk.slices.iter().enumerate().map(|(level, convs)| {
            let names = PREFIXES
                .iter()
                .flat_map(|prefix| [1, 0].map(|index| format!("{prefix}lin{level}.model.{index}.weight")));
            let head = first(heads, &named, names.chain([format!("v0.1.vgg.lin{level}.model.1.weight")]))?;
            let channels = convs.last().map_or(0, |conv| conv.weight.dims()[0]);
            match head.shape[..] == [1, channels, 1, 1] {
                true => Ok(Tensor::from_data(data(head)?, device)),
                false => Err(Error::invalid(
                    format!("LPIPS head {level}"),
                    format!("its shape is {:?}, but the trunk has {channels} channels there", head.shape),
                )),
            }
        });
        let heads = heads.collect::<Result<_>>()?;
        Ok(Self::with(Network::Lpips { trunk, heads }, device))
    }

    /// MobileNetV2 from torchvision's tensors.
    ///
    /// # Errors
    /// [`Error::Unknown`] if a tensor is missing, [`Error::Invalid`] if a shape differs.
    pub fn mobilenet_v2(weights: &dyn Source, device: &Device) -> Result<Self> {
        let network = MobileNetV2::load(|name| data(weights.read(name)?), device)?;
        Ok(Self::with(Network::MobileNet(Box::new(network)), device))
    }

    /// Given distances `[b]`, whatever the images: stands in for a network where a loss is compared with a reference.
    pub fn given(distances_b: Tensor<1>) -> Self {
        let device = distances_b.device();
        Self::with(Network::Given(Box::new(distances_b)), &device)
    }

    fn with(network: Network, device: &Device) -> Self {
        let per_channel = |values: [f32; 3]| Tensor::<1>::from_floats(values, device).reshape([1, 3, 1, 1]);
        Self { network, shift: per_channel(SHIFT), scale: per_channel(SCALE) }
    }

    /// The smallest side of an image in pixels.
    pub fn smallest_image(&self) -> usize {
        match self.network {
            Network::Lpips { .. } => vgg16::SMALLEST_IMAGE,
            Network::MobileNet(_) | Network::Given(_) => 1,
        }
    }

    /// The compared feature maps of images `[b, 3, h, w]` or `[b, 1, h, w]` in -1..1, fine to coarse, before they are normalised.
    pub fn features(&self, images_bchw: Tensor<4>) -> Vec<Tensor<4>> {
        let x = (images_bchw - self.shift.clone()) / self.scale.clone();
        match &self.network {
            Network::Lpips { trunk, .. } => trunk.features(x),
            Network::MobileNet(network) => network.features(x, &MOBILENET_TAPS),
            Network::Given(_) => Vec::new(),
        }
    }

    /// What each feature map adds to the distance: `[b]` each, for images as [`Self::features`] takes.
    pub fn layers(&self, a_bchw: Tensor<4>, b_bchw: Tensor<4>) -> Vec<Tensor<1>> {
        if let Network::Given(distances) = &self.network {
            return vec![Tensor::clone(distances)];
        }
        let pairs = self.features(a_bchw).into_iter().zip(self.features(b_bchw));
        let terms = pairs.enumerate().map(|(level, (a, b))| {
            let [batch, ..] = a.dims();
            let difference = (unit(a) - unit(b)).square();
            let weighted = match &self.network {
                Network::Lpips { heads, .. } => difference * heads[level].clone(),
                Network::MobileNet(_) | Network::Given(_) => difference,
            };
            weighted.sum_dim(1).reshape([batch as i32, -1]).mean_dim(1).reshape([batch])
        });
        terms.collect()
    }

    /// The distance `[b]` of each pair of images, as [`Self::features`] takes.
    pub fn distance(&self, a_bchw: Tensor<4>, b_bchw: Tensor<4>) -> Tensor<1> {
        let layers = self.layers(a_bchw, b_bchw);
        layers.into_iter().reduce(|sum, term| sum + term).unwrap_or_else(|| Tensor::zeros([1], &self.shift.device()))
    }
}

/// Divides each place's channels by their length. The constant under the root does not change a value; it keeps the
/// gradient of a place where all channels are 0 finite.
fn unit(x_bchw: Tensor<4>) -> Tensor<4> {
    let length = (x_bchw.clone().square().sum_dim(1) + 1e-20).sqrt();
    x_bchw / (length + 1e-10)
}

/// What stands before a key in the layouts that are known.
const PREFIXES: [&str; 3] = ["", "loss.perceptual_loss.", "perceptual_loss."];

/// Reads the first of several names that is there.
fn first(
    source: &dyn Source,
    named: &BTreeMap<String, Vec<usize>>,
    names: impl Iterator<Item = String>,
) -> Result<Stored> {
    let names: Vec<String> = names.collect();
    match names.iter().find(|name| named.contains_key(*name)) {
        Some(name) => source.read(name),
        None => Err(Error::invalid(source.place(), format!("none of these tensors is there: {}", names.join(", ")))),
    }
}

fn data(stored: Stored) -> Result<TensorData> {
    match stored.values {
        Values::Floats(values) => Ok(TensorData::new(values, stored.shape)),
        other => Err(Error::invalid("perceptual weights", format!("expected floats, found {}", other.kind()))),
    }
}
