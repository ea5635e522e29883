//! Official weights to a bundle. Without arguments it makes the weights first: the demo's tokenizer under the names of
//! taming-transformers.
//!
//! `cargo run --release -p smalti --example import [WEIGHTS [SYSTEM [BUNDLE]]]`

use smalti::base::progress::Silent;
use smalti::export::{self, ExportArgs};
use smalti::import::{self, ImportArgs};
use smalti::models::checkpoint::Part;
use smalti::{Error, Settings};
use std::path::Path;

fn main() -> smalti::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut argument = |default: &str| arguments.next().unwrap_or_else(|| default.into());
    let [weights, system, bundle] = ["vqgan.safetensors", "vqgan", "imported"].map(&mut argument);
    let settings = Settings::default();
    if !Path::new(&weights).exists() {
        let args = ExportArgs {
            bundle: "assets/demo".into(),
            part: Some(Part::Tokenizer),
            out: weights.clone().into(),
            ..ExportArgs::default()
        };
        export::run(&export::plan(&args, &settings)?, &Silent)?;
    }

    // Names and shapes alone say which recipe's model the weights are.
    let args = ImportArgs { source: weights.into(), system, out: bundle.into(), ..ImportArgs::default() };
    let plan = import::plan(&args, &settings, &Silent)?;
    let part = plan.parts.first().ok_or_else(|| Error::invalid("import", "nothing to import"))?;
    println!("{} is {}", part.part.name(), part.variant);
    for part in import::run(&plan, &Silent)?.parts {
        println!("{} tensors, {} parameters, sha256 {}", part.loaded, part.facts.parameters, part.facts.sha256);
    }
    Ok(())
}
