//! LPIPS against its package.

use super::case::{Case, gradient};
use super::comparison::Comparison;
use smalti_base::Result;
use smalti_models::losses::Perceptual;

pub(super) fn knows(case: &Case) -> bool {
    case.has(&["image0", "image1", "distance", "feat0", "layer0"])
}

pub(super) fn distances(case: &Case, compare: &mut Comparison) -> Result<()> {
    case.only("net", "vgg")?;
    // Widths are those of the weights; the dropout is off.
    case.ignore(&["channels", "channel_divisor", "use_dropout"]);
    let weights = case.weights("")?;
    let lpips = Perceptual::lpips(&weights, &weights, case.device())?;
    let (left, right) = (case.tensor::<4>("image0")?, case.tensor::<4>("image1")?);
    for (level, feature) in lpips.features(left.clone()).into_iter().enumerate() {
        compare.floats(&format!("feat{level}"), feature)?;
    }
    for (level, term) in lpips.layers(left.clone(), right.clone()).into_iter().enumerate() {
        compare.floats(&format!("layer{level}"), term)?;
    }
    let leaf = right.autodiff().require_grad();
    let distance = lpips.distance(left, leaf.clone());
    compare.floats("distance", distance.clone().inner())?;
    compare.floats("grad_image1", gradient("image1", leaf.grad(&distance.sum().backward()))?)
}
