//! Tars and IDX files as people have them: dotted names, links, gzip, members and headers that do not fit.

#![allow(clippy::unwrap_used)]

use smalti_base::Planes;
use smalti_data::DataConfig;
use smalti_data::datasets::{self, Dataset};
use smalti_data::image::{Image, Limits, encode_png};
use std::io::Write;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn png(level: u8) -> Vec<u8> {
    encode_png(&Image::filled(3, 2, [level; 3]), None).unwrap()
}

fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn file(name: &str, bytes: &[u8]) -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    (root, path)
}

/// Key, label and caption of each image.
fn rows(dataset: &dyn Dataset) -> Vec<(String, Option<u32>, Option<String>)> {
    let row = |index| {
        let record = dataset.read(index).unwrap();
        record.decode(Planes::Colour, [255; 3], &Limits::default()).unwrap();
        (record.about.key, record.about.label, record.about.text)
    };
    (0..dataset.len()).map(row).collect()
}

fn has(dataset: &dyn Dataset, parts: &[&str]) -> bool {
    dataset.warnings().iter().any(|warning| parts.iter().all(|part| warning.contains(part)))
}

fn open(path: &Path) -> Box<dyn Dataset> {
    datasets::open(path, None, None).unwrap()
}

fn fails(path: &Path) -> String {
    datasets::open(path, None, None).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn names_with_dots_are_names() {
    let image = png(1);
    let (_root, path) = file(
        "x.tar",
        &tar(&[
            ("photo 1.5.png", &image),
            ("photo 1.5.txt", b"one and a half"),
            ("photo 2.5.png", &image),
            ("photo 2.5.cls", b"3"),
            ("a.b/photo 3.5.png", &image),
            ("9.png", &image),
            ("pair.left.jpg", &image),
            ("pair.right.jpg", &image),
            ("pair.txt", b"both"),
        ]),
    );
    let found = rows(&*open(&path));
    let keys: Vec<&str> = found.iter().map(|(key, ..)| key.as_str()).collect();
    assert_eq!(keys, ["photo 1.5", "photo 2.5", "a.b/photo 3.5", "9", "pair.left", "pair.right"]);
    assert_eq!(found[0].2.as_deref(), Some("one and a half"));
    assert_eq!(found[1].1, Some(3));
    assert!(found[4..].iter().all(|(_, _, text)| text.as_deref() == Some("both")));
}

#[test]
fn members_of_samples_stay_members_and_are_named() {
    let image = png(1);
    let members: &[(&str, &[u8])] = &[("1.seg.png", &image), ("1.png", &image), ("1.txt", b"x"), ("2.png", &image)];
    let (_root, path) = file("x.tar", &tar(members));
    let dataset = open(&path);
    assert_eq!(rows(&*dataset).iter().map(|(key, ..)| key.as_str()).collect::<Vec<_>>(), ["1", "2"]);
    assert!(has(&*dataset, &["images that belong to a sample with an image of its own (1)", "1.seg"]));
}

#[test]
fn what_a_tar_holds_beside_files_is_named() {
    let image = png(1);
    let mut builder = tar::Builder::new(tar(&[("1.png", &image)])[..1024].to_vec());
    let mut link = tar::Header::new_gnu();
    link.set_entry_type(tar::EntryType::Link);
    link.set_size(0);
    builder.append_link(&mut link, "2.png", "1.png").unwrap();
    for (name, bytes) in [("3.heic", &b"x"[..]), (".hidden.png", &image), ("1.json", b"{broken"), ("._1.png", b"mac")] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        builder.append_data(&mut header, name, bytes).unwrap();
    }
    let (_root, path) = file("x.tar", &builder.into_inner().unwrap());
    let dataset = open(&path);
    assert_eq!(rows(&*dataset), [("1".to_string(), None, None)]);
    for parts in [
        ["links or sparse files", "2.png"],
        ["files of other kinds (1)", "1 .heic"],
        ["hidden images (1)", ".hidden.png"],
        ["records that are not JSON (1)", "1.json"],
    ] {
        assert!(has(&*dataset, &parts), "{parts:?}: {:?}", dataset.warnings());
    }
    let (_root, path) = file("y.tar", &tar(&[("1.heic", b"x"), ("2.heic", b"x")]));
    assert!(fails(&path).contains("2 .heic"));
}

#[test]
fn gzipped_tars_are_read_whatever_they_are_called() {
    let (a, b) = (png(1), png(2));
    let plain = tar(&[("1.png", &a), ("1.txt", b"one"), ("2.png", &b)]);
    let packed = gz(&plain);
    let (_root, path) = file("plain.tar", &plain);
    let expected = rows(&*open(&path));
    for name in ["x.tar.gz", "x.TGZ", "x.tar"] {
        let (_root, path) = file(name, &packed);
        let dataset = open(&path);
        assert_eq!(rows(&*dataset), expected, "{name}");
        assert!(!has(&*dataset, &["damaged"]));
    }
    let (root, path) = file("train.tar.gz", &packed);
    std::fs::write(root.path().join("test.tgz"), &packed).unwrap();
    assert_eq!(rows(&*datasets::open(root.path(), Some("train"), None).unwrap()), expected);
    std::fs::write(&path, &packed[..packed.len() - 5]).unwrap();
    assert!(has(&*open(&path), &["train.tar.gz: damaged or cut off"]));
    let mut wrong = packed.clone();
    let at = wrong.len() - 6;
    wrong[at] ^= 1;
    std::fs::write(&path, &wrong).unwrap();
    assert!(has(&*open(&path), &["train.tar.gz: damaged or cut off"]), "the checksum is compared");
}

#[test]
fn one_bad_tar_does_not_stop_the_others() {
    let (root, path) = file("00000.tar", &tar(&[("1.png", &png(1))]));
    std::fs::write(root.path().join("00001.tar"), b"<html>not found</html>").unwrap();
    std::fs::write(root.path().join("stray.png"), png(1)).unwrap();
    let dataset = open(root.path());
    assert_eq!(dataset.len(), 1);
    assert!(has(&*dataset, &["left out", "00001.tar"]) && has(&*dataset, &["images beside the tars (1)", "stray.png"]));
    std::fs::remove_file(&path).unwrap();
    assert!(fails(root.path()).contains("00001.tar"));
}

#[test]
fn captions_of_tars_are_counted_and_may_be_required() {
    let image = png(1);
    let long = vec![b'x'; (64 << 10) + 1];
    let members: &[(&str, &[u8])] =
        &[("1.png", &image), ("1.txt", b"one"), ("2.png", &image), ("3.png", &image), ("3.txt", &long)];
    let (_root, path) = file("x.tar", &tar(members));
    let dataset = open(&path);
    assert!(has(&*dataset, &["1 of 3 images have a caption"]), "{:?}", dataset.warnings());
    assert!(has(&*dataset, &["more than 64 KiB", "3.txt"]));
    let captioned = DataConfig { require_caption: true, ..DataConfig::new(&path, Vec::new()) }.open(None).unwrap();
    assert_eq!(rows(&*captioned), [("1".to_string(), None, Some("one".to_string()))]);
    let field = datasets::open(&path, None, Some("nope")).map(|_| ()).unwrap_err().to_string();
    assert!(field.contains("no image has a text in the field `nope`"), "{field}");
}

fn idx(sizes: &[u32], bytes: &[u8]) -> Vec<u8> {
    let header = [0, 0, 8, sizes.len() as u8].into_iter().chain(sizes.iter().flat_map(|size| size.to_be_bytes()));
    header.chain(bytes.iter().copied()).collect()
}

#[test]
fn an_idx_file_is_exactly_what_its_header_says() {
    let (name, packed) = ("x-images-idx3-ubyte", "x-images-idx3-ubyte.gz");
    let good = idx(&[2, 2, 3], &[5; 12]);
    for (bytes, problem) in [
        (idx(&[2, 1, 3], &[5; 12]), "more bytes than the 6"),
        (idx(&[1, 2, 3], &[5; 12]), "more bytes than the 6"),
        (idx(&[3, 2, 3], &[5; 12]), "cut off: 12 bytes of 18"),
        (idx(&[1, 30_000, 30_000], &[5; 12]), "30000x30000 pixels"),
        (idx(&[0, 2, 3], &[]), "no images"),
    ] {
        let (_root, path) = file(name, &bytes);
        let plain = fails(&path);
        let (_root, path) = file(packed, &gz(&bytes));
        let zipped = fails(&path);
        let is_large = problem.starts_with("30000");
        assert!(is_large || (plain.contains(problem) && zipped.contains(problem)), "{problem}: {plain} {zipped}");
    }
    let whole = gz(&good);
    let mut wrong = whole.clone();
    let at = wrong.len() - 6;
    wrong[at] ^= 1;
    for bytes in [wrong, whole[..whole.len() - 3].to_vec(), [&whole[..], b"garbage"].concat()] {
        let (_root, path) = file(packed, &bytes);
        assert!(fails(&path).contains(packed));
    }
    // One file of images in a folder needs no name of a part.
    let (root, _) = file(packed, &whole);
    assert_eq!(open(root.path()).len(), 2);
    std::fs::write(root.path().join("x-labels-idx1-ubyte"), idx(&[3], &[0; 3])).unwrap();
    assert!(fails(root.path()).contains("3 labels for 2 images"));
}

#[test]
fn limits_hold_for_raw_pixels_too() {
    let (_root, path) = file("x-images-idx3-ubyte", &idx(&[1, 20, 30], &[5; 600]));
    let record = open(&path).read(0).unwrap();
    let limits = Limits { pixels: 599, ..Limits::default() };
    let error = record.decode(Planes::Colour, [0; 3], &limits).unwrap_err().to_string();
    assert!(error.contains("00000: 30x20 pixels are more than the limit, 599"), "{error}");
}
