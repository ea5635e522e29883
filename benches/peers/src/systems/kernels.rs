//! Single operations: the machine's peak, and the nearest code.

use super::inputs::{self, Inputs};
use super::{Outputs, Task};
use burn::tensor::{Device, Tensor, TensorData};
use rayon::prelude::*;
use smalti::base::Result;
use smalti::models::checkpoint::{Stored, Values};
use std::path::Path;

/// A matrix product.
pub struct Gemm {
    a: Tensor<2>,
    b: Tensor<2>,
}

impl Gemm {
    /// Reads both factors.
    pub fn open(folder: &Path) -> Result<Self> {
        let inputs = Inputs::read(folder, &Device::flex())?;
        Ok(Self { a: inputs.floats("a")?, b: inputs.floats("b")? })
    }
}

impl Task for Gemm {
    fn check(&mut self) -> Result<Outputs> {
        Ok(inputs::outputs([("product", inputs::floats(self.a.clone().matmul(self.b.clone())))]))
    }

    fn run(&mut self) -> Result<()> {
        std::hint::black_box(self.a.clone().matmul(self.b.clone()));
        Ok(())
    }
}

/// Floats that are copied.
const COPIED: usize = 1 << 26;
/// Floats that one thread copies at a time.
const PIECE: usize = 1 << 20;

/// A copy from one buffer to another.
pub struct Copy {
    source: Vec<f32>,
    target: Vec<f32>,
}

impl Copy {
    /// Fills both.
    pub fn open() -> Self {
        Self { source: (0..COPIED).map(|i| i as f32).collect(), target: vec![1.0; COPIED] }
    }
}

impl Task for Copy {
    fn check(&mut self) -> Result<Outputs> {
        self.run()?;
        let values = Values::Floats(self.target[..1024].to_vec());
        Ok(inputs::outputs([("copied", Stored { shape: vec![1024], values })]))
    }

    fn run(&mut self) -> Result<()> {
        let pieces = self.target.par_chunks_mut(PIECE).zip(self.source.par_chunks(PIECE));
        pieces.for_each(|(target, source)| target.copy_from_slice(source));
        std::hint::black_box(&self.target);
        Ok(())
    }
}

/// The nearest row of a table for each latent.
pub struct NearestCode {
    latents: Tensor<2>,
    codebook: Tensor<2>,
}

impl NearestCode {
    /// Reads both tables.
    pub fn open(folder: &Path) -> Result<Self> {
        let inputs = Inputs::read(folder, &Device::flex())?;
        Ok(Self { latents: inputs.floats("latents")?, codebook: inputs.floats("codebook")? })
    }

    fn indices(&self) -> TensorData {
        smalti_kernels::nearest_code(self.latents.clone(), self.codebook.clone()).into_data()
    }
}

impl Task for NearestCode {
    fn check(&mut self) -> Result<Outputs> {
        let values: Vec<i64> = self.indices().iter::<i64>().collect();
        Ok(inputs::outputs([("indices", Stored { shape: vec![values.len()], values: Values::Ints(values) })]))
    }

    fn run(&mut self) -> Result<()> {
        std::hint::black_box(self.indices());
        Ok(())
    }
}
