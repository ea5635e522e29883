//! RQ-Transformer: caches, known tokens, losses and settings.
#![allow(clippy::unwrap_used)]

mod draws;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use smalti_base::{Layout, OneOrEach, Rng, TokenSpec, Vocabulary};
use smalti_models::generators::rq_transformer::{CodebookConfig, Vectors};
use smalti_models::generators::{Draw, Padding, RqTransformer, RqTransformerConfig, SoftTargets};
use smalti_models::quantizers::{QuantizerConfig, ResidualConfig};
use smalti_models::sampling::{Sampling, Seeded};
use smalti_models::tokenizers::{Vqgan, VqganConfig};
use smalti_models::{
    Codes, Condition, ConditionConfig, Conditions, Generation, Generator, GeneratorModel, ImageRequest, Known, Request,
};
use smalti_nn::dense::{Pack, WeightPrecision};

const LAYOUT: Layout = Layout::Stack { h: 2, w: 3, depth: 3 };
const LENGTH: usize = 18;

fn class() -> Conditions {
    ConditionConfig::Class { classes: 4 }.into()
}

/// A small model of a stack of codes, the numbers of which differ from depth to depth.
fn config(condition: Conditions) -> RqTransformerConfig {
    let text = format!(
        r#"{{ "tokens": {{ "layout": {{ "kind": "stack", "h": 2, "w": 3, "depth": 3 }}, "vocabulary": [5, 7, 6],
            "image_size": [16, 24] }}, "width": 16, "depth": 2, "head_depth": 2, "heads": 2,
            "codebook": {{ "channels": 4, "shared": false }}, "condition": {} }}"#,
        serde_json::to_string(&condition).unwrap()
    );
    serde_json::from_str(&text).unwrap()
}

/// Own vectors, a classifier for each depth, no sums.
fn own(condition: Conditions) -> RqTransformerConfig {
    RqTransformerConfig {
        body_vectors: Vectors::Own,
        head_vectors: Vectors::Own,
        codebook: None,
        shared_vectors: false,
        cumulative: false,
        shared_classifier: false,
        ..config(condition)
    }
}

fn make(config: &RqTransformerConfig, device: &Device) -> RqTransformer {
    let _alone = draws::seeded(device, 5);
    let mut model = config.init(device).expect("the settings are in range");
    // First values are small; larger ones tell mistakes apart.
    struct Louder;
    impl burn::module::ModuleMapper for Louder {
        fn map_float<const D: usize>(
            &mut self,
            param: burn::module::Param<Tensor<D>>,
        ) -> burn::module::Param<Tensor<D>> {
            param.map(|value| value * 8.0)
        }
    }
    model = model.map(&mut Louder);
    model
}

fn request(count: u64, condition: impl Fn(u64) -> Condition, sampling: Sampling) -> Request {
    Request::new((0..count).map(|i| ImageRequest::new(condition(i), 100 + i)).collect(), sampling)
}

fn ints(codes: Codes) -> Vec<i64> {
    codes.discrete().expect("codes").into_data().iter::<i64>().collect()
}

/// Logits of a whole generation, step by step, and its codes.
fn steps(model: &RqTransformer, request: &Request) -> (Vec<Vec<f32>>, Tensor<2, Int>) {
    let draws = Seeded::new(request.images.iter().map(|image| image.seed));
    let mut generation = model.start_with(request, Box::new(draws)).unwrap();
    let mut all = Vec::new();
    while generation.done() < generation.steps() {
        let logits = generation.logits().unwrap();
        all.push(logits.clone());
        generation.decide(logits);
    }
    (all, generation.codes().discrete().unwrap())
}

/// The logits of each step are those that the whole picture gives in one pass, with guidance the combination of two.
#[test]
fn caches_change_nothing() {
    let device = Device::flex();
    for config in [config(class()), own(class()), config(Conditions::none()), own(Conditions::none())] {
        for guidance in [1.0, 2.5] {
            let guided = guidance != 1.0;
            if guided && config.condition.is_none() {
                continue;
            }
            let config = RqTransformerConfig { condition_dropout: if guided { 0.1 } else { 0.0 }, ..config.clone() };
            let model = make(&config, &device);
            let condition = |i| if config.condition.is_none() { Condition::none() } else { Condition::class(i as u32) };
            let sampling = Sampling { guidance, ..Default::default() };
            let (found, codes) = steps(&model, &request(2, condition, sampling));
            let logits = |ids: Vec<i64>| {
                let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [2, 1]), &device);
                model.logits(model.pass(ids, codes.clone()).head_out)
            };
            let given = if config.condition.is_none() { vec![0, 0] } else { vec![0, 1] };
            let whole = match guided {
                true => {
                    let (with, without) = (logits(given), logits(vec![4, 4]));
                    let finite = without.clone().mask_fill(without.clone().is_inf(), 0.0);
                    (with - finite.clone()) * guidance + finite
                }
                false => logits(given),
            };
            let whole: Vec<f32> = whole.into_data().iter::<f32>().collect();
            for (step, logits) in found.iter().enumerate() {
                for (i, value) in logits.iter().enumerate() {
                    let expected = whole[((i / 7) * LENGTH + step) * 7 + i % 7];
                    let same = *value == expected || (value - expected).abs() < 2e-4 * (1.0 + expected.abs());
                    assert!(same, "guidance {guidance}, step {step}, logit {i}: {value}, expected {expected}");
                }
            }
            let vocabulary = config.tokens.vocabularies().cloned().unwrap();
            for (place, code) in ints(Codes::Discrete(codes)).into_iter().enumerate() {
                assert!((code as usize) < vocabulary.of(place % 3), "code {code} at depth {}", place % 3);
            }
        }
    }
}

#[test]
fn a_picture_does_not_depend_on_its_batch() {
    let device = Device::flex();
    let model = make(&config(class()), &device);
    let condition = |i| Condition::class(i as u32 % 4);
    let all = ints(model.start(&request(5, condition, Sampling::default())).unwrap().finish().unwrap());
    for i in [0, 3] {
        let mut alone = request(5, condition, Sampling::default());
        alone.images = vec![alone.images[i].clone()];
        let found = ints(model.start(&alone).unwrap().finish().unwrap());
        assert_eq!(found, all[i * LENGTH..][..LENGTH]);
    }
    let packed = GeneratorModel::RqTransformer(model).pack(WeightPrecision::F32);
    assert_eq!(ints(packed.start(&request(5, condition, Sampling::default())).unwrap().finish().unwrap()), all);
}

/// Any pattern of tokens can be known; what is made of the others is what a generation that came to the same tokens makes.
#[test]
fn known_tokens_are_kept_and_count_like_drawn_ones() {
    let device = Device::flex();
    let model = make(&config(class()), &device);
    let condition = |_| Condition::class(2);
    let free = ints(model.start(&request(2, condition, Sampling::default())).unwrap().finish().unwrap());
    let patterns: [&dyn Fn(usize) -> bool; 5] =
        [&|_| true, &|place| place < 7, &|place| place % 3 == 0, &|place| place >= 9, &|place| (place / 3) % 2 == 1];
    for keeps in patterns {
        let mut asked = request(2, condition, Sampling::default());
        for (image, codes) in asked.images.iter_mut().zip(free.chunks(LENGTH)) {
            let codes: Vec<u32> = codes.iter().map(|code| *code as u32).collect();
            image.known = Some(Known { tokens: codes.into(), keep: (0..LENGTH).map(keeps).collect() });
        }
        assert_eq!(ints(model.start(&asked).unwrap().finish().unwrap()), free);
        // Another picture's tokens are kept as well.
        for image in &mut asked.images {
            image.known.as_mut().unwrap().tokens = vec![4u32; LENGTH].into();
            image.seed += 1000;
        }
        let found = ints(model.start(&asked).unwrap().finish().unwrap());
        assert!(found.iter().enumerate().all(|(i, code)| !keeps(i % LENGTH) || *code == 4));
    }
}

#[test]
fn sampling_settings_may_differ_from_depth_to_depth() {
    let device = Device::flex();
    let model = make(&config(Conditions::none()), &device);
    let greedy_first = Sampling { top_k: Some(OneOrEach::Each(vec![1, 7, 7])), ..Default::default() };
    let (logits, codes) = steps(&model, &request(2, |_| Condition::none(), greedy_first));
    let codes = ints(Codes::Discrete(codes));
    for (step, logits) in logits.iter().enumerate().filter(|(step, _)| step % 3 == 0) {
        for image in 0..2 {
            let best = smalti_models::sampling::argmax(&logits[image * 7..][..7]);
            assert_eq!(codes[image * LENGTH + step], best as i64);
        }
    }
    let short = Sampling { top_p: Some(OneOrEach::Each(vec![0.5, 0.9])), ..Default::default() };
    let error = model.start(&request(1, |_| Condition::none(), short)).err().unwrap().to_string();
    assert!(error.contains("top_p") && error.contains("3 codes"), "{error}");
    let text = r#"{ "top_k": 5, "top_p": [0.9, 0.5, 1.0] }"#;
    let sampling: Sampling = serde_json::from_str(text).unwrap();
    assert_eq!((sampling.at(1).top_k, sampling.at(1).top_p), (Some(5.into()), Some(0.5.into())));
    let written = serde_json::to_value(&sampling).unwrap();
    assert_eq!((&written["top_k"], &written["top_p"][1]), (&5.into(), &0.5.into()));
}

fn codes(device: &Device) -> Tensor<2, Int> {
    let mut stream = Rng::new(2).stream(0, 0);
    let values: Vec<i64> = (0..2 * LENGTH).map(|place| stream.below([5, 7, 6][place % 3]) as i64).collect();
    Tensor::from_data(TensorData::new(values, [2, LENGTH]), device)
}

fn scalar(value: Tensor<1>) -> f64 {
    f64::from(value.into_scalar::<f32>())
}

/// Distributions that are certain are as good as the codes themselves, and the loss is the mean over depths.
#[test]
fn losses_agree_where_they_must() {
    let device = Device::flex();
    for config in [config(class()), own(class())] {
        let model = make(&config, &device);
        let (codes, given) = (codes(&device), vec![Condition::class(0), Condition::class(3)]);
        let mut stream = Rng::new(0).stream(0, 0);
        let certain: Tensor<3> = codes.clone().one_hot::<3>(7).float();
        let soft = Codes::Soft { codes: codes.clone(), probabilities_blv: certain };
        let soft = model.loss(soft, &given, &mut Draw::new(&mut stream, 0)).unwrap();
        let hard = model.loss(Codes::Discrete(codes.clone()), &given, &mut Draw::new(&mut stream, 0)).unwrap();
        let (soft_loss, hard_loss) = (scalar(soft.loss), scalar(hard.loss));
        assert!((soft_loss - hard_loss).abs() < 1e-5, "{soft_loss}, {hard_loss}");
        assert!((scalar(soft.nats_per_token.unwrap()) - hard_loss).abs() < 1e-6);
        let ids = Tensor::<2, Int>::from_data(TensorData::new(vec![0i64, 3], [2, 1]), &device);
        let by_depth = model.depth_losses(&model.pass(ids, codes.clone()), codes);
        assert!((scalar(by_depth.mean()) - hard_loss).abs() < 1e-6);
    }
}

/// The image counts for nine tenths and the caption for one; hidden captions do not count.
#[test]
fn captions_are_predicted() {
    let device = Device::flex().autodiff();
    let text = |padding| Conditions::from(ConditionConfig::Text { vocabulary: 9, length: 4, padding });
    let config = RqTransformerConfig { text_share: 0.25, ..config(text(Padding::Id(0))) };
    let model = make(&config, &device);
    let given = vec![Condition::text(vec![3, 8, 2]), Condition::text(vec![1])];
    let ids = config.condition.batch(&given, None, &device).unwrap();
    let pass = model.pass(ids.clone(), codes(&device));
    let text_loss = scalar(model.text_loss(&pass, ids).unwrap());
    let logits: Vec<f64> = model.text_logits(pass.body_out).unwrap().into_data().iter::<f64>().collect();
    let targets = [8, 2, 0, 0, 0, 0];
    let expected = logits.chunks(9).zip(targets).map(|(row, target)| {
        let total: f64 = row.iter().map(|logit| logit.exp()).sum();
        total.ln() - row[target]
    });
    let expected = expected.sum::<f64>() / 6.0;
    assert!((text_loss - expected).abs() < 1e-4, "{text_loss}, expected {expected}");
    let mut stream = Rng::new(0).stream(0, 0);
    let both = model.loss(Codes::Discrete(codes(&device)), &given, &mut Draw::new(&mut stream, 0)).unwrap();
    let image = model.predictions(Codes::Discrete(codes(&device)), &given, 0).unwrap().loss();
    let expected = 0.75 * scalar(image.loss) + 0.25 * text_loss;
    assert!((scalar(both.loss) - expected).abs() < 1e-4);
    // All captions hidden behind the null id: only the image counts, and nothing is NaN.
    let hidden = RqTransformerConfig { condition_dropout: 1.0, condition: text(Padding::Null), ..config };
    let model = make(&hidden, &device);
    let loss = model.loss(Codes::Discrete(codes(&device)), &given, &mut Draw::new(&mut stream, 0)).unwrap();
    let nothing = vec![Condition::none(); 2];
    let image = model.predictions(Codes::Discrete(codes(&device)), &nothing, 0).unwrap().loss();
    assert!((scalar(loss.loss) - 0.75 * scalar(image.loss)).abs() < 1e-4);
}

fn tokenizer(quantizer: ResidualConfig, device: &Device) -> Vqgan {
    let text = r#"{ "image_size": 24, "ch": 8, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "z_channels": 4, "embed_dim": 4,
        "norm_groups": 4, "quantizer": { "kind": "fsq", "levels": [2], "channels": 4 } }"#;
    let mut config: VqganConfig = serde_json::from_str(text).unwrap();
    config.quantizer = QuantizerConfig::Residual(quantizer);
    config.init(device).unwrap()
}

#[test]
fn code_vectors_come_from_the_tokenizer() {
    let device = Device::flex();
    let codes = Vocabulary::Each(vec![5, 7, 6]);
    let quantizer = ResidualConfig { shared: false, codes, ..ResidualConfig::new(1, 4, 3) };
    let tokenizer = tokenizer(quantizer.clone(), &device);
    let mut model = make(&config(class()), &device);
    model.adopt(&tokenizer).unwrap();
    let smalti_models::quantizers::QuantizerModel::Residual(residual) = &tokenizer.quantize else { panic!() };
    for (depth, table) in model.vectors.iter().enumerate() {
        assert_eq!(table.val().into_data(), residual.vectors(depth).into_data());
        assert!(!table.is_require_grad());
    }
    let other = self::tokenizer(ResidualConfig { depth: 2, codes: vec![5, 7].into(), ..quantizer }, &device);
    assert!(model.adopt(&other).unwrap_err().to_string().contains("code vectors"));
    let mut alone = make(&own(class()), &device);
    alone.adopt(&other).unwrap();
}

#[test]
fn settings_that_do_not_fit_are_errors() {
    let device = Device::flex();
    let base = config(class());
    let grid = TokenSpec::discrete(Layout::Grid { h: 4, w: 4 }, 8, (32, 32));
    for (config, part) in [
        (RqTransformerConfig { tokens: grid, ..base.clone() }, "a stack"),
        (
            RqTransformerConfig { tokens: TokenSpec::discrete(LAYOUT, vec![4, 4], (16, 24)), ..base.clone() },
            "2 vocabularies",
        ),
        (RqTransformerConfig { heads: 3, ..base.clone() }, "not a multiple"),
        (RqTransformerConfig { head_heads: Some(5), ..base.clone() }, "not a multiple"),
        (RqTransformerConfig { text_share: 1.0, ..base.clone() }, "text_share"),
        (RqTransformerConfig { codebook: None, ..base.clone() }, "no codebook"),
        (
            RqTransformerConfig { codebook: Some(CodebookConfig { channels: 4, shared: true }), ..base.clone() },
            "different numbers",
        ),
        (RqTransformerConfig { head_vectors: Vectors::Own, ..base.clone() }, "cumulative"),
        (
            RqTransformerConfig {
                soft_targets: Some(SoftTargets { temperature: 0.0, stochastic: true }),
                ..base.clone()
            },
            "temperature",
        ),
    ] {
        let error = config.init(&device).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    // Without hidden conditions in training there is no vector for a missing one, as in the official tables.
    let model = make(&base, &device);
    assert_eq!(model.condition.table.dims(), [4, 16]);
    let error = model.start(&request(1, |_| Condition::none(), Sampling::default())).err().unwrap().to_string();
    assert!(error.contains("no vector for a missing condition"), "{error}");
    assert_eq!(make(&RqTransformerConfig { condition_dropout: 0.1, ..base }, &device).condition.table.dims(), [5, 16]);
}
