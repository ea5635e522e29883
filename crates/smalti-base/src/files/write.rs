//! Files and folders that appear whole or not at all.

use super::temporary;
use crate::{Error, Result};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

/// Writes `path` through `fill`: to a temporary file beside it, flushed to disk, then renamed. If anything fails the old file, if
/// there was one, stays as it was and the temporary one is removed; so are those that killed processes left in the folder.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be written or the disk is full, or what `fill` returns.
pub fn write_atomic(path: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>) -> Result<()> {
    let failed = |e| Error::io("write", path, e);
    let (temporary, file) = temporary::file(parent(path)).map_err(failed)?;
    let written = (|| {
        let mut writer = BufWriter::new(file);
        fill(&mut writer)?;
        let file = writer.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        sync_folder(parent(path))
    })();
    written.map_err(|source| {
        let _ = fs::remove_file(&temporary);
        failed(source)
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
/// Where the system cannot exchange two folders (Linux and macOS can) there is a moment in which neither is there.
///
/// # Errors
/// What `fill` returns, or [`Error::Io`]. What was there before stays then.
pub fn write_folder(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let failed = |e| Error::io("write", path, e);
    create_folder(parent(path))?;
    let (temporary, held) = temporary::folder(parent(path)).map_err(failed)?;
    let written = fill(&temporary).and_then(|()| {
        sync_folder(&temporary).map_err(failed)?;
        match fs::symlink_metadata(path) {
            Ok(_) => exchange(&temporary, path),
            Err(_) => fs::rename(&temporary, path),
        }
        .and_then(|()| sync_folder(parent(path)))
        .map_err(failed)
    });
    // After an exchange it is the old folder, after a failure the unfinished one.
    if let Err(error) = remove(&temporary)
        && written.is_ok()
    {
        return Err(Error::io("remove", &temporary, error));
    }
    drop(held);
    written
}

/// Most files of a folder that [`link_folder`] takes.
const MOST_LINKED: usize = 10_000;

/// Brings all that is in a folder into another one, files by hard links: they take no room, and replacing one leaves the other as it is.
///
/// # Errors
/// [`Error::Io`]; [`Error::Invalid`] if there are more files than a model has.
pub fn link_folder(from: &Path, into: &Path) -> Result<()> {
    link_at_most(from, into, &mut 0)
}

fn link_at_most(from: &Path, into: &Path, linked: &mut usize) -> Result<()> {
    let failed = |e| Error::io("read folder", from, e);
    for entry in fs::read_dir(from).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        *linked += 1;
        if *linked > MOST_LINKED {
            let problem = format!("holds more than {MOST_LINKED} files beside a model");
            return Err(Error::invalid_hint(from.display(), problem, "choose a folder of its own"));
        }
        let (old, new) = (entry.path(), into.join(entry.file_name()));
        let kind = entry.file_type().map_err(failed)?;
        let done = match () {
            () if kind.is_dir() => {
                create_folder(&new)?;
                link_at_most(&old, &new, linked)?;
                Ok(())
            }
            // Some file systems have no hard links, and none of a symbolic one.
            () => fs::hard_link(&old, &new).or_else(|_| fs::copy(&old, &new).map(drop)),
        };
        done.map_err(|e| Error::io("copy", &old, e))?;
    }
    Ok(())
}

/// Creates a folder and those above it; does nothing if it is there.
///
/// # Errors
/// [`Error::Io`].
pub fn create_folder(path: &Path) -> Result<()> {
    if path.as_os_str().is_empty() {
        return Ok(());
    }
    fs::create_dir_all(path).map_err(|e| Error::io("create folder", path, e))
}

/// Tries to write in an existing folder, so that a long computation does not end in an error.
///
/// # Errors
/// [`Error::Io`].
pub fn must_be_writable(folder: &Path) -> Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let tried = temporary::file(folder).and_then(|(path, _)| fs::remove_file(path));
    tried.map_err(|e| Error::io("write into", folder, e))
}

fn remove(path: &Path) -> std::io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn exchange(new: &Path, old: &Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    match renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE) {
        // Some file systems cannot.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => exchange_in_steps(new, old),
        done => Ok(done?),
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn exchange(new: &Path, old: &Path) -> std::io::Result<()> {
    exchange_in_steps(new, old)
}

fn exchange_in_steps(new: &Path, old: &Path) -> std::io::Result<()> {
    let (aside, held) = temporary::folder(parent(old))?;
    drop(held);
    let inside = aside.join("old");
    fs::rename(old, &inside)?;
    if let Err(error) = fs::rename(new, old) {
        fs::rename(&inside, old)?;
        return Err(error);
    }
    fs::remove_dir_all(&aside)
}

fn sync_folder(folder: &Path) -> std::io::Result<()> {
    // Only Unix lets a folder be opened and flushed.
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

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
        assert_eq!(count(folder.path()), 1, "the temporary file is gone");
    }

    #[test]
    fn a_folder_is_replaced_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        for exchanged in [true, false] {
            let path = folder.path().join(if exchanged { "bundle" } else { "steps" });
            for text in ["one", "two"] {
                write_folder(&path, |inside| write_bytes(&inside.join("x"), text.as_bytes())).unwrap();
            }
            assert_eq!(fs::read(path.join("x")).unwrap(), b"two");
            assert!(write_folder(&path, |_| Err(Error::invalid("x", "no"))).is_err());
            assert_eq!(fs::read(path.join("x")).unwrap(), b"two");
        }
        let (new, old) = (folder.path().join("bundle"), folder.path().join("steps"));
        write_bytes(&new.join("y"), b"new").unwrap();
        exchange_in_steps(&new, &old).unwrap();
        assert_eq!(fs::read(old.join("y")).unwrap(), b"new");
        assert_eq!(count(folder.path()), 1);
    }

    #[test]
    fn a_file_of_the_longest_name_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a".repeat(255));
        write_bytes(&path, b"x").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"x");
    }

    #[test]
    fn what_killed_processes_left_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        // No process has such a number: it is above the largest one.
        fs::write(at(".smalti-tmp-4194999-0"), b"left").unwrap();
        fs::create_dir(at(".smalti-tmp-4194999-1")).unwrap();
        fs::write(at(".smalti-tmp-4194999-1").join("x"), b"left").unwrap();
        let others = [".smalti-tmp-mine", ".a.tmp-1", "smalti-tmp-4194999-2"];
        others.iter().for_each(|name| fs::write(at(name), b"other").unwrap());
        // One of a process that is alive, and one that somebody holds.
        fs::write(at(".smalti-tmp-1-0"), b"alive").unwrap();
        let held = File::create(at(".smalti-tmp-4194999-3")).unwrap();
        held.lock().unwrap();
        write_bytes(&at("new"), b"x").unwrap();
        let left = if cfg!(unix) { 6 } else { 8 };
        assert_eq!(count(folder.path()), left, "{:?}", fs::read_dir(folder.path()).unwrap().collect::<Vec<_>>());
        assert!(!at(".smalti-tmp-4194999-0").exists());
    }
}
