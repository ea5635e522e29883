//! Folders as people have them: strays, class folders named like parts, links, pipes, names of all kinds, damaged metadata.

#![allow(clippy::unwrap_used)]

use smalti_base::{Error, Planes};
use smalti_data::datasets::{self, Dataset};
use smalti_data::image::{Image, Limits, encode_png};
use smalti_data::{DataConfig, Transform};
use std::path::Path;
use tempfile::TempDir;

fn png() -> Vec<u8> {
    encode_png(&Image::filled(3, 2, [7; 3]), None).unwrap()
}

fn put(root: &Path, name: &str, bytes: &[u8]) {
    let path = root.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// A folder with these images.
fn images(names: &[&str]) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    names.iter().for_each(|name| put(root.path(), name, &png()));
    root
}

fn config(path: &Path) -> DataConfig {
    DataConfig::new(path, Transform::center((2, 2), Planes::Colour))
}

fn open(path: &Path) -> Box<dyn Dataset> {
    datasets::open(path, None, None).unwrap()
}

fn fails(path: &Path) -> Error {
    datasets::open(path, None, None).map(|_| ()).unwrap_err()
}

fn keys(dataset: &dyn Dataset) -> Vec<String> {
    (0..dataset.len()).map(|index| dataset.key(index)).collect()
}

fn has(dataset: &dyn Dataset, parts: &[&str]) -> bool {
    dataset.warnings().iter().any(|warning| parts.iter().all(|part| warning.contains(part)))
}

fn decodes(dataset: &dyn Dataset, index: usize) -> bool {
    let record = dataset.read(index).unwrap();
    record.decode(Planes::Colour, [255; 3], &Limits::default()).is_ok()
}

#[test]
fn a_stray_picture_does_not_take_the_classes_away() {
    let root = images(&["cat/1.png", "cat/2.png", "dog/1.png", "cover.png"]);
    let dataset = open(root.path());
    assert_eq!(dataset.classes(), ["cat", "dog"]);
    assert_eq!(keys(&*dataset), ["cat/1.png", "cat/2.png", "dog/1.png"]);
    assert!(has(&*dataset, &["left out images beside the class folders (1)", "cover.png"]), "{:?}", dataset.warnings());

    let all = DataConfig { classes_from_folders: Some(false), ..config(root.path()) }.open(None).unwrap();
    assert!(all.len() == 4 && all.classes().is_empty() && all.warnings().is_empty());

    let flat = images(&["1.png", "2.png", "3.png", "more/4.png"]);
    let error = fails(flat.path()).to_string();
    assert!(error.contains("3 images are beside the folders and 1 in them"), "{error}");
    assert!(error.contains("classes_from_folders = false") && error.contains("--classes-from-folders"), "{error}");
    let classes = DataConfig { classes_from_folders: Some(true), ..config(flat.path()) }.open(None).unwrap();
    assert_eq!((keys(&*classes), classes.classes()), (vec!["more/4.png".to_string()], &["more".to_string()][..]));
}

#[test]
fn classes_may_have_the_names_of_parts() {
    let root = images(&["boat/1.png", "bus/1.png", "train/1.png"]);
    let error = fails(root.path()).to_string();
    assert!(error.contains("boat, bus, train") && error.contains("`train` is the name of a part"), "{error}");
    for way in ["split = \"train\"", "--split train", "classes_from_folders = true", "--classes-from-folders"] {
        assert!(error.contains(way), "{way}: {error}");
    }
    let classes = DataConfig { classes_from_folders: Some(true), ..config(root.path()) }.open(None).unwrap();
    assert_eq!((classes.len(), classes.classes()), (3, &["boat", "bus", "train"].map(String::from)[..]));
    let part = DataConfig { split: Some("train".into()), ..config(root.path()) }.open(None).unwrap();
    assert_eq!(keys(&*part), ["1.png"]);

    let parts = images(&["Train/a/1.png", "Test/a/1.png"]);
    assert!(fails(parts.path()).to_string().contains("has several parts: Test, Train"));
    let one = images(&["train/a/1.png"]);
    assert!(fails(one.path()).to_string().contains("is it a part or a class?"));
}

#[cfg(unix)]
#[test]
fn only_regular_files_are_images() {
    use std::os::unix::fs::symlink;
    let root = images(&["a.png", "real/b.png"]);
    let at = |name: &str| root.path().join(name);
    let made = std::process::Command::new("mkfifo").arg(at("pipe.png")).status().unwrap();
    assert!(made.success());
    let _socket = std::os::unix::net::UnixListener::bind(at("socket.png")).unwrap();
    symlink("/dev/zero", at("zeros.png")).unwrap();
    symlink("nowhere.png", at("gone.png")).unwrap();
    symlink("real/b.png", at("linked.png")).unwrap();
    std::fs::create_dir(at("folder.png")).unwrap();
    let dataset = DataConfig { classes_from_folders: Some(false), ..config(root.path()) }.open(None).unwrap();
    assert_eq!(keys(&*dataset), ["a.png", "linked.png", "real/b.png"]);
    let special = ["left out images that are no regular files (3)", "pipe.png", "socket.png", "zeros.png"];
    assert!(has(&*dataset, &special), "{:?}", dataset.warnings());
    assert!(has(&*dataset, &["images that cannot be read (1)", "gone.png"]), "{:?}", dataset.warnings());

    for name in ["pipe.png", "zeros.png", "socket.png"] {
        assert!(fails(&at(name)).to_string().contains("expected a regular file"), "{name}");
    }
    for name in ["x.tar", "x-images-idx3-ubyte"] {
        std::fs::rename(at("pipe.png"), at(name)).unwrap();
        assert!(fails(&at(name)).to_string().contains("a named pipe"), "{name}");
        std::fs::rename(at(name), at("pipe.png")).unwrap();
    }
    std::fs::rename(at("pipe.png"), at("metadata.jsonl")).unwrap();
    assert!(fails(root.path()).to_string().contains("metadata.jsonl: is a named pipe"));
}

#[cfg(unix)]
#[test]
fn each_real_folder_is_visited_once() {
    use std::os::unix::fs::symlink;
    let root = images(&["z/1.png"]);
    // Each folder has two links to the one after it: 2^27 ways lead to the last.
    for depth in 0..27 {
        let folder = root.path().join(format!("chain/{depth}"));
        std::fs::create_dir_all(&folder).unwrap();
        symlink(format!("../{}", depth + 1), folder.join("left")).unwrap();
        symlink(format!("../{}", depth + 1), folder.join("right")).unwrap();
    }
    put(root.path(), "chain/27/2.png", &png());
    symlink("..", root.path().join("z/up")).unwrap();
    symlink("z", root.path().join("a")).unwrap();
    let dataset = open(root.path());
    // A real folder keeps its own name, whatever links lead to it.
    assert_eq!(keys(&*dataset), ["chain/27/2.png", "z/1.png"]);
    assert!(has(&*dataset, &["links to folders that are read by another name"]), "{:?}", dataset.warnings());

    let other = images(&["x/1.png"]);
    symlink(other.path().join("x"), root.path().join("y")).unwrap();
    assert!(keys(&*open(root.path())).contains(&"y/1.png".to_string()), "links to other places are followed");
}

#[cfg(target_os = "linux")]
#[test]
fn names_of_all_kinds_are_read() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let root = tempfile::tempdir().unwrap();
    let long = format!("{}.png", "n".repeat(251));
    for name in [&b"caf\xe9.png"[..], b"caf\xe8.png", "\u{e9}t\u{e9} 1.5.png".as_bytes(), b"a\nb.png", long.as_bytes()]
    {
        std::fs::write(root.path().join(OsStr::from_bytes(name)), png()).unwrap();
    }
    let below = root.path().join(OsStr::from_bytes(b"d\xff"));
    std::fs::create_dir(&below).unwrap();
    std::fs::write(below.join("1.png"), png()).unwrap();
    let dataset = DataConfig { classes_from_folders: Some(false), ..config(root.path()) }.open(None).unwrap();
    let keys = keys(&*dataset);
    assert_eq!(keys.len(), 6);
    for key in ["caf\\xe9.png", "caf\\xe8.png", "d\\xff/1.png", "\u{e9}t\u{e9} 1.5.png", &long] {
        assert!(keys.iter().any(|found| found == key), "{key} is not in {keys:?}");
    }
    assert!((0..6).all(|index| decodes(&*dataset, index)));
}

#[test]
fn what_is_there_and_not_read_is_said() {
    let root = tempfile::tempdir().unwrap();
    for name in ["a.parquet", "b.parquet", "c.zip", "d.heic", "README"] {
        put(root.path(), name, b"x");
    }
    let error = fails(root.path()).to_string();
    for part in ["contains no images", "2 .parquet", "1 .zip", "1 .heic", "1 without an ending"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(error.contains("TIFF") && error.contains(".tar.gz"), "{error}");
    put(root.path(), "1.png", &png());
    assert!(has(&*open(root.path()), &["left out files of other kinds (4): 1 .heic, 2 .parquet, 1 .zip"]));
    assert!(fails(&root.path().join("c.zip")).to_string().contains(".tar.gz"));
}

#[test]
fn texts_beside_images_are_their_captions() {
    let root = images(&["0.png", "1.5.png", "2.png", "3.png"]);
    put(root.path(), "0.txt", "\u{feff}a caf\u{e9}\n".as_bytes());
    put(root.path(), "1.5.txt", b"half");
    put(root.path(), "2.txt", b"  \n");
    put(root.path(), "notes.txt", b"x");
    let dataset = open(root.path());
    let captions: Vec<Option<String>> = (0..4).map(|index| dataset.about(index).unwrap().text).collect();
    assert_eq!(captions, [Some("a caf\u{e9}".to_string()), Some("half".into()), None, None]);
    assert!(has(&*dataset, &["3 of 4 images have a caption", "--require-caption"]), "{:?}", dataset.warnings());
    let captioned = DataConfig { require_caption: true, ..config(root.path()) }.open(None).unwrap();
    assert_eq!(keys(&*captioned), ["0.png", "1.5.png"]);
    assert!(has(&*captioned, &["left out images without a caption (2)"]), "{:?}", captioned.warnings());
    let field = datasets::open(root.path(), None, Some("title")).map(|_| ()).unwrap_err().to_string();
    assert!(field.contains("no image has a text in the field `title`"), "{field}");

    put(root.path(), "3.txt", &vec![b'x'; (64 << 10) + 1]);
    let dataset = open(root.path());
    assert_eq!(dataset.len(), 3);
    assert!(has(&*dataset, &["images whose captions have more than 64 KiB (1)", "3.png"]));
}

#[test]
fn metadata_with_marks_and_old_line_ends_is_read() {
    let jsonl = "{\"file_name\": \"1.png\", \"text\": \"one\"}\n{\"file_name\": \"2.png\", \"text\": null}\n";
    let csv = "file_name,text\n1.png,\"one, \"\"1\"\"\"\n2.png,two\n";
    for (name, text) in [("metadata.jsonl", jsonl), ("metadata.csv", csv)] {
        for (mark, end) in [("", "\n"), ("\u{feff}", "\r\n"), ("\u{feff}", "\r")] {
            let root = images(&["1.png", "2.png"]);
            put(root.path(), name, format!("{mark}{}", text.replace('\n', end)).as_bytes());
            let dataset = open(root.path());
            assert_eq!(keys(&*dataset), ["1.png", "2.png"], "{name} {end:?}");
            assert!(dataset.about(0).unwrap().text.is_some_and(|text| text.starts_with("one")));
        }
    }
    let root = images(&["1.png", "2.png"]);
    put(root.path(), "metadata.jsonl", jsonl.as_bytes());
    assert!(has(&*open(root.path()), &["1 of 2 images have a caption"]));
    let captioned = DataConfig { require_caption: true, limit: Some(5), ..config(root.path()) }.open(None).unwrap();
    assert_eq!(keys(&*captioned), ["1.png"]);
    put(root.path(), "metadata.jsonl", b"{\"file_name\": \"1.png\"}");
    let none = DataConfig { require_caption: true, ..config(root.path()) }.open(None).map(|_| ()).unwrap_err();
    assert!(none.to_string().contains("none of its 1 images has a caption"), "{none}");
}

#[test]
fn damaged_tables_are_errors_with_a_line() {
    for (csv, place) in [
        ("file_name,text\n1.png,\"open\n2.png,two\n3.png,three\n", "line 2: the quote that opens here is not closed"),
        (
            "file_name,text\n1.png,one\n2.png,\"open\n3.png,\"three\"\n",
            "line 3: the quote that opens here is closed in line 4",
        ),
        ("file_name,text\n1.png,one,more\n", "line: 2"),
        ("file_name,text\n1.png\n", "line: 2"),
    ] {
        let root = images(&["1.png", "2.png", "3.png"]);
        put(root.path(), "metadata.csv", csv.as_bytes());
        let error = fails(root.path()).to_string();
        assert!(error.contains(place), "{place}: {error}");
    }
}

#[test]
fn rows_without_a_file_and_rows_that_repeat_are_named() {
    let root = images(&["1.png"]);
    let rows = ["1.png", "gone.png", "1.png"].map(|name| format!("{{\"file_name\": \"{name}\", \"text\": \"x\"}}\n"));
    put(root.path(), "metadata.jsonl", rows.concat().as_bytes());
    let dataset = open(root.path());
    assert_eq!(dataset.len(), 3);
    assert!(has(&*dataset, &["images that it lists are not there and will be skipped (1): gone.png"]));
    assert!(has(&*dataset, &["rows name an image that an earlier row names", "1.png"]));
}
