//! Layers that make no network of their own.

pub mod dense;
pub mod init;
pub mod positions;

mod conv;
mod norm;
mod resample;
mod resize;

pub use conv::Conv;
pub use norm::{BatchStatistics, Norm};
pub use resample::{Downsample, Upsample};
pub use resize::{Interpolation, Resize};
