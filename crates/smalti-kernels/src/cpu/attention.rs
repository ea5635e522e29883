//! Attention of heads over strided views. Scores exist for a block of queries at a time; the backward pass makes them again.

use super::buffer::{Shared, with_scratch, written};
use super::gemm::{Matrix, multiply};
use super::packed::panel::{self, ROWS, WIDTH};
use super::share::share;
use super::simd::{LANES, exp, simd};
use super::transpose::transpose_rows;
use std::ops::Range;

/// Sizes and options of one call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub batch: usize,
    pub heads: usize,
    pub queries: usize,
    pub keys: usize,
    /// Channels of queries and keys.
    pub width: usize,
    /// Channels of values.
    pub value_width: usize,
    /// Whether query `i` sees only the keys up to `i + keys - queries`.
    pub causal: bool,
    /// Factor of the scores.
    pub scale: f32,
}

impl Heads {
    /// Queries of a block: few enough that its scores stay in the second level cache.
    fn block(&self) -> usize {
        (100_000 / self.keys.max(1)).clamp(16, 64).min(self.queries.max(1))
    }

    /// How many keys, from the first on, hold all that any of these queries sees.
    fn seen_by(&self, mask: Option<Mask<'_>>, at: [usize; 2], queries: Range<usize>) -> usize {
        let seen = self.seen(queries.end.saturating_sub(1));
        mask.map_or(seen, |mask| mask.seen(at, queries, self.keys).min(seen))
    }

    /// How many keys a query sees, from the first on.
    fn seen(&self, query: usize) -> usize {
        if self.causal { (query + 1 + self.keys).saturating_sub(self.queries).min(self.keys) } else { self.keys }
    }
}

/// Values `[batch, heads, rows, channels]` at any strides.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub values: &'a [f32],
    pub strides: [usize; 4],
}

/// Keys or values whose rows are those of several views, one after another.
#[derive(Clone, Copy)]
pub(crate) struct Piece<'a> {
    pub view: View<'a>,
    pub rows: usize,
}

/// The rows of a head, each with the distance of its channels.
fn rows_of<'a>(pieces: &[Piece<'a>], at: [usize; 2]) -> impl Iterator<Item = (&'a [f32], usize)> + Clone {
    pieces.iter().flat_map(move |piece| {
        let Matrix { values, strides: [of_row, of_channel] } = piece.view.head(at, 0);
        (0..piece.rows).map(move |row| (&values[row * of_row..], of_channel))
    })
}

impl<'a> View<'a> {
    /// The rows of a head from `row` on.
    fn head(self, [image, head]: [usize; 2], row: usize) -> Matrix<'a> {
        let [of_image, of_head, of_row, of_channel] = self.strides;
        let start = image * of_image + head * of_head + row * of_row;
        Matrix { values: &self.values[start..], strides: [of_row, of_channel] }
    }
}

/// What is hidden: `[batch, heads, queries, keys]` row by row, not 0 hides; an axis of size 1 has stride 0.
#[derive(Clone, Copy)]
pub(crate) struct Mask<'a> {
    pub values: &'a [u8],
    pub strides: [usize; 2],
}

impl<'a> Mask<'a> {
    fn row(self, [image, head]: [usize; 2], query: usize, keys: usize) -> &'a [u8] {
        &self.values[image * self.strides[0] + head * self.strides[1] + query * keys..][..keys]
    }

    /// How many keys, from the first on, hold all that any of these queries sees.
    fn seen(self, at: [usize; 2], queries: Range<usize>, keys: usize) -> usize {
        let last = |query| self.row(at, query, keys).iter().rposition(|hidden| *hidden == 0).map_or(0, |key| key + 1);
        queries.map(last).max().unwrap_or(0)
    }
}

/// Gradients of the three inputs, each `[batch, rows, heads, channels]`.
pub(crate) struct Gradients {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

/// The result `[batch, queries, heads, value_width]`, and of each query `[batch, heads, queries]` the logarithm of the sum
/// of exponentials, minus infinity where it sees nothing.
pub(crate) fn forward(
    shape: Heads,
    q: View<'_>,
    k: &[Piece<'_>],
    v: &[Piece<'_>],
    mask: Option<Mask<'_>>,
) -> (Vec<f32>, Vec<f32>) {
    let Heads { batch, heads, queries, keys, width, value_width, .. } = shape;
    let block = shape.block();
    let blocks = queries.div_ceil(block);
    // A task packs the keys and values of its head, so it takes many blocks; few heads are shared among the threads.
    let parts = (4 * rayon::current_num_threads()).div_ceil((batch * heads).max(1)).clamp(1, blocks.max(1));
    let each = blocks.div_ceil(parts).max(1);
    let mut log_sums = vec![f32::NEG_INFINITY; batch * heads * queries];
    let sums = Shared::new(&mut log_sums);
    let sizes = [
        panels_of(keys) * WIDTH * width,
        panels_of(value_width) * WIDTH * keys,
        block * width,
        block * keys,
        block * value_width,
        block,
    ];
    let fill = |out: &mut [f32]| {
        let out = Shared::new(out);
        share(batch * heads * parts, |task| {
            let (head, part) = (task / parts, task % parts);
            let at = [head / heads, head % heads];
            with_scratch(sizes, |[keys_packed, values_packed, asked, scores, mixed, totals]| {
                pack_columns(rows_of(k, at), width, keys_packed);
                pack_rows(rows_of(v, at), [keys, value_width], values_packed);
                for first in (part * each * block..queries.min((part + 1) * each * block)).step_by(block) {
                    let rows = block.min(queries - first);
                    // SAFETY: each block of queries belongs to one task.
                    let log_sums = unsafe { sums.range(head * queries + first, rows) };
                    let seen = shape.seen_by(mask, at, first..first + rows);
                    copy_rows(q.head(at, first), [rows, width], asked);
                    product([rows, seen, width], &asked[..rows * width], (keys_packed, width), scores);
                    for row in 0..rows {
                        let limit = shape.seen(first + row);
                        let hidden = mask.map_or(&[][..], |mask| mask.row(at, first + row, keys));
                        let line = &mut scores[row * seen..(row + 1) * seen];
                        [totals[row], log_sums[row]] = soften(line, limit, hidden, shape.scale);
                    }
                    product([rows, value_width, seen], &scores[..rows * seen], (values_packed, keys), mixed);
                    for (row, total) in totals[..rows].iter().enumerate() {
                        let factor = if *total == 0.0 { 0.0 } else { 1.0 / total };
                        // SAFETY: as above.
                        let out = unsafe { out.range(place(shape, at, first + row, value_width), value_width) };
                        out.iter_mut().zip(&mixed[row * value_width..]).for_each(|(out, mixed)| *out = mixed * factor);
                    }
                }
            });
        });
    };
    // SAFETY: the tasks cover all blocks of queries, and each writes all of its rows.
    let out = unsafe { written(batch * queries * heads * value_width, fill) };
    (out, log_sums)
}

/// Panels that so many outputs need.
fn panels_of(outputs: usize) -> usize {
    outputs.div_ceil(WIDTH)
}

/// Packs rows of so many channels for products with their transpose: a panel keeps [`WIDTH`] rows, channel by channel.
fn pack_columns<'a>(mut rows: impl Iterator<Item = (&'a [f32], usize)> + Clone, channels: usize, panels: &mut [f32]) {
    let side_by_side = rows.clone().all(|(_, step)| step == 1);
    let mut copies = vec![0.0; if side_by_side { 0 } else { WIDTH * channels }];
    for panel in panels.chunks_exact_mut((channels * WIDTH).max(1)) {
        if side_by_side {
            transpose_rows(rows.by_ref().map(|(row, _)| row), panel, [channels, WIDTH]);
            continue;
        }
        let mut count = 0;
        for (copy, (row, step)) in copies.chunks_exact_mut(channels.max(1)).zip(rows.by_ref()) {
            copy.iter_mut().enumerate().for_each(|(channel, copy)| *copy = row[channel * step]);
            count += 1;
        }
        transpose_rows(copies.chunks_exact(channels.max(1)).take(count), panel, [channels, WIDTH]);
    }
}

/// Packs `n` rows of so many channels for products with them: a panel keeps [`WIDTH`] channels, row by row.
fn pack_rows<'a>(
    rows: impl Iterator<Item = (&'a [f32], usize)> + Clone,
    [n, channels]: [usize; 2],
    panels: &mut [f32],
) {
    for (panel, first) in panels.chunks_exact_mut((n * WIDTH).max(1)).zip((0..channels).step_by(WIDTH)) {
        let width = WIDTH.min(channels - first);
        for (lanes, (row, step)) in panel.chunks_exact_mut(WIDTH).zip(rows.clone()) {
            let values = &row[first * step..];
            let (lanes, rest) = lanes.split_at_mut(width);
            match step {
                1 => lanes.copy_from_slice(&values[..width]),
                step => lanes.iter_mut().enumerate().for_each(|(lane, value)| *value = values[lane * step]),
            }
            rest.fill(0.0);
        }
    }
}

/// Copies `[rows, channels]` without gaps.
fn copy_rows(matrix: Matrix<'_>, [rows, channels]: [usize; 2], copy: &mut [f32]) {
    for (row, copy) in copy[..rows * channels].chunks_exact_mut(channels.max(1)).enumerate() {
        let values = &matrix.values[row * matrix.strides[0]..];
        copy.iter_mut().enumerate().for_each(|(channel, copy)| *copy = values[channel * matrix.strides[1]]);
    }
}

/// `x [rows, inputs]` times packed panels of `depth >= inputs` inputs, of which the first ones count, to `y [rows, outputs]`.
fn product([rows, outputs, inputs]: [usize; 3], x: &[f32], (panels, depth): (&[f32], usize), y: &mut [f32]) {
    if inputs == 0 {
        y[..rows * outputs].fill(0.0);
        return;
    }
    let mut sums = [[0.0; WIDTH]; ROWS];
    for row in (0..rows).step_by(ROWS) {
        let count = ROWS.min(rows - row);
        let x = &x[row * inputs..(row + count) * inputs];
        for (panel, first) in panels.chunks_exact(depth * WIDTH).zip((0..outputs).step_by(WIDTH)) {
            panel::multiply(&panel[..inputs * WIDTH], x, inputs, &mut sums);
            let width = WIDTH.min(outputs - first);
            for (i, sums) in sums[..count].iter().enumerate() {
                y[(row + i) * outputs + first..][..width].copy_from_slice(&sums[..width]);
            }
        }
    }
}

/// What the gradients are computed from; `dy [batch, heads, queries, value_width]` is the gradient of the result.
#[derive(Clone, Copy)]
pub(crate) struct Differentiation<'a> {
    pub shape: Heads,
    pub q: View<'a>,
    pub k: View<'a>,
    pub v: View<'a>,
    pub mask: Option<Mask<'a>>,
    /// As [`forward`] returns them.
    pub log_sums: &'a [f32],
    pub dy: View<'a>,
}

impl Differentiation<'_> {
    pub(crate) fn gradients(self) -> Gradients {
        let Heads { batch, heads, queries, keys, width, value_width, .. } = self.shape;
        let mut dq = vec![0.0; batch * queries * heads * width];
        let mut dk = vec![0.0; batch * keys * heads * width];
        let mut dv = vec![0.0; batch * keys * heads * value_width];
        let targets = [&mut dq, &mut dk, &mut dv].map(|values| Shared::new(values));
        share(batch * heads, |head| {
            // SAFETY: each head belongs to one task.
            with_scratch(self.scratch(), |scratch| unsafe { self.head(head, scratch, targets) });
        });
        Gradients { q: dq, k: dk, v: dv }
    }

    /// Values of scratch space that a head needs.
    fn scratch(&self) -> [usize; 9] {
        let Heads { keys, width, value_width, .. } = self.shape;
        let block = self.shape.block();
        [
            panels_of(keys) * WIDTH * width,
            panels_of(keys) * WIDTH * value_width,
            panels_of(width) * WIDTH * keys,
            block * width.max(value_width),
            block * keys,
            block * keys,
            block * width,
            keys * width,
            keys * value_width,
        ]
    }

    /// The gradients of a head, block by block of its queries.
    ///
    /// # Safety
    /// No other task may use the rows of this head.
    unsafe fn head(
        &self,
        head: usize,
        [by_key, by_value, keys_packed, given, scores, slopes, dq, dk, dv]: [&mut [f32]; 9],
        [to_q, to_k, to_v]: [Shared<'_>; 3],
    ) {
        let Heads { heads, queries, keys, width, value_width, .. } = self.shape;
        let (at, block) = ([head / heads, head % heads], self.shape.block());
        let [keys_of, values_of] = [self.k, self.v].map(|view| [Piece { view, rows: keys }]);
        pack_columns(rows_of(&keys_of, at), width, by_key);
        pack_columns(rows_of(&values_of, at), value_width, by_value);
        pack_rows(rows_of(&keys_of, at), [keys, width], keys_packed);
        dk.fill(0.0);
        dv.fill(0.0);
        for first in (0..queries).step_by(block) {
            let rows = block.min(queries - first);
            let seen = self.shape.seen_by(self.mask, at, first..first + rows);
            if seen == 0 {
                continue;
            }
            let (q, dy) = (self.q.head(at, first), self.dy.head(at, first));
            copy_rows(q, [rows, width], given);
            product([rows, seen, width], &given[..rows * width], (by_key, width), scores);
            copy_rows(dy, [rows, value_width], given);
            product([rows, seen, value_width], &given[..rows * value_width], (by_value, value_width), slopes);
            self.weights_and_slopes(head, first, [rows, seen], scores, slopes);
            let weights = Matrix { values: scores, strides: [1, seen] };
            multiply([seen, value_width, rows], dv, [value_width, 1], true, weights, dy);
            let turned = Matrix { values: slopes, strides: [1, seen] };
            multiply([seen, width, rows], dk, [width, 1], true, turned, q);
            product([rows, width, seen], &slopes[..rows * seen], (keys_packed, keys), dq);
            // SAFETY: the caller's promise.
            unsafe { hand_out(to_q, self.shape, at, first, width, &dq[..rows * width]) };
        }
        let shape = Heads { queries: keys, ..self.shape };
        // SAFETY: the caller's promise.
        unsafe { hand_out(to_k, shape, at, 0, width, dk) };
        // SAFETY: the caller's promise.
        unsafe { hand_out(to_v, shape, at, 0, value_width, dv) };
    }

    /// Scores `[rows, seen]` of the queries from `first` on become weights, and slopes of the weights those of the scores.
    fn weights_and_slopes(
        &self,
        head: usize,
        first: usize,
        [rows, seen]: [usize; 2],
        scores: &mut [f32],
        slopes: &mut [f32],
    ) {
        let Heads { heads, queries, keys, scale, .. } = self.shape;
        for row in 0..rows {
            let limit = self.shape.seen(first + row);
            let at = [head / heads, head % heads];
            let hidden = self.mask.map_or(&[][..], |mask| mask.row(at, first + row, keys));
            let range = row * seen..(row + 1) * seen;
            let log_sum = self.log_sums[head * queries + first + row];
            differentiate(&mut scores[range.clone()], &mut slopes[range], limit, hidden, scale, log_sum);
        }
    }
}

/// Where a row of a head is in `[batch, queries, heads, channels]`.
fn place(shape: Heads, [image, head]: [usize; 2], row: usize, channels: usize) -> usize {
    ((image * shape.queries + row) * shape.heads + head) * channels
}

/// Copies rows of a head to their places.
///
/// # Safety
/// No other task may use the rows of this head.
unsafe fn hand_out(target: Shared<'_>, shape: Heads, at: [usize; 2], first: usize, channels: usize, rows: &[f32]) {
    for (row, values) in rows.chunks_exact(channels).enumerate() {
        // SAFETY: the caller's promise; one row is borrowed at a time.
        unsafe { target.range(place(shape, at, first + row, channels), channels) }.copy_from_slice(values);
    }
}

simd! {
    /// Turns products into exponentials relative to the largest; returns their sum and the logarithm of the sum of
    /// exponentials of the scores.
    fn soften(line: &mut [f32], limit: usize, hidden: &[u8], scale: f32) -> [f32; 2] {
        let (line, rest) = line.split_at_mut(limit.min(line.len()));
        rest.fill(0.0);
        hide(line, hidden);
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for chunk in line.chunks(LANES) {
            for (lane, &value) in lanes.iter_mut().zip(chunk) {
                *lane = if value > *lane { value } else { *lane };
            }
        }
        let largest = lanes.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        if largest == f32::NEG_INFINITY {
            // All hidden, or no number at all.
            let value = if line.iter().any(|value| value.is_nan()) { f32::NAN } else { 0.0 };
            line.fill(value);
            return [value, if value == 0.0 { f32::NEG_INFINITY } else { value }];
        }
        let mut lanes = [0.0; LANES];
        for chunk in line.chunks_mut(LANES) {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *value = exp_or_zero((*value - largest) * scale);
                *lane += *value;
            }
        }
        let total = lanes.iter().sum::<f32>();
        [total, largest * scale + total.ln()]
    }
}

simd! {
    /// Turns products into attention weights, and the gradients of the weights into those of the products.
    fn differentiate(
        weights: &mut [f32],
        slopes: &mut [f32],
        limit: usize,
        hidden: &[u8],
        scale: f32,
        log_sum: f32,
    ) {
        let limit = if log_sum == f32::NEG_INFINITY { 0 } else { limit.min(weights.len()) };
        let (weights, rest) = weights.split_at_mut(limit);
        rest.fill(0.0);
        let (slopes, rest) = slopes.split_at_mut(limit);
        rest.fill(0.0);
        hide(weights, hidden);
        let mut lanes = [0.0; LANES];
        for (weights, slopes) in weights.chunks_mut(LANES).zip(slopes.chunks(LANES)) {
            for ((lane, weight), slope) in lanes.iter_mut().zip(weights).zip(slopes) {
                *weight = exp_or_zero(*weight * scale - log_sum);
                *lane += *weight * slope;
            }
        }
        let mean = lanes.iter().sum::<f32>();
        for (slope, weight) in slopes.iter_mut().zip(weights) {
            *slope = *weight * (*slope - mean) * scale;
        }
    }
}

/// Minus infinity where something is hidden; an empty mask hides nothing.
#[inline(always)]
fn hide(line: &mut [f32], hidden: &[u8]) {
    for (value, &hidden) in line.iter_mut().zip(hidden) {
        *value = if hidden != 0 { f32::NEG_INFINITY } else { *value };
    }
}

/// Zero where the exponential is too small for a normal number: products with such numbers are slow.
#[inline(always)]
fn exp_or_zero(x: f32) -> f32 {
    let y = exp(x);
    if x < -87.0 { 0.0 } else { y }
}
