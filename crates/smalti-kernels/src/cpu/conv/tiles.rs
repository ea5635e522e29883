//! The transforms of Winograd's algorithm F(4×4, 3×3) (Lavin and Gray 2015, arXiv 1509.09308), on 16 tiles at a time.
//!
//! A tile is a block of 4 by 4 results, which sees 6 by 6 inputs. Transformed tiles are stored as
//! `[36, channels, tiles]`.

use super::winograd::pitch;
use crate::cpu::buffer::Shared;
use crate::cpu::simd::{LANES, simd};

/// Values of a transformed tile.
pub(super) const POINTS: usize = 36;

/// One value of each of 16 tiles.
type Lanes = [f32; LANES];

/// The tiles of a batch, counted row by row over all images.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub batch: usize,
    pub rows: usize,
    pub columns: usize,
}

impl Grid {
    pub fn of(batch: usize, [h, w]: [usize; 2]) -> Self {
        Self { batch, rows: h.div_ceil(4), columns: w.div_ceil(4) }
    }

    pub fn len(&self) -> usize {
        self.batch * self.rows * self.columns
    }
}

/// Neighbouring tiles of one row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    pub image: usize,
    pub row: usize,
    pub column: usize,
    /// The lane of the first one.
    pub lane: usize,
    pub len: usize,
    /// The 16 tiles that it belongs to, counted from the first tile of the block.
    group: usize,
}

/// The tiles `first..first + count` in segments, none across a multiple of 16 tiles of this block.
fn segments(grid: Grid, first: usize, count: usize) -> Vec<Segment> {
    let mut found = Vec::with_capacity(count / grid.columns + count / LANES + 2);
    let mut at = 0;
    while at < count {
        let (line, column) = ((first + at) / grid.columns, (first + at) % grid.columns);
        let lane = at % LANES;
        let len = (grid.columns - column).min(count - at).min(LANES - lane);
        found.push(Segment { image: line / grid.rows, row: line % grid.rows, column, lane, len, group: at / LANES });
        at += len;
    }
    found
}

/// Planes of values `[batch, channels, ..size]`, of which tiles are read.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub values: &'a [f32],
    pub channels: usize,
    pub size: [usize; 2],
    /// Whether each value stands for two by two.
    pub double: bool,
    /// Zeros above and on the left; negative when the first tile begins inside.
    pub padding: [isize; 2],
}

/// Planes that tiles are written to.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub values: Shared<'a>,
    pub channels: usize,
    /// Height and width of the tiled area.
    pub size: [usize; 2],
    /// Whether two by two values are added up to one.
    pub halve: bool,
}

/// Columns of a row that 16 tiles see.
const REACH: usize = 4 * LANES + 2;

/// Reads the `N` by `N` values that each tile sees, `N` 6 or 4.
#[inline(always)]
fn gather<const WIDE: bool, const N: usize>(source: Source<'_>, channel: usize, segment: Segment, tiles: &mut [Lanes]) {
    let Segment { image, row, column, lane, len, .. } = segment;
    let [height, width] = source.size;
    let shift = usize::from(source.double);
    let plane = &source.values[(image * source.channels + channel) * height * width..][..height * width];
    let x = 4 * column as isize - source.padding[1];
    for i in 0..N {
        let tiles = &mut tiles[i * N..(i + 1) * N];
        let y = 4 * row as isize - source.padding[0] + i as isize;
        if y < 0 || y as usize >= height << shift {
            tiles.iter_mut().for_each(|lanes| lanes[lane..lane + len].fill(0.0));
            continue;
        }
        let stored = &plane[(y as usize >> shift) * width..][..width];
        #[cfg(target_arch = "x86_64")]
        if WIDE {
            // SAFETY: `WIDE` code runs only where AVX-512 was found.
            unsafe { super::avx512::spread::<N>(stored, x, source.double, tiles, lane, len) };
            continue;
        }
        spread::<N>(stored, x, source.double, tiles, lane, len);
    }
}

/// Lane `lane + t` of `tiles[j]` becomes the value in column `x + 4 t + j` of a row, for `t < len`; zero outside.
#[inline(always)]
fn spread<const N: usize>(stored: &[f32], x: isize, double: bool, tiles: &mut [Lanes], lane: usize, len: usize) {
    let width = stored.len() << usize::from(double);
    let count = 4 * len + N - 4;
    let skip = ((-x).max(0) as usize).min(count);
    let from = x.max(0) as usize;
    let inside = width.saturating_sub(from).min(count - skip);
    let mut line = [0.0; REACH];
    for (k, value) in line[skip..skip + inside].iter_mut().enumerate() {
        *value = stored[(from + k) >> usize::from(double)];
    }
    for (j, lanes) in tiles.iter_mut().enumerate() {
        for t in 0..len {
            lanes[lane + t] = line[4 * t + j];
        }
    }
}

simd! {
    /// `Bᵀ d B` of the tiles `first..first + count`; `tiles [36, channels, width]`, of which the first `count` columns,
    /// rounded up to 16, are written.
    pub(super) fn inputs(source: Source<'_>, grid: Grid, first: usize, count: usize, tiles: &mut [f32], width: usize) {
        let segments = segments(grid, first, count);
        let mut seen = [[0.0; LANES]; POINTS];
        let mut half = [[0.0; LANES]; POINTS];
        for channel in 0..source.channels {
            for group in segments.chunk_by(|a, b| a.group == b.group) {
                let at = group[0].group * LANES;
                if count - at < LANES {
                    seen = [[0.0; LANES]; POINTS];
                }
                for &segment in group {
                    gather::<WIDE, 6>(source, channel, segment, &mut seen);
                }
                for j in 0..6 {
                    for l in 0..LANES {
                        let d = |i: usize| seen[6 * i + j][l];
                        let out = input_line(d(0), d(1), d(2), d(3), d(4), d(5));
                        for i in 0..6 {
                            half[6 * i + j][l] = out[i];
                        }
                    }
                }
                for i in 0..6 {
                    let mut whole = [[0.0; LANES]; 6];
                    for l in 0..LANES {
                        let d = |j: usize| half[6 * i + j][l];
                        let out = input_line(d(0), d(1), d(2), d(3), d(4), d(5));
                        for j in 0..6 {
                            whole[j][l] = out[j];
                        }
                    }
                    for j in 0..6 {
                        let start = (6 * i + j) * pitch(source.channels, width) + channel * width + at;
                        tiles[start..start + LANES].copy_from_slice(&whole[j]);
                    }
                }
            }
        }
    }
}

/// One column of `Bᵀ d`.
#[inline(always)]
fn input_line(d0: f32, d1: f32, d2: f32, d3: f32, d4: f32, d5: f32) -> [f32; 6] {
    let (even, odd) = (d4 - 4.0 * d2, d3 - 4.0 * d1);
    let (even2, odd2) = (d4 - d2, 2.0 * (d3 - d1));
    [4.0 * d0 - 5.0 * d2 + d4, even + odd, even - odd, even2 + odd2, even2 - odd2, 4.0 * d1 - 5.0 * d3 + d5]
}

simd! {
    /// `A g Aᵀ` of the gradients of the tiles `first..first + count`, otherwise as [`inputs`].
    pub(super) fn gradients(source: Source<'_>, grid: Grid, first: usize, count: usize, tiles: &mut [f32], width: usize) {
        let segments = segments(grid, first, count);
        let mut seen = [[0.0; LANES]; 16];
        let mut half = [[0.0; LANES]; 24];
        for channel in 0..source.channels {
            for group in segments.chunk_by(|a, b| a.group == b.group) {
                let at = group[0].group * LANES;
                if count - at < LANES {
                    seen = [[0.0; LANES]; 16];
                }
                for &segment in group {
                    gather::<WIDE, 4>(source, channel, segment, &mut seen);
                }
                for j in 0..4 {
                    for l in 0..LANES {
                        let g = |i: usize| seen[4 * i + j][l];
                        let out = gradient_line(g(0), g(1), g(2), g(3));
                        for i in 0..6 {
                            half[4 * i + j][l] = out[i];
                        }
                    }
                }
                for i in 0..6 {
                    let mut whole = [[0.0; LANES]; 6];
                    for l in 0..LANES {
                        let g = |j: usize| half[4 * i + j][l];
                        let out = gradient_line(g(0), g(1), g(2), g(3));
                        for j in 0..6 {
                            whole[j][l] = out[j];
                        }
                    }
                    for j in 0..6 {
                        let start = (6 * i + j) * pitch(source.channels, width) + channel * width + at;
                        tiles[start..start + LANES].copy_from_slice(&whole[j]);
                    }
                }
            }
        }
    }
}

/// One column of `A g`.
#[inline(always)]
fn gradient_line(g0: f32, g1: f32, g2: f32, g3: f32) -> [f32; 6] {
    let (even, odd) = (g0 + g2, g1 + g3);
    let (even2, odd2) = (g0 + 4.0 * g2, 2.0 * g1 + 8.0 * g3);
    [g0, even + odd, even - odd, even2 + odd2, even2 - odd2, g3]
}

simd! {
    /// `Aᵀ m A`, plus the bias, of the tiles `first..first + count` in `tiles [36, channels, width]`.
    ///
    /// No other task may write these tiles at the same time.
    pub(super) fn outputs(
        target: Target<'_>,
        bias: Option<&[f32]>,
        grid: Grid,
        first: usize,
        count: usize,
        tiles: &[f32],
        width: usize,
    ) {
        let mut half = [[0.0; LANES]; 24];
        let mut whole = [[0.0; LANES]; 16];
        let segments = segments(grid, first, count);
        for channel in 0..target.channels {
            let bias = bias.map_or(0.0, |bias| bias[channel]);
            for group in segments.chunk_by(|a, b| a.group == b.group) {
                let at = group[0].group * LANES;
                for i in 0..6 {
                    let mut points = [[0.0; LANES]; 6];
                    for j in 0..6 {
                        let start = (6 * i + j) * pitch(target.channels, width) + channel * width + at;
                        points[j].copy_from_slice(&tiles[start..start + LANES]);
                    }
                    for l in 0..LANES {
                        let m = |j: usize| points[j][l];
                        let out = output_line(m(0), m(1), m(2), m(3), m(4), m(5));
                        for j in 0..4 {
                            half[4 * i + j][l] = out[j];
                        }
                    }
                }
                for j in 0..4 {
                    for l in 0..LANES {
                        let m = |i: usize| half[4 * i + j][l];
                        let out = output_line(m(0), m(1), m(2), m(3), m(4), m(5));
                        for i in 0..4 {
                            whole[4 * i + j][l] = out[i] + bias;
                        }
                    }
                }
                for &segment in group {
                    if target.halve {
                        scatter_halved::<WIDE>(target, channel, segment, &whole);
                    } else {
                        scatter::<WIDE>(target, channel, segment, &whole);
                    }
                }
            }
        }
    }
}

/// One column of `Aᵀ m`.
#[inline(always)]
fn output_line(m0: f32, m1: f32, m2: f32, m3: f32, m4: f32, m5: f32) -> [f32; 4] {
    let (sum, difference) = (m1 + m2, m1 - m2);
    let (sum2, difference2) = (m3 + m4, m3 - m4);
    [m0 + sum + sum2, difference + 2.0 * difference2, sum + 4.0 * sum2, difference + 8.0 * difference2 + m5]
}

/// Writes the 4 by 4 values of each tile as far as they lie inside.
#[inline(always)]
fn scatter<const WIDE: bool>(target: Target<'_>, channel: usize, segment: Segment, tiles: &[Lanes; 16]) {
    let Segment { image, row, column, lane, len, .. } = segment;
    let [height, width] = target.size;
    let count = (4 * len).min(width - 4 * column);
    for i in 0..4.min(height - 4 * row) {
        let tiles = &tiles[4 * i..4 * i + 4];
        let start = ((image * target.channels + channel) * height + 4 * row + i) * width + 4 * column;
        // SAFETY: each value belongs to one tile, and no other task writes this tile.
        let target = unsafe { target.values.range(start, count) };
        #[cfg(target_arch = "x86_64")]
        if WIDE {
            // SAFETY: `WIDE` code runs only where AVX-512 was found.
            unsafe { super::avx512::interleave(tiles, lane, target) };
            continue;
        }
        for (k, value) in target.iter_mut().enumerate() {
            *value = tiles[k % 4][lane + k / 4];
        }
    }
}

/// Writes sums of 2 by 2 values.
#[inline(always)]
fn scatter_halved<const WIDE: bool>(target: Target<'_>, channel: usize, segment: Segment, tiles: &[Lanes; 16]) {
    let Segment { image, row, column, lane, len, .. } = segment;
    let [height, width] = target.size.map(|n| n / 2);
    let count = (2 * len).min(width - 2 * column);
    for i in 0..2.min(height - 2 * row) {
        let mut sums = [[0.0; LANES]; 2];
        for j in 0..2 {
            let at = |k: usize| &tiles[8 * i + 2 * j + k];
            for l in 0..LANES {
                sums[j][l] = at(0)[l] + at(1)[l] + (at(4)[l] + at(5)[l]);
            }
        }
        let start = ((image * target.channels + channel) * height + 2 * row + i) * width + 2 * column;
        // SAFETY: each value belongs to one tile, and no other task writes this tile.
        let target = unsafe { target.values.range(start, count) };
        #[cfg(target_arch = "x86_64")]
        if WIDE {
            // SAFETY: `WIDE` code runs only where AVX-512 was found.
            unsafe { super::avx512::interleave_two(&sums, lane, target) };
            continue;
        }
        for (k, value) in target.iter_mut().enumerate() {
            *value = sums[k % 2][lane + k / 2];
        }
    }
}
