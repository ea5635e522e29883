//! Laws of encoders, and of bundles that hold them.
#![allow(clippy::unwrap_used)]

mod draws;

use burn::module::{Module, ModuleMapper, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use serde_json::json;
use smalti_base::rng::Stream;
use smalti_base::{Rng, config};
use smalti_models::checkpoint::bundle::Reference;
use smalti_models::checkpoint::{
    BundlePaths, Manifest, Part, PartFacts, Precision, parameter_map, read_weights, write_part,
};
use smalti_models::encoders::{EncoderConfig, EncoderModel};
use smalti_models::generators::Draw;
use smalti_models::{Condition, host};
use std::path::PathBuf;

fn encoder(more: serde_json::Value, device: &Device) -> EncoderModel {
    let mut config = json!({ "kind": "mobilenet_v2", "image_size": 16 });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let _alone = draws::seeded(device, 3);
    serde_json::from_value::<EncoderConfig>(config).unwrap().init(device).unwrap()
}

/// Convolutions whose outputs are as large as their inputs. Fresh ones make them smaller from layer to layer, until rounding decides.
struct Kept(Stream);

impl ModuleMapper for Kept {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (shape, id) = (param.val().dims(), param.id);
        if D != 4 {
            return param;
        }
        let inputs: usize = shape[1..].iter().product();
        let scale = (2.0 / inputs as f32).sqrt();
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| self.0.normal() * scale).collect();
        let value = Tensor::from_data(TensorData::new(values, shape), &param.val().device());
        param.transform_for_load(value, id)
    }
}

fn kept(model: EncoderModel) -> EncoderModel {
    model.map(&mut Kept(stream()))
}

fn images(n: usize, side: usize, device: &Device) -> Tensor<4> {
    let _alone = draws::seeded(device, 11);
    Tensor::random([n, 3, side, side], Distribution::Uniform(-1.0, 1.0), device)
}

fn stream() -> Stream {
    Rng::new(5).stream(0, 0)
}

#[test]
fn scores_are_logarithms_of_probabilities() {
    let device = Device::flex();
    let model = kept(encoder(json!({ "classes": 5 }), &device));
    let images = images(4, 16, &device);
    let of =
        |class: u32| host::floats(model.scores(images.clone(), &vec![Condition::class(class); 4]).unwrap()).unwrap();
    let scores: Vec<Vec<f32>> = (0..5).map(of).collect();
    for image in 0..4 {
        let sum: f32 = scores.iter().map(|class| class[image].exp()).sum();
        assert!((sum - 1.0).abs() < 1e-5, "{sum}");
    }
    // The loss is the mean of what was asked for, the accuracy the share of those that were best.
    let asked = [0u32, 3, 3, 4];
    let given: Vec<Condition> = asked.iter().copied().map(Condition::class).collect();
    let loss = model.loss(images.clone(), &given, None).unwrap();
    let mean = -asked.iter().enumerate().map(|(i, class)| scores[*class as usize][i]).sum::<f32>() / 4.0;
    assert!((host::float(loss.loss).unwrap() - mean).abs() < 1e-5);
    let best = |image: usize| (0..5).max_by(|a, b| scores[*a][image].total_cmp(&scores[*b][image])).unwrap();
    let hits = asked.iter().enumerate().filter(|(i, class)| best(*i) == **class as usize).count();
    assert_eq!(host::float(loss.accuracy).unwrap(), hits as f32 / 4.0);
    let features = host::floats(model.features(images).unwrap()).unwrap();
    assert_eq!(host::floats(loss.features_bd).unwrap(), features);
    assert_eq!(features.len(), 4 * model.settings().width());
}

#[test]
fn images_of_another_size_are_stretched() {
    let device = Device::flex();
    let model = encoder(json!({}), &device);
    let flat =
        |side: usize| host::floats(model.features(Tensor::full([1, 3, side, side], 0.3, &device)).unwrap()).unwrap();
    let (small, own) = (flat(5), flat(16));
    assert!(small.iter().zip(&own).all(|(a, b)| (a - b).abs() < 1e-5), "a flat image stays flat");
}

#[test]
fn dropout_is_drawn_from_the_stream_and_only_in_training() {
    let device = Device::flex();
    let model = kept(encoder(json!({ "classes": 3, "dropout": 0.5 }), &device));
    let given = vec![Condition::class(1); 2];
    let images = images(2, 16, &device);
    let loss =
        |draw: Option<&mut Draw<'_>>| host::float(model.loss(images.clone(), &given, draw).unwrap().loss).unwrap();
    let drawn = || loss(Some(&mut Draw::new(&mut stream(), 0)));
    assert_eq!(drawn(), drawn());
    assert_ne!(drawn(), loss(None));
    assert_eq!(loss(None), loss(None));
}

#[test]
fn statistics_of_normalisations_have_no_gradient_and_all_else_has() {
    let device = Device::flex().autodiff();
    let model = encoder(json!({ "classes": 3 }), &device);
    let given = vec![Condition::class(1), Condition::class(2)];
    let loss = model.loss(images(2, 32, &device), &given, None).unwrap().loss;
    let gradients = GradientsParams::from_grads(loss.backward(), &model);
    let entries = parameter_map(&model);
    let statistics = entries.keys().filter(|name| name.ends_with(".mean") || name.ends_with(".variance")).count();
    assert_eq!(statistics, 2 * 52);
    assert_eq!(gradients.len(), entries.len() - statistics);
}

#[test]
fn what_an_encoder_cannot_do_is_an_error() {
    let device = Device::flex();
    let images = || images(2, 16, &device);
    let headless = encoder(json!({}), &device);
    assert!(
        headless
            .scores(images(), &[Condition::class(0), Condition::class(0)])
            .unwrap_err()
            .to_string()
            .contains("without a head")
    );
    let model = encoder(json!({ "classes": 3 }), &device);
    let refused = |given: &[Condition]| model.scores(images(), given).unwrap_err().to_string();
    assert!(refused(&[Condition::class(0)]).contains("1 conditions for 2 images"));
    assert!(refused(&[Condition::class(0), Condition::class(3)]).contains("3 is not in 0..3"));
    assert!(refused(&[Condition::class(0), Condition::none()]).contains("has no class"));
    assert!(refused(&[Condition::class(0), Condition::text(vec![1])]).contains("takes a class"));
    let grey = Tensor::<4>::zeros([1, 1, 16, 16], &device);
    assert!(model.features(grey).unwrap_err().to_string().contains("1 channels; expected 3"));
    for settings in [json!({ "image_size": 4 }), json!({ "classes": 1 }), json!({ "dropout": 1.0 })] {
        let mut config = json!({ "kind": "mobilenet_v2", "image_size": 16 });
        config.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
        let config: EncoderConfig = serde_json::from_value(config).unwrap();
        assert!(config.init(&device).is_err(), "{settings}");
    }
}

#[test]
fn manifests_of_existing_bundles_are_written_unchanged() {
    let demo = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../assets/demo");
    let folder = tempfile::tempdir().unwrap();
    let manifest = BundlePaths::at(&demo).manifest().unwrap();
    config::write_json(&folder.path().join("bundle.json"), &manifest).unwrap();
    let read = |folder: &std::path::Path| std::fs::read_to_string(folder.join("bundle.json")).unwrap();
    assert_eq!(read(folder.path()), read(&demo));
}

#[test]
fn a_part_elsewhere_is_opened_only_if_it_is_the_one_that_was_meant() {
    let device = Device::flex();
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (BundlePaths::at(folder.path().join("one")), BundlePaths::at(folder.path().join("two")));
    let config: EncoderConfig = serde_json::from_value(json!({ "kind": "mobilenet_v2", "image_size": 16 })).unwrap();
    let model = encoder(json!({}), &device);
    let facts = write_part(&one, Part::Encoder, &config, &model, Precision::F32).unwrap();
    std::fs::create_dir_all(two.root().join("judge")).unwrap();
    config::write_json(&two.config(Part::Judge), &config).unwrap();
    let write = |file: &str, sha256: &str| {
        let mut manifest = Manifest::new("two");
        let refers = Some(Reference { file: file.into(), sha256: sha256.into() });
        manifest.parts.insert(Part::Judge, PartFacts { refers, ..facts.clone() });
        manifest.write(two.root()).unwrap();
    };
    let open = || read_weights(&two, Part::Judge, config.init(&device).unwrap());
    write("../one/encoder/model.safetensors", &facts.sha256);
    let features = |model: &EncoderModel| host::floats(model.features(images(1, 16, &device)).unwrap()).unwrap();
    assert_eq!(features(&open().unwrap()), features(&model));
    two.verify().unwrap();
    write("../one/encoder/model.safetensors", &"0".repeat(64));
    let error = open().unwrap_err().to_string();
    assert!(error.contains(&"0".repeat(64)) && error.contains(&facts.sha256), "{error}");
    assert!(two.verify().is_err());
    write("../nowhere.safetensors", &facts.sha256);
    let error = open().unwrap_err().to_string();
    assert!(error.contains("nowhere.safetensors, which is not there") && error.contains(&facts.sha256), "{error}");
    assert_eq!(model.num_params(), open_size(&one, &config, &device));
}

fn open_size(bundle: &BundlePaths, config: &EncoderConfig, device: &Device) -> usize {
    read_weights(bundle, Part::Encoder, config.init(device).unwrap()).unwrap().num_params()
}
