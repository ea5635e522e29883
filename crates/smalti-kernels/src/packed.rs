//! Products with a matrix that was packed once, for decoding: few rows meet many weights, and the time is that of reading
//! the weights from memory.

use crate::cpu::buffer::all_written;
use crate::cpu::packed::{Kind, Panels, Product, multiply};
use crate::flex::{Values, serves, tensor};
use burn::backend::Flex;
use burn::tensor::{Device, Tensor, TensorData};
use smalti_base::{Error, Result};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// How the weights of a [`PackedMatrix`] are kept. Activations and sums are `f32` always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum WeightPrecision {
    /// As they are, 4 bytes.
    #[default]
    F32,
    /// Rounded to 8 significant bits, 2 bytes.
    Bf16,
    /// Rounded to whole steps, -127..=127, of a size of its own for each output; 1 byte.
    Int8,
}

impl WeightPrecision {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Int8];

    /// The name that [`FromStr`] reads.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }
}

impl fmt::Display for WeightPrecision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for WeightPrecision {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|precision| precision.name() == name);
        found.ok_or_else(|| Error::unknown("weights", "precision", name, Self::ALL.map(Self::name)))
    }
}

/// A matrix `[inputs, outputs]` in the layout that a product with few rows reads fastest. Cloning shares the memory.
#[derive(Clone)]
pub struct PackedMatrix(Arc<Panels>);

impl PackedMatrix {
    /// Packs `values`, row by row, of `shape`: inputs, outputs.
    ///
    /// # Panics
    /// If the number of values is another.
    pub fn new(values: &[f32], shape: [usize; 2], precision: WeightPrecision) -> Self {
        let kind = match precision {
            WeightPrecision::F32 => Kind::F32,
            WeightPrecision::Bf16 => Kind::Bf16,
            WeightPrecision::Int8 => Kind::Int8,
        };
        Self(Arc::new(Panels::new(values, shape, kind)))
    }

    /// Packs a tensor `[inputs, outputs]` of any device, which is read from there.
    pub fn from_tensor(weight: Tensor<2>, precision: WeightPrecision) -> Self {
        let shape = weight.dims();
        let weight = weight.inner();
        if serves(&weight)
            && let Ok(weight) = weight.clone().try_into_primitive::<Flex>()
        {
            return Self::new(&Values::of(weight), shape, precision);
        }
        let values: Vec<f32> = weight.into_data().convert::<f32>().iter::<f32>().collect();
        Self::new(&values, shape, precision)
    }

    /// Inputs and outputs.
    pub fn shape(&self) -> [usize; 2] {
        self.0.shape()
    }

    /// How the weights are kept.
    pub fn precision(&self) -> WeightPrecision {
        match self.0.kind() {
            Kind::F32 => WeightPrecision::F32,
            Kind::Bf16 => WeightPrecision::Bf16,
            Kind::Int8 => WeightPrecision::Int8,
        }
    }

    /// Memory that the weights take, in bytes.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// The matrix `[inputs, outputs]` with the values that the weights stand for: those packed, rounded.
    pub fn unpack(&self, device: &Device) -> Tensor<2> {
        Tensor::from_data(TensorData::new(self.0.unpack(), self.shape()), device)
    }
}

impl fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([inputs, outputs], precision) = (self.shape(), self.precision());
        write!(f, "PackedMatrix {{ [{inputs}, {outputs}] {precision}, {} bytes }}", self.bytes())
    }
}

/// `x weight + bias` over the last axis of `x`. Sums run in `f32`; a row's result depends on that row only, not on the
/// others and not on the number of threads.
///
/// # Shapes
/// `x [.., inputs]`, `bias [outputs]` → `[.., outputs]`.
///
/// # Panics
/// If `x` has another number of inputs, or where Burn's operations do on a bias that does not fit.
pub fn packed_linear<const D: usize>(x: Tensor<D>, weight: &PackedMatrix, bias: Option<Tensor<1>>) -> Tensor<D> {
    let [y] = packed_linears(x, [(weight, bias)]);
    y
}

/// Several [`packed_linear`] of the same `x`, for which the threads are called together once.
///
/// # Panics
/// As [`packed_linear`].
pub fn packed_linears<const D: usize, const N: usize>(
    x: Tensor<D>,
    matrices: [(&PackedMatrix, Option<Tensor<1>>); N],
) -> [Tensor<D>; N] {
    let shape = x.dims();
    let inputs = shape[D - 1];
    for (weight, _) in &matrices {
        assert_eq!(weight.shape()[0], inputs, "inputs of {weight:?} and of {shape:?}");
    }
    let plain = |tensor: &Tensor<1>, outputs| !tensor.is_autodiff() && serves(tensor) && tensor.dims() == [outputs];
    let fits = matrices.iter().all(|(weight, bias)| bias.as_ref().is_none_or(|bias| plain(bias, weight.shape()[1])));
    if !(fits && !x.is_autodiff() && serves(&x)) {
        return matrices.map(|(weight, bias)| portable(x.clone(), weight, bias));
    }
    let Ok(values) = x.clone().try_into_primitive::<Flex>() else {
        return matrices.map(|(weight, bias)| portable(x.clone(), weight, bias));
    };
    let values = Values::of(values);
    let rows = shape[..D - 1].iter().product::<usize>();
    let biases = matrices.each_ref().map(|(_, bias)| {
        let bias = bias.clone()?.try_into_primitive::<Flex>().ok()?;
        Some(Values::of(bias))
    });
    let fill = |results: [&mut [f32]; N]| {
        let products = matrices.iter().zip(&biases).zip(results);
        let products = products.map(|(((weight, _), bias), y)| Product { panels: &weight.0, bias: bias.as_deref(), y });
        multiply(&values, rows, products.collect());
    };
    // SAFETY: `multiply` writes all results of its products.
    let results = unsafe { all_written(matrices.each_ref().map(|(weight, _)| rows * weight.shape()[1]), fill) };
    let mut weights = matrices.iter().map(|(weight, _)| weight.shape()[1]);
    results.map(|y| {
        let mut shape = shape;
        shape[D - 1] = weights.next().unwrap_or_default();
        Tensor::from_primitive::<Flex>(tensor(y, shape))
    })
}

/// [`packed_linear`] as a composition of tensor operations, which unpacks the matrix at each call.
pub fn portable<const D: usize>(x: Tensor<D>, weight: &PackedMatrix, bias: Option<Tensor<1>>) -> Tensor<D> {
    let mut shape = x.dims();
    let inputs = shape[D - 1];
    let rows = shape[..D - 1].iter().product::<usize>();
    let matrix = weight.unpack(&x.device()).cast(x.dtype());
    let y = x.reshape([rows, inputs]).matmul(matrix);
    let y = match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    };
    shape[D - 1] = weight.shape()[1];
    y.reshape(shape)
}
