//! The bytes of a tar: a file, or what a gzip file unpacks to.

use smalti_base::{Error, Result, files};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Most bytes that a gzipped tar may unpack to.
const MOST_UNPACKED: u64 = 4 << 30;

/// A tar whose bytes can be read in any order.
#[derive(Debug)]
pub(super) struct Tar {
    pub(super) path: PathBuf,
    /// A file without a name, if the tar had to be unpacked. It is gone with the process.
    unpacked: Option<Arc<Mutex<File>>>,
}

impl Tar {
    /// Opens a tar; one that begins as a gzip file does is unpacked first. What was wrong with it goes to `warnings`.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] for what is no regular file or unpacks to too much.
    pub(super) fn open(path: &Path, warnings: &mut Vec<String>) -> Result<Self> {
        let mut file = files::open(path)?;
        let mut magic = [0; 2];
        let is_gzip = file.read_exact(&mut magic).is_ok() && magic == [0x1f, 0x8b];
        let unpacked = match is_gzip {
            true => Some(Arc::new(Mutex::new(unpack(path, file, warnings)?))),
            false => None,
        };
        Ok(Self { path: path.to_path_buf(), unpacked })
    }

    /// Its bytes from the beginning, and their number.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn reader(&self) -> Result<(File, u64)> {
        let failed = |e| Error::io("read", &self.path, e);
        let mut file = match &self.unpacked {
            None => files::open(&self.path)?,
            Some(file) => file.lock().unwrap_or_else(PoisonError::into_inner).try_clone().map_err(failed)?,
        };
        file.rewind().map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        Ok((file, length))
    }

    /// Fills `bytes` from a place on.
    pub(super) fn read_at(&self, start: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        let mut read = |file: &mut File| {
            file.seek(SeekFrom::Start(start))?;
            file.read_exact(bytes)
        };
        match &self.unpacked {
            // Opened for each read: a data set may have more tars than a process may have open files.
            None => read(&mut File::open(&self.path)?),
            Some(file) => read(&mut file.lock().unwrap_or_else(PoisonError::into_inner)),
        }
    }
}

/// A nameless file with what a gzip file holds; of one that is damaged, what comes before the damage.
fn unpack(path: &Path, mut packed: File, warnings: &mut Vec<String>) -> Result<File> {
    let failed = |e| Error::io("unpack", path, e);
    packed.rewind().map_err(failed)?;
    let mut unpacked = tempfile::tempfile().map_err(failed)?;
    let mut decoder = flate2::bufread::MultiGzDecoder::new(std::io::BufReader::new(packed));
    let (mut block, mut bytes) = (vec![0; 1 << 18], 0u64);
    loop {
        match decoder.read(&mut block) {
            Ok(0) => break,
            Ok(length) => {
                bytes += length as u64;
                if bytes > MOST_UNPACKED {
                    return Err(Error::invalid_hint(
                        path.display(),
                        format!("unpacks to more than {MOST_UNPACKED} bytes, the limit for a gzipped tar"),
                        "unpack it with gunzip: a .tar of any size can be read",
                    ));
                }
                unpacked.write_all(&block[..length]).map_err(failed)?;
            }
            Err(error) => {
                warnings.push(format!("{}: damaged or cut off after {bytes} unpacked bytes: {error}", path.display()));
                break;
            }
        }
    }
    Ok(unpacked)
}
