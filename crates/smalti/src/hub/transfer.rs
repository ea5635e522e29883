//! Bytes from the hub to the cache.

use super::cache::RepoCache;
use super::client::{Client, Remote};
use smalti_base::{Error, Progress, Result, files};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use ureq::Body;
use ureq::http::header::CONTENT_RANGE;
use ureq::http::{Response, StatusCode};

const BLOCK: usize = 256 << 10;
const AGAIN: &str = "run it again to continue where it stopped";

/// Brings a file's bytes into the cache. They are collected beside their place under another name, stay there if the transfer breaks, and
/// get their own name when they have the right size and checksum.
///
/// # Errors
/// [`Error::Invalid`] if the hub refuses, the connection breaks or the bytes are not the right ones; [`Error::Interrupted`];
/// [`Error::Io`].
pub(super) fn bring(client: &Client, cache: &RepoCache, remote: &Remote, progress: &dyn Progress) -> Result<()> {
    let blob = cache.blob(&remote.etag);
    // The name that the hub's own programs go on from.
    let part = blob.with_file_name(format!("{}.incomplete", remote.etag));
    blob.parent().map_or(Ok(()), files::create_folder)?;
    let failed = |error| Error::io("write", &part, error);
    let mut file = File::options().create(true).truncate(false).write(true).open(&part).map_err(failed)?;
    progress.begin(&format!("downloading {}", remote.path), remote.size.unwrap_or(0), "bytes");
    let received = receive(client, remote, &mut file, &part, progress);
    progress.end();
    received?;
    file.sync_all().map_err(failed)?;
    drop(file);
    check(client, remote, &part)?;
    fs::rename(&part, &blob).map_err(|error| Error::io("write", &blob, error))
}

/// Appends what is missing.
fn receive(client: &Client, remote: &Remote, file: &mut File, part: &Path, progress: &dyn Progress) -> Result<()> {
    let failed = |error| Error::io("write", part, error);
    let there = file.metadata().map_err(failed)?.len();
    let mut done = if remote.size.is_some_and(|size| there > size) { 0 } else { there };
    if remote.size == Some(done) && done > 0 {
        return Ok(());
    }
    let mut response = ask(client, remote, done)?;
    if done > 0 && !goes_on(&response, done) {
        // The server gives all of it, or cannot give the rest.
        done = 0;
        if response.status() != StatusCode::OK {
            response = ask(client, remote, 0)?;
        }
    }
    if !response.status().is_success() {
        return Err(client.refusal(&response));
    }
    file.set_len(done).map_err(failed)?;
    file.seek(SeekFrom::Start(done)).map_err(failed)?;
    progress.resume(done);
    copy(client, remote, response.into_body().into_reader(), &mut done, progress, |bytes| {
        file.write_all(bytes).map_err(failed)
    })
}

fn ask(client: &Client, remote: &Remote, start: u64) -> Result<Response<Body>> {
    client.get(&remote.url, (start > 0).then(|| format!("bytes={start}-")), |_| false)
}

/// Whether the answer begins where it was asked to.
fn goes_on(response: &Response<Body>, start: u64) -> bool {
    let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok()).unwrap_or_default();
    response.status() == StatusCode::PARTIAL_CONTENT && range.starts_with(&format!("bytes {start}-"))
}

fn copy(
    client: &Client,
    remote: &Remote,
    mut body: impl Read,
    done: &mut u64,
    progress: &dyn Progress,
    mut write: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let path = &remote.path;
    let mut block = vec![0; BLOCK];
    loop {
        if progress.cancelled() {
            return Err(Error::Interrupted { hint: Some(format!("{done} bytes of `{path}` are kept; {AGAIN}")) });
        }
        let of = remote.size.map(|size| format!(" of {size}")).unwrap_or_default();
        let broken = |why: String| {
            Error::invalid_hint(client.address(), format!("`{path}`: {why} after {done}{of} bytes"), AGAIN)
        };
        match body.read(&mut block) {
            Ok(0) if remote.size.is_some_and(|size| *done < size) => return Err(broken("the answer ended".into())),
            Ok(0) => return Ok(()),
            Ok(n) => {
                write(&block[..n])?;
                *done += n as u64;
            }
            Err(error) => return Err(broken(format!("the connection broke ({error})"))),
        }
        if remote.size.is_some_and(|size| *done > size) {
            return Ok(());
        }
        progress.advance(*done, "");
    }
}

/// Removes bytes that are not the right ones.
fn check(client: &Client, remote: &Remote, part: &Path) -> Result<()> {
    let found = fs::metadata(part).map_err(|error| Error::io("read", part, error))?.len();
    let problem = match remote.size {
        Some(size) if found != size => Some(format!("has {found} bytes, expected {size}")),
        _ => None,
    };
    // The etag of large files is their SHA-256; others have git's hash, and are small.
    let is_sha256 = remote.etag.len() == 64 && remote.etag.bytes().all(|byte| byte.is_ascii_hexdigit());
    let problem = match problem {
        None if is_sha256 => {
            let sha256 = files::sha256_file(part)?;
            (sha256 != remote.etag).then(|| format!("has the SHA-256 {sha256}, expected {}", remote.etag))
        }
        other => other,
    };
    let Some(problem) = problem else { return Ok(()) };
    fs::remove_file(part).map_err(|error| Error::io("remove", part, error))?;
    let problem = format!("`{}` was damaged in transit: it {problem}", remote.path);
    Err(Error::invalid_hint(client.address(), problem, "run it again to start over"))
}
