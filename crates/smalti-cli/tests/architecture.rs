//! The workspace's own rules, held over `cargo metadata` and the sources.

#![allow(clippy::unwrap_used)]

use cargo_metadata::{DependencyKind, MetadataCommand, Package};
use std::fs;
use std::path::{Path, PathBuf};

/// Each crate may use only those before it.
const ORDER: [&str; 10] = [
    "smalti-base",
    "smalti-kernels",
    "smalti-nn",
    "smalti-data",
    "smalti-models",
    "smalti-eval",
    "smalti-train",
    "smalti",
    "smalti-cli",
    "smalti-peers",
];

/// Most lines of a source file.
const LINES: usize = 700;

fn packages() -> Vec<Package> {
    MetadataCommand::new().no_deps().exec().unwrap().packages
}

fn uses(package: &Package) -> Vec<String> {
    let normal = package.dependencies.iter().filter(|d| d.kind == DependencyKind::Normal);
    normal.map(|d| d.name.to_string()).collect()
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(sources(&path)),
            false if path.extension().is_some_and(|ending| ending == "rs") => found.push(path),
            false => {}
        }
    }
    found
}

fn crates() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

#[test]
fn each_crate_uses_only_those_before_it() {
    let place = |name: &str| ORDER.iter().position(|known| *known == name);
    for package in packages() {
        let own =
            place(&package.name).unwrap_or_else(|| panic!("{} has no place in the order of crates", package.name));
        for used in uses(&package) {
            if used.starts_with("smalti") {
                let used_place = place(&used).unwrap_or_else(|| panic!("{used} has no place in the order of crates"));
                assert!(used_place < own, "{} uses {used}, which comes after it", package.name);
            }
        }
    }
}

#[test]
fn data_sees_no_tensor_and_models_no_file_system() {
    let packages = packages();
    let data = packages.iter().find(|p| p.name.as_str() == "smalti-data").unwrap();
    for layer in ["burn", "smalti-kernels", "smalti-nn", "smalti-models"] {
        assert!(!uses(data).iter().any(|used| used == layer), "smalti-data uses {layer}");
    }
    let models = crates().join("smalti-models/src");
    for path in sources(&models).iter().filter(|path| !path.starts_with(models.join("checkpoint"))) {
        let text = fs::read_to_string(path).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        for name in ["std::fs", " fs::", " File::", "files::"] {
            assert!(!code.contains(name), "{} reads files ({name}); only checkpoint/ may", path.display());
        }
    }
}

#[test]
fn only_kernels_may_be_unsafe() {
    for package in packages().iter().filter(|p| p.name.as_str() != "smalti-kernels") {
        let manifest = fs::read_to_string(&package.manifest_path).unwrap();
        assert!(manifest.contains("[lints]\nworkspace = true"), "{} has lints of its own", package.name);
    }
}

#[test]
fn files_are_short_and_named_for_what_is_in_them() {
    for path in sources(&crates()) {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= LINES, "{} has {lines} lines, more than {LINES}", path.display());
        let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
        assert!(!["utils", "util", "common", "helpers", "misc"].contains(&stem.as_str()), "{}", path.display());
    }
}
