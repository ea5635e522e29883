//! The small perceptual network.
#![allow(clippy::unwrap_used)]

use burn::tensor::{Device, Tensor, TensorData};
use smalti_models::losses::PerceptualConfig;
use std::path::PathBuf;

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
