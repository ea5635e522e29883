//! The transforms of Winograd's algorithm F(4×4, 3×3) (Lavin and Gray 2015, arXiv 1509.09308), on 16 tiles at a time.
//!
//! A tile is a block of 4 by 4 results, which sees 6 by 6 inputs. Transformed tiles are stored as
//! `[36, channels, tiles]`.

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
#[derive(Debug, Clone, Copy, Default)]
struct Segment {
    image: usize,
    row: usize,
    column: usize,
    /// The lane of the first one.
    lane: usize,
    len: usize,
}

/// The tiles `first..first + count` as segments; `count` is at most 16.
#[inline(always)]
fn segments(grid: Grid, first: usize, count: usize) -> ([Segment; LANES], usize) {
    let mut found = [Segment::default(); LANES];
    let (mut n, mut lane) = (0, 0);
    while lane < count {
        let (line, column) = ((first + lane) / grid.columns, (first + lane) % grid.columns);
        let len = (grid.columns - column).min(count - lane);
        found[n] = Segment { image: line / grid.rows, row: line % grid.rows, column, lane, len };
        n += 1;
        lane += len;
    }
    (found, n)
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
fn gather<const N: usize>(source: Source<'_>, channel: usize, segment: Segment, tiles: &mut [Lanes]) {
    let Segment { image, row, column, lane, len } = segment;
    let [height, width] = source.size;
    let shift = usize::from(source.double);
    let plane = &source.values[(image * source.channels + channel) * height * width..][..height * width];
    let x = 4 * column as isize - source.padding[1];
    let count = 4 * len + N - 4;
    // The columns in the source: `skip` zeros, then `inside` values from `from` on.
    let skip = ((-x).max(0) as usize).min(count);
    let from = x.max(0) as usize;
    let inside = (width << shift).saturating_sub(from).min(count - skip);
    let mut line = [0.0; REACH];
    for i in 0..N {
        let tiles = &mut tiles[i * N..(i + 1) * N];
        let y = 4 * row as isize - source.padding[0] + i as isize;
        if y < 0 || y as usize >= height << shift || inside == 0 {
            tiles.iter_mut().for_each(|lanes| lanes[lane..lane + len].fill(0.0));
            continue;
        }
        let stored = &plane[(y as usize >> shift) * width..][..width];
        if source.double {
            for (k, value) in line[skip..skip + inside].iter_mut().enumerate() {
                *value = stored[(from + k) >> 1];
            }
        } else {
            copy(&mut line[skip..skip + inside], &stored[from..from + inside]);
        }
        if len == LANES {
            spread::<N, LANES>(&line, tiles, 0);
        } else if len == 8 && lane % 8 == 0 {
            spread::<N, 8>(&line, tiles, lane);
        } else if len == 4 && lane % 4 == 0 {
            spread::<N, 4>(&line, tiles, lane);
        } else {
            for (j, lanes) in tiles.iter_mut().enumerate() {
                for t in 0..len {
                    lanes[lane + t] = line[4 * t + j];
                }
            }
        }
    }
}

/// A copy for short rows, without a call.
#[inline(always)]
fn copy(target: &mut [f32], source: &[f32]) {
    for (target, source) in target.iter_mut().zip(source) {
        *target = *source;
    }
}

/// Lane `lane + t` of `tiles[j]` becomes `line[4 t + j]`, for `t < COUNT`.
#[inline(always)]
fn spread<const N: usize, const COUNT: usize>(line: &[f32; REACH], tiles: &mut [Lanes], lane: usize) {
    for j in 0..N {
        let lanes = &mut tiles[j][lane..lane + COUNT];
        for t in 0..COUNT {
            lanes[t] = line[4 * t + j];
        }
    }
}

simd! {
    /// `Bᵀ d B` of the tiles `first..first + count`; `tiles [36, channels, width]`, of which the first `count` columns,
    /// rounded up to 16, are written.
    pub(super) fn inputs(source: Source<'_>, grid: Grid, first: usize, count: usize, tiles: &mut [f32], width: usize) {
        let mut seen = [[0.0; LANES]; POINTS];
        let mut half = [[0.0; LANES]; POINTS];
        for at in (0..count).step_by(LANES) {
            let lanes = LANES.min(count - at);
            let (segments, n) = segments(grid, first + at, lanes);
            seen = if lanes < LANES { [[0.0; LANES]; POINTS] } else { seen };
            for channel in 0..source.channels {
                for &segment in &segments[..n] {
                    gather::<6>(source, channel, segment, &mut seen);
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
                        let start = ((6 * i + j) * source.channels + channel) * width + at;
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
        let mut seen = [[0.0; LANES]; 16];
        let mut half = [[0.0; LANES]; 24];
        for at in (0..count).step_by(LANES) {
            let lanes = LANES.min(count - at);
            let (segments, n) = segments(grid, first + at, lanes);
            seen = if lanes < LANES { [[0.0; LANES]; 16] } else { seen };
            for channel in 0..source.channels {
                for &segment in &segments[..n] {
                    gather::<4>(source, channel, segment, &mut seen);
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
                        let start = ((6 * i + j) * source.channels + channel) * width + at;
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
        for at in (0..count).step_by(LANES) {
            let (segments, n) = segments(grid, first + at, LANES.min(count - at));
            for channel in 0..target.channels {
                let bias = bias.map_or(0.0, |bias| bias[channel]);
                for i in 0..6 {
                    let mut points = [[0.0; LANES]; 6];
                    for j in 0..6 {
                        let start = ((6 * i + j) * target.channels + channel) * width + at;
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
                for &segment in &segments[..n] {
                    if target.halve {
                        scatter_halved(target, channel, segment, &whole);
                    } else {
                        scatter(target, channel, segment, &whole);
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
fn scatter(target: Target<'_>, channel: usize, segment: Segment, tiles: &[Lanes; 16]) {
    let Segment { image, row, column, lane, len } = segment;
    let [height, width] = target.size;
    let count = (4 * len).min(width - 4 * column);
    let mut line = [0.0; 4 * LANES];
    for i in 0..4.min(height - 4 * row) {
        let tiles = &tiles[4 * i..4 * i + 4];
        if len == LANES {
            for t in 0..LANES {
                for j in 0..4 {
                    line[4 * t + j] = tiles[j][t];
                }
            }
        } else {
            for t in 0..len {
                for j in 0..4 {
                    line[4 * t + j] = tiles[j][(lane + t) % LANES];
                }
            }
        }
        let start = ((image * target.channels + channel) * height + 4 * row + i) * width + 4 * column;
        // SAFETY: each value belongs to one tile, and no other task writes this tile.
        copy(unsafe { target.values.range(start, count) }, &line[..count]);
    }
}

/// Writes sums of 2 by 2 values.
#[inline(always)]
fn scatter_halved(target: Target<'_>, channel: usize, segment: Segment, tiles: &[Lanes; 16]) {
    let Segment { image, row, column, lane, len } = segment;
    let [height, width] = target.size.map(|n| n / 2);
    let count = (2 * len).min(width - 2 * column);
    let mut line = [0.0; 2 * LANES];
    for i in 0..2.min(height - 2 * row) {
        let (upper, lower) = (&tiles[8 * i..8 * i + 4], &tiles[8 * i + 4..8 * i + 8]);
        for t in 0..len {
            for j in 0..2 {
                let at = |tiles: &[Lanes]| tiles[2 * j][(lane + t) % LANES] + tiles[2 * j + 1][(lane + t) % LANES];
                line[2 * t + j] = at(upper) + at(lower);
            }
        }
        let start = ((image * target.channels + channel) * height + 2 * row + i) * width + 2 * column;
        // SAFETY: each value belongs to one tile, and no other task writes this tile.
        copy(unsafe { target.values.range(start, count) }, &line[..count]);
    }
}

/// The matrix `G`.
const G: [[f32; 3]; 6] = [
    [0.25, 0.0, 0.0],
    [-1.0 / 6.0, -1.0 / 6.0, -1.0 / 6.0],
    [-1.0 / 6.0, 1.0 / 6.0, -1.0 / 6.0],
    [1.0 / 24.0, 1.0 / 12.0, 1.0 / 6.0],
    [1.0 / 24.0, -1.0 / 12.0, 1.0 / 6.0],
    [0.0, 0.0, 1.0],
];

/// `G w Gᵀ` of one kernel of 9 weights.
#[inline(always)]
pub(super) fn kernel(w: [f32; 9]) -> [f32; POINTS] {
    let mut half = [[0.0; 3]; 6];
    for (half, g) in half.iter_mut().zip(&G) {
        for j in 0..3 {
            half[j] = g[0] * w[j] + g[1] * w[3 + j] + g[2] * w[6 + j];
        }
    }
    std::array::from_fn(|p| {
        let (row, g) = (half[p / 6], G[p % 6]);
        g[0] * row[0] + g[1] * row[1] + g[2] * row[2]
    })
}

/// `Gᵀ s G`: the 9 gradients of a kernel from the 36 of its transform.
#[inline(always)]
pub(super) fn kernel_gradient(s: [f32; POINTS]) -> [f32; 9] {
    let mut half = [[0.0; 6]; 3];
    for i in 0..3 {
        for j in 0..6 {
            half[i][j] = (0..6).map(|k| G[k][i] * s[6 * k + j]).sum();
        }
    }
    std::array::from_fn(|p| (0..6).map(|k| half[p / 3][k] * G[k][p % 3]).sum())
}
