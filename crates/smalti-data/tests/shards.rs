//! Token shards: round trip, resuming, refusing, and noticing every kind of damage.

#![allow(clippy::unwrap_used)]

use smalti_base::{Layout, Result, Rng, TokenKind, TokenSpec, files};
use smalti_data::datasets::Description;
use smalti_data::loader::Skipped;
use smalti_data::shard::{Manifest, Origin, RowTokens, ShardWriter, Shards, TokenRow, TokenizerId};
use std::path::Path;

const IMAGES: usize = 23;

fn origin(vocabulary: usize) -> Origin {
    Origin {
        spec: TokenSpec::discrete(Layout::Grid { h: 2, w: 3 }, vocabulary, (16, 24)),
        tokenizer: TokenizerId { name: "vqgan".into(), sha256: "ab".repeat(32) },
        data: Description { kind: "webdataset".into(), path: "a.tar".into(), images: IMAGES, keys: "cd".repeat(32) },
        transforms: "center".into(),
        classes: vec!["cat".into(), "dog".into()],
    }
}

fn row(index: usize, vocabulary: usize) -> TokenRow {
    let mut stream = Rng::new(5).stream(index as u64, 0);
    TokenRow {
        key: format!("k/{index}"),
        tokens: RowTokens::Discrete((0..6).map(|_| stream.below(vocabulary) as u32).collect()),
        label: (index % 3 != 2).then_some((index % 3) as u32),
        text: (!index.is_multiple_of(4)).then(|| format!("número {index} 🍎")),
        keywords: (0..index % 3).map(|word| format!("word {word} of {index}")).collect(),
    }
}

/// Images 5 and 8..12 cannot be read; the latter are a whole shard.
fn is_bad(index: usize) -> bool {
    index == 5 || (8..12).contains(&index)
}

fn write(folder: &Path, vocabulary: usize, until: usize) -> Result<ShardWriter> {
    let mut writer = ShardWriter::open(folder, origin(vocabulary), 4)?;
    for index in writer.next()..until {
        match is_bad(index) {
            true => writer.skip(Skipped { index, key: format!("k/{index}"), error: "cut off".into() })?,
            false => writer.push(index, row(index, vocabulary))?,
        }
    }
    Ok(writer)
}

/// Name and bytes of every file in a folder.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let mut all: Vec<_> =
        entries.map(|p| (p.file_name().unwrap().to_string_lossy().into(), files::read(&p).unwrap())).collect();
    all.sort();
    all
}

#[test]
fn rows_come_back_with_narrow_and_wide_codes() {
    for vocabulary in [512, 65_536, 65_537, 1 << 18] {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), vocabulary, IMAGES).unwrap().finish().unwrap();
        let shards = Shards::open(folder.path()).unwrap();
        let expected: Vec<TokenRow> = (0..IMAGES).filter(|&i| !is_bad(i)).map(|i| row(i, vocabulary)).collect();
        let found: Vec<TokenRow> = (0..shards.len()).map(|i| shards.row(i).unwrap()).collect();
        assert_eq!(found, expected);
        assert_eq!(shards.manifest().skipped.len(), 5);
        assert!(shards.row(shards.len()).is_err());
        shards.verify().unwrap();
    }
}

#[test]
fn an_interrupted_run_ends_with_the_same_bytes() {
    let whole = tempfile::tempdir().unwrap();
    write(whole.path(), 512, IMAGES).unwrap().finish().unwrap();
    let reference = contents(whole.path());
    for stop in 0..IMAGES {
        let folder = tempfile::tempdir().unwrap();
        drop(write(folder.path(), 512, stop).unwrap());
        if stop > 0 {
            let error = Shards::open(folder.path()).unwrap_err().to_string();
            assert!(error.contains("unfinished"), "{error}");
        }
        let writer = write(folder.path(), 512, IMAGES).unwrap();
        writer.finish().unwrap();
        assert_eq!(contents(folder.path()), reference, "stopped at {stop}");
    }
    // A lost shard is made again.
    std::fs::remove_file(whole.path().join("tokens-00003.safetensors")).unwrap();
    assert!(Shards::open(whole.path()).unwrap_err().to_string().contains("tokens-00003"));
    assert_eq!(ShardWriter::open(whole.path(), origin(512), 4).unwrap().next(), 12);
    write(whole.path(), 512, IMAGES).unwrap().finish().unwrap();
    assert_eq!(contents(whole.path()), reference);
}

#[test]
fn a_folder_of_something_else_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), 512, 9).unwrap();
    let refusal = |change: fn(&mut Origin)| {
        let mut other = origin(512);
        change(&mut other);
        ShardWriter::open(folder.path(), other, 4).map(|_| ()).unwrap_err().to_string()
    };
    assert!(refusal(|o| o.tokenizer.sha256 = "00".repeat(32)).contains("the tokenizers of"));
    assert!(refusal(|o| o.spec.kind = TokenKind::Discrete { vocabulary: 1024.into() }).contains("1024 codes"));
    assert!(refusal(|o| o.data.keys = "ef".repeat(32)).contains("the data sets of"));
    assert!(refusal(|o| o.transforms = "random".into()).contains("random"));
    // The same data set at another place is the same data set.
    let mut moved = origin(512);
    moved.data.path = "/elsewhere/a.tar".into();
    ShardWriter::open(folder.path(), moved, 4).unwrap();
    assert!(ShardWriter::open(folder.path(), origin(512), 5).is_err());
    let other = tempfile::tempdir().unwrap();
    files::write_bytes(&other.path().join("thesis.tex"), b"x").unwrap();
    assert!(ShardWriter::open(other.path(), origin(512), 4).unwrap_err().to_string().contains("thesis.tex"));
}

#[test]
fn rows_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::open(folder.path(), origin(512), 4).unwrap();
    assert!(writer.push(1, row(1, 512)).is_err());
    assert!(writer.push(0, TokenRow { tokens: RowTokens::Discrete(vec![0; 5]), ..row(0, 512) }).is_err());
    assert!(writer.push(0, TokenRow { tokens: RowTokens::Discrete(vec![512; 6]), ..row(0, 512) }).is_err());
    writer.push(0, row(0, 512)).unwrap();
    assert!(writer.finish().unwrap_err().to_string().contains("1 of 23"));
}

#[test]
fn every_flipped_byte_and_every_cut_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), 512, IMAGES).unwrap().finish().unwrap();
    let path = folder.path().join("tokens-00001.safetensors");
    let good = files::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        std::fs::write(&path, &bad).unwrap();
        let shards = Shards::open(folder.path()).unwrap();
        assert!(shards.row(0).is_ok(), "another shard is still good");
        let error = shards.row(4).unwrap_err().to_string();
        assert!(error.contains("tokens-00001.safetensors") && error.contains("damaged"), "{error}");
        assert!(shards.verify().is_err());
        std::fs::write(&path, &good[..at]).unwrap();
        assert!(Shards::open(folder.path()).unwrap_err().to_string().contains("tokens-00001"));
    }
}

/// With the manifest forged to agree, damage may be unnoticed, but nothing may panic.
#[test]
fn forged_shards_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), 512, IMAGES).unwrap().finish().unwrap();
    let path = folder.path().join("tokens-00000.safetensors");
    let good = files::read(&path).unwrap();
    let mut manifest = Manifest::read(folder.path()).unwrap();
    for at in 0..good.len() {
        for value in [0, 0x7f, 0xff, good[at].wrapping_add(1)] {
            let mut bad = good.clone();
            bad[at] = value;
            std::fs::write(&path, &bad).unwrap();
            manifest.shards[0].sha256 = files::sha256_bytes(&bad);
            let text = serde_json::to_string(&manifest).unwrap();
            std::fs::write(Manifest::path(folder.path()), text).unwrap();
            let shards = Shards::open(folder.path()).unwrap();
            let _ = shards.row(0).map(|row| match row.tokens {
                RowTokens::Discrete(codes) => assert!(codes.iter().all(|&code| code < 512)),
                RowTokens::Continuous { .. } => panic!("the spec says codes"),
            });
        }
    }
}

/// Rows of vectors: numbers that 16 bits hold exactly, with deviations or without.
fn vectors(index: usize, certain: bool) -> TokenRow {
    let mut stream = Rng::new(6).stream(index as u64, 0);
    let mut numbers = |least: usize| (0..24).map(|_| (stream.below(64 - least) + least) as f32 / 32.0 - 1.0).collect();
    let (means, deviations) = (numbers(0), if certain { Vec::new() } else { numbers(32) });
    TokenRow { tokens: RowTokens::Continuous { means, deviations }, ..row(index, 2) }
}

#[test]
fn vectors_come_back_with_and_without_deviations() {
    let spec = TokenSpec::continuous(Layout::Grid { h: 2, w: 3 }, 4, (16, 24));
    for certain in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let open = || ShardWriter::open(folder.path(), Origin { spec: spec.clone(), ..origin(2) }, 4).unwrap();
        let mut writer = open();
        assert!(writer.push(0, row(0, 2)).unwrap_err().to_string().contains("codes where tokens are vectors of 4"));
        let wild = RowTokens::Continuous { means: vec![1e6; 24], deviations: Vec::new() };
        assert!(writer.push(0, TokenRow { tokens: wild, ..row(0, 2) }).unwrap_err().to_string().contains("too large"));
        for index in 0..6 {
            writer.push(index, vectors(index, certain)).unwrap();
        }
        assert!(writer.push(6, vectors(6, !certain)).unwrap_err().to_string().contains("one shard"));
        drop(writer);
        // The two rows of the unfinished shard are made again.
        let mut writer = open();
        for index in writer.next()..IMAGES {
            writer.push(index, vectors(index, certain)).unwrap();
        }
        writer.finish().unwrap();
        let shards = Shards::open(folder.path()).unwrap();
        for index in 0..IMAGES {
            assert_eq!(shards.row(index).unwrap(), vectors(index, certain));
            assert_eq!(shards.tokens(index).unwrap(), vectors(index, certain).tokens);
        }
    }
}
