//! Gradients are compared whatever the parameter: each official name finds its way through the rules of import.
#![allow(clippy::unwrap_used)]

mod made;

use made::Made;
use smalti_models::checkpoint::{Stored, Values};
use smalti_parity::Status;

/// Names of parameters, all of whose gradients are compared, and outside tolerance if they are nonsense.
fn all_are_compared(case: &str, is_parameter: impl Fn(&str) -> bool) {
    let mut made = Made::from(case);
    let official: Vec<String> = made.io.keys().filter(|name| name.starts_with("grad.")).cloned().collect();
    let names: Vec<String> = made.weights.keys().filter(|name| is_parameter(name)).cloned().collect();
    assert!(!names.is_empty());
    for name in &names {
        let stored = &made.weights[name];
        let nonsense = Values::Floats(vec![1e6; stored.floats().unwrap().len()]);
        let gradient = Stored { shape: stored.shape.clone(), values: nonsense };
        made.io.entry(format!("grad.{name}")).or_insert(gradient);
    }
    let report = made.run();
    assert_eq!((report.status, report.error), (Status::Failed, None), "{case}");
    for name in names.iter().map(|name| format!("grad.{name}")) {
        let row = report.rows.iter().find(|row| row.tensor == name);
        let row = row.unwrap_or_else(|| panic!("{case}: {name} was not compared"));
        assert_eq!(row.within, official.contains(&name), "{case}: {name}");
    }
}

#[test]
fn every_parameter_of_every_system() {
    all_are_compared("vqgan/net2net-class", |name| name.starts_with("transformer.") && !name.ends_with("attn.mask"));
    all_are_compared("vqgan/vqmodel-tiny", |name| {
        !name.contains("perceptual") && !name.contains("num_batches") && !name.contains("running")
    });
    all_are_compared("autoencoder-kl/ldm_kl_f4", |name| {
        !name.contains("num_batches") && !name.contains("running") && name != "loss.logvar"
    });
    all_are_compared("maskgit/transformer", |_| true);
    all_are_compared("mar/ar-causal", |_| true);
    all_are_compared("mar/tiny", |name| name != "fake_latent");
    all_are_compared("var/transformer-l2norm", |name| {
        !["lvl_1L", "attn_bias_for_masking"].contains(&name) && !name.ends_with("zero_k_bias")
    });
    all_are_compared("var/vqvae-4scale", |name| !name.ends_with("ema_vocab_hit_SV"));
    all_are_compared("vit-vqgan/vitvq-tiny", |name| !name.starts_with("loss.") && !name.ends_with("_pos_embedding"));
}
