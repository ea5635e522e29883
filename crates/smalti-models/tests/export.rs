//! Official weights through the import rules and back by the export rules: the same names, shapes and bits.

#![allow(clippy::unwrap_used)]

use burn::module::ParamId;
use smalti_models::checkpoint::{Entry, Kind, Rules, Source, Stored, Values, WeightsFile};
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
        ("rq-vae/rqvae-shared-d4/weights", "rq-vae", "tokenizer", "-"),
        ("rq-vae/rqvae-separate-folded/weights", "rq-vae", "tokenizer", "-"),
        ("rq-vae/rqtransformer-class/rqvae_weights", "rq-vae", "tokenizer", "-"),
        ("rq-vae/rqtransformer-class/weights", "rq-vae", "generator", "-"),
        ("rq-vae/rqtransformer-text/weights", "rq-vae", "generator", "-"),
        ("rq-vae/rqtransformer-own-embedding/weights", "rq-vae", "generator", "-"),
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../golden/{file}.safetensors"));
        let official = WeightsFile::open(&path).unwrap();
        // Tables that depths share are there once in our model.
        let entry = Entry { shape: Vec::new(), kind: Kind::Float, id: ParamId::new() };
        let model = match file.contains("separate") {
            true => BTreeMap::from([("quantize.codebooks.1.weight".to_string(), entry)]),
            false => BTreeMap::new(),
        };
        let ours = Rules::builtin(system, part).unwrap().plan_for(&official, &model).unwrap();
        let again = Rules::export(system, part).unwrap().with_numbers([("depth", 4)]).plan(&ours).unwrap();
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
