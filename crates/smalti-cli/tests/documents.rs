//! The documents say what the code says.
#![allow(clippy::unwrap_used)]

use burn::module::Module;
use smalti::models::systems::SYSTEMS;
use smalti::training::Task;
use std::path::Path;

fn document(name: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    std::fs::read_to_string(root.join(name)).unwrap()
}

#[test]
fn the_table_of_systems_is_the_codes() {
    let page = document("docs/systems.md");
    let rows = page.lines().filter(|line| line.contains("arXiv:")).count();
    assert_eq!(rows, SYSTEMS.len());
    for system in SYSTEMS {
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
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
    let device = burn::tensor::Device::flex();
    for (recipe, published, rounding) in [
        ("var/imagenet-vqvae", 108.9, 0.1),
        ("var/imagenet-d16", 310.0, 1.0),
        ("var/imagenet-d20", 600.0, 5.0),
        ("var/imagenet-d24", 1000.0, 50.0),
        ("var/imagenet-d30", 2000.0, 50.0),
        ("var/imagenet-512-d36", 2300.0, 60.0),
    ] {
        let recipe_file = root.join(format!("{recipe}.toml"));
        let parameters = match smalti::training::Recipe::read(&recipe_file, &[]).unwrap().task {
            Task::Tokenizer(task) => task.model.init(&device).unwrap().num_params(),
            Task::Generator(task) => task.model.init(&device).unwrap().num_params(),
        };
        let millions = parameters as f64 / 1e6;
        assert!((millions - published).abs() <= rounding, "{recipe} has {millions} million parameters");
    }
}

/// Every recipe in the repository is read strictly.
#[test]
fn recipes_are_complete() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
    let mut count = 0;
    for system in std::fs::read_dir(root).unwrap() {
        for recipe in std::fs::read_dir(system.unwrap().path()).unwrap() {
            let path = recipe.unwrap().path();
            let read = smalti::training::Recipe::read(&path, &[]);
            assert!(read.is_ok(), "{}: {}", path.display(), read.err().unwrap());
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.starts_with("# smalti train "), "{} begins with its command", path.display());
            count += 1;
        }
    }
    assert!(count >= 6);
}
