//! The perceptual networks against reference values.
#![allow(clippy::unwrap_used)]

mod cases;

use burn::tensor::{Device, Tensor, TensorData};
use cases::{agree, open};
use smalti_models::checkpoint::{Source, Values, WeightsFile};
use smalti_models::losses::Perceptual;
use smalti_nn::MobileNetV2;
use std::path::PathBuf;

#[test]
fn equal_and_empty_images_have_distance_zero_and_a_finite_gradient() {
    let weights = open("lpips/vgg-tiny").weights("").unwrap();
    let device = Device::flex();
    let lpips = Perceptual::lpips(&weights, &weights, &device).unwrap();
    // Zeros after the shift make many feature columns zero.
    let image = Tensor::<4>::zeros([1, 3, 16, 16], &device);
    let other = image.clone().autodiff().require_grad();
    let distance = lpips.distance(image, other.clone()).sum();
    assert!(distance.clone().into_scalar::<f32>().abs() < 1e-9);
    let gradient = other.grad(&distance.backward()).unwrap();
    assert!(gradient.abs().sum().into_scalar::<f32>().is_finite());
}

fn asset() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../assets/models/mobilenet_v2_imagenet_features_f16.safetensors")
}

/// The reference values are of the weights in full precision, those in the repository are rounded to 16 bits. With the full
/// weights the same code agrees to 1e-4.
#[test]
fn mobilenet_equals_torchvision() {
    let device = Device::flex();
    let case = open("mobilenet_v2/chelsea");
    let images = case.ids::<4>("image_u8").unwrap().float() / 255.0;
    let constant = |values: [f32; 3]| Tensor::<1>::from_floats(values, &device).reshape([1, 3, 1, 1]);
    let x = (images - constant([0.485, 0.456, 0.406])) / constant([0.229, 0.224, 0.225]);
    let file = WeightsFile::open(&asset()).unwrap();
    let data = |name: &str| {
        let stored = file.read(name)?;
        let Values::Floats(values) = stored.values else { panic!("{name} is not of floats") };
        Ok(TensorData::new(values, stored.shape))
    };
    let network = MobileNetV2::load(data, &device).unwrap();
    let stages = [1, 3, 6, 13, 18];
    for (stage, feature) in stages.into_iter().zip(network.features(x.clone(), &stages)) {
        agree(&case, &format!("features.{stage}.mean"), feature.clone().mean_dim(3).mean_dim(2));
        let crop = format!("features.{stage}.crop");
        if case.has(&[&crop]) {
            agree(&case, &crop, feature.slice([0..1, 0..8, 0..8, 0..8]));
        }
    }
    agree(&case, "pooled_1280", network.pooled(x));
}
