//! Damaged input: never a panic, never past the limits.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use smalti_base::Planes;
use smalti_data::datasets;
use smalti_data::image::{self, Image, Limits, decode, decode_mask, parameters};
use std::path::Path;

fn files(folder: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| image::EXTENSIONS.iter().any(|e| path.extension().is_some_and(|found| found == *e)))
        .map(|path| (path.display().to_string(), std::fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

/// Bytes overwritten at some places, then perhaps a cut or a piece repeated.
fn mutate(bytes: &[u8], edits: &[(u16, u8)], cut: Option<u16>, twice: Option<u16>) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let place = |at: u16, len: usize| at as usize % len.max(1);
    for &(at, value) in edits {
        let at = place(at, bytes.len());
        bytes[at] = value;
    }
    if let Some(cut) = cut {
        bytes.truncate(place(cut, bytes.len()));
    }
    if let Some(from) = twice {
        let piece = bytes[place(from, bytes.len()).min(bytes.len())..].to_vec();
        bytes.extend(piece);
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_images(edits in prop::collection::vec((any::<u16>(), any::<u8>()), 0..6), cut: Option<u16>, twice: Option<u16>) {
        let limits = Limits { pixels: 1 << 16, bytes: 1 << 20, ..Limits::default() };
        for (name, bytes) in files("tests/data/decode") {
            let bad = mutate(&bytes, &edits, cut, twice);
            if let Ok(Image { width, height, pixels, .. }) = decode(&bad, &name, [255; 3], &limits) {
                prop_assert!(width * height <= 1 << 16 && pixels.len() == width * height * 3);
            }
            let _ = decode_mask(&bad, &name, &limits, None, None);
            let _ = parameters(&bad, &name);
        }
    }

    #[test]
    fn damaged_tars(edits in prop::collection::vec((0u16..9000, any::<u8>()), 0..4), cut: Option<u16>, twice: Option<u16>) {
        let whole = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/emoji3d/validation.tar")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.tar");
        std::fs::write(&path, mutate(&whole[..12_000], &edits, cut, twice)).unwrap();
        if let Ok(dataset) = datasets::open(&path, None, None) {
            for index in 0..dataset.len() {
                let _ = dataset.read(index).and_then(|record| record.decode(Planes::Colour, [0; 3], &Limits::default()));
            }
        }
    }

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(decode(&bytes, "x", [0; 3], &Limits::default()).is_err());
        let folder = tempfile::tempdir().unwrap();
        for name in ["x.tar", "metadata.jsonl", "metadata.csv", "x-images-idx3-ubyte", "x-images-idx3-ubyte.gz"] {
            let path = folder.path().join(name);
            std::fs::write(&path, &bytes).unwrap();
            let place = if name.starts_with("metadata") { folder.path() } else { &path };
            let _ = datasets::open(place, None, None).map(|d| (0..d.len()).for_each(|i| drop(d.read(i))));
            std::fs::remove_file(&path).unwrap();
        }
    }
}
