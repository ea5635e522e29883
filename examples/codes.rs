//! An image to codes and back: prints the codes, row by row, and writes the picture that they keep.
//!
//! `cargo run --release -p smalti --example codes [IMAGE [BUNDLE [PICTURE]]]`; of a data set the first image.

use smalti::Error;
use smalti::base::{Tokens, device, progress::Silent};
use smalti::data::{DataConfig, Transform, image::save_png};
use smalti::model::ModelPlan;
use smalti::source::Images;
use smalti::training::pixels;
use std::path::Path;

fn main() -> smalti::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut argument = |default: &str| arguments.next().unwrap_or_else(|| default.into());
    let [image, bundle, picture] =
        ["assets/emoji3d/validation.tar", "assets/demo", "reconstruction.png"].map(&mut argument);

    let device = device::open("cpu")?;
    let tokenizer = ModelPlan::find(Some(Path::new(&bundle)))?.open_tokenizer(&device)?;
    let (spec, planes) = (tokenizer.spec(), tokenizer.planes());
    let config = DataConfig::new(&image, Transform::center(spec.image_size, planes));
    let first = Images::open(config, planes, None)?.batches("reading", 0, 1, &Silent)?.next();
    let first = first.ok_or_else(|| Error::invalid(&image, "holds no image"))??;

    let codes = tokenizer.encode(pixels::upload_batch(&first, &device))?;
    for kept in pixels::download(tokenizer.decode(&codes)?, planes)? {
        save_png(Path::new(&picture), &kept, None)?;
    }

    println!("{}: {spec}", first.keys.concat());
    let (_, columns) = spec.layout.finest();
    for tokens in codes.to_host()? {
        match tokens {
            Tokens::Discrete(codes) => codes.chunks(columns).for_each(|row| println!("{row:?}")),
            Tokens::Continuous(vectors) => println!("{vectors:?}"),
        }
    }
    Ok(())
}
