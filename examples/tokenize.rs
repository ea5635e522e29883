//! A data set to token shards, and the shards read again. Run again, it continues where it stopped.
//!
//! `cargo run --release -p smalti --example tokenize [IMAGES [BUNDLE [TOKENS]]]`

use smalti::Settings;
use smalti::base::progress::Silent;
use smalti::data::{RowTokens, Shards};
use smalti::tokenize::{self, TokenizeArgs};

fn main() -> smalti::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut argument = |default: &str| arguments.next().unwrap_or_else(|| default.into());
    let [images, bundle, tokens] =
        ["assets/emoji3d/validation.tar", "assets/demo", "tokens/emoji3d"].map(&mut argument);

    let args = TokenizeArgs {
        source: images.into(),
        out: tokens.into(),
        model: Some(bundle.into()),
        per_shard: 100,
        ..TokenizeArgs::default()
    };
    let outcome = tokenize::run(&tokenize::plan(&args, &Settings::default())?, &Silent)?;
    println!("{} rows in {} shards: {}", outcome.rows, outcome.shards, outcome.tokens);

    let shards = Shards::open(&outcome.folder)?;
    for index in 0..3 {
        let row = shards.row(index)?;
        if let RowTokens::Discrete(codes) = row.tokens {
            println!("{}: {codes:?}", row.key);
        }
    }
    Ok(())
}
