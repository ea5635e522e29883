//! Images that training and its evaluations passed over.

use smalti_base::Result;
use smalti_data::loader::{ImageBatch, Loader, Skipped};
use std::cell::RefCell;

/// Whose images are passed over.
#[derive(Clone, Copy)]
pub(super) enum Purpose {
    Training,
    Validation,
}

/// Key and reason of what could not be used, until somebody takes it.
#[derive(Default)]
pub(super) struct SkippedImages(RefCell<Vec<(String, String)>>);

/// How many skipped images of a loader are known.
#[derive(Default)]
pub(super) struct Seen(usize);

impl Seen {
    /// What the loader has skipped since the last call.
    pub(super) fn new_of(&mut self, loader: &Loader) -> Vec<Skipped> {
        let new = loader.skipped_after(self.0);
        self.0 += new.len();
        new
    }
}

impl SkippedImages {
    /// The loader's batches; what it skips is kept here.
    pub(super) fn watch<'a>(
        &'a self,
        mut loader: Loader,
        purpose: Purpose,
    ) -> Box<dyn Iterator<Item = Result<ImageBatch>> + 'a> {
        let mut seen = Seen::default();
        Box::new(std::iter::from_fn(move || {
            let batch = loader.next();
            self.add(seen.new_of(&loader), purpose);
            batch
        }))
    }

    pub(super) fn add(&self, skipped: Vec<Skipped>, purpose: Purpose) {
        let pair = |Skipped { key, error, .. }| match purpose {
            Purpose::Training => (key, error),
            Purpose::Validation => (key, format!("in validation: {error}")),
        };
        self.0.borrow_mut().extend(skipped.into_iter().map(pair));
    }

    pub(super) fn take(&self) -> Vec<(String, String)> {
        self.0.take()
    }
}
