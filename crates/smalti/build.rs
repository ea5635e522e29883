//! Lists the recipes of the repository, so that a new one needs no registration.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes").canonicalize()?;
    let mut list = String::from("&[\n");
    for folder in entries(&root)?.into_iter().filter(|path| path.is_dir()) {
        for file in entries(&folder)?.into_iter().filter(|path| path.extension().is_some_and(|ending| ending == "toml"))
        {
            let name = file.with_extension("");
            let name = name.strip_prefix(&root).map_err(io::Error::other)?.to_string_lossy().replace('\\', "/");
            list += &format!("    ({name:?}, include_str!({file:?})),\n");
        }
    }
    list += "]\n";
    let out = env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("cargo sets OUT_DIR"))?;
    fs::write(Path::new(&out).join("recipes.rs"), list)
}

/// What is in a folder, sorted; the script runs again when that changes.
fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    println!("cargo::rerun-if-changed={}", folder.display());
    let mut entries = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    entries.sort();
    Ok(entries)
}
