//! Runs a recipe without the command line: `cargo run --release -p smalti-train --example train RECIPE OUT [key=value ...]`.

use smalti_base::{Progress, Result};
use std::cell::RefCell;
use std::path::Path;

struct Lines(RefCell<u64>);

impl Progress for Lines {
    fn begin(&self, what: &str, total: u64, unit: &'static str) {
        eprintln!("{what}: {total} {unit}");
    }
    fn advance(&self, done: u64, note: &str) {
        if !note.is_empty() {
            eprintln!("{done}: {note}");
        }
        *self.0.borrow_mut() = done;
    }
    fn end(&self) {}
    fn say(&self, line: &str) {
        eprintln!("{line}");
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let recipe = smalti_train::Recipe::read(Path::new(&arguments[0]), &arguments[2..])?;
    let device = smalti_base::device::open("cpu")?;
    let outcome = smalti_train::run(&recipe, Path::new(&arguments[1]), &device, &Lines(RefCell::new(0)))?;
    println!("{}", serde_json::to_string_pretty(&outcome).unwrap_or_default());
    Ok(())
}
