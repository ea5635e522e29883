//! What images are by their bytes, so that tokens of others are not taken for theirs.

use crate::datasets::{Dataset, Source};
use smalti_base::files;
use std::ops::Range;
use std::sync::Arc;

/// The images that rows of shards stand for.
#[derive(Clone)]
pub struct Contents {
    dataset: Arc<dyn Dataset>,
    copies: usize,
}

impl std::fmt::Debug for Contents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Contents").field("path", &self.dataset.path()).field("copies", &self.copies).finish()
    }
}

impl Contents {
    /// Each image stands for `copies` rows after each other.
    pub fn new(dataset: Arc<dyn Dataset>, copies: usize) -> Self {
        Self { dataset, copies: copies.max(1) }
    }

    /// SHA-256 over the bytes of the images of these rows. Reads all of them; those that cannot be read count as such.
    pub fn of(&self, rows: Range<usize>) -> String {
        let images = rows.start / self.copies..rows.end.div_ceil(self.copies);
        let sum = |index: usize| match self.dataset.source(index) {
            Ok(Source::Encoded(bytes)) => files::sha256_bytes(&bytes),
            Ok(Source::Grey { width, height, pixels }) => {
                format!("{height}x{width} {}", files::sha256_bytes(&pixels))
            }
            Err(_) => "unreadable".into(),
        };
        let sums: Vec<String> = images.map(sum).collect();
        files::sha256_bytes(sums.join("\n").as_bytes())
    }
}
