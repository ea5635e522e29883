//! Resizing against Pillow's, the other transforms against their definition.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use smalti_base::{Planes, Rng};
use smalti_data::Image;
use smalti_data::image::{Limits, open};
use smalti_data::transforms::{Filter, Pipeline, Transform, resize};
use std::path::Path;

/// An image whose pixels say where they are.
fn places(width: usize, height: usize) -> Image {
    let pixels = (0..height).flat_map(|y| (0..width).flat_map(move |x| [x as u8, y as u8, (x ^ y) as u8]));
    Image::new(width, height, pixels.collect()).unwrap()
}

fn list(json: &str) -> Vec<Transform> {
    serde_json::from_str(json).unwrap()
}

fn apply(json: &str, image: Image, image_number: u64) -> Image {
    Pipeline::new(list(json)).unwrap().image(image, &mut Rng::new(0).stream(image_number, 0)).unwrap()
}

#[test]
fn resizing_is_pillows_within_one_level() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/resize");
    let read = |name: String| open(&folder.join(name), [0; 3], &Limits::default()).unwrap();
    let source = read("source.png".into());
    let filters = [
        ("box", Filter::Box),
        ("bilinear", Filter::Bilinear),
        ("bicubic", Filter::Bicubic),
        ("lanczos", Filter::Lanczos),
    ];
    for (name, filter) in filters {
        for (width, height) in [(13, 9), (48, 48), (97, 32), (120, 80)] {
            let expected = read(format!("{name}-{width}x{height}.png"));
            let found = resize(&source, (height, width), filter).unwrap();
            let differences: Vec<u8> = found.pixels.iter().zip(&expected.pixels).map(|(a, b)| a.abs_diff(*b)).collect();
            let worst = differences.iter().max().unwrap();
            assert!(*worst <= 1, "{name} to {width}x{height}: differs by {worst}");
            let count = differences.iter().filter(|&&difference| difference > 0).count();
            assert!(count * 1000 <= differences.len().max(1000), "{name} to {width}x{height}: {count} values differ");
        }
    }
}

#[test]
fn crops_are_where_they_should_be() {
    let middle = apply(r#"[{"kind": "center_crop", "size": [3, 4]}, {"kind": "to_signed"}]"#, places(9, 8), 0);
    assert_eq!(middle, places(9, 8).crop(2, 2, 4, 3).unwrap());
    let short = apply(r#"[{"kind": "resize_short", "size": 20}, {"kind": "to_signed"}]"#, places(97, 64), 0);
    // torchvision: int(20 * 97 / 64).
    assert_eq!((short.width, short.height), (30, 20));
    let flipped = apply(r#"[{"kind": "flip", "p": 1.0}, {"kind": "to_signed"}]"#, places(5, 2), 0);
    assert_eq!(flipped.pixels[..6], [4, 0, 4, 3, 0, 3]);
    let mut corners = [[0usize; 6]; 3];
    for number in 0..3000 {
        let part = apply(r#"[{"kind": "random_crop", "size": [6, 5]}, {"kind": "to_signed"}]"#, places(10, 8), number);
        let (left, top) = (part.pixels[0] as usize, part.pixels[1] as usize);
        assert_eq!(part, places(10, 8).crop(left, top, 5, 6).unwrap());
        corners[top][left] += 1;
    }
    // 18 places, 167 each: five standard deviations are 63.
    assert!(corners.iter().flatten().all(|&n| (100..235).contains(&n)), "{corners:?}");
    let flips =
        (0..2000).filter(|&n| apply(r#"[{"kind": "flip"}, {"kind": "to_signed"}]"#, places(5, 2), n).pixels[0] == 4);
    assert!((888..1112).contains(&flips.count()));
}

#[test]
fn lists_are_checked() {
    let error = |json: &str| Pipeline::new(list(json)).unwrap_err().to_string();
    for json in [
        r#"[]"#,
        r#"[{"kind": "flip"}]"#,
        r#"[{"kind": "to_signed"}, {"kind": "flip"}]"#,
        r#"[{"kind": "to_signed"}, {"kind": "to_signed"}]"#,
    ] {
        assert!(error(json).contains("to_signed"), "{json}");
    }
    for bad in [
        r#"{"kind": "center_crop", "size": 0}"#,
        r#"{"kind": "resize", "size": [64, 99999]}"#,
        r#"{"kind": "flip", "p": 1.5}"#,
        r#"{"kind": "random_resized_crop", "size": 8, "scale": [0.5, 0.1]}"#,
        r#"{"kind": "random_resized_crop", "size": 8, "ratio": [0, 1]}"#,
    ] {
        assert!(error(&format!(r#"[{bad}, {{"kind": "to_signed"}}]"#)).contains("transforms"), "{bad}");
    }
    for unknown in [r#"[{"kind": "flop"}]"#, r#"[{"kind": "flip", "q": 1}]"#, r#"[{"kind": "to_signed", "x": 1}]"#] {
        assert!(serde_json::from_str::<Vec<Transform>>(unknown).is_err(), "{unknown}");
    }
    let fixed = |json: &str| Pipeline::new(list(json)).unwrap().size();
    assert_eq!(fixed(r#"[{"kind": "resize_short", "size": 8}, {"kind": "to_signed"}]"#), None);
    assert_eq!(fixed(r#"[{"kind": "resize", "size": [8, 9]}, {"kind": "to_signed"}]"#), Some((8, 9)));
    let small = Pipeline::new(Transform::center((4, 4), Planes::Colour)[1..].to_vec()).unwrap();
    assert!(resize(&Image::filled(1, 1 << 20, [0; 3]), (64, 1 << 10), Filter::Box).is_err());
    let error = small.image(places(3, 9), &mut Rng::new(0).stream(0, 0)).unwrap_err().to_string();
    assert!(error.contains("the image is 9x3, smaller than the crop of 4x4"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_image_gets_the_promised_size(width in 1usize..80, height in 1usize..80, out_w in 1usize..40, out_h in 1usize..40,
                                        low in 0.01f64..1.0, number in 0u64..99) {
        let random = Transform::RandomResizedCrop {
            size: smalti_data::transforms::Size::HeightWidth([out_h, out_w]),
            scale: [low, 1.0],
            ratio: [0.5, 2.0],
            filter: Filter::Bilinear,
        };
        for transforms in [vec![random, Transform::ToSigned {}], Transform::center((out_h, out_w), Planes::Colour)] {
            let pipeline = Pipeline::new(transforms).unwrap();
            let image = pipeline.image(places(width, height), &mut Rng::new(1).stream(number, 0)).unwrap();
            prop_assert_eq!(pipeline.size(), Some((image.height, image.width)));
            prop_assert_eq!((image.height, image.width), (out_h, out_w));
        }
    }

    #[test]
    fn resizing_one_colour_keeps_it(width in 1usize..50, height in 1usize..50, out_w in 1usize..50, out_h in 1usize..50, colour: [u8; 3]) {
        for filter in [Filter::Box, Filter::Bilinear, Filter::Bicubic, Filter::Lanczos] {
            let image = resize(&Image::filled(width, height, colour), (out_h, out_w), filter).unwrap();
            prop_assert_eq!(image, Image::filled(out_w, out_h, colour));
        }
    }
}

#[test]
fn labels_are_resized_as_pillow_resizes_by_the_nearest_pixel() {
    let map = Image::new(7, 5, (0..35u8).flat_map(|label| [label; 3]).collect()).unwrap();
    let labels = |height, width| resize(&map, (height, width), Filter::Nearest).unwrap().labels().collect::<Vec<u8>>();
    // Image.fromarray(...).resize((width, height), Image.NEAREST) of Pillow.
    assert_eq!(labels(4, 3), [1, 3, 5, 8, 10, 12, 22, 24, 26, 29, 31, 33]);
    assert_eq!(labels(5, 2), [1, 5, 8, 12, 15, 19, 22, 26, 29, 33]);
    assert_eq!(labels(3, 7)[7..14], [14, 15, 16, 17, 18, 19, 20]);
    assert_eq!(labels(8, 10)[20..30], [7, 8, 8, 9, 10, 10, 11, 12, 12, 13]);
}

#[test]
fn label_maps_are_never_mixed() {
    let pipeline = |json: &str| Pipeline::new(serde_json::from_str(json).unwrap()).unwrap();
    let (labels, colour) = (Planes::Labels { classes: 3, shift: 0 }, Planes::Colour);
    let mixing = pipeline(r#"[{"kind": "resize_short", "size": 8}, {"kind": "to_signed"}]"#);
    assert!(mixing.must_suit(labels).unwrap_err().to_string().contains("nearest"));
    assert!(mixing.must_suit(colour).is_ok());
}
