//! Group normalisation of `[batch, channels, area]`, one task per group of an image.

use super::buffer::written;
use super::simd::{LANES, sigmoid, simd, sum};
use rayon::prelude::*;

/// Sizes and options of one call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spec {
    pub batch: usize,
    pub channels: usize,
    pub area: usize,
    pub groups: usize,
    pub epsilon: f32,
    pub silu: bool,
}

impl Spec {
    /// Channels of a group.
    fn width(&self) -> usize {
        self.channels / self.groups
    }

    /// Values of a group of one image.
    fn len(&self) -> usize {
        self.width() * self.area
    }

    /// The channels of task `row`, which counts the groups of all images.
    fn of_row<'a>(&self, row: usize, per_channel: &'a [f32]) -> &'a [f32] {
        let first = row % self.groups * self.width();
        &per_channel[first..first + self.width()]
    }
}

/// Gradients of the three inputs.
pub(crate) struct Gradients {
    pub x: Vec<f32>,
    pub gamma: Vec<f32>,
    pub beta: Vec<f32>,
}

/// The result, and for each group of each image the mean and the inverse deviation.
pub(crate) fn forward(spec: Spec, x: &[f32], gamma: &[f32], beta: &[f32]) -> (Vec<f32>, Vec<[f32; 2]>) {
    let mut moments = vec![[0.0; 2]; spec.batch * spec.groups];
    let len = spec.len();
    let fill = |y: &mut [f32]| {
        let tasks = y.par_chunks_exact_mut(len).zip(x.par_chunks_exact(len)).zip(&mut moments).enumerate();
        tasks.for_each(|(row, ((y, x), moments))| {
            *moments = measure(x, spec.epsilon);
            normalize(spec, *moments, spec.of_row(row, gamma), spec.of_row(row, beta), x, y);
        });
    };
    // SAFETY: the chunks cover all of `y`, since `groups` divides `channels`, and `normalize` writes each value.
    let y = unsafe { written(x.len(), fill) };
    (y, moments)
}

/// Gradients for the gradient `dy` of the result.
/// The result again, for moments that [`forward`] found.
pub(crate) fn again(spec: Spec, x: &[f32], gamma: &[f32], beta: &[f32], moments: &[[f32; 2]]) -> Vec<f32> {
    let len = spec.len();
    let fill = |y: &mut [f32]| {
        let tasks = y.par_chunks_exact_mut(len).zip(x.par_chunks_exact(len)).zip(moments).enumerate();
        tasks.for_each(|(row, ((y, x), moments))| {
            normalize(spec, *moments, spec.of_row(row, gamma), spec.of_row(row, beta), x, y);
        });
    };
    // SAFETY: as in `forward`.
    unsafe { written(x.len(), fill) }
}

pub(crate) fn backward(
    spec: Spec,
    x: &[f32],
    gamma: &[f32],
    beta: &[f32],
    moments: &[[f32; 2]],
    dy: &[f32],
) -> Gradients {
    let (len, width) = (spec.len(), spec.width());
    // Per image and channel: the parts of the gradients of gamma and of beta.
    let mut parts = vec![0.0; 2 * spec.batch * spec.channels];
    let fill = |dx: &mut [f32]| {
        let inputs = x.par_chunks_exact(len).zip(dy.par_chunks_exact(len)).zip(moments);
        let outputs = dx.par_chunks_exact_mut(len).zip(parts.par_chunks_exact_mut(2 * width));
        outputs.zip(inputs).enumerate().for_each(|(row, ((dx, parts), ((x, dy), &moments)))| {
            differentiate(spec, moments, spec.of_row(row, gamma), spec.of_row(row, beta), x, dy, dx, parts);
        });
    };
    // SAFETY: the chunks cover all of `dx`, and `differentiate` writes each value before it reads it.
    let dx = unsafe { written(x.len(), fill) };
    let mut gradients = Gradients { x: dx, gamma: vec![0.0; spec.channels], beta: vec![0.0; spec.channels] };
    for image in parts.chunks_exact(2 * spec.channels.max(1)) {
        for (group, sums) in image.chunks_exact(2 * width).enumerate() {
            for i in 0..width {
                gradients.gamma[group * width + i] += sums[2 * i];
                gradients.beta[group * width + i] += sums[2 * i + 1];
            }
        }
    }
    gradients
}

simd! {
    /// Mean and `1 / sqrt(variance + epsilon)`; two passes, so that a large mean does no harm.
    pub(crate) fn measure(x: &[f32], epsilon: f32) -> [f32; 2] {
        let n = x.len() as f32;
        let mean = sum(x, |v| v) / n;
        let variance = sum(x, |v| (v - mean) * (v - mean)) / n;
        [mean, 1.0 / (variance + epsilon).sqrt()]
    }
}

simd! {
    fn normalize(spec: Spec, moments: [f32; 2], gamma: &[f32], beta: &[f32], x: &[f32], y: &mut [f32]) {
        let [mean, inverse] = moments;
        let channels = y.chunks_exact_mut(spec.area).zip(x.chunks_exact(spec.area));
        for ((y, x), (&gamma, &beta)) in channels.zip(gamma.iter().zip(beta)) {
            let scale = gamma * inverse;
            let shift = beta - mean * scale;
            if spec.silu {
                for (y, &x) in y.iter_mut().zip(x) {
                    let z = x * scale + shift;
                    *y = z * sigmoid(z);
                }
            } else {
                for (y, &x) in y.iter_mut().zip(x) {
                    *y = x * scale + shift;
                }
            }
        }
    }
}

simd! {
    /// One group: `dx`, and in `parts` for each channel the sums for gamma and beta.
    fn differentiate(
        spec: Spec,
        moments: [f32; 2],
        gamma: &[f32],
        beta: &[f32],
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        parts: &mut [f32],
    ) {
        let [mean, inverse] = moments;
        let area = spec.area;
        let (mut total, mut total_normal) = (0.0, 0.0);
        for (i, (&gamma, &beta)) in gamma.iter().zip(beta).enumerate() {
            let range = i * area..(i + 1) * area;
            let sums = if spec.silu {
                let derivative = |normal: f32, dy: f32| {
                    let z = normal * gamma + beta;
                    let s = sigmoid(z);
                    dy * s * (1.0 + z * (1.0 - s))
                };
                before_norm(mean, inverse, &x[range.clone()], &dy[range.clone()], &mut dx[range], derivative)
            } else {
                before_norm(mean, inverse, &x[range.clone()], &dy[range.clone()], &mut dx[range], |_, dy| dy)
            };
            parts[2 * i] = sums[0];
            parts[2 * i + 1] = sums[1];
            total_normal += gamma * sums[0];
            total += gamma * sums[1];
        }
        let n = x.len() as f32;
        let (mean_dz, mean_dz_normal) = (total / n, total_normal / n);
        for (i, &gamma) in gamma.iter().enumerate() {
            let range = i * area..(i + 1) * area;
            for (dx, &x) in dx[range.clone()].iter_mut().zip(&x[range]) {
                let normal = (x - mean) * inverse;
                *dx = inverse * (gamma * *dx - mean_dz - normal * mean_dz_normal);
            }
        }
    }
}

/// Writes to `dz` what `derivative(normalised x, dy)` gives; returns the sums of `dz * normalised x` and of `dz`.
#[inline(always)]
fn before_norm(
    mean: f32,
    inverse: f32,
    x: &[f32],
    dy: &[f32],
    dz: &mut [f32],
    derivative: impl Fn(f32, f32) -> f32,
) -> [f32; 2] {
    let mut lanes = [[0.0; LANES]; 2];
    let (x_chunks, x_rest) = x.as_chunks::<LANES>();
    let (dy_chunks, dy_rest) = dy.as_chunks::<LANES>();
    let (dz_chunks, dz_rest) = dz.as_chunks_mut::<LANES>();
    for ((x, dy), dz) in x_chunks.iter().zip(dy_chunks).zip(dz_chunks) {
        for i in 0..LANES {
            let normal = (x[i] - mean) * inverse;
            dz[i] = derivative(normal, dy[i]);
            lanes[0][i] += dz[i] * normal;
            lanes[1][i] += dz[i];
        }
    }
    let mut sums = lanes.map(|lanes| lanes.iter().sum::<f32>());
    for ((&x, &dy), dz) in x_rest.iter().zip(dy_rest).zip(dz_rest) {
        let normal = (x - mean) * inverse;
        *dz = derivative(normal, dy);
        sums[0] += *dz * normal;
        sums[1] += *dz;
    }
    sums
}
