//! Reading and writing images, against what Pillow reads.

#![allow(clippy::unwrap_used)]

use smalti_base::{Planes, Rng};
use smalti_data::Image;
use smalti_data::image::{self, Limits, Mask, decode, decode_mask, encode_png, grid};
use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/decode")
}

fn read(name: &str, background: [u8; 3]) -> Image {
    image::open(&folder().join(name), background, &Limits::default()).unwrap()
}

fn noise(width: usize, height: usize, seed: u64) -> Image {
    let mut stream = Rng::new(seed).stream(0, 0);
    let pixels = (0..width * height * 3).map(|_| stream.below(256) as u8).collect();
    Image::new(width, height, pixels).unwrap()
}

#[test]
fn every_kind_is_read_as_pillow_reads_it() {
    let cases = std::fs::read_to_string(folder().join("cases.json")).unwrap();
    let cases: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&cases).unwrap();
    assert!(cases.len() >= 15);
    for (name, case) in cases {
        let background = serde_json::from_value(case["background"].clone()).unwrap();
        let found = read(&name, background);
        let stem = name.split('.').next().unwrap();
        let expected = read(&format!("{stem}.expected.png"), [0; 3]);
        assert_eq!((found.width, found.height), (expected.width, expected.height), "{name}");
        let worst = found.pixels.iter().zip(&expected.pixels).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(u64::from(worst) <= case["tolerance"].as_u64().unwrap(), "{name}: differs by {worst}");
    }
}

#[test]
fn limits_hold_before_pixels_are_read() {
    let bytes = encode_png(&noise(100, 50, 1), None).unwrap();
    let small = Limits { pixels: 4999, ..Limits::default() };
    let error = decode(&bytes, "a/b.png", [0; 3], &small).unwrap_err().to_string();
    assert!(error.contains("a/b.png: 100x50 is 5000 pixels, the limit is 4999"), "{error}");
    let short = Limits { bytes: 100, ..Limits::default() };
    assert!(decode(&bytes, "b", [0; 3], &short).unwrap_err().to_string().contains("the limit is 100"));
    // A header that promises 60000x60000 pixels costs nothing.
    let mut bomb = bytes.clone();
    bomb[16..24].copy_from_slice(&[0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60]);
    let crc = flate2_crc(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&crc.to_be_bytes());
    let error = decode(&bomb, "bomb", [0; 3], &Limits::default()).unwrap_err().to_string();
    assert!(error.contains("60000x60000 is 3600000000 pixels"), "{error}");
    for (bytes, what) in
        [(&b""[..], "empty"), (b"hello, world, hello", "not an image"), (&bytes[..200], "cannot be decoded")]
    {
        let error = decode(bytes, "x", [0; 3], &Limits::default()).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
}

fn flate2_crc(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

#[test]
fn signed_planes_and_levels_are_inverse() {
    let image = noise(9, 5, 2);
    let planes = image.to_signed();
    assert_eq!(planes[0], f32::from(image.pixels[0]) / 127.5 - 1.0);
    assert_eq!(planes[2 * 45 + 44], f32::from(image.pixels[44 * 3 + 2]) / 127.5 - 1.0);
    assert_eq!(Image::from_signed(&planes, 9, 5).unwrap(), image);
    let odd = Image::from_signed(&[-7.0, f32::NAN, 3.0], 1, 1).unwrap();
    assert_eq!(odd.pixels, [0, 0, 255]);
    assert!(Image::from_signed(&planes, 9, 6).is_err());
    assert!(Image::new(0, 0, Vec::new()).is_err());
    assert!(Image::new(usize::MAX, 2, Vec::new()).is_err());
}

#[test]
fn colours_become_grey_and_grey_stays_grey() {
    let colours = Image::new(2, 2, vec![255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9]).unwrap();
    let plane = colours.planes(Planes::Grey).unwrap();
    // The levels of PIL's `convert("L")`.
    assert_eq!(plane, [76, 150, 29, 9].map(|level| level as f32 / 127.5 - 1.0));
    assert_eq!(colours.planes(Planes::Colour).unwrap(), colours.to_signed());
    assert!(Planes::of_channels(2).unwrap_err().to_string().contains("2 channels"));
    let grey = Image::from_signed(&plane, 2, 2).unwrap();
    assert!(grey.grey && grey.flipped().grey && grey.crop(0, 0, 1, 2).unwrap().grey);
    assert_eq!(grey.pixels[..3], [76; 3]);
    assert_eq!(grey.planes(Planes::Grey).unwrap(), plane);
    assert!(grid(&[grey.clone(), grey.clone()], 2, 1).unwrap().grey);
    assert!(!grid(&[grey.clone(), colours], 2, 1).unwrap().grey);
    // Byte 25 of a PNG file is its colour type: 0 is grey.
    let bytes = encode_png(&grey, None).unwrap();
    assert_eq!(bytes[25], 0);
    let read = decode(&bytes, "grey.png", [0; 3], &Limits::default()).unwrap();
    assert_eq!(read.pixels, grey.pixels);
}

#[test]
fn a_png_carries_its_parameters() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("heart.png");
    let image = noise(7, 6, 3);
    let parameters = serde_json::json!({"prompt": "un cœur rouge ❤", "seed": 7});
    image::save_png(&path, &image, Some(&parameters)).unwrap();
    assert_eq!(image::open(&path, [0; 3], &Limits::default()).unwrap(), image);
    assert_eq!(image::read_parameters(&path).unwrap(), Some(parameters));
    image::save_png(&path, &image, None).unwrap();
    assert_eq!(image::read_parameters(&path).unwrap(), None);
    assert!(image::parameters(b"no", "x").is_err());
    assert!(image::save_png(&folder.path().join("none/x.png"), &image, None).is_err());
}

#[test]
fn white_or_transparent_is_repainted() {
    let levels = |levels: [u8; 4]| Image::new(2, 2, levels.iter().flat_map(|&l| [l; 3]).collect()).unwrap();
    let bytes = encode_png(&levels([255, 0, 200, 90]), None).unwrap();
    let mask = decode_mask(&bytes, "mask", &Limits::default(), None, None).unwrap();
    assert_eq!(mask.repaint, [true, false, true, false]);
    // In an erased photograph only the holes count, however light the rest is.
    let bytes = std::fs::read(folder().join("rgba.png")).unwrap();
    let erased = decode_mask(&bytes, "mask", &Limits::default(), None, None).unwrap();
    assert!(erased.repaint[0] && !erased.repaint[10 * 28 + 14]);
    assert!(
        decode_mask(b"x", "mask.png", &Limits::default(), None, None).unwrap_err().to_string().contains("mask.png")
    );
}

#[test]
fn a_token_is_repainted_if_any_pixel_of_it_is() {
    let mut repaint = vec![false; 64];
    repaint[3 * 8 + 4] = true;
    let mask = Mask::new(8, 8, repaint).unwrap();
    assert_eq!(mask.on_grid(2, 2), [false, true, false, false]);
    // Columns 2..6 and rows 2..6 are under the middle cell of three.
    assert_eq!(mask.on_grid(3, 3).iter().position(|&cell| cell), Some(4));
    assert_eq!(mask.on_grid(16, 16).iter().filter(|&&cell| cell).count(), 4);
    assert!(Mask::new(3, 3, vec![true; 8]).is_err());
}

#[test]
fn a_sheet_shows_each_image_once() {
    let images: Vec<Image> = (0..5).map(|seed| noise(4 + seed as usize % 2, 3, seed)).collect();
    let sheet = grid(&images, 3, 2).unwrap();
    assert_eq!((sheet.width, sheet.height), (3 * 7 + 2, 2 * 5 + 2));
    for (at, image) in images.iter().enumerate() {
        let part = sheet.crop(2 + at % 3 * 7, 2 + at / 3 * 5, image.width, 3).unwrap();
        assert_eq!(part, *image);
    }
    assert_eq!(sheet.pixels[..3], [255; 3]);
    assert!(grid(&[], 3, 2).is_err() && grid(&images, 0, 2).is_err() && grid(&images, 3, usize::MAX).is_err());
}

/// A PNG with a palette, its indices packed into `depth` bits.
fn with_palette(width: u32, labels: &[u8], depth: png::BitDepth) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, labels.len() as u32 / width);
    encoder.set_color(png::ColorType::Indexed);
    encoder.set_depth(depth);
    // Many indices have the same colour, which must not matter.
    encoder.set_palette([9, 9, 9].repeat(1 << depth as u8));
    let per_byte = 8 / depth as usize;
    let pack = |some: &[u8]| {
        (0..per_byte).fold(0u8, |byte, i| (byte << (depth as u8 % 8)) | some.get(i).copied().unwrap_or(0))
    };
    let packed: Vec<u8> = labels.chunks(width as usize).flat_map(|row| row.chunks(per_byte).map(pack)).collect();
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(&packed).unwrap();
    writer.finish().unwrap();
    bytes
}

#[test]
fn label_maps_are_grey_levels_or_indices_of_a_palette() {
    let labels = |bytes: &[u8]| image::decode_labels(bytes, "map", &Limits::default());
    for (depth, classes) in
        [(png::BitDepth::One, 2), (png::BitDepth::Two, 4), (png::BitDepth::Four, 16), (png::BitDepth::Eight, 256)]
    {
        let wanted: Vec<u8> = (0..7 * 5usize).map(|i| (i * i * 3 % classes) as u8).collect();
        let map = labels(&with_palette(7, &wanted, depth)).unwrap();
        assert_eq!((map.width, map.height, map.labels().collect::<Vec<_>>()), (7, 5, wanted));
    }
    let map = Image { grey: true, ..Image::new(2, 1, vec![7, 7, 7, 200, 200, 200]).unwrap() };
    let grey = encode_png(&map, None).unwrap();
    assert_eq!(labels(&grey).unwrap(), map);
    let colours = encode_png(&noise(4, 4, 1), None).unwrap();
    assert!(labels(&colours).unwrap_err().to_string().contains("is not a label map"));
    let mut cut = with_palette(7, &[1; 35], png::BitDepth::Eight);
    cut.truncate(cut.len() / 2);
    assert!(labels(&cut).is_err());

    let kind = Planes::Labels { classes: 201, shift: 0 };
    let values = map.planes(kind).unwrap();
    assert_eq!(values, [7.0, 200.0]);
    assert_eq!(Image::from_planes(kind, &values, 2, 1).unwrap(), map);
    assert!(
        map.planes(Planes::Labels { classes: 200, shift: 0 })
            .unwrap_err()
            .to_string()
            .contains("label 200 is not in 0..200")
    );
    // 255 goes on to 0, and back.
    let kind = Planes::Labels { classes: 3, shift: 1 };
    let map = Image { grey: true, ..Image::new(3, 1, vec![0, 0, 0, 1, 1, 1, 255, 255, 255]).unwrap() };
    assert_eq!(map.planes(kind).unwrap(), [1.0, 2.0, 0.0]);
    assert_eq!(Image::from_planes(kind, &[1.0, 2.0, 0.0], 3, 1).unwrap(), map);
    let outside = Planes::Labels { classes: 2, shift: 1 };
    assert!(map.planes(outside).unwrap_err().to_string().contains("label 1, shifted by 1, is not in 0..2"));
    let all = Image::new(256, 1, (0..=255u8).flat_map(|label| [label; 3]).collect()).unwrap().visible(kind);
    let mut colours: Vec<_> = all.pixels.chunks(3).collect();
    assert_eq!(colours[..4], [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]);
    colours.sort_unstable();
    colours.dedup();
    assert_eq!(colours.len(), 256);
}
