//! Temporary files and folders beside what they become. A killed process leaves some; the next one that writes there removes them.
//!
//! Each is locked by the process that fills it, so that what can be locked, and whose process is gone, is nobody's any more.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

const PREFIX: &str = ".smalti-tmp-";

/// The folders in which this process has looked for leftovers.
static SWEPT: Mutex<Option<HashSet<PathBuf>>> = Mutex::new(None);

/// A new file in this folder, locked as long as it is open.
pub(super) fn file(folder: &Path) -> std::io::Result<(PathBuf, File)> {
    make(folder, |path| {
        let file = File::options().write(true).create_new(true).open(path)?;
        // A file system without locks does without: then nothing is taken for a leftover either.
        let _ = file.try_lock();
        Ok(file)
    })
}

/// A new folder in this folder, and what keeps it from being swept.
pub(super) fn folder(folder: &Path) -> std::io::Result<(PathBuf, Option<File>)> {
    make(folder, |path| {
        fs::create_dir(path)?;
        // Only Unix lets a folder be opened.
        let file = if cfg!(unix) { Some(File::open(path)?) } else { None };
        file.iter().for_each(|file| drop(file.try_lock()));
        Ok(file)
    })
}

fn make<T>(folder: &Path, create: impl Fn(&Path) -> std::io::Result<T>) -> std::io::Result<(PathBuf, T)> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    // Held until the new one is locked, so that no other thread takes it for a leftover.
    let mut swept = SWEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let real = fs::canonicalize(folder)?;
    if swept.get_or_insert_default().insert(real.clone()) {
        sweep(&real);
    }
    loop {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("{PREFIX}{}-{number}", std::process::id()));
        match create(&path) {
            // Of an earlier process with this number that could not be removed.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            made => return Ok((path, made?)),
        }
    }
}

/// Removes what killed processes left in a folder. What cannot be removed stays: it hinders nobody.
fn sweep(folder: &Path) {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let Some(process) = name.to_str().and_then(process_of) else { continue };
        let path = entry.path();
        if is_left(&path, process).unwrap_or(false) {
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let _ = if is_folder { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
}

fn process_of(name: &str) -> Option<u32> {
    let (process, number) = name.strip_prefix(PREFIX)?.split_once('-')?;
    number.parse::<u64>().ok()?;
    process.parse().ok()
}

fn is_left(path: &Path, process: u32) -> std::io::Result<bool> {
    // Between making and locking there is a moment; then its process is alive.
    if process != std::process::id() && is_alive(process) {
        return Ok(false);
    }
    let kind = fs::symlink_metadata(path)?.file_type();
    if !(kind.is_file() || (kind.is_dir() && cfg!(unix))) {
        return Ok(false);
    }
    File::open(path)?.try_lock().map(|()| true).map_err(Error::from)
}

#[cfg(unix)]
pub(super) fn is_alive(process: u32) -> bool {
    let process = i32::try_from(process).ok().and_then(rustix::process::Pid::from_raw);
    process.is_some_and(|process| rustix::process::test_kill_process(process) != Err(rustix::io::Errno::SRCH))
}

#[cfg(not(unix))]
pub(super) fn is_alive(_: u32) -> bool {
    false
}
