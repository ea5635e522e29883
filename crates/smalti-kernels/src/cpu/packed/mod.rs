//! Matrices packed once for products with few rows.
//!
//! The outputs are cut into panels of [`WIDTH`]; a panel keeps the weights of the first input for all of its outputs, then
//! those of the second, and so on. A product reads it from first to last, with the outputs in the lanes.

pub(crate) mod panel;

use super::buffer::Shared;
use super::share::share;
use super::simd::simd;
use panel::{ROWS, WIDTH, Weight};
use rayon::prelude::*;
use std::ops::Range;

/// Bytes of the panels of a task: they stay in the second-level cache while it goes over its rows.
const TASK: usize = 1 << 18;
/// Rows of a task.
const BLOCK: usize = 64;
/// Multiplications that are not worth sharing.
const SMALL: usize = 1 << 17;

/// How the weights of a matrix are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    F32,
    Bf16,
    Int8,
}

/// Memory for weights of any kind, aligned so that no load crosses a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A packed matrix.
pub(crate) struct Panels {
    lines: Vec<Line>,
    /// For each output, of integers only.
    scales: Vec<f32>,
    kind: Kind,
    inputs: usize,
    outputs: usize,
}

impl Panels {
    /// Packs `values [inputs, outputs]`.
    pub(crate) fn new(values: &[f32], [inputs, outputs]: [usize; 2], kind: Kind) -> Self {
        assert_eq!(values.len(), inputs * outputs, "values of a matrix [{inputs}, {outputs}]");
        let size = match kind {
            Kind::F32 => 4,
            Kind::Bf16 => 2,
            Kind::Int8 => 1,
        };
        let bytes = outputs.div_ceil(WIDTH) * WIDTH * inputs * size;
        let lines = vec![Line([0; 64]); bytes.div_ceil(64)];
        let scales = if kind == Kind::Int8 { scales(values, outputs) } else { Vec::new() };
        let mut panels = Self { lines, scales, kind, inputs, outputs };
        match kind {
            Kind::F32 => panels.fill(values, |_, value| value),
            Kind::Bf16 => panels.fill(values, |_, value| bf16(value)),
            Kind::Int8 => {
                let scales = panels.scales.clone();
                panels.fill(values, |output, value| int8(value, scales[output]));
            }
        }
        panels
    }

    fn fill<W: Weight>(&mut self, values: &[f32], keep: impl Fn(usize, f32) -> W + Sync) {
        let (inputs, outputs) = (self.inputs, self.outputs);
        if inputs == 0 {
            return;
        }
        self.weights_mut::<W>().par_chunks_exact_mut(inputs * WIDTH).enumerate().for_each(|(panel, weights)| {
            let first = panel * WIDTH;
            let width = WIDTH.min(outputs - first);
            for (i, weights) in weights.as_chunks_mut::<WIDTH>().0.iter_mut().enumerate() {
                let values = &values[i * outputs + first..][..width];
                for (lane, (weight, value)) in weights.iter_mut().zip(values).enumerate() {
                    *weight = keep(first + lane, *value);
                }
            }
        });
    }

    /// The values `[inputs, outputs]` that the weights stand for.
    pub(crate) fn unpack(&self) -> Vec<f32> {
        match self.kind {
            Kind::F32 => self.widened::<f32>(),
            Kind::Bf16 => self.widened::<u16>(),
            Kind::Int8 => self.widened::<i8>(),
        }
    }

    fn widened<W: Weight>(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.inputs * self.outputs];
        for (panel, weights) in self.weights::<W>().chunks_exact((self.inputs * WIDTH).max(1)).enumerate() {
            let first = panel * WIDTH;
            let width = WIDTH.min(self.outputs - first);
            for (i, weights) in weights.as_chunks::<WIDTH>().0.iter().enumerate() {
                for lane in 0..width {
                    let scale = self.scales.get(first + lane).copied().unwrap_or(1.0);
                    values[i * self.outputs + first + lane] = weights[lane].widen() * scale;
                }
            }
        }
        values
    }

    pub(crate) fn shape(&self) -> [usize; 2] {
        [self.inputs, self.outputs]
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Bytes of weights and scales.
    pub(crate) fn bytes(&self) -> usize {
        size_of_val(self.lines.as_slice()) + size_of_val(self.scales.as_slice())
    }

    fn panels(&self) -> usize {
        self.outputs.div_ceil(WIDTH)
    }

    fn weights<W: Weight>(&self) -> &[W] {
        let len = self.panels() * WIDTH * self.inputs;
        assert!(len * size_of::<W>() <= size_of_val(self.lines.as_slice()), "weights of another kind");
        // SAFETY: inside of the lines, aligned to 64 bytes, and every bit pattern is a weight.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), len) }
    }

    fn weights_mut<W: Weight>(&mut self) -> &mut [W] {
        let len = self.panels() * WIDTH * self.inputs;
        assert!(len * size_of::<W>() <= size_of_val(self.lines.as_slice()), "weights of another kind");
        // SAFETY: as above, and the lines are borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), len) }
    }
}

/// For each column the step between neighbouring integers: the largest magnitude is 127 steps. Not a number where a value
/// is not finite, so that products say so too.
fn scales(values: &[f32], outputs: usize) -> Vec<f32> {
    let mut largest = vec![0.0f32; outputs];
    for row in values.chunks_exact(outputs.max(1)) {
        for (largest, value) in largest.iter_mut().zip(row) {
            let magnitude = if value.is_finite() { value.abs() } else { f32::NAN };
            *largest = if magnitude <= *largest || largest.is_nan() { *largest } else { magnitude };
        }
    }
    largest.into_iter().map(step).collect()
}

/// A 127th, rounded so that 127 of it are finite if the whole is.
fn step(largest: f32) -> f32 {
    let step = largest / 127.0;
    if largest.is_finite() && (127.0 * step).is_infinite() { step.next_down() } else { step }
}

fn int8(value: f32, scale: f32) -> i8 {
    // Where the scale is too small for a float, the row is zero.
    if scale > 0.0 { (value / scale).round_ties_even().clamp(-127.0, 127.0) as i8 } else { 0 }
}

/// The nearest bfloat16; finite values stay finite.
fn bf16(value: f32) -> u16 {
    let rounded = half::bf16::from_f32(value);
    if rounded.is_infinite() && value.is_finite() {
        return half::bf16::MAX.to_bits() | (rounded.to_bits() & 0x8000);
    }
    rounded.to_bits()
}

/// A product to make: `y = x weights + bias`, where `y` has a row of the matrix' outputs for each row of `x`.
pub(crate) struct Product<'a> {
    pub panels: &'a Panels,
    pub bias: Option<&'a [f32]>,
    pub y: &'a mut [f32],
}

/// Products of the same `x [rows, inputs]`, shared among the threads together.
pub(crate) fn multiply(x: &[f32], rows: usize, products: Vec<Product<'_>>) {
    let mut tasks = Vec::new();
    let mut work = 0;
    let targets: Vec<Target<'_>> = products.into_iter().map(|product| Target::new(product, x, rows)).collect();
    let panels: usize = targets.iter().map(|target| target.panels.panels()).sum();
    let even = panels.div_ceil(2 * rayon::current_num_threads()).max(1);
    for target in &targets {
        let panels = target.panels;
        work += panels.inputs * panels.outputs * rows;
        let each = (TASK * panels.panels().max(1) / panels.bytes().max(1)).clamp(1, even);
        for first in (0..panels.panels()).step_by(each) {
            for row in (0..rows).step_by(BLOCK) {
                let part = [first..(first + each).min(panels.panels()), row..(row + BLOCK).min(rows)];
                tasks.push((target, part));
            }
        }
    }
    if work <= SMALL {
        tasks.into_iter().for_each(|(target, part)| target.make(x, part));
    } else {
        share(tasks.len(), |task| {
            let (target, part) = &tasks[task];
            target.make(x, part.clone());
        });
    }
}

struct Target<'a> {
    panels: &'a Panels,
    bias: Option<&'a [f32]>,
    y: Shared<'a>,
}

impl<'a> Target<'a> {
    fn new(Product { panels, bias, y }: Product<'a>, x: &[f32], rows: usize) -> Self {
        assert_eq!(x.len(), rows * panels.inputs, "rows of {} inputs", panels.inputs);
        assert_eq!(y.len(), rows * panels.outputs, "rows of {} outputs", panels.outputs);
        assert!(bias.is_none_or(|bias| bias.len() == panels.outputs), "a bias for {} outputs", panels.outputs);
        Self { panels, bias, y: Shared::new(y) }
    }

    /// The part of the product in these panels and rows; parts that are made at the same time must not overlap.
    fn make(&self, x: &[f32], part: [Range<usize>; 2]) {
        match self.panels.kind {
            Kind::F32 => self.make_of::<f32>(x, part),
            Kind::Bf16 => self.make_of::<u16>(x, part),
            Kind::Int8 => self.make_of::<i8>(x, part),
        }
    }

    fn make_of<W: Weight>(&self, x: &[f32], [panels, rows]: [Range<usize>; 2]) {
        let (inputs, weights) = (self.panels.inputs, self.panels.weights::<W>());
        let mut sums = [[0.0; WIDTH]; ROWS];
        for row in rows.clone().step_by(ROWS) {
            let count = ROWS.min(rows.end - row);
            let x = &x[row * inputs..(row + count) * inputs];
            for panel in panels.clone() {
                panel::multiply(&weights[panel * inputs * WIDTH..][..inputs * WIDTH], x, inputs, &mut sums);
                let (first, outputs) = (panel * WIDTH, self.panels.outputs);
                let columns = first..outputs.min(first + WIDTH);
                let scales = self.panels.scales.get(columns.clone()).unwrap_or_default();
                let bias = self.bias.map_or(&[][..], |bias| &bias[columns]);
                finish(&sums[..count], scales, bias, self.y, [row * outputs + first, outputs]);
            }
        }
    }
}

simd! {
    /// Sums of rows, times the scales if there are any, plus the bias if there is one, to where they begin in
    /// `y`, and as far apart as `place` says.
    fn finish(
        sums: &[[f32; WIDTH]],
        scales: &[f32],
        bias: &[f32],
        y: Shared<'_>,
        place: [usize; 2],
    ) {
        let [start, stride] = place;
        let width = WIDTH.min(stride - start % stride);
        for (i, sums) in sums.iter().enumerate() {
            // SAFETY: tasks have rows and panels of their own.
            let y = unsafe { y.range(start + i * stride, width) };
            match (scales, bias) {
                ([], []) => y.copy_from_slice(&sums[..width]),
                ([], bias) => y.iter_mut().zip(sums).zip(bias).for_each(|((y, sum), bias)| *y = sum + bias),
                (scales, []) => y.iter_mut().zip(sums).zip(scales).for_each(|((y, sum), scale)| *y = sum * scale),
                (scales, bias) => {
                    let factors = scales.iter().zip(bias);
                    y.iter_mut().zip(sums).zip(factors).for_each(|((y, sum), (scale, bias))| *y = sum * scale + bias);
                }
            }
        }
    }
}
