//! Residual quantization against its definition, written out in double precision.

mod draws;

use burn::tensor::{Device, Int, Tensor, TensorData};
use smalti_base::{Layout, OneOrEach, Rng, Vocabulary};
use smalti_models::Codes;
use smalti_models::quantizers::residual::Moment;
use smalti_models::quantizers::{Pass, Quantizer, QuantizerSettings, Residual, ResidualConfig, Stats};

fn normal<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    let mut stream = Rng::new(seed).stream(0, 0);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| stream.normal()).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

fn ints<const D: usize>(tensor: Tensor<D, Int>) -> Vec<usize> {
    tensor.into_data().iter::<i64>().map(|code| code as usize).collect()
}

fn close(name: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{name}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= tolerance * (1.0 + e.abs()), "{name}[{i}]: found {f}, expected {e}");
    }
}

fn make(config: &ResidualConfig, device: &Device) -> Residual {
    let _alone = draws::seeded(device, 7);
    config.init(device).expect("the settings are in range")
}

/// A table as the definition has it.
struct Table {
    vectors: Vec<Vec<f64>>,
    counts: Vec<f64>,
    sums: Vec<Vec<f64>>,
}

impl Table {
    fn of(quantizer: &Residual, at: usize) -> Self {
        let codebook = &quantizer.codebooks[at];
        let [_, c] = codebook.weight.dims();
        let rows = |values: Vec<f64>| values.chunks(c).map(<[f64]>::to_vec).collect();
        Self {
            vectors: rows(floats(codebook.weight.val().inner())),
            counts: floats(codebook.cluster_size.val().inner()),
            sums: rows(floats(codebook.embed_avg.val().inner())),
        }
    }

    fn nearest(&self, latent: &[f64]) -> usize {
        let distance = |vector: &Vec<f64>| vector.iter().zip(latent).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
        let mut best = 0;
        for (code, vector) in self.vectors.iter().enumerate() {
            if distance(vector) < distance(&self.vectors[best]) {
                best = code;
            }
        }
        best
    }

    fn assigned(
        &mut self,
        latents: &[Vec<f64>],
        codes: &[usize],
        decay: f64,
        replacement: Option<&dyn Fn(usize) -> Vec<f64>>,
    ) {
        let k = self.vectors.len();
        for code in 0..k {
            let mine: Vec<&Vec<f64>> = latents.iter().zip(codes).filter(|(_, c)| **c == code).map(|(l, _)| l).collect();
            self.counts[code] = decay * self.counts[code] + (1.0 - decay) * mine.len() as f64;
            for (i, sum) in self.sums[code].iter_mut().enumerate() {
                *sum = decay * *sum + (1.0 - decay) * mine.iter().map(|latent| latent[i]).sum::<f64>();
            }
            if let (Some(replacement), true) = (replacement, self.counts[code] < 1.0) {
                (self.counts[code], self.sums[code]) = (1.0, replacement(code));
            }
        }
        let total: f64 = self.counts.iter().sum();
        for code in 0..k {
            let smooth = (self.counts[code] + 1e-5) / (total + k as f64 * 1e-5) * total;
            self.vectors[code] = self.sums[code].iter().map(|sum| sum / smooth).collect();
        }
    }
}

fn in_order(latents_nc: &Tensor<2>, k: usize) -> Tensor<2> {
    let n = latents_nc.dims()[0];
    let rows: Vec<i32> = (0..k).map(|row| (row % n) as i32).collect();
    latents_nc.clone().select(0, Tensor::from_data(TensorData::new(rows, [k]), &latents_nc.device()))
}

/// One training step of the official order: a shared table moves after each depth, so that the next depth meets the moved one.
/// The decay is such that a count of exactly 1 stays one in single precision.
#[test]
fn a_step_follows_the_definition() {
    let device = Device::flex();
    for (restart, update) in
        [(false, Moment::BetweenDepths), (true, Moment::BetweenDepths), (false, Moment::After), (true, Moment::After)]
    {
        let config = ResidualConfig { restart, update, decay: OneOrEach::One(0.75), ..ResidualConfig::new(9, 4, 3) };
        let mut quantizer = make(&config, &device);
        let z = normal([2, 4, 3, 2], 1, &device);
        let mut tables = [Table::of(&quantizer, 0)];
        let mut rest: Vec<Vec<f64>> = floats(quantizer.rows(z.clone())).chunks(4).map(<[f64]>::to_vec).collect();
        let (mut codes, mut parts) = (vec![Vec::new(); rest.len()], Vec::new());
        let mut moved = Table::of(&quantizer, 0);
        for _ in 0..3 {
            let table = match update {
                Moment::BetweenDepths => &moved,
                Moment::After => &tables[0],
            };
            let chosen: Vec<usize> = rest.iter().map(|latent| table.nearest(latent)).collect();
            let vectors: Vec<Vec<f64>> = chosen.iter().map(|code| table.vectors[*code].clone()).collect();
            parts.push((rest.clone(), chosen.clone()));
            let (latents, n) = (rest.clone(), rest.len());
            let replacement = |code: usize| latents[code % n].clone();
            moved.assigned(&rest, &chosen, 0.75, restart.then_some(&replacement as &dyn Fn(usize) -> Vec<f64>));
            for ((latent, vector), (codes, code)) in rest.iter_mut().zip(vectors).zip(codes.iter_mut().zip(chosen)) {
                latent.iter_mut().zip(vector).for_each(|(x, v)| *x -= v);
                codes.push(code);
            }
        }
        tables[0] = moved;
        let replace = |restart: bool| restart.then_some(in_order as fn(&Tensor<2>, usize) -> Tensor<2>);
        let trained = match replace(restart) {
            Some(mut rows) => quantizer.train_with(z, Some(&mut rows)),
            None => quantizer.train_with(z, None),
        };
        assert_eq!(ints(trained.codes), codes.concat(), "{update:?}, restart {restart}");
        match replace(restart) {
            Some(mut rows) => quantizer.update_with(&trained.stats, Some(&mut rows)),
            None => quantizer.update_with(&trained.stats, None),
        };
        let found = Table::of(&quantizer, 0);
        close("counts", &found.counts, &tables[0].counts, 1e-6);
        close("sums", &found.sums.concat(), &tables[0].sums.concat(), 1e-5);
        close("vectors", &found.vectors.concat(), &tables[0].vectors.concat(), 1e-4);
    }
}

/// With its own copy of the stream a pass moves the tables exactly as the update does afterwards.
#[test]
fn an_update_repeats_the_moves_of_its_pass() {
    let device = Device::flex();
    // Fewer latents than codes, and more.
    for (codes, h) in [(40, 2), (5, 4)] {
        let quantizer = make(&ResidualConfig::new(codes, 4, 2), &device);
        let before = floats(quantizer.vectors(0));
        let z = normal([2, 4, h, 3], 3, &device);
        let stream = Rng::new(11).stream(0, 5);
        let pass = Pass { stream: Some(stream.clone()), ..Pass::default() };
        let trained = quantizer.train_forward(z.clone(), &pass);
        let mut first = quantizer.clone();
        let one = Stats { parts: trained.stats.parts[..1].to_vec() };
        first.update(&one, 5, &mut stream.clone());
        // What the second depth met is the table after the first move.
        let second = &trained.stats.parts[1];
        let expected = smalti_kernels::nearest_code(second.latents_nc.clone(), first.vectors(0));
        assert_eq!(ints(second.codes_n.clone()), ints(expected));
        let counts = floats(first.codebooks[0].cluster_size.val());
        assert!(counts.iter().all(|count| *count >= 1.0), "{counts:?}");
        // A code that was not used is now a latent of the batch, up to the noise of copies.
        let latents = floats(quantizer.rows(z));
        let sums = floats(first.codebooks[0].embed_avg.val());
        for (code, sum) in sums.chunks(4).enumerate().filter(|(code, _)| counts[*code] == 1.0) {
            let near = |latent: &[f64]| latent.iter().zip(sum).all(|(a, b)| (a - b).abs() <= 0.005 + 1e-6);
            assert!(latents.chunks(4).any(near), "code {code} is no latent");
        }
        // The module itself did not change.
        assert_eq!(floats(quantizer.vectors(0)), before);
    }
}

#[test]
fn training_gives_the_codes_of_encoding_unless_a_shared_table_moves() {
    let device = Device::flex().autodiff();
    let shared = ResidualConfig::new(11, 4, 3);
    for config in [
        ResidualConfig { shared: false, ..shared.clone() },
        ResidualConfig { update: Moment::After, ..shared.clone() },
        ResidualConfig { fold: [1, 2], ..ResidualConfig::new(11, 4, 1) },
        ResidualConfig { shared: false, codes: Vocabulary::Each(vec![5, 11, 7]), ..shared.clone() },
    ] {
        let quantizer = make(&config, &device);
        let z = normal([2, 4, 4, 6], 1, &device).require_grad();
        let pass = Pass { stream: Some(Rng::new(1).stream(0, 0)), ..Pass::default() };
        let trained = quantizer.train_forward(z.clone(), &pass);
        let codes = quantizer.encode(z.clone());
        assert_eq!(ints(trained.codes), ints(codes.clone()), "{config:?}");
        let Layout::Stack { h, w, depth } = config.layout(4, 6).unwrap() else { panic!("not a stack") };
        assert_eq!(codes.dims(), [2, h * w * depth]);
        let decoded = quantizer.decode(codes.clone(), h, w);
        assert_eq!(decoded.dims(), [2, 4, 4, 6]);
        close("latents", &floats(trained.latents_bchw.clone().inner()), &floats(decoded.clone()), 1e-5);
        close("prefix", &floats(quantizer.decode_prefix(codes.clone(), h, w, depth).unwrap()), &floats(decoded), 1e-6);
        for parts in [0, depth + 1] {
            assert!(quantizer.decode_prefix(codes.clone(), h, w, parts).is_err());
        }
        // The gradient passes straight through.
        let gradients = trained.latents_bchw.sum().backward();
        assert!(floats(z.grad(&gradients).unwrap()).iter().all(|gradient| (gradient - 1.0).abs() < 1e-6));
        let commitment = &trained.terms[0];
        assert_eq!((commitment.name, commitment.weight), ("commitment", 0.25));
        for (place, code) in ints(codes).into_iter().enumerate() {
            assert!(code < config.vocabulary().of(place % depth));
        }
    }
}

#[test]
fn soft_codes_are_a_softmax_of_distances_and_draws_follow_it() {
    let device = Device::flex();
    let config = ResidualConfig { shared: false, codes: Vocabulary::Each(vec![3, 6]), ..ResidualConfig::new(1, 4, 2) };
    let quantizer = make(&config, &device);
    let z = normal([1, 4, 1, 1], 2, &device);
    let temperature = 1.7;
    let Ok(Codes::Soft { codes, probabilities_blv }) = quantizer.soft_codes(z.clone(), temperature, None) else {
        panic!("there are soft codes")
    };
    assert_eq!(ints(codes), ints(quantizer.encode(z.clone())));
    let found = floats(probabilities_blv);
    let expected = |rest: &[f64], depth: usize| {
        let weights: Vec<f64> = floats(quantizer.vectors(depth))
            .chunks(4)
            .map(|vector| (-vector.iter().zip(rest).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / temperature).exp())
            .collect();
        let total: f64 = weights.iter().sum();
        weights.into_iter().map(|weight| weight / total).collect::<Vec<_>>()
    };
    let first = expected(&floats(z.clone()), 0);
    close("first depth", &found[..3], &first, 1e-5);
    assert_eq!(found[3..6], [0.0; 3], "codes that the first depth does not have");
    // Many copies of the latent: the first codes follow the distribution, the second ones that of what the first left over.
    let many = 20_000;
    let copies = z.clone().reshape([1, 4, 1, 1]).expand([1, 4, many, 1]);
    let mut stream = Rng::new(3).stream(0, 0);
    let (codes, shares) = quantizer.soft(copies, temperature, Some(&mut stream)).unwrap();
    let codes = ints(codes);
    for (code, expected) in first.iter().enumerate() {
        let share = codes.chunks(2).filter(|pair| pair[0] == code).count() as f64 / many as f64;
        let deviation = (expected * (1.0 - expected) / many as f64).sqrt();
        assert!((share - expected).abs() < 4.0 * deviation + 1e-9, "code {code}: {share} of {expected}");
    }
    let shares = floats(shares.narrow(1, 0, 40));
    for (pair, shares) in codes.chunks(2).zip(shares.chunks(12)).take(20) {
        let vector = &floats(quantizer.vectors(0))[pair[0] * 4..][..4];
        let rest: Vec<f64> = floats(z.clone()).iter().zip(vector).map(|(a, b)| a - b).collect();
        close("second depth", &shares[6..], &expected(&rest, 1), 1e-4);
    }
    assert!(quantizer.soft(z, 0.0, None).unwrap_err().to_string().contains("temperature is 0"));
}

#[test]
fn settings_that_do_not_fit_are_errors() {
    let device = Device::flex();
    let base = ResidualConfig::new(8, 4, 2);
    for (config, part) in [
        (ResidualConfig { depth: 0, ..base.clone() }, "at least 1"),
        (ResidualConfig { codes: 0.into(), ..base.clone() }, "codes is 0"),
        (ResidualConfig { codes: vec![8].into(), ..base.clone() }, "codes has 1 values for 2 depths"),
        (ResidualConfig { codes: vec![8, 9].into(), ..base.clone() }, "share a table"),
        (ResidualConfig { decay: OneOrEach::One(1.0), ..base.clone() }, "decay is 1"),
        (ResidualConfig { decay: OneOrEach::Each(vec![0.9, 0.8]), ..base.clone() }, "share a table"),
        (ResidualConfig { epsilon: 0.0, ..base.clone() }, "epsilon is 0"),
        (ResidualConfig { beta: -1.0, ..base.clone() }, "beta is -1"),
    ] {
        let error = config.init(&device).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let folded = ResidualConfig { fold: [2, 2], ..base };
    assert!(folded.layout(5, 4).unwrap_err().to_string().contains("fold"));
}
