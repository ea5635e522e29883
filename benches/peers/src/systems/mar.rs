//! MAR: a part of a generation, a forward pass, a training step.

use super::inputs::{self, Inputs};
use super::training::{self, Lesson, Step};
use super::{Outputs, Task, bundle};
use crate::rows::Row;
use burn::tensor::{Device, Int, Tensor};
use serde::Deserialize;
use smalti::base::{Error, Result};
use smalti::models::checkpoint::Rules;
use smalti::models::generators::{GeneratorConfig, GeneratorModel, Mar};
use smalti::models::sampling::{GuidanceSchedule, VectorDraws};
use smalti::models::{Generation, ImageRequest, Request, Sampling};
use std::path::Path;
use std::sync::Arc;

/// The row's generator with the shared weights.
fn generator(row: &Row, folder: &Path, device: &Device) -> Result<Mar> {
    match inputs::model::<GeneratorConfig>(row)?.init(device)? {
        GeneratorModel::Mar(model) => inputs::import(&Rules::builtin("mar", "generator")?, model, folder),
        _ => Err(another_kind()),
    }
}

fn another_kind() -> Error {
    Error::invalid("mar", "the row's model is of another kind")
}

/// Writes the bundle that inference opens.
pub fn prepare(row: &Row, folder: &Path) -> Result<()> {
    bundle::prepare(row, folder, &generator(row, folder, &Device::flex())?, None)
}

fn open(row: &Row, folder: &Path, device: &Device) -> Result<Mar> {
    match bundle::open(row, folder, device)? {
        GeneratorModel::Mar(model) => Ok(model),
        _ => Err(another_kind()),
    }
}

fn numbers(inputs: &Inputs, name: &str) -> Result<Vec<usize>> {
    Ok(inputs.ints(name)?.iter().map(|number| *number as usize).collect())
}

/// Lists of places, one for each image.
fn places(inputs: &Inputs, name: &str, images: usize) -> Result<Vec<Vec<usize>>> {
    let all = numbers(inputs, name)?;
    Ok(all.chunks((all.len() / images.max(1)).max(1)).map(<[usize]>::to_vec).collect())
}

/// The shared orders and noise.
#[derive(Clone)]
struct Given {
    orders: Arc<Vec<Vec<usize>>>,
    /// By decoding step, moment of the diffusion, image and place.
    noise: Arc<Vec<f32>>,
    moments: usize,
}

impl VectorDraws for Given {
    fn order(&mut self, image: usize, _: usize) -> Vec<usize> {
        self.orders[image].clone()
    }

    fn noise(&mut self, image: usize, step: usize, place: usize, moment: usize, values: &mut [f32]) {
        let (images, length) = (self.orders.len(), self.orders[image].len());
        let row = ((step * self.moments + moment) * images + image) * length + place;
        values.copy_from_slice(&self.noise[row * values.len()..][..values.len()]);
    }
}

#[derive(Deserialize)]
struct Options {
    steps: usize,
    part: usize,
    diffusion_steps: usize,
    guidance: f32,
}

/// The first steps of filling an image, with guidance.
pub struct Decode {
    model: Mar,
    request: Request,
    given: Given,
    part: usize,
}

impl Decode {
    /// Reads weights, classes, orders and noise.
    pub fn open(row: &Row, folder: &Path) -> Result<Self> {
        let device = Device::flex();
        let inputs = Inputs::read(folder, &device)?;
        let Options { steps, part, diffusion_steps, guidance } = inputs::options(row)?;
        let noise = inputs.stored("noise")?.floats().unwrap_or_default().to_vec();
        let images = inputs.classes()?.into_iter();
        let images = images.map(|condition| ImageRequest::new(condition, 0)).collect();
        let sampling = Sampling {
            guidance,
            guidance_schedule: GuidanceSchedule::Linear,
            steps: Some(steps),
            diffusion_steps: Some(diffusion_steps.to_string().parse()?),
            ..Default::default()
        };
        Ok(Self {
            request: Request::new(images, sampling),
            given: Given {
                orders: Arc::new(places(&inputs, "orders", row.batch)?),
                noise: Arc::new(noise),
                moments: diffusion_steps,
            },
            part,
            model: open(row, folder, &device)?,
        })
    }

    fn tokens(&self) -> Result<Tensor<3>> {
        let mut generation = self.model.start_with(&self.request, Box::new(self.given.clone()))?;
        for _ in 0..self.part {
            generation.step()?;
        }
        generation.codes().continuous().ok_or_else(|| Error::invalid("mar", "its tokens are not vectors"))
    }
}

impl Task for Decode {
    fn check(&mut self) -> Result<Outputs> {
        Ok(inputs::outputs([("tokens", inputs::floats(self.tokens()?))]))
    }

    fn run(&mut self) -> Result<()> {
        std::hint::black_box(self.tokens()?.into_data());
        Ok(())
    }
}

/// Tokens of which some are masked, and what the diffusion draws for those.
struct Masked {
    tokens: Tensor<3>,
    classes: Tensor<2, Int>,
    masks: Vec<Vec<usize>>,
    t: Vec<usize>,
    noise: Tensor<2>,
}

impl Masked {
    fn read(row: &Row, folder: &Path, device: &Device) -> Result<Self> {
        let inputs = Inputs::read(folder, device)?;
        Ok(Self {
            tokens: inputs.floats("tokens")?,
            classes: inputs.ids("classes", row.batch)?,
            masks: places(&inputs, "masked", row.batch)?,
            t: numbers(&inputs, "t")?,
            noise: inputs.floats("noise")?,
        })
    }
}

/// What the denoiser says of all masked tokens.
pub struct Forward {
    model: Mar,
    masked: Masked,
    visible: Vec<Vec<usize>>,
    rows: Tensor<1, Int>,
}

impl Forward {
    /// Reads weights, tokens and noise.
    pub fn open(row: &Row, folder: &Path) -> Result<Self> {
        let device = Device::flex();
        let (masked, model) = (Masked::read(row, folder, &device)?, open(row, folder, &device)?);
        let length = model.config.tokens.length();
        let visible = |masks: &Vec<usize>| (0..length).filter(|place| !masks.contains(place)).collect();
        let rows = masked.masks.iter().enumerate();
        let rows: Vec<i32> =
            rows.flat_map(|(i, places)| places.iter().map(move |place| (i * length + place) as i32)).collect();
        Ok(Self {
            visible: masked.masks.iter().map(visible).collect(),
            rows: Tensor::from_data(rows.as_slice(), &device),
            masked,
            model,
        })
    }

    fn output(&self) -> Tensor<2> {
        let Self { model, masked: Masked { tokens, classes, masks, t, noise }, visible, rows } = self;
        let encoded = model.encode(classes.clone(), tokens.clone(), visible);
        let z = model.decode(encoded, visible, masks);
        let targets = tokens.clone().flatten::<2>(0, 1).select(0, rows.clone());
        let repeats = t.len() / targets.dims()[0];
        let noisy = model.config.diffusion.diffusion().add_noise(targets.repeat_dim(0, repeats), t, noise.clone());
        model.denoiser.forward(noisy, t, z)
    }
}

impl Task for Forward {
    fn check(&mut self) -> Result<Outputs> {
        Ok(inputs::outputs([("output", inputs::floats(self.output()))]))
    }

    fn run(&mut self) -> Result<()> {
        std::hint::black_box(self.output());
        Ok(())
    }
}

/// The diffusion loss of given masks and noise, gradients, AdamW.
pub struct Train {
    masked: Masked,
}

impl Train {
    /// Reads weights, tokens and noise.
    pub fn open(row: &Row, folder: &Path) -> Result<Step<Self>> {
        let device = training::device();
        let lesson = Self { masked: Masked::read(row, folder, &device)? };
        Step::new(row, generator(row, folder, &device)?, lesson)
    }
}

impl Lesson for Train {
    type Model = Mar;

    fn loss(&self, model: &Mar) -> Result<Tensor<1>> {
        let Masked { tokens, classes, masks, t, noise } = &self.masked;
        Ok(model.masked_loss(tokens.clone(), classes.clone(), masks, t, noise.clone()))
    }

    fn watched(model: &Mar) -> Result<Tensor<2>> {
        let block = model.decoder.first();
        Ok(block.ok_or_else(|| Error::invalid("mar", "the model has no blocks"))?.mlp.expand.weight.val())
    }
}
