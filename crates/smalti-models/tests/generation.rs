//! Laws that hold for every generator: batches, seeds, known tokens, guidance, conditions.

#![allow(clippy::unwrap_used)]

mod laws;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use smalti_base::{Layout, Rng, TokenSpec};
use smalti_models::generators::gpt::Window;
use smalti_models::generators::{Conditions, Draw, GptConfig, MaskGitConfig, TokenOrder, VarConfig};
use smalti_models::quantizers::multi_scale::Refinement;
use smalti_models::quantizers::{MultiScaleConfig, QuantizerConfig, QuantizerModel, VqConfig};
use smalti_models::sampling::{GuidanceSchedule, Schedule};
use smalti_models::tokenizers::VqganConfig;
use smalti_models::{
    Codes, Condition, ConditionConfig, Generation, Generator, GeneratorConfig, GeneratorModel, ImageRequest, Known,
    Request, Sampling,
};
use smalti_nn::dense::{Pack, WeightPrecision};

const LENGTH: usize = 12;
const CODES: usize = 24;

fn tokens() -> TokenSpec {
    TokenSpec::discrete(Layout::Grid { h: 3, w: 4 }, CODES, (24, 32))
}

fn gpt(condition: ConditionConfig, visible_prefix: bool) -> GeneratorConfig {
    GeneratorConfig::Gpt(GptConfig {
        condition_dropout: 0.1,
        mlp_ratio: 2,
        dropout: 0.1,
        attention_dropout: 0.1,
        visible_prefix,
        ..GptConfig::new(tokens(), condition, 32, 2, 4)
    })
}

fn shuffled(condition: ConditionConfig) -> GeneratorConfig {
    let GeneratorConfig::Gpt(config) = gpt(condition, false) else { unreachable!() };
    GeneratorConfig::Gpt(GptConfig { order: TokenOrder::Random, block_size: Some(20), pkeep: 0.7, ..config })
}

fn maskgit(condition: ConditionConfig) -> GeneratorConfig {
    GeneratorConfig::MaskGit(MaskGitConfig {
        tokens: tokens(),
        condition: condition.into(),
        condition_dropout: 0.1,
        width: 32,
        depth: 2,
        heads: 4,
        mlp_ratio: 2,
        hidden: None,
        dropout: 0.1,
        attention_dropout: 0.1,
        schedule: Schedule::Cosine,
        label_smoothing: 0.1,
        min_masking_rate: 0.0,
    })
}

/// Four levels of [`LENGTH`] tokens.
fn var(condition: ConditionConfig, shared_modulation: bool) -> GeneratorConfig {
    let layout = Layout::Pyramid { levels: vec![(1, 1), (1, 1), (1, 1), (3, 3)] };
    GeneratorConfig::Var(VarConfig {
        tokens: TokenSpec { layout, ..tokens() },
        channels: 4,
        refinement: Refinement { weight: 0.5, convolutions: 2 },
        condition: condition.into(),
        condition_dropout: 0.1,
        width: 32,
        depth: 2,
        heads: 4,
        mlp_ratio: 2,
        hidden: None,
        unit_attention: !shared_modulation,
        shared_modulation,
        drop_path: 0.2,
        label_smoothing: 0.1,
        norm_epsilon: 1e-6,
        first_gain: 1e-5,
    })
}

/// Each generator with each condition, and a condition for it.
fn all() -> Vec<(GeneratorConfig, Condition)> {
    let class = ConditionConfig::Class { classes: 5 };
    let text = ConditionConfig::text(30, 6);
    let mut all = vec![
        (gpt(ConditionConfig::None, false), Condition::none()),
        (gpt(class.clone(), false), Condition::class(3)),
        (shuffled(class.clone()), Condition::class(3)),
        (gpt(text.clone(), false), Condition::text(vec![4, 29, 0])),
        (gpt(text, true), Condition::text(vec![4, 29, 0])),
        (var(ConditionConfig::None, true), Condition::none()),
        (var(class, false), Condition::class(3)),
    ];
    all.extend(laws::generators(true));
    all
}

/// A model whose weights come from smalti's generator: large enough that logits differ clearly.
fn model(config: &GeneratorConfig) -> GeneratorModel {
    struct Fill(u64);
    impl burn::module::ModuleMapper for Fill {
        fn map_float<const D: usize>(
            &mut self,
            param: burn::module::Param<Tensor<D>>,
        ) -> burn::module::Param<Tensor<D>> {
            self.0 += 1;
            let mut stream = Rng::new(3).stream(self.0, 0);
            param.map(|old| {
                let shape = old.shape();
                let values: Vec<f32> = (0..shape.num_elements()).map(|_| 0.3 * stream.normal()).collect();
                let data = TensorData::new(values, shape);
                let noise = Tensor::<D>::from_data(data, &old.device());
                // Scales stay near 1 and shifts near 0.
                if D == 1 { old + noise } else { noise }
            })
        }
    }
    config.init(&Device::flex()).unwrap().map(&mut Fill(0))
}

fn image(condition: &Condition, seed: u64, known: Option<Known>) -> ImageRequest {
    ImageRequest { known, ..ImageRequest::new(condition.clone(), seed) }
}

fn generate(model: &GeneratorModel, images: Vec<ImageRequest>, sampling: &Sampling) -> Vec<Vec<i64>> {
    let mut generation = model.start(&Request::new(images, sampling.clone())).unwrap();
    let steps = generation.steps();
    for done in 0..steps {
        assert_eq!(generation.done(), done);
        generation.step().unwrap();
    }
    let end = rows(generation.codes().discrete().unwrap());
    generation.step().unwrap();
    assert_eq!((generation.done(), rows(generation.codes().discrete().unwrap())), (steps, end.clone()));
    assert!(end.iter().flatten().all(|code| (0..CODES as i64).contains(code)));
    end
}

fn rows(codes: Tensor<2, Int>) -> Vec<Vec<i64>> {
    let n = codes.dims()[1];
    codes.into_data().iter::<i64>().collect::<Vec<_>>().chunks(n).map(<[i64]>::to_vec).collect()
}

fn codes(n: usize) -> Codes {
    let mut stream = Rng::new(5).stream(0, 0);
    let values: Vec<i32> = (0..n * LENGTH).map(|_| stream.below(CODES) as i32).collect();
    Codes::Discrete(Tensor::from_data(TensorData::new(values, [n, LENGTH]), &Device::flex()))
}

#[test]
fn an_image_does_not_depend_on_its_batch() {
    for (config, condition) in all() {
        let model = model(&config);
        let guidance = if condition == Condition::none() { 1.0 } else { 2.0 };
        let sampling = Sampling { guidance, top_k: Some(20.into()), top_p: Some(0.95.into()), ..Default::default() };
        let batch: Vec<_> = (0..5).map(|seed| image(&condition, seed, None)).collect();
        let together = generate(&model, batch.clone(), &sampling);
        for (i, request) in batch.iter().enumerate() {
            assert_eq!(generate(&model, vec![request.clone()], &sampling)[0], together[i], "{config:?}, image {i}");
        }
        let reversed: Vec<_> = batch.into_iter().rev().collect();
        assert!(generate(&model, reversed, &sampling).iter().eq(together.iter().rev()));
        assert_ne!(together[0], together[1], "seeds differ");
    }
}

#[test]
fn nor_do_images_of_packed_weights() {
    for (config, condition) in all() {
        let model = model(&config);
        let sampling = Sampling { top_k: Some(20.into()), ..Default::default() };
        let batch: Vec<_> = (0..9).map(|seed| image(&condition, seed, None)).collect();
        let exact = generate(&model, batch.clone(), &sampling);
        for precision in WeightPrecision::ALL {
            let packed = model.pack(precision);
            let together = generate(&packed, batch.clone(), &sampling);
            for (i, request) in batch.iter().enumerate() {
                assert_eq!(generate(&packed, vec![request.clone()], &sampling)[0], together[i], "{precision} {i}");
            }
            assert!(precision != WeightPrecision::F32 || together == exact, "{config:?}");
            // Generating does not unpack the weights.
            assert!(packed.clone().dense_layers().iter().all(|layer| layer.packed().is_some()));
        }
    }
}

#[test]
fn a_known_beginning_is_the_same_at_once_and_token_by_token() {
    let known = |n: usize| Known {
        tokens: (3..LENGTH as u32 + 3).collect::<Vec<_>>().into(),
        keep: (0..LENGTH).map(|i| i < n).collect(),
    };
    for (config, condition) in all() {
        let model = model(&config);
        let sampling = Sampling::default();
        // Beside an image of which nothing is known, each token is fed by itself.
        let with = |n: usize| image(&condition, 7, Some(known(n)));
        let beside = generate(&model, vec![with(8), image(&condition, 1, None)], &sampling);
        assert_eq!(generate(&model, vec![with(8)], &sampling)[0], beside[0], "{config:?}");
        // Gaps and an unknown beginning.
        let gaps = Known { keep: (0..LENGTH).map(|i| i % 5 != 0).collect(), ..known(0) };
        let gaps = image(&condition, 7, Some(gaps));
        let beside = generate(&model, vec![gaps.clone(), image(&condition, 1, None)], &sampling);
        assert_eq!(generate(&model, vec![gaps], &sampling)[0], beside[0], "{config:?}");
    }
}

#[test]
fn cached_decoding_equals_argmax_of_teacher_forced_logits() {
    for (config, condition) in all() {
        let model = model(&config);
        let ids = config.conditions().batch(std::slice::from_ref(&condition), None, &Device::flex()).unwrap();
        let sampling = Sampling { temperature: 0.0, ..Default::default() };
        let found = generate(&model, vec![image(&condition, 0, None)], &sampling);
        let codes = Tensor::<2, Int>::from_data(TensorData::new(found[0].clone(), [1, LENGTH]), &Device::flex());
        let (logits, codes) = match &model {
            GeneratorModel::Gpt(gpt) => (gpt.logits(ids, gpt.ordered(codes.clone())), gpt.ordered(codes)),
            GeneratorModel::Var(var) => (var.logits(ids, codes.clone()), codes),
            _ => continue,
        };
        let best = logits.argmax(2).squeeze_dim::<2>(2);
        assert_eq!(rows(best), rows(codes), "{config:?}");
    }
}

#[test]
fn a_sliding_window_takes_the_likeliest_token_of_what_it_shows() {
    let class = ConditionConfig::Class { classes: 5 };
    let config = gpt(class.clone(), false);
    let model = model(&config);
    let GeneratorModel::Gpt(gpt) = &model else { unreachable!() };
    let sampling = Sampling { temperature: 0.0, ..Default::default() };
    let generate = |grid, images: Vec<ImageRequest>| {
        let request = Request { grid: Some(grid), ..Request::new(images, sampling.clone()) };
        let mut generation = model.start(&request).unwrap();
        generation.finish().unwrap();
        rows(generation.codes().discrete().unwrap())
    };
    let request = image(&Condition::class(3), 0, None);
    let own = self::generate(&model, vec![request.clone()], &sampling);
    assert_eq!(generate((3, 4), vec![request.clone()]), own, "a window as large as the grid stands still");

    let (grid, (h, w)) = ((5, 7), (3, 4));
    let found = generate(grid, vec![request.clone(), image(&Condition::class(1), 0, None)]).swap_remove(0);
    let window = Window { grid, size: (h, w) };
    let ids = config.conditions().batch(&[Condition::class(3)], None, &Device::flex()).unwrap();
    for place in 0..grid.0 * grid.1 {
        let (row, column) = (place / grid.1, place % grid.1);
        let (top, left) = window.origin(row, column);
        assert!((top..top + h).contains(&row) && (left..left + w).contains(&column));
        // Without a cache; what comes later does not count.
        let shown: Vec<i64> = (0..h * w).map(|i| found[(top + i / w) * grid.1 + left + i % w]).collect();
        let shown = Tensor::<2, Int>::from_data(TensorData::new(shown, [1, h * w]), &Device::flex());
        let best = gpt.logits(ids.clone(), shown).argmax(2).reshape([1, h * w]);
        assert_eq!(rows(best)[0][(row - top) * w + column - left], found[place], "place {row}, {column}");
    }

    // Known tokens stay, also between windows.
    let keep: Vec<bool> = (0..35).map(|place| place % 3 == 1).collect();
    let known = Known { tokens: vec![7u32; 35].into(), keep: keep.clone() };
    let painted = generate(grid, vec![image(&Condition::class(3), 0, Some(known))]).swap_remove(0);
    assert!(keep.iter().zip(painted).all(|(keep, code)| !keep || code == 7));

    let refused = |config: &GeneratorConfig, grid| {
        let request = Request { grid: Some(grid), ..Request::new(vec![request.clone()], sampling.clone()) };
        self::model(config).start(&request).err().unwrap().to_string()
    };
    assert!(refused(&config, (2, 9)).contains("at least 3x4"));
    assert!(refused(&shuffled(class.clone()), grid).contains("row by row"));
    assert!(refused(&maskgit(class), grid).contains("only gpt can slide"));
}

#[test]
fn coordinates_say_themselves_also_to_a_window() {
    let (codes, h, w, pixels) = (CODES, 3, 4, 8);
    let table = |condition| match gpt(condition, false) {
        GeneratorConfig::Gpt(config) => {
            model(&GeneratorConfig::Gpt(GptConfig { shared_table: true, condition_dropout: 0.0, ..config }))
        }
        _ => unreachable!(),
    };
    // The same weights twice: one model knows where it is, the other is told.
    let silent = table(ConditionConfig::Coordinates { codes, h, w, pixels });
    let told = table(ConditionConfig::Codes { codes, h, w });
    let generate = |model: &GeneratorModel, grid, condition| {
        let request = Request::new(vec![image(&condition, 3, None)], Sampling::default());
        let mut generation = model.start(&Request { grid, ..request }).unwrap();
        generation.finish().unwrap();
        rows(generation.codes().discrete().unwrap())
    };
    for grid in [None, Some((5, 7))] {
        let (rows, columns) = grid.unwrap_or((h, w));
        let whole = ConditionConfig::Coordinates { codes, h: rows, w: columns, pixels };
        let ids = Conditions::from(whole).ids(&Condition::none()).unwrap().into_iter().map(|id| id as u32).collect();
        assert_eq!(generate(&silent, grid, Condition::none()), generate(&told, grid, Condition::codes(ids)));
    }
}

#[test]
fn a_shared_table_needs_its_condition() {
    let GeneratorConfig::Gpt(config) = gpt(ConditionConfig::Class { classes: 5 }, false) else { unreachable!() };
    let shared = GptConfig { shared_table: true, condition_dropout: 0.0, ..config };
    let model = model(&GeneratorConfig::Gpt(shared.clone()));
    let request = Request::new(vec![image(&Condition::none(), 0, None)], Sampling::default());
    assert!(model.start(&request).err().unwrap().to_string().contains("has no vector for a missing condition"));
    let refused = |config: GptConfig| config.init(&Device::flex()).unwrap_err().to_string();
    assert!(refused(GptConfig { condition_dropout: 0.1, ..shared.clone() }).contains("null vector"));
    let many = ConditionConfig::Class { classes: CODES + 1 };
    assert!(refused(GptConfig { condition: many.into(), ..shared.clone() }).contains("25 ids, the table 24 rows"));
    for start_token in [CODES, usize::MAX] {
        assert!(refused(GptConfig { start_token, ..shared.clone() }).contains("is not in 0..24"));
    }
    assert!(refused(GptConfig { block_size: Some(11), ..shared.clone() }).contains("need 12"));
    assert!(refused(GptConfig { pkeep: 1.5, ..shared }).contains("pkeep"));
}

#[test]
fn pkeep_replaces_so_many_of_the_tokens_that_are_fed() {
    let loss = |pkeep: f32| {
        let GeneratorConfig::Gpt(config) = gpt(ConditionConfig::None, false) else { unreachable!() };
        let config = GptConfig { pkeep, dropout: 0.0, attention_dropout: 0.0, ..config };
        let model = model(&GeneratorConfig::Gpt(config));
        let loss = model
            .loss(codes(4), &vec![Condition::none(); 4], &mut Draw::new(&mut Rng::new(1).stream(0, 0), 0))
            .unwrap();
        loss.loss.into_scalar::<f32>()
    };
    assert_ne!(loss(0.5), loss(1.0));
    // The targets are the true tokens, so that no number of replaced ones makes the loss small.
    assert!(loss(0.0) > 1.0);
}

#[test]
fn known_tokens_are_kept_and_matter() {
    for (config, condition) in all() {
        let model = model(&config);
        let keep: Vec<bool> = (0..LENGTH).map(|place| place % 3 == 0).collect();
        let known = |shift: u32| {
            let codes: Vec<u32> = (0..LENGTH as u32).map(|i| (i + shift) % 24).collect();
            Known { tokens: codes.into(), keep: keep.clone() }
        };
        let sampling = Sampling::default();
        let draw = |shift: u32| {
            let images = (0..6).map(|seed| image(&condition, seed, Some(known(shift)))).collect();
            let found = generate(&model, images, &sampling);
            for (row, place) in found.iter().flat_map(|row| (0..LENGTH).map(move |place| (row, place))) {
                assert!(!keep[place] || row[place] == (place as i64 + i64::from(shift)) % 24, "{config:?}");
            }
            let drawn = |row: &Vec<i64>| (0..LENGTH).filter(|place| !keep[*place]).map(|place| row[place]).collect();
            found.iter().map(drawn).collect::<Vec<Vec<i64>>>()
        };
        assert_ne!(draw(1), draw(7), "what is known changes what is drawn: {config:?}");
        let all = Known { tokens: vec![5u32; LENGTH].into(), keep: vec![true; LENGTH] };
        assert_eq!(generate(&model, vec![image(&condition, 0, Some(all))], &sampling), [vec![5; LENGTH]]);
    }
}

#[test]
fn guidance_is_off_at_one_and_moves_away_from_the_unconditional_above() {
    for (config, condition) in all().into_iter().filter(|(_, condition)| *condition != Condition::none()) {
        let model = model(&config);
        let with = |guidance, guidance_schedule| {
            let sampling = Sampling { guidance, guidance_schedule, ..Default::default() };
            generate(&model, (0..6).map(|seed| image(&condition, seed, None)).collect(), &sampling)
        };
        let off = with(1.0, GuidanceSchedule::Constant);
        // So close to 1 that the logits hardly change, but both halves of the batch are computed.
        assert_eq!(with(1.000_001, GuidanceSchedule::Constant), off, "{config:?}");
        assert_ne!(with(6.0, GuidanceSchedule::Constant), off, "{config:?}");
        assert_ne!(with(6.0, GuidanceSchedule::Linear), with(6.0, GuidanceSchedule::Constant), "{config:?}");
        // Guidance 0 is the unconditional model.
        let sampling = Sampling::default();
        let images = (0..6).map(|seed| image(&Condition::none(), seed, None)).collect();
        let unconditional = generate(&model, images, &sampling);
        assert_eq!(with(0.0, GuidanceSchedule::Constant), unconditional, "{config:?}");
    }
}

#[test]
fn losses_have_gradients_and_validation_does_not_depend_on_batches() {
    for (config, condition) in all() {
        let model = model(&config).train();
        let conditions = vec![condition; 4];
        let loss = model.loss(codes(4), &conditions, &mut Draw::new(&mut Rng::new(1).stream(0, 0), 0)).unwrap();
        assert!(loss.loss.clone().into_scalar::<f32>().is_finite());
        let _ = loss.loss.backward();

        let plain = model.valid();
        let value = |codes: Codes, n: usize, first| {
            let loss = plain.validation_loss(codes, &conditions[..n], first).unwrap();
            loss.nats_per_token.unwrap().into_scalar::<f32>()
        };
        let whole = value(codes(4), 4, 0);
        let halves = (value(codes(4).narrow(0, 2), 2, 0) + value(codes(4).narrow(2, 2), 2, 2)) / 2.0;
        assert!((whole - halves).abs() < 1e-4, "{config:?}: {whole} and {halves}");
    }
}

#[test]
fn requests_that_do_not_fit_are_refused() {
    let class = ConditionConfig::Class { classes: 5 };
    for config in [gpt(class.clone(), false), maskgit(class.clone()), var(class, false)] {
        let model = model(&config);
        let refused = |condition: Condition, known: Option<Known>, sampling: Sampling, text: &str| {
            let request = Request::new(vec![image(&condition, 0, known)], sampling);
            let error = model.start(&request).err().unwrap().to_string();
            assert!(error.contains(text), "{error}");
        };
        refused(Condition::class(5), None, Sampling::default(), "class 5 is not in 0..5");
        refused(Condition::text(vec![1]), None, Sampling::default(), "takes a class");
        let short = Known { tokens: vec![0u32].into(), keep: vec![true] };
        refused(Condition::none(), Some(short), Sampling::default(), "12 places");
        let wild = Known { tokens: vec![99u32; LENGTH].into(), keep: vec![true; LENGTH] };
        refused(Condition::none(), Some(wild), Sampling::default(), "99 is not in 0..24");
        refused(Condition::none(), None, Sampling { top_k: Some(0.into()), ..Default::default() }, "top_k");
        refused(Condition::none(), None, Sampling { top_p: Some(1.5.into()), ..Default::default() }, "top_p");
        refused(Condition::none(), None, Sampling { temperature: f32::NAN, ..Default::default() }, "temperature");
        let empty = Request::new(Vec::new(), Sampling::default());
        assert!(model.start(&empty).err().unwrap().to_string().contains("no images"));
        assert!(model.loss(codes(2), &[Condition::none()], &mut Draw::new(&mut Rng::new(0).stream(0, 0), 0)).is_err());
    }
    let free = model(&gpt(ConditionConfig::None, false));
    let sampling = Sampling { guidance: 2.0, ..Default::default() };
    let request = Request::new(vec![image(&Condition::none(), 0, None)], sampling);
    assert!(free.start(&request).err().unwrap().to_string().contains("guidance"));
}

#[test]
fn configs_are_strict_and_checked() {
    let text = serde_json::to_string(&maskgit(ConditionConfig::Class { classes: 5 })).unwrap();
    assert!(text.starts_with(r#"{"kind":"maskgit""#), "{text}");
    assert_eq!(serde_json::from_str::<GeneratorConfig>(&text).unwrap(), maskgit(ConditionConfig::Class { classes: 5 }));
    let wrong = text.replace("\"depth\"", "\"deepth\"");
    assert!(serde_json::from_str::<GeneratorConfig>(&wrong).unwrap_err().to_string().contains("deepth"));
    let wrong = text.replace("\"heads\":4", "\"heads\":5");
    let error = serde_json::from_str::<GeneratorConfig>(&wrong).unwrap().init(&Device::flex()).unwrap_err().to_string();
    assert!(error.contains("width = 32 is not a multiple of heads = 5"), "{error}");
    let stack = Layout::Stack { h: 2, w: 3, depth: 2 };
    let GeneratorConfig::Gpt(config) = gpt(ConditionConfig::None, false) else { unreachable!() };
    let config = GptConfig { tokens: TokenSpec { layout: stack, ..tokens() }, ..config };
    assert!(config.init(&Device::flex()).unwrap_err().to_string().contains("stack"));
    let GeneratorConfig::Var(config) = var(ConditionConfig::None, false) else { unreachable!() };
    let config = VarConfig { tokens: tokens(), ..config };
    assert!(config.init(&Device::flex()).unwrap_err().to_string().contains("must be a pyramid"));
    let text = var(ConditionConfig::text(9, 2), false);
    assert!(text.init(&Device::flex()).unwrap_err().to_string().contains("caption"));
}

#[test]
fn smooth_sampling_mixes_codes_and_keeps_known_ones() {
    let class = ConditionConfig::Class { classes: 5 };
    let model_of = |config: &GeneratorConfig| model(config);
    let var = model_of(&var(class.clone(), false));
    let latents = |images: Vec<ImageRequest>, smooth: bool| {
        let mut generation = var.start(&Request::new(images, Sampling { smooth, ..Default::default() })).unwrap();
        generation.finish().unwrap();
        generation.codes()
    };
    let request = |seed| image(&Condition::class(2), seed, None);
    let vectors = |codes: Codes| match codes {
        Codes::Continuous(vectors) => vectors.into_data().iter::<f32>().collect::<Vec<_>>(),
        _ => panic!("smooth sampling gives latents"),
    };
    let together = vectors(latents(vec![request(0), request(1)], true));
    let alone = vectors(latents(vec![request(1)], true));
    let difference = together[9 * 4..].iter().zip(&alone).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(together.len() == 2 * 9 * 4 && difference < 1e-4, "an image does not depend on its batch: {difference}");
    let all = Known { tokens: (0..LENGTH as u32).collect::<Vec<_>>().into(), keep: vec![true; LENGTH] };
    let known = vectors(latents(vec![image(&Condition::class(2), 0, Some(all.clone()))], true));
    let GeneratorModel::Var(inner) = &var else { unreachable!() };
    let codes = latents(vec![image(&Condition::class(2), 0, Some(all))], false).discrete().unwrap();
    let sum = inner.quantize.sums(codes).pop().unwrap().reshape([4, 9]).transpose();
    let decoded: Vec<f32> = sum.into_data().iter::<f32>().collect();
    assert!(known.iter().zip(&decoded).all(|(a, b)| (a - b).abs() < 1e-5));
    // Other generators refuse.
    let gpt = model_of(&gpt(class, false));
    let sampling = Sampling { smooth: true, ..Default::default() };
    let refused = gpt.start(&Request::new(vec![request(0)], sampling));
    assert!(refused.err().unwrap().to_string().contains("smooth"));
}

#[test]
fn the_codes_so_far_decode_to_about_the_levels_so_far() {
    let config = var(ConditionConfig::None, false);
    let GeneratorModel::Var(mut model) = model(&config) else { unreachable!() };
    // One code adds nothing, and neither do the convolutions.
    let vectors = model.quantize.vectors();
    let vectors = Tensor::cat(vec![vectors.clone().narrow(0, 1, CODES - 1), vectors.narrow(0, 0, 1) * 0.0], 0);
    let id = model.quantize.table.embedding.weight.id;
    model.quantize.table.embedding.weight = model.quantize.table.embedding.weight.transform_for_load(vectors, id);
    model.quantize.phi.iter_mut().for_each(|conv| *conv = conv.clone().without_bias());
    let request = Request::new(vec![image(&Condition::none(), 3, None)], Sampling::default());
    let draws = smalti_models::sampling::Seeded::new([3]);
    let mut generation = model.start_with(&request, Box::new(draws)).unwrap();
    for _ in 0..generation.steps() {
        generation.step().unwrap();
        let sums = model.quantize.sums(generation.codes().discrete().unwrap());
        let difference = sums.last().unwrap().clone() - generation.latents().unwrap().clone();
        assert!(difference.abs().max().into_scalar::<f32>() < 1e-5);
    }
}

#[test]
fn a_generator_adopts_the_quantizer_of_its_tokenizer_only() {
    let device = Device::flex();
    let config = var(ConditionConfig::None, false);
    let tokenizer = |quantizer: QuantizerConfig| {
        let text = r#"{ "image_size": 6, "ch": 4, "ch_mult": [1, 1], "num_res_blocks": 1, "norm_groups": 2, "z_channels": 4,
            "embed_dim": 4, "quantizer": { "kind": "vq", "codes": 2, "channels": 4 } }"#;
        let config = VqganConfig { quantizer, ..serde_json::from_str(text).unwrap() };
        config.init(&device.clone().autodiff()).unwrap()
    };
    let multi_scale = |levels: Vec<(usize, usize)>, convolutions| {
        let table = VqConfig { kmeans_init: Some(2), ..VqConfig::new(CODES, 4) };
        let refinement = Refinement { weight: 0.5, convolutions };
        tokenizer(QuantizerConfig::MultiScale(MultiScaleConfig { levels, table, refinement }))
    };
    let levels = vec![(1, 1), (1, 1), (1, 1), (3, 3)];
    let fitting = multi_scale(levels.clone(), 2);
    let mut adopting = model(&config);
    adopting.adopt(&fitting).unwrap();
    let GeneratorModel::Var(adopted) = adopting else { unreachable!() };
    let QuantizerModel::MultiScale(fitting) = fitting.quantize else { unreachable!() };
    let values = |tensor: Tensor<2>| tensor.into_data().iter::<f32>().collect::<Vec<_>>();
    assert_eq!(values(adopted.quantize.vectors()), values(fitting.vectors()));
    // Training leaves it alone.
    let trained = adopted.train();
    let given = [Condition::none(), Condition::none()];
    let loss = trained.loss(codes(2), &given, &mut Draw::new(&mut Rng::new(1).stream(0, 0), 0)).unwrap();
    assert!(trained.quantize.phi[0].weight.grad(&loss.loss.backward()).is_none());
    for other in [multi_scale(levels, 3), multi_scale(vec![(1, 1), (3, 3)], 2)] {
        assert!(model(&config).adopt(&other).unwrap_err().to_string().contains("multi-scale quantizers"));
    }
    let vq = tokenizer(QuantizerConfig::Vq(VqConfig::new(CODES, 4)));
    assert!(model(&config).adopt(&vq).unwrap_err().to_string().contains("multi_scale"));
}

#[test]
fn coarse_levels_keep_what_is_mostly_kept() {
    let layout = Layout::Pyramid { levels: vec![(1, 1), (2, 2), (4, 4)] };
    // The right half is made anew.
    let finest: Vec<bool> = (0..16).map(|place| place % 4 < 2).collect();
    let keep = Known::keep(&layout, &finest);
    assert_eq!(keep[..5], [true, true, false, true, false], "the coarsest level says what the picture is");
    assert_eq!(keep[5..], finest);
    assert_eq!(Known::keep(&Layout::Grid { h: 4, w: 4 }, &finest), finest);
}
