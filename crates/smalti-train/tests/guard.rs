//! Losses that are not finite: the step is skipped and counted, and too many of them stop the run with its last good
//! checkpoint kept.
#![allow(clippy::unwrap_used)]

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use smalti_base::progress::Silent;
use smalti_base::{Error, Progress, Result};
use smalti_train::objective::{Evaluation, Objective, StepOutput};
use smalti_train::{Recipe, RunFolder, trainer};
use std::path::Path;

#[derive(Module, Debug)]
struct Number {
    weight: Param<Tensor<1>>,
}

/// `(x - 1)^2`, but NaN at the steps that are listed.
struct Parabola {
    bad: std::ops::Range<u64>,
}

impl Objective for Parabola {
    type Model = Number;
    type Batch = ();

    fn batches(&self, _: u64) -> Result<Box<dyn Iterator<Item = Result<()>> + '_>> {
        Ok(Box::new(std::iter::repeat_with(|| Ok(()))))
    }

    fn epoch(&self) -> u64 {
        1
    }

    fn step(&self, model: &Number, (): (), step: u64, _: u64) -> Result<StepOutput> {
        let factor = if self.bad.contains(&step) { f32::NAN } else { 1.0 };
        let loss = (model.weight.val() - 1.0).powi_scalar(2) * factor;
        let terms = vec![("loss", loss.clone().inner())];
        let gradients = GradientsParams::from_grads(loss.backward(), model);
        Ok(StepOutput { gradients, terms, stats: None, codes: None })
    }

    fn evaluate(&self, _: &Number, _: &dyn Progress) -> Result<Evaluation> {
        Ok(Evaluation { values: Vec::new(), score: 0.0, picture: None })
    }

    fn export(&self, _: &Number, _: &Path, _: &serde_json::Value) -> Result<()> {
        Ok(())
    }
}

fn recipe() -> Recipe {
    let text = r#"
name = "guard"
seed = 1
batch = { size = 1 }
schedule = { steps = 60, final_fraction = 1.0 }
optimizer = { learning_rate = 0.05, betas = [0.9, 0.9] }
checkpoint = { every = 5 }
[task]
kind = "tokenizer"
train = { path = "none", transforms = [{ kind = "to_signed" }] }
validation = { path = "none", transforms = [{ kind = "to_signed" }] }
loss = { l1 = 1.0 }
[task.model]
kind = "vqgan"
image_size = 8
ch = 4
ch_mult = [1]
num_res_blocks = 1
z_channels = 4
embed_dim = 2
norm_groups = 2
quantizer = { kind = "fsq", levels = [4, 4], channels = 2 }
"#;
    smalti_base::config::parse_toml(text, "guard", &[]).unwrap()
}

fn run(bad: std::ops::Range<u64>, out: &Path) -> Result<trainer::Outcome> {
    let device = Device::flex();
    let weight = Tensor::from_floats([3.0], &device.clone().autodiff());
    let recipe = recipe();
    let folder = RunFolder::open(out, &recipe.table()?)?;
    let model = Number { weight: Param::from_tensor(weight) };
    trainer::train(&Parabola { bad }, model, &recipe, &folder, &device, &Silent)
}

#[test]
fn a_few_bad_steps_are_skipped_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let outcome = run(20..24, folder.path()).unwrap();
    assert_eq!((outcome.step, outcome.skipped, outcome.finished), (60, 4, true));
    let path = folder.path().join("checkpoints/step-00000060/model.safetensors");
    let weights = smalti_models::checkpoint::tensors::read_tensors(&path).unwrap();
    let weight = weights["weight"].floats().unwrap()[0];
    // From 3 towards 1; Adam overshoots a little.
    assert!((weight - 1.0).abs() < 0.5, "learned all the same: {weight}");
}

#[test]
fn too_many_stop_the_run_and_keep_the_last_good_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    match run(33..60, folder.path()) {
        Err(Error::NonFinite { step, skipped, checkpoint }) => {
            assert_eq!((step, skipped), (42, 10));
            assert!(checkpoint.join("model.safetensors").exists(), "{}", checkpoint.display());
            let weights =
                smalti_models::checkpoint::tensors::read_tensors(&checkpoint.join("model.safetensors")).unwrap();
            assert!(weights["weight"].floats().unwrap()[0].is_finite());
        }
        other => panic!("{:?}", other.map(|outcome| outcome.step)),
    }
}
