//! What of a mask says where to repaint.

#![allow(clippy::unwrap_used)]

use smalti_base::{Result, Rng};
use smalti_data::Image;
use smalti_data::image::{Limits, Mask, MaskChannel, decode_mask};

const SIDE: usize = 32;
const INSIDE: std::ops::Range<usize> = 10..20;

fn is_inside(at: usize) -> bool {
    INSIDE.contains(&(at % SIDE)) && INSIDE.contains(&(at / SIDE))
}

/// A PNG with this colour inside the box and that one around it.
fn mask(inside: [u8; 4], outside: [u8; 4]) -> Vec<u8> {
    pixels((0..SIDE * SIDE).map(|at| if is_inside(at) { inside } else { outside }))
}

fn pixels(pixels: impl Iterator<Item = [u8; 4]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, SIDE as u32, SIDE as u32);
    encoder.set_color(png::ColorType::Rgba);
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(&pixels.flatten().collect::<Vec<u8>>()).unwrap();
    writer.finish().unwrap();
    bytes
}

fn read(bytes: &[u8], image: Option<&Image>, channel: Option<MaskChannel>) -> Result<Mask> {
    decode_mask(bytes, "mask.png", &Limits::default(), image, channel)
}

/// Whether exactly the box is repainted.
fn is_box(mask: &Mask) -> bool {
    mask.repaint.iter().enumerate().all(|(at, repaint)| *repaint == is_inside(at))
}

const WHITE: [u8; 4] = [255; 4];
const BLACK: [u8; 4] = [0, 0, 0, 255];
const CLEAR: [u8; 4] = [0; 4];
const CLEAR_WHITE: [u8; 4] = [255, 255, 255, 0];
const RED: [u8; 4] = [220, 30, 30, 255];
const GREY: [u8; 4] = [128, 128, 128, 255];

fn photograph() -> Image {
    let mut stream = Rng::new(5).stream(0, 0);
    let pixels = (0..SIDE * SIDE * 3).map(|_| stream.below(256) as u8).collect();
    Image::new(SIDE, SIDE, pixels).unwrap()
}

fn erased(image: &Image) -> Vec<u8> {
    let own = image.pixels.as_chunks::<3>().0;
    pixels((0..SIDE * SIDE).map(|at| match is_inside(at) {
        true => CLEAR_WHITE,
        false => [own[at][0], own[at][1], own[at][2], 255],
    }))
}

#[test]
fn light_pixels_of_drawn_masks_are_repainted() {
    for outside in [BLACK, CLEAR, CLEAR_WHITE] {
        assert!(is_box(&read(&mask(WHITE, outside), None, None).unwrap()), "white on {outside:?}");
    }
    // One transparent pixel, wherever it is, changes nothing but itself.
    for hole in [0, SIDE * SIDE - 1, 15 * SIDE + 15] {
        let with_hole = pixels((0..SIDE * SIDE).map(|at| match (at == hole, is_inside(at)) {
            (true, _) => CLEAR_WHITE,
            (_, true) => WHITE,
            (_, false) => BLACK,
        }));
        let read = read(&with_hole, None, None).unwrap();
        assert!(read.repaint.iter().enumerate().all(|(at, repaint)| *repaint == (is_inside(at) && at != hole)));
    }
}

#[test]
fn holes_of_pictures_are_repainted() {
    let image = photograph();
    assert!(is_box(&read(&erased(&image), None, None).unwrap()));
    for colour in [[255; 3], [0; 3], [90, 120, 150], [128; 3]] {
        let plain = Image::filled(SIDE, SIDE, colour);
        assert!(is_box(&read(&erased(&plain), Some(&plain), None).unwrap()), "a copy of {colour:?}");
    }
}

#[test]
fn what_can_be_read_in_two_ways_is_refused_until_it_is_said() {
    let image = photograph();
    let both = [mask(CLEAR, BLACK), mask(BLACK, CLEAR), mask(RED, CLEAR), mask(GREY, CLEAR), mask(CLEAR, CLEAR)];
    for bytes in both {
        let error = read(&bytes, Some(&image), None).unwrap_err().to_string();
        assert!(error.contains("mask.png") && error.contains("two ways"), "{error}");
        assert!(error.contains("--mask-channel alpha") && error.contains("--mask-channel light"), "{error}");
    }
    assert!(is_box(&read(&mask(CLEAR, BLACK), None, Some(MaskChannel::Alpha)).unwrap()));
    assert!(is_box(&read(&mask(CLEAR, WHITE), None, Some(MaskChannel::Alpha)).unwrap()));
    assert!(is_box(&read(&mask(GREY, CLEAR), None, Some(MaskChannel::Light)).unwrap()));
    let none = read(&mask(CLEAR_WHITE, BLACK), None, Some(MaskChannel::Light)).unwrap();
    assert!(!none.repaint.contains(&true), "what cannot be seen is not light");
}
