//! Softmax and cross-entropy in one operation.

use crate::cpu::cross_entropy::{Rows, backward, forward};
use crate::flex::{Values, changed, dims, integers, serves, tensor};
use burn::backend::autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Int, Tensor, activation};
use std::sync::Arc;

/// Weighted mean over rows of the cross-entropy between `softmax(logits)` and the smoothed target distribution
/// `(1 - label_smoothing) * one_hot(target) + label_smoothing / classes`.
///
/// `sum(weight * loss) / sum(weight)`; without weights the plain mean. The weights are constants: no gradient flows to
/// them, and rows of weight 0 do not count. Weights that sum to zero give NaN, and so may targets out of range.
///
/// # Shapes
/// `logits [n, classes]`, `targets [n]` in `0..classes`, `weights [n]` → `[1]`.
///
/// # Panics
/// Where Burn's operations do: shapes that do not fit; on some backends, targets out of range.
pub fn softmax_cross_entropy(
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    weights: Option<Tensor<1>>,
    label_smoothing: f32,
) -> Tensor<1> {
    let [n, classes] = logits.dims();
    let fits = classes > 0 && targets.dims() == [n] && weights.as_ref().is_none_or(|weights| weights.dims() == [n]);
    if !(fits && serves(&logits) && weights.as_ref().is_none_or(serves)) {
        return portable(logits, targets, weights, label_smoothing);
    }
    let weights = weights.map_or_else(|| Tensor::ones([n], &logits.device().inner()), Tensor::inner);
    let (logits, targets, weights) = (logits.into_dispatch(), targets.into_dispatch(), weights.into_dispatch());
    Tensor::from_dispatch(<Dispatch as CrossEntropy>::smalti_cross_entropy(logits, targets, weights, label_smoothing))
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

#[backend_extension(Autodiff, Flex)]
trait CrossEntropy: Backend {
    fn smalti_cross_entropy(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        weights: FloatTensor<Self>,
        smoothing: f32,
    ) -> FloatTensor<Self>;
}

impl CrossEntropy for Flex {
    fn smalti_cross_entropy(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        weights: FloatTensor<Self>,
        smoothing: f32,
    ) -> FloatTensor<Self> {
        let [_, classes] = dims(&logits);
        tensor(vec![forward(&rows(classes, targets, weights, smoothing), &Values::of(logits)).0], [1])
    }
}

impl<C: CheckpointStrategy> CrossEntropy for Autodiff<Flex, C> {
    fn smalti_cross_entropy(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        weights: FloatTensor<Self>,
        smoothing: f32,
    ) -> FloatTensor<Self> {
        let weights = weights.into_primitive();
        match CrossEntropyStep.prepare::<C>([logits.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let [_, classes] = dims(logits.primitive());
                let rows = rows(classes, targets, weights, smoothing);
                let id = prep.checkpoint(&logits);
                let (loss, log_sums) = forward(&rows, &Values::of(logits.into_primitive()));
                prep.finish(Saved { id, rows: Arc::new(rows), log_sums: log_sums.into() }, tensor(vec![loss], [1]))
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(Flex::smalti_cross_entropy(logits.into_primitive(), targets, weights, smoothing))
            }
        }
    }
}

fn rows(classes: usize, targets: IntTensor<Flex>, weights: FloatTensor<Flex>, smoothing: f32) -> Rows {
    let weights = Values::of(weights);
    let total: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
    let weights = weights.iter().map(|&weight| (f64::from(weight) / total) as f32).collect();
    Rows { classes, targets: integers(targets), weights, smoothing }
}

#[derive(Debug)]
struct CrossEntropyStep;

/// What the backward step needs; the logits are kept by the graph.
#[derive(Debug, Clone)]
struct Saved {
    id: NodeId,
    rows: Arc<Rows>,
    log_sums: Arc<[f32]>,
}

impl Backward<Flex, 1> for CrossEntropyStep {
    type State = Saved;

    fn backward(self, ops: Ops<Saved, 1>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let upstream: f32 = Values::of(grads.consume::<Flex>(&ops.node)).iter().sum();
        let Saved { id, rows, log_sums } = ops.state;
        let logits = checkpointer.retrieve_node_output(id);
        if let [Some(node)] = ops.parents {
            // Often the largest tensor of a step, and nothing needs the logits after this.
            let gradient = changed(logits, |logits| backward(&rows, logits, &log_sums, upstream));
            grads.register::<Flex>(node.id, gradient);
        }
    }
}
