//! The metrics against values computed from their definitions in 64-bit floating point.

#![allow(clippy::unwrap_used)]

use safetensors::{SafeTensors, tensor::TensorView};
use smalti_eval::{Pair, Scores, psnr, ssim};
use std::path::Path;

const SHAPE: [usize; 3] = [3, 24, 32];

fn ints(view: &TensorView<'_>) -> Vec<f32> {
    view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f32).collect()
}

fn floats(view: &TensorView<'_>) -> Vec<f64> {
    view.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
}

fn near(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-6 + 1e-5 * expected.abs(), "found {found}, expected {expected}");
}

#[test]
fn psnr_and_ssim_equal_their_definitions() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/fid/psnr-ssim/io.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |name| file.tensor(name).unwrap();
    let (images, recons) = (ints(&tensor("image_u8")), ints(&tensor("recon_u8")));
    let (mse, psnrs, ssims) = (floats(&tensor("mse")), floats(&tensor("psnr")), floats(&tensor("ssim_gaussian")));
    let size = SHAPE.iter().product();
    for (i, (image, recon)) in images.chunks_exact(size).zip(recons.chunks_exact(size)).enumerate() {
        let scores = Scores::of(Pair::new(image, recon, SHAPE).unwrap(), 255.0);
        near(scores.mse, mse[i]);
        near(scores.psnr, psnrs[i]);
        near(scores.ssim.unwrap(), ssims[i]);
        let unit = |pixels: &[f32]| pixels.iter().map(|v| v / 255.0).collect::<Vec<_>>();
        let (image, recon) = (unit(image), unit(recon));
        let pair = Pair::new(&image, &recon, SHAPE).unwrap();
        near(psnr(pair, 1.0), psnrs[i]);
        near(ssim(pair, 1.0).unwrap(), ssims[i]);
    }
}

#[test]
fn equal_images_are_perfect_and_small_ones_an_error() {
    let image = vec![7.0; 3 * 12 * 12];
    let pair = Pair::new(&image, &image, [3, 12, 12]).unwrap();
    assert_eq!(psnr(pair, 255.0), f64::INFINITY);
    near(ssim(pair, 255.0).unwrap(), 1.0);
    assert!(Pair::new(&image, &image, [3, 12, 11]).is_err());
    let small = Pair::new(&image[..300], &image[..300], [3, 10, 10]).unwrap();
    assert!(ssim(small, 255.0).unwrap_err().to_string().contains("smaller than the window"));
}
