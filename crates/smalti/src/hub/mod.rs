//! Files of the hub: `hf://org/name[@revision][/path]`.
//!
//! The cache is the one that the hub's own programs share (`models--org--name/{blobs,refs,snapshots}`), and the environment means what it
//! means to them: `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`.
//! The crate `hf-hub` knows the hub's addresses, its listing and the cache's layout. The bytes are moved by `transfer`, which can be
//! cancelled, resumes only what the server agrees to resume, holds a file to its size and checksum, and keeps the token from other hosts.

mod address;
mod cache;
mod client;
mod environment;
mod transfer;

pub use address::Address;

use cache::RepoCache;
use client::{Client, Listing, Trouble};
use environment::Environment;
use smalti_base::{Error, Progress, Result};
use smalti_models::checkpoint::{WEIGHTS_ENDINGS, choose_weights, indexed_files, is_index};
use std::path::PathBuf;

/// Weights of the hub that are on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// The file in the cache; files that an index names are beside it.
    pub path: PathBuf,
    /// Where it came from, with the commit in place of the revision.
    pub origin: Address,
}

/// Brings weights from the hub into the cache, or finds them there. The path may be a file, a folder, or absent: a folder's weights are
/// chosen as in a local folder. The files of an index come with it. With `offline`, or `HF_HUB_OFFLINE=1`, only the cache is used; it is
/// also used, with a message, if the hub cannot be reached.
///
/// # Errors
/// [`Error::Invalid`] if the address is malformed, the hub refuses, the connection breaks or a file is damaged;
/// [`Error::Unknown`] with the known files; [`Error::Interrupted`]; [`Error::Io`] of the cache.
pub fn fetch(address: &Address, offline: bool, progress: &dyn Progress) -> Result<Fetched> {
    let environment = Environment::read()?;
    let cache = RepoCache::new(&environment.cache, address.repo());
    if offline || environment.offline {
        return fetch_from(address, &Cached::new(address, &cache)?);
    }
    // A file of a commit does not change; which of a folder's files are weights is known from all of them.
    if address.names_commit()
        && let Ok(cached) = Cached::new(address, &cache)
        && cached.names.iter().any(|name| name == address.path())
        && let Ok(found) = fetch_from(address, &cached)
    {
        return Ok(found);
    }
    let client = Client::new(&environment, address)?;
    match client.listing() {
        Ok(listing) => {
            let found = fetch_from(address, &Online { address, client, cache: &cache, listing, progress })?;
            // Only now: until then the cache goes on with the commit that it has.
            if !address.names_commit() {
                cache.remember(address.revision(), found.origin.revision())?;
            }
            Ok(found)
        }
        Err(Trouble::Unreachable(error)) => {
            let cached = Cached::new(address, &cache).and_then(|cached| fetch_from(address, &cached));
            let found = cached.map_err(|_| error)?;
            progress.say(&format!("warning: the hub cannot be reached; using {} from the cache", found.origin));
            Ok(found)
        }
        Err(Trouble::Refused(error)) => Err(error),
    }
}

/// The files of one commit.
trait Files {
    fn commit(&self) -> &str;
    /// The paths of the files.
    fn names(&self) -> &[String];
    /// The file in the cache.
    fn get(&self, path: &str) -> Result<PathBuf>;
    /// Why there is no such file or folder.
    fn missing(&self, path: &str) -> Error;
}

fn fetch_from(address: &Address, files: &dyn Files) -> Result<Fetched> {
    let name = match files.names().iter().find(|name| *name == address.path()) {
        Some(name) => name.clone(),
        None => in_folder(address, files)?,
    };
    let path = files.get(&name)?;
    if is_index(&name) {
        let folder = name.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
        for shard in indexed_files(&path)? {
            files.get(&format!("{folder}{shard}"))?;
        }
    }
    Ok(Fetched { path, origin: address.at(files.commit(), &name) })
}

/// The weights in the folder that the address names.
fn in_folder(address: &Address, files: &dyn Files) -> Result<String> {
    let prefix = if address.path().is_empty() { String::new() } else { format!("{}/", address.path()) };
    let below: Vec<&str> = files.names().iter().filter_map(|name| name.strip_prefix(&prefix)).collect();
    if below.is_empty() {
        return Err(files.missing(address.path()));
    }
    let here: Vec<String> = below.iter().filter(|name| !name.contains('/')).map(|name| name.to_string()).collect();
    let problem = match choose_weights(&here) {
        Ok(Some(name)) => return Ok(format!("{prefix}{name}")),
        Ok(None) => "holds no weights itself".to_string(),
        Err(several) => format!("holds several weights files: {}", several.join(", ")),
    };
    let is_weights = |name: &&str| name.rsplit_once('.').is_some_and(|(_, ending)| WEIGHTS_ENDINGS.contains(&ending));
    let weights: Vec<String> =
        below.iter().filter(|name| is_weights(name)).map(|name| format!("{prefix}{name}")).collect();
    let hint = match weights.is_empty() {
        true => format!("expected a file that ends in .{}", WEIGHTS_ENDINGS.join(", .")),
        false => format!("name one file: {}", weights.join(", ")),
    };
    Err(Error::invalid_hint(address, problem, hint))
}

/// The files of a commit in the cache.
struct Cached<'a> {
    address: &'a Address,
    cache: &'a RepoCache,
    commit: String,
    names: Vec<String>,
}

impl<'a> Cached<'a> {
    fn new(address: &'a Address, cache: &'a RepoCache) -> Result<Self> {
        let commit = match address.names_commit() {
            true => Some(address.revision().to_string()),
            false => cache.commit(address.revision()),
        };
        let Some(commit) = commit else {
            return Err(not_cached(address, cache, &format!("revision `{}` of it", address.revision())));
        };
        let names = cache.names(&commit)?;
        Ok(Self { address, cache, commit, names })
    }
}

impl Files for Cached<'_> {
    fn commit(&self) -> &str {
        &self.commit
    }

    fn names(&self) -> &[String] {
        &self.names
    }

    fn get(&self, path: &str) -> Result<PathBuf> {
        self.cache.file(&self.commit, path).ok_or_else(|| self.missing(path))
    }

    fn missing(&self, path: &str) -> Error {
        let what = if path.is_empty() { "any file of it".to_string() } else { format!("`{path}`") };
        not_cached(self.address, self.cache, &what)
    }
}

fn not_cached(address: &Address, cache: &RepoCache, what: &str) -> Error {
    Error::invalid_hint(
        address,
        format!("offline, and the cache does not have {what}: {}", cache.folder().display()),
        "run once without --offline and HF_HUB_OFFLINE, or set HF_HOME to a cache that has it",
    )
}

/// The files of a commit on the hub, through the cache.
struct Online<'a> {
    address: &'a Address,
    client: Client,
    cache: &'a RepoCache,
    listing: Listing,
    progress: &'a dyn Progress,
}

impl Files for Online<'_> {
    fn commit(&self) -> &str {
        &self.listing.commit
    }

    fn names(&self) -> &[String] {
        &self.listing.files
    }

    fn get(&self, path: &str) -> Result<PathBuf> {
        if let Some(file) = self.cache.file(self.commit(), path) {
            return Ok(file);
        }
        if !self.names().iter().any(|name| name == path) {
            return Err(self.missing(path));
        }
        let remote = self.client.describe(self.commit(), path)?;
        let _lock = self.cache.lock(&remote.etag, self.progress)?;
        // Another program may have brought it, or another commit have the same file.
        if !self.cache.blob(&remote.etag).is_file() {
            transfer::bring(&self.client, self.cache, &remote, self.progress)?;
        }
        self.cache.place(&remote.etag, self.commit(), path)
    }

    fn missing(&self, path: &str) -> Error {
        Error::unknown(self.address, "file", path, self.names())
    }
}
