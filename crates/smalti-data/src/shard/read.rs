//! Reading token shards.

use super::file::Shard;
use super::{Manifest, RowTokens, TokenRow};
use smalti_base::{Error, Result, TokenSpec, files};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The rows of all shards of a folder. A shard is read, compared with its SHA-256 and checked when a row of it is first asked for, and
/// stays in memory: 2 or 4 bytes a code, 2 or 4 a channel of a vector, and the captions.
#[derive(Debug)]
pub struct Shards {
    folder: PathBuf,
    manifest: Manifest,
    /// First row of each shard.
    starts: Vec<usize>,
    loaded: Vec<OnceLock<Shard>>,
}

impl Shards {
    /// Opens a folder of finished shards.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no manifest or a shard is missing; [`Error::Invalid`] if the manifest is damaged, a shard has another
    /// size, or tokenizing has not ended.
    pub fn open(folder: &Path) -> Result<Self> {
        let manifest = Manifest::read(folder)?;
        if !manifest.complete {
            let done = manifest.shards.last().map_or(0, |shard| shard.end);
            return Err(Error::invalid_hint(
                folder.display(),
                format!("unfinished: tokens of {done} of {} images", manifest.origin.data.images),
                "run the same `tokenize` again to finish it",
            ));
        }
        for shard in &manifest.shards {
            let path = folder.join(&shard.name);
            let size = std::fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?.len();
            if size != shard.bytes {
                return Err(Error::file(path, format!("has {size} bytes, the manifest says {}", shard.bytes)));
            }
        }
        let mut rows = 0;
        let mut starts = Vec::new();
        for shard in &manifest.shards {
            starts.push(rows);
            rows += shard.rows;
        }
        let loaded = manifest.shards.iter().map(|_| OnceLock::new()).collect();
        Ok(Self { folder: folder.to_path_buf(), manifest, starts, loaded })
    }

    /// What the folder's manifest says.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The tokens' spec.
    pub fn spec(&self) -> &TokenSpec {
        &self.manifest.origin.spec
    }

    /// Names of the classes.
    pub fn classes(&self) -> &[String] {
        &self.manifest.origin.classes
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.manifest.rows()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Row `index`.
    ///
    /// # Errors
    /// [`Error::Invalid`] past the end, or naming the shard if it is damaged; [`Error::Io`].
    pub fn row(&self, index: usize) -> Result<TokenRow> {
        let (shard, row) = self.place(index)?;
        Ok(shard.row(row))
    }

    /// The tokens of row `index` alone.
    ///
    /// # Errors
    /// As [`Shards::row`].
    pub fn tokens(&self, index: usize) -> Result<RowTokens> {
        let (shard, row) = self.place(index)?;
        Ok(shard.tokens(row))
    }

    fn place(&self, index: usize) -> Result<(&Shard, usize)> {
        if index >= self.len() {
            return Err(Error::file(&self.folder, format!("row {index} of {}: past the end", self.len())));
        }
        // The last shard that begins at or before the row; empty shards begin where the next one does.
        let number = self.starts.partition_point(|&start| start <= index) - 1;
        Ok((self.shard(number)?, index - self.starts[number]))
    }

    /// Reads every shard and compares it with the manifest.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the first shard that is damaged; [`Error::Io`].
    pub fn verify(&self) -> Result<()> {
        (0..self.loaded.len()).try_for_each(|number| self.read(number).map(|_| ()))
    }

    fn shard(&self, number: usize) -> Result<&Shard> {
        if let Some(shard) = self.loaded[number].get() {
            return Ok(shard);
        }
        let shard = self.read(number)?;
        Ok(self.loaded[number].get_or_init(|| shard))
    }

    fn read(&self, number: usize) -> Result<Shard> {
        let entry = &self.manifest.shards[number];
        let path = self.folder.join(&entry.name);
        let bytes = files::read(&path)?;
        let found = files::sha256_bytes(&bytes);
        if found != entry.sha256 {
            return Err(Error::invalid_hint(
                path.display(),
                format!("damaged: its SHA-256 is {found}, the manifest says {}", entry.sha256),
                "delete the file and run the same `tokenize` again",
            ));
        }
        Shard::decode(&path, bytes, entry.rows, self.spec())
    }
}
