//! A small server on loopback that plays the hub, and the other host that it keeps large files at.

use smalti::base::files::sha256_bytes;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Files from this size on are kept at the other host.
const LARGE: usize = 1000;

/// A repository: revisions, commits and their files.
#[derive(Default)]
pub struct Repo {
    /// Who may read; everybody without.
    pub token: Option<&'static str>,
    /// The commit of each branch and tag.
    pub revisions: BTreeMap<&'static str, String>,
    /// The files of each commit.
    pub commits: BTreeMap<String, BTreeMap<&'static str, Vec<u8>>>,
}

impl Repo {
    /// A repository with one commit.
    pub fn new(commit: &str, files: impl IntoIterator<Item = (&'static str, Vec<u8>)>) -> Self {
        Self::default().with("main", commit, files)
    }

    /// The same with another commit, of this branch or tag.
    pub fn with(
        mut self,
        revision: &'static str,
        commit: &str,
        files: impl IntoIterator<Item = (&'static str, Vec<u8>)>,
    ) -> Self {
        self.revisions.insert(revision, commit.into());
        self.commits.insert(commit.into(), files.into_iter().collect());
        self
    }
}

/// What the hosts were asked for, and what is wrong with them.
#[derive(Default)]
struct State {
    repos: BTreeMap<&'static str, Repo>,
    asked: Mutex<Vec<Asked>>,
    /// The other host's bodies end after so many bytes; 0 for whole ones.
    cut: AtomicUsize,
    ignores_ranges: AtomicBool,
    damages: AtomicBool,
    is_slow: AtomicBool,
    stop: AtomicBool,
}

/// A request.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Whether the other host was asked.
    pub of_storage: bool,
    /// The path.
    pub path: String,
    /// The headers, with small letters.
    pub headers: BTreeMap<String, String>,
}

/// The running servers; they end with it.
pub struct Hub {
    state: Arc<State>,
    ports: [u16; 2],
    threads: Vec<JoinHandle<()>>,
}

impl Hub {
    /// Starts with these repositories.
    pub fn start(repos: impl IntoIterator<Item = (&'static str, Repo)>) -> Self {
        let state = Arc::new(State { repos: repos.into_iter().collect(), ..Default::default() });
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let ports = [0, 1].map(|i: usize| listeners[i].local_addr().unwrap().port());
        let serve = |(of_storage, listener): (usize, TcpListener)| {
            let state = state.clone();
            thread::spawn(move || {
                for stream in listener.incoming() {
                    if state.stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let state = state.clone();
                    // A client that is gone is part of the tests.
                    thread::spawn(move || state.answer(stream.unwrap(), of_storage == 1, ports[1]).ok());
                }
            })
        };
        let threads = listeners.into_iter().enumerate().map(serve).collect();
        Self { state, ports, threads }
    }

    /// The value for `HF_ENDPOINT`.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[0])
    }

    /// The requests since the last call.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state.asked.lock().unwrap())
    }

    /// Lets the other host's bodies end after so many bytes; 0 for whole ones.
    pub fn cut(&self, bytes: usize) {
        self.state.cut.store(bytes, Ordering::Relaxed);
    }

    /// Whether the other host gives all of a file when asked for a part.
    pub fn ignore_ranges(&self, ignore: bool) {
        self.state.ignores_ranges.store(ignore, Ordering::Relaxed);
    }

    /// Whether the other host changes a byte of each file.
    pub fn damage(&self, damage: bool) {
        self.state.damages.store(damage, Ordering::Relaxed);
    }

    /// Whether the other host takes its time.
    pub fn slow(&self, slow: bool) {
        self.state.is_slow.store(slow, Ordering::Relaxed);
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        for (thread, port) in self.threads.drain(..).zip(self.ports) {
            drop(TcpStream::connect(("127.0.0.1", port)));
            thread.join().unwrap();
        }
    }
}

impl State {
    fn answer(&self, mut stream: TcpStream, of_storage: bool, storage: u16) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let Some(first) = lines.next().transpose()? else { return Ok(()) };
        let path = first.split(' ').nth(1).unwrap_or_default().to_string();
        let mut headers = BTreeMap::new();
        for line in lines {
            let line = line?;
            let Some((name, value)) = line.split_once(": ") else { break };
            headers.insert(name.to_lowercase(), value.to_string());
        }
        let asked = Asked { of_storage, path, headers };
        self.asked.lock().unwrap().push(asked.clone());
        match of_storage {
            true => self.storage(&mut stream, &asked),
            false => self.hub(&mut stream, &asked, storage),
        }
    }

    /// `/api/models/ORG/NAME/revision/REVISION` and `/ORG/NAME/resolve/COMMIT/PATH`.
    fn hub(&self, stream: &mut TcpStream, asked: &Asked, storage: u16) -> std::io::Result<()> {
        let refuse = |stream: &mut TcpStream, status: &str, code: &str| {
            head(stream, status, &[("X-Error-Code", code), ("X-Error-Message", "no"), ("Content-Length", "0")])
        };
        let is_listing = asked.path.starts_with("/api/models/");
        let path = asked.path.trim_start_matches("/api/models");
        let parts: Vec<&str> = path.trim_start_matches('/').splitn(5, '/').collect();
        let [org, name, _, revision, ..] = parts[..] else {
            return refuse(stream, "404 Not Found", "");
        };
        let Some(repo) = self.repos.get(format!("{org}/{name}").as_str()) else {
            return refuse(stream, "404 Not Found", "RepoNotFound");
        };
        let bearer = repo.token.map(|token| format!("Bearer {token}"));
        if bearer.is_some() && bearer.as_ref() != asked.headers.get("authorization") {
            return refuse(stream, "401 Unauthorized", "RepoNotFound");
        }
        let commit = repo.revisions.get(revision).map_or(revision, String::as_str);
        let Some(files) = repo.commits.get(commit) else {
            return refuse(stream, "404 Not Found", "RevisionNotFound");
        };
        if is_listing {
            let siblings: Vec<_> = files.keys().map(|file| serde_json::json!({ "rfilename": file })).collect();
            let body = serde_json::json!({ "id": format!("{org}/{name}"), "sha": commit, "siblings": siblings });
            return body_of(stream, &[("Content-Type", "application/json")], body.to_string().as_bytes(), None);
        }
        let Some(bytes) = parts.get(4).and_then(|path| files.get(path)) else {
            return refuse(stream, "404 Not Found", "EntryNotFound");
        };
        let sha256 = sha256_bytes(bytes);
        let commit = ("X-Repo-Commit", commit);
        if bytes.len() < LARGE {
            // Git's hash, of 40 digits.
            let etag = format!("\"{}\"", &sha256[..40]);
            return body_of(stream, &[commit, ("ETag", &etag)], bytes, asked.headers.get("range"));
        }
        let (etag, size) = (format!("\"{sha256}\""), bytes.len().to_string());
        let place = format!("http://127.0.0.1:{storage}/{sha256}");
        head(
            stream,
            "302 Found",
            &[
                commit,
                ("ETag", "\"of-the-redirect\""),
                ("X-Linked-Etag", &etag),
                ("X-Linked-Size", &size),
                ("Location", &place),
                ("Content-Length", "0"),
            ],
        )
    }

    /// `/SHA256`.
    fn storage(&self, stream: &mut TcpStream, asked: &Asked) -> std::io::Result<()> {
        let mut files = self.repos.values().flat_map(|repo| repo.commits.values()).flat_map(BTreeMap::values);
        let mut bytes = files.find(|bytes| asked.path[1..] == sha256_bytes(bytes)).cloned().unwrap_or_default();
        if self.damages.load(Ordering::Relaxed) {
            bytes[100] ^= 1;
        }
        let range = asked.headers.get("range").filter(|_| !self.ignores_ranges.load(Ordering::Relaxed));
        let etag = [("ETag", "\"of-the-storage\"")];
        match (self.cut.load(Ordering::Relaxed), self.is_slow.load(Ordering::Relaxed)) {
            (0, false) => body_of(stream, &etag, &bytes, range),
            (0, true) => {
                let size = bytes.len().to_string();
                head(stream, "200 OK", &[("Content-Length", &size)])?;
                bytes.chunks(1 << 16).try_for_each(|chunk| {
                    thread::sleep(Duration::from_millis(50));
                    stream.write_all(chunk)
                })
            }
            (cut, _) => {
                let size = bytes.len().to_string();
                head(stream, "200 OK", &[("Content-Length", &size)])?;
                stream.write_all(&bytes[..cut])
            }
        }
    }
}

fn head(stream: &mut TcpStream, status: &str, headers: &[(&str, &str)]) -> std::io::Result<()> {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    stream.write_all(format!("HTTP/1.1 {status}\r\n{headers}Connection: close\r\n\r\n").as_bytes())
}

/// All of a body, or the range `bytes=START-[END]` of it.
fn body_of(
    stream: &mut TcpStream,
    headers: &[(&str, &str)],
    bytes: &[u8],
    range: Option<&String>,
) -> std::io::Result<()> {
    let (mut status, mut headers, mut part) = ("200 OK", headers.to_vec(), bytes);
    let content_range;
    if let Some((start, end)) = range.and_then(|range| range.strip_prefix("bytes=")).and_then(|r| r.split_once('-')) {
        let start: usize = start.parse().unwrap();
        let end = end.parse().map_or(bytes.len(), |end: usize| (end + 1).min(bytes.len()));
        part = &bytes[start..end];
        content_range = format!("bytes {start}-{}/{}", end - 1, bytes.len());
        headers.push(("Content-Range", &content_range));
        status = "206 Partial Content";
    }
    let size = part.len().to_string();
    headers.push(("Content-Length", &size));
    head(stream, status, &headers)?;
    stream.write_all(part)
}
