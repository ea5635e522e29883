//! Where a token is.

use crate::init::Init;
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

/// A learned vector for each place of a sequence.
#[derive(Module, Debug)]
pub struct LearnedPositions {
    /// `[places, d]`.
    pub table: Param<Tensor<2>>,
}

impl LearnedPositions {
    /// A table drawn by `init`.
    pub fn new(places: usize, width: usize, init: Init, device: &Device) -> Self {
        Self { table: init.param([places, width], device) }
    }

    /// Adds the vectors of the places from `first` on.
    ///
    /// # Shapes
    /// `x [b, n, d]` with `first + n` at most the number of places; the result has the same shape.
    pub fn forward(&self, x_bnd: Tensor<3>, first: usize) -> Tensor<3> {
        let n = x_bnd.dims()[1];
        x_bnd + self.table.val().narrow(0, first, n).unsqueeze()
    }
}
