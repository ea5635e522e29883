//! Lists the rules files of the repository, so that a new one needs no registration.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../checkpoints").canonicalize()?;
    println!("cargo::rerun-if-changed={}", root.display());
    let mut files = fs::read_dir(&root)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<PathBuf>>>()?;
    files.retain(|file| file.extension().is_some_and(|ending| ending == "toml"));
    files.sort();
    let mut list = String::from("&[\n");
    for file in files {
        let system = file.file_stem().unwrap_or_default().to_string_lossy();
        list += &format!("    ({system:?}, include_str!({file:?})),\n");
    }
    list += "]\n";
    let out = env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("cargo sets OUT_DIR"))?;
    fs::write(Path::new(&out).join("rules.rs"), list)
}
