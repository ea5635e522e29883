//! IDX files, the format of MNIST and Fashion-MNIST, plain or gzipped: big-endian header (0, 0, type 8, rank), sizes as u32, bytes.

use super::{About, Dataset, Source, past_end};
use crate::image::Limits;
use smalti_base::{Error, Result, files};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

/// Most bytes that a file may unpack to.
const LARGEST: u64 = 1 << 30;

/// Grey images of one size, in memory: at most 1 GiB.
#[derive(Clone, Debug)]
pub struct Idx {
    path: PathBuf,
    height: usize,
    width: usize,
    pixels: Vec<u8>,
    labels: Option<Vec<u8>>,
    classes: Vec<String>,
}

/// Whether a file's name is that of an IDX file with images: `...-images-idx3-ubyte`, perhaps `.gz`.
pub(super) fn is_images(path: &Path) -> bool {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    name.contains("-images") && name.contains("idx3-ubyte")
}

impl Idx {
    /// Opens a file of images, and the file of labels beside it if there is one.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] if a header is wrong, a file is damaged or has other bytes than its header says, an image has
    /// more pixels than any may have, or images and labels differ in number.
    pub fn open(images: &Path) -> Result<Self> {
        let (sizes, pixels) = read(images)?;
        let [count, height, width] = sizes[..] else {
            return Err(Error::file(images, format!("has {} dimensions; expected images, height, width", sizes.len())));
        };
        let most = Limits::default().pixels;
        if count > 0 && !(1..=most).contains(&(height as u64).saturating_mul(width as u64)) {
            return Err(Error::file(images, format!("images of {width}x{height} pixels; expected 1 to {most} pixels")));
        }
        let labels = match labels_beside(images) {
            None => None,
            Some(file) => {
                let (sizes, labels) = read(&file)?;
                if sizes.len() != 1 {
                    return Err(Error::file(
                        &file,
                        format!("has {} dimensions; expected labels in a row", sizes.len()),
                    ));
                }
                if labels.len() != count {
                    let problem = format!("{} labels for {count} images in {}", labels.len(), images.display());
                    return Err(Error::file(&file, problem));
                }
                Some(labels)
            }
        };
        let most = labels.iter().flatten().copied().max();
        let classes = most.map(|most| (0..=most).map(|n| n.to_string()).collect()).unwrap_or_default();
        Ok(Self { path: images.to_path_buf(), height, width, pixels, labels, classes })
    }
}

impl Dataset for Idx {
    fn kind(&self) -> &'static str {
        "idx"
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn len(&self) -> usize {
        self.pixels.len() / (self.height * self.width).max(1)
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn key(&self, index: usize) -> String {
        format!("{index:05}")
    }

    fn about(&self, index: usize) -> Result<About> {
        if index >= self.len() {
            return Err(past_end(&self.path, index, self.len()));
        }
        let label = self.labels.as_ref().and_then(|labels| labels.get(index).map(|&l| u32::from(l)));
        Ok(About { key: self.key(index), label, ..About::default() })
    }

    fn bytes(&self, _: usize) -> u64 {
        (self.height * self.width) as u64
    }

    fn source(&self, index: usize) -> Result<Source> {
        let area = self.height * self.width;
        let start = index.saturating_mul(area);
        match self.pixels.get(start..start.saturating_add(area)) {
            Some(pixels) => Ok(Source::Grey { width: self.width, height: self.height, pixels: pixels.to_vec() }),
            None => Err(past_end(&self.path, index, self.len())),
        }
    }
}

fn labels_beside(images: &Path) -> Option<PathBuf> {
    let name = images.file_name()?.to_string_lossy().replace("-images", "-labels").replace("idx3", "idx1");
    let plain = name.trim_end_matches(".gz").to_string();
    [name, plain.clone(), format!("{plain}.gz")]
        .map(|n| images.with_file_name(n))
        .into_iter()
        .find(|path| std::fs::symlink_metadata(path).is_ok())
}

/// Sizes and bytes of an IDX file, of which nothing is left over.
fn read(path: &Path) -> Result<(Vec<usize>, Vec<u8>)> {
    let failed = |e: std::io::Error| Error::io("read", path, e);
    let file = files::open(path)?;
    let packed = file.metadata().map_err(failed)?.len();
    let file = BufReader::new(file);
    let mut reader: Box<dyn Read> = match super::extension(path).as_str() {
        "gz" => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        _ => Box::new(file),
    };
    let mut magic = [0u8; 4];
    reader.read_exact(&mut magic).map_err(failed)?;
    let [0, 0, 8, rank @ 1..=3] = magic else {
        return Err(Error::file(
            path,
            format!("begins with {magic:?}; an IDX file of bytes begins with [0, 0, 8, rank]"),
        ));
    };
    let mut sizes = Vec::new();
    for _ in 0..rank {
        let mut size = [0u8; 4];
        reader.read_exact(&mut size).map_err(failed)?;
        sizes.push(u32::from_be_bytes(size) as usize);
    }
    let expected = sizes.iter().try_fold(1u64, |product, &size| product.checked_mul(size as u64));
    let Some(expected) = expected.filter(|&bytes| bytes <= LARGEST) else {
        return Err(Error::file(path, format!("sizes {sizes:?} are more than {LARGEST} bytes")));
    };
    // One byte of a gzip file gives at most 1032: more was promised than can be there, and no room is made for it.
    if expected > packed.saturating_mul(1032) {
        return Err(Error::file(
            path,
            format!("cut off: {packed} bytes cannot hold the {expected} of sizes {sizes:?}"),
        ));
    }
    let mut bytes = Vec::new();
    let room = bytes.try_reserve_exact(expected as usize);
    room.map_err(|_| Error::file(path, format!("{expected} bytes do not fit into memory")))?;
    reader.by_ref().take(expected).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 != expected {
        return Err(Error::file(path, format!("cut off: {} bytes of {expected} for sizes {sizes:?}", bytes.len())));
    }
    // At the end of a gzip file its checksum is compared.
    match reader.read(&mut [0]).map_err(failed)? {
        0 => Ok((sizes, bytes)),
        _ => Err(Error::file(
            path,
            format!("has more bytes than the {expected} that its header says, of sizes {sizes:?}"),
        )),
    }
}
