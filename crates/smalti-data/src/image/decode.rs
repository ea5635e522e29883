//! Image files to RGB, never past the limits.
//!
//! PNG (palette, grey, 16-bit and alpha too), JPEG, WebP, GIF, BMP and TIFF. Of an animation the first frame counts, of several pages
//! the first page. EXIF rotation is applied. 16-bit channels are rounded to 8. Transparency is composited on the background that the caller states.

use super::{Image, jpeg};
use ::image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Planes, Result, files};
use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// File name extensions that are taken for images, in lower case.
pub const EXTENSIONS: [&str; 8] = ["png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"];
/// The kinds of files that are read, for messages.
pub(crate) const KINDS: &str = "PNG, JPEG, WebP, GIF, BMP and TIFF can be read";
/// Memory that an image takes at most while it is decoded, for each pixel: the decoder's output, its own tables, and RGB.
const PER_PIXEL: u64 = 16;

/// What an image may cost. An image past a limit is an error before its pixels are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Most pixels of one image.
    pub pixels: u64,
    /// Most bytes of one image file.
    pub bytes: u64,
    /// Bytes that all images that are in work at once may take, counted before their pixels are read: 16 for each pixel, and once more
    /// as many for their files. One that needs more by itself is worked on alone.
    #[serde(skip_serializing_if = "is_usual")]
    pub memory: u64,
}

/// Left out where it is written, so that what was written before this setting reads the same.
fn is_usual(memory: &u64) -> bool {
    *memory == Limits::default().memory
}

impl Default for Limits {
    /// 64 million pixels, 256 MiB, and 1 GiB for all.
    fn default() -> Self {
        Self { pixels: 64_000_000, bytes: 256 << 20, memory: 1 << 30 }
    }
}

/// Bytes that decoding an image will take at most, as its header says; 0 if it cannot be decoded.
pub(crate) fn cost(bytes: &[u8]) -> u64 {
    let size = catch_unwind(AssertUnwindSafe(|| {
        ImageReader::new(Cursor::new(bytes)).with_guessed_format().ok()?.into_dimensions().ok()
    }));
    size.ok().flatten().map_or(0, |(width, height)| u64::from(width) * u64::from(height) * PER_PIXEL)
}

/// Reads an image file.
///
/// # Errors
/// [`Error::Io`], or as [`decode`].
pub fn open(path: &Path, background: [u8; 3], limits: &Limits) -> Result<Image> {
    open_as(Planes::Colour, path, background, limits)
}

/// Reads an image file as [`decode_as`] does.
///
/// # Errors
/// [`Error::Io`], or as [`decode_as`].
pub fn open_as(planes: Planes, path: &Path, background: [u8; 3], limits: &Limits) -> Result<Image> {
    decode_as(planes, &files::read_at_most(path, limits.bytes)?, &path.display().to_string(), background, limits)
}

/// Decodes an image of a kind; `name` (a path or key) is named in errors.
///
/// # Errors
/// As [`decode`] or [`decode_labels`].
pub fn decode_as(planes: Planes, bytes: &[u8], name: &str, background: [u8; 3], limits: &Limits) -> Result<Image> {
    match planes {
        Planes::Grey | Planes::Colour => decode(bytes, name, background, limits),
        Planes::Labels { .. } => decode_labels(bytes, name, limits),
    }
}

/// Decodes a label map, whose pixels are numbers of classes: a grey image, or a PNG with a palette, whose indices count and
/// whose colours do not.
///
/// # Errors
/// As [`decode`], and [`Error::Invalid`] for a picture in colours or with 16 bits.
pub fn decode_labels(bytes: &[u8], name: &str, limits: &Limits) -> Result<Image> {
    let labels = match palette_indices(bytes, name, limits)? {
        Some(labels) => labels,
        None => match decode_any(bytes, name, limits)? {
            DynamicImage::ImageLuma8(grey) => (grey.width() as usize, grey.height() as usize, grey.into_raw()),
            other => {
                let problem = format!("is not a label map: its pixels are {:?}", other.color());
                return Err(Error::invalid_hint(name, problem, "8-bit grey images and PNG with a palette can be read"));
            }
        },
    };
    let (width, height, labels) = labels;
    let pixels = labels.into_iter().flat_map(|label| [label; 3]).collect();
    Ok(Image { grey: true, ..Image::new(width, height, pixels)? })
}

/// Width, height and indices of a PNG with a palette; `None` for anything else.
fn palette_indices(bytes: &[u8], name: &str, limits: &Limits) -> Result<Option<(usize, usize, Vec<u8>)>> {
    let is_palette = bytes.starts_with(b"\x89PNG") && bytes.get(25) == Some(&3);
    if !is_palette {
        return Ok(None);
    }
    // The file is checked under the limits first.
    decode_any(bytes, name, limits)?;
    catch_unwind(AssertUnwindSafe(|| indices(bytes, name, limits))).unwrap_or_else(|_| Err(gave_up(name))).map(Some)
}

fn indices(bytes: &[u8], name: &str, limits: &Limits) -> Result<(usize, usize, Vec<u8>)> {
    let broken = |e: ::png::DecodingError| Error::invalid(name, format!("cannot be decoded: {e}"));
    let bytes_at_most = usize::try_from(memory(limits)).unwrap_or(usize::MAX);
    let mut decoder = ::png::Decoder::new_with_limits(Cursor::new(bytes), ::png::Limits { bytes: bytes_at_most });
    decoder.set_transformations(::png::Transformations::IDENTITY);
    let mut reader = decoder.read_info().map_err(broken)?;
    let mut packed = vec![0; reader.output_buffer_size().unwrap_or_default()];
    let info = reader.next_frame(&mut packed).map_err(broken)?;
    let (width, height, bits) = (info.width as usize, info.height as usize, info.bit_depth as usize);
    let mut indices = Vec::with_capacity(width * height);
    for row in packed.chunks_exact(info.line_size).take(height) {
        // Indices of less than 8 bits lie in bytes from the left.
        let index = |x: usize| row[x * bits / 8] >> (8 - bits - x * bits % 8) & (0xff >> (8 - bits));
        indices.extend((0..width).map(index));
    }
    Ok((width, height, indices))
}

/// Decodes an image; `name` (a path or key) is named in errors.
///
/// # Errors
/// [`Error::Invalid`] if the bytes are not an image of a known kind, are cut off or damaged, or pass a limit.
pub fn decode(bytes: &[u8], name: &str, background: [u8; 3], limits: &Limits) -> Result<Image> {
    let decoded = decode_any(bytes, name, limits)?;
    let (width, height) = (decoded.width() as usize, decoded.height() as usize);
    let pixels = match decoded.color().has_alpha() {
        false => decoded.into_rgb8().into_raw(),
        true => composite(&decoded.into_rgba8().into_raw(), background),
    };
    Image::new(width, height, pixels)
}

pub(super) fn decode_any(bytes: &[u8], name: &str, limits: &Limits) -> Result<DynamicImage> {
    check_bytes(bytes.len() as u64, name, limits)?;
    // The decoders are other people's code: a panic in one of them is a damaged image, not the end of the program.
    catch_unwind(AssertUnwindSafe(|| decode_bounded(bytes, name, limits))).unwrap_or_else(|_| Err(gave_up(name)))
}

fn gave_up(name: &str) -> Error {
    Error::invalid(name, "the image is damaged: its decoder gave up")
}

/// 8 bytes hold the widest pixel, RGBA with 16 bits; the rest is for the decoder's own tables.
fn memory(limits: &Limits) -> u64 {
    limits.pixels.saturating_mul(8).saturating_add(64 << 20)
}

fn decode_bounded(bytes: &[u8], name: &str, limits: &Limits) -> Result<DynamicImage> {
    let broken = |e: ::image::ImageError| Error::invalid(name, format!("cannot be decoded: {e}"));
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|e| Error::invalid(name, format!("cannot be decoded: {e}")))?;
    use ImageFormat::{Bmp, Gif, Jpeg, Png, Tiff, WebP};
    if !matches!(reader.format(), Some(Png | Jpeg | WebP | Gif | Bmp | Tiff)) {
        let what = if bytes.is_empty() { "the file is empty" } else { "not an image of a known kind" };
        return Err(Error::invalid_hint(name, what, KINDS));
    }
    if reader.format() == Some(Jpeg) {
        jpeg::must_be_whole(bytes).map_err(|problem| Error::invalid(name, problem))?;
    }
    let mut bounds = ::image::Limits::default();
    bounds.max_alloc = Some(memory(limits));
    reader.limits(bounds.clone());
    let mut decoder = reader.into_decoder().map_err(broken)?;
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels > limits.pixels {
        return Err(Error::invalid_hint(
            name,
            format!("{width}x{height} is {pixels} pixels, the limit is {}", limits.pixels),
            "raise `limits.pixels` if the image is meant to be that large",
        ));
    }
    if pixels == 0 {
        return Err(Error::invalid(name, format!("an image of {width}x{height} has no pixels")));
    }
    bounds.reserve(decoder.total_bytes()).map_err(broken)?;
    decoder.set_limits(bounds).map_err(broken)?;
    let orientation = decoder.orientation().unwrap_or(::image::metadata::Orientation::NoTransforms);
    let mut decoded = DynamicImage::from_decoder(decoder).map_err(broken)?;
    if matches!(decoded, DynamicImage::ImageRgb32F(_) | DynamicImage::ImageRgba32F(_)) {
        return Err(Error::invalid(name, "its pixels are floating-point numbers, whose range is not known"));
    }
    decoded.apply_orientation(orientation);
    Ok(decoded)
}

fn check_bytes(size: u64, name: &str, limits: &Limits) -> Result<()> {
    match size > limits.bytes {
        true => Err(Error::invalid(name, format!("the file has {size} bytes, the limit is {}", limits.bytes))),
        false => Ok(()),
    }
}

fn composite(rgba: &[u8], background: [u8; 3]) -> Vec<u8> {
    let mut rgb = Vec::with_capacity(rgba.len() / 4 * 3);
    for [colour @ .., alpha] in rgba.as_chunks::<4>().0 {
        let alpha = u32::from(*alpha);
        for (front, back) in colour.iter().zip(background) {
            let sum = u32::from(*front) * alpha + u32::from(back) * (255 - alpha);
            rgb.push(((sum + 127) / 255) as u8);
        }
    }
    rgb
}
