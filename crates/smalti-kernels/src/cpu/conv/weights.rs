//! The gradient of 3×3 kernels by Winograd's algorithm: at each point a product over the tiles, of the transformed gradients
//! of results with the transformed inputs, both packed with the tiles as depth.

use super::Geometry;
use super::kernels;
use super::tiles::{Grid, POINTS, Panels, Source};
use super::transforms::{gradients, inputs};
use crate::cpu::buffer::{Shared, with_scratch, with_shared};
use crate::cpu::panels::{Place, ROWS, Start, WIDTH, multiply};
use crate::cpu::share::share;
use crate::cpu::simd::LANES;
use crate::cpu::transpose::transpose;
use std::ops::Range;

/// Tiles that are multiplied at once: a panel of them fits into the first level cache.
const DEPTH: usize = 128;

/// Transformed values that are held at a time: 16 MiB.
const HELD: usize = 4 << 20;

/// Values of a product of two panels.
const PRODUCT: usize = ROWS * WIDTH;

pub(super) fn backward(g: Geometry, x: &[f32], dy: &[f32]) -> Vec<f32> {
    let grid = Grid::of(g.batch, g.result);
    let padding = g.padding.map(|n| n as isize);
    let seen = Source { values: x, channels: g.inputs, size: g.size, double: g.upsample, padding };
    let given = Source { values: dy, channels: g.outputs, size: g.result, double: false, padding: [0; 2] };
    let held = HELD / (POINTS * (g.inputs + g.outputs)) / DEPTH * DEPTH;
    let tiles = held.max(DEPTH).min(grid.len().next_multiple_of(LANES)).max(LANES);
    let seen = Side { source: seen, width: WIDTH, tiles };
    let given = Side { source: given, width: ROWS, tiles };
    let mut dw = vec![0.0; g.outputs * g.inputs * 9];
    let target = Shared::new(&mut dw);
    let task = |memory: &mut [f32], sums: Option<Shared<'_>>| {
        let (left, right) = memory.split_at_mut(seen.size());
        let [left, right] = [left, right].map(Shared::new);
        for start in (0..grid.len()).step_by(tiles) {
            let part = start..grid.len().min(start + tiles);
            seen.transform(grid, part.clone(), left, |source, grid, tiles, channels, panels| {
                inputs(source, grid, tiles, channels, panels);
            });
            given.transform(grid, part.clone(), right, |source, grid, tiles, channels, panels| {
                gradients(source, grid, tiles, channels, panels);
            });
            let product = Products { seen, left, given, right, depth: part.len().next_multiple_of(LANES) };
            match sums {
                Some(sums) => product.add_all(sums, start == 0),
                None => product.finish_all(target),
            }
        }
        if let Some(sums) = sums {
            finish(seen, given, sums, target);
        }
    };
    let size = seen.size() + given.size();
    if grid.len() <= tiles {
        with_shared(size, |memory| task(memory, None));
    } else {
        let products = POINTS * seen.panels() * given.panels() * PRODUCT;
        with_shared(size, |memory| with_shared(products, |sums| task(memory, Some(Shared::new(sums)))));
    }
    dw
}

/// One factor: `[36, panels, tiles, width]` with the channels in panels.
#[derive(Clone, Copy)]
struct Side<'a> {
    source: Source<'a>,
    width: usize,
    /// Most tiles at a time.
    tiles: usize,
}

impl Side<'_> {
    fn panels(&self) -> usize {
        self.source.channels.div_ceil(self.width)
    }

    /// Channels of a panel.
    fn channels(&self, panel: usize) -> Range<usize> {
        panel * self.width..self.source.channels.min((panel + 1) * self.width)
    }

    /// Distance of panels: not a power of two, which would put them all in the same cache sets.
    fn pitch(&self) -> usize {
        self.tiles * self.width + 16
    }

    fn size(&self) -> usize {
        POINTS * self.panels() * self.pitch()
    }

    fn panel(&self, point: usize, panel: usize) -> usize {
        (point * self.panels() + panel) * self.pitch()
    }

    /// Transforms some tiles, of all channels.
    fn transform(
        self,
        grid: Grid,
        tiles: Range<usize>,
        target: Shared<'_>,
        transform: impl Fn(Source<'_>, Grid, Range<usize>, Range<usize>, Panels<'_>) + Sync,
    ) {
        // The groups of 16 tiles that a task has: some, so that there are tasks enough.
        let groups = tiles.len().div_ceil(LANES);
        let some = groups.div_ceil((4 * rayon::current_num_threads()).div_ceil(self.panels()));
        let tasks = (0..self.panels()).flat_map(|panel| (0..groups).step_by(some).map(move |group| (panel, group)));
        let tasks = tasks.collect::<Vec<_>>();
        share(tasks.len(), |task| {
            let (panel, group) = tasks[task];
            with_scratch([Panels::size(LANES, LANES, LANES)], |[memory]| {
                let memory = Shared::new(memory);
                for group in group..groups.min(group + some) {
                    let first = tiles.start + group * LANES;
                    let part = first..tiles.end.min(first + LANES);
                    for start in self.channels(panel).step_by(LANES) {
                        let channels = start..self.channels(panel).end.min(start + LANES);
                        let panels = Panels { values: memory, first: start, channels: LANES, width: LANES };
                        transform(self.source, grid, part.clone(), channels, panels);
                        let at = group * LANES * self.width + start % self.width;
                        for point in 0..POINTS {
                            // SAFETY: this task's scratch; nobody writes to it now.
                            let block = unsafe { memory.read(panels.matrix(0, point), LANES * LANES) };
                            let lanes = LANES.min(self.width);
                            transpose(block, target, self.panel(point, panel) + at, self.width, lanes);
                        }
                    }
                }
            });
        });
    }
}

/// The factors of some tiles.
#[derive(Clone, Copy)]
struct Products<'a> {
    seen: Side<'a>,
    left: Shared<'a>,
    given: Side<'a>,
    right: Shared<'a>,
    depth: usize,
}

impl Products<'_> {
    /// Adds to `sums [36, given panels, seen panels, ROWS, WIDTH]`, or begins them.
    fn add_all(self, sums: Shared<'_>, begin: bool) {
        let (across, down) = (self.seen.panels(), self.given.panels());
        share(POINTS * across, |i| {
            let (point, lanes) = (i / across, i % across);
            for start in (0..self.depth).step_by(DEPTH) {
                for rows in 0..down {
                    let at = ((point * down + rows) * across + lanes) * PRODUCT;
                    self.add(sums, at, point, [rows, lanes], start, begin && start == 0);
                }
            }
        });
    }

    /// For all tiles at once: each task sums up and transforms a few panels.
    fn finish_all(self, target: Shared<'_>) {
        let (across, down) = (self.seen.panels(), self.given.panels());
        let few = (across * down / (4 * rayon::current_num_threads())).clamp(1, 4);
        let groups = down.div_ceil(few);
        share(groups * across, |i| {
            let (lanes, first) = (i / groups, i % groups * few);
            let rows = first..down.min(first + few);
            let pitch = rows.len() * PRODUCT;
            with_scratch([POINTS * pitch], |[memory]| {
                let sums = Shared::new(memory);
                for point in 0..POINTS {
                    for start in (0..self.depth).step_by(DEPTH) {
                        for (at, row) in rows.clone().enumerate() {
                            self.add(sums, point * pitch + at * PRODUCT, point, [row, lanes], start, start == 0);
                        }
                    }
                }
                for (at, row) in rows.enumerate() {
                    finish_panel(self.seen, self.given, [row, lanes], (sums, at * PRODUCT, pitch), target);
                }
            });
        });
    }

    /// Adds the product of two panels for up to [`DEPTH`] tiles.
    fn add(self, sums: Shared<'_>, at: usize, point: usize, [rows, lanes]: [usize; 2], tile: usize, begin: bool) {
        let depth = DEPTH.min(self.depth - tile);
        let start = if begin { Start::Zero } else { Start::Sum };
        let place = Place { values: sums, start: at, stride: WIDTH };
        let size = [self.given.channels(rows).len(), self.seen.channels(lanes).len().next_multiple_of(LANES)];
        // SAFETY: the factors are only read now; this part of the sums is the task's own.
        unsafe {
            let left = self.left.read(self.seen.panel(point, lanes) + tile * WIDTH, depth * WIDTH);
            let right = self.right.read(self.given.panel(point, rows) + tile * ROWS, depth * ROWS);
            multiply(depth, (left, WIDTH), right, place, size, start);
        }
    }
}

/// Transforms all sums.
fn finish(seen: Side<'_>, given: Side<'_>, sums: Shared<'_>, target: Shared<'_>) {
    let (across, down) = (seen.panels(), given.panels());
    share(down * across, |i| {
        let pitch = down * across * PRODUCT;
        finish_panel(seen, given, [i / across, i % across], (sums, i * PRODUCT, pitch), target);
    });
}

/// Transforms the sums of two panels: those of the first point at `start`, the others at the distance `pitch`.
fn finish_panel(
    seen: Side<'_>,
    given: Side<'_>,
    [rows, lanes]: [usize; 2],
    (sums, start, pitch): (Shared<'_>, usize, usize),
    target: Shared<'_>,
) {
    let (rows, lanes) = (given.channels(rows), seen.channels(lanes));
    // SAFETY: all sums of these panels are written, and nobody writes to them now.
    let sums = unsafe { sums.read(start, (POINTS - 1) * pitch + PRODUCT) };
    let stride = 9 * seen.source.channels;
    let first = rows.start * stride + lanes.start * 9;
    kernels::gradients(sums, pitch, rows.len(), lanes.len(), target, first, stride);
}
