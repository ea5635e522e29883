//! One image file as a data set.

use super::{About, Dataset, Source, past_end, read_file};
use smalti_base::Result;
use std::path::{Path, PathBuf};

/// One image file.
#[derive(Clone, Debug)]
pub struct SingleImage {
    path: PathBuf,
}

impl SingleImage {
    /// The data set that holds just this file.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_path_buf() }
    }
}

impl Dataset for SingleImage {
    fn kind(&self) -> &'static str {
        "image"
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn len(&self) -> usize {
        1
    }

    fn classes(&self) -> &[String] {
        &[]
    }

    fn key(&self, _: usize) -> String {
        self.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    fn about(&self, index: usize) -> Result<About> {
        match index {
            0 => Ok(About { key: self.key(0), ..About::default() }),
            _ => Err(past_end(&self.path, index, 1)),
        }
    }

    fn bytes(&self, _: usize) -> u64 {
        std::fs::metadata(&self.path).map_or(0, |found| found.len())
    }

    fn source(&self, index: usize) -> Result<Source> {
        match index {
            0 => read_file(&self.path),
            _ => Err(past_end(&self.path, index, 1)),
        }
    }
}
