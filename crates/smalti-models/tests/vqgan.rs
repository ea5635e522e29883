//! VQGAN, its critic and its losses against the official implementation.
#![allow(clippy::unwrap_used)]

mod cases;

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use cases::{Tensors, agree, below, open, tensor};
use smalti_base::{Layout, TokenSpec};
use smalti_models::checkpoint::weights::load_from;
use smalti_models::losses::{AdversarialConfig, AdversarialKind, Critic, CriticConfig, Perceptual};
use smalti_models::losses::{TokenizerLoss, TokenizerLossConfig};
use smalti_models::quantizers::Quantizer;
use smalti_models::tokenizers::{Tokenizer, TokenizerConfig, TokenizerModel};
use smalti_nn::{AttnBlock, Downsample, PatchGan, PatchGanConfig, ResnetBlockConfig, Shortcut, Upsample};

fn load<M: Module>(module: M, weights: &Tensors, prefix: &str) -> M {
    load_from(module, &below(weights, prefix), &|_| false).unwrap().0
}

#[test]
fn blocks() {
    let Some((io, weights)) = open("vqgan/blocks") else { return };
    let device = Device::flex();
    let x = |name: &str| tensor::<4>(&io, name, &device);
    let resnet = |inputs, shortcut, prefix: &str| {
        let config = ResnetBlockConfig { shortcut, ..ResnetBlockConfig::new(inputs, 64) };
        load(config.init(&device), &weights, prefix)
    };
    agree(resnet(32, Shortcut::Pointwise, "res_nin.").forward(x("x32")), &io, "res_nin");
    agree(resnet(64, Shortcut::Pointwise, "res_same.").forward(x("x64")), &io, "res_same");
    agree(resnet(32, Shortcut::Full, "res_convshort.").forward(x("x32")), &io, "res_convshort");
    agree(load(AttnBlock::new(64, 32, 1e-6, &device), &weights, "attn.").forward(x("x64")), &io, "attn");
    agree(load(Downsample::new(64, true, &device), &weights, "down.").forward(x("x64")), &io, "down");
    agree(Downsample::new(64, false, &device).forward(x("x64")), &io, "down_avgpool");
    agree(load(Upsample::new(32, true, &device), &weights, "up.").forward(x("x32")), &io, "up");
}

const TINY: &str = r#"{ "kind": "vqgan", "image_size": 32, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
    "attn_resolutions": [16], "z_channels": 16, "embed_dim": 8, "quantizer": QUANTIZER }"#;

/// The released models put 0.25 on the codebook term.
const QUANTIZER: &str =
    r#"{ "kind": "vq", "codes": 64, "channels": 8, "codebook": { "kind": "gradient", "legacy": true } }"#;

fn tiny(weights: &Tensors, device: &Device) -> TokenizerModel {
    let config: TokenizerConfig = serde_json::from_str(&TINY.replace("QUANTIZER", QUANTIZER)).unwrap();
    let weights: Tensors = below(weights, "").into_iter().filter(|(name, _)| !name.starts_with("loss.")).collect();
    load_from(config.init(device).unwrap(), &weights, &|_| false).unwrap().0
}

fn critic(weights: &Tensors, device: &Device) -> PatchGan {
    let config = PatchGanConfig { in_channels: 3, ndf: 8, layers: 2 };
    let names = [
        ("main.0.", "conv_in."),
        ("main.2.", "stages.0.conv."),
        ("main.3.", "stages.0.norm."),
        ("main.5.", "stages.1.conv."),
        ("main.6.", "stages.1.norm."),
        ("main.8.", "conv_out."),
    ];
    let official = below(weights, "loss.discriminator.");
    let mut renamed = Tensors::new();
    for (name, stored) in official {
        let (from, to) = names.iter().find(|(from, _)| name.starts_with(from)).unwrap();
        renamed.insert(name.replace(from, to), stored);
    }
    let renamed = below(&renamed, "");
    load_from(config.init(device).unwrap(), &renamed, &|_| false).unwrap().0
}

fn loss(weights: &Tensors, adaptive: bool) -> TokenizerLoss {
    let device = Device::flex();
    let config = TokenizerLossConfig {
        l1: 1.0,
        l2: 0.0,
        perceptual: None,
        perceptual_weight: 1.0,
        adversarial: Some(AdversarialConfig {
            kind: AdversarialKind::Hinge,
            weight: 0.8,
            start_step: 10,
            adaptive,
            critic: CriticConfig::default(),
            ndf: 8,
            layers: 2,
        }),
        codebook_weight: 1.0,
        ..Default::default()
    };
    let spec = TokenSpec::discrete(Layout::Grid { h: 16, w: 16 }, 64, (32, 32));
    let perceptual = Perceptual::lpips(weights, weights, &device).unwrap();
    config.init(&spec, &device).unwrap().with_perceptual(Some(perceptual))
}

#[test]
fn encoding_and_decoding() {
    let Some((io, weights)) = open("vqgan/vqmodel-tiny") else { return };
    let device = Device::flex();
    let model = tiny(&weights, &device);
    let image = tensor::<4>(&io, "image", &device);
    let TokenizerModel::Vqgan(vqgan) = &model else { panic!("a vqgan") };
    agree(vqgan.encoder.forward(image.clone()), &io, "h_enc");
    agree(model.latents(image.clone()), &io, "z");
    let codes = model.encode(image.clone());
    let ids = codes.clone().discrete().unwrap().into_data().convert::<i64>().try_into_vec::<i64>().unwrap();
    assert_eq!(ids, io["indices"].ints().unwrap());
    agree(model.quantizer().unwrap().decode(codes.clone().discrete().unwrap(), 16, 16), &io, "z_q");
    agree(model.decode(&codes), &io, "rec");
    agree(critic(&weights, &device).forward(image.clone()), &io, "disc_eval_logits");
    let perceptual = Perceptual::lpips(&weights, &weights, &device).unwrap();
    agree(perceptual.distance(image, tensor(&io, "rec", &device)), &io, "p_loss");
}

fn term(terms: &[(&'static str, Tensor<1>)], name: &str) -> Tensor<1> {
    terms.iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("{name} is a term")).1.clone()
}

#[test]
fn a_training_step() {
    let Some((io, weights)) = open("vqgan/vqmodel-tiny") else { return };
    let device = Device::flex().autodiff();
    let (model, critic) = (tiny(&weights, &device), critic(&weights, &device));
    let image = tensor::<4>(&io, "image", &Device::flex());
    let loss = loss(&weights, true);

    let judge = Critic::from(critic.clone());
    let before = loss.step(&model, Some(&judge), image.clone(), 0);
    agree(term(&before.terms, "loss"), &io, "ae_loss_step0");
    assert!(before.critic_gradients.is_none());

    let step = loss.step(&model, Some(&judge), image.clone(), 100);
    agree(term(&step.terms, "codebook"), &io, "emb_loss");
    agree(term(&step.terms, "generator"), &io, "g_loss");
    agree(term(&step.terms, "adversarial_weight"), &io, "d_weight");
    agree(term(&step.terms, "loss"), &io, "ae_loss_step100");
    agree(term(&step.terms, "critic"), &io, "disc_loss_step100");
    agree(step.reconstruction.clone(), &io, "rec");
    agree(critic.forward(image.clone().autodiff()).inner(), &io, "logits_real");
    agree(critic.forward(step.reconstruction.autodiff()).inner(), &io, "logits_fake");
    let TokenizerModel::Vqgan(vqgan) = &model else { panic!("a vqgan") };
    let convolutions = [
        ("encoder.conv_in", &vqgan.encoder.conv_in),
        ("decoder.conv_out", &vqgan.decoder.conv_out),
        ("quant_conv", &vqgan.quant_conv),
    ];
    for (name, conv) in convolutions {
        agree(gradient(&step.gradients, &conv.weight), &io, &format!("grad.{name}.weight"));
    }
    let critic_gradients = step.critic_gradients.unwrap();
    agree(gradient(&critic_gradients, &critic.conv_in.weight), &io, "grad.loss.discriminator.main.0.weight");
}

fn gradient<const D: usize>(gradients: &GradientsParams, param: &burn::module::Param<Tensor<D>>) -> Tensor<D> {
    gradients.get(param.id).unwrap()
}

#[test]
fn numbers_that_do_not_fit_are_errors() {
    for (from, to, part) in [
        ("\"image_size\": 32", "\"image_size\": 33", "not a multiple of 2"),
        ("\"ch_mult\": [1, 1]", "\"ch_mult\": []", "ch_mult needs"),
        ("\"attn_resolutions\": [16]", "\"attn_resolutions\": [8]", "attn_resolutions has 8"),
        ("\"ch\": 32", "\"ch\": 40", "does not divide 40 channels"),
        ("\"embed_dim\": 8", "\"embed_dim\": 9", "quantizer has 8 channels"),
        ("\"z_channels\": 16", "\"z_channels\": 0", "z_channels must be at least 1"),
    ] {
        let text = TINY.replace("QUANTIZER", QUANTIZER).replace(from, to);
        let config: TokenizerConfig = serde_json::from_str(&text).unwrap();
        let error = config.init(&Device::flex()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let misspelt = TINY.replace("QUANTIZER", QUANTIZER).replace("num_res_blocks", "num_resblocks");
    assert!(serde_json::from_str::<TokenizerConfig>(&misspelt).unwrap_err().to_string().contains("num_resblocks"));
}
