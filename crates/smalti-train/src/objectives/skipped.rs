//! Images that training passed over.

use smalti_base::Result;
use smalti_data::loader::{ImageBatch, Loader, Skipped};
use std::cell::RefCell;

/// What could not be used, as far as the loader has come.
#[derive(Default)]
pub(super) struct SkippedImages(RefCell<Vec<Skipped>>);

impl SkippedImages {
    /// The loader's batches; what it skips is kept here.
    pub(super) fn watch<'a>(&'a self, mut loader: Loader) -> Box<dyn Iterator<Item = Result<ImageBatch>> + 'a> {
        Box::new(std::iter::from_fn(move || {
            let batch = loader.next();
            self.set(loader.skipped());
            batch
        }))
    }

    pub(super) fn set(&self, skipped: Vec<Skipped>) {
        *self.0.borrow_mut() = skipped;
    }

    /// Key and reason of each.
    pub(super) fn list(&self) -> Vec<(String, String)> {
        self.0.borrow().iter().map(|skipped| (skipped.key.clone(), skipped.error.clone())).collect()
    }
}
