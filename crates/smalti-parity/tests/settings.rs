//! Whatever an official configuration allows runs, and what is not supported is said by name.
#![allow(clippy::unwrap_used)]

mod made;

use made::{Made, Tensors};
use smalti_models::checkpoint::{Stored, Values};
use smalti_parity::Status;

#[test]
fn settings_that_are_not_understood_are_named() {
    for (case, key, value, parts) in [
        (
            "vqgan/net2net-class",
            "transformer.rotary",
            "yes".into(),
            ["vqgan/", "config.transformer: unknown key `rotary`"],
        ),
        ("vqgan/net2net-class", "beams", 4.into(), ["vqgan/", "config.beams is not supported"]),
        ("vqgan/net2net-class", "permuter", "Hilbert".into(), ["vqgan/", "unknown permuter `Hilbert`"]),
        (
            "vqgan/vqmodel-tiny",
            "lossconfig.use_actnorm",
            true.into(),
            ["vqgan/", "config.lossconfig.use_actnorm = true"],
        ),
        ("maskgit/transformer", "rope", true.into(), ["maskgit/", "unknown key `rope`"]),
        ("maskgit/transformer", "vocab_size", 48.into(), ["maskgit/", "config.vocab_size = 48"]),
        ("vit-vqgan/vitvq-tiny", "loss.disc_loss", "wasserstein".into(), ["vit-vqgan/", "`wasserstein`"]),
        ("fsq/official_8_5_5", "eps", 0.01.into(), ["fsq/", "config.eps = 0.01"]),
        ("autoencoder-kl/ldm_kl_f4", "ddconfig.attn_type", "linear".into(), ["autoencoder-kl/", "attn_type"]),
        ("autoencoder-kl/diffusers_kl", "block_out_channels", vec![16, 24].into(), ["autoencoder-kl/", "with 24"]),
        ("var/quantizer-allshared", "using_lfq", true.into(), ["var/", "unknown key `using_lfq`"]),
        ("mar/tiny", "diffloss_kind", "flow".into(), ["mar/", "config.diffloss_kind"]),
        ("mar/tiny", "norm_eps", 1e-5.into(), ["mar/", "config.norm_eps"]),
        ("lpips/vgg-tiny", "net", "squeeze".into(), ["lpips/", "config.net"]),
        ("vq-vae/vqp_kmeans", "heads", 2.into(), ["vq-vae/", "config.heads = 2"]),
    ] {
        let value: serde_json::Value = value;
        let error = Made::from(case).set(key, value).refused();
        assert!(parts.iter().all(|part| error.contains(part)), "{case} {key}: {error}");
    }
}

#[test]
fn cases_that_no_stage_knows_list_what_they_hold() {
    let mut case = Made::from("maskgit/schedules").set("beams", 3);
    case.io = [("beam_scores".to_string(), Stored { shape: vec![1], values: Values::Floats(vec![1.0]) })].into();
    let report = case.run();
    assert_eq!(
        (report.status, report.not_compared.as_slice()),
        (Status::NotImplemented, &["beam_scores".to_string()][..])
    );
    let error = report.error.unwrap();
    assert!(
        error.contains("no stage of maskgit") && error.contains("beam_scores") && error.contains("beams"),
        "{error}"
    );
    case.file["system"] = "crystal-ball".into();
    assert!(case.run().error.unwrap().contains("no system crystal-ball"));
}

/// Lengthens the axis of a matrix, or of a vector, with zeros.
fn padded(weights: &mut Tensors, end: &str, axis: usize, length: usize) {
    for (_, stored) in weights.iter_mut().filter(|(name, _)| name.ends_with(end)) {
        let old = stored.shape[axis];
        let inner: usize = stored.shape[axis + 1..].iter().product();
        let rows = stored.floats().unwrap().chunks(old * inner);
        let values = rows.flat_map(|row| row.iter().copied().chain(vec![0.0; (length - old) * inner])).collect();
        stored.values = Values::Floats(values);
        stored.shape[axis] = length;
    }
}

/// Channels of an MLP that hold zeros change nothing, so that any number of channels has the values of the golden case.
#[test]
fn mlps_have_any_number_of_channels() {
    let mut case = Made::from("maskgit/transformer").set("intermediate_size", 75);
    for (end, axis) in [("output/kernel", 1), ("output/bias", 0)] {
        padded(&mut case.weights, &format!("Mlp_0/intermediate_{end}"), axis, 75);
    }
    padded(&mut case.weights, "Mlp_0/layer_output/kernel", 0, 75);
    case.passes(&["logits", "loss", "gen_cosine.result"]);

    // 4.3 widths of 48 are 206.4 channels; the official code rounds.
    let mut case = Made::from("var/transformer-l2norm").set("var.mlp_ratio", 4.3);
    padded(&mut case.weights, ".ffn.fc1.weight", 0, 206);
    padded(&mut case.weights, ".ffn.fc1.bias", 0, 206);
    padded(&mut case.weights, ".ffn.fc2.weight", 1, 206);
    case.passes(&["logits", "loss", "gen_cfg1.5.image"]);
    // 4.3 widths of 32 are 137.6 channels; timm makes 137 of them.
    for (name, key) in [("mar/tiny", "mlp_ratio"), ("mar/ar-causal", "mlp_ratio")] {
        let mut case = Made::from(name).set(key, 4.3);
        padded(&mut case.weights, ".mlp.fc1.weight", 0, 137);
        padded(&mut case.weights, ".mlp.fc1.bias", 0, 137);
        padded(&mut case.weights, ".mlp.fc2.weight", 1, 137);
        case.passes(&["z", "loss", "grad.z_proj.weight"]);
    }
}

/// The first image token as a second token of the condition: the logits that follow are the same.
#[test]
fn conditions_of_several_tokens() {
    let official = Made::from("vqgan/net2net-class");
    let ints = |name: &str| official.io[name].ints().unwrap();
    let (classes, codes) = (ints("c_indices").to_vec(), ints("z_indices").to_vec());
    let (images, length) = (classes.len(), codes.len() / classes.len());
    let vocabulary = official.floats("logits").len() / codes.len();
    let rows = |of: &dyn Fn(usize) -> Vec<i64>| (0..images).flat_map(of).collect::<Vec<i64>>();
    let condition = rows(&|image| vec![classes[image], codes[image * length]]);
    let rest = rows(&|image| codes[image * length + 1..(image + 1) * length].to_vec());
    let logits: Vec<f32> = official
        .floats("logits")
        .chunks(length * vocabulary)
        .flat_map(|image| image[vocabulary..].iter().copied())
        .collect();
    let entropy = |(logits, code): (&[f32], &i64)| {
        let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        sum.ln() - f64::from(logits[*code as usize])
    };
    let loss = logits.chunks(vocabulary).zip(&rest).map(entropy).sum::<f64>() / rest.len() as f64;
    let mut case = official.set("latent_hw", vec![3, 5]).set("cond", "VQModel").set("transformer.n_unmasked", 1);
    for (name, width, values) in [("c_indices", 2, condition), ("z_indices", length - 1, rest)] {
        case.io.insert(name.into(), Stored { shape: vec![images, width], values: Values::Ints(values) });
    }
    let case =
        ["greedy", "half", "topk", "pkeep", "grad", "image", "cond"].iter().fold(case, |case, name| case.without(name));
    let case = case.put("logits", &[images, length - 1, vocabulary], logits).put("loss", &[1], vec![loss as f32]);
    case.passes(&["logits", "loss"]);
    // Seen in both directions the condition makes something else of it.
    let report = case.set("transformer.n_unmasked", 2).run();
    assert!(report.status == Status::Failed && report.error.is_none());
}

fn mean(values: impl ExactSizeIterator<Item = f32>) -> f32 {
    let n = values.len() as f32;
    values.sum::<f32>() / n
}

/// Losses with other weights and of other kinds, from the official values of their parts.
#[test]
fn losses_of_vit_vqgan() {
    let softplus = |x: f32| x.exp().ln_1p();
    type Both<'a> = (&'a str, &'a dyn Fn(f32) -> f32, &'a dyn Fn(f32) -> f32, &'a dyn Fn(f32) -> f32);
    let kinds: [Both; 3] = [
        ("vanilla", &|fake| softplus(-fake), &|real| softplus(-real), &softplus),
        ("hinge", &|fake| -fake, &|real| (1.0 - real).max(0.0), &|fake| (1.0 + fake).max(0.0)),
        ("least_square", &|fake| fake * fake, &|real| (1.0 - real).powi(2), &|fake| (1.0 + fake).powi(2)),
    ];
    for (kind, generator, real, fake) in kinds {
        let case = Made::from("vit-vqgan/vitvq-tiny").without("grad.").without("disc_grad");
        let part = |name: &str| case.scalar(name);
        let nll = 0.3 * part("loglaplace") + 0.7 * part("loggaussian") + 0.2 * part("perceptual");
        let [reals, fakes] = ["real", "fake"].map(|name| case.floats(&format!("disc_logits_{name}")).to_vec());
        let adversarial = mean(fakes.iter().map(|logit| generator(*logit)));
        let discriminator =
            0.5 * (mean(reals.iter().map(|logit| real(*logit))) + mean(fakes.iter().map(|logit| fake(*logit))));
        let (total, penalty) = (nll + 0.4 * adversarial + 2.0 * part("emb_loss"), 5.0 * 4.0 / 2.0 * part("r1_reg"));
        let settings: [(&str, serde_json::Value); 9] = [
            ("disc_loss", kind.into()),
            ("loglaplace_weight", 0.3.into()),
            ("loggaussian_weight", 0.7.into()),
            ("perceptual_weight", 0.2.into()),
            ("adversarial_weight", 0.4.into()),
            ("codebook_weight", 2.0.into()),
            ("r1_gamma", 5.0.into()),
            ("do_r1_every", 4.into()),
            ("disc_start", 6.into()),
        ];
        let case = settings.into_iter().fold(case, |case, (key, value)| case.set(&format!("loss.{key}"), value));
        let case = case.number("nll", nll).number("g_loss", adversarial).number("gen_loss", total);
        let case = case.number("disc_loss_nor1", discriminator).number("disc_loss_r1", discriminator + penalty);
        case.passes(&["nll", "g_loss", "gen_loss", "disc_loss_nor1", "disc_loss_r1", "r1_reg"]);
        let without = case.set("loss.r1_gamma", 0.0).without("r1_reg").number("disc_loss_r1", discriminator);
        without.passes(&["disc_loss_r1"]);
    }
}

/// Another kind of discriminator, at half its strength, from the official values of the parts.
#[test]
fn losses_of_vqgan() {
    let softplus = |x: &f32| x.exp().ln_1p();
    let case = Made::from("vqgan/vqmodel-tiny").without("grad.").without("ae_loss_step0");
    let mean_of = |name: &str, sign: f32| mean(case.floats(name).iter().map(|logit| softplus(&(sign * logit))));
    let discriminator = 0.5 * (mean_of("logits_real", -1.0) + mean_of("logits_fake", 1.0));
    let total =
        case.scalar("nll_loss") + 0.5 * case.scalar("d_weight") * case.scalar("g_loss") + 3.0 * case.scalar("emb_loss");
    let case = case.set("lossconfig.disc_loss", "vanilla").set("lossconfig.disc_factor", 0.5);
    let case = case.set("lossconfig.codebook_weight", 3.0);
    let case = case.number("ae_loss_step100", total).number("disc_loss_step100", 0.5 * discriminator);
    case.passes(&["ae_loss_step100", "disc_loss_step100", "d_weight"]);
}

/// Three codes of each place by their formula: each is the nearest by angle to what the unit vectors before it left.
#[test]
fn residual_codes_of_vit_vqgan() {
    let official = Made::from("vit-vqgan/vitvq-tiny");
    let channels = 8;
    let unit = |row: &[f64]| {
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        row.iter().map(|x| x / norm).collect::<Vec<f64>>()
    };
    let rows = |values: &[f32]| -> Vec<Vec<f64>> {
        values.chunks(channels).map(|row| row.iter().map(|x| f64::from(*x)).collect()).collect()
    };
    let table = rows(official.weights["quantizer.embedding.weight"].floats().unwrap());
    let table: Vec<Vec<f64>> = table.iter().map(|row| unit(row)).collect();
    let distance = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>();
    let (mut codes, mut sums, mut error) = (Vec::new(), Vec::new(), 0.0);
    let latents = rows(official.floats("z"));
    for latent in &latents {
        let (mut rest, mut sum) = (latent.clone(), vec![0.0; channels]);
        for _ in 0..3 {
            let looked_for = unit(&rest);
            let nearness = |code: &usize| distance(&looked_for, &table[*code]);
            let code = (0..table.len()).min_by(|a, b| nearness(a).total_cmp(&nearness(b))).unwrap();
            error += nearness(&code);
            codes.push(code as i64);
            rest.iter_mut().zip(&table[code]).for_each(|(rest, x)| *rest -= x);
            sum.iter_mut().zip(&table[code]).for_each(|(sum, x)| *sum += x);
        }
        sums.extend(sum.iter().map(|x| *x as f32));
    }
    let loss = 1.25 * error / (3 * latents.len() * channels) as f64;
    let mut case = official.set("quantizer.use_residual", true).set("quantizer.num_quantizers", 3);
    case.io.insert("codes".into(), Stored { shape: vec![2, 16, 3], values: Values::Ints(codes) });
    let report = case.put("z_q", &[2, 16, channels], sums).number("emb_loss", loss as f32).run();
    assert_eq!(report.error, None);
    for name in ["codes", "z_q", "emb_loss"] {
        assert!(report.rows.iter().any(|row| row.tensor == name && row.within), "{name}: {:?}", report.rows);
    }
    let error = Made::from("vit-vqgan/vitvq-tiny").set("quantizer.use_residual", true).refused();
    assert!(error.contains("num_quantizers"), "{error}");
}
