//! Results as text for people.

use crate::table::Table;
use smalti::assemble::AssembleOutcome;
use smalti::bench::BenchOutcome;
use smalti::data::loader::Skipped;
use smalti::edit::EditOutcome;
use smalti::eval::Fidelity;
use smalti::evaluate::{EvaluateOutcome, GeneratorNumbers};
use smalti::export::ExportOutcome;
use smalti::generate::GenerateOutcome;
use smalti::import::ImportOutcome;
use smalti::inspect::InspectOutcome;
use smalti::parity::ParityOutcome;
use smalti::parity::Status;
use smalti::reconstruct::ReconstructOutcome;
use smalti::systems::SystemsOutcome;
use smalti::tokenize::TokenizeOutcome;
use smalti::train::TrainOutcome;
use smalti::weights::WeightsEffect;

/// Most rows of a table of images.
const ROWS: usize = 20;

/// What a run came to.
pub fn train(outcome: &TrainOutcome) -> String {
    let mut text = format!("{} steps in {:.0} s\n", outcome.step, outcome.seconds);
    for (name, value) in &outcome.evaluation {
        text += &format!("  {name}: {value}\n");
    }
    if outcome.skipped > 0 {
        text += &format!("{} steps were skipped: a loss or gradient was not finite\n", outcome.skipped);
    }
    if outcome.skipped_images > 0 {
        let list = outcome.folder.join("skipped.tsv");
        text += &format!("{} images could not be used: {}\n", outcome.skipped_images, list.display());
    }
    if let Some(bundle) = &outcome.bundle {
        text += &format!("bundle: {}\n", bundle.display());
    }
    text
}

/// Where the shards are and what is in them.
pub fn tokenize(outcome: &TokenizeOutcome) -> String {
    let resumed = match outcome.resumed_at {
        0 => String::new(),
        n => format!(", {n} of them were there already"),
    };
    format!(
        "{}: {} rows in {} shards, {} bytes{resumed}\neach row: {}\n{}",
        outcome.folder.display(),
        outcome.rows,
        outcome.shards,
        outcome.bytes,
        outcome.tokens,
        skipped(&outcome.skipped)
    )
}

/// Where the pictures are, and what the judge says of them.
pub fn generate(outcome: &GenerateOutcome) -> String {
    let (height, width) = outcome.size;
    let score = |i: usize| match outcome.scores.get(i) {
        Some(score) => format!(", score {score:.3}"),
        None => String::new(),
    };
    match (outcome.files.as_slice(), outcome.seeds.len()) {
        ([file], 1) => format!("{} ({width}x{height}, seed {}{})\n", file.display(), outcome.seeds[0], score(0)),
        ([file], n) if outcome.scores.is_empty() => {
            format!("{} ({n} pictures of {width}x{height}, from seed {})\n", file.display(), outcome.seeds[0])
        }
        ([file], n) => {
            let line = |i: usize| format!("  seed {}{}\n", outcome.seeds[i], score(i));
            let lines: String = (0..n).map(line).collect();
            format!("{} ({n} pictures of {width}x{height})\n{lines}", file.display())
        }
        (files, _) => files.iter().enumerate().map(|(i, file)| format!("{}{}\n", file.display(), score(i))).collect(),
    }
}

/// Where the picture is, and how much of it is new.
pub fn edit(outcome: &EditOutcome) -> String {
    let (made, all) = outcome.tokens;
    let share = 100.0 * outcome.repainted;
    format!("{} ({share:.1}% of the pixels repainted, {made} of {all} tokens)\n", outcome.file.display())
}

/// A row for each image, then the mean.
pub fn reconstruct(outcome: &ReconstructOutcome) -> String {
    let mut table = match outcome.mean {
        Fidelity::Pictures(_) => Table::new(&["image", "psnr", "ssim", "l1"]),
        Fidelity::Labels { .. } => Table::new(&["image", "labels right", "mean IoU"]),
    };
    for image in outcome.images.iter().take(ROWS) {
        table.row([image.key.clone()].into_iter().chain(scores(&image.scores)));
    }
    if let Some(more) = outcome.images.len().checked_sub(ROWS).filter(|more| *more > 0) {
        table.row([format!("... and {more} more")]);
    }
    table.row([format!("mean of {}", outcome.images.len())].into_iter().chain(scores(&outcome.mean)));
    for level in &outcome.levels {
        table.row([format!("mean of the first {} alone", level.levels)].into_iter().chain(scores(&level.mean)));
    }
    let (sheet, skipped) = (outcome.grid.display(), skipped(&outcome.skipped));
    let shown = match outcome.levels.as_slice() {
        [] => "pairs (original, reconstruction)".to_string(),
        levels => {
            let numbers: Vec<String> = levels.iter().map(|level| level.levels.to_string()).collect();
            format!("rows (original, first {} levels or depths, reconstruction)", numbers.join(", "))
        }
    };
    format!("{}{skipped}\n{shown}: {sheet}\n", table.text())
}

/// The numbers of a model.
pub fn evaluate(outcome: &EvaluateOutcome) -> String {
    let numbers = &outcome.tokenizer;
    let about: &[[&str; 2]] = match numbers.scores {
        Fidelity::Pictures(_) => {
            &[["psnr", "dB, mean over images"], ["ssim", "11x11 Gaussian window"], ["l1", "pixels in 0..1"]]
        }
        Fidelity::Labels { .. } => {
            &[["labels right", "share of all pixels"], ["mean IoU", "intersection over union, mean over classes"]]
        }
    };
    let mut table = Table::new(&["measure", "value", ""]);
    for ([name, what], value) in about.iter().zip(scores(&numbers.scores)) {
        table.row([*name, &value, what]);
    }
    if let Some(numbers) = &numbers.codebook {
        table.row(["usage", &format!("{:.1}%", 100.0 * numbers.usage), &format!("of {} codes", numbers.vocabulary)]);
        table.row(["perplexity", &format!("{:.1}", numbers.perplexity), ""]);
    }
    let loss = match outcome.unconditional {
        true => "validation loss of the generator, without a condition",
        false => "validation loss of the generator",
    };
    match &outcome.generator {
        None => {}
        Some(GeneratorNumbers::Bits(numbers)) => {
            table.row(["bits/token", &format!("{:.4}", numbers.bits_per_token), loss]);
            table.row(["bits/pixel", &format!("{:.4}", numbers.bits_per_pixel), "tokens x bits / (height x width)"]);
        }
        Some(GeneratorNumbers::Diffusion { diffusion_loss }) => {
            table.row(["diffusion", &format!("{diffusion_loss:.4}"), loss]);
        }
    }
    if let Some(effect) = &outcome.weights {
        let WeightsEffect { weights, bytes, bytes_f32, .. } = effect;
        let mebibytes = |bytes: usize| bytes as f64 / f64::from(1 << 20);
        let memory = format!("MiB of matrices, {:.1} in f32", mebibytes(*bytes_f32));
        table.row([format!("{weights} memory"), format!("{:.1}", mebibytes(*bytes)), memory]);
        let exact = format!("{:+.4} against f32", effect.bits_per_token - effect.bits_per_token_f32);
        table.row([format!("{weights} bits/token"), format!("{:.4}", effect.bits_per_token), exact]);
        let (mean, largest) = (effect.logit_difference_mean, effect.logit_difference_max);
        let largest = format!("mean difference to f32, {largest:.4} at most");
        table.row([format!("{weights} logits"), format!("{mean:.4}"), largest]);
        let changed = format!("{:.2}%", 100.0 * effect.changed_argmax);
        table.row([format!("{weights} changes"), changed, "of the most likely tokens".into()]);
    }
    format!("{} on {} images\n\n{}{}", outcome.model, outcome.images, table.text(), skipped(&outcome.skipped))
}

/// The machine's limits, a table of kernels, a table of models.
pub fn bench(outcome: &BenchOutcome) -> String {
    let machine = &outcome.machine;
    let mut text = format!(
        "{}, {}, {} threads: {:.0} GFLOP/s (f32 matrix product), {:.1} GB/s (reading memory)\n",
        machine.processor, machine.instructions, machine.threads, machine.gemm_gflops, machine.read_gbs
    );
    let times = |own: f64, base: f64| [format!("{own:.3}"), format!("{base:.3}"), format!("{:.2}", base / own)];
    let mut table =
        Table::new(&["kernel", "forward ms", "portable", "x", "+backward", "portable", "x", "GFLOP/s", "of peak"]);
    for row in &outcome.kernels {
        let both = row.backward_ms.zip(row.portable_backward_ms).map(|(own, base)| times(own, base));
        let rate = [format!("{:.0}", row.gflops), format!("{:.0}%", 100.0 * row.of_peak)];
        let rate = if row.gflops > 0.0 { rate } else { Default::default() };
        let forward = times(row.forward_ms, row.portable_forward_ms);
        table.row([row.name.clone()].into_iter().chain(forward).chain(both.unwrap_or_default()).chain(rate));
    }
    if !outcome.kernels.is_empty() {
        text += &format!("\n{}", table.text());
    }
    let mut table = Table::new(&["model", "", "batch", "ms", "images/s", "steps", "ms/step"]);
    for row in &outcome.models {
        let steps = row.steps.map(|steps| [steps.to_string(), format!("{:.2}", row.ms / steps as f64)]);
        let numbers = [row.batch.to_string(), format!("{:.1}", row.ms), format!("{:.2}", row.images_per_second)];
        let name = [row.model.clone(), row.what.to_string()];
        table.row(name.into_iter().chain(numbers).chain(steps.unwrap_or_default()));
    }
    if !outcome.models.is_empty() {
        text += &format!("\n{}", table.text());
    }
    let memory = outcome.peak_memory.map(|bytes| format!("\npeak memory {:.0} MiB\n", bytes as f64 / 1048576.0));
    text + &memory.unwrap_or_default()
}

/// A line for each part, and what was left aside.
pub fn import(outcome: &ImportOutcome) -> String {
    let mut text = format!("bundle: {}\n", outcome.bundle.display());
    for part in &outcome.parts {
        text += &format!(
            "{}: {} with {} parameters; {} tensors loaded, {} left at their initial values, {} left out\n",
            part.part.name(),
            part.variant,
            part.facts.parameters,
            part.loaded,
            part.kept.len(),
            part.dropped.len()
        );
        for (what, names) in [("kept", &part.kept), ("left out", &part.dropped)] {
            if !names.is_empty() {
                let shown: Vec<&str> = names.iter().take(ROWS / 2).map(String::as_str).collect();
                let more = names.len().checked_sub(shown.len()).filter(|more| *more > 0);
                let more = more.map_or(String::new(), |more| format!(" and {more} more"));
                text += &format!("  {what}: {}{more}\n", shown.join(", "));
            }
        }
    }
    text
}

/// Where the weights are, and what was left aside.
pub fn export(outcome: &ExportOutcome) -> String {
    let dropped = match outcome.dropped.as_slice() {
        [] => String::new(),
        names => format!("not in that layout: {}\n", names.join(", ")),
    };
    format!("{}: {} tensors in the layout of {}\n{dropped}", outcome.file.display(), outcome.tensors, outcome.system)
}

/// A line for each part.
pub fn assemble(outcome: &AssembleOutcome) -> String {
    let mut text = format!("bundle: {}\n", outcome.bundle.display());
    for part in &outcome.parts {
        let place = part.refers.as_ref().map_or("copied".into(), |file| format!("in {}", file.display()));
        text += &format!("  {}: {place}\n", part.part);
    }
    text
}

/// A table of tensors for each case, then a line for each case.
pub fn parity(outcome: &ParityOutcome) -> String {
    let mut text = String::new();
    let mut summary = Table::new(&["case", "tensors", "verdict"]);
    for case in &outcome.cases {
        let verdict = match case.status {
            Status::Passed => "pass",
            Status::Failed => "FAIL",
            Status::NotImplemented => "not implemented",
        };
        let outside = case.rows.iter().filter(|row| !row.within).count();
        let note = match outside {
            0 => verdict.to_string(),
            n => format!("{verdict}: {n} outside tolerance"),
        };
        summary.row([case.case.clone(), case.rows.len().to_string(), note]);
        if !case.rows.is_empty() {
            let mut table = Table::new(&["tensor", "max abs error", "max rel error", "tolerance", "verdict"]);
            for row in &case.rows {
                let [abs, rel, tolerance] = match row.tolerance {
                    Some(t) => {
                        let tolerance = format!("{:e} + {:e} x", t.absolute, t.relative);
                        [format!("{:.1e}", row.max_abs), format!("{:.1e}", row.max_rel), tolerance]
                    }
                    None => [format!("{} differ", row.max_abs), String::new(), "equal".into()],
                };
                let verdict = if row.within { "pass" } else { "FAIL" };
                table.row([row.tensor.clone(), abs, rel, tolerance, verdict.into()]);
            }
            text += &format!("{}\n{}", case.case, table.text());
        }
        if !case.not_compared.is_empty() && case.status != Status::NotImplemented {
            text += &format!("not compared: {}\n", case.not_compared.join(", "));
        }
        if let Some(error) = &case.error {
            text += &format!("{}: {error}\n", case.case);
        }
        text += if case.status == Status::NotImplemented { "" } else { "\n" };
    }
    text + &summary.text()
}

/// What is in a file or folder: the JSON document as an indented list.
pub fn inspect(outcome: &InspectOutcome) -> String {
    match serde_json::to_value(outcome) {
        Ok(value) => tree(&value, 0),
        Err(error) => format!("{error}\n"),
    }
}

/// The table of systems.
pub fn systems(outcome: &SystemsOutcome) -> String {
    let mut table = Table::new(&["role", "kind", "paper", "tokens", "what it is"]);
    for system in &outcome.systems {
        let paper = format!("arXiv:{}", system.arxiv);
        table.row([system.role.name(), system.kind, &paper, system.tokens, system.about]);
    }
    format!("{}\ndevices of this build: {}\n", table.text(), outcome.devices.join(", "))
}

fn scores(fidelity: &Fidelity) -> Vec<String> {
    match fidelity {
        Fidelity::Pictures(scores) => {
            let ssim = scores.ssim.map_or("-".into(), |ssim| format!("{ssim:.4}"));
            vec![format!("{:.2}", scores.psnr), ssim, format!("{:.4}", scores.l1)]
        }
        Fidelity::Labels { label_accuracy, label_mean_iou } => {
            vec![format!("{:.2}%", 100.0 * label_accuracy), format!("{label_mean_iou:.4}")]
        }
    }
}

fn skipped(skipped: &[Skipped]) -> String {
    match skipped.len() {
        0 => String::new(),
        n => format!("{n} images could not be used (listed above, and in --json)\n"),
    }
}

fn tree(value: &serde_json::Value, depth: usize) -> String {
    use serde_json::Value;
    let indent = "  ".repeat(depth);
    let scalar = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".into(),
        other => other.to_string(),
    };
    let is_leaf = |value: &Value| match value {
        Value::Object(entries) => entries.is_empty(),
        Value::Array(items) => items.iter().all(|item| !item.is_object() && !item.is_array()),
        _ => true,
    };
    let leaf = |value: &Value| match value {
        Value::Array(items) => items.iter().map(scalar).collect::<Vec<_>>().join(", "),
        Value::Object(_) => "-".into(),
        other => scalar(other),
    };
    match value {
        Value::Object(entries) => entries
            .iter()
            .map(|(key, value)| match is_leaf(value) {
                true => format!("{indent}{key}: {}\n", leaf(value)),
                false => format!("{indent}{key}:\n{}", tree(value, depth + 1)),
            })
            .collect(),
        Value::Array(items) => items
            .iter()
            .map(|item| match is_leaf(item) {
                true => format!("{indent}- {}\n", leaf(item)),
                false => format!("{indent}-\n{}", tree(item, depth + 1)),
            })
            .collect(),
        other => format!("{indent}{}\n", scalar(other)),
    }
}
