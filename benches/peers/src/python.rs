//! The Python environment: made once, used again until `requirements.txt` changes.

use crate::home;
use smalti::base::{Error, Result, files};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The interpreter of an environment with exactly `requirements.txt` in it, made in `cache` if need be.
///
/// # Errors
/// [`Error::Invalid`] with what was started if Python or pip fail, [`Error::Io`].
pub fn environment(cache: &Path, interpreter: &Path) -> Result<PathBuf> {
    let (folder, requirements) = (cache.join("venv"), home().join("requirements.txt"));
    let (python, stamp) = (folder.join("bin/python"), folder.join("requirements.sha256"));
    let wanted = files::sha256_file(&requirements)?;
    if python.exists() && files::read_text(&stamp).is_ok_and(|found| found.trim() == wanted) {
        return Ok(python);
    }
    eprintln!("making a Python environment in {} (downloads PyTorch once)", folder.display());
    if folder.exists() {
        std::fs::remove_dir_all(&folder).map_err(|e| Error::io("remove", &folder, e))?;
    }
    files::create_folder(cache)?;
    let mut make = Command::new(interpreter);
    run(make.args(["-m", "venv"]).arg(&folder))?;
    let mut install = Command::new(&python);
    install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement"]);
    run(install.arg(&requirements))?;
    files::write_bytes(&stamp, wanted.as_bytes())?;
    Ok(python)
}

fn run(command: &mut Command) -> Result<()> {
    let typed = format!("{command:?}");
    let status = command.stdin(Stdio::null()).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Error::invalid(typed, format!("ended with {status}; its messages are above"))),
        Err(error) => Err(Error::invalid_hint(
            typed,
            format!("cannot be started: {error}"),
            "install Python 3.11 or newer with its venv module, or name an interpreter with --python",
        )),
    }
}
