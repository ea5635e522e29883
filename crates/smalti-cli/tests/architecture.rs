//! The workspace's own rules, held over `cargo metadata` and the sources.

#![allow(clippy::unwrap_used)]

use cargo_metadata::{DependencyKind, MetadataCommand, Package};
use std::fs;
use std::path::{Path, PathBuf};

/// Each crate may use only those before it.
const ORDER: [&str; 11] = [
    "smalti-base",
    "smalti-kernels",
    "smalti-nn",
    "smalti-data",
    "smalti-models",
    "smalti-eval",
    "smalti-train",
    "smalti-parity",
    "smalti",
    "smalti-cli",
    "smalti-peers",
];

/// Most lines of a source file.
const LINES: usize = 700;
/// Most lines of a function, signature and braces included.
const FUNCTION_LINES: usize = 60;
/// Functions that are to be cut.
const LONG_FUNCTIONS: [&str; 0] = [];

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

/// Name and lines of each function of a file that rustfmt wrote: it ends where a brace stands below its first letter.
fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let indent = |line: &str| line.len() - line.trim_start().len();
    let name = |line: &str| {
        let (before, after) = line.split_once("fn ")?;
        let qualifiers = ["pub", "pub(crate)", "pub(super)", "const", "async", "unsafe", "extern", "\"C\""];
        let is_item = before.split_whitespace().all(|word| qualifiers.contains(&word));
        let name: String = after.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        (is_item && !name.is_empty()).then_some(name)
    };
    let length = |first: usize| {
        let depth = indent(lines[first]);
        let ends = |line: &&str| indent(line) == depth && (line.trim() == "}" || line.ends_with([';', '}']));
        lines[first..].iter().position(ends).map_or(lines.len() - first, |last| last + 1)
    };
    (0..lines.len()).filter_map(|first| Some((name(lines[first])?, length(first)))).collect()
}

#[test]
fn functions_are_counted_from_signature_to_brace() {
    let text =
        "impl A {\n    pub fn one(\n        &self,\n    ) -> B {\n        x;\n    }\n    fn two();\n}\nfn three() {}\n";
    let expected = [("one", 5), ("two", 1), ("three", 1)].map(|(name, lines)| (name.to_string(), lines));
    assert_eq!(functions(text), expected);
}

#[test]
fn functions_are_short() {
    for path in sources(&crates()) {
        for (name, lines) in functions(&fs::read_to_string(&path).unwrap()) {
            let known = LONG_FUNCTIONS.contains(&name.as_str());
            assert!(lines <= FUNCTION_LINES || known, "{}: {name} has {lines} lines", path.display());
        }
    }
}

/// Whether a source names a crate: `name::`, `use name;` or `use name as`.
fn names(text: &str, dependency: &str) -> bool {
    text.match_indices(dependency).any(|(start, _)| {
        let before = text[..start].chars().next_back();
        let after = &text[start + dependency.len()..];
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_')
            && ["::", ";", " as "].iter().any(|follows| after.starts_with(follows))
    })
}

/// Dependencies are used where they are declared; those that only fix features stand in paragraphs that say so.
#[test]
fn dependencies_are_used() {
    for package in packages() {
        let manifest = fs::read_to_string(&package.manifest_path).unwrap();
        let features_only: Vec<&str> =
            manifest.split("\n\n").filter(|paragraph| paragraph.starts_with("# Not used in code")).collect();
        let root = package.manifest_path.parent().unwrap().as_std_path();
        let read = |folder: &str| {
            let folder = root.join(folder);
            let files = if folder.is_dir() { sources(&folder) } else { Vec::new() };
            files.iter().map(|file| fs::read_to_string(file).unwrap()).collect::<Vec<_>>().concat()
        };
        let library = read("src");
        let all = ["src", "tests", "examples", "benches"].map(read).concat();
        for dependency in &package.dependencies {
            let name = dependency.rename.as_ref().unwrap_or(&dependency.name);
            let declared = |line: &str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '.']));
            if features_only.iter().any(|paragraph| paragraph.lines().any(declared)) {
                continue;
            }
            let text = if dependency.kind == DependencyKind::Normal { &library } else { &all };
            assert!(names(text, &name.replace('-', "_")), "{} declares {name} and does not use it", package.name);
        }
    }
}

#[test]
fn dependencies_of_the_workspace_are_used() {
    let root = crates().join("..");
    let table: toml::Table = fs::read_to_string(root.join("Cargo.toml")).unwrap().parse().unwrap();
    let used: Vec<String> =
        packages().iter().flat_map(|package| package.dependencies.iter().map(|d| d.name.clone())).collect();
    for name in table["workspace"]["dependencies"].as_table().unwrap().keys() {
        assert!(used.contains(name), "no crate uses {name} of the workspace's dependencies");
    }
}
