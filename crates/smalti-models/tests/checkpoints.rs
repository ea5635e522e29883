//! Weights, bundles and what happens to damaged ones.

use burn::module::{Module, Param, ParamId, RunningState};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Int, Tensor};
use smalti_base::{Rng, files};
use smalti_models::checkpoint::{
    BundlePaths, Manifest, Part, Precision, Source, Stored, Values, WeightsFile, load_module, parameter_map,
    read_config, read_tensors, read_weights, save_module, write_part, write_tensors,
};
use smalti_models::quantizers::{Quantizer, QuantizerConfig, VqConfig};
use std::collections::BTreeMap;
use std::path::Path;

#[derive(Module, Debug)]
enum Either {
    Dense(Linear),
    Nothing(Param<Tensor<1>>),
}

#[derive(Module, Debug)]
struct Net {
    either: Either,
    blocks: Vec<Linear>,
    mean: RunningState<Tensor<1>>,
    order: Param<Tensor<1, Int>>,
    absent: Option<Linear>,
    width: usize,
}

fn net(device: &Device) -> Net {
    Net {
        either: Either::Dense(LinearConfig::new(2, 3).init(device)),
        blocks: vec![LinearConfig::new(3, 3).with_bias(false).init(device)],
        mean: RunningState::new(Tensor::from_floats([1.5, 70_000.0], device)),
        order: Param::initialized(ParamId::new(), Tensor::from_ints([3, 1, 2], device)),
        absent: None,
        width: 3,
    }
}

fn save(net: &Net, path: &Path, precision: Precision) {
    let metadata = BTreeMap::from([("b".to_string(), "2".to_string()), ("a".to_string(), "1".to_string())]);
    save_module(net, path, precision, &metadata).expect("the folder can be written");
}

#[test]
fn a_module_comes_back_from_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    let device = Device::flex();
    let saved = net(&device);
    assert_eq!(
        parameter_map(&saved).into_keys().collect::<Vec<_>>(),
        ["blocks.0.weight", "either.bias", "either.weight", "mean", "order"]
    );
    save(&saved, &one, Precision::F32);
    let autodiff = device.clone().autodiff();
    let loaded = load_module(net(&autodiff), &one).unwrap();
    save(&loaded, &two, Precision::F32);
    assert_eq!(files::read(&one).unwrap(), files::read(&two).unwrap(), "equal tensors give equal bytes");
    assert_eq!(loaded.width, 3);
    let Either::Dense(linear) = &loaded.either else { panic!() };
    assert!(linear.weight.val().is_autodiff() && linear.weight.is_require_grad());
    let grads = linear.forward(Tensor::<2>::ones([1, 2], &autodiff)).sum().backward();
    assert!(linear.weight.grad(&grads).is_some());

    // The value that 16 bits cannot hold keeps its tensor at 32.
    save(&saved, &two, Precision::F16);
    let file = WeightsFile::open(&two).unwrap();
    let kinds: Vec<String> = file.names().map(|name| file.dtype(name).unwrap()).collect();
    assert_eq!(kinds, ["F16", "F16", "F16", "F32", "I64"]);
    assert_eq!(file.metadata().values().collect::<Vec<_>>(), ["1", "2"]);
    assert_eq!(
        load_module(net(&device), &two).unwrap().mean.value().into_data().try_to_vec::<f32>().unwrap()[1],
        70_000.0
    );
}

#[test]
fn what_does_not_fit_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    let device = Device::flex();
    save(&net(&device), &path, Precision::F32);
    let mut tensors = read_tensors(&path).unwrap();
    let error = |tensors: &BTreeMap<String, Stored>| {
        write_tensors(&path, tensors, Precision::F32, &BTreeMap::new()).unwrap();
        load_module(net(&device), &path).unwrap_err().to_string()
    };
    let weight = tensors.remove("either.weight").unwrap();
    tensors.insert("either.weigth".into(), weight.clone());
    let text = error(&tensors);
    assert!(text.contains("1 missing: `either.weight` (nearest: `either.weigth`)"), "{text}");
    assert!(text.contains("1 not known to the model: `either.weigth`"), "{text}");
    tensors.remove("either.weigth");
    tensors.insert("either.weight".into(), Stored { shape: vec![3, 2], ..weight });
    let text = error(&tensors);
    assert!(text.contains("`either.weight` is [3, 2], expected [2, 3]"), "{text}");
    tensors.insert("either.weight".into(), Stored { shape: vec![2, 3], values: Values::Ints(vec![0; 6]) });
    assert!(error(&tensors).contains("holds integers, expected floats"));
}

#[test]
fn damaged_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    let device = Device::flex();
    save(&net(&device), &path, Precision::F32);
    let whole = files::read(&path).unwrap();
    for length in 0..whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert!(load_module(net(&device), &path).is_err(), "cut to {length} bytes");
    }
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut stream = Rng::new(1).stream(0, 0);
    for _ in 0..5000 {
        let mut bytes = whole.clone();
        for _ in 0..=stream.below(4) {
            bytes[stream.below(header)] = stream.below(256) as u8;
        }
        std::fs::write(&path, &bytes).unwrap();
        // An error or a loaded file; never a panic, never more memory than the file's size.
        let _ = WeightsFile::open(&path).and_then(|file| file.names().try_for_each(|name| file.read(name).map(drop)));
    }
    for length in [u64::MAX, 1 << 40, 99_999_999] {
        let mut bytes = whole.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        std::fs::write(&path, &bytes).unwrap();
        assert!(WeightsFile::open(&path).unwrap_err().to_string().contains("not a whole safetensors file"));
    }
}

#[test]
fn a_bundle_comes_back_and_is_checked() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::flex();
    let run = folder.path().join("run");
    let config = QuantizerConfig::Vq(VqConfig::new(8, 4));
    let quantizer = config.init(&device).unwrap();
    files::create_folder(&run).unwrap();
    assert!(BundlePaths::find(&run).unwrap_err().to_string().contains("not a bundle"));
    files::write_folder(&run.join("bundle"), |root| {
        let mut manifest = Manifest::new("tiles");
        manifest.parts.insert(
            Part::Tokenizer,
            write_part(&BundlePaths::at(root), Part::Tokenizer, &config, &quantizer, Precision::F32)?,
        );
        manifest.classes = vec!["cat".into()];
        manifest.training.insert("steps".into(), 100.into());
        manifest.write(root)
    })
    .unwrap();

    let bundle = BundlePaths::find(&run).unwrap();
    assert_eq!(bundle, BundlePaths::find(&run.join("bundle")).unwrap());
    let manifest = bundle.manifest().unwrap();
    assert_eq!(manifest.parts[&Part::Tokenizer].parameters, 32);
    bundle.verify().unwrap();
    assert!(files::read_text(&bundle.root().join("README.md")).unwrap().contains("| steps | 100 |"));
    let config: QuantizerConfig = read_config(&bundle, Part::Tokenizer).unwrap();
    let loaded = read_weights(&bundle, Part::Tokenizer, config.init(&device).unwrap()).unwrap();
    let codes = Tensor::<2, Int>::from_ints([[0, 1, 2, 3]], &device);
    let decoded = |q: &dyn Quantizer| q.decode(codes.clone(), 2, 2).into_data();
    assert_eq!(decoded(&*loaded), decoded(&*quantizer));
    assert!(
        read_config::<QuantizerConfig>(&bundle, Part::Generator).unwrap_err().to_string().contains("has no generator")
    );

    let mut bytes = files::read(&bundle.weights(Part::Tokenizer)).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    files::write_bytes(&bundle.weights(Part::Tokenizer), &bytes).unwrap();
    assert!(bundle.verify().unwrap_err().to_string().contains("checksum"));
    let text = files::read_text(&bundle.root().join("bundle.json")).unwrap().replace("\"format\": 1", "\"format\": 2");
    files::write_bytes(&bundle.root().join("bundle.json"), text.as_bytes()).unwrap();
    assert!(bundle.manifest().unwrap_err().to_string().contains("bundle format 2 is not supported"));
}

/// What is not what the bundle says, or no number, is not used.
#[test]
fn weights_are_those_of_the_bundle_and_finite() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = BundlePaths::at(folder.path().join("b"));
    let config: QuantizerConfig =
        serde_json::from_value(serde_json::json!({ "kind": "vq", "codes": 8, "channels": 4 })).unwrap();
    let device = Device::flex();
    let open = || read_weights(&bundle, Part::Tokenizer, config.init(&device).unwrap()).map_err(|e| e.to_string());
    let facts = write_part(&bundle, Part::Tokenizer, &config, &config.init(&device).unwrap(), Precision::F32).unwrap();
    let mut manifest = Manifest::new("b");
    manifest.write(bundle.root()).unwrap();
    assert!(open().unwrap_err().contains("bundle.json says nothing of its tokenizer"));
    manifest.parts.insert(Part::Tokenizer, facts.clone());
    manifest.write(bundle.root()).unwrap();
    open().unwrap();
    let mut tensors = read_tensors(&bundle.weights(Part::Tokenizer)).unwrap();
    let Some(Stored { values: Values::Floats(values), .. }) = tensors.get_mut("embedding.weight") else { panic!() };
    values[13] = f32::NAN;
    write_tensors(&bundle.weights(Part::Tokenizer), &tensors, Precision::F32, &BTreeMap::new()).unwrap();
    let error = open().unwrap_err();
    assert!(error.contains(&facts.sha256) && error.contains("do not fit"), "{error}");
    let sha256 = smalti_base::files::sha256_file(&bundle.weights(Part::Tokenizer)).unwrap();
    manifest.parts.insert(Part::Tokenizer, smalti_models::checkpoint::PartFacts { sha256, ..facts });
    manifest.write(bundle.root()).unwrap();
    let error = open().unwrap_err();
    assert!(error.contains("1 of the 32 values of tensor `embedding.weight` are not finite"), "{error}");
    assert!(error.contains("the first is NaN at [3, 1]"), "{error}");
    // Numbers of the configuration are compared with the weights before anything is made of them.
    for settings in [r#""codes": 4294967296"#, r#""codes": 8, "depth": 2147483648"#] {
        let text = format!(r#"{{"kind": "vq", "channels": 4, {settings}}}"#);
        std::fs::write(bundle.config(Part::Tokenizer), text).unwrap();
        let error = read_config::<QuantizerConfig>(&bundle, Part::Tokenizer).unwrap_err().to_string();
        assert!(error.contains("the weights beside it"), "{error}");
    }
}
