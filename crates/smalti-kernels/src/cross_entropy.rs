//! Softmax and cross-entropy in one operation.

use burn::tensor::{Int, Tensor, activation};

/// Weighted mean over rows of the cross-entropy between `softmax(logits)` and the smoothed target distribution
/// `(1 - label_smoothing) * one_hot(target) + label_smoothing / classes`.
///
/// `sum(weight * loss) / sum(weight)`; without weights the plain mean. The weights are constants: no gradient flows to
/// them. Weights that sum to zero give NaN.
///
/// # Shapes
/// `logits [n, classes]`, `targets [n]` in `0..classes`, `weights [n]` → `[1]`.
///
/// # Panics
/// Where Burn's operations do: shapes that do not fit, targets out of range.
pub fn softmax_cross_entropy(
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    weights: Option<Tensor<1>>,
    label_smoothing: f32,
) -> Tensor<1> {
    portable(logits, targets, weights, label_smoothing)
}

/// [`softmax_cross_entropy`] as a composition of tensor operations.
pub fn portable(
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    weights: Option<Tensor<1>>,
    label_smoothing: f32,
) -> Tensor<1> {
    let log_probabilities = activation::log_softmax(logits, 1);
    let hit = log_probabilities.clone().gather(1, targets.unsqueeze_dim(1)).squeeze_dim::<1>(1);
    let loss = if label_smoothing == 0.0 {
        -hit
    } else {
        let all = log_probabilities.mean_dim(1).squeeze_dim::<1>(1);
        -(hit * (1.0 - label_smoothing) + all * label_smoothing)
    };
    match weights {
        Some(weights) => {
            let weights = weights.detach();
            (loss * weights.clone()).sum() / weights.sum()
        }
        None => loss.mean(),
    }
}
