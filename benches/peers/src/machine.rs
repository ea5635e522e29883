//! What the numbers were measured on.

use crate::home;
use serde::Deserialize;
use serde_json::{Value, json};
use smalti::base::{Error, Result, files};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Instruction sets that decide how fast products are.
const FLAGS: [&str; 9] =
    ["avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"];

/// Number of cores.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Share of all cores that is in use just now, by whatever runs beside; `None` on systems that do not tell.
pub fn busy() -> Option<f64> {
    let ticks = || {
        let stat = files::read_text(Path::new("/proc/stat")).ok()?;
        let fields: Vec<f64> = stat.lines().next()?.split_whitespace().skip(1).flat_map(str::parse).collect();
        // user, nice, system, idle, waiting for the disk, ...
        Some((fields.iter().take(8).sum::<f64>(), fields.get(3)? + fields.get(4)?))
    };
    let (all, idle) = ticks()?;
    std::thread::sleep(Duration::from_millis(500));
    let (all_later, idle_later) = ticks()?;
    Some(1.0 - (idle_later - idle) / (all_later - all).max(1.0))
}

/// The folder of build outputs that this program lies in.
///
/// # Errors
/// [`Error::Invalid`] if the program was moved elsewhere.
pub fn target_folder() -> Result<PathBuf> {
    let program = std::env::current_exe().map_err(|e| Error::io("find", "this program", e))?;
    // target/release/smalti-peers
    let target = program.parent().and_then(Path::parent).map(Path::to_path_buf);
    target.ok_or_else(|| Error::invalid_hint(program.display(), "lies in no target folder", "start it with cargo run"))
}

/// Builds the program `smalti` as this one was built, and says where it is.
///
/// # Errors
/// [`Error::Invalid`] if cargo fails.
pub fn build_program() -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["build", "--release", "--quiet", "--package", "smalti-cli"]);
    let status = build.current_dir(home().join("../..")).status();
    match status {
        Ok(status) if status.success() => Ok(target_folder()?.join("release/smalti")),
        other => Err(Error::invalid(format!("{build:?}"), format!("failed: {other:?}"))),
    }
}

/// Machine, versions, threads and command.
///
/// # Errors
/// [`Error::Invalid`] if PyTorch cannot be imported.
pub fn setup(python: &Path, threads: usize) -> Result<Value> {
    let script = "import sys, torch; print(torch.__version__, sys.version.split()[0])";
    let versions = output(Command::new(python).args(["-c", script]));
    let Some((torch, python)) = versions.as_deref().and_then(|text| text.split_once(' ')) else {
        return Err(Error::invalid_hint(
            python.display(),
            "cannot import torch",
            "remove the folder of the environment, so that it is made again",
        ));
    };
    let cpu = files::read_text(Path::new("/proc/cpuinfo")).unwrap_or_default();
    let field = |name: &str| {
        let line = cpu.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
        line.split_once(':').map(|(_, value)| value.trim().to_string())
    };
    let has = field("flags").unwrap_or_default();
    let flags: Vec<&str> = FLAGS.into_iter().filter(|flag| has.split(' ').any(|found| found == *flag)).collect();
    let rustc = output(Command::new("rustc").arg("--version")).unwrap_or_default();
    let commit = output(Command::new("git").args(["rev-parse", "--short", "HEAD"]).current_dir(home()));
    let command: Vec<String> = std::env::args().skip(1).collect();
    Ok(json!({
        "cpu": field("model name").unwrap_or_else(|| "unknown".into()),
        "flags": flags,
        "cores": cores(),
        "threads": threads,
        "torch": torch,
        "python": python,
        "rustc": rustc.split(' ').nth(1).unwrap_or_default(),
        "smalti": env!("CARGO_PKG_VERSION"),
        "commit": commit,
        "burn": burn_version(),
        "command": format!("cargo run --release -p smalti-peers -- {}", command.join(" ")).trim().to_string(),
    }))
}

fn output(command: &mut Command) -> Option<String> {
    let done = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    done.status.success().then(|| String::from_utf8_lossy(&done.stdout).trim().to_string())
}

fn burn_version() -> Option<String> {
    #[derive(Deserialize)]
    struct Lock {
        package: Vec<Package>,
    }
    #[derive(Deserialize)]
    struct Package {
        name: String,
        version: String,
    }
    let lock: Lock = toml::from_str(include_str!("../../../Cargo.lock")).ok()?;
    lock.package.into_iter().find(|package| package.name == "burn").map(|package| package.version)
}

/// Today in UTC, `YYYY-MM-DD`.
pub fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (year, month, day) = civil((seconds / 86_400) as i64);
    format!("{year:04}-{month:02}-{day:02}")
}

/// Year, month and day of a number of days after 1970-01-01, in years that begin in March.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::civil;

    #[test]
    fn days_have_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_819), (2027, 1, 1));
    }

    #[test]
    fn burn_is_in_the_lock_file() {
        assert!(super::burn_version().is_some());
    }
}
