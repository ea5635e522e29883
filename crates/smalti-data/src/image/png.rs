//! PNG files that carry the parameters they were made with.

use super::Image;
use smalti_base::{Error, Result, files};
use std::io::Cursor;
use std::path::Path;

const KEYWORD: &str = "parameters";
/// Most bytes of a text chunk that is read back.
const TEXT_LIMIT: usize = 16 << 20;

/// An image as PNG, with one channel if it is grey. `parameters`, if given, go into an iTXt chunk with the keyword `parameters`.
///
/// # Errors
/// [`Error::Invalid`] if the image's size and pixels disagree.
pub fn encode_png(image: &Image, parameters: Option<&serde_json::Value>) -> Result<Vec<u8>> {
    image.check()?;
    let failed = |e: ::png::EncodingError| Error::invalid("PNG", e.to_string());
    let side = |n: usize| u32::try_from(n).map_err(|_| Error::invalid("PNG", format!("a side of {n} pixels")));
    let mut bytes = Vec::new();
    let mut encoder = ::png::Encoder::new(&mut bytes, side(image.width)?, side(image.height)?);
    encoder.set_color(if image.grey { ::png::ColorType::Grayscale } else { ::png::ColorType::Rgb });
    encoder.set_depth(::png::BitDepth::Eight);
    if let Some(parameters) = parameters {
        encoder.add_itxt_chunk(KEYWORD.into(), parameters.to_string()).map_err(failed)?;
    }
    let mut writer = encoder.write_header().map_err(failed)?;
    match image.grey {
        true => writer.write_image_data(&image.pixels.iter().copied().step_by(3).collect::<Vec<u8>>()),
        false => writer.write_image_data(&image.pixels),
    }
    .map_err(failed)?;
    writer.finish().map_err(failed)?;
    Ok(bytes)
}

/// Writes [`encode_png`]'s bytes, whole or not at all.
///
/// # Errors
/// [`Error::Io`], or as [`encode_png`].
pub fn save_png(path: &Path, image: &Image, parameters: Option<&serde_json::Value>) -> Result<()> {
    files::write_bytes(path, &encode_png(image, parameters)?)
}

/// The parameters that a PNG file was made with, if it carries any.
///
/// # Errors
/// [`Error::Io`], or as [`parameters`].
pub fn read_parameters(path: &Path) -> Result<Option<serde_json::Value>> {
    parameters(&files::read(path)?, &path.display().to_string())
}

/// The JSON in a PNG's iTXt, zTXt or tEXt chunk `parameters`; text that is not JSON comes back as a JSON string.
///
/// # Errors
/// [`Error::Invalid`] if the bytes are not a PNG; `name` is named in it.
pub fn parameters(bytes: &[u8], name: &str) -> Result<Option<serde_json::Value>> {
    let broken = |e: ::png::DecodingError| Error::invalid(name, format!("not a readable PNG: {e}"));
    let mut decoder = ::png::Decoder::new_with_limits(Cursor::new(bytes), ::png::Limits { bytes: TEXT_LIMIT });
    decoder.set_ignore_text_chunk(false);
    let mut reader = decoder.read_info().map_err(broken)?;
    if text(reader.info()).is_none() {
        // The chunk may also come after the pixels.
        reader.finish().map_err(broken)?;
    }
    let json = |text: String| serde_json::from_str(&text).unwrap_or(serde_json::Value::String(text));
    Ok(text(reader.info()).map(json))
}

fn text(info: &::png::Info<'_>) -> Option<String> {
    let itxt = info.utf8_text.iter().find(|c| c.keyword == KEYWORD).and_then(|c| {
        let mut chunk = c.clone();
        chunk.decompress_text_with_limit(TEXT_LIMIT).ok()?;
        chunk.get_text().ok()
    });
    let ztxt = || {
        let mut chunk = info.compressed_latin1_text.iter().find(|c| c.keyword == KEYWORD)?.clone();
        chunk.decompress_text_with_limit(TEXT_LIMIT).ok()?;
        chunk.get_text().ok()
    };
    let plain = || info.uncompressed_latin1_text.iter().find(|c| c.keyword == KEYWORD).map(|c| c.text.clone());
    itxt.or_else(ztxt).or_else(plain)
}
