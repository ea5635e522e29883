//! The numbers of a model on the first images of a data set.
//!
//! `cargo run --release -p smalti --example evaluate [BUNDLE [IMAGES [LIMIT]]]`

use smalti::base::progress::Silent;
use smalti::evaluate::{self, EvaluateArgs};
use smalti::source::SourceArgs;
use smalti::{Error, Settings};

fn main() -> smalti::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut argument = |default: &str| arguments.next().unwrap_or_else(|| default.into());
    let [bundle, images, limit] = ["assets/demo", "assets/emoji3d/validation.tar", "32"].map(&mut argument);
    let limit = limit.parse().map_err(|_| Error::invalid("LIMIT", format!("`{limit}` is not a number")))?;

    let args = EvaluateArgs {
        model: bundle.into(),
        data: images.into(),
        images: SourceArgs { limit: Some(limit), ..SourceArgs::default() },
        ..EvaluateArgs::default()
    };
    let outcome = evaluate::run(&evaluate::plan(&args, &Settings::default())?, &Silent)?;
    println!("{}", serde_json::to_string_pretty(&outcome).map_err(|e| Error::invalid("the numbers", e.to_string()))?);
    Ok(())
}
