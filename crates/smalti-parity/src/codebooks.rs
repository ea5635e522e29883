//! Tables of codes: taming's quantizers, Haiku's, those of vector-quantize-pytorch, ties and usage metrics.

use super::case::{Case, gradient, stored};
use super::comparison::Comparison;
use super::gradients::Official;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor};
use serde_json::Value;
use smalti_base::{Result, rng::Rng};
use smalti_models::checkpoint::{Rules, Stored, Values, load_from};
use smalti_models::quantizers::remap::{RemapConfig, Unknown};
use smalti_models::quantizers::vq::{EmaDialect, Estimator, Learning, Metric, Revive, ReviveUnit};
use smalti_models::quantizers::{Pass, Quantizer, Usage, Vq, VqConfig};
use std::collections::BTreeMap;

pub(super) fn knows_usage(case: &Case) -> bool {
    case.has(&["indices", "histogram", "perplexity"])
}

pub(super) fn usage(case: &Case, compare: &mut Comparison) -> Result<()> {
    let mut usage = Usage::new(case.setting("codebook_size")?);
    usage.add(case.ints("indices")?.iter().copied());
    compare.ints("histogram", &usage.histogram().iter().map(|n| *n as i64).collect::<Vec<_>>())?;
    compare.values("used_fraction", &[usage.used_fraction() as f32])?;
    compare.values("entropy_nats", &[usage.entropy() as f32])?;
    compare.values("entropy_bits", &[usage.entropy_bits() as f32])?;
    compare.values("perplexity", &[usage.perplexity() as f32])
}

pub(super) fn knows_ties(case: &Case) -> bool {
    case.has(&["z", "codebook", "distances", "indices"])
}

pub(super) fn ties(case: &Case, compare: &mut Comparison) -> Result<()> {
    let [n, c] = case.tensor::<2>("z")?.dims();
    let [k, _] = case.tensor::<2>("codebook")?.dims();
    let table = BTreeMap::from([("embedding.weight".to_string(), stored(&[k, c], case.floats("codebook")?))]);
    let (vq, _) = load_from(VqConfig::new(k, c).init(case.device())?, &table, &|_| false)?;
    compare.ids("indices", vq.encode(case.tensor::<2>("z")?.reshape([n, c, 1, 1])))
}

pub(super) fn knows_factorized(case: &Case) -> bool {
    let one = |key| case.only(key, 1).is_ok();
    case.has(&["x", "quantized", "indices", "from_indices"]) && one("num_quantizers") && one("groups")
}

pub(super) fn factorized(case: &Case, compare: &mut Comparison) -> Result<()> {
    let vq = from_library(case, case.device())?;
    let [b, n, c] = case.tensor::<3>("x")?.dims();
    let codes = vq.encode(latents(case, "x")?);
    compare.ids("indices", codes.clone())?;
    let decoded = tokens(vq.decode(codes.clone(), n, 1));
    compare.floats("quantized", decoded.clone())?;
    compare.floats("from_indices", decoded.reshape([b, n, c]))?;
    compare.floats("all_codes", vq.table().select(0, codes.flatten(0, 1)))
}

/// `[b, n, c]` or `[b, c, h, w]` as latents.
fn latents(case: &Case, name: &str) -> Result<Tensor<4>> {
    match case.shape(name)?.len() {
        4 => case.tensor(name),
        _ => Ok(case.tensor::<3>(name)?.swap_dims(1, 2).unsqueeze_dim(3)),
    }
}

/// Latents `[b, c, n, 1]` as `[b, n, c]`.
fn tokens(latents_bcn1: Tensor<4>) -> Tensor<3> {
    latents_bcn1.squeeze_dim::<3>(3).swap_dims(1, 2)
}

fn compare_latents(case: &Case, compare: &mut Comparison, name: &str, found: Tensor<4>) -> Result<()> {
    match case.shape(name)?.len() {
        4 => compare.floats(name, found),
        _ => compare.floats(name, tokens(found)),
    }
}

pub(super) fn knows_library(case: &Case) -> bool {
    case.has(&["step0.x", "step0.after.embed", "eval.x"])
}

/// What the library can do and ours cannot is off.
fn only_what_is_here(case: &Case) -> Result<()> {
    case.ignore(&["input_shape", "threshold_ema_dead_code", "kmeans_iters"]);
    for (key, number) in [
        ("num_quantizers", Value::from(1)),
        ("heads", 1.into()),
        ("orthogonal_reg_weight", 0.into()),
        ("codebook_diversity_loss_weight", 0.into()),
        ("sync_update_v", 0.into()),
        ("eps", 1e-5.into()),
    ] {
        case.only(key, number)?;
    }
    for (key, on) in [
        ("ema_update", true),
        ("channel_last", true),
        ("separate_codebook_per_head", false),
        ("learnable_codebook", false),
        ("stochastic_sample_codes", false),
        ("straight_through", false),
        ("reinmax", false),
        ("affine_param", false),
        ("use_ddp", false),
        ("sync_codebook", false),
    ] {
        case.only(key, on)?;
    }
    Ok(())
}

/// The case's quantizer of vector-quantize-pytorch, with its weights.
fn from_library(case: &Case, device: &Device) -> Result<Vq> {
    only_what_is_here(case)?;
    let (codes, channels) = (case.setting("codebook_size")?, case.setting("dim")?);
    let projected = case.setting_or("codebook_dim", channels)?;
    let threshold: f64 = case.setting_or("threshold_ema_dead_code", 0.0)?;
    let config = VqConfig {
        projected: (projected != channels).then_some(projected),
        metric: if case.setting_or("use_cosine_sim", false)? { Metric::Cosine } else { Metric::Euclidean },
        codebook: Learning::Ema { decay: case.setting_or("decay", 0.8)?, epsilon: 1e-5, dialect: EmaDialect::Counting },
        beta: case.setting_or("commitment_weight", 1.0)?,
        gradient: match case.setting_or("rotation_trick", true)? {
            true => Estimator::Rotation,
            false => Estimator::StraightThrough,
        },
        kmeans_init: match case.setting_or("kmeans_init", false)? {
            true => Some(case.setting_or("kmeans_iters", 10)?),
            false => None,
        },
        // The cases replace dead codes by rows that are given, not drawn.
        revive: (threshold > 0.0).then_some(Revive { threshold, unit: ReviveUnit::Latents, every: u64::MAX }),
        ..VqConfig::new(codes, channels)
    };
    Ok(Rules::builtin("vq", "quantizer")?.import(config.init(device)?, &case.weights("")?)?.0)
}

pub(super) fn library(case: &Case, compare: &mut Comparison) -> Result<()> {
    let mut vq = from_library(case, &case.autodiff())?;
    let mut step = 0;
    while case.has(&[format!("step{step}.x").as_str()]) {
        vq = library_step(case, compare, vq, step)?;
        step += 1;
    }
    let x = latents(case, "eval.x")?;
    let [_, _, h, w] = x.dims();
    let codes = vq.encode(x);
    compare.ids("eval.indices", codes.clone())?;
    let decoded = vq.decode(codes, h, w);
    compare_latents(case, compare, "eval.quantized", decoded.clone())?;
    // For images the library projects the rows of pixels instead of the channels there.
    match case.setting_or("accept_image_fmap", false)? {
        true => Ok(()),
        false => compare_latents(case, compare, "eval.codes_from_indices", decoded),
    }
}

fn library_step(case: &Case, compare: &mut Comparison, mut vq: Vq, step: u64) -> Result<Vq> {
    let name = |part: &str| format!("step{step}.{part}");
    let x = latents(case, &name("x"))?.autodiff().require_grad();
    let [b, ..] = x.dims();
    let codes = vq.config.codes;
    if step == 0 && vq.config.kmeans_init.is_some() {
        // The cases start from the first rows of the batch.
        let first = vq.train_forward(x.clone(), &Pass::default()).stats.parts;
        if let Some(part) = first.first() {
            vq = vq.start_from(&part.latents_nc, &(0..codes).collect::<Vec<_>>());
        }
    }
    let out = vq.train_forward(x.clone(), &Pass::default());
    compare_latents(case, compare, &name("quantized"), out.latents_bchw.clone())?;
    compare.ids(&name("indices"), out.codes.clone())?;
    let mut objective = (out.latents_bchw.clone() * latents(case, &name("coef"))?).sum() / b as f64;
    if let Some(loss) = out.loss() {
        compare.floats(&name("loss"), loss.clone())?;
        compare.floats(&name("commit_loss"), loss.clone() / vq.config.beta)?;
        objective = objective + loss;
    }
    let gradients = objective.backward();
    compare_latents(case, compare, &name("grad_x"), gradient("x", x.grad(&gradients))?)?;
    let gradients = GradientsParams::from_grads(gradients, &vq);
    Official::new(case, "vq", "quantizer")?.after(&name("grad.")).compare(case, compare, &vq, &gradients)?;
    vq.update(&out.stats, step, &mut Rng::new(0).stream(0, step));
    if let (Some(revive), Some(counts), Some(part)) = (vq.config.revive, &vq.cluster_size, out.stats.parts.first()) {
        let latents_nc = &part.latents_nc;
        // The i-th dead code becomes the i-th row.
        let [n, _] = latents_nc.dims();
        let mut dead = 0;
        let counts = counts.val().into_data();
        let rows = counts.iter::<f32>().map(|count| {
            let row = dead % n;
            dead += usize::from(f64::from(count) < revive.threshold);
            row
        });
        let rows: Vec<usize> = rows.collect();
        (vq, _) = vq.revive_from(latents_nc, &rows);
    }
    state(compare, &vq, &name("after.cluster_size"), &name("after.embed_avg"))?;
    compare.floats(&name("after.embed"), vq.embedding.weight.val())?;
    Ok(vq)
}

fn state(compare: &mut Comparison, vq: &Vq, counts: &str, sums: &str) -> Result<()> {
    if let Some(cluster_size) = &vq.cluster_size {
        compare.floats(counts, cluster_size.val())?;
    }
    match &vq.embed_avg {
        Some(embed_avg) => compare.floats(sums, embed_avg.val()),
        None => Ok(()),
    }
}

pub(super) fn knows_sonnet(case: &Case) -> bool {
    case.has(&["step0.inputs", "step0.encoding_indices", "eval.inputs"]) || case.has(&["inputs", "encoding_indices"])
}

/// `[b, h, w, c]` as latents.
fn channels_last(case: &Case, name: &str) -> Result<Tensor<4>> {
    Ok(case.tensor::<4>(name)?.permute([0, 3, 1, 2]))
}

fn perplexity(codes: &Tensor<2, Int>, vocabulary: usize) -> [f32; 1] {
    let mut usage = Usage::new(vocabulary);
    usage.add(codes.to_data().iter::<i64>());
    [usage.perplexity() as f32]
}

pub(super) fn sonnet(case: &Case, compare: &mut Comparison) -> Result<()> {
    let ema = case.has(&["step0.inputs"]);
    let learning = match ema {
        true => Learning::Ema {
            decay: case.setting("decay")?,
            epsilon: case.setting("epsilon")?,
            dialect: EmaDialect::Sonnet,
        },
        false => Learning::Gradient { legacy: false },
    };
    let config = VqConfig {
        codebook: learning,
        beta: case.setting("commitment_cost")?,
        ..VqConfig::new(case.setting("num_embeddings")?, case.setting("embedding_dim")?)
    };
    let vq = config.init(&case.autodiff())?;
    let (mut vq, _) = Rules::builtin("vq", "sonnet")?.import(vq, &case.weights("")?)?;
    if !ema {
        let loss = sonnet_pass(case, compare, &vq, "", channels_last(case, "inputs")?.autodiff())?.1;
        let gradients = GradientsParams::from_grads(loss.backward(), &vq);
        return Official::new(case, "vq", "sonnet")?.compare(case, compare, &vq, &gradients);
    }
    for step in 0u64.. {
        let prefix = format!("step{step}.");
        if !case.has(&[format!("{prefix}inputs").as_str()]) {
            break;
        }
        let x = channels_last(case, &format!("{prefix}inputs"))?.autodiff();
        let (stats, _) = sonnet_pass(case, compare, &vq, &prefix, x)?;
        vq.update(&stats.stats, step, &mut Rng::new(0).stream(0, step));
        let after = |part: &str| format!("{prefix}after.vector_quantizer_ema/{part}");
        compare.floats(&after("embeddings"), vq.embedding.weight.val().transpose())?;
        if let (Some(counts), Some(sums)) = (&vq.cluster_size, &vq.embed_avg) {
            compare.floats(&after("~/ema_cluster_size/hidden"), counts.val())?;
            compare.floats(&after("~/ema_dw/hidden"), sums.val().transpose())?;
        }
    }
    let x = channels_last(case, "eval.inputs")?.autodiff().require_grad();
    let (out, loss) = sonnet_pass(case, compare, &vq, "eval.", x.clone())?;
    let [_, c, ..] = x.dims();
    let slope = Tensor::<1, Int>::arange(0..c as i64, case.device()).float().reshape([1, c, 1, 1]);
    let gradients = ((out.latents_bchw * slope).sum() + loss).backward();
    compare.floats("eval.grad_inputs", gradient("inputs", x.grad(&gradients))?.permute([0, 2, 3, 1]))
}

fn sonnet_pass(
    case: &Case,
    compare: &mut Comparison,
    vq: &Vq,
    prefix: &str,
    x: Tensor<4>,
) -> Result<(smalti_models::quantizers::Quantized, Tensor<1>)> {
    let out = vq.train_forward(x, &Pass::default());
    let loss = out.loss().unwrap_or_else(|| Tensor::zeros([1], case.device()));
    compare.floats(&format!("{prefix}quantize"), out.latents_bchw.clone().permute([0, 2, 3, 1]))?;
    compare.floats(&format!("{prefix}loss"), loss.clone())?;
    compare.values(&format!("{prefix}perplexity"), &perplexity(&out.codes, vq.config.codes))?;
    compare.ids(&format!("{prefix}encoding_indices"), out.codes.clone())?;
    Ok((out, loss))
}

pub(super) fn knows_taming(case: &Case) -> bool {
    case.has(&["legacy.loss", "fixed.loss", "ema.after.weight"])
}

pub(super) fn taming(case: &Case, compare: &mut Comparison) -> Result<()> {
    let rules = Rules::builtin("vqgan", "quantizer")?;
    // The case holds both forms of the loss, and one kind of remapping.
    case.ignore(&["vq.legacy", "vq.remap", "vq.unknown_index"]);
    case.only("vq.sane_index_shape", false)?;
    for (name, legacy) in [("legacy", true), ("fixed", false)] {
        let config = VqConfig {
            codebook: Learning::Gradient { legacy },
            beta: case.setting("vq.beta")?,
            ..VqConfig::new(case.setting("vq.n_e")?, case.setting("vq.e_dim")?)
        };
        let (vq, _) = rules.import(config.init(&case.autodiff())?, &case.weights("vq.")?)?;
        let z = case.tensor::<4>("z")?.autodiff().require_grad();
        let out = vq.train_forward(z.clone(), &Pass::default());
        let loss = out.loss().unwrap_or_else(|| Tensor::zeros([1], case.device()));
        compare.floats("z_q", out.latents_bchw.clone())?;
        compare.ids("indices", out.codes)?;
        compare.floats(&format!("{name}.loss"), loss.clone())?;
        let gradients = (loss + out.latents_bchw.square().sum() * 0.1).backward();
        compare.floats(&format!("{name}.grad_z"), gradient("z", z.grad(&gradients))?)?;
        let table = gradient("codebook", vq.embedding.weight.grad(&gradients))?;
        compare.floats(&format!("{name}.grad_codebook"), table)?;
    }
    let config = VqConfig {
        codebook: Learning::Ema {
            decay: case.setting("ema.decay")?,
            epsilon: case.setting("ema.eps")?,
            dialect: EmaDialect::Empty,
        },
        beta: case.setting("ema.beta")?,
        ..VqConfig::new(case.setting("ema.num_tokens")?, case.setting("ema.codebook_dim")?)
    };
    let (mut vq, _) = rules.import(config.init(&case.autodiff())?, &case.weights("ema.")?)?;
    let out = vq.train_forward(case.tensor::<4>("ema.z")?.autodiff(), &Pass::default());
    compare.floats("ema.z_q", out.latents_bchw.clone())?;
    compare.values("ema.perplexity", &perplexity(&out.codes, vq.config.codes))?;
    compare.ids("ema.indices", out.codes.clone())?;
    compare.floats("ema.loss", out.loss().unwrap_or_else(|| Tensor::zeros([1], case.device())))?;
    vq.update(&out.stats, 0, &mut Rng::new(0).stream(0, 0));
    compare.floats("ema.after.weight", vq.embedding.weight.val())?;
    state(compare, &vq, "ema.after.cluster_size", "ema.after.embed_avg")?;
    if case.has(&["remap.used"]) {
        remapped(case, compare)?;
    }
    match case.has(&["gumbel.z"]) {
        true => super::gumbel::taming(case, compare),
        false => Ok(()),
    }
}

/// The tensors `remap.*` of taming's case: tokens for some of the codes, one for all others.
fn remapped(case: &Case, compare: &mut Comparison) -> Result<()> {
    let [kept] = case.ids::<1>("remap.used")?.dims();
    let config = VqConfig {
        remap: Some(RemapConfig { kept, unknown: Unknown::Extra }),
        ..VqConfig::new(case.setting("vq.n_e")?, case.setting("vq.e_dim")?)
    };
    let mut weights = case.weights("vq.")?;
    let used = Stored { shape: vec![kept], values: Values::Ints(case.ints("remap.used")?.to_vec()) };
    weights.insert("used".into(), used);
    let (vq, _) = Rules::builtin("vqgan", "quantizer")?.import(config.init(case.device())?, &weights)?;
    let z = case.tensor::<4>("z")?;
    let [_, _, h, w] = z.dims();
    let tokens = vq.encode(z);
    compare.ids("remap.indices", tokens.clone())?;
    compare.floats("remap.entries", vq.decode(tokens, h, w))
}
