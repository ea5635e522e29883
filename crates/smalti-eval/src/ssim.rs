//! Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004, <https://doi.org/10.1109/TIP.2003.819861>), with the paper's
//! Gaussian window and population covariance, as `structural_similarity(gaussian_weights=True, sigma=1.5,
//! use_sample_covariance=False)` of scikit-image.

use crate::Pair;
use smalti_base::{Error, Result};

/// Side of the Gaussian window in pixels.
pub const WINDOW: usize = 11;
const SIGMA: f64 = 1.5;
const K1: f64 = 0.01;
const K2: f64 = 0.03;

/// The mean of the SSIM map over all places where the window lies inside the image, and over channels. `range` is the
/// distance between black and white (255 or 1).
///
/// # Errors
/// [`Error::Invalid`] if the image is smaller than the window.
pub fn ssim(pair: Pair<'_>, range: f64) -> Result<f64> {
    let Pair { channels, height, width, .. } = pair;
    if height < WINDOW || width < WINDOW {
        return Err(Error::invalid(
            "ssim",
            format!("an image of {height}x{width} pixels is smaller than the window of {WINDOW}x{WINDOW}"),
        ));
    }
    let plane = height * width;
    let sum: f64 = pair
        .left
        .chunks_exact(plane)
        .zip(pair.right.chunks_exact(plane))
        .map(|(left, right)| channel(left, right, width, range))
        .sum();
    Ok(sum / channels as f64)
}

fn channel(left: &[f32], right: &[f32], width: usize, range: f64) -> f64 {
    let window = gaussian();
    let smooth = |of: &dyn Fn(f64, f64) -> f64| {
        let values: Vec<f64> = left.iter().zip(right).map(|(l, r)| of(f64::from(*l), f64::from(*r))).collect();
        filter(&values, width, &window)
    };
    let mean_l = smooth(&|l, _| l);
    let mean_r = smooth(&|_, r| r);
    let square_l = smooth(&|l, _| l * l);
    let square_r = smooth(&|_, r| r * r);
    let product = smooth(&|l, r| l * r);
    let (c1, c2) = ((K1 * range).powi(2), (K2 * range).powi(2));
    let sum: f64 = (0..mean_l.len())
        .map(|i| {
            let (ml, mr) = (mean_l[i], mean_r[i]);
            let (var_l, var_r, cov) = (square_l[i] - ml * ml, square_r[i] - mr * mr, product[i] - ml * mr);
            (2.0 * ml * mr + c1) * (2.0 * cov + c2) / ((ml * ml + mr * mr + c1) * (var_l + var_r + c2))
        })
        .sum();
    sum / mean_l.len() as f64
}

fn gaussian() -> [f64; WINDOW] {
    let centre = (WINDOW / 2) as f64;
    let mut window: [f64; WINDOW] = std::array::from_fn(|i| (-((i as f64 - centre) / SIGMA).powi(2) / 2.0).exp());
    let sum: f64 = window.iter().sum();
    window.iter_mut().for_each(|w| *w /= sum);
    window
}

/// The window along rows, then along columns, only where it lies inside.
fn filter(values: &[f64], width: usize, window: &[f64; WINDOW]) -> Vec<f64> {
    let inside = width + 1 - WINDOW;
    let rows: Vec<f64> = values
        .chunks_exact(width)
        .flat_map(|row| row.windows(WINDOW).map(|part| part.iter().zip(window).map(|(v, w)| v * w).sum::<f64>()))
        .collect();
    let height = values.len() / width;
    let mut out = vec![0.0; (height + 1 - WINDOW) * inside];
    for (y, line) in out.chunks_exact_mut(inside).enumerate() {
        for (tap, weight) in window.iter().enumerate() {
            let from = (y + tap) * inside;
            line.iter_mut().zip(&rows[from..from + inside]).for_each(|(o, v)| *o += weight * v);
        }
    }
    out
}
