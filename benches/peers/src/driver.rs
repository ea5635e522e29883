//! Measures rows: files, the fastest way of PyTorch, agreement, then runs in turn.

use crate::agreement::{self, Agreement};
use crate::process::Process;
use crate::results::{BUSY, Measured, Memory, Results, Ways};
use crate::rows::{self, Row};
use crate::{home, machine, page, python};
use serde::Deserialize;
use serde_json::{Value, json};
use smalti::base::{Error, Result, config, files};
use smalti::models::checkpoint::read_tensors;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// What was asked for on the command line.
pub struct Wish {
    /// Parts of names of rows; empty for all.
    pub filter: String,
    /// Rounds instead of the rows' own.
    pub rounds: Option<usize>,
    /// Threads of each side.
    pub threads: Option<usize>,
    /// Folder of the page.
    pub out: PathBuf,
    /// Interpreter for the environment.
    pub python: PathBuf,
}

/// How long one way of PyTorch may take to be tried, compiling included.
const TRIAL: Duration = Duration::from_secs(180);
/// Between two runs, so that the threads of the side that ran have gone to sleep.
const PAUSE: Duration = Duration::from_millis(50);
/// How long anything else may take.
const PATIENCE: Duration = Duration::from_secs(900);

/// Where both sides are and how they are started.
struct Sides {
    cache: PathBuf,
    python: PathBuf,
    threads: usize,
}

/// A row's folder and its names.
struct Bench<'a> {
    sides: &'a Sides,
    row: Row,
    folder: PathBuf,
}

#[derive(Deserialize)]
struct Time {
    ms: f64,
    #[serde(default)]
    peak_kib: Option<u64>,
}

#[derive(Deserialize)]
struct Ready {
    #[serde(default)]
    base_kib: Option<u64>,
}

/// Measures the wished rows and writes the page after each.
///
/// # Errors
/// An environment that cannot be made, no such row; at the end, the first row that failed. Others are measured all the same.
pub fn measure(wish: &Wish) -> Result<()> {
    let all = rows::all()?;
    let chosen: Vec<&Row> = all.iter().filter(|row| rows::matches(&wish.filter, &row.name)).collect();
    if chosen.is_empty() {
        let names = all.iter().map(|row| row.name.clone());
        return Err(Error::unknown("--rows", "row", wish.filter.clone(), names));
    }
    let cache = machine::target_folder()?.join("peers");
    let threads = wish.threads.unwrap_or_else(machine::cores).max(1);
    let sides = Sides { python: python::environment(&cache, &wish.python)?, cache, threads };
    let setup = machine::setup(&sides.python, threads)?;
    let mut failed = None;
    for row in chosen {
        if let Some(reason) = &row.off {
            eprintln!("{}: not run: {reason}", row.name);
            continue;
        }
        let mut row = Row { threads, ..row.clone() };
        row.rounds = wish.rounds.unwrap_or(row.rounds).max(1);
        let measured = Bench::open(&sides, row.clone()).and_then(|bench| bench.measure(&setup));
        match measured {
            Ok(measured) => {
                eprintln!("{}: {}", row.name, measured.summary());
                // Read anew each time: another run may have written other rows meanwhile.
                let mut results = Results::read(&wish.out)?;
                results.put(measured);
                results.write(&wish.out)?;
                page::write(&wish.out)?;
            }
            Err(error) => {
                eprintln!("{}: failed: {error}", row.name);
                failed = failed.or(Some(error));
            }
        }
    }
    failed.map_or(Ok(()), Err)
}

impl<'a> Bench<'a> {
    /// Writes the row's declaration and the files of both sides.
    fn open(sides: &'a Sides, mut row: Row) -> Result<Self> {
        let folder = sides.cache.join("rows").join(&row.name);
        if folder.exists() {
            std::fs::remove_dir_all(&folder).map_err(|e| Error::io("remove", &folder, e))?;
        }
        files::create_folder(&folder)?;
        if row.system == "demo" {
            (row.commands, row.variants) = (demo_commands(sides, &row)?, vec!["torch".into()]);
        }
        config::write_json(&folder.join("row.json"), &row)?;
        let bench = Self { sides, row, folder };
        eprintln!("{}: {}", bench.row.name, bench.row.title);
        bench.say("prepare");
        bench.finish(bench.torch("prepare", None), "prepare-torch")?;
        if bench.row.commands.is_null() {
            bench.finish(bench.smalti("prepare"), "prepare-smalti")?;
        }
        Ok(bench)
    }

    fn say(&self, what: &str) {
        eprintln!("  {what}");
    }

    fn torch(&self, what: &str, variant: Option<&str>) -> Command {
        let mut command = Command::new(&self.sides.python);
        command.arg(home().join("peer.py")).arg(what).arg(&self.folder).args(variant);
        let threads = self.sides.threads.to_string();
        command.env("OMP_NUM_THREADS", &threads).env("MKL_NUM_THREADS", &threads).env("RAYON_NUM_THREADS", &threads);
        command.env("TORCHINDUCTOR_CACHE_DIR", self.sides.cache.join("inductor"));
        command
    }

    /// smalti's side; where whole programs are measured, their starter.
    fn smalti(&self, what: &str) -> Command {
        if !self.row.commands.is_null() {
            return self.torch(if what == "check" { "trial" } else { what }, Some("smalti"));
        }
        let mut command = Command::new(std::env::current_exe().unwrap_or_else(|_| "smalti-peers".into()));
        command.arg(what).arg(&self.folder).env("RAYON_NUM_THREADS", self.sides.threads.to_string());
        command
    }

    fn start(&self, mut command: Command, name: &str) -> Result<Process> {
        let title = format!("{} ({name})", self.row.name);
        Process::start(&mut command, &title, &self.folder.join(format!("{name}.log")))
    }

    /// Runs a command to its end.
    fn finish(&self, mut command: Command, name: &str) -> Result<()> {
        let log = self.folder.join(format!("{name}.log"));
        let file = std::fs::File::create(&log).map_err(|e| Error::io("write", &log, e))?;
        let status =
            command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).stderr(file).status();
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => {
                let text = files::read_text(&log).unwrap_or_default();
                let tail = text.lines().rev().take(12).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>();
                Err(Error::invalid(
                    format!("{} ({name})", self.row.name),
                    format!("{status}:\n  {}", tail.join("\n  ")),
                ))
            }
            Err(error) => Err(Error::invalid(format!("{command:?}"), error.to_string())),
        }
    }

    fn measure(&self, setup: &Value) -> Result<Measured> {
        let ways = self.try_ways()?;
        let agreement = self.agree(&ways)?;
        for found in &agreement {
            self.say(&found.to_string());
        }
        let before = machine::busy().unwrap_or(0.0);
        let (torch_ms, smalti_ms, memory) = self.rounds(&ways)?;
        let busy = machine::busy().unwrap_or(0.0).max(before);
        if busy > BUSY {
            self.say(&format!("warning: others use {:.0} % of the cores; measure again when they rest", busy * 100.0));
        }
        Ok(Measured {
            name: self.row.name.clone(),
            title: self.row.title.clone(),
            target: self.row.target,
            per_run: self.row.per_run,
            ways,
            torch_ms,
            smalti_ms,
            memory,
            busy,
            agreement,
            date: machine::today(),
            setup: setup.clone(),
        })
    }

    /// Times each way of PyTorch in a process of its own.
    fn try_ways(&self) -> Result<Ways> {
        let (mut tried, mut best): (BTreeMap<String, f64>, Option<(f64, String)>) = (BTreeMap::new(), None);
        let (mut dropped, mut peaks) = (BTreeMap::new(), BTreeMap::new());
        for variant in &self.row.variants {
            let name = format!("trial-{}", slug(variant));
            let time: Result<Time> =
                self.start(self.torch("trial", Some(variant)), &name).and_then(|mut process| process.answer(TRIAL));
            match time {
                Ok(Time { ms, peak_kib }) => {
                    peaks.extend(peak_kib.map(|peak| (variant.clone(), peak)));
                    self.say(&format!("PyTorch, {variant}: {ms:.1} ms"));
                    tried.insert(variant.clone(), ms);
                    if best.as_ref().is_none_or(|(least, _)| ms < *least) {
                        best = Some((ms, variant.clone()));
                    }
                }
                Err(error) if self.row.variants.len() == 1 => return Err(error),
                Err(error) => {
                    let error = error.to_string();
                    self.say(&format!("PyTorch, {variant}: left out: {error}"));
                    // The messages behind it are for the screen: they name files of this machine.
                    let reason = error.split("; its last messages").next().unwrap_or_default();
                    dropped.insert(variant.clone(), reason.to_string());
                }
            }
        }
        match best {
            Some((_, best)) => Ok(Ways { best, tried, peak_kib: peaks, dropped }),
            None => Err(Error::invalid(&self.row.name, "no way of PyTorch worked; see the messages above")),
        }
    }

    /// Compares smalti's outputs with those of the first way that worked, the plain one, and with those of the one that competes.
    fn agree(&self, ways: &Ways) -> Result<Vec<Agreement>> {
        self.say("compare");
        let mut checker = self.start(self.smalti("check"), "check-smalti")?;
        checker.answer::<Value>(PATIENCE)?;
        let name = if self.row.commands.is_null() { "smalti" } else { "torch-smalti" };
        let ours = read_tensors(&self.folder.join(format!("{name}.safetensors")))?;
        let with = |variant: &str| {
            let theirs = read_tensors(&self.folder.join(format!("torch-{}.safetensors", slug(variant))))?;
            agreement::compare(&self.row.name, &self.row.tolerance, &theirs, &ours)
        };
        let competing = with(&ways.best)?;
        let plain = self.row.variants.iter().find(|variant| ways.tried.contains_key(*variant));
        plain.filter(|plain| **plain != ways.best).map_or(Ok(competing), |plain| with(plain))
    }

    /// Both sides in fresh processes, in turn: the times of each, and their memory.
    fn rounds(&self, ways: &Ways) -> Result<(Vec<f64>, Vec<f64>, Memory)> {
        let mut torch = self.start(self.torch("worker", Some(&ways.best)), "worker-torch")?;
        let torch_ready: Ready = torch.answer(TRIAL + PATIENCE)?;
        let mut smalti = self.start(self.smalti("worker"), "worker-smalti")?;
        let smalti_ready: Ready = smalti.answer(PATIENCE)?;
        let run = |process: &mut Process| {
            std::thread::sleep(PAUSE);
            process.ask::<Time>(&json!({ "run": true }), PATIENCE)
        };
        self.say("warm up");
        run(&mut torch)?;
        run(&mut smalti)?;
        let (mut torch_ms, mut smalti_ms, mut peaks) = (Vec::new(), Vec::new(), (0, 0));
        for round in 1..=self.row.rounds {
            let (theirs, ours) = (run(&mut torch)?, run(&mut smalti)?);
            self.say(&format!("round {round}: PyTorch {:.1} ms, smalti {:.1} ms", theirs.ms, ours.ms));
            torch_ms.push(theirs.ms);
            smalti_ms.push(ours.ms);
            peaks = (peaks.0.max(theirs.peak_kib.unwrap_or(0)), peaks.1.max(ours.peak_kib.unwrap_or(0)));
        }
        let started = !self.row.commands.is_null();
        let theirs = if started { peaks.0 } else { torch.peak_kib()? };
        let memory = Memory {
            torch_kib: ways.peak_kib.values().copied().fold(theirs, u64::min),
            smalti_kib: if started { peaks.1 } else { smalti.peak_kib()? },
            torch_base_kib: torch_ready.base_kib.filter(|_| !started),
            smalti_base_kib: smalti_ready.base_kib.filter(|_| !started),
        };
        Ok((torch_ms, smalti_ms, memory))
    }
}

/// The programs that make a first picture. smalti's is built here, so that one command is enough.
fn demo_commands(sides: &Sides, row: &Row) -> Result<Value> {
    let program = machine::build_program()?;
    let root = home().join("../..");
    let prompt = row.options.get("prompt").and_then(Value::as_str).unwrap_or_default();
    let text = |path: &Path| path.display().to_string();
    let (bundle, script) = (text(&root.join("assets/demo")), text(&home().join("systems/demo.py")));
    Ok(json!({
        "torch": { "run": [text(&sides.python), script, bundle, prompt, "{out}"], "greedy": ["greedy"] },
        "smalti": {
            "run": [text(&program), "generate", prompt, "--model", bundle, "--quiet", "--out", "{out}"],
            "greedy": ["--temperature", "0"],
        },
    }))
}

/// A way's name in names of files, as `peer.py` makes it.
fn slug(variant: &str) -> String {
    variant.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect()
}
