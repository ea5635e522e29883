//! The ends of the metrics: equal images, and images that are too small.

#![allow(clippy::unwrap_used)]

use smalti_eval::{Pair, psnr, ssim};

#[test]
fn equal_images_are_perfect_and_small_ones_an_error() {
    let image = vec![7.0; 3 * 12 * 12];
    let pair = Pair::new(&image, &image, [3, 12, 12]).unwrap();
    assert_eq!(psnr(pair, 255.0), f64::INFINITY);
    assert!((ssim(pair, 255.0).unwrap() - 1.0).abs() < 1e-6);
    assert!(Pair::new(&image, &image, [3, 12, 11]).is_err());
    let small = Pair::new(&image[..300], &image[..300], [3, 10, 10]).unwrap();
    assert!(ssim(small, 255.0).unwrap_err().to_string().contains("smaller than the window"));
}
