//! Writing token shards: each whole or not at all, and where a run stopped the next one goes on.

use super::{Contents, FORMAT, Manifest, Origin, ShardEntry, TokenRow, VERSION, file, shard_name};
use crate::loader::Skipped;
use smalti_base::{Error, Result, files};
use std::path::{Path, PathBuf};

/// Writes the token shards of one data set, image by image in its order.
#[derive(Debug)]
pub struct ShardWriter {
    folder: PathBuf,
    manifest: Manifest,
    rows: Vec<TokenRow>,
    skipped: Vec<Skipped>,
    next: usize,
    contents: Option<Contents>,
    _held: files::FolderLock,
}

impl ShardWriter {
    /// Opens a folder for `per_shard` images a shard: a new or empty one, or one that an earlier run with the same origin left.
    /// Finished shards stay; those from the first missing or shortened one on are made again.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the folder is of another tokenizer, data set or transforms; [`Error::Invalid`] if it holds something else
    /// or another process writes there; [`Error::Io`].
    pub fn open(folder: &Path, origin: Origin, per_shard: usize) -> Result<Self> {
        if per_shard == 0 || origin.data.images == 0 {
            return Err(Error::file(folder, format!("{} images, {per_shard} a shard", origin.data.images)));
        }
        files::create_folder(folder)?;
        let held = files::FolderLock::take(folder, "tokenizing")?;
        let mut manifest = match Manifest::path(folder).exists() {
            true => Manifest::read(folder)?,
            false => {
                must_be_empty(folder)?;
                let (format, shards, skipped) = (FORMAT.to_string(), Vec::new(), Vec::new());
                Manifest {
                    format,
                    version: VERSION,
                    origin: origin.clone(),
                    per_shard,
                    complete: false,
                    shards,
                    skipped,
                }
            }
        };
        manifest.origin.must_equal(folder, &origin)?;
        if manifest.per_shard != per_shard {
            return Err(Error::file(
                folder,
                format!("has {} images per shard, this run {per_shard}", manifest.per_shard),
            ));
        }
        let there = |shard: &&ShardEntry| {
            std::fs::metadata(folder.join(&shard.name)).is_ok_and(|found| found.len() == shard.bytes)
        };
        let good = manifest.shards.iter().take_while(there).count();
        manifest.shards.truncate(good);
        let next = manifest.shards.last().map_or(0, |shard| shard.end);
        manifest.skipped.retain(|skipped| skipped.index < next);
        manifest.complete = next == manifest.origin.data.images;
        manifest.write(folder)?;
        let (rows, skipped) = (Vec::new(), Vec::new());
        Ok(Self { folder: folder.to_path_buf(), manifest, rows, skipped, next, contents: None, _held: held })
    }

    /// Compares finished shards with the images that they stand for, and notes those of shards to come. Reads the images of all
    /// finished shards; names and sizes alone would not tell that a picture was changed.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the tokens are of other pictures under the same names.
    pub fn with_contents(mut self, contents: Contents) -> Result<Self> {
        for shard in &self.manifest.shards {
            let Some(then) = &shard.contents else { continue };
            let now = contents.of(shard.first..shard.end);
            if now != *then {
                return Err(Error::Mismatch {
                    what: format!("the tokens in {} and the images", self.folder.display()),
                    left_name: format!("{} is of images with the contents", shard.name),
                    left: then.clone(),
                    right_name: "the images of these names now have".into(),
                    right: now,
                    hint: Some("write to another folder, or remove this one to make the tokens anew".into()),
                });
            }
        }
        self.contents = Some(contents);
        Ok(self)
    }

    /// The image whose row or skip must come next; the number of images when all is done.
    pub fn next(&self) -> usize {
        self.next
    }

    /// What is on disk so far.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Adds the tokens of image `index`, which must be [`ShardWriter::next`]. A full shard is written at once.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another index, or tokens that are not the spec's; [`Error::Io`].
    pub fn push(&mut self, index: usize, row: TokenRow) -> Result<()> {
        self.expect(index)?;
        let spec = &self.manifest.origin.spec;
        if let Some(problem) = row.tokens.misfit(spec) {
            return Err(Error::invalid(&row.key, format!("{problem}; the tokens are a {spec}")));
        }
        if self.rows.first().is_some_and(|first| file::is_certain(first) != file::is_certain(&row)) {
            return Err(Error::invalid(&row.key, "tokens with and without deviations cannot be in one shard"));
        }
        if row.label.is_some_and(|label| i32::try_from(label).is_err()) {
            return Err(Error::invalid(&row.key, format!("label {:?} is too large", row.label)));
        }
        self.rows.push(row);
        self.advance()
    }

    /// Notes that image `skipped.index`, which must be [`ShardWriter::next`], has no tokens.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another index; [`Error::Io`].
    pub fn skip(&mut self, skipped: Skipped) -> Result<()> {
        self.expect(skipped.index)?;
        self.skipped.push(skipped);
        self.advance()
    }

    /// Ends the writing.
    ///
    /// # Errors
    /// [`Error::Invalid`] if images are still missing. What is on disk stays, and a later run can continue.
    pub fn finish(self) -> Result<Manifest> {
        match self.manifest.complete {
            true => Ok(self.manifest),
            false => Err(Error::file(
                &self.folder,
                format!("only {} of {} images have tokens", self.next, self.manifest.origin.data.images),
            )),
        }
    }

    fn expect(&self, index: usize) -> Result<()> {
        match index == self.next && index < self.manifest.origin.data.images {
            true => Ok(()),
            false => Err(Error::file(&self.folder, format!("image {index} was given, {} must come next", self.next))),
        }
    }

    fn advance(&mut self) -> Result<()> {
        self.next += 1;
        let first = self.manifest.shards.last().map_or(0, |shard| shard.end);
        let images = self.manifest.origin.data.images;
        if self.next - first < self.manifest.per_shard && self.next < images {
            return Ok(());
        }
        let bytes = file::encode(&self.rows, &self.manifest.origin)?;
        let name = shard_name(self.manifest.shards.len());
        files::write_bytes(&self.folder.join(&name), &bytes)?;
        self.manifest.shards.push(ShardEntry {
            name,
            first,
            end: self.next,
            rows: self.rows.len(),
            bytes: bytes.len() as u64,
            sha256: files::sha256_bytes(&bytes),
            contents: self.contents.as_ref().map(|contents| contents.of(first..self.next)),
        });
        self.manifest.skipped.append(&mut self.skipped);
        self.manifest.complete = self.next == images;
        self.manifest.write(&self.folder)?;
        self.rows.clear();
        Ok(())
    }
}

/// A folder without a manifest must hold nothing, but for the hidden leavings of an interrupted write.
fn must_be_empty(folder: &Path) -> Result<()> {
    let failed = |e: std::io::Error| Error::io("read folder", folder, e);
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') {
            return Err(Error::invalid_hint(
                folder.display(),
                format!("is not empty (`{name}`) and holds no token shards"),
                "write to another folder",
            ));
        }
    }
    Ok(())
}
