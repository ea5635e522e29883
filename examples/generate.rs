//! Opens a bundle and makes a picture of a caption. The generation is pulled step by step, so that a program can show how far it is, or
//! stop.
//!
//! `cargo run --release -p smalti --example generate [CAPTION [BUNDLE [PICTURE]]]`

use smalti::base::device;
use smalti::data::image::save_png;
use smalti::model::{ModelPlan, Wish};
use smalti::models::{ImageRequest, Request};
use smalti::nn::dense::WeightPrecision;
use smalti::training::pixels;
use std::path::Path;

fn main() -> smalti::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut argument = |default: &str| arguments.next().unwrap_or_else(|| default.into());
    let [caption, bundle, picture] = ["a red heart", "assets/demo", "heart.png"].map(&mut argument);

    // Configurations are read and compared here, weights are not.
    let model = ModelPlan::find(Some(Path::new(&bundle)))?;
    let device = device::open("cpu")?;
    let wish = model.condition(Wish { prompt: Some(&caption), ..Wish::default() })?;
    let condition = model.resolve(&wish, None, &device)?;
    let request = Request::new(vec![ImageRequest::new(condition, 1)], model.sampling().clone());

    let generator = model.open_generator(&device, WeightPrecision::F32)?;
    let mut generation = generator.start(&request)?;
    let steps = generation.steps();
    for done in &mut generation {
        eprint!("\r{}/{steps} tokens", done?);
    }
    eprintln!();

    let tokenizer = model.open_decoder(&device)?;
    let images_bchw = tokenizer.decode(&generation.codes())?;
    for image in pixels::download(images_bchw, tokenizer.planes())? {
        save_png(Path::new(&picture), &image, None)?;
    }
    println!("{picture}");
    Ok(())
}
