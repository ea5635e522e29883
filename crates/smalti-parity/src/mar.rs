//! MAR: networks, losses, gradients and whole generations against the official code.

use super::case::Case;
use super::comparison::Comparison;
use super::diffusion::timesteps;
use super::gradients::Official;
use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use smalti_base::{Error, Layout, Result, TokenSpec};
use smalti_models::checkpoint::Rules;
use smalti_models::generators::causal_mar::TokenOrder;
use smalti_models::generators::denoiser::DiffusionConfig;
use smalti_models::generators::diffusion::NoiseSchedule;
use smalti_models::generators::{CausalMar, CausalMarConfig, Mar, MarConfig, StackConfig};
use smalti_models::sampling::{GuidanceSchedule, Sampling, VectorDraws, guide};
use smalti_models::tokenizers::patches::{patchify, unpatchify};
use smalti_models::{Condition, ConditionConfig, Generation, ImageRequest, Request};
use std::collections::HashMap;

pub(super) fn knows_masked(case: &Case) -> bool {
    case.has(&["latents", "mask", "encoder_out", "z", "mlp_out"])
}

fn stack(case: &Case, part: &str) -> Result<StackConfig> {
    let width: usize = case.setting(&format!("{part}embed_dim"))?;
    Ok(StackConfig {
        width,
        depth: case.setting(&format!("{part}depth"))?,
        heads: case.setting(&format!("{part}num_heads"))?,
        // timm cuts the fraction off.
        hidden: Some((width as f64 * case.setting_or("mlp_ratio", 4.0)?) as usize),
    })
}

/// Of no use where a stack says its own number of channels.
const MLP_RATIO: usize = 4;

fn diffusion(case: &Case) -> Result<DiffusionConfig> {
    Ok(DiffusionConfig {
        width: case.setting("diffloss_w")?,
        depth: case.setting("diffloss_d")?,
        steps: case.setting_or("diffusion_steps", 1000)?,
        schedule: NoiseSchedule::Cosine,
        sampling_steps: case.setting("num_sampling_steps")?,
        sampler: Default::default(),
        repeats: case.setting_or("diffusion_batch_mul", 1)?,
    })
}

fn model(case: &Case, device: &Device) -> Result<Mar> {
    case.only("norm_eps", 1e-6)?;
    // Saving memory, and the norms' affine form, are no part of what is computed.
    case.ignore(&["grad_checkpointing"]);
    let (size, patch): (usize, usize) = (case.setting("img_size")?, case.setting("patch_size")?);
    let side = size / case.setting::<usize>("vae_stride")? / patch;
    let channels = case.setting::<usize>("vae_embed_dim")? * patch * patch;
    let config = MarConfig {
        tokens: TokenSpec::continuous(Layout::Grid { h: side, w: side }, channels, (size, size)),
        condition: ConditionConfig::Class { classes: case.setting("class_num")? }.into(),
        condition_dropout: case.setting("label_drop_prob")?,
        encoder: stack(case, "encoder_")?,
        decoder: stack(case, "decoder_")?,
        mlp_ratio: MLP_RATIO,
        buffer: case.setting("buffer_size")?,
        dropout: case.setting_or("proj_dropout", 0.0)?,
        attention_dropout: case.setting_or("attn_dropout", 0.0)?,
        mask_ratio_min: case.setting("mask_ratio_min")?,
        diffusion: diffusion(case)?,
    };
    Ok(Rules::builtin("mar", "generator")?.import(config.init(device)?, &case.weights("")?)?.0)
}

/// A batch of the case.
struct Given {
    labels: Tensor<2, Int>,
    tokens: Tensor<3>,
    orders: Vec<Vec<usize>>,
    masks: Vec<Vec<usize>>,
    visible: Vec<Vec<usize>>,
}

fn orders(case: &Case, name: &str, length: usize) -> Result<Vec<Vec<usize>>> {
    Ok(timesteps(case, name)?.chunks(length).map(<[usize]>::to_vec).collect())
}

impl Given {
    fn read(case: &Case, model: &Mar) -> Result<Self> {
        let length = model.config.tokens.length();
        let tokens = patchify(case.tensor("latents")?, case.setting("patch_size")?);
        let places = |kept: f32| {
            let rows = case.floats("mask")?.chunks(length);
            Ok(rows.map(|row| (0..length).filter(|place| row[*place] == kept).collect()).collect::<Vec<Vec<usize>>>())
        };
        Ok(Self {
            labels: case.ids::<1>("labels")?.unsqueeze_dim(1),
            tokens,
            orders: orders(case, "orders", length)?,
            masks: places(1.0)?,
            visible: places(0.0)?,
        })
    }
}

pub(super) fn masked(case: &Case, compare: &mut Comparison) -> Result<()> {
    let model = model(case, &case.autodiff())?;
    let plain = model.valid();
    let given = Given::read(case, &plain)?;
    let length = plain.config.tokens.length();
    compare.floats("patches", given.tokens.clone())?;
    let latents = case.shape("latents")?;
    let size = (latents[2], latents[3]);
    compare.floats("unpatchified", unpatchify(given.tokens.clone(), case.setting("patch_size")?, size))?;
    // Masked are the first places of the orders.
    let mut mask = vec![0.0; given.orders.len() * length];
    for (image, (order, masked)) in given.orders.iter().zip(&given.masks).enumerate() {
        order[..masked.len()].iter().for_each(|place| mask[image * length + place] = 1.0);
    }
    compare.values("mask", &mask)?;

    let encoded = plain.encode(given.labels.clone(), given.tokens.clone(), &given.visible);
    compare.floats("encoder_out", encoded.clone())?;
    let dropped = case.floats("drop_rand")?.iter().map(|draw| *draw < plain.config.condition_dropout);
    let dropped: Vec<bool> = dropped.collect();
    let dropped = Tensor::from_data(TensorData::new(dropped, [given.masks.len(), 1]), case.device());
    let labels = given.labels.clone().mask_fill(dropped, plain.config.condition.null() as i32);
    compare.floats("encoder_out_train_drop", plain.encode(labels, given.tokens.clone(), &given.visible))?;

    let everywhere = vec![(0..length).collect::<Vec<usize>>(); given.masks.len()];
    let z = plain.decode(encoded, &given.visible, &everywhere);
    compare.floats("z", z.clone())?;
    rows(case, compare, &plain, &given, z)?;
    training(case, compare, &model, &given)?;
    let stages: Vec<&str> = case.names().filter_map(|name| name.strip_suffix(".output")).collect();
    stages.into_iter().try_for_each(|stage| generation(case, compare, &plain, &given, stage))
}

/// What the denoiser makes of all rows.
fn rows(case: &Case, compare: &mut Comparison, model: &Mar, given: &Given, z: Tensor<2>) -> Result<()> {
    let t = timesteps(case, "t")?;
    let targets: Tensor<2> = given.tokens.clone().flatten(0, 1);
    let repeats = t.len() / targets.dims()[0];
    let (targets, z) = (targets.repeat_dim(0, repeats), z.repeat_dim(0, repeats));
    let (diffusion, noise) = (model.config.diffusion.diffusion(), case.tensor::<2>("noise")?);
    let noisy = diffusion.add_noise(targets.clone(), &t, noise.clone());
    compare.floats("x_t", noisy.clone())?;
    let output = model.denoiser.forward(noisy.clone(), &t, z);
    compare.floats("mlp_out", output.clone())?;
    let losses = diffusion.losses(targets, noisy, &t, noise, output);
    compare.floats("loss_mse", losses.noise)?;
    compare.floats("loss_vb", losses.bound)
}

/// The loss, for which only masked rows are computed, and its gradients.
fn training(case: &Case, compare: &mut Comparison, model: &Mar, given: &Given) -> Result<()> {
    let mask = case.floats("mask")?;
    let t = timesteps(case, "t")?;
    let masked: Vec<usize> = (0..t.len()).filter(|row| mask[row % mask.len()] == 1.0).collect();
    let index: Vec<i32> = masked.iter().map(|row| *row as i32).collect();
    let index = Tensor::<1, Int>::from_data(TensorData::new(index, [masked.len()]), case.device());
    let noise = case.tensor::<2>("noise")?.select(0, index);
    let t: Vec<usize> = masked.iter().map(|row| t[*row]).collect();
    let loss = model.masked_loss(given.tokens.clone(), given.labels.clone(), &given.masks, &t, noise);
    compare.floats("loss", loss.clone())?;
    parameters(case, compare, model, loss)
}

fn parameters<M: Module>(case: &Case, compare: &mut Comparison, model: &M, loss: Tensor<1>) -> Result<()> {
    let gradients = GradientsParams::from_grads(loss.backward(), model);
    Official::new(case, "mar", "generator")?.compare(case, compare, model, &gradients)
}

/// Orders and noise of a generation. Rows are numbered as they are first asked for: iteration by iteration, image by image.
struct Replay {
    orders: Vec<Vec<usize>>,
    first: Vec<f32>,
    steps: Vec<f32>,
    /// Rows of all iterations, in which guidance counts those of an iteration twice.
    rows: usize,
    guided: bool,
    seen: HashMap<(usize, usize, usize), usize>,
    /// The first row of each iteration.
    starts: Vec<usize>,
}

impl VectorDraws for Replay {
    fn order(&mut self, image: usize, _: usize) -> Vec<usize> {
        self.orders[image].clone()
    }

    fn noise(&mut self, image: usize, step: usize, place: usize, moment: usize, values: &mut [f32]) {
        let new = self.seen.len();
        if step == self.starts.len() {
            self.starts.push(new);
        }
        let row = *self.seen.entry((image, step, place)).or_insert(new);
        let from = match moment.checked_sub(1) {
            None => &self.first[row * values.len()..],
            Some(moment) => {
                let row = if self.guided { self.starts[step] + row } else { row };
                &self.steps[(moment * self.rows + row) * values.len()..]
            }
        };
        let count = values.len();
        values.copy_from_slice(&from[..count]);
    }
}

/// A whole generation with given draws.
fn generation(case: &Case, compare: &mut Comparison, model: &Mar, given: &Given, stage: &str) -> Result<()> {
    let name = |part: &str| format!("{stage}.{part}");
    let output = name("output");
    let schedule = match case.told::<String>(&output, "schedule")?.as_str() {
        "linear" => GuidanceSchedule::Linear,
        "constant" => GuidanceSchedule::Constant,
        other => return Err(Error::unknown(case.title(), "schedule", other, ["linear", "constant"])),
    };
    let sampling = Sampling {
        temperature: case.told(&output, "temperature")?,
        guidance: case.told(&output, "cfg")?,
        guidance_schedule: schedule,
        steps: Some(case.told(&output, "num_iter")?),
        ..Default::default()
    };
    let labels = case.ints("labels")?.iter();
    let image = |label: &i64| ImageRequest::new(Condition::class(*label as u32), 0);
    let request = Request::new(labels.map(image).collect(), sampling.clone());
    let orders = orders(case, &name("orders"), model.config.tokens.length())?;
    let draws = Replay {
        orders: orders.clone(),
        first: case.floats(&name("init_noise"))?.to_vec(),
        steps: case.floats(&name("step_noise"))?.to_vec(),
        rows: case.shape(&name("step_noise"))?.get(1).copied().unwrap_or_default(),
        guided: sampling.is_guided(),
        seen: HashMap::new(),
        starts: Vec::new(),
    };
    let mut generation = model.start_with(&request, Box::new(draws))?;
    let (mut predicted, mut guidance, mut left) = (Vec::new(), Vec::new(), Vec::new());
    while generation.done() < generation.steps() {
        let before: usize = generation.masked().iter().sum();
        guidance.push(generation.guidance(0));
        left.push(generation.planned(0));
        generation.step()?;
        predicted.push((before - generation.masked().iter().sum::<usize>()) as i64);
    }
    compare.ints(&name("num_pred"), &predicted)?;
    compare.values(&name("cfg_iter"), &guidance)?;
    if case.has(&["mask_len"]) && case.shape("mask_len")? == [left.len()] {
        compare.ints("mask_len", &left.iter().map(|left| *left as i64).collect::<Vec<_>>())?;
    }
    first_iteration(case, compare, model, given, (stage, &sampling), &orders, left[0])?;
    let latents = case.shape(&output)?;
    let tokens = generation.codes().continuous();
    let tokens = tokens.ok_or_else(|| Error::invalid(case.title(), "the tokens are not vectors"))?;
    compare.floats(&output, unpatchify(tokens, case.setting("patch_size")?, (latents[2], latents[3])))
}

/// The first iteration as the official code runs it: the unconditional half goes a way of its own, which nothing else sees.
fn first_iteration(
    case: &Case,
    compare: &mut Comparison,
    model: &Mar,
    given: &Given,
    (stage, sampling): (&str, &Sampling),
    orders: &[Vec<usize>],
    left: usize,
) -> Result<()> {
    let name = |part: &str| format!("{stage}.{part}");
    let mut wanted: Vec<Vec<usize>> = orders.iter().map(|order| order[left..].to_vec()).collect();
    wanted.iter_mut().for_each(|places| places.sort_unstable());
    let n: usize = wanted.iter().map(Vec::len).sum();
    let none = given.labels.full_like(model.config.condition.null() as i32);
    let guided = sampling.is_guided();
    let ids = if guided { Tensor::cat(vec![given.labels.clone(), none], 0) } else { given.labels.clone() };
    let visible = vec![Vec::new(); wanted.len()];
    let z = model.decode(model.encode(ids, given.tokens.clone(), &visible), &visible, &wanted);
    compare.floats(&name("z0"), z.clone())?;

    let config = &model.config.diffusion;
    let diffusion = config.diffusion().respaced(&config.sampling_steps.timesteps(config.steps)?);
    let halves = z.dims()[0] / n;
    let first = case.tensor::<2>(&name("init_noise"))?.narrow(0, 0, n);
    let noise = case.tensor::<3>(&name("step_noise"))?.narrow(1, 0, halves * n);
    let c = first.dims()[1];
    // Guidance of the first iteration, as compared before.
    let scale = case.floats(&name("cfg_iter"))?[0];
    let mut x = first.repeat_dim(0, halves);
    for t in (0..diffusion.steps()).rev() {
        let same = x.clone().narrow(0, 0, n).repeat_dim(0, halves);
        let mut output = model.denoiser.forward(same, &vec![diffusion.timesteps[t]; halves * n], z.clone());
        if guided {
            let noise = guide(output.clone().narrow(1, 0, c), scale).repeat_dim(0, halves);
            output = Tensor::cat(vec![noise, output.narrow(1, c, c)], 1);
        }
        let step = diffusion.reverse(x, &[t], output);
        let noise = noise.clone().narrow(0, diffusion.steps() - 1 - t, 1).squeeze_dim(0);
        x = diffusion.ancestral(step, t, noise, sampling.temperature);
    }
    compare.floats(&name("tokens0"), x)
}

pub(super) fn knows_causal(case: &Case) -> bool {
    case.has(&["tokens", "labels", "z", "t", "noise"]) && case.has_settings(&["seq_len"])
}

pub(super) fn causal(case: &Case, compare: &mut Comparison) -> Result<()> {
    case.only("norm_eps", 1e-6)?;
    let length: usize = case.setting("seq_len")?;
    let config = CausalMarConfig {
        tokens: TokenSpec::continuous(Layout::Sequence { n: length }, case.setting("token_dim")?, (1, length)),
        condition: ConditionConfig::Class { classes: case.setting("class_num")? }.into(),
        condition_dropout: 0.0,
        order: TokenOrder::Raster,
        decoder: stack(case, "")?,
        mlp_ratio: MLP_RATIO,
        dropout: 0.0,
        attention_dropout: 0.0,
        diffusion: diffusion(case)?,
    };
    let rules = Rules::builtin("mar", "generator")?;
    let model: CausalMar = rules.import(config.init(&case.autodiff())?, &case.weights("")?)?.0;
    let tokens = case.tensor::<3>("tokens")?;
    let labels = case.ids::<1>("labels")?.unsqueeze_dim::<2>(1);
    let orders = vec![(0..length).collect::<Vec<usize>>(); tokens.dims()[0]];
    compare.floats("z", model.valid().conditions(labels.clone(), tokens.clone(), &orders))?;
    let loss = model.ordered_loss(tokens, labels, &orders, &timesteps(case, "t")?, case.tensor("noise")?);
    compare.floats("loss", loss.clone())?;
    parameters(case, compare, &model, loss)
}
