//! The perceptual networks against reference values.
#![allow(clippy::unwrap_used)]

mod cases;

use burn::tensor::{Device, Tensor, TensorData};
use cases::{close, folder, open};
use smalti_models::checkpoint::tensors::{Source, Values, WeightsFile, read_tensors};
use smalti_models::losses::{Perceptual, PerceptualConfig};
use smalti_nn::MobileNetV2;
use std::path::PathBuf;

#[test]
fn equal_and_empty_images_have_distance_zero_and_a_finite_gradient() {
    let Some((_, weights)) = open("lpips/vgg-tiny") else { return };
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

#[test]
fn mobilenet_distance_is_a_distance() {
    let device = Device::flex();
    let network = PerceptualConfig::MobilenetV2 { weights: asset() }.init(&device.clone().autodiff()).unwrap();
    let wave = |phase: f32| {
        let values: Vec<f32> = (0..2 * 3 * 64 * 64).map(|i| ((i % 61) as f32 * 0.3 + phase).sin()).collect();
        Tensor::<4>::from_data(TensorData::new(values, [2, 3, 64, 64]), &device)
    };
    let scalar = |a: Tensor<4>, b: Tensor<4>| network.distance(a, b).sum().into_scalar::<f32>();
    assert_eq!(scalar(wave(0.0), wave(0.0)), 0.0);
    let (near, far) = (scalar(wave(0.0), wave(0.1)), scalar(wave(0.0), wave(1.5)));
    assert!(0.0 < near && near < far, "{near} {far}");
    assert!((scalar(wave(0.1), wave(0.0)) - near).abs() < 1e-6);
}

/// The reference values are of the weights in full precision, those in the repository are rounded to 16 bits. With the full
/// weights the same code agrees to 1e-4.
#[test]
fn mobilenet_equals_torchvision() {
    let device = Device::flex();
    let io = read_tensors(&folder("mobilenet_v2/chelsea").unwrap().join("io.safetensors")).unwrap();
    let image = &io["image_u8"];
    let pixels: Vec<f32> = image.ints().unwrap().iter().map(|v| *v as f32 / 255.0).collect();
    let images = Tensor::<4>::from_data(TensorData::new(pixels, image.shape.clone()), &device);
    let constant = |values: [f32; 3]| Tensor::<1>::from_floats(values, &device).reshape([1, 3, 1, 1]);
    let x = (images - constant([0.485, 0.456, 0.406])) / constant([0.229, 0.224, 0.225]);
    let file = WeightsFile::open(&asset()).unwrap();
    let data = |name: &str| {
        let stored = file.read(name)?;
        let Values::Floats(values) = stored.values else { panic!("{name} is not of floats") };
        Ok(TensorData::new(values, stored.shape))
    };
    let network = MobileNetV2::load(data, &device).unwrap();
    let near = |found: Tensor<4>, name: &str| {
        let found = found.into_data().try_into_vec::<f32>().unwrap();
        close(&found, io[name].floats().unwrap(), 0.02, 0.02, name);
    };
    let stages = [1, 3, 6, 13, 18];
    for (stage, feature) in stages.into_iter().zip(network.features(x.clone(), &stages)) {
        near(feature.clone().mean_dim(3).mean_dim(2), &format!("features.{stage}.mean"));
        if io.contains_key(&format!("features.{stage}.crop")) {
            near(feature.slice([0..1, 0..8, 0..8, 0..8]), &format!("features.{stage}.crop"));
        }
    }
    near(network.pooled(x).reshape([1, 1280, 1, 1]), "pooled_1280");
}
