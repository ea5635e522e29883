//! The tiles of Winograd's algorithm F(4×4, 3×3), and how 16 at a time are read from planes and written to them.
//!
//! A tile is a block of 4 by 4 results, which sees 6 by 6 inputs.

use crate::cpu::buffer::Shared;
use crate::cpu::simd::LANES;

/// Values of a transformed tile.
pub(super) const POINTS: usize = 36;

/// One value of each of 16 tiles.
pub(super) type Lanes = [f32; LANES];

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
    pub group: usize,
}

/// The tiles `first..first + count` in segments, none across a multiple of 16 tiles of this block.
pub(super) fn segments(grid: Grid, first: usize, count: usize) -> Vec<Segment> {
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

/// Transformed tiles, `[panels, 36, channels, width]`, where a panel has `width` tiles, 16 or 32.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    pub values: Shared<'a>,
    /// The channel that the matrices begin with.
    pub first: usize,
    pub channels: usize,
    pub width: usize,
}

impl Panels<'_> {
    /// Distance of the matrices of two points: not a power of two, which would put all 36 in the same cache sets.
    fn pitch(channels: usize, width: usize) -> usize {
        channels * width + 16
    }

    /// Values that some tiles take.
    pub fn size(tiles: usize, channels: usize, width: usize) -> usize {
        tiles.div_ceil(width) * POINTS * Self::pitch(channels, width)
    }

    /// Where the matrix of a point begins.
    pub fn matrix(&self, panel: usize, point: usize) -> usize {
        (panel * POINTS + point) * Self::pitch(self.channels, self.width)
    }

    /// Where the 16 tiles of a group begin for one channel, and the distance to the next point.
    pub fn group(&self, group: usize, channel: usize) -> [usize; 2] {
        let groups = self.width / LANES;
        let start = self.matrix(group / groups, 0) + (channel - self.first) * self.width + group % groups * LANES;
        [start, Self::pitch(self.channels, self.width)]
    }
}

/// Columns of a row that 16 tiles see.
const REACH: usize = 4 * LANES + 2;

/// Reads the `N` by `N` values that each tile sees, `N` 6 or 4.
#[inline(always)]
pub(super) fn gather<const N: usize>(source: Source<'_>, channel: usize, segment: Segment, tiles: &mut [Lanes]) {
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

/// Writes the 4 by 4 values of each tile as far as they lie inside.
#[inline(always)]
pub(super) fn scatter(target: Target<'_>, channel: usize, segment: Segment, tiles: &[Lanes; 16]) {
    let Segment { image, row, column, lane, len, .. } = segment;
    let [height, width] = target.size;
    let count = (4 * len).min(width - 4 * column);
    for i in 0..4.min(height - 4 * row) {
        let tiles = &tiles[4 * i..4 * i + 4];
        let start = ((image * target.channels + channel) * height + 4 * row + i) * width + 4 * column;
        // SAFETY: each value belongs to one tile, and no other task writes this tile.
        let target = unsafe { target.values.range(start, count) };
        for (k, value) in target.iter_mut().enumerate() {
            *value = tiles[k % 4][lane + k / 4];
        }
    }
}

/// Writes sums of 2 by 2 values.
#[inline(always)]
pub(super) fn scatter_halved(target: Target<'_>, channel: usize, segment: Segment, tiles: &[Lanes; 16]) {
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
        for (k, value) in target.iter_mut().enumerate() {
            *value = sums[k % 2][lane + k / 2];
        }
    }
}
