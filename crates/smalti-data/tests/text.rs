//! Text tokenizers: trained on captions, saved, read again.

#![allow(clippy::unwrap_used)]

use smalti_data::TextTokenizer;
use smalti_data::datasets;
use std::path::Path;

fn captions() -> Vec<String> {
    let data =
        datasets::open(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/emoji3d")), Some("train"), None)
            .unwrap();
    (0..data.len()).filter_map(|i| data.about(i).unwrap().text).collect()
}

#[test]
fn training_is_deterministic_and_encodes_any_text() {
    let captions = captions();
    assert_eq!(captions.len(), 1666);
    let tokenizer = TextTokenizer::train_bpe(&captions, 1024).unwrap();
    for _ in 0..3 {
        assert_eq!(TextTokenizer::train_bpe(&captions, 1024).unwrap().to_json().unwrap(), tokenizer.to_json().unwrap());
    }
    assert_eq!(tokenizer.vocabulary(), 1024);
    for text in captions.iter().map(String::as_str).chain(["", "une pomme 🍎 \u{0} 日本", "<pad> x"]) {
        let ids = tokenizer.encode(text).unwrap();
        assert!(ids.iter().all(|&id| (id as usize) < 1024));
    }
    // Lower case, and the bytes come back.
    assert_eq!(tokenizer.encode("A Red HEART").unwrap(), tokenizer.encode("a red heart").unwrap());
    assert_eq!(tokenizer.decode(&tokenizer.encode("A rouge Île 🍎").unwrap()).unwrap().trim(), "a rouge île 🍎");
    // Frequent words are few tokens.
    assert!(tokenizer.encode("red heart").unwrap().len() <= 3);
}

#[test]
fn saved_tokenizers_encode_the_same() {
    let tokenizer = TextTokenizer::train_bpe(&captions(), 400).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    tokenizer.save(&path).unwrap();
    let again = TextTokenizer::load(&path).unwrap();
    assert_eq!(again.encode("grinning face").unwrap(), tokenizer.encode("grinning face").unwrap());
    std::fs::write(&path, &std::fs::read(&path).unwrap()[..500]).unwrap();
    let error = TextTokenizer::load(&path).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json") && error.contains("not a tokenizer"), "{error}");
    assert!(TextTokenizer::train_bpe(&["x"], 10).is_err());
    assert!(TextTokenizer::train_bpe::<String>(&[], 1000).is_err());
}
