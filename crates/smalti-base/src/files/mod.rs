//! Files: regular ones are read, under limits; new ones appear whole or not at all; one process at a time holds a folder.

mod lock;
mod temporary;
mod write;

pub use lock::FolderLock;
pub use write::{create_folder, link_folder, must_be_writable, write_atomic, write_bytes, write_folder};

use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::{File, FileType};
use std::io::Read;
use std::path::Path;

/// Most bytes of a text file that is read as a whole: recipes, configurations, metadata.
pub const MOST_TEXT: u64 = 1 << 28;

/// Opens a regular file to read; a link to one is followed. Anything else could block for ever or never end.
///
/// # Errors
/// [`Error::Io`], or [`Error::Invalid`] for a folder, a named pipe, a socket or a device.
pub fn open(path: &Path) -> Result<File> {
    let failed = |e| Error::io("read", path, e);
    // Looked at first: to open a named pipe waits for somebody who writes.
    must_be_regular(path, std::fs::metadata(path).map_err(failed)?.file_type())?;
    let file = File::open(path).map_err(failed)?;
    must_be_regular(path, file.metadata().map_err(failed)?.file_type())?;
    Ok(file)
}

/// Reads a whole regular file.
///
/// # Errors
/// As [`open`].
pub fn read(path: &Path) -> Result<Vec<u8>> {
    read_at_most(path, u64::MAX)
}

/// Reads a whole regular file that may have at most so many bytes.
///
/// # Errors
/// As [`open`]; [`Error::Invalid`] for a larger file, of which no more than the limit was read.
pub fn read_at_most(path: &Path, most: u64) -> Result<Vec<u8>> {
    let file = open(path)?;
    let failed = |e| Error::io("read", path, e);
    let length = file.metadata().map_err(failed)?.len();
    let too_large = || Error::file(path, format!("the file has more than {most} bytes, the limit here"));
    if length > most {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    let room = usize::try_from(length).ok().and_then(|length| bytes.try_reserve_exact(length).ok());
    room.ok_or_else(|| Error::file(path, format!("its {length} bytes do not fit into memory")))?;
    // The file may grow while it is read.
    file.take(most.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > most { Err(too_large()) } else { Ok(bytes) }
}

/// Reads a whole text file of at most [`MOST_TEXT`] bytes. A byte order mark at its beginning is left out.
///
/// # Errors
/// As [`read_at_most`]; [`Error::Io`] if it is not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    let text = String::from_utf8(read_at_most(path, MOST_TEXT)?);
    let text = text.map_err(|e| Error::io("read", path, std::io::Error::new(std::io::ErrorKind::InvalidData, e)))?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_string).unwrap_or(text))
}

/// The SHA-256 of a file as 64 hexadecimal digits.
///
/// # Errors
/// As [`open`].
pub fn sha256_file(path: &Path) -> Result<String> {
    let mut file = open(path)?;
    sha256(|block| file.read(block)).map_err(|e| Error::io("read", path, e))
}

/// The SHA-256 of what `next` fills blocks with, until it has no more, as 64 hexadecimal digits.
///
/// # Errors
/// What `next` returns.
pub fn sha256(mut next: impl FnMut(&mut [u8]) -> std::io::Result<usize>) -> std::io::Result<String> {
    let mut hasher = Sha256::new();
    let mut block = vec![0u8; 1 << 20];
    loop {
        match next(&mut block)? {
            0 => return Ok(hex(&hasher.finalize())),
            n => hasher.update(&block[..n]),
        }
    }
}

/// The SHA-256 of bytes as 64 hexadecimal digits.
pub fn sha256_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn must_be_regular(path: &Path, kind: FileType) -> Result<()> {
    match kind.is_file() {
        true => Ok(()),
        false => Err(Error::file(path, format!("is {}; expected a regular file", describe(kind)))),
    }
}

#[cfg(unix)]
fn describe(kind: FileType) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    match kind {
        _ if kind.is_dir() => "a folder",
        _ if kind.is_fifo() => "a named pipe",
        _ if kind.is_socket() => "a socket",
        _ if kind.is_char_device() || kind.is_block_device() => "a device",
        _ => "no file",
    }
}

#[cfg(not(unix))]
fn describe(kind: FileType) -> &'static str {
    if kind.is_dir() { "a folder" } else { "no file" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sha256_of_abc() {
        assert_eq!(sha256_bytes(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn no_more_is_read_than_allowed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        write_bytes(&path, "\u{feff}abc".as_bytes()).unwrap();
        assert_eq!(read_text(&path).unwrap(), "abc");
        assert_eq!(read_at_most(&path, 6).unwrap().len(), 6);
        let refused = read_at_most(&path, 5).unwrap_err().to_string();
        assert!(refused.contains("more than 5 bytes"), "{refused}");
    }

    #[cfg(unix)]
    #[test]
    fn what_is_no_regular_file_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let linked = folder.path().join("zeros.png");
        std::os::unix::fs::symlink("/dev/zero", &linked).unwrap();
        for (path, what) in [(folder.path(), "a folder"), (&socket, "a socket"), (&linked, "a device")] {
            let refused = read(path).unwrap_err().to_string();
            assert!(refused.contains(&format!("is {what}; expected a regular file")), "{refused}");
        }
        let file = folder.path().join("file");
        write_bytes(&file, b"abc").unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert_eq!(read(&link).unwrap(), b"abc");
    }
}
