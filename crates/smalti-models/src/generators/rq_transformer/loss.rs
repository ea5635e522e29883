//! What training makes small.

use super::{Pass, RqTransformer};
use crate::Codes;
use crate::generators::{Condition, GeneratorLoss, Predictions, codes_of};
use burn::tensor::{Int, Tensor};
use smalti_base::{Result, rng::Stream};

impl RqTransformer {
    /// The mean cross-entropy of all codes, and of a caption's tokens. Conditions are hidden where there is a stream.
    pub(super) fn training_loss(
        &self,
        codes: Codes,
        given: &[Condition],
        stream: &mut Stream,
    ) -> Result<GeneratorLoss> {
        let shares = match &codes {
            Codes::Soft { probabilities_blv, .. } => Some(probabilities_blv.clone()),
            _ => None,
        };
        let codes = codes_of(codes, given, &self.config.tokens)?;
        let dropout = Some((self.config.condition_dropout, stream));
        let ids = self.config.condition_ids(given, dropout, &codes.device())?;
        let pass = self.pass(ids.clone(), codes.clone());
        let hard = self.hard(&pass, codes);
        let mut image = match shares {
            None => hard.loss(),
            Some(shares) => GeneratorLoss {
                loss: self.soft_loss(&pass, shares),
                nats_per_token: Predictions { logits: hard.logits.detach(), ..hard }.loss().nats_per_token,
            },
        };
        if let Some(text) = self.text_loss(&pass, ids) {
            let share = self.config.text_share;
            image.loss = image.loss.mul_scalar(1.0 - share) + text.mul_scalar(share);
        }
        Ok(image)
    }

    fn hard(&self, pass: &Pass, codes: Tensor<2, Int>) -> Predictions {
        let logits = self.logits(pass.head_out.clone()).flatten(0, 1);
        Predictions { logits, targets: codes.flatten(0, 1), weights: None }
    }

    /// Mean cross-entropy with distributions over codes `[b, length, codes]` as targets.
    pub fn soft_loss(&self, pass: &Pass, shares_blv: Tensor<3>) -> Tensor<1> {
        let logits = self.all_logits(pass.head_out.clone());
        let [n, depth, codes] = logits.dims();
        let shown = match self.missing(&logits.device()) {
            Some(missing) => logits.clone().mask_fill(missing.expand(logits.dims()), f32::NEG_INFINITY),
            None => logits.clone(),
        };
        // Targets are 0 where logits are minus infinity; 0 times that would not be 0.
        soft_cross_entropy(shown.flatten(0, 1), logits.flatten(0, 1), shares_blv.reshape([n * depth, codes])).mean()
    }

    /// Mean cross-entropy of the codes of each depth.
    ///
    /// # Shapes
    /// `codes [b, length]` to `[depth]`.
    pub fn depth_losses(&self, pass: &Pass, codes: Tensor<2, Int>) -> Tensor<1> {
        let logits = self.logits(pass.head_out.clone());
        let [n, depth, _] = logits.dims();
        let codes = codes.reshape([n, depth]);
        let losses = (0..depth).map(|at| {
            let logits = logits.clone().narrow(1, at, 1).squeeze_dim::<2>(1);
            let codes = codes.clone().narrow(1, at, 1).squeeze_dim::<1>(1);
            smalti_kernels::softmax_cross_entropy(logits, codes, None, 0.0)
        });
        Tensor::cat(losses.collect(), 0)
    }

    pub(super) fn given_predictions(&self, codes: Codes, given: &[Condition]) -> Result<Predictions> {
        let codes = codes_of(codes, given, &self.config.tokens)?;
        let ids = self.config.condition_ids(given, None, &codes.device())?;
        Ok(self.hard(&self.pass(ids, codes.clone()), codes))
    }

    /// Mean cross-entropy of a caption's tokens but the first; hidden ones do not count. None if there is no caption.
    pub fn text_loss(&self, pass: &Pass, condition_ids: Tensor<2, Int>) -> Option<Tensor<1>> {
        let logits = self.text_logits(pass.body_out.clone())?;
        let ([_, n, vocabulary], caption) = (logits.dims(), self.config.caption()?);
        let targets: Tensor<1, Int> = condition_ids.narrow(1, caption.place + 1, n).flatten(0, 1);
        let targets = targets.sub_scalar(caption.id as i64);
        let shown = targets.clone().lower_elem(vocabulary as i64).float().inner();
        let weights = shown.clone() / shown.sum().clamp_min(1.0);
        let targets = targets.clamp_max(vocabulary as i64 - 1);
        // Weights that add up to nothing would make NaN of a batch without captions.
        let some = weights.clone().sum();
        let weights = weights + some.clone().neg().add_scalar(1.0).div_scalar(1e9);
        Some(smalti_kernels::softmax_cross_entropy(logits.flatten(0, 1), targets, Some(weights), 0.0) * some)
    }
}

/// `-sum_k q_k (x_k - max x - log(sum exp(x - max x) + 1e-7))` of each row, as the official code has it, where `x` are logits and `q`
/// shares; `plain` are the logits before any became minus infinity.
///
/// # Shapes
/// `[n, codes]` each to `[n]`.
pub fn soft_cross_entropy(logits: Tensor<2>, plain: Tensor<2>, shares: Tensor<2>) -> Tensor<1> {
    let most = logits.clone().max_dim(1);
    let total = (logits - most.clone()).exp().sum_dim(1).add_scalar(1e-7).log() + most;
    (shares * (total.expand(plain.dims()) - plain)).sum_dim(1).squeeze_dim(1)
}
