//! Laws of tokens that are vectors: tokenizers that make them, generators that predict them.
#![allow(clippy::unwrap_used)]

mod laws;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor, TensorData};
use smalti_base::{Layout, Rng, TokenSpec, Tokens};
use smalti_models::generators::{Draw, GeneratorModel};
use smalti_models::losses::TokenizerLossConfig;
use smalti_models::quantizers::Pass;
use smalti_models::sampling::GuidanceSchedule;
use smalti_models::tokenizers::{Posterior, Tokenizer, TokenizerConfig, TokenizerModel};
use smalti_models::{Codes, Condition, GeneratorConfig, ImageRequest, Known, Request, Sampling};
use smalti_nn::dense::{Pack, WeightPrecision};

const LENGTH: usize = 6;
const CHANNELS: usize = 3;

fn noise<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
    let mut stream = Rng::new(seed).stream(0, 0);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| stream.normal()).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

fn host<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().try_into_vec().unwrap()
}

fn close(a: &[f32], b: &[f32], tolerance: f32) -> bool {
    let size = b.iter().fold(1f32, |size, b| size.max(b.abs()));
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= tolerance * size)
}

fn with_noise(noise_bchw: Tensor<4>) -> Pass {
    Pass { noise_bchw: Some(noise_bchw), ..Pass::default() }
}

fn tokenizer(text: &str) -> TokenizerModel {
    serde_json::from_str::<TokenizerConfig>(text).unwrap().init(&Device::flex()).unwrap()
}

const KL: &str = r#"{ "kind": "kl", "image_size": 16, "ch": 4, "ch_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 2,
    "encoder_attn_resolutions": [8], "z_channels": 3, "embed_dim": 2, "latent_scale": 0.25, "latent_shift": 0.5,
    "patch_size": 2 }"#;

#[test]
fn patches_are_cut_and_joined_exactly() {
    let model = tokenizer(r#"{ "kind": "patches", "image_size": 8, "patch_size": 4 }"#);
    assert_eq!(model.spec(), &TokenSpec::continuous(Layout::Grid { h: 2, w: 2 }, 48, (8, 8)));
    let images = noise([3, 3, 8, 8], 1);
    let codes = model.encode(images.clone()).unwrap();
    assert_eq!(host(model.decode(&codes).unwrap()), host(images.clone()));
    // Inside a token: channel, row, column.
    let tokens = codes.continuous().unwrap();
    let corner =
        |c: usize, y: usize, x: usize| images.clone().slice([0..1, c..c + 1, y..y + 1, x..x + 1]).into_scalar::<f32>();
    let token = host(tokens.slice([0..1, 1..2, 0..48]));
    assert_eq!(
        [token[0], token[1], token[4], token[16]],
        [corner(0, 0, 4), corner(0, 0, 5), corner(0, 1, 4), corner(1, 0, 4)]
    );
    let wrong = serde_json::from_str::<TokenizerConfig>(r#"{ "kind": "patches", "image_size": 9, "patch_size": 4 }"#);
    assert!(wrong.unwrap().init(&Device::flex()).unwrap_err().to_string().contains("not a multiple"));
}

#[test]
fn latents_become_tokens_and_latents_again() {
    let model = tokenizer(KL);
    assert_eq!(model.spec(), &TokenSpec::continuous(Layout::Grid { h: 4, w: 4 }, 8, (16, 16)));
    let images = noise([2, 3, 16, 16], 2);
    let codes = model.encode(images.clone()).unwrap();
    let TokenizerModel::Kl(kl) = &model else { panic!("a KL autoencoder") };
    let moments = kl.moments(images.clone());
    let mean = moments.clone().narrow(1, 0, 2);
    let tokens = codes.clone().continuous().unwrap();
    assert!(close(&host(kl.latents(tokens.clone())), &host(mean.clone()), 1e-6));
    let expected = host((mean - 0.5) * 0.25);
    assert_eq!(host(tokens.clone()).iter().sum::<f32>(), host(tokens.clone()).iter().sum::<f32>());
    let mut sorted = [host(tokens.clone()), expected];
    sorted.iter_mut().for_each(|values| values.sort_by(f32::total_cmp));
    assert!(close(&sorted[0], &sorted[1], 1e-6));
    let known = model.token_moments(images.clone()).unwrap();
    assert_eq!(host(known.means_bnc), host(tokens));
    // Most likely tokens are drawn with noise 0, and an image's tokens with noise 1 are a deviation away.
    let posterior = Posterior::new(moments);
    let one = posterior.sample(Tensor::ones([2, 2, 8, 8], &Device::flex()));
    let zero = posterior.sample(Tensor::zeros([2, 2, 8, 8], &Device::flex()));
    let pass = kl.train_forward(images.clone(), &with_noise(Tensor::zeros([2, 2, 8, 8], &Device::flex())));
    assert!(close(&host(pass.features), &host(kl.features(zero.clone())), 1e-6));
    let away = kl.tokens(one) - kl.tokens(zero);
    assert!(close(&host(away), &host(known.deviations_bnc.unwrap()), 1e-5));
    assert_eq!(model.decode(&codes).unwrap().dims(), [2, 3, 16, 16]);
    // Codes mean nothing to a tokenizer of vectors, and are never taken for some.
    let ids = Codes::Discrete(Tensor::zeros([2, 16], &Device::flex()));
    assert!(model.decode(&ids).unwrap_err().to_string().contains("codes were given"));
    let few = Codes::Continuous(Tensor::zeros([2, 15, 8], &Device::flex()));
    assert!(model.decode(&few).unwrap_err().to_string().contains("15 places"));
    assert_eq!(codes.to_host().unwrap()[0].misfit(model.spec()), None);
}

#[test]
fn numbers_of_a_kl_autoencoder_that_do_not_fit_are_errors() {
    for (from, to, part) in [
        ("\"patch_size\": 2", "\"patch_size\": 3", "patch_size 3 does not divide"),
        ("\"latent_scale\": 0.25", "\"latent_scale\": 0.0", "latent_scale 0 must be above 0"),
        ("\"embed_dim\": 2", "\"embed_dim\": 2, \"quant_conv\": false", "which takes both 1x1 convolutions"),
        ("\"encoder_attn_resolutions\": [8]", "\"encoder_attn_resolutions\": [4]", "encoder: attn_resolutions has 4"),
        ("\"embed_dim\": 2", "\"embed_dim\": 0", "embed_dim must be at least 1"),
    ] {
        let config: TokenizerConfig = serde_json::from_str(&KL.replace(from, to)).unwrap();
        let error = config.init(&Device::flex()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let without = KL.replace("\"embed_dim\": 2", "\"embed_dim\": 3, \"quant_conv\": false, \"post_quant_conv\": false");
    let TokenizerModel::Kl(kl) = tokenizer(&without) else { panic!("a KL autoencoder") };
    assert!(kl.quant_conv.is_none() && kl.post_quant_conv.is_none());
}

#[test]
fn losses_of_tokenizers_of_vectors() {
    let device = Device::flex().autodiff();
    let config = TokenizerLossConfig { l1: 1.0, kl_weight: Some(0.5), ..Default::default() };
    let kl = serde_json::from_str::<TokenizerConfig>(KL).unwrap().init(&device).unwrap();
    let images = noise([2, 3, 16, 16], 3);
    let loss = config.init(kl.spec(), &Device::flex()).unwrap();
    let step = loss.step(&kl, None, images.clone(), &with_noise(noise([2, 2, 8, 8], 4)));
    let term = |name: &str| step.terms.iter().find(|(n, _)| *n == name).unwrap().1.clone().into_scalar::<f32>();
    assert!((term("loss") - term("l1") - 0.5 * term("kl")).abs() < 1e-4);
    assert!(step.codes.is_none() && step.stats.is_none());
    let TokenizerModel::Kl(kl) = &kl else { panic!("a KL autoencoder") };
    assert!(step.gradients.get::<4>(kl.encoder.conv_in.weight.id).is_some());
    // Nothing to train, nothing lost.
    let patches = tokenizer(r#"{ "kind": "patches", "image_size": 16, "patch_size": 4 }"#);
    let step = loss.step(&patches, None, images, &Pass::at(0));
    assert!(step.gradients.is_empty());
    assert_eq!(step.terms[0].1.clone().into_scalar::<f32>(), 0.0);
}

fn generator(kind: &str, condition: &str, more: &str) -> GeneratorConfig {
    let stacks = match kind {
        "mar" => {
            r#""encoder": { "width": 16, "depth": 1, "heads": 2 }, "decoder": { "width": 24, "depth": 2, "heads": 3 }, "buffer": 2"#
        }
        _ => r#""decoder": { "width": 16, "depth": 2, "heads": 2 }"#,
    };
    let text = format!(
        r#"{{ "kind": "{kind}", "condition": {condition}, "condition_dropout": 0.1, {stacks}, "dropout": 0.1,
        "attention_dropout": 0.1, "mlp_ratio": 2, {more}
        "tokens": {{ "layout": {{ "kind": "grid", "h": 2, "w": 3 }}, "channels": 3, "image_size": [4, 6] }},
        "diffusion": {{ "width": 16, "depth": 2, "steps": 100, "schedule": "linear", "sampling_steps": "4", "repeats": 2 }} }}"#
    );
    serde_json::from_str(&text).unwrap()
}

/// Each generator with each condition, and a condition for it.
fn all() -> Vec<(GeneratorConfig, Condition)> {
    let (none, class) = (r#"{ "kind": "none" }"#, r#"{ "kind": "class", "classes": 5 }"#);
    let mut all =
        vec![(generator("mar", none, ""), Condition::none()), (generator("mar", class, ""), Condition::class(3))];
    all.extend(laws::generators(false));
    all
}

/// A model whose weights come from smalti's generator, large enough that conditions and tokens matter.
fn model(config: &GeneratorConfig) -> GeneratorModel {
    struct Fill(u64);
    impl ModuleMapper for Fill {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            self.0 += 1;
            let mut stream = Rng::new(3).stream(self.0, 0);
            param.map(|old| {
                let shape = old.shape();
                let values: Vec<f32> = (0..shape.num_elements()).map(|_| 0.2 * stream.normal()).collect();
                let noise = Tensor::<D>::from_data(TensorData::new(values, shape), &old.device());
                if D == 1 { old + noise } else { noise }
            })
        }
    }
    config.init(&Device::flex()).unwrap().map(&mut Fill(0))
}

fn image(condition: &Condition, seed: u64, known: Option<Known>) -> ImageRequest {
    ImageRequest { known, ..ImageRequest::new(condition.clone(), seed) }
}

fn generate(model: &GeneratorModel, images: Vec<ImageRequest>, sampling: &Sampling) -> Vec<Vec<f32>> {
    let mut generation = model.start(&Request::new(images, sampling.clone())).unwrap();
    for done in 0..generation.steps() {
        assert_eq!(generation.done(), done);
        generation.step().unwrap();
    }
    let rows = |codes: Codes| {
        let row = |tokens| match tokens {
            Tokens::Continuous(values) => values,
            Tokens::Discrete(_) => panic!("tokens are vectors"),
        };
        codes.to_host().unwrap().into_iter().map(row).collect::<Vec<Vec<f32>>>()
    };
    let end = rows(generation.codes());
    generation.step().unwrap();
    assert_eq!((generation.done(), rows(generation.codes())), (generation.steps(), end.clone()));
    assert!(end.iter().flatten().all(|value| value.is_finite()));
    end
}

#[test]
fn an_image_depends_neither_on_its_batch_nor_on_packing() {
    for (config, condition) in all() {
        let model = model(&config);
        let guidance = if condition == Condition::none() { 1.0 } else { 2.0 };
        let sampling = Sampling { guidance, temperature: 0.9, ..Default::default() };
        let batch: Vec<_> = (0..5).map(|seed| image(&condition, seed, None)).collect();
        let together = generate(&model, batch.clone(), &sampling);
        let packed = model.pack(WeightPrecision::F32);
        for (i, request) in batch.iter().enumerate() {
            let alone = generate(&model, vec![request.clone()], &sampling);
            assert!(close(&alone[0], &together[i], 1e-3), "{config:?}, image {i}: {alone:?} {:?}", together[i]);
        }
        for (found, expected) in generate(&packed, batch.clone(), &sampling).iter().zip(&together) {
            assert!(close(found, expected, 1e-3), "{config:?}");
        }
        assert!(packed.clone().dense_layers().iter().all(|layer| layer.packed().is_some()));
        assert!(!close(&together[0], &together[1], 1e-2), "seeds differ");
    }
}

#[test]
fn known_tokens_are_kept_and_matter() {
    for (config, condition) in all() {
        let model = model(&config);
        let keep = [true, false, false, true, false, true];
        let known = |size: f32| {
            let values: Vec<f32> = (0..LENGTH * CHANNELS).map(|i| size * (i as f32 * 0.7).sin()).collect();
            Known { tokens: values.into(), keep: keep.to_vec() }
        };
        let draw = |size: f32, others: usize| {
            let mut images = vec![image(&condition, 0, Some(known(size)))];
            // Images of which more or nothing is known do not disturb.
            let most = Known { keep: vec![true, true, true, false, true, true], ..known(1.0) };
            images.extend([image(&condition, 1, None), image(&condition, 2, Some(most))].into_iter().take(others));
            let found = generate(&model, images, &Sampling::default()).swap_remove(0);
            let Tokens::Continuous(given) = known(size).tokens else { panic!("vectors") };
            for place in (0..LENGTH).filter(|place| keep[*place]) {
                let at = place * CHANNELS..(place + 1) * CHANNELS;
                assert_eq!(found[at.clone()], given[at], "{config:?}");
            }
            found.chunks(CHANNELS).zip(keep).filter(|(_, keep)| !keep).flat_map(|(token, _)| token.to_vec()).collect()
        };
        let alone: Vec<f32> = draw(1.0, 0);
        assert!(close(&draw(1.0, 2), &alone, 1e-3), "{config:?}");
        assert!(!close(&draw(-1.0, 0), &alone, 1e-3), "what is known changes what is drawn: {config:?}");
        let all = Known { keep: vec![true; LENGTH], ..known(1.0) };
        let Tokens::Continuous(given) = all.tokens.clone() else { panic!("vectors") };
        assert_eq!(generate(&model, vec![image(&condition, 0, Some(all))], &Sampling::default()), [given]);
    }
}

#[test]
fn guidance_is_off_at_one_and_unconditional_at_zero() {
    for (config, condition) in all().into_iter().filter(|(_, condition)| *condition != Condition::none()) {
        let model = model(&config);
        let with = |condition: &Condition, guidance, guidance_schedule| {
            let sampling = Sampling { guidance, guidance_schedule, ..Default::default() };
            generate(&model, (0..3).map(|seed| image(condition, seed, None)).collect(), &sampling).concat()
        };
        let off = with(&condition, 1.0, GuidanceSchedule::Constant);
        assert!(close(&with(&condition, 1.000_001, GuidanceSchedule::Constant), &off, 1e-2), "{config:?}");
        assert!(!close(&with(&condition, 4.0, GuidanceSchedule::Constant), &off, 1e-2), "{config:?}");
        let linear = with(&condition, 4.0, GuidanceSchedule::Linear);
        assert!(!close(&linear, &with(&condition, 4.0, GuidanceSchedule::Constant), 1e-2), "{config:?}");
        // Guidance 0 is the unconditional model, but for the variance, which DDIM does not use.
        let json = serde_json::to_string(&config).unwrap().replace(r#""kind":"ancestral""#, r#""kind":"ddim""#);
        let model = self::model(&serde_json::from_str(&json).unwrap());
        let with = |condition: &Condition, guidance| {
            let sampling = Sampling { guidance, ..Default::default() };
            generate(&model, (0..3).map(|seed| image(condition, seed, None)).collect(), &sampling).concat()
        };
        let none = with(&Condition::none(), 1.0);
        assert!(close(&with(&condition, 0.0), &none, 1e-3), "{config:?}");
        assert!(!close(&with(&condition, 1.0), &none, 1e-2), "{config:?}");
    }
}

#[test]
fn losses_have_gradients_and_validation_does_not_depend_on_batches() {
    for (config, condition) in all() {
        let model = model(&config).train();
        let conditions = vec![condition; 4];
        let codes = Codes::Continuous(noise([4, LENGTH, CHANNELS], 7));
        let loss = model.loss(codes.clone(), &conditions, &mut Draw::new(&mut Rng::new(1).stream(0, 0), 0)).unwrap();
        assert!(loss.nats_per_token.is_none() && loss.loss.clone().into_scalar::<f32>().is_finite());
        let _ = loss.loss.backward();
        let plain = model.valid();
        let value = |codes: Codes, first: u64| {
            let n = codes.batch();
            plain.validation_loss(codes, &conditions[..n], first).unwrap().loss.into_scalar::<f32>()
        };
        let whole = value(codes.clone(), 0);
        let halves = (value(codes.narrow(0, 2), 0) + value(codes.narrow(2, 2), 2)) / 2.0;
        assert!((whole - halves).abs() < 1e-3 * whole.abs(), "{config:?}: {whole} and {halves}");
        assert!(plain.predictions(codes, &conditions, 0).unwrap_err().to_string().contains("probabilities"));
        let wrong = Codes::Continuous(noise([4, LENGTH, 2], 7));
        assert!(model.loss(wrong, &conditions, &mut Draw::new(&mut Rng::new(1).stream(0, 0), 0)).is_err());
        let ids = Codes::Discrete(Tensor::from_data(TensorData::new(vec![0i32; 24], [4, LENGTH]), &Device::flex()));
        assert!(model.loss(ids, &conditions, &mut Draw::new(&mut Rng::new(1).stream(0, 0), 0)).is_err());
    }
}

#[test]
fn requests_and_settings_that_do_not_fit_are_refused() {
    let class = r#"{ "kind": "class", "classes": 5 }"#;
    for kind in ["mar", "causal_mar"] {
        let model = model(&generator(kind, class, ""));
        let refused = |known: Option<Known>, sampling: Sampling, text: &str| {
            let request = Request::new(vec![image(&Condition::class(1), 0, known)], sampling);
            let error = model.start(&request).err().unwrap().to_string();
            assert!(error.contains(text), "{error}");
        };
        refused(None, Sampling { top_k: Some(5.into()), ..Default::default() }, "top_k");
        refused(None, Sampling { top_p: Some(0.5.into()), ..Default::default() }, "top_p");
        let steps = Some("101".parse().unwrap());
        refused(None, Sampling { diffusion_steps: steps, ..Default::default() }, "cannot be taken from 100");
        let codes = Known { tokens: vec![0u32; LENGTH].into(), keep: vec![true; LENGTH] };
        refused(Some(codes), Sampling::default(), "codes where tokens are vectors");
        let short = Known { tokens: vec![0f32; 5].into(), keep: vec![true; LENGTH] };
        refused(Some(short), Sampling::default(), "5 numbers");
        let text = r#"{ "kind": "text", "vocabulary": 9, "length": 4 }"#;
        let error = generator(kind, text, "").init(&Device::flex()).unwrap_err().to_string();
        assert!(error.contains("a caption"), "{error}");
        let json = serde_json::to_string(&generator(kind, class, "")).unwrap();
        let few = json.replace("\"steps\":100", "\"steps\":20");
        let error = serde_json::from_str::<GeneratorConfig>(&few).unwrap().init(&Device::flex()).unwrap_err();
        assert!(error.to_string().contains("too few"), "{error}");
        let codes = json.replace("\"channels\":3", "\"vocabulary\":16");
        let error = serde_json::from_str::<GeneratorConfig>(&codes).unwrap().init(&Device::flex()).unwrap_err();
        assert!(error.to_string().contains("must be vectors"), "{error}");
    }
    let mar = model(&generator("mar", class, ""));
    let request = |steps| {
        let sampling = Sampling { steps: Some(steps), ..Default::default() };
        Request::new(vec![image(&Condition::none(), 0, None)], sampling)
    };
    assert!(mar.start(&request(LENGTH + 1)).err().unwrap().to_string().contains("7 steps"));
    assert_eq!(mar.start(&request(LENGTH)).unwrap().steps(), LENGTH);
}
