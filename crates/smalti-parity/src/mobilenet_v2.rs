//! MobileNetV2 against torchvision.

use super::case::Case;
use super::comparison::Comparison;
use burn::tensor::Device;
use smalti_base::{Error, Result};
use smalti_models::checkpoint::{Rules, Source};
use smalti_models::encoders::{MobileNetEncoder, MobileNetEncoderConfig};

/// The layers whose outputs cases hold.
const LAYERS: [usize; 5] = [1, 3, 6, 13, 18];

/// The weights are in a file that the case names, relative to its folder.
pub(super) fn knows(case: &Case) -> bool {
    case.has(&["image_u8", "pooled_1280"]) && case.has_settings(&["weights"])
}

/// Features of images, and logits if the weights have a classifier.
pub(super) fn features(case: &Case, compare: &mut Comparison) -> Result<()> {
    case.ignore(&["image", "images"]);
    let file: String = case.setting("weights")?;
    let weights = case.weights_of(&file, "")?;
    if weights.is_empty() {
        return Err(Error::invalid(case.title(), format!("there are no weights at {file}")));
    }
    let images = case.ids::<4>("image_u8")?.float() / 127.5 - 1.0;
    let [_, _, side, _] = images.dims();
    let classes = weights.get("classifier.1.weight").and_then(|weight| weight.shape.first().copied());
    let model = open(&MobileNetEncoderConfig { image_size: side, classes, dropout: 0.0 }, &weights, case.device())?;
    let x = model.prepare(images)?;
    for (layer, feature) in LAYERS.into_iter().zip(model.network.features(x.clone(), &LAYERS)) {
        let [b, c, h, w] = feature.dims();
        let crop = format!("features.{layer}.crop");
        if case.has(&[&crop]) {
            compare.floats(&crop, feature.clone().slice([0..b, 0..c.min(8), 0..h.min(8), 0..w.min(8)]))?;
        }
        let mean = format!("features.{layer}.mean");
        if case.has(&[&mean]) {
            compare.floats(&mean, feature.mean_dim(3).mean_dim(2).reshape([b, c]))?;
        }
    }
    let pooled = model.network.pooled(x);
    compare.floats("pooled_1280", pooled.clone())?;
    match case.has(&["logits"]) {
        true => compare.floats("logits", model.logits(pooled)?),
        false => Ok(()),
    }
}

fn open(config: &MobileNetEncoderConfig, weights: &dyn Source, device: &Device) -> Result<MobileNetEncoder> {
    let rules = Rules::builtin("mobilenet_v2", "encoder")?;
    Ok(rules.import(config.init(device)?, weights)?.0)
}
