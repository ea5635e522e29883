//! What a checkpoint says beside its tensors, and whether it is whole.

use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result, config, files};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const STATE: &str = "state.json";

/// All that goes on from step to step but for weights, averages and moments.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Optimiser steps tried so far, skipped ones included.
    pub step: u64,
    /// Optimiser updates made.
    pub updates: u64,
    /// Steps that were skipped because a loss or gradient was not finite.
    pub skipped: u64,
    /// The best score of an evaluation, and its step; lower is better.
    pub best: Option<(f64, u64)>,
    /// The step of the last evaluation; none was done, or an earlier version did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<u64>,
    /// What the last evaluation found, as it is told in the bundle.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub evaluation: serde_json::Map<String, serde_json::Value>,
    /// The checkpoint's other files; an earlier version did not say.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub files: BTreeMap<String, FileFacts>,
}

/// What a file must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileFacts {
    /// Its length.
    pub bytes: u64,
    /// Its SHA-256.
    pub sha256: String,
}

/// Writes the state into a checkpoint's folder, with the facts of the files that are there.
///
/// # Errors
/// [`Error::Io`].
pub fn seal(folder: &Path, state: &mut State) -> Result<()> {
    let failed = |e| Error::io("read", folder, e);
    state.files.clear();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().map(|name| name.display().to_string()).unwrap_or_default();
        if name.ends_with(".safetensors") {
            let bytes = fs::metadata(&path).map_err(failed)?.len();
            state.files.insert(name, FileFacts { bytes, sha256: files::sha256_file(&path)? });
        }
    }
    write_state(folder, state)
}

/// Writes the state alone: the tensors stay as they are.
///
/// # Errors
/// [`Error::Io`].
pub fn write_state(folder: &Path, state: &State) -> Result<()> {
    config::write_json(&folder.join(STATE), state)
}

/// Reads the state of a checkpoint and compares its files with what they must be.
///
/// # Errors
/// [`Error::Io`], or [`Error::Invalid`] that names what is damaged.
pub fn open(folder: &Path) -> Result<State> {
    let state: State = config::read_json(&folder.join(STATE))?;
    for (name, facts) in &state.files {
        let path = folder.join(name);
        let bytes = fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?.len();
        if bytes != facts.bytes {
            return Err(Error::file(
                path,
                format!("has {bytes} bytes, but the checkpoint was written with {}", facts.bytes),
            ));
        }
        if files::sha256_file(&path)? != facts.sha256 {
            return Err(Error::file(path, "is damaged: its SHA-256 is not that with which the checkpoint was written"));
        }
    }
    Ok(state)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_found_and_earlier_states_open() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        fs::write(&path, b"tensors").unwrap();
        let mut state = State { step: 4, best: Some((-1.5, 2)), measured: Some(4), ..State::default() };
        seal(folder.path(), &mut state).unwrap();
        assert_eq!(open(folder.path()).unwrap(), state);
        fs::write(&path, b"tensorz").unwrap();
        assert!(open(folder.path()).unwrap_err().to_string().contains("SHA-256"));
        fs::write(&path, b"tensor").unwrap();
        assert!(open(folder.path()).unwrap_err().to_string().contains("6 bytes"));
        fs::remove_file(&path).unwrap();
        assert!(open(folder.path()).is_err());
        fs::write(folder.path().join(STATE), r#"{"step": 3, "updates": 3, "skipped": 0, "best": null}"#).unwrap();
        assert_eq!(open(folder.path()).unwrap().step, 3);
    }
}
