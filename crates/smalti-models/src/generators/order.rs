//! Orders in which the tokens of a grid are predicted: VQGAN's permuters (arXiv 2012.09841, appendix).

use serde::{Deserialize, Serialize};
use smalti_base::{Error, Layout, Result};

/// An order of the tokens of a grid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenOrder {
    /// Row by row.
    #[default]
    Raster,
    /// Row by row, every second row from right to left.
    Alternate,
    /// Along the curve that interleaves the bits of row and column.
    ZCurve,
    /// From coarse to fine: the corners of large blocks before those of small ones. For squares of a power of two.
    Subsample,
    /// From the middle outwards. For squares of even size.
    SpiralOut,
    /// From the rim inwards. For squares of even size.
    SpiralIn,
    /// Shuffled, as the official code does it: numpy's Mersenne Twister with seed 1.
    Random,
}

impl TokenOrder {
    /// The places of a layout in this order: the i-th predicted token is at place `[i]` of the row-by-row grid.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another order than row by row of tokens that are not a grid, or of a size that it cannot cover.
    pub fn places(self, layout: &Layout) -> Result<Vec<usize>> {
        let (h, w) = match (self, layout) {
            (Self::Raster, layout) => return Ok((0..layout.length()).collect()),
            (_, Layout::Grid { h, w }) => (*h, *w),
            _ => return Err(self.unsuited(layout, "a grid")),
        };
        match self {
            Self::Subsample if h != w || !h.is_power_of_two() => {
                return Err(self.unsuited(layout, "a square grid whose size is a power of two"));
            }
            Self::SpiralOut | Self::SpiralIn if h != w || h % 2 != 0 => {
                return Err(self.unsuited(layout, "a square grid of even size"));
            }
            _ => {}
        }
        let mut places: Vec<usize> = (0..h * w).collect();
        match self {
            Self::Raster => {}
            Self::Alternate => places.chunks_mut(w.max(1)).skip(1).step_by(2).for_each(<[usize]>::reverse),
            Self::ZCurve => places.sort_by_key(|place| spread(place % w) | spread(place / w) << 1),
            Self::Subsample => places.sort_by_key(|place| coarse_first(place / w, place % w, h.trailing_zeros())),
            Self::SpiralOut => places = spiral(h),
            Self::SpiralIn => places = spiral(h).into_iter().rev().collect(),
            Self::Random => shuffle(&mut places),
        }
        Ok(places)
    }

    fn unsuited(self, layout: &Layout, expected: &str) -> Error {
        let name = serde_json::to_value(self).ok().and_then(|name| name.as_str().map(str::to_string));
        let what = format!("the token order `{}` of a {layout}", name.unwrap_or_default());
        Error::unsupported(what, format!("it is for {expected}; use `raster`"))
    }
}

/// The bits of a number with gaps of one bit between them.
fn spread(number: usize) -> u128 {
    (0..usize::BITS).map(|bit| ((number >> bit & 1) as u128) << (2 * bit)).sum()
}

/// Row and column bit by bit, the lowest bits first in rank.
fn coarse_first(row: usize, column: usize, bits: u32) -> u128 {
    (0..bits).fold(0, |rank, bit| rank << 2 | ((row >> bit & 1) << 1 | column >> bit & 1) as u128)
}

/// From the place left below the middle: up, right, down, left, ever farther, until the square is covered.
fn spiral(size: usize) -> Vec<usize> {
    let mut places = Vec::with_capacity(size * size);
    let (mut row, mut column) = ((size / 2) as isize, (size / 2) as isize - 1);
    let mut legs = [(-1, 0), (0, 1), (1, 0), (0, -1)].into_iter().cycle();
    let mut turns = 0;
    while places.len() < size * size {
        let (down, across) = legs.next().unwrap_or_default();
        for _ in 0..1 + turns / 2 {
            if places.len() < size * size {
                places.push(row as usize * size + column as usize);
            }
            (row, column) = (row + down, column + across);
        }
        turns += 1;
    }
    places
}

/// `numpy.random.RandomState(1).permutation`: each place from the last on changes with one not after it, drawn by masking and
/// trying again.
fn shuffle(places: &mut [usize]) {
    let mut twister = rand_mt::Mt::new(1);
    for last in (1..places.len()).rev() {
        let mask = (last + 1).next_power_of_two() as u32 - 1;
        let drawn = std::iter::repeat_with(|| (twister.next_u32() & mask) as usize).find(|drawn| *drawn <= last);
        places.swap(last, drawn.unwrap_or(last));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [TokenOrder; 7] = [
        TokenOrder::Raster,
        TokenOrder::Alternate,
        TokenOrder::ZCurve,
        TokenOrder::Subsample,
        TokenOrder::SpiralOut,
        TokenOrder::SpiralIn,
        TokenOrder::Random,
    ];

    #[test]
    fn every_order_is_one_of_all_places() {
        for order in ALL {
            for (h, w) in [(16, 16), (2, 2), (5, 3), (6, 6), (1, 1)] {
                if let Ok(mut places) = order.places(&Layout::Grid { h, w }) {
                    places.sort_unstable();
                    assert_eq!(places, (0..h * w).collect::<Vec<_>>(), "{order:?} {h}x{w}");
                }
            }
        }
    }

    #[test]
    fn orders_that_do_not_suit_are_refused() {
        let refused = |order: TokenOrder, layout| order.places(&layout).unwrap_err().to_string();
        assert!(refused(TokenOrder::SpiralOut, Layout::Grid { h: 3, w: 3 }).contains("even size"));
        assert!(refused(TokenOrder::Subsample, Layout::Grid { h: 6, w: 6 }).contains("power of two"));
        assert!(refused(TokenOrder::ZCurve, Layout::Sequence { n: 4 }).contains("`z_curve` of a sequence of 4"));
    }
}
