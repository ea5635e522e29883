//! Two-dimensional convolution.

use burn::tensor::{
    Tensor, module,
    ops::{ConvOptions, InterpolateMode, InterpolateOptions},
};

/// How a [`conv2d`] walks over its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv2dOptions {
    /// Step between outputs, in both directions; at least 1.
    pub stride: usize,
    /// Rows and columns of zeros around the (upsampled) input: top, left, bottom, right.
    pub padding: [usize; 4],
    /// Whether the input is first enlarged twofold by repeating each pixel (nearest).
    pub upsample: bool,
}

impl Conv2dOptions {
    /// Stride 1, the same padding on all four sides.
    #[must_use]
    pub fn padded(padding: usize) -> Self {
        Self { stride: 1, padding: [padding; 4], upsample: false }
    }

    /// With another stride.
    #[must_use]
    pub fn with_stride(self, stride: usize) -> Self {
        Self { stride, ..self }
    }

    /// With another padding: top, left, bottom, right.
    #[must_use]
    pub fn with_padding(self, padding: [usize; 4]) -> Self {
        Self { padding, ..self }
    }

    /// With the input enlarged twofold first.
    #[must_use]
    pub fn upsampled(self) -> Self {
        Self { upsample: true, ..self }
    }
}

/// Cross-correlation of `x` with `weight`, as in PyTorch's `conv2d`.
///
/// # Shapes
/// `x [b, in, h, w]`, `weight [out, in, kh, kw]`, `bias [out]` → `[b, out, h', w']` with
/// `h' = (h + top + bottom - kh) / stride + 1` rounded down, `h` doubled first when upsampling; `w'` likewise.
///
/// # Panics
/// Where Burn's operations do: shapes that do not fit, a stride of 0, mixed data types.
pub fn conv2d(x: Tensor<4>, weight: Tensor<4>, bias: Option<Tensor<1>>, options: Conv2dOptions) -> Tensor<4> {
    portable(x, weight, bias, options)
}

/// [`conv2d`] by Burn's own operations.
pub fn portable(x: Tensor<4>, weight: Tensor<4>, bias: Option<Tensor<1>>, options: Conv2dOptions) -> Tensor<4> {
    let [_, _, h, w] = x.dims();
    let x = if options.upsample {
        let nearest = InterpolateOptions::new(InterpolateMode::Nearest).with_output_size([2 * h, 2 * w]);
        module::interpolate(x, nearest)
    } else {
        x
    };
    let [top, left, bottom, right] = options.padding;
    let padding = [(top, bottom), (left, right)];
    let convolution = ConvOptions { stride: [options.stride; 2], padding, dilation: [1, 1], groups: 1 };
    module::conv2d(x, weight, bias, convolution)
}
