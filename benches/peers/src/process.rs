//! A process that is told what to do by lines of JSON, and answers by lines of JSON.

use serde::de::DeserializeOwned;
use serde_json::Value;
use smalti::base::{Error, Result, files};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// A started process. It is stopped when this is dropped.
pub struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts a command; `log` gets its messages.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it cannot be started.
    pub fn start(command: &mut Command, name: &str, log: &Path) -> Result<Self> {
        let messages = File::create(log).map_err(|e| Error::io("write", log, e))?;
        let started = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(messages).spawn();
        let mut child = started.map_err(|e| Error::invalid(name, format!("{command:?} cannot be started: {e}")))?;
        let (sender, lines) = channel();
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(std::io::Result::ok) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Self { stdin: child.stdin.take(), child, lines, name: name.into(), log: log.to_path_buf() })
    }

    /// Sends a request and waits for the answer.
    ///
    /// # Errors
    /// As [`Self::answer`].
    pub fn ask<T: DeserializeOwned>(&mut self, request: &Value, limit: Duration) -> Result<T> {
        if let Some(stdin) = &mut self.stdin {
            // A process that ended has closed its side; waiting for its answer says why.
            let _ = writeln!(stdin, "{request}").and_then(|()| stdin.flush());
        }
        self.answer(limit)
    }

    /// The next answer.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the process's last messages if it ended, took too long, or said something else.
    pub fn answer<T: DeserializeOwned>(&mut self, limit: Duration) -> Result<T> {
        let line = self.lines.recv_timeout(limit).map_err(|error| match error {
            RecvTimeoutError::Timeout => self.failed(&format!("took longer than {} s", limit.as_secs())),
            RecvTimeoutError::Disconnected => self.failed("ended without an answer"),
        })?;
        serde_json::from_str(&line).map_err(|e| self.failed(&format!("said `{line}`, which is not an answer ({e})")))
    }

    /// Largest resident memory so far in KiB.
    ///
    /// # Errors
    /// [`Error::Io`] on systems that do not tell.
    pub fn peak_kib(&self) -> Result<u64> {
        let status = files::read_text(Path::new(&format!("/proc/{}/status", self.child.id())))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        kib.ok_or_else(|| Error::invalid(&self.name, "its peak memory is not in /proc/PID/status"))
    }

    fn failed(&self, problem: &str) -> Error {
        let log = files::read_text(&self.log).unwrap_or_default();
        let last: Vec<&str> = log.lines().rev().take(12).collect();
        let last = last.into_iter().rev().collect::<Vec<_>>().join("\n  ");
        Error::invalid(&self.name, format!("{problem}; its last messages ({}):\n  {last}", self.log.display()))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Its input ends, so that it can end by itself.
        self.stdin = None;
        for _ in 0..50 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
