//! Packs a folder with `metadata.jsonl` into one WebDataset tar of small images with transparency.
//!
//! ```text
//! cargo run --release -p smalti-data --example pack_webdataset -- FOLDER OUTPUT.tar SIZE [BITS]
//! ```
//!
//! Each line of `metadata.jsonl` becomes `KEY.png` (RGBA, SIZE x SIZE) and `KEY.json` (text, label, sublabel, keywords).
//! Images are resized with premultiplied alpha, then each channel is rounded to BITS bits (6 unless given: an error of at
//! most 2 levels of 255, and files a third smaller). A name that is listed twice is packed once. The same input gives the same bytes.

use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer, images::Image};
use image::{ExtendedColorType, ImageEncoder, codecs::png};
use serde_json::{Map, Value};
use std::collections::HashSet;
use std::error::Error;
use std::path::Path;

const FIELDS: [&str; 4] = ["text", "label", "sublabel", "keywords"];

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (folder, output, size, bits) = match arguments.as_slice() {
        [folder, output, size] => (folder, output, size.parse()?, 6),
        [folder, output, size, bits] => (folder, output, size.parse()?, bits.parse()?),
        _ => return Err("usage: pack_webdataset FOLDER OUTPUT.tar SIZE [BITS]".into()),
    };
    if !(1..=8).contains(&bits) {
        return Err("BITS must be 1 to 8".into());
    }
    let folder = Path::new(folder);
    let metadata = std::fs::read_to_string(folder.join("metadata.jsonl"))?;
    let mut archive = tar::Builder::new(Vec::new());
    let mut keys = HashSet::new();
    for line in metadata.lines() {
        let record: Map<String, Value> = serde_json::from_str(line)?;
        let name = record.get("file_name").and_then(Value::as_str).ok_or("a line without file_name")?;
        let key = Path::new(name).file_stem().ok_or("a file_name without a name")?.to_string_lossy().replace('.', "_");
        if !keys.insert(key.clone()) {
            continue;
        }
        let rgba = image::open(folder.join(name))?.to_rgba8();
        append(&mut archive, &format!("{key}.png"), &png(&round(shrink(rgba, size)?, bits), size)?)?;
        let kept: Map<String, Value> =
            FIELDS.iter().filter_map(|f| record.get(*f).map(|v| (f.to_string(), v.clone()))).collect();
        append(&mut archive, &format!("{key}.json"), &serde_json::to_vec(&kept)?)?;
    }
    let bytes = archive.into_inner()?;
    std::fs::write(output, &bytes)?;
    println!("{} images, {} bytes: {output}", keys.len(), bytes.len());
    Ok(())
}

/// Resizes to `size` x `size`. A picture that is not square is centred in a transparent square first.
fn shrink(rgba: image::RgbaImage, size: u32) -> Result<Vec<u8>, Box<dyn Error>> {
    let side = rgba.width().max(rgba.height());
    let mut square = image::RgbaImage::new(side, side);
    let (left, top) = ((side - rgba.width()) / 2, (side - rgba.height()) / 2);
    image::imageops::replace(&mut square, &rgba, i64::from(left), i64::from(top));
    let source = Image::from_vec_u8(side, side, square.into_raw(), PixelType::U8x4)?;
    let mut small = Image::new(size, size, PixelType::U8x4);
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom)).use_alpha(true);
    Resizer::new().resize(&source, &mut small, &options)?;
    Ok(small.into_vec())
}

/// Rounds each channel to `bits` bits; 0 and 255 stay, and the colour under transparent pixels becomes 0.
fn round(mut rgba: Vec<u8>, bits: u32) -> Vec<u8> {
    let top = f32::from((1u16 << bits) - 1);
    for pixel in rgba.as_chunks_mut::<4>().0 {
        for value in pixel.iter_mut() {
            let level = (f32::from(*value) / 255.0 * top).round();
            *value = (level / top * 255.0).round() as u8;
        }
        if pixel[3] == 0 {
            *pixel = [0; 4];
        }
    }
    rgba
}

/// The smallest PNG among the row filters.
fn png(rgba: &[u8], size: u32) -> Result<Vec<u8>, Box<dyn Error>> {
    use png::FilterType::{Adaptive, Avg, NoFilter, Paeth, Sub, Up};
    let mut best: Option<Vec<u8>> = None;
    for filter in [Adaptive, NoFilter, Sub, Up, Avg, Paeth] {
        let mut bytes = Vec::new();
        png::PngEncoder::new_with_quality(&mut bytes, png::CompressionType::Best, filter).write_image(
            rgba,
            size,
            size,
            ExtendedColorType::Rgba8,
        )?;
        if best.as_ref().is_none_or(|b| bytes.len() < b.len()) {
            best = Some(bytes);
        }
    }
    Ok(best.unwrap_or_default())
}

/// One member, with the fixed owner, mode and time that make the tar reproducible.
fn append(archive: &mut tar::Builder<Vec<u8>>, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    archive.append_data(&mut header, name, bytes)
}
