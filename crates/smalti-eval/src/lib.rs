//! Metrics. Each is computed on the host in `f64` from plain pixels, so that it does not depend on a device or on a model.
//!
//! | metric | recipe |
//! |---|---|
//! | [`mse`], [`l1`] | mean over all pixels and channels |
//! | [`psnr`] | `10 log10(range² / mse)` of one image; a set's PSNR is the mean over its images |
//! | [`Confusion`] | accuracy and mean intersection over union of label maps, over all pixels of a set |
//! | [`FidelitySum`] | these of pictures or label maps, as the images are |
//! | [`ssim`] | Wang et al. 2004: 11x11 Gaussian of 1.5, K1 0.01, K2 0.03, valid windows, mean over channels |

mod confusion;
mod fidelity;
mod pair;
mod pixels;
mod scores;
mod ssim;

pub use confusion::Confusion;
pub use fidelity::{Compared, Fidelity, FidelitySum};
pub use pair::Pair;
pub use pixels::{l1, mse, psnr};
pub use scores::Scores;
pub use ssim::{WINDOW, ssim};
