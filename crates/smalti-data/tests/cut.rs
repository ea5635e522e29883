//! Image files that are cut off or have holes are errors, never pictures with a grey rest.

#![allow(clippy::unwrap_used)]

use smalti_data::image::{EXTENSIONS, Limits, decode};
use std::path::Path;

fn read(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/decode").join(name)).unwrap()
}

fn error(bytes: &[u8], name: &str) -> Option<String> {
    decode(bytes, name, [255; 3], &Limits::default()).err().map(|error| error.to_string())
}

const JPEGS: [&str; 6] = ["plain.jpg", "grey_jpeg.jpg", "cmyk.jpg", "rotated.jpg", "progressive.jpg", "restarts.jpg"];

#[test]
fn a_jpeg_that_is_cut_anywhere_is_refused() {
    for name in JPEGS {
        let whole = read(name);
        assert_eq!(error(&whole, name), None);
        for length in 0..whole.len() {
            let error = error(&whole[..length], name).unwrap_or_else(|| panic!("{name} cut at {length} was read"));
            assert!(error.contains(name), "{error}");
        }
    }
    let error = error(&read("plain.jpg")[..1500], "plain.jpg").unwrap();
    assert!(error.contains("cut off in its pixels"), "{error}");
}

#[test]
fn what_follows_the_end_of_a_jpeg_does_not_count() {
    for name in JPEGS {
        let whole = read(name);
        let pixels = decode(&whole, name, [255; 3], &Limits::default()).unwrap();
        for rest in [&b"\0\0\0\0"[..], b"\xff\xd8\xff\xd9", b"some text", &whole] {
            let longer = [&whole, rest].concat();
            assert_eq!(decode(&longer, name, [255; 3], &Limits::default()).unwrap(), pixels, "{name}");
        }
    }
}

#[test]
fn a_jpeg_with_a_hole_is_refused() {
    for name in JPEGS {
        let whole = read(name);
        // A download that was given its full length and not its bytes.
        let mut zeros = whole.clone();
        zeros[whole.len() * 2 / 3..].fill(0);
        assert!(error(&zeros, name).is_some(), "{name} with zeros at its end was read");
        // One file breaks off where another begins.
        let two = [&whole[..whole.len() * 2 / 3], &whole].concat();
        assert!(error(&two, name).is_some(), "{name} that begins again was read");
    }
    let whole = read("restarts.jpg");
    let is_restart = |pair: &[u8]| pair[0] == 0xff && (0xd0..=0xd7).contains(&pair[1]);
    let restarts: Vec<usize> = (0..whole.len() - 1).filter(|&at| is_restart(&whole[at..at + 2])).collect();
    assert!(restarts.len() > 3);
    let mut missing = whole.clone();
    missing.drain(restarts[1]..restarts[3]);
    assert!(error(&missing, "x").unwrap().contains("restart markers"));
}

#[test]
fn other_kinds_that_are_cut_are_refused() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/decode");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let ending = name.rsplit('.').next().unwrap();
        if !EXTENSIONS.contains(&ending) || JPEGS.contains(&name.as_str()) {
            continue;
        }
        seen += 1;
        let whole = read(&name);
        let pixels = decode(&whole, &name, [255; 3], &Limits::default()).unwrap();
        for percent in 1..100 {
            let cut = &whole[..whole.len() * percent / 100];
            // What was cut may lie behind the pixels: then nothing is lost.
            match decode(cut, &name, [255; 3], &Limits::default()) {
                Ok(read) => assert_eq!(read, pixels, "{name} at {percent} %"),
                Err(error) => assert!(error.to_string().contains(&name), "{error}"),
            }
        }
    }
    assert!(seen > 20);
}
