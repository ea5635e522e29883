//! `hf://org/name[@revision][/path]`.

use smalti_base::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// What an address begins with.
const SCHEME: &str = "hf://";
/// The branch that is meant if none is named.
const BRANCH: &str = "main";
const FORM: &str = "expected hf://ORG/NAME[@REVISION][/PATH]";

/// A file or folder of a model repository on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    repo: String,
    revision: String,
    path: String,
}

impl Address {
    /// `org/name`.
    pub fn repo(&self) -> &str {
        &self.repo
    }

    /// A branch, a tag or a commit.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// The file or folder, with `/` between names; empty for the whole repository.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Whether the revision is a commit's whole hash.
    pub fn names_commit(&self) -> bool {
        is_commit(&self.revision)
    }

    /// A file of a commit of the same repository.
    pub fn at(&self, commit: &str, path: &str) -> Self {
        Self { repo: self.repo.clone(), revision: commit.into(), path: path.into() }
    }
}

/// Whether this is the whole hash of a commit.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.repo)?;
        if self.revision != BRANCH {
            write!(f, "@{}", self.revision)?;
        }
        if self.path.is_empty() { Ok(()) } else { write!(f, "/{}", self.path) }
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(source: &str) -> Result<Self> {
        let malformed = |problem: String| Error::invalid_hint(source, problem, FORM);
        let rest = source.strip_prefix(SCHEME).ok_or_else(|| malformed(format!("does not begin with {SCHEME}")))?;
        let (org, rest) = rest.split_once('/').ok_or_else(|| malformed("names no repository".into()))?;
        let (name, rest) = match rest.find(['@', '/']) {
            Some(end) => rest.split_at(end),
            None => (rest, ""),
        };
        if let Some(bad) = [org, name].into_iter().find(|part| !is_name(part)) {
            return Err(malformed(format!("`{bad}` is not the name of an organisation or a repository")));
        }
        let (revision, path) = match rest.strip_prefix('@') {
            Some(rest) => revision(rest),
            None => (BRANCH, rest),
        };
        let revision = revision.replace("%2F", "/").replace("%2f", "/");
        if !revision.split('/').all(is_revision_part) {
            return Err(malformed(format!("`{revision}` is not a branch, tag or commit")));
        }
        let path = path.strip_prefix('/').unwrap_or(path);
        let path = path.strip_suffix('/').unwrap_or(path);
        if !path.is_empty() && !is_path(path) {
            return Err(malformed(format!("`{path}` is not a path in a repository")));
        }
        Ok(Self { repo: format!("{org}/{name}"), revision, path: path.into() })
    }
}

/// Splits the revision off; those of requests and conversions have slashes.
fn revision(rest: &str) -> (&str, &str) {
    let parts = if rest.starts_with("refs/") { 3 } else { 1 };
    match rest.match_indices('/').nth(parts - 1) {
        Some((end, _)) => rest.split_at(end),
        None => (rest, ""),
    }
}

fn is_name(part: &str) -> bool {
    let letters = part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    // Two dashes join the parts of a folder's name in the cache.
    letters && part.len() <= 96 && part.starts_with(|first: char| first.is_ascii_alphanumeric()) && !part.contains("--")
}

fn is_revision_part(part: &str) -> bool {
    let letters = part.bytes().all(|byte| byte.is_ascii_graphic() && !b"\\?#%:*\"<>|@".contains(&byte));
    letters && !part.is_empty() && !part.starts_with('.')
}

/// Whether a path stays inside of the repository.
pub(super) fn is_path(path: &str) -> bool {
    let plain = |part: &str| !["", ".", ".."].contains(&part) && !part.contains(|c: char| c.is_control() || c == '\\');
    path.split('/').all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_found() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        for (text, repo, revision, path) in [
            ("hf://org/name", "org/name", "main", ""),
            ("hf://org/name/vae/", "org/name", "main", "vae"),
            ("hf://o.r-g/na_me@v1.0/a/b.safetensors", "o.r-g/na_me", "v1.0", "a/b.safetensors"),
            ("hf://org/name@refs/pr/3/a.bin", "org/name", "refs/pr/3", "a.bin"),
            ("hf://org/name@feature%2Fx/a.bin", "org/name", "feature/x", "a.bin"),
            ("hf://org/name/odd@file.pt", "org/name", "main", "odd@file.pt"),
            (&format!("hf://org/name@{commit}"), "org/name", commit, ""),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!((address.repo(), address.revision(), address.path()), (repo, revision, path), "{text}");
            assert_eq!(address.names_commit(), revision == commit);
        }
    }

    #[test]
    fn malformed_addresses_are_refused() {
        for text in [
            "hf:/org/name/a.pt",
            "hf://",
            "hf://org",
            "hf://org/",
            "hf:///name/a",
            "hf://org/na me/a",
            "hf://org/..",
            "hf://org/name@/a.pt",
            "hf://org/name@../a.pt",
            "hf://org/name@a%2F..%2Fb/a.pt",
            "hf://org/name/../a.pt",
            "hf://org/name/a//b.pt",
            "hf://org/name/a\\b.pt",
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.starts_with(text) && error.contains(FORM), "{error}");
        }
    }
}
