//! The metrics of images in 0..1 against values from their definitions.
#![allow(clippy::unwrap_used)]

mod cases;

use cases::{close, open};
use smalti_eval::{Pair, psnr, ssim};

#[test]
fn psnr_and_ssim_do_not_depend_on_the_range() {
    let case = open("fid/psnr-ssim");
    let [_, c, h, w] = case.shape("image_u8").unwrap()[..] else { panic!("images") };
    let unit = |name| case.ints(name).unwrap().iter().map(|level| *level as f32 / 255.0).collect::<Vec<f32>>();
    let (images, recons) = (unit("image_u8"), unit("recon_u8"));
    let pairs = || images.chunks(c * h * w).zip(recons.chunks(c * h * w));
    let pairs = || pairs().map(|(image, recon)| Pair::new(image, recon, [c, h, w]).unwrap());
    let found: Vec<f32> = pairs().map(|pair| psnr(pair, 1.0) as f32).collect();
    close(&found, case.floats("psnr").unwrap(), 1e-6, 1e-5, "psnr");
    let found: Vec<f32> = pairs().map(|pair| ssim(pair, 1.0).unwrap() as f32).collect();
    close(&found, case.floats("ssim_gaussian").unwrap(), 1e-6, 1e-5, "ssim");
}
