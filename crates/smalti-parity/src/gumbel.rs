//! Gumbel-softmax quantizers: taming's, beside its other ones in one case, and that of ViT-VQGAN's public code.

use super::case::{Case, gradient};
use super::comparison::Comparison;
use burn::tensor::Tensor;
use smalti_base::{Error, Result};
use smalti_models::checkpoint::Rules;
use smalti_models::quantizers::gumbel::{Logits, Temperature};
use smalti_models::quantizers::{Gumbel, GumbelConfig, Pass, Quantizer};

/// A pass with the case's noise, its values and its gradients of the loss plus the sum of squares.
struct Outcome {
    latents_bchw: Tensor<4>,
    codes: Tensor<2, burn::tensor::Int>,
    loss: Tensor<1>,
    grad_z_bchw: Tensor<4>,
    grad_table_kc: Tensor<2>,
}

fn outcome(quantizer: &Gumbel, z_bchw: Tensor<4>, noise_bchw: Tensor<4>) -> Result<Outcome> {
    let z = z_bchw.autodiff().require_grad();
    let out = quantizer.train_forward(z.clone(), &Pass { noise_bchw: Some(noise_bchw), ..Pass::default() });
    let loss = out.loss().ok_or_else(|| Error::invalid("kl", "the quantizer has no loss"))?;
    let gradients = (loss.clone() + out.latents_bchw.clone().square().sum()).backward();
    Ok(Outcome {
        latents_bchw: out.latents_bchw,
        codes: out.codes,
        loss,
        grad_z_bchw: gradient("z", z.grad(&gradients))?,
        grad_table_kc: gradient("codes", quantizer.embed.weight.grad(&gradients))?,
    })
}

/// The tensors `gumbel.*` of taming's case.
pub(super) fn taming(case: &Case, compare: &mut Comparison) -> Result<()> {
    let z = case.tensor::<4>("gumbel.z")?;
    for (kind, straight_through) in [("hard", true), ("soft", false)] {
        let name = |part: &str| format!("gumbel.{kind}.{part}");
        let config = GumbelConfig {
            straight_through,
            kl_weight: case.setting("gumbel.kl_weight")?,
            temperature: Temperature::Constant { value: case.said(&name("z_q"), &format!("{kind}: tau "))? },
            ..GumbelConfig::new(case.setting("gumbel.n_embed")?, case.setting("gumbel.embedding_dim")?)
        };
        let quantizer = config.init_for(case.setting("gumbel.num_hiddens")?, &case.autodiff())?;
        let rules = Rules::builtin("vqgan", "quantizer")?;
        let quantizer = rules.import(quantizer, &case.weights("gumbel.")?)?.0;
        if straight_through {
            let [b, _, h, w] = z.dims();
            let logits = quantizer.logits(z.clone());
            compare.floats("gumbel.logits", logits.reshape([b, h, w, config.codes]).permute([0, 3, 1, 2]))?;
        }
        let out = outcome(&quantizer, z.clone(), case.tensor("gumbel.noise")?)?;
        compare.floats(&name("z_q"), out.latents_bchw)?;
        compare.floats(&name("kl"), out.loss)?;
        compare.ids(&name("indices"), out.codes)?;
        compare.floats(&name("grad_z"), out.grad_z_bchw)?;
        compare.floats(&name("grad_embed"), out.grad_table_kc)?;
    }
    Ok(())
}

pub(super) fn knows_distances(case: &Case) -> bool {
    case.has(&["z", "noise", "z_q", "kl", "codes", "grad_embedding"])
}

pub(super) fn distances(case: &Case, compare: &mut Comparison) -> Result<()> {
    let mode: String = case.setting("mode")?;
    let straight_through = match (mode.contains("soft"), mode.contains("hard")) {
        (true, false) => false,
        (false, true) => true,
        _ => return Err(Error::unknown(case.title(), "mode", mode, ["train (soft)", "eval (hard)"])),
    };
    case.only("use_norm", true)?;
    case.only("use_residual", false)?;
    let config = GumbelConfig {
        logits: Logits::Distance,
        straight_through,
        kl_weight: 1.0,
        temperature: Temperature::Constant { value: case.setting("temp")? },
        ..GumbelConfig::new(case.setting("n_embed")?, case.setting("embed_dim")?)
    };
    let rules = Rules::builtin("vqgan", "vit-quantizer")?;
    let quantizer = rules.import(config.init(&case.autodiff())?, &case.weights("")?)?.0;
    let map = |name: &str| Ok(case.tensor::<3>(name)?.swap_dims(1, 2).unsqueeze_dim::<4>(3));
    let out = outcome(&quantizer, map("z")?, map("noise")?)?;
    let tokens = |x_bcn1: Tensor<4>| x_bcn1.squeeze_dim::<3>(3).swap_dims(1, 2);
    compare.floats("z_q", tokens(out.latents_bchw))?;
    compare.floats("kl", out.loss)?;
    compare.ids("codes", out.codes)?;
    compare.floats("grad_z", tokens(out.grad_z_bchw))?;
    compare.floats("grad_embedding", out.grad_table_kc)
}
