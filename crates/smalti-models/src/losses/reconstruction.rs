//! Distances of a reconstruction from its image, pixel by pixel.

use burn::tensor::{Tensor, activation};

/// Mean of `|a - b|` over all values, a tensor of one element.
pub fn l1(a_bchw: Tensor<4>, b_bchw: Tensor<4>) -> Tensor<1> {
    (a_bchw - b_bchw).abs().mean()
}

/// Mean of `(a - b)^2` over all values, a tensor of one element.
pub fn l2(a_bchw: Tensor<4>, b_bchw: Tensor<4>) -> Tensor<1> {
    (a_bchw - b_bchw).square().mean()
}

/// Mean over all values of the cross-entropy of probabilities in 0..1, given as scores (logits), a tensor of one element:
/// `-p log s(x) - (1 - p) log(1 - s(x))` with the logistic function `s`. Stable for scores of any size.
pub fn binary_cross_entropy(scores_bchw: Tensor<4>, probabilities_bchw: Tensor<4>) -> Tensor<1> {
    let rest = (scores_bchw.clone().abs().neg()).exp().log1p();
    (activation::relu(scores_bchw.clone()) - scores_bchw * probabilities_bchw + rest).mean()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn binary_cross_entropy_follows_its_formula_and_does_not_overflow() {
        let scores = [-3.0f64, -0.2, 0.0, 1.5, 4.0, 0.7];
        let probabilities = [0.0f64, 1.0, 0.5, 1.0, 0.0, 0.25];
        let logistic = |x: f64| 1.0 / (1.0 + (-x).exp());
        let each = |(x, p): (&f64, &f64)| -p * logistic(*x).ln() - (1.0 - p) * (1.0 - logistic(*x)).ln();
        let expected = scores.iter().zip(&probabilities).map(each).sum::<f64>() / 6.0;
        let tensor = |values: [f64; 6]| Tensor::<1>::from_floats(values, &Device::flex()).reshape([1, 2, 1, 3]);
        let found = binary_cross_entropy(tensor(scores), tensor(probabilities)).into_scalar::<f32>();
        assert!((f64::from(found) - expected).abs() < 1e-6, "{found} instead of {expected}");
        let far = Tensor::<4>::full([1, 1, 1, 1], 200.0, &Device::flex());
        assert_eq!(binary_cross_entropy(far.clone(), far.zeros_like()).into_scalar::<f32>(), 200.0);
    }
}
