//! The part of the cache that belongs to a repository.

use super::address::is_commit;
use hf_hub::{Cache, CacheRepo, Repo};
use smalti_base::{Error, Progress, Result, files};
use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often is looked whether another program is ready.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// `models--org--name`: `blobs/ETAG` hold the bytes, `snapshots/COMMIT/PATH` point to them, `refs/REVISION` hold a commit.
pub(super) struct RepoCache {
    layout: CacheRepo,
    folder: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    /// The part of the cache in folder `root` for `org/name`.
    pub fn new(root: &Path, repo: &str) -> Self {
        // Links are relative to where they are, which needs whole paths.
        let root = std::path::absolute(root).unwrap_or_else(|_| root.to_path_buf());
        let repo = Repo::model(repo.to_string());
        let (folder, locks) = (root.join(repo.folder_name()), root.join(".locks").join(repo.folder_name()));
        Self { layout: Cache::new(root).repo(repo), folder, locks }
    }

    /// The repository's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The commit that a branch or tag was when it was last looked at.
    pub fn commit(&self, revision: &str) -> Option<String> {
        let commit = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?.trim().to_string();
        is_commit(&commit).then_some(commit)
    }

    /// Keeps the commit that a branch or tag is now.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remember(&self, revision: &str, commit: &str) -> Result<()> {
        if self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        create_parent(&path)?;
        files::write_bytes(&path, commit.as_bytes())
    }

    /// A file of a commit, if it is there.
    pub fn file(&self, commit: &str, path: &str) -> Option<PathBuf> {
        Some(self.layout.pointer_path(commit).join(path)).filter(|file| file.is_file())
    }

    /// The paths of all files of a commit that are there, sorted.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn names(&self, commit: &str) -> Result<Vec<String>> {
        let mut names = Vec::new();
        collect(&self.layout.pointer_path(commit), "", &mut names)?;
        names.sort();
        Ok(names)
    }

    /// Where the bytes with this etag are.
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.layout.blob_path(etag)
    }

    /// Makes a file of a commit from bytes that are there.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn place(&self, etag: &str, commit: &str, path: &str) -> Result<PathBuf> {
        let (blob, file) = (self.blob(etag), self.layout.pointer_path(commit).join(path));
        create_parent(&file)?;
        let up = "../".repeat(path.matches('/').count() + 2);
        match link(Path::new(&format!("{up}blobs/{etag}")), &blob, &file) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(Error::io("write", &file, error)),
            _ => Ok(file),
        }
    }

    /// Waits until no other program brings the same bytes. The lock ends with the file.
    ///
    /// # Errors
    /// [`Error::Interrupted`], [`Error::Io`].
    pub fn lock(&self, etag: &str, progress: &dyn Progress) -> Result<File> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        let failed = |error| Error::io("lock", &path, error);
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        let mut said = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                // On some network file systems there are no locks; the file still appears as a whole.
                Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => return Ok(file),
                Err(TryLockError::Error(error)) => return Err(failed(error)),
                Err(TryLockError::WouldBlock) if progress.cancelled() => return Err(Error::Interrupted { hint: None }),
                Err(TryLockError::WouldBlock) => std::thread::sleep(LOOK_EVERY),
            }
            if !said {
                progress.say("another program is downloading the same file; waiting for it");
                said = true;
            }
        }
    }
}

fn create_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), files::create_folder)
}

#[cfg(unix)]
fn link(relative: &Path, _: &Path, file: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(relative, file)
}

/// Where links need a privilege, the bytes themselves become the file, as with the hub's own programs.
#[cfg(not(unix))]
fn link(_: &Path, blob: &Path, file: &Path) -> std::io::Result<()> {
    fs::rename(blob, file)
}

fn collect(folder: &Path, prefix: &str, names: &mut Vec<String>) -> Result<()> {
    let failed = |error| Error::io("read folder", folder, error);
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(failed)?,
    };
    for entry in entries {
        let entry = entry.map_err(failed)?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        // Links are followed for files only: folders of the cache are real.
        if entry.file_type().map_err(failed)?.is_dir() {
            collect(&entry.path(), &format!("{name}/"), names)?;
        } else if entry.path().is_file() {
            names.push(name);
        }
    }
    Ok(())
}
