//! Official weights through the import rules and back by the export rules: the same names, shapes and bits.

#![allow(clippy::unwrap_used)]

use smalti_models::checkpoint::{Rules, Source, Stored, Values, WeightsFile};
use std::collections::BTreeMap;
use std::path::Path;

#[test]
fn import_and_export_are_inverse() {
    for (file, system, part, left_out) in [
        ("vqgan/vqmodel-tiny/weights", "vqgan", "tokenizer", "loss."),
        ("autoencoder-kl/ldm_kl_f4/weights", "autoencoder-kl", "tokenizer", "loss."),
        ("autoencoder-kl/mar_kl/weights", "autoencoder-kl", "tokenizer", "-"),
        ("var/vqvae-4scale/weights", "var", "tokenizer", "quantize.ema_vocab_hit_SV"),
        ("var/transformer-l2norm/vae_weights", "var", "tokenizer", "quantize.ema_vocab_hit_SV"),
        ("var/transformer-l2norm/weights", "var", "generator", "-"),
        ("var/transformer-shared-aln/weights", "var", "generator", "-"),
        ("vit-vqgan/vitvq-tiny/weights", "vit-vqgan", "tokenizer", "loss."),
        ("vqgan/net2net-class/weights", "vqgan", "generator", "first_stage_model."),
        ("mar/tiny/weights", "mar", "generator", "-"),
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../golden/{file}.safetensors"));
        let official = WeightsFile::open(&path).unwrap();
        let ours = Rules::builtin(system, part).unwrap().plan(&official).unwrap();
        let again = Rules::export(system, part).unwrap().plan(&ours).unwrap();
        // Buffers that the official code makes itself.
        let buffer = |name: &str| {
            ["lvl_1L", "attn_bias_for_masking", "zero_k_bias", "attn.mask", "_pos_embedding"]
                .iter()
                .any(|end| name.ends_with(end))
        };
        let expected: Vec<String> =
            official.shapes().into_keys().filter(|name| !name.starts_with(left_out) && !buffer(name)).collect();
        let found: Vec<String> = again.shapes().into_keys().collect();
        assert_eq!(found, expected, "{file}");
        for name in expected {
            assert_eq!(again.read(&name).unwrap(), official.read(&name).unwrap(), "{file}: {name}");
        }
    }
}

/// What quantizers of taming-transformers may hold beside the usual table.
#[test]
fn keys_of_other_quantizers_are_inverse_too() {
    let floats = |shape: &[usize]| {
        let count = shape.iter().product::<usize>();
        Stored { shape: shape.to_vec(), values: Values::Floats((0..count).map(|i| i as f32).collect()) }
    };
    let official = BTreeMap::from([
        ("encoder.norm_out.weight".to_string(), floats(&[4])),
        ("quantize.proj.weight".into(), floats(&[5, 3, 1, 1])),
        ("quantize.proj.bias".into(), floats(&[5])),
        ("quantize.embed.weight".into(), floats(&[5, 3])),
        ("quantize.used".into(), Stored { shape: vec![2], values: Values::Ints(vec![4, 1]) }),
    ]);
    let ours = Rules::builtin("vqgan", "tokenizer").unwrap().plan(&official).unwrap();
    let names: Vec<String> = ours.shapes().into_keys().collect();
    for name in ["encoder.norm_out.gamma", "quantize.proj.weight", "quantize.embed.weight", "quantize.remap.used"] {
        assert!(names.iter().any(|found| found == name), "{name} is not in {names:?}");
    }
    let again = Rules::export("vqgan", "tokenizer").unwrap().plan(&ours).unwrap();
    assert_eq!(again.shapes(), official.shapes());
    for (name, stored) in &official {
        assert_eq!(&again.read(name).unwrap(), stored, "{name}");
    }
}
