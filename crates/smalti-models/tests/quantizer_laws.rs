//! What must hold for every quantizer, and the arithmetic of those that move their codebook.

mod laws;

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use smalti_base::Rng;
use smalti_models::quantizers::gumbel::{Logits, Temperature};
use smalti_models::quantizers::multi_scale::Refinement;
use smalti_models::quantizers::remap::{RemapConfig, Unknown};
use smalti_models::quantizers::residual::Moment;
use smalti_models::quantizers::vq::{EmaDialect, Estimator, Learning, Metric, Revive, ReviveUnit};
use smalti_models::quantizers::{
    FsqConfig, Gumbel, GumbelConfig, MultiScaleConfig, Pass, Quantizer, QuantizerConfig, ResidualConfig, Stats, Vq,
    VqConfig,
};

const SHAPE: [usize; 4] = [2, 4, 3, 5];

fn ema(dialect: EmaDialect) -> Learning {
    Learning::Ema { decay: 0.9, epsilon: 1e-5, dialect }
}

fn arms() -> Vec<QuantizerConfig> {
    let vq = VqConfig::new(11, 4);
    let with = |change: &dyn Fn(&mut VqConfig)| {
        let mut config = vq.clone();
        change(&mut config);
        QuantizerConfig::Vq(config)
    };
    let mut arms = vec![
        with(&|_| ()),
        with(&|c| c.codebook = Learning::Gradient { legacy: true }),
        with(&|c| c.metric = Metric::Cosine),
        with(&|c| c.metric = Metric::CosineRaw),
        with(&|c| c.gradient = Estimator::Rotation),
        with(&|c| (c.metric, c.gradient) = (Metric::Cosine, Estimator::Rotation)),
        with(&|c| c.projected = Some(2)),
        with(&|c| c.depth = 3),
        with(&|c| (c.depth, c.metric) = (3, Metric::Cosine)),
        with(&|c| (c.depth, c.metric, c.projected) = (3, Metric::CosineRaw, Some(2))),
        with(&|c| c.kmeans_init = Some(3)),
        with(&|c| c.revive = Some(Revive { threshold: 0.1, unit: ReviveUnit::Mean, every: 1 })),
        QuantizerConfig::Gumbel(GumbelConfig::new(11, 4)),
        QuantizerConfig::Gumbel(GumbelConfig { logits: Logits::Distance, ..GumbelConfig::new(11, 4) }),
    ];
    for dialect in [EmaDialect::Counting, EmaDialect::Empty, EmaDialect::Compounding, EmaDialect::Sonnet] {
        arms.push(with(&|c| c.codebook = ema(dialect)));
    }
    let multi_scale = |change: &dyn Fn(&mut MultiScaleConfig)| {
        let mut config = multi_scale();
        change(&mut config);
        QuantizerConfig::MultiScale(config)
    };
    // A shared table that moves between depths gives other codes in training; tests/residual.rs has it.
    let residual = ResidualConfig::new(11, 4, 3);
    arms.extend([
        QuantizerConfig::Residual(ResidualConfig { update: Moment::After, ..residual.clone() }),
        QuantizerConfig::Residual(ResidualConfig { shared: false, codes: vec![11, 5, 7].into(), ..residual }),
        multi_scale(&|_| ()),
        multi_scale(&|c| c.refinement = Refinement { weight: 0.0, convolutions: 1 }),
        multi_scale(&|c| c.refinement.convolutions = 3),
        multi_scale(&|c| c.table.metric = Metric::Cosine),
        multi_scale(&|c| c.table.codebook = ema(EmaDialect::Counting)),
        multi_scale(&|c| c.table.kmeans_init = Some(3)),
        multi_scale(&|c| c.table.revive = Some(Revive { threshold: 0.1, unit: ReviveUnit::Mean, every: 1 })),
    ]);
    arms.extend(laws::quantizers());
    arms
}

/// For latents of [`SHAPE`].
fn multi_scale() -> MultiScaleConfig {
    MultiScaleConfig {
        levels: vec![(1, 1), (2, 3), (3, 5)],
        table: VqConfig::new(11, 4),
        refinement: Refinement::default(),
    }
}

fn normal<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    let mut stream = Rng::new(seed).stream(0, 0);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| stream.normal()).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn ints<const D: usize>(tensor: Tensor<D, Int>) -> Vec<i64> {
    tensor.into_data().iter::<i64>().collect()
}

fn close(name: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{name}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= tolerance * (1.0 + e.abs()), "{name}[{i}]: found {f}, expected {e}");
    }
}

/// A quantizer whose codes lie among the latents, so that many of them are used.
fn spread(config: &VqConfig, device: &Device) -> Vq {
    let mut vq = config.init(device).expect("the settings are in range");
    let c = config.projected.unwrap_or(config.channels);
    let id = vq.embedding.weight.id;
    vq.embedding.weight = vq.embedding.weight.transform_for_load(normal([config.codes, c], 5, device), id);
    if let Some(sums) = vq.embed_avg.take() {
        let id = sums.id;
        vq.embed_avg = Some(sums.transform_for_load(normal([config.codes, c], 5, device), id));
    }
    vq
}

#[test]
fn training_gives_what_decoding_the_codes_gives() {
    let device = Device::flex().autodiff();
    for config in arms() {
        let quantizer = config.init(&device).unwrap();
        let z = normal(SHAPE, 1, &device);
        // Without noise the most likely code is drawn.
        let noise_bchw = Some(Tensor::zeros([2, 11, 3, 5], &Device::flex()));
        let trained = quantizer.train_forward(z.clone(), &Pass { noise_bchw, ..Pass::default() });
        let codes = quantizer.encode(z);
        assert_eq!(ints(trained.codes), ints(codes.clone()), "{config:?}");
        assert!(ints(codes.clone()).iter().all(|code| (0..quantizer.vocabulary().most() as i64).contains(code)));
        assert_eq!(codes.dims(), [2, config.layout(3, 5).unwrap().length()]);
        let decoded = quantizer.decode(codes, 3, 5);
        assert_eq!(decoded.dims(), SHAPE);
        close(&format!("{config:?}"), &floats(trained.latents_bchw), &floats(decoded), 1e-5);
    }
}

#[test]
fn codes_survive_decoding_and_encoding() {
    let device = Device::flex();
    for config in arms() {
        let codes = Tensor::<1, Int>::arange(0..config.vocabulary().most() as i64, &device);
        match &config {
            // Layers lead away from the codes and are not each other's inverse.
            QuantizerConfig::Vq(vq) if vq.projected.is_some() => {}
            // A sum of levels or depths can have other codes that come nearer to it.
            QuantizerConfig::Vq(vq) if vq.depth > 1 => {}
            QuantizerConfig::MultiScale(_) | QuantizerConfig::Residual(_) => {}
            QuantizerConfig::Vq(vq) => {
                let vq = spread(vq, &device);
                let codes = codes.reshape([1, 11]);
                assert_eq!(ints(vq.encode(vq.decode(codes.clone(), 1, 11))), ints(codes), "{config:?}");
            }
            // Learned logits need not favour the code whose vector a latent is.
            QuantizerConfig::Gumbel(gumbel) if gumbel.logits == Logits::Projection => {}
            QuantizerConfig::Gumbel(gumbel) => {
                let gumbel = gumbel.init(&device).unwrap();
                let codes = codes.reshape([1, 11]);
                assert_eq!(ints(gumbel.encode(gumbel.decode(codes.clone(), 1, 11))), ints(codes), "{config:?}");
            }
            // Latents are bounded on the way in, so codes are compared as numbers.
            QuantizerConfig::Fsq(fsq) => {
                let fsq = fsq.init(&device).unwrap();
                let numbers = fsq.numbers(codes.clone());
                assert!(floats(numbers.clone()).iter().all(|x| x.abs() <= 1.0));
                assert_eq!(ints(fsq.ids(numbers)), ints(codes), "{config:?}");
            }
        }
    }
}

#[test]
fn codes_without_a_number_become_other_tokens() {
    let device = Device::flex();
    let whole = spread(&VqConfig::new(11, 4), &device);
    let z = whole.decode(Tensor::<1, Int>::arange(0..11, &device).reshape([1, 11]), 1, 11);
    for (unknown, vocabulary) in [(Unknown::Random, 3), (Unknown::Extra, 4), (Unknown::Token { token: 2 }, 3)] {
        let mut vq =
            spread(&VqConfig { remap: Some(RemapConfig { kept: 3, unknown }), ..VqConfig::new(11, 4) }, &device);
        let remap = vq.remap.as_mut().unwrap();
        let id = remap.used.id;
        remap.used = Param::initialized(id, Tensor::from_data([7, 0, 9], &device));
        assert_eq!(vq.vocabulary().single(), Some(vocabulary));
        let tokens = vq.encode(z.clone());
        let found = ints(tokens.clone());
        assert_eq!([found[7], found[0], found[9]], [0, 1, 2], "{unknown:?}");
        let others: Vec<i64> = (0..11).filter(|i| ![0, 7, 9].contains(i)).map(|i| found[i]).collect();
        match unknown {
            Unknown::Random => assert!(others.iter().all(|token| (0..3).contains(token)), "{others:?}"),
            Unknown::Extra => assert_eq!(others, [3; 8]),
            Unknown::Token { token } => assert_eq!(others, [token as i64; 8]),
        }
        // The same tokens each time, and each decodes as a kept code; the token for all others as the first one.
        assert_eq!(ints(vq.encode(z.clone())), found);
        let expected = found.iter().map(|token| [7i64, 0, 9, 7][*token as usize]).collect::<Vec<_>>();
        let expected = whole.decode(Tensor::<1, Int>::from_data(&expected[..], &device).reshape([1, 11]), 1, 11);
        assert_eq!(floats(vq.decode(tokens, 1, 11)), floats(expected));
        assert_eq!(ints(vq.train_forward(z.clone(), &Pass::default()).codes), found);
    }
    for (kept, unknown, part) in [
        (0, Unknown::Extra, "kept is 0"),
        (12, Unknown::Extra, "kept is 12"),
        (3, Unknown::Token { token: 3 }, "token is 3"),
    ] {
        let config = VqConfig { remap: Some(RemapConfig { kept, unknown }), ..VqConfig::new(11, 4) };
        assert!(config.init(&device).unwrap_err().to_string().contains(part), "{part}");
    }
}

#[test]
fn drawn_codes_follow_noise_and_temperature() {
    let device = Device::flex().autodiff();
    let z = normal(SHAPE, 1, &device);
    let noise = || Some(normal([2, 11, 3, 5], 9, &Device::flex()));
    let pass = |step| Pass { noise_bchw: noise(), ..Pass::at(step) };
    let temperature = Temperature::Cosine { start: None, max: 1.0, min: 0.01, warmup: 0, steps: 10 };
    let config = GumbelConfig { temperature, ..GumbelConfig::new(11, 4) };
    let hard = config.init(&device).unwrap();
    let out = hard.train_forward(z.clone(), &pass(0));
    assert_ne!(ints(out.codes.clone()), ints(hard.encode(z.clone())), "noise changes codes");
    close("drawn", &floats(out.latents_bchw.clone()), &floats(hard.decode(out.codes.clone(), 3, 5)), 0.0);
    assert!(out.loss().is_some_and(|loss| floats(loss)[0] > 0.0), "probabilities are not even");
    // A mixture comes to what is drawn as the temperature falls.
    let soft = Gumbel { config: GumbelConfig { straight_through: false, ..config }, ..hard.clone() };
    let distance = |step| {
        let mixed = soft.train_forward(z.clone(), &pass(step));
        assert_eq!(ints(mixed.codes), ints(out.codes.clone()));
        floats((mixed.latents_bchw - hard.decode(out.codes.clone(), 3, 5)).square().mean())[0]
    };
    assert!(distance(10) < 0.1 * distance(0), "{} at the end, {} at first", distance(10), distance(0));
    // Without given noise the device draws, each time anew.
    let drawn = || ints(hard.train_forward(z.clone(), &Pass::default()).codes);
    assert_ne!(drawn(), drawn());
}

#[test]
fn one_level_without_refinement_is_plain_quantization() {
    let device = Device::flex();
    let config = MultiScaleConfig {
        levels: vec![(3, 5)],
        refinement: Refinement { weight: 0.0, convolutions: 1 },
        ..multi_scale()
    };
    let mut quantizer = config.init(&device).unwrap();
    quantizer.table = spread(&config.table, &device);
    let (z, codes) = (normal(SHAPE, 1, &device), quantizer.encode(normal(SHAPE, 1, &device)));
    assert_eq!(ints(quantizer.table.encode(z)), ints(codes.clone()));
    let (ours, plain) = (quantizer.decode(codes.clone(), 3, 5), quantizer.table.decode(codes.clone(), 3, 5));
    assert_eq!(floats(ours), floats(plain));
    // Codes survive: each place decodes to a code vector itself.
    assert_eq!(ints(quantizer.encode(quantizer.decode(codes.clone(), 3, 5))), ints(codes));
}

#[test]
fn levels_code_what_the_coarser_ones_left_over() {
    let device = Device::flex();
    let config = multi_scale();
    let mut quantizer = config.init(&device).unwrap();
    quantizer.table = spread(&config.table, &device);
    let z = normal(SHAPE, 1, &device);
    let codes = quantizer.encode(z.clone());
    assert_eq!(codes.dims(), [2, 1 + 6 + 15]);
    let sums = quantizer.sums(codes.clone());
    let rest = z - sums[1].clone();
    assert_eq!(ints(quantizer.table.encode(rest)), ints(codes.clone().narrow(1, 7, 15)), "the finest level");
    close("decode", &floats(quantizer.decode(codes.clone(), 3, 5)), &floats(sums[2].clone()), 1e-6);
    // What is known before a level is the sum so far at its size, level after level.
    let known = quantizer.known_before(codes.clone()).unwrap();
    assert_eq!(known.dims(), [2, 6 + 15, 4]);
    let last = known.narrow(1, 6, 15).swap_dims(1, 2).reshape(SHAPE);
    close("known", &floats(last), &floats(sums[1].clone()), 1e-6);
    // An image's codes do not depend on its batch.
    let alone = quantizer.encode(normal(SHAPE, 1, &device).narrow(0, 1, 1));
    assert_eq!(ints(alone), ints(codes.narrow(0, 1, 1)));
}

#[test]
fn convolutions_and_table_learn_from_the_loss_alone() {
    let device = Device::flex().autodiff();
    for codebook in [Learning::Gradient { legacy: false }, ema(EmaDialect::Counting)] {
        let mut config = multi_scale();
        config.table.codebook = codebook;
        let mut quantizer = config.init(&device).unwrap();
        quantizer.table = spread(&config.table, &device);
        let z = normal(SHAPE, 1, &device).require_grad();
        let out = quantizer.train_forward(z.clone(), &Pass::default());
        let upstream = normal(SHAPE, 2, &device);
        let through = (out.latents_bchw.clone() * upstream.clone()).sum().backward();
        close("straight through", &floats(z.grad(&through).unwrap()), &floats(upstream), 1e-6);
        let gradients = out.loss().unwrap().backward();
        let learns = |g: Option<Tensor<4>>| g.is_some_and(|g| floats(g).iter().any(|x| *x != 0.0));
        assert!(learns(quantizer.phi[0].weight.grad(&gradients)));
        let by_gradient = matches!(codebook, Learning::Gradient { .. });
        assert_eq!(quantizer.table.embedding.weight.grad(&gradients).is_some(), by_gradient);
        // Moving averages see the rest at every level.
        assert_eq!(out.stats.parts[0].latents_nc.dims(), [2 * 22, 4]);
    }
}

#[test]
fn the_straight_through_gradient_is_the_identity() {
    let device = Device::flex().autodiff();
    for metric in [Metric::Euclidean, Metric::CosineRaw] {
        let vq = spread(&VqConfig { metric, ..VqConfig::new(11, 4) }, &device);
        let z = normal(SHAPE, 1, &device).require_grad();
        let upstream = normal(SHAPE, 2, &device);
        let grads = (vq.train_forward(z.clone(), &Pass::default()).latents_bchw * upstream.clone()).sum().backward();
        close("gradient", &floats(z.grad(&grads).unwrap()), &floats(upstream), 1e-6);
        assert!(vq.embedding.weight.grad(&grads).is_none_or(|g| floats(g).iter().all(|x| *x == 0.0)));
    }
}

#[test]
fn the_rotation_gradient_follows_its_formula() {
    let device = Device::flex().autodiff();
    let vq = spread(&VqConfig { gradient: Estimator::Rotation, ..VqConfig::new(11, 4) }, &device);
    let z = normal([6, 4, 1, 1], 1, &device).require_grad();
    let upstream = normal([6, 4, 1, 1], 2, &device);
    let out = vq.train_forward(z.clone(), &Pass::default());
    let grads = (out.latents_bchw.clone() * upstream.clone()).sum().backward();
    let (found, z, q, g) = (floats(z.grad(&grads).unwrap()), floats(z), floats(out.latents_bchw), floats(upstream));
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
    let unit = |a: &[f32]| a.iter().map(|x| x / dot(a, a).sqrt()).collect::<Vec<f32>>();
    for row in 0..6 {
        let at = row * 4..row * 4 + 4;
        let (z, q, g) = (&z[at.clone()], &q[at.clone()], &g[at.clone()]);
        let (u, v) = (unit(z), unit(q));
        let w = unit(&u.iter().zip(&v).map(|(a, b)| a + b).collect::<Vec<f32>>());
        let scale = dot(q, q).sqrt() / dot(z, z).sqrt();
        // The transpose of scale * (I - 2 w w' + 2 v u').
        let expected: Vec<f32> =
            (0..4).map(|i| scale * (g[i] - 2.0 * dot(g, &w) * w[i] + 2.0 * dot(g, &v) * u[i])).collect();
        close("rotation", &found[at], &expected, 1e-5);
    }
}

#[test]
fn every_arm_passes_a_finite_gradient() {
    let device = Device::flex().autodiff();
    for config in arms() {
        let quantizer = config.init(&device).unwrap();
        // Zero latents are where norms have no derivative.
        let z = (normal(SHAPE, 1, &device) * normal([2, 1, 3, 5], 3, &device).greater_elem(0.0).float()).require_grad();
        let out = quantizer.train_forward(z.clone(), &Pass::default());
        let mut sum = out.latents_bchw.clone().square().sum();
        if let Some(loss) = out.loss() {
            sum = sum + loss;
        }
        let gradient = floats(z.grad(&sum.backward()).unwrap());
        assert!(gradient.iter().all(|x| x.is_finite()) && gradient.iter().any(|x| *x != 0.0), "{config:?}");
    }
}

#[test]
fn losses_weight_the_two_terms() {
    let device = Device::flex().autodiff();
    let z = normal(SHAPE, 1, &device);
    let loss = |codebook| {
        let vq = spread(&VqConfig { codebook, ..VqConfig::new(11, 4) }, &device);
        let out = vq.train_forward(z.clone(), &Pass::default());
        let error = floats((out.latents_bchw.clone() - z.clone()).square().mean())[0];
        floats(out.loss().unwrap())[0] / error
    };
    for (codebook, expected) in [
        (Learning::Gradient { legacy: false }, 1.25),
        (Learning::Gradient { legacy: true }, 1.25),
        (ema(EmaDialect::Counting), 0.25),
    ] {
        assert!((loss(codebook) - expected).abs() < 1e-5, "{codebook:?}");
    }
}

/// enhancing-transformers' residual option: three unit codes for what is left, no gradient of the loss to the latents, and one to
/// an earlier code from what a later one is compared with.
#[test]
fn a_table_read_several_times_codes_what_is_left() {
    let device = Device::flex().autodiff();
    let config = VqConfig { depth: 3, metric: Metric::CosineRaw, ..VqConfig::new(11, 4) };
    let vq = spread(&config, &device);
    let z = normal([1, 4, 2, 2], 1, &device).require_grad();
    let out = vq.train_forward(z.clone(), &Pass::default());
    let grads = out.loss().unwrap().backward();
    assert!(z.grad(&grads).is_none_or(|g| floats(g).iter().all(|x| *x == 0.0)));

    let unit =
        |row: &[f64]| row.iter().map(|x| x / row.iter().map(|x| x * x).sum::<f64>().sqrt()).collect::<Vec<f64>>();
    let raw: Vec<f64> = floats(vq.embedding.weight.val()).iter().map(|x| f64::from(*x)).collect();
    let latents: Vec<f64> = floats(z.permute([0, 2, 3, 1])).iter().map(|x| f64::from(*x)).collect();
    let codes: Vec<usize> = ints(out.codes).iter().map(|code| *code as usize).collect();
    // The loss by its formula for the given codes, with what is held constant at the table `fixed`.
    let loss = |table: &[f64], fixed: &[f64]| {
        let vector = |table: &[f64], code: usize| unit(&table[code * 4..code * 4 + 4]);
        let mut total = 0.0;
        for place in 0..4 {
            let (mut rest, mut held) =
                (latents[place * 4..place * 4 + 4].to_vec(), latents[place * 4..place * 4 + 4].to_vec());
            for depth in 0..3 {
                let code = codes[place * 3 + depth];
                let (q, q_held) = (vector(table, code), vector(fixed, code));
                let (r, r_held) = (unit(&rest), unit(&held));
                for c in 0..4 {
                    total += 0.25 * (q_held[c] - r[c]).powi(2) + (q[c] - r_held[c]).powi(2);
                    rest[c] -= q[c];
                    held[c] -= q_held[c];
                }
            }
        }
        total / (4.0 * 4.0 * 3.0)
    };
    close(
        "loss",
        &floats(vq.train_forward(normal([1, 4, 2, 2], 1, &device), &Pass::default()).loss().unwrap()),
        &[loss(&raw, &raw) as f32],
        1e-5,
    );
    let expected: Vec<f32> = (0..raw.len())
        .map(|at| {
            let moved = |by: f64| {
                let mut table = raw.clone();
                table[at] += by;
                loss(&table, &raw)
            };
            ((moved(1e-5) - moved(-1e-5)) / 2e-5) as f32
        })
        .collect();
    close("gradient", &floats(vq.embedding.weight.grad(&grads).unwrap()), &expected, 1e-4);

    let refused = VqConfig { kmeans_init: Some(2), ..config }.init(&device).unwrap_err().to_string();
    assert!(refused.contains("kmeans_init") && refused.contains("depth = 3"), "{refused}");
}

fn stats(rows: &[[f32; 2]], codes: &[i64], device: &Device) -> Stats {
    let latents = TensorData::new(rows.concat(), [rows.len(), 2]);
    Stats::one(Tensor::from_data(latents, device), Tensor::from_data(codes, device))
}

#[test]
fn averages_follow_the_published_update() {
    let device = Device::flex();
    let mut config = VqConfig::new(3, 2);
    config.codebook = ema(EmaDialect::Counting);
    let mut vq = spread(&config, &device);
    let first = floats(vq.embedding.weight.val());
    let batch = stats(&[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], &[0, 0, 2], &device);
    let report = vq.update(&batch, 0, &mut Rng::new(1).stream(0, 0));
    assert!(!report.started && report.revived.is_none());
    let counts = [0.9 + 0.2, 0.9, 0.9 + 0.1];
    let sums: Vec<f32> = first.iter().zip([4.0, 6.0, 0.0, 0.0, 5.0, 6.0]).map(|(e, s)| 0.9 * e + 0.1 * s).collect();
    close("counts", &floats(vq.cluster_size.as_ref().unwrap().val()), &counts, 1e-6);
    close("sums", &floats(vq.embed_avg.as_ref().unwrap().val()), &sums, 1e-6);
    let total = 3.0f32;
    let codes: Vec<f32> =
        sums.iter().enumerate().map(|(i, s)| s / ((counts[i / 2] + 1e-5) / (total + 3e-5) * total)).collect();
    close("codes", &floats(vq.embedding.weight.val()), &codes, 1e-5);
}

#[test]
fn revival_replaces_dead_codes_and_restarts_their_averages() {
    let device = Device::flex();
    let rows: Vec<[f32; 2]> = (0..8).map(|i| [10.0 + i as f32, -3.0]).collect();
    for codebook in [ema(EmaDialect::Counting), ema(EmaDialect::Sonnet), Learning::Gradient { legacy: false }] {
        for unit in [ReviveUnit::Mean, ReviveUnit::Latents] {
            let mut config = VqConfig::new(4, 2);
            config.codebook = codebook;
            config.revive = Some(Revive { threshold: 0.7, unit, every: 60 });
            let mut vq = spread(&config, &device);
            let batch = stats(&rows, &[0, 0, 0, 1, 1, 1, 3, 3], &device);
            let mut revived = None;
            for step in 0..60 {
                let report = vq.update(&batch, step, &mut Rng::new(1).stream(0, step));
                assert_eq!(report.revived.is_some(), step == 59);
                revived = report.revived;
            }
            assert_eq!(ints(revived.unwrap()), [0, 0, 1, 0], "{codebook:?} {unit:?}");
            let code = floats(vq.embedding.weight.val())[4..6].to_vec();
            assert!(rows.iter().any(|row| row.as_slice() == code), "the code is a latent of the batch");
            let counts = floats(vq.cluster_size.as_ref().unwrap().val());
            assert!(counts[2] > 0.5, "{counts:?}");
            if let Some(sums) = &vq.embed_avg {
                let sums = floats(sums.val());
                close("sum = code * count", &sums[4..6], &[code[0] * counts[2], code[1] * counts[2]], 1e-5);
                // The next batch without that code moves it nowhere: count and sum belong together.
                let mut next = vq.clone();
                next.update(&batch, 60, &mut Rng::new(1).stream(0, 60));
                close("stays", &floats(next.embedding.weight.val())[4..6], &code, 1e-3);
            }
        }
    }
}

#[test]
fn the_k_means_start_takes_codes_from_the_data() {
    let device = Device::flex();
    // Four tight heaps; k-means must end on their centres from any rows that lie in four different heaps.
    let centres = [[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]];
    let rows: Vec<[f32; 2]> = (0..40).map(|i| [centres[i % 4][0] + (i / 4) as f32 * 0.01, centres[i % 4][1]]).collect();
    for codebook in [Learning::Gradient { legacy: false }, ema(EmaDialect::Counting), ema(EmaDialect::Sonnet)] {
        let mut config = VqConfig::new(4, 2);
        (config.codebook, config.kmeans_init) = (codebook, Some(5));
        let mut vq = config.init(&device).unwrap();
        let batch = stats(&rows, &[0; 40], &device);
        let latents = batch.parts[0].latents_nc.clone();
        let started = vq.clone().start_from(&latents, &[0, 1, 2, 3]);
        let expected: Vec<f32> = centres.iter().flat_map(|c| [c[0] + 0.045, c[1]]).collect();
        close("centres", &floats(started.embedding.weight.val()), &expected, 1e-4);

        let report = vq.update(&batch, 0, &mut Rng::new(3).stream(0, 0));
        assert!(report.started);
        let report = vq.update(&batch, 1, &mut Rng::new(3).stream(0, 1));
        assert!(!report.started, "only once");
    }
    let mut config = VqConfig::new(4, 2);
    config.kmeans_init = Some(0);
    let mut vq = config.init(&device).unwrap();
    vq.update(&stats(&rows, &[0; 40], &device), 0, &mut Rng::new(3).stream(0, 0));
    let codes = floats(vq.embedding.weight.val());
    assert!(codes.chunks(2).all(|code| rows.iter().any(|row| row.as_slice() == code)), "{codes:?}");
}

#[test]
fn an_update_keeps_the_codebook_trainable() {
    let device = Device::flex().autodiff();
    let mut config = VqConfig::new(11, 4);
    config.kmeans_init = Some(2);
    let mut vq = spread(&config, &device);
    let id = vq.embedding.weight.id;
    let z = normal(SHAPE, 1, &device);
    let out = vq.train_forward(z.clone(), &Pass::default());
    vq.update(&out.stats, 0, &mut Rng::new(1).stream(0, 0));
    assert_eq!(vq.embedding.weight.id, id);
    let grads = vq.train_forward(z, &Pass::default()).loss().unwrap().backward();
    let gradient = floats(vq.embedding.weight.grad(&grads).unwrap());
    assert!(gradient.iter().any(|x| *x != 0.0));
    assert!(!vq.valid().embedding.weight.val().is_autodiff());
}

#[test]
fn settings_out_of_range_are_refused() {
    let device = Device::flex();
    for config in [
        VqConfig::new(0, 4),
        VqConfig { beta: f64::NAN, ..VqConfig::new(4, 4) },
        VqConfig {
            codebook: Learning::Ema { decay: 1.0, epsilon: 1e-5, dialect: EmaDialect::Counting },
            ..VqConfig::new(4, 4)
        },
    ] {
        assert!(config.init(&device).is_err());
    }
    let shrinking = MultiScaleConfig { levels: vec![(2, 2), (1, 1)], ..multi_scale() };
    assert!(shrinking.init(&device).unwrap_err().to_string().contains("do not shrink"));
    let mut projected = multi_scale();
    projected.table.projected = Some(2);
    assert!(projected.init(&device).unwrap_err().to_string().contains("projected"));
    let other = QuantizerConfig::MultiScale(multi_scale()).layout(4, 4).unwrap_err().to_string();
    assert!(other.contains("latents are 4x4"), "{other}");
    assert!(FsqConfig::new([2, 5], 2).init(&device).is_err());
    assert!(FsqConfig::new([1 << 16, 1 << 16], 2).init(&device).is_err());
    let text = r#"{"kind":"vq","codes":8,"channels":4,"codebook":{"kind":"ema","decya":0.9}}"#;
    assert!(serde_json::from_str::<QuantizerConfig>(text).unwrap_err().to_string().contains("decya"));
    let text = r#"{"kind":"fsq","levels":[8,5],"channels":4,"depth":1}"#;
    assert!(serde_json::from_str::<QuantizerConfig>(text).unwrap_err().to_string().contains("depth"));
    for config in arms() {
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<QuantizerConfig>(&text).unwrap(), config);
    }
}
