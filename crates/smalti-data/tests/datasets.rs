//! Every kind of data set, whole and broken.

#![allow(clippy::unwrap_used)]

use smalti_base::{Planes, files};
use smalti_data::datasets::{self, Dataset, Source};
use smalti_data::image::{Image, Limits, encode_png};
use smalti_data::{DataConfig, Transform};
use std::io::Write;
use std::path::Path;
use tempfile::TempDir;

fn png(level: u8) -> Vec<u8> {
    encode_png(&Image::filled(3, 2, [level; 3]), None).unwrap()
}

fn folder(contents: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in contents {
        let path = folder.path().join(name);
        files::create_folder(path.parent().unwrap()).unwrap();
        files::write_bytes(&path, bytes).unwrap();
    }
    folder
}

fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

fn open(path: &Path) -> Box<dyn Dataset> {
    datasets::open(path, None, None).unwrap()
}

fn fails(path: &Path, split: Option<&str>) -> String {
    datasets::open(path, split, None).map(|_| ()).unwrap_err().to_string()
}

/// Key, label, caption and grey level of every image.
fn all(dataset: &dyn Dataset) -> Vec<(String, Option<u32>, Option<String>, u8)> {
    let one = |index| {
        let record = dataset.read(index).unwrap();
        let level = record.decode(Planes::Colour, [255; 3], &Limits::default()).unwrap().pixels[0];
        assert_eq!(record.about.key, dataset.key(index));
        (record.about.key, record.about.label, record.about.text, level)
    };
    (0..dataset.len()).map(one).collect()
}

#[test]
fn folders_are_classes() {
    let (a, b, c) = (png(1), png(2), png(3));
    let root = folder(&[
        ("train/dog/x.png", &a),
        ("train/cat/deep/y.PNG", &b),
        ("train/cat/a.png", &c),
        ("train/.DS_Store", b"x"),
        ("train/dog/notes.txt", b"x"),
    ]);
    let dataset = datasets::open(root.path(), Some("train"), None).unwrap();
    assert_eq!(dataset.classes(), ["cat", "dog"]);
    let expected = [("cat/a.png", Some(0), 3), ("cat/deep/y.PNG", Some(0), 2), ("dog/x.png", Some(1), 1)];
    assert_eq!(all(dataset.as_ref()), expected.map(|(key, label, level)| (key.to_string(), label, None, level)));
    assert!(fails(root.path(), None).contains("split = \"train\""));
    assert!(fails(root.path(), Some("trian")).contains("did you mean `train`?"));
    assert!(dataset.read(3).is_err() && dataset.source(9).is_err());
    let flat = folder(&[("b.png", &a), ("a.png", &b)]);
    let dataset = open(flat.path());
    assert!(dataset.classes().is_empty());
    assert_eq!(dataset.len(), 2);
}

#[test]
fn metadata_name_captions_and_classes() {
    let (a, b) = (png(1), png(2));
    let jsonl = b"{\"file_name\": \"x/b.png\", \"text\": \"a dog\", \"label\": \"dog\", \"keywords\": [\"pet\", \" animal \", \"\"]}\n\n{\"file_name\": \"a.png\", \"caption\": \"a cat\", \"label\": \"cat\", \"long\": \"a black cat\"}\n";
    let root = folder(&[("x/b.png", &b), ("a.png", &a), ("unlisted.png", &a), ("metadata.jsonl", jsonl)]);
    let dataset = open(root.path());
    assert_eq!(dataset.classes(), ["cat", "dog"]);
    let expected = [("x/b.png", Some(1), "a dog", 2), ("a.png", Some(0), "a cat", 1)];
    assert_eq!(all(dataset.as_ref()), expected.map(|(k, l, t, v)| (k.to_string(), l, Some(t.to_string()), v)));
    assert_eq!((0..2).map(|i| dataset.about(i).unwrap().keywords).collect::<Vec<_>>(), [vec!["pet", "animal"], vec![]]);
    let long = datasets::open(root.path(), None, Some("long")).unwrap();
    assert_eq!(long.about(1).unwrap().text.as_deref(), Some("a black cat"));
    assert_eq!(long.about(0).unwrap().text, None);
    assert!(datasets::open(root.path(), None, Some("nothing")).is_err());

    let csv = b"file_name,text,label,keywords\na.png,\"a \"\"cat\"\", black\",3,\"pet, animal\"\nx/b.png,a dog,0,\n";
    let root = folder(&[("x/b.png", &b), ("a.png", &a), ("metadata.csv", csv)]);
    let dataset = open(root.path());
    assert_eq!(dataset.classes(), ["0", "1", "2", "3"]);
    let first = dataset.about(0).unwrap();
    assert_eq!((first.label, first.text.as_deref()), (Some(3), Some("a \"cat\", black")));
    assert_eq!(first.keywords, ["pet", "animal"]);

    for (line, problem) in [
        (&b"{\"file_name\": \"../../etc/passwd\"}"[..], "leads out of the folder"),
        (b"{\"file_name\": \"/etc/passwd\"}", "leads out of the folder"),
        (b"{\"text\": \"x\"}", "no `file_name`"),
        (b"{\"file_name\": \"a.png\"", "line 1"),
        (b"{\"file_name\": \"a.png\", \"label\": -1}", "label -1"),
        (b"{\"file_name\": \"a.png\", \"label\": 99999999}", "label 99999999"),
    ] {
        let root = folder(&[("a.png", &a), ("metadata.jsonl", line)]);
        let error = fails(root.path(), None);
        assert!(error.contains(problem), "{error}");
    }
    let root = folder(&[("metadata.jsonl", b"{\"file_name\": \"gone.png\"}")]);
    assert!(open(root.path()).read(0).unwrap_err().to_string().contains("gone.png"));
}

#[test]
fn labels_count_by_the_training_classes() {
    let a = png(1);
    let root = folder(&[
        ("train/a/1.png", &a),
        ("train/b/1.png", &a),
        ("train/c/1.png", &a),
        ("test/c/1.png", &a),
        ("odd/z/1.png", &a),
    ]);
    let config = |split: &str| {
        let mut config = DataConfig::new(root.path(), Transform::center((2, 2), Planes::Colour));
        config.split = Some(split.into());
        config
    };
    let train = config("train").open(None).unwrap();
    let test = config("test").open(Some(train.classes())).unwrap();
    assert_eq!(test.about(0).unwrap().label, Some(2));
    assert_eq!(test.classes(), train.classes());
    assert!(
        config("odd").open(Some(train.classes())).map(|_| ()).unwrap_err().to_string().contains("unknown class `z`")
    );
    let mut limited = config("train");
    limited.limit = Some(2);
    let limited = limited.open(None).unwrap();
    assert!(limited.len() == 2 && limited.read(2).is_err());
}

fn idx(sizes: &[u32], bytes: &[u8]) -> Vec<u8> {
    let mut file = vec![0, 0, 8, sizes.len() as u8];
    sizes.iter().for_each(|size| file.extend(size.to_be_bytes()));
    file.extend(bytes);
    file
}

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn idx_files_plain_and_gzipped() {
    let images = idx(&[2, 1, 2], &[10, 11, 20, 21]);
    let labels = idx(&[2], &[4, 0]);
    let root = folder(&[
        ("train-images-idx3-ubyte.gz", &gz(&images)),
        ("train-labels-idx1-ubyte.gz", &gz(&labels)),
        ("t10k-images-idx3-ubyte", &images),
    ]);
    let dataset = datasets::open(root.path(), Some("train"), None).unwrap();
    assert_eq!(dataset.classes(), ["0", "1", "2", "3", "4"]);
    assert_eq!(all(dataset.as_ref()), [("00000".into(), Some(4), None, 10), ("00001".into(), Some(0), None, 20)]);
    assert!(matches!(dataset.source(1).unwrap(), Source::Grey { width: 2, height: 1, pixels } if pixels == [20, 21]));
    assert_eq!(open(&root.path().join("t10k-images-idx3-ubyte")).about(0).unwrap().label, None);
    assert!(fails(root.path(), None).contains("t10k, train"));
    for (bytes, problem) in [
        (idx(&[3, 1, 2], &[1; 4]), "cut off: 4 bytes of 6"),
        (idx(&[u32::MAX, u32::MAX, u32::MAX], &[1; 4]), "are more than"),
        (idx(&[4], &[1; 4]), "1 dimensions"),
        (b"PK\x03\x04....".to_vec(), "begins with"),
        (vec![0, 0], "cannot read"),
        (idx(&[0, 28, 28], &[]), "no images"),
    ] {
        let root = folder(&[("x-images-idx3-ubyte", &bytes)]);
        let error = fails(&root.path().join("x-images-idx3-ubyte"), None);
        assert!(error.contains(problem), "{error}");
    }
}

#[test]
fn webdataset_members_are_grouped_by_key() {
    let (a, b, c) = (png(1), png(2), png(3));
    let long = format!("{}/000000003.png", "folder".repeat(30));
    let members: &[(&str, &[u8])] = &[
        ("000000000.png", &a),
        ("000000000.txt", b"from txt\n"),
        ("000000000.json", b"{\"caption\": \"from json\", \"key\": \"000000000\", \"label\": \"b\"}"),
        // Members of one sample need not be neighbours.
        ("./000000001.json", b"{\"caption\": \"second\", \"label\": \"a\", \"keywords\": [\"next\"]}"),
        ("000000002.txt", b"no image"),
        ("./000000001.PNG", &b),
        ("000000001.seg.png", &a),
        (&long, &c),
        ("00000.parquet", b"PAR1"),
    ];
    let root = folder(&[("00000.tar", &tar(members)), ("00000.parquet", b"PAR1"), ("00000_stats.json", b"{}")]);
    let dataset = open(root.path());
    let rows = all(dataset.as_ref());
    let short = rows[..2].iter().map(|(k, l, t, v)| (k.as_str(), *l, t.as_deref(), *v)).collect::<Vec<_>>();
    assert_eq!(short, [("000000000", Some(1), Some("from txt"), 1), ("000000001", Some(0), Some("second"), 2)]);
    assert_eq!((rows[2].0.as_str(), rows[2].3), (long.trim_end_matches(".png"), 3));
    assert_eq!(dataset.about(1).unwrap().keywords, ["next"]);
    assert_eq!(rows.len(), 3);
    assert!(dataset.warnings().iter().any(|w| w.contains("1 keys without an image")), "{:?}", dataset.warnings());
    let caption = datasets::open(root.path(), None, Some("caption")).unwrap();
    assert_eq!(caption.about(0).unwrap().text.as_deref(), Some("from json"));
}

#[test]
fn many_tars_and_cls_labels() {
    let (a, b) = (png(1), png(2));
    let one = tar(&[("0.png", &a), ("0.cls", b"7")]);
    let two = tar(&[("1.png", &b), ("1.cls", b" 2\n")]);
    let root = folder(&[("d/train-00009.tar", &one), ("d/train-00010.tar", &two), ("d/validation.tar", &one)]);
    let d = root.path().join("d");
    let by_split = datasets::open(&d, Some("train"), None).unwrap();
    let by_pattern = open(&d.join("train-{00009..00010}.tar"));
    assert_eq!(all(by_split.as_ref()), all(by_pattern.as_ref()));
    assert_eq!(all(by_split.as_ref()), [("0".into(), Some(7), None, 1), ("1".into(), Some(2), None, 2)]);
    assert_eq!(by_split.describe().keys, by_pattern.describe().keys);
    assert!(fails(&d, None).contains("several parts: train, validation"));
    assert!(fails(&d.join("train-{00009..00011}.tar"), None).contains("train-00011.tar"));
    assert!(fails(&d.join("train-{9..x}.tar"), None).contains("not a pattern"));
    assert!(fails(&d.join("train-00009.tar"), Some("train")).contains("is one file"));
}

#[test]
fn a_tar_that_is_cut_off_keeps_what_is_before() {
    let images: Vec<Vec<u8>> = (0..6).map(png).collect();
    let names: Vec<String> = (0..6).map(|n| format!("{n}.png")).collect();
    let members: Vec<(&str, &[u8])> = names.iter().map(String::as_str).zip(images.iter().map(Vec::as_slice)).collect();
    let whole = tar(&members);
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("x.tar");
    for length in (0..whole.len()).step_by(11) {
        std::fs::write(&path, &whole[..length]).unwrap();
        let complete = members.iter().scan(0, |end, (_, bytes)| {
            let own = *end + 512 + bytes.len();
            *end += 512 + bytes.len().div_ceil(512) * 512;
            Some(own)
        });
        let complete = complete.filter(|&end| end <= length).count();
        match datasets::open(&path, None, None) {
            Ok(dataset) => {
                assert_eq!(all(dataset.as_ref()).len(), complete, "cut at {length}");
                let end_mark = whole.len() - 512;
                assert_eq!(
                    dataset.warnings().is_empty(),
                    length >= end_mark,
                    "cut at {length}: {:?}",
                    dataset.warnings()
                );
                assert!(dataset.warnings().iter().all(|w| w.contains("x.tar: byte ") && w.contains("cut off")));
            }
            Err(error) => assert!(complete == 0, "cut at {length}: {error}"),
        }
    }
    let mut damaged = whole.clone();
    damaged[1024 * 2 + 3] ^= 0x40;
    std::fs::write(&path, &damaged).unwrap();
    let dataset = open(&path);
    assert_eq!(dataset.len(), 2);
    assert!(dataset.warnings()[0].contains("byte 2048: damaged"), "{:?}", dataset.warnings());
}

#[test]
fn one_image_is_a_data_set_and_nothing_is_not() {
    let root = folder(&[("a.png", &png(9)), ("b.zip", b"PK")]);
    assert_eq!(all(open(&root.path().join("a.png")).as_ref()), [("a.png".into(), None, None, 9)]);
    let empty = tempfile::tempdir().unwrap();
    assert!(fails(empty.path(), None).contains("contains no images"));
    assert!(fails(&root.path().join("gone"), None).contains("cannot read"));
    assert!(fails(&root.path().join("b.zip"), None).contains("WebDataset"));
}
