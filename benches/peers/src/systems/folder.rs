//! A folder of images to token shards, by the engine that `smalti tokenize` calls.

use super::inputs;
use super::{Outputs, Task, vqgan};
use crate::rows::Row;
use burn::tensor::Device;
use smalti::Settings;
use smalti::base::progress::Silent;
use smalti::base::{Error, Result};
use smalti::data::{RowTokens, Shards};
use smalti::models::checkpoint::{BundlePaths, Manifest, Part, Precision, Stored, Values, write_part};
use smalti::models::tokenizers::TokenizerConfig;
use smalti::tokenize::{self, TokenizeArgs};
use std::path::{Path, PathBuf};

/// Writes the shared weights as a bundle.
pub fn prepare(row: &Row, folder: &Path) -> Result<()> {
    let model = vqgan::tokenizer(row, folder, &Device::flex())?;
    let (bundle, config) = (folder.join("bundle"), inputs::model::<TokenizerConfig>(row)?);
    let part = write_part(&BundlePaths::at(&bundle), Part::Tokenizer, &config, &model, Precision::F32)?;
    let mut manifest = Manifest::new(&row.name);
    manifest.parts.insert(Part::Tokenizer, part);
    manifest.write(&bundle)
}

/// The whole verb, the weights' reading included.
pub struct Tokenize {
    arguments: TokenizeArgs,
    out: PathBuf,
}

impl Tokenize {
    /// Remembers the folders.
    pub fn open(folder: &Path) -> Self {
        let out = folder.join("smalti-tokens");
        let arguments = TokenizeArgs {
            source: folder.join("images"),
            out: out.clone(),
            model: Some(folder.join("bundle")),
            batch: 16,
            per_shard: 10_000,
            ..Default::default()
        };
        Self { arguments, out }
    }
}

impl Task for Tokenize {
    fn check(&mut self) -> Result<Outputs> {
        self.run()?;
        let shards = Shards::open(&self.out)?;
        let rows = (0..shards.len()).map(|i| shards.row(i)).collect::<Result<Vec<_>>>()?;
        let codes = |first: usize| {
            let values: Vec<i64> = rows
                .iter()
                .skip(first)
                .step_by(2)
                .flat_map(|row| match &row.tokens {
                    RowTokens::Discrete(codes) => codes.iter().map(|code| i64::from(*code)).collect(),
                    RowTokens::Continuous { .. } => Vec::new(),
                })
                .collect();
            Stored { shape: vec![values.len()], values: Values::Ints(values) }
        };
        Ok(inputs::outputs([("png_codes", codes(0)), ("jpeg_codes", codes(1))]))
    }

    fn run(&mut self) -> Result<()> {
        if self.out.exists() {
            std::fs::remove_dir_all(&self.out).map_err(|e| Error::io("remove", &self.out, e))?;
        }
        let plan = tokenize::plan(&self.arguments, &Settings::default())?;
        tokenize::run(&plan, &Silent)?;
        Ok(())
    }
}
