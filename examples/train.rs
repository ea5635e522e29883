//! Trains a tokenizer from a recipe that is written here, for a few steps. Run again, it continues where it stopped.
//!
//! `cargo run --release -p smalti --example train [RUN [STEPS]]`

use smalti::base::{Progress, config, device};
use smalti::training::{self, Recipe};
use std::path::Path;

const RECIPE: &str = r#"
name = "emoji-32"
seed = 1

[task]
kind = "tokenizer"

[task.model]
kind = "vqgan"
image_size = 32
ch = 8
ch_mult = [1, 2, 4]
num_res_blocks = 1
mid_attention = false
z_channels = 16
embed_dim = 8
norm_groups = 4
quantizer = { kind = "vq", codes = 128, channels = 8, codebook = { kind = "ema", decay = 0.95 }, kmeans_init = 5 }

[task.loss]
l1 = 1.0

[task.train]
path = "assets/emoji3d/train.tar"
transforms = [{ kind = "resize_short", size = 32 }, { kind = "center_crop", size = 32 }, { kind = "flip" }, { kind = "to_signed" }]

[task.validation]
path = "assets/emoji3d/validation.tar"
transforms = [{ kind = "resize_short", size = 32 }, { kind = "center_crop", size = 32 }, { kind = "to_signed" }]

[batch]
size = 8

[schedule]
steps = 200

[optimizer]
learning_rate = 2e-3
betas = [0.9, 0.99]

[evaluation]
every = 50
images = 32
"#;

/// Writes a line for each evaluation, and where the run is.
struct Lines;

impl Progress for Lines {
    fn begin(&self, what: &str, total: u64, unit: &'static str) {
        println!("{what}: {total} {unit}");
    }
    fn advance(&self, done: u64, note: &str) {
        eprint!("\r{done} {note}  ");
    }
    fn end(&self) {
        eprintln!();
    }
    fn say(&self, line: &str) {
        println!("{line}");
    }
}

fn main() -> smalti::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let run = arguments.next().unwrap_or_else(|| "runs/emoji-32".into());
    let mut recipe: Recipe = config::parse_toml(RECIPE, "the recipe in examples/train.rs", &[])?;
    if let Some(steps) = arguments.next() {
        let steps = steps.parse().map_err(|_| smalti::Error::invalid("STEPS", format!("`{steps}` is not a number")))?;
        (recipe.schedule.steps, recipe.evaluation.every) = (steps, steps);
    }
    let outcome = training::run(&recipe, Path::new(&run), &device::open("cpu")?, &Lines)?;
    println!("{} steps: {}", outcome.step, serde_json::Value::Object(outcome.evaluation));
    Ok(())
}
