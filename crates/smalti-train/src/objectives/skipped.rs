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
            self.follow(&loader);
            batch
        }))
    }

    /// Adds what a loader has skipped since it was last followed.
    pub(super) fn follow(&self, loader: &Loader) {
        let known = self.0.borrow().len();
        self.0.borrow_mut().extend(loader.skipped_after(known));
    }

    /// Key and reason of each, in the data's order.
    pub(super) fn list(&self) -> Vec<(String, String)> {
        let mut skipped: Vec<Skipped> = self.0.borrow().clone();
        skipped.sort_by_key(|skipped| skipped.index);
        skipped.into_iter().map(|skipped| (skipped.key, skipped.error)).collect()
    }
}
