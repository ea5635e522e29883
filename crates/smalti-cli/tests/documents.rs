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

/// The code that compares with golden cases, and all integration tests with the models that laws hold for, in lower case.
fn proofs() -> String {
    let crates = entries(&root().join("crates"));
    let tests = crates.iter().map(|folder| folder.join("tests"));
    let stages = [root().join("crates/smalti/src/golden"), root().join("crates/smalti-parity/src")];
    let folders = tests.chain(stages).filter(|folder| folder.is_dir());
    let is_source =
        |file: &PathBuf| file.extension().is_some_and(|e| e == "rs") || file.to_string_lossy().contains("/laws/");
    let sources = folders.flat_map(|folder| files(&folder)).filter(is_source);
    sources.map(|file| fs::read_to_string(file).unwrap().to_lowercase()).collect()
}

/// The table of systems as a page has it.
fn table_of_systems() -> String {
    let head = "| role | `kind` | paper | tokens | what it is |\n|---|---|---|---|---|\n";
    let row = |system: systems::System| {
        let (role, kind) = (system.role.name(), system.kind);
        format!("| {role} | `{kind}` | arXiv:{} | {} | {} |\n", system.arxiv, system.tokens, system.about)
    };
    systems::all().into_iter().map(row).fold(head.to_string(), |table, row| table + &row)
}

/// With `UPDATE_PAGES=1` the table is written instead.
#[test]
fn the_table_of_systems_is_the_codes() {
    let (name, table) = ("docs/systems.md", table_of_systems());
    let page = document(name);
    let is_row = |line: &&str| line.starts_with('|');
    let before: String = page.split_inclusive('\n').take_while(|line| !is_row(line)).collect();
    let after: String = page.split_inclusive('\n').skip_while(|line| !is_row(line)).skip_while(is_row).collect();
    let expected = before + &table + &after;
    if std::env::var_os("UPDATE_PAGES").is_some() {
        fs::write(root().join(name), &expected).unwrap();
    }
    assert!(document(name) == expected, "{name} should have this table (UPDATE_PAGES=1 writes it):\n{table}");
}

/// The signatures that the page shows are those of the code.
#[test]
fn the_traits_of_the_page_are_the_codes() {
    let models = files(&root().join("crates/smalti-models/src"));
    let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let code: String = models.iter().map(|file| squeezed(&fs::read_to_string(file).unwrap()) + " ").collect();
    let page = document("docs/architecture.md");
    let (mut in_trait, mut count) = ("", 0);
    for line in page.lines() {
        if let Some(name) = line.strip_prefix("// ") {
            in_trait = name;
        } else if line.starts_with("fn ") {
            let start =
                code.find(&format!("pub trait {in_trait} {{")).or_else(|| code.find(&format!("pub trait {in_trait}:")));
            let body = &code[start.unwrap_or_else(|| panic!("there is no trait {in_trait}"))..];
            let body = &body[..body[1..].find("pub trait ").map_or(body.len(), |end| end + 1)];
            assert!(body.contains(&squeezed(line)), "{in_trait} has no `{line}`");
            count += 1;
        }
    }
    assert!(count > 10);
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

/// The verdicts that the page shows are of cases of the repository.
#[test]
fn golden_cases_of_the_page_exist() {
    let page = document("docs/official-weights.md");
    let rows: Vec<&str> = page.lines().filter(|line| line.ends_with("   pass")).collect();
    assert!(!rows.is_empty());
    for row in rows {
        let case = row.split_whitespace().next().unwrap();
        assert!(root().join("golden").join(case).join("case.json").is_file(), "there is no golden/{case}");
    }
}

#[test]
fn links_of_the_pages_lead_somewhere() {
    let mut pages = files(&root().join("docs"));
    pages.extend(["README.md", "CONTRIBUTING.md"].map(|page| root().join(page)));
    for page in pages.iter().filter(|page| page.extension().is_some_and(|e| e == "md")) {
        let text = fs::read_to_string(page).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next()) {
            let is_file = link.is_empty() || link.contains("://") || page.parent().unwrap().join(link).exists();
            assert!(is_file, "{} links to {link}", page.display());
        }
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
