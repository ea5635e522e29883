//! Images that training and its evaluations passed over.

use smalti_base::Result;
use smalti_data::loader::{ImageBatch, Loader, Skipped};
use std::cell::RefCell;

/// What could not be used, as far as the loaders have come.
#[derive(Default)]
pub(super) struct SkippedImages {
    train: RefCell<Vec<Skipped>>,
    validation: RefCell<Vec<Skipped>>,
}

impl SkippedImages {
    /// The loader's batches; what it skips is kept here.
    pub(super) fn watch<'a>(&'a self, mut loader: Loader) -> Box<dyn Iterator<Item = Result<ImageBatch>> + 'a> {
        Box::new(std::iter::from_fn(move || {
            let batch = loader.next();
            self.set(loader.skipped());
            batch
        }))
    }

    /// The same for the images of an evaluation.
    pub(super) fn watch_validation<'a>(
        &'a self,
        mut loader: Loader,
    ) -> Box<dyn Iterator<Item = Result<ImageBatch>> + 'a> {
        Box::new(std::iter::from_fn(move || {
            let batch = loader.next();
            self.set_validation(loader.skipped());
            batch
        }))
    }

    pub(super) fn set(&self, skipped: Vec<Skipped>) {
        *self.train.borrow_mut() = skipped;
    }

    pub(super) fn set_validation(&self, skipped: Vec<Skipped>) {
        *self.validation.borrow_mut() = skipped;
    }

    /// Key and reason of each.
    pub(super) fn list(&self) -> Vec<(String, String)> {
        let pair = |skipped: &Skipped| (skipped.key.clone(), skipped.error.clone());
        let train = self.train.borrow().iter().map(pair).collect::<Vec<_>>();
        let of_validation = |skipped: &Skipped| (skipped.key.clone(), format!("in validation: {}", skipped.error));
        train.into_iter().chain(self.validation.borrow().iter().map(of_validation)).collect()
    }
}
