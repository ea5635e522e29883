//! MaskGIT against the official JAX implementation: logits, loss, gradients and whole decodes with given noise.

#![allow(clippy::unwrap_used)]

mod golden;

use burn::module::Module;
use burn::tensor::Device;
use golden::Case;
use smalti_base::{Layout, TokenSpec};
use smalti_models::checkpoint::{Stored, load_from};
use smalti_models::generators::{MaskGit, MaskGitConfig};
use smalti_models::sampling::{Draws, Sampling, Schedule, argmax};
use smalti_models::{Condition, ConditionConfig, Generation, ImageRequest, Known, Request};
use std::collections::BTreeMap;

const CASE: &str = "maskgit/transformer";
const LENGTH: usize = 16;
const CODES: usize = 40;

fn config(schedule: Schedule) -> MaskGitConfig {
    MaskGitConfig {
        tokens: TokenSpec { layout: Layout::Grid { h: 4, w: 4 }, vocabulary: CODES, image_size: (64, 64) },
        condition: ConditionConfig::Class { classes: 6 },
        condition_dropout: 0.0,
        width: 32,
        depth: 2,
        heads: 4,
        mlp_ratio: 2,
        dropout: 0.0,
        attention_dropout: 0.0,
        schedule,
        label_smoothing: 0.1,
        min_masking_rate: 0.0,
    }
}

/// The official names in our words, with heads and head channels in one axis.
fn rename((name, tensor): (String, Stored)) -> (String, Stored) {
    let (layer, rest) = name.split_once('/').unwrap();
    let rest = rest.replace("layer_output_ln", "mlp_norm").replace("attention_output_ln", "attention_norm");
    let path = match layer.split_once('_').unwrap() {
        ("Embed", _) => rest
            .replace("word_embeddings/embedding", "words.table")
            .replace("position_embeddings/embedding", "positions.table")
            .replace("embeddings_ln", "embedding_norm"),
        ("MlmLayer", _) => {
            rest.replace("mlm_dense", "head").replace("mlm_ln", "head_norm").replace("mlm_bias/bias", "head_bias")
        }
        (_, index) => {
            let part = rest
                .replace("Attention_0/self_attention/out/", "attention.output.")
                .replace("Attention_0/self_attention/", "attention.")
                .replace("Attention_0/", "")
                .replace("Mlp_0/intermediate_output", "mlp.expand")
                .replace("Mlp_0/layer_output", "mlp.contract")
                .replace("Mlp_0/", "");
            format!("blocks.{index}.{part}")
        }
    };
    let (is_norm, is_output) = (path.contains("_norm"), path.contains(".output."));
    let path = path.replace('/', ".").replace(".kernel", ".weight").replace(".scale", ".gamma");
    let path = if is_norm { path.replace(".bias", ".beta") } else { path };
    let shape = match tensor.shape[..] {
        [heads, channels, width] if is_output => vec![heads * channels, width],
        [width, heads, channels] => vec![width, heads * channels],
        [heads, channels] if path.ends_with(".bias") => vec![heads * channels],
        _ => tensor.shape.clone(),
    };
    (path, Stored { shape, ..tensor })
}

fn model(schedule: Schedule, device: &Device) -> MaskGit {
    let weights: BTreeMap<String, Stored> =
        Case::open(CASE, "weights").into_tensors().into_iter().map(rename).collect();
    let model = config(schedule).init(device).unwrap();
    load_from(model, &weights, &|_| false).unwrap().0
}

#[test]
fn logits_loss_and_gradients() {
    let io = Case::open(CASE, "io");
    let model = model(Schedule::Cosine, &Device::flex().autodiff());
    let labels = io.ids::<1>("labels").reshape([2, 1]);

    let plain = model.valid();
    let ids = io.ids::<2>("input_ids").narrow(1, 1, LENGTH);
    let ids = ids.clone().mask_fill(ids.lower_elem(0), 46);
    let logits = plain.logits(plain.features(labels.clone(), ids), 47);
    io.check("logits", logits, 2e-5, 1e-4);

    let masks: Vec<Vec<bool>> =
        io.ints("mask").chunks(LENGTH).map(|row| row.iter().map(|m| *m == 1).collect()).collect();
    let loss = model.masked_loss(io.ids::<2>("tokens"), labels, &masks, 0.1).loss;
    io.check("loss", loss.clone(), 2e-5, 1e-4);
    let gradients = loss.backward();
    let query = &model.blocks[0].attention.query.weight;
    io.check("grad.Embed_0/word_embeddings/embedding", model.words.table.grad(&gradients).unwrap(), 2e-5, 1e-4);
    let name = "grad.TransformerLayer_0/Attention_0/self_attention/query/kernel";
    io.check(name, query.grad(&gradients).unwrap(), 2e-5, 1e-4);
    io.check("grad.MlmLayer_0/mlm_bias/bias", model.head_bias.grad(&gradients).unwrap(), 2e-5, 1e-4);
}

/// Noise from a golden case: `[steps, 2, 17, 40]` on tokens, `[steps, 2, 17]` on confidences.
struct Given {
    sample: Vec<f32>,
    choice: Vec<f32>,
    first_step: usize,
}

impl Given {
    fn index(&self, image: usize, step: usize, place: usize) -> usize {
        ((step - self.first_step) * 2 + image) * (LENGTH + 1) + place + 1
    }
}

impl Draws for Given {
    fn token(&mut self, image: usize, step: usize, place: usize, logits: &[f32]) -> usize {
        let first = self.index(image, step, place) * CODES;
        let noisy: Vec<f32> = logits.iter().zip(&self.sample[first..]).map(|(logit, noise)| logit + noise).collect();
        argmax(&noisy)
    }

    fn confidence_noise(&mut self, image: usize, step: usize, place: usize) -> f32 {
        self.choice[self.index(image, step, place)]
    }
}

fn replay(io: &Case, name: &str, schedule: Schedule, steps: usize, first_step: usize) {
    let get = |part: &str| format!("{name}.{part}");
    let images = io.ints(&get("input_ids")).chunks(LENGTH + 1).map(|row| ImageRequest {
        condition: Condition::Class(row[0] as u32 - CODES as u32),
        seed: 0,
        known: Some(Known {
            codes: row[1..].iter().map(|id| (*id).max(0) as u32).collect(),
            keep: row[1..].iter().map(|id| *id >= 0).collect(),
        }),
    });
    let sampling = Sampling { steps: Some(steps), first_step, ..Default::default() };
    let draws = Given {
        sample: io.floats(&get("gumbel_sample")).to_vec(),
        choice: io.floats(&get("gumbel_choice")).to_vec(),
        first_step,
    };
    let model = model(schedule, &Device::flex());
    let request = Request { images: images.collect(), sampling };
    let mut generation = model.start_with(&request, Box::new(draws)).unwrap();
    let (all, masked) = (io.ints(&get("all_steps")), io.ints(&get("masked_after")));
    assert_eq!(generation.steps(), steps - first_step);
    for done in 0..steps - first_step {
        generation.next();
        let codes = codes(&generation);
        for image in 0..2 {
            let row = |all: &[i64], index: usize| all[index * (LENGTH + 1) + 1..(index + 1) * (LENGTH + 1)].to_vec();
            let found = &codes[image * LENGTH..(image + 1) * LENGTH];
            assert_eq!(found, row(all, image * steps + first_step + done), "{name}: image {image}, step {done}");
            if done + 1 < steps - first_step {
                let kept: Vec<i64> = generation.kept()[image].iter().map(|c| c.map_or(-1, i64::from)).collect();
                let expected = row(masked, image * (steps - first_step) + done);
                assert_eq!(kept, expected, "{name}: image {image}, masked after step {done}");
            }
        }
    }
    assert_eq!(codes(&generation), io.ints(&get("result")));
}

fn codes(generation: &dyn Generation) -> Vec<i64> {
    generation.codes().discrete().unwrap().into_data().iter::<i64>().collect()
}

#[test]
fn decodes_with_given_noise() {
    let io = Case::open(CASE, "io");
    for schedule in [Schedule::Cosine, Schedule::Uniform, Schedule::Pow(2.0), Schedule::Log, Schedule::Exp] {
        replay(&io, &format!("gen_{schedule}"), schedule, 6, 0);
    }
    replay(&io, "edit", Schedule::Cosine, 7, 2);
}

#[test]
fn schedules() {
    let io = Case::open("maskgit/schedules", "io");
    for name in ["uniform", "pow2", "pow3", "pow0.5", "cosine", "log", "exp"] {
        let schedule = Schedule::try_from(name.to_string()).unwrap();
        for total in [256, 1024] {
            let expected = io.floats(&format!("{name}.{total}"));
            for (progress, expected) in io.floats("ratio").iter().zip(expected) {
                let found = schedule.ratio(*progress, total);
                assert!((found - expected).abs() <= 1e-6, "{name} at {progress} of {total}: {found}, not {expected}");
            }
        }
    }
}
