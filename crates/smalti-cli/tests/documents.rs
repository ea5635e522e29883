//! The documents say what the code says.
#![allow(clippy::unwrap_used)]

use smalti::models::checkpoint::{Rules, parameter_map};
use smalti::models::systems;
use smalti::training::Task;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn document(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap()
}

/// What is directly in a folder of the repository, sorted.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    entries
}

/// All files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    entries(folder).into_iter().flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

/// The code that compares with golden cases, and all integration tests, in lower case.
fn proofs() -> String {
    let crates = entries(&root().join("crates"));
    let tests = crates.iter().map(|folder| folder.join("tests"));
    let stages = [root().join("crates/smalti/src/golden"), root().join("crates/smalti-parity/src")];
    let folders = tests.chain(stages).filter(|folder| folder.is_dir());
    let sources = folders.flat_map(|folder| files(&folder)).filter(|file| file.extension().is_some_and(|e| e == "rs"));
    sources.map(|file| fs::read_to_string(file).unwrap().to_lowercase()).collect()
}

#[test]
fn the_table_of_systems_is_the_codes() {
    let page = document("docs/systems.md");
    let rows = page.lines().filter(|line| line.contains("arXiv:")).count();
    assert_eq!(rows, systems::all().len());
    for system in systems::all() {
        let row = format!(
            "| {} | `{}` | arXiv:{} | {} | {} |",
            system.role.name(),
            system.kind,
            system.arxiv,
            system.tokens,
            system.about
        );
        assert!(page.contains(&row), "docs/systems.md lacks {row}");
    }
}

/// The sizes that the authors give, in millions of parameters.
#[test]
fn recipes_of_published_models_have_their_sizes() {
    let root = root().join("recipes");
    let device = burn::tensor::Device::flex();
    for (recipe, published, rounding) in [
        ("var/imagenet-vqvae", 108.9, 0.1),
        ("var/imagenet-d16", 310.0, 1.0),
        ("var/imagenet-d20", 600.0, 5.0),
        ("var/imagenet-d24", 1000.0, 50.0),
        ("var/imagenet-d30", 2000.0, 50.0),
        ("var/imagenet-512-d36", 2300.0, 60.0),
        ("rq-vae/imagenet-f32", 104.4, 0.1),
        ("rq-vae/ffhq-f32", 100.7, 0.1),
        ("rq-vae/ffhq-350m", 355.0, 1.0),
        ("rq-vae/church-370m", 370.0, 1.0),
        ("rq-vae/cat-612m", 612.0, 1.0),
        ("rq-vae/bedroom-612m", 612.0, 1.0),
        ("rq-vae/imagenet-481m", 481.0, 1.0),
        ("rq-vae/imagenet-821m", 821.0, 1.0),
        ("rq-vae/imagenet-1400m", 1390.0, 5.0),
        ("rq-vae/imagenet-3800m", 3820.0, 5.0),
        ("rq-vae/cc3m-654m", 654.0, 1.0),
    ] {
        let recipe_file = root.join(format!("{recipe}.toml"));
        let parameters = match smalti::training::Recipe::read(&recipe_file, &[]).unwrap().task {
            Task::Tokenizer(task) => parameter_map(&task.model.init(&device).unwrap()),
            Task::Generator(task) => parameter_map(&task.model.init(&device).unwrap()),
            Task::Encoder(task) => parameter_map(&task.model.init(&device).unwrap()),
        };
        // The authors count neither the state of moving averages nor the tokenizer's code vectors in RQ-Transformer.
        let counts = |name: &str| {
            !name.ends_with("cluster_size") && !name.ends_with("embed_avg") && !name.starts_with("vectors.")
        };
        let counted = parameters.iter().filter(|(name, _)| counts(name));
        let parameters: usize = counted.map(|(_, entry)| entry.shape.iter().product::<usize>()).sum();
        let millions = parameters as f64 / 1e6;
        assert!((millions - published).abs() <= rounding, "{recipe} has {millions} million parameters");
    }
}

/// Every recipe in the repository is read strictly.
#[test]
fn recipes_are_complete() {
    let root = root().join("recipes");
    let mut count = 0;
    for system in fs::read_dir(root).unwrap() {
        for recipe in fs::read_dir(system.unwrap().path()).unwrap() {
            let path = recipe.unwrap().path();
            let read = smalti::training::Recipe::read(&path, &[]);
            assert!(read.is_ok(), "{}: {}", path.display(), read.err().unwrap());
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.starts_with("# smalti train "), "{} begins with its command", path.display());
            count += 1;
        }
    }
    assert!(count >= 6);
}

#[test]
fn every_system_is_proven_by_a_golden_stage_or_a_test() {
    let proofs = proofs();
    for system in systems::all() {
        let kind = system.kind;
        let config = format!("{}config", kind.replace('_', ""));
        let named = [format!("\"kind\": \"{kind}\""), format!("kind = \"{kind}\""), format!("generator(\"{kind}\"")];
        let is_type = |(at, _): (usize, &str)| !proofs[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let proven = proofs.match_indices(&config).any(is_type) || named.iter().any(|text| proofs.contains(text));
        assert!(proven, "no golden stage and no test makes a {} `{kind}`", system.role.name());
    }
}

/// A rules file that the program does not know cannot be used by anybody.
#[test]
fn every_rules_file_is_built_in() {
    for file in entries(&root().join("checkpoints")) {
        let table: toml::Table = fs::read_to_string(&file).unwrap().parse().unwrap();
        let system = file.file_stem().unwrap().to_string_lossy().into_owned();
        for part in table["parts"].as_table().unwrap().keys() {
            let found = Rules::builtin(&system, part);
            assert!(found.is_ok(), "checkpoints/{system}.toml, {part}: {}", found.err().unwrap());
        }
    }
}

/// The page shows each case of the repository; one that `parity` does not run has a test of its own.
#[test]
fn every_golden_case_is_listed_and_compared() {
    let page = document("docs/official-weights.md");
    let rows: Vec<&str> =
        page.lines().filter(|line| line.ends_with(" pass") || line.ends_with(" not implemented")).collect();
    let mut listed: Vec<&str> = rows.iter().map(|row| row.split_whitespace().next().unwrap()).collect();
    listed.sort_unstable();
    let systems = entries(&root().join("golden"));
    let cases: Vec<PathBuf> = systems.iter().flat_map(|system| entries(system)).collect();
    let mut on_disk: Vec<String> =
        cases.iter().map(|case| format!("{}/{}", name(case.parent().unwrap()), name(case))).collect();
    on_disk.sort_unstable();
    assert_eq!(listed, on_disk);
    let proofs = proofs();
    for row in rows.iter().filter(|row| row.ends_with(" not implemented")) {
        let case = row.split_whitespace().next().unwrap();
        assert!(proofs.contains(&case.to_lowercase()), "no test reads golden/{case}");
    }
}

#[test]
fn every_page_and_picture_is_linked() {
    let docs = files(&root().join("docs"));
    let pages: Vec<PathBuf> = docs.iter().filter(|file| file.extension().is_some_and(|e| e == "md")).cloned().collect();
    let text: String =
        [root().join("README.md")].iter().chain(&pages).map(|page| fs::read_to_string(page).unwrap()).collect();
    let shown = |file: &PathBuf| file.extension().is_some_and(|e| e == "md" || e == "png");
    for file in docs.into_iter().filter(shown) {
        let (from_docs, from_root) = (format!("]({}", name(&file)), format!("](docs/{}", name(&file)));
        assert!(text.contains(&from_docs) || text.contains(&from_root), "nothing links to docs/{}", name(&file));
    }
}
