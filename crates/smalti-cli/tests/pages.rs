//! The commands that README.md, CONTRIBUTING.md and the pages in docs/ show are run, in the order of their page. A block of commands that a test
//! cannot run has a comment before it: `<!-- not run: why -->`.
#![allow(clippy::unwrap_used)]
#![cfg(unix)]

mod stage;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A block of commands of a page.
#[derive(Debug, PartialEq)]
struct Block {
    /// The line where it begins, counted from 1.
    line: usize,
    /// Why it is not run.
    not_run: Option<String>,
    commands: Vec<String>,
}

/// The blocks of commands of a page: all lines of ```sh, and of ```console those after a `$`.
fn blocks(page: &str) -> Vec<Block> {
    let (mut blocks, mut open, mut before) = (Vec::new(), None::<(Block, bool)>, "");
    for (number, line) in page.lines().enumerate() {
        match (&mut open, line) {
            (None, "```sh" | "```console") => {
                let why = before.strip_prefix("<!-- not run: ").and_then(|rest| rest.strip_suffix(" -->"));
                let block = Block { line: number + 1, not_run: why.map(str::to_string), commands: Vec::new() };
                open = Some((block, line == "```console"));
            }
            (Some(_), "```") => blocks.extend(open.take().map(|(block, _)| block)),
            (Some((block, is_console)), line) => match (block.commands.last_mut(), line.strip_prefix("$ ")) {
                (Some(last), None) if last.ends_with('\\') => {
                    *last = format!("{}{}", last.trim_end_matches('\\'), line.trim())
                }
                (_, Some(command)) if *is_console => block.commands.push(command.into()),
                (_, None) if !*is_console && !line.is_empty() => block.commands.push(line.into()),
                _ => {}
            },
            (None, _) => {}
        }
        if !line.is_empty() {
            before = line;
        }
    }
    blocks
}

/// The command as it is run: the program of this build, on little data and for two steps.
fn shortened(command: &str) -> Option<String> {
    let arguments = command.strip_prefix("smalti ").or_else(|| command.strip_prefix("cargo run --release -- "))?;
    let less = match arguments.split_whitespace().next()? {
        "train" => {
            "schedule.steps=2 schedule.warmup=0 batch.size=2 evaluation.every=2 evaluation.images=4 evaluation.pictures=2"
        }
        "tokenize" | "evaluate" | "reconstruct" if !arguments.contains("--limit") => "--limit 24",
        _ => "",
    };
    Some(format!("smalti {arguments} {less}"))
}

/// A folder that looks like the repository to the commands, with pictures that pages take for granted.
fn place() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["assets", "recipes", "golden", "docs"] {
        symlink(stage::root().canonicalize().unwrap().join(name), folder.path().join(name)).unwrap();
    }
    stage::picture(&folder.path().join("photo.png"), 80, 64, 1);
    stage::picture(&folder.path().join("mask.png"), 80, 64, 2);
    folder
}

fn run(command: &str, folder: &Path) -> Result<(), String> {
    let program = assert_cmd::cargo::cargo_bin("smalti");
    let path = format!("{}:{}", program.parent().unwrap().display(), std::env::var("PATH").unwrap());
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).current_dir(folder).env("PATH", path).env_remove("SMALTI_MODEL");
    let output = shell.output().unwrap();
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("`{command}`: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<PathBuf> =
        fs::read_dir(stage::root().join("docs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    pages.extend(["README.md", "CONTRIBUTING.md"].map(|page| stage::root().join(page)));
    pages.retain(|page| page.extension().is_some_and(|ending| ending == "md"));
    pages.sort();
    pages
}

#[test]
fn commands_of_the_pages_work() {
    let mut count = 0;
    for page in pages() {
        let (folder, blocks) = (place(), blocks(&fs::read_to_string(&page).unwrap()));
        for block in blocks.iter().filter(|block| block.not_run.is_none()) {
            let at = format!("{}, line {}", page.display(), block.line);
            assert!(!block.commands.is_empty(), "{at}: no command");
            for command in &block.commands {
                let command = shortened(command).unwrap_or_else(|| {
                    panic!("{at}: `{command}` is not the program's; say `<!-- not run: why -->` before the block")
                });
                run(&command, folder.path()).unwrap_or_else(|error| panic!("{at}: {error}"));
                count += 1;
            }
        }
    }
    assert!(count > 10, "{count} commands");
}

#[test]
fn blocks_are_found() {
    let page = "text\n\n```sh\nsmalti a \\\n  b\nsmalti c\n```\n<!-- not run: long -->\n```console\n$ smalti d\nout\n$ smalti e\n```\n```toml\nf = 1\n```\n";
    let block = |line, not_run: Option<&str>, commands: &[&str]| Block {
        line,
        not_run: not_run.map(str::to_string),
        commands: commands.iter().map(|command| command.to_string()).collect(),
    };
    let expected = [block(3, None, &["smalti a b", "smalti c"]), block(9, Some("long"), &["smalti d", "smalti e"])];
    assert_eq!(blocks(page), expected);
    assert_eq!(shortened("cargo run --release -- systems").unwrap().trim(), "smalti systems");
    assert_eq!(shortened("cargo test"), None);
    assert!(run("smalti sistems", Path::new(".")).unwrap_err().contains("systems"));
}
