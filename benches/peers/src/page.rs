//! The page of numbers, made from `benchmarks.json` and `notes.md`.

use crate::home;
use crate::results::{BUSY, MEMORY_TARGET, Measured, Results};
use crate::rows::{self, Row, Work};
use serde_json::Value;
use smalti::base::{Result, files};
use std::fmt::Write;
use std::path::Path;

/// Writes `benchmarks.md` anew.
///
/// # Errors
/// Results, rows or notes that cannot be read, a page that cannot be written.
pub fn write(folder: &Path) -> Result<()> {
    let results = Results::read(folder)?;
    let notes = files::read_text(&home().join("notes.md"))?;
    let page = render(&rows::all()?, &results, &notes);
    files::write_bytes(&folder.join("benchmarks.md"), page.as_bytes())
}

const HEAD: &str = "# smalti and PyTorch side by side

Written by `cargo run --release -p smalti-peers`, which anyone can run; it makes its own Python environment. Both sides get the
same weights and inputs from the same files, and their outputs are compared first: a row whose outputs differ has no time. Then
the two take turns, each run in a fresh process with the same number of threads. Times are medians; the ratio (PyTorch / smalti:
above 1, smalti is faster) is the median over pairs of neighbouring runs, with the lowest and highest. PyTorch is used in the
fastest of the ways that were tried. Memory is the peak resident memory of the process, loading included.
";

fn render(rows: &[Row], results: &Results, notes: &str) -> String {
    let measured: Vec<(&Row, &Measured)> =
        rows.iter().filter_map(|row| Some((row, results.rows.get(&row.name)?))).collect();
    let mut setups: Vec<&Value> = Vec::new();
    for (_, row) in &measured {
        if !setups.iter().any(|setup| same(setup, &row.setup)) {
            setups.push(&row.setup);
        }
    }
    let mut page = HEAD.to_string();
    page += &machine(&measured, &setups);
    page += &times(rows, results, &setups);
    page += &memory(&measured);
    page += &ways(&measured);
    page += &agreement(&measured);
    page + "\n" + notes.trim_end() + "\n"
}

/// Whether two setups differ in nothing but the command.
fn same(a: &Value, b: &Value) -> bool {
    let without = |setup: &Value| {
        let mut setup = setup.clone();
        setup.as_object_mut().map(|fields| fields.remove("command"));
        setup
    };
    without(a) == without(b)
}

fn text(setup: &Value, key: &str) -> String {
    match &setup[key] {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "),
        Value::Null => "unknown".into(),
        other => other.to_string(),
    }
}

fn machine(measured: &[(&Row, &Measured)], setups: &[&Value]) -> String {
    let mut out = "\n## Machine\n\n".to_string();
    for (index, setup) in setups.iter().enumerate() {
        let field = |key| text(setup, key);
        let _ = writeln!(
            out,
            "{}. {}, {} cores, {} threads, {}; PyTorch {}, Python {}; smalti {} ({}), Burn {}, rustc {}; `{}`",
            index + 1,
            field("cpu"),
            field("cores"),
            field("threads"),
            field("flags"),
            field("torch"),
            field("python"),
            field("smalti"),
            field("commit"),
            field("burn"),
            field("rustc"),
            field("command")
        );
    }
    out += "\n| peak | PyTorch | smalti | date |\n|---|---|---|---|\n";
    for (_, row) in measured {
        let rate = |ms: f64| match row.per_run {
            Some(Work::Flop(n)) => Some(format!("{:.0} GFLOP/s", n / ms / 1e6)),
            Some(Work::Bytes(n)) => Some(format!("{:.1} GB/s", n / ms / 1e6)),
            None => None,
        };
        if let (Some(torch), Some(smalti)) = (rate(row.torch()), rate(row.smalti())) {
            let _ = writeln!(out, "| {} | {torch} | {smalti} | {} |", row.title, row.date);
        }
    }
    out
}

fn times(rows: &[Row], results: &Results, setups: &[&Value]) -> String {
    let mut out = "\n## Times\n\n| what | PyTorch | way of PyTorch | smalti | ratio (range) | target | | rounds | date | machine |\n\
                   |---|---|---|---|---|---|---|---|---|---|\n"
        .to_string();
    for row in rows.iter().filter(|row| row.per_run.is_none()) {
        let target = row.target.map_or_else(String::new, |target| format!(">= {target}"));
        let Some(found) = results.rows.get(&row.name) else {
            let why = row.off.as_deref().unwrap_or("not measured yet");
            let _ = writeln!(out, "| {} | | | | {why} | {target} | | | | |", row.title);
            continue;
        };
        let (ratio, least, most) = found.ratio();
        let met = match found.met() {
            _ if found.busy > BUSY => "the machine was in use",
            Some(true) => "met",
            Some(false) => "**missed**",
            None => "",
        };
        let setup = setups.iter().position(|setup| same(setup, &found.setup)).map_or(0, |at| at + 1);
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {ratio:.2} ({least:.2}..{most:.2}) | {target} | {met} | {} | {} | {setup} |",
            found.title,
            time(found.torch()),
            found.ways.best,
            time(found.smalti()),
            found.torch_ms.len(),
            found.date
        );
    }
    out
}

/// Milliseconds as a person writes them.
fn time(ms: f64) -> String {
    match ms {
        ms if ms >= 10_000.0 => format!("{:.1} s", ms / 1e3),
        ms if ms >= 1_000.0 => format!("{:.2} s", ms / 1e3),
        ms if ms >= 100.0 => format!("{ms:.0} ms"),
        ms if ms >= 10.0 => format!("{ms:.1} ms"),
        ms => format!("{ms:.2} ms"),
    }
}

fn memory(measured: &[(&Row, &Measured)]) -> String {
    let mut out = format!(
        "\n## Memory\n\nIn MiB; for PyTorch, the way that takes the least, since compiling takes memory too. \"At rest\" is the process after importing torch, or after its start. The target is at most \
         {MEMORY_TARGET} of PyTorch's.\n\n| what | PyTorch | at rest | smalti | at rest | ratio | |\n|---|---|---|---|---|---|---|\n"
    );
    let mib = |kib: u64| (kib / 1024).to_string();
    for (_, row) in measured.iter().filter(|(row, _)| row.per_run.is_none()) {
        let memory = &row.memory;
        let rest = |kib: Option<u64>| kib.map_or_else(|| "-".to_string(), mib);
        let met = if memory.ratio() <= MEMORY_TARGET { "met" } else { "**missed**" };
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {:.2} | {met} |",
            row.title,
            mib(memory.torch_kib),
            rest(memory.torch_base_kib),
            mib(memory.smalti_kib),
            rest(memory.smalti_base_kib),
            memory.ratio()
        );
    }
    out
}

fn ways(measured: &[(&Row, &Measured)]) -> String {
    let mut out = "\n## Ways of PyTorch that were tried\n\n| what | times in the trial |\n|---|---|\n".to_string();
    for (_, row) in measured.iter().filter(|(row, _)| row.variants.len() > 1) {
        let tried = row.ways.tried.iter().map(|(way, ms)| format!("{way}: {}", time(*ms)));
        let dropped = row.ways.dropped.iter().map(|(way, why)| format!("{way}: left out ({})", why.replace('|', "/")));
        let _ = writeln!(out, "| {} | {} |", row.title, tried.chain(dropped).collect::<Vec<_>>().join("; "));
    }
    out
}

fn agreement(measured: &[(&Row, &Measured)]) -> String {
    let mut out = "\n## Agreement\n\nWith the plain way of PyTorch; the one that was measured is within the same limits.\n\n| what | smalti's outputs against PyTorch's |\n|---|---|\n".to_string();
    for (_, row) in measured {
        let found: Vec<String> = row.agreement.iter().map(ToString::to_string).collect();
        let _ = writeln!(out, "| {} | {} |", row.title, found.join("; "));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_without_numbers_lists_every_row() {
        let rows = rows::all().unwrap();
        let page = render(&rows, &Results::default(), "## Notes\n\nnone\n");
        assert!(rows.iter().filter(|row| row.per_run.is_none()).all(|row| page.contains(&row.title)));
        assert!(page.ends_with("## Notes\n\nnone\n"));
    }

    #[test]
    fn times_have_three_digits() {
        assert_eq!(
            [time(12345.0), time(1234.0), time(123.4), time(12.34), time(1.234)].join(" "),
            "12.3 s 1.23 s 123 ms 12.3 ms 1.23 ms"
        );
    }
}
