//! One process at a time works in a folder.

use super::temporary::is_alive;
use crate::{Error, Result};
use std::fs::{self, File, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

const NAME: &str = ".smalti.lock";

/// Holds a folder for this process until it is dropped. When the process is killed the system gives the folder free.
#[derive(Debug)]
pub struct FolderLock {
    path: PathBuf,
    file: File,
}

impl FolderLock {
    /// Takes an existing folder; `what` says what is done there, such as `training`.
    ///
    /// On a file system that has no locks nothing is held, and nothing is refused.
    ///
    /// # Errors
    /// [`Error::Invalid`] at once if another process holds it, saying which; [`Error::Io`].
    pub fn take(folder: &Path, what: &str) -> Result<Self> {
        let path = folder.join(NAME);
        let failed = |e| Error::io("lock", &path, e);
        loop {
            let mut file =
                File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(held(folder, &mut file)),
                Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => {}
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
            // Whoever held it before may have removed the file between our opening and locking it.
            if !is_at(&file, &path) {
                continue;
            }
            let text = format!("{what}, process {}\n", std::process::id());
            file.set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| file.write_all(text.as_bytes()))
                .map_err(failed)?;
            return Ok(Self { path, file });
        }
    }
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        // Removed while it is still locked: nobody else can have taken it.
        if cfg!(unix) {
            let _ = fs::remove_file(&self.path);
        }
        let _ = self.file.unlock();
        if !cfg!(unix) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn held(folder: &Path, file: &mut File) -> Error {
    let mut text = String::new();
    // The holder may just be writing it; without a name the message is still true.
    let _ = file.take(200).read_to_string(&mut text);
    let text = text.trim();
    let process = text.rsplit(' ').next().and_then(|number| number.parse::<u32>().ok());
    let holder = match process {
        Some(process) if is_alive(process) || !cfg!(unix) => format!(" ({text})"),
        // Of a machine that shares the folder, or a name that was not written yet.
        _ if text.is_empty() => String::new(),
        _ => format!(" ({text}, perhaps on another machine)"),
    };
    Error::invalid_hint(
        folder.display(),
        format!("another smalti works in this folder{holder}"),
        "wait until it has ended, or choose another folder",
    )
}

#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let same = |a: fs::Metadata, b: fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    file.metadata().and_then(|a| fs::metadata(path).map(|b| same(a, b))).unwrap_or(false)
}

#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_held_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let held = FolderLock::take(folder.path(), "training").unwrap();
        let refused = FolderLock::take(folder.path(), "training").unwrap_err().to_string();
        let who = format!("training, process {}", std::process::id());
        assert!(refused.contains(&who) && refused.contains("works in this folder"), "{refused}");
        drop(held);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        // What a killed process leaves is a file that nobody holds.
        fs::write(folder.path().join(NAME), "training, process 1\n").unwrap();
        drop(FolderLock::take(folder.path(), "training").unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
