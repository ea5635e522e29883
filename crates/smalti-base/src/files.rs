//! Files that appear whole or not at all.

use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

/// Writes `path` through `fill`: to a temporary name beside it, flushed to disk, then renamed. If anything fails the old
/// file, if there was one, stays as it was and the temporary one is removed.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be written or the disk is full, or what `fill` returns.
pub fn write_atomic(path: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>) -> Result<()> {
    let temporary = temporary_beside(path);
    let written = (|| {
        let file = File::create(&temporary)?;
        let mut writer = BufWriter::new(file);
        fill(&mut writer)?;
        let file = writer.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        sync_folder(path)
    })();
    written.map_err(|source| {
        let _ = fs::remove_file(&temporary);
        Error::io("write", path, source)
    })
}

/// [`write_atomic`] for bytes that are already in memory.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic(path, |writer| writer.write_all(bytes))
}

/// Fills a new folder through `fill` and moves it to `path` in one step, in place of a folder that was there.
///
/// # Errors
/// What `fill` returns, or [`Error::Io`].
pub fn write_folder(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let temporary = temporary_beside(path);
    if temporary.exists() {
        fs::remove_dir_all(&temporary).map_err(|e| Error::io("remove", &temporary, e))?;
    }
    create_folder(&temporary)?;
    let moved = fill(&temporary).and_then(|()| {
        let old = path.with_extension(format!("old-{}", std::process::id()));
        let had_old = path.exists();
        if had_old {
            fs::rename(path, &old).map_err(|e| Error::io("replace", path, e))?;
        }
        fs::rename(&temporary, path).map_err(|e| Error::io("write", path, e))?;
        sync_folder(path).map_err(|e| Error::io("write", path, e))?;
        if had_old {
            fs::remove_dir_all(&old).map_err(|e| Error::io("remove", &old, e))?;
        }
        Ok(())
    });
    if moved.is_err() {
        let _ = fs::remove_dir_all(&temporary);
    }
    moved
}

/// Creates a folder and those above it; does nothing if it is there.
///
/// # Errors
/// [`Error::Io`].
pub fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| Error::io("create folder", path, e))
}

/// Reads a whole file.
///
/// # Errors
/// [`Error::Io`].
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| Error::io("read", path, e))
}

/// Reads a whole text file.
///
/// # Errors
/// [`Error::Io`], also if it is not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| Error::io("read", path, e))
}

/// The SHA-256 of a file as 64 hexadecimal digits.
///
/// # Errors
/// [`Error::Io`].
pub fn sha256_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(|e| Error::io("read", path, e))?;
    let mut hasher = Sha256::new();
    let mut block = vec![0u8; 1 << 20];
    loop {
        match file.read(&mut block).map_err(|e| Error::io("read", path, e))? {
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

fn temporary_beside(path: &Path) -> PathBuf {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.tmp-{}", std::process::id()))
}

fn sync_folder(path: &Path) -> std::io::Result<()> {
    match path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        // Only Unix lets a folder be opened and flushed.
        Some(parent) if cfg!(unix) => File::open(parent)?.sync_all(),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_keeps_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        write_bytes(&path, b"old").unwrap();
        let failed = write_atomic(&path, |w| {
            w.write_all(b"half")?;
            Err(std::io::Error::other("disk full"))
        });
        assert!(failed.unwrap_err().to_string().contains("disk full"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "the temporary file is gone");
    }

    #[test]
    fn a_folder_is_replaced_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bundle");
        for text in ["one", "two"] {
            write_folder(&path, |inside| write_bytes(&inside.join("x"), text.as_bytes())).unwrap();
        }
        assert_eq!(fs::read(path.join("x")).unwrap(), b"two");
        assert!(write_folder(&path, |_| Err(Error::invalid("x", "no"))).is_err());
        assert_eq!(fs::read(path.join("x")).unwrap(), b"two");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn sha256_of_abc() {
        assert_eq!(sha256_bytes(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
