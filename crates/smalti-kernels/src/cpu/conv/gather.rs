//! What the results of a convolution see.

use super::Geometry;
use crate::cpu::simd::simd;
use std::ops::Range;

/// Columns over a grid of places: for each channel and each tap, the value at `place * step + tap` of a plane; zero outside.
pub(super) struct Columns<'a> {
    values: &'a [f32],
    channels: usize,
    size: [usize; 2],
    /// Whether each stored value stands for two by two.
    double: bool,
    step: usize,
    taps: Vec<[isize; 2]>,
    /// Rows and columns of places.
    pub grid: [usize; 2],
}

impl<'a> Columns<'a> {
    /// The inputs of results.
    pub fn seen(g: Geometry, x: &'a [f32]) -> Self {
        let at = |i: usize, k: usize| k as isize - g.padding[i] as isize;
        let taps = (0..g.kernel[0]).flat_map(|y| (0..g.kernel[1]).map(move |x| [at(0, y), at(1, x)])).collect();
        Self { values: x, channels: g.inputs, size: g.size, double: g.upsample, step: g.stride, taps, grid: g.result }
    }

    /// The results themselves.
    pub fn results(g: Geometry, dy: &'a [f32]) -> Self {
        let taps = vec![[0; 2]];
        Self { values: dy, channels: g.outputs, size: g.result, double: false, step: 1, taps, grid: g.result }
    }

    /// The results that see the inputs at `start` and every `stride` from there, and which taps of the kernel they see
    /// them by.
    pub fn reached(g: Geometry, dy: &'a [f32], start: [usize; 2]) -> (Self, Vec<usize>) {
        let (mut taps, mut used) = (Vec::new(), Vec::new());
        for (y, x) in (0..g.kernel[0]).flat_map(|y| (0..g.kernel[1]).map(move |x| (y, x))) {
            let at = |i: usize, k: usize| (start[i] + g.padding[i]) as isize - k as isize;
            let (from, stride) = ([at(0, y), at(1, x)], g.stride as isize);
            if from.iter().all(|from| from.rem_euclid(stride) == 0) {
                taps.push(from.map(|from| from.div_euclid(stride)));
                used.push(y * g.kernel[1] + x);
            }
        }
        let seen = g.seen();
        let grid = [0, 1].map(|i| (seen[i] - start[i]).div_ceil(g.stride));
        (Self { values: dy, channels: g.outputs, size: g.result, double: false, step: 1, taps, grid }, used)
    }

    pub fn area(&self) -> usize {
        self.grid[0] * self.grid[1]
    }

    pub fn depth(&self) -> usize {
        self.channels * self.taps.len()
    }

    /// Writes some columns of an image as `[depth, width]`.
    pub fn gather(&self, image: usize, places: Range<usize>, target: &mut [f32], width: usize) {
        self.gather_rows(image, places, 0..self.depth(), target, width);
    }

    /// Writes some rows of the depth only.
    pub fn gather_rows(
        &self,
        image: usize,
        places: Range<usize>,
        depths: Range<usize>,
        target: &mut [f32],
        width: usize,
    ) {
        let (taps, plane) = (self.taps.len(), self.size[0] * self.size[1]);
        let mut spans = Vec::with_capacity(taps);
        let mut at = places.start;
        while at < places.end {
            let (row, column) = (at / self.grid[1], at % self.grid[1]);
            let len = (self.grid[1] - column).min(places.end - at);
            spans.clear();
            spans.extend(self.taps.iter().map(|&tap| self.span([row, column], len, tap)));
            let start = image * self.channels * plane;
            let planes =
                Planes { values: &self.values[start..start + self.channels * plane], plane, row: self.size[1] };
            copy(&spans, planes, depths.clone(), &mut target[at - places.start..], width, len);
            at += len;
        }
    }

    /// Where the values of `len` neighbouring places lie for one tap.
    fn span(&self, [row, column]: [usize; 2], len: usize, tap: [isize; 2]) -> Span {
        let shift = usize::from(self.double);
        let [height, width] = self.size.map(|n| (n << shift) as isize);
        let step = self.step as isize;
        let (y, x) = (row as isize * step + tap[0], column as isize * step + tap[1]);
        if y < 0 || y >= height {
            return Span { row: 0, inside: 0..0, first: 0, step: self.step, shift };
        }
        let begin = ((-x).max(0) as usize).div_ceil(self.step).min(len);
        let end = ((width - x).max(0) as usize).div_ceil(self.step).clamp(begin, len);
        let first = (x + (begin * self.step) as isize).max(0) as usize;
        Span { row: y as usize >> shift, inside: begin..end, first, step: self.step, shift }
    }
}

/// Of neighbouring places, the `i`-th of `inside` has its value at `(first + i * step) >> shift` of a stored row; those before
/// and after are zeros.
struct Span {
    row: usize,
    inside: Range<usize>,
    first: usize,
    step: usize,
    shift: usize,
}

/// The planes of an image.
#[derive(Clone, Copy)]
struct Planes<'a> {
    values: &'a [f32],
    plane: usize,
    row: usize,
}

simd! {
    /// Writes the rows `depths` of a panel, for `len` places that have one span for each tap.
    fn copy(
        spans: &[Span],
        planes: Planes<'_>,
        depths: Range<usize>,
        target: &mut [f32],
        width: usize,
        len: usize,
    ) {
        let (mut channel, mut tap) = (depths.start / spans.len(), depths.start % spans.len());
        for i in 0..depths.len() {
            let span = &spans[tap];
            let source = &planes.values[channel * planes.plane + span.row * planes.row..][..planes.row];
            #[cfg(target_arch = "x86_64")]
            if tap % 3 == 0 {
                prefetch(source.as_ptr().wrapping_add(planes.plane + (span.first >> span.shift)), len * span.step);
            }
            span.copy(source, &mut target[i * width..][..len]);
            tap += 1;
            if tap == spans.len() {
                (channel, tap) = (channel + 1, 0);
            }
        }
    }
}

/// Asks for `len` values that the next channel needs: planes are too far apart for the processor to guess it.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch(start: *const f32, len: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    for at in (0..len).step_by(16) {
        // SAFETY: a hint, which any address may be given.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(at).cast()) };
    }
}

impl Span {
    #[inline(always)]
    fn copy(&self, source: &[f32], target: &mut [f32]) {
        let Self { first, step, shift, .. } = *self;
        if (step, shift, self.inside.len()) == (1, 0, 32) {
            if let (Some(target), Some(source)) = (target.as_mut_array::<32>(), source[first..].first_chunk::<32>()) {
                *target = *source;
            }
            return;
        }
        target[..self.inside.start].fill(0.0);
        target[self.inside.end..].fill(0.0);
        let target = &mut target[self.inside.clone()];
        match (shift, step) {
            _ if target.is_empty() => {}
            (0, 1) => target.iter_mut().zip(&source[first..]).for_each(|(t, s)| *t = *s),
            (0, 2) => {
                let (pairs, _) = source[first..].as_chunks::<2>();
                target.iter_mut().zip(pairs).for_each(|(t, s)| *t = s[0]);
                if pairs.len() < target.len() {
                    target[pairs.len()] = source[first + 2 * pairs.len()];
                }
            }
            _ => {
                for (i, target) in target.iter_mut().enumerate() {
                    *target = source[(first + i * step) >> shift];
                }
            }
        }
    }
}
