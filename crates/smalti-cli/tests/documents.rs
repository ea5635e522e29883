//! The documents say what the code says.
#![allow(clippy::unwrap_used)]

use smalti::models::systems::SYSTEMS;
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
