//! The folder of a training run: its recipe, logs, checkpoints, samples and finally a bundle.

use crate::start::StartFacts;
use smalti_base::{Error, Result, config, files};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Begins the names of checkpoints.
const STEP: &str = "step-";
/// Begins the names of checkpoints that are being removed.
const REMOVED: &str = ".removed-";

/// The paths of a run, held for this process.
#[derive(Debug)]
pub struct RunFolder {
    root: PathBuf,
    _held: files::FolderLock,
}

impl RunFolder {
    /// Opens or creates the folder for a recipe, given as TOML text with everything resolved.
    ///
    /// # Errors
    /// A folder that cannot be written, in which another process works, or that holds a run of another recipe.
    pub fn open(root: &Path, recipe: &toml::Table) -> Result<Self> {
        files::create_folder(root)?;
        let folder = Self { root: root.to_path_buf(), _held: files::FolderLock::take(root, "training")? };
        for inside in [root, &folder.checkpoints(), &folder.samples()] {
            files::create_folder(inside)?;
            // This also removes what killed processes left there.
            files::must_be_writable(inside)?;
        }
        folder.sweep()?;
        let path = root.join("recipe.toml");
        if path.exists() {
            let old: toml::Table =
                files::read_text(&path)?.parse().map_err(|e: toml::de::Error| Error::file(&path, e.to_string()))?;
            if let Some(key) = first_difference(&fixed_part(&renamed(old)), &fixed_part(recipe), "") {
                return Err(Error::invalid_hint(
                    root.display(),
                    format!("holds a run of another recipe: `{key}` differs from {}", path.display()),
                    "choose another folder with --out, or remove this one",
                ));
            }
        } else if !folder.steps()?.is_empty() {
            return Err(Error::invalid_hint(
                root.display(),
                "holds checkpoints but no recipe.toml, so there is no telling which recipe made them",
                "choose another folder with --out",
            ));
        }
        files::write_bytes(&path, recipe.to_string().as_bytes())?;
        Ok(folder)
    }

    /// The run's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where checkpoints are.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// Where pictures of evaluations are.
    pub fn samples(&self) -> PathBuf {
        self.root.join("samples")
    }

    /// The finished model.
    pub fn bundle(&self) -> PathBuf {
        self.root.join("bundle")
    }

    /// The folder of the checkpoint at a step.
    pub fn checkpoint(&self, step: u64) -> PathBuf {
        self.checkpoints().join(format!("step-{step:08}"))
    }

    /// The steps of the checkpoints that are there, oldest first.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn steps(&self) -> Result<Vec<u64>> {
        let mut steps: Vec<u64> =
            self.names()?.iter().filter_map(|name| name.strip_prefix(STEP)?.parse().ok()).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    fn names(&self) -> Result<Vec<String>> {
        let folder = self.checkpoints();
        let failed = |e| Error::io("read", &folder, e);
        let names = fs::read_dir(&folder).map_err(failed)?.map(|entry| Ok(entry?.file_name().display().to_string()));
        names.collect::<std::io::Result<_>>().map_err(failed)
    }

    /// Removes a checkpoint. Its name goes first, so that none is ever there in part.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(&self, step: u64) -> Result<()> {
        let (path, aside) = (self.checkpoint(step), self.checkpoints().join(format!("{REMOVED}{step:08}")));
        fs::rename(&path, &aside).and_then(|()| fs::remove_dir_all(&aside)).map_err(|e| Error::io("remove", &path, e))
    }

    /// Takes a damaged checkpoint out of the way; returns where it is then.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn set_aside(&self, step: u64) -> Result<PathBuf> {
        let (path, aside) = (self.checkpoint(step), self.checkpoints().join(format!("damaged-{step:08}")));
        let failed = |e| Error::io("rename", &path, e);
        if aside.exists() {
            fs::remove_dir_all(&aside).map_err(failed)?;
        }
        fs::rename(&path, &aside).map_err(failed)?;
        Ok(aside)
    }

    /// Ends the removals that killed processes began.
    fn sweep(&self) -> Result<()> {
        for name in self.names()?.iter().filter(|name| name.starts_with(REMOVED)) {
            let path = self.checkpoints().join(name);
            fs::remove_dir_all(&path).map_err(|e| Error::io("remove", &path, e))?;
        }
        Ok(())
    }

    /// Removes old checkpoints: the newest `keep` stay, and the best.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn prune(&self, keep: usize, best: Option<u64>) -> Result<()> {
        let steps = self.steps()?;
        let old = steps.len().saturating_sub(keep.max(1));
        for step in steps.into_iter().take(old).filter(|step| Some(*step) != best) {
            self.remove(step)?;
        }
        Ok(())
    }

    /// Lists the images that could not be used, a line each: key, tab, reason.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_skipped(&self, skipped: &[(String, String)]) -> Result<()> {
        let lines: String = skipped.iter().map(|(key, error)| format!("{key}\t{error}\n")).collect();
        files::write_bytes(&self.root.join("skipped.tsv"), lines.as_bytes())
    }

    /// What [`Self::write_skipped`] listed.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn skipped(&self) -> Result<Vec<(String, String)>> {
        let path = self.root.join("skipped.tsv");
        let text = if path.exists() { files::read_text(&path)? } else { String::new() };
        let lines = text.lines().filter_map(|line| line.split_once('\t'));
        Ok(lines.map(|(key, error)| (key.to_string(), error.to_string())).collect())
    }

    /// Keeps what the run began with: later the file that it came from may be another one.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_start(&self, facts: &StartFacts) -> Result<()> {
        config::write_json(&self.root.join("start.json"), facts)
    }

    /// What [`Self::write_start`] kept.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Invalid`].
    pub fn start(&self) -> Result<Option<StartFacts>> {
        let path = self.root.join("start.json");
        path.is_file().then(|| config::read_json(&path)).transpose()
    }

    /// Keeps what the run learns from, by the key in the recipe.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_inputs(&self, inputs: &BTreeMap<String, String>) -> Result<()> {
        config::write_json(&self.root.join("data.json"), inputs)
    }

    /// What [`Self::write_inputs`] kept; nothing in the folders of earlier versions.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Invalid`].
    pub fn inputs(&self) -> Result<BTreeMap<String, String>> {
        let path = self.root.join("data.json");
        if path.is_file() { config::read_json(&path) } else { Ok(BTreeMap::new()) }
    }

    /// Opens `metrics.jsonl` to append, without the lines after `step`: those steps are done again. `measured` says whether the
    /// evaluation at `step` itself was done; if not, its line goes too.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn metrics(&self, step: u64, measured: bool) -> Result<Metrics> {
        let path = self.root.join("metrics.jsonl");
        if path.exists() {
            let text = files::read_text(&path)?;
            let stays = |line: &&str| {
                let Ok(serde_json::Value::Object(values)) = serde_json::from_str(line) else { return false };
                let is_measure = values.keys().any(|key| key.starts_with("validation_"));
                values
                    .get("step")
                    .and_then(serde_json::Value::as_u64)
                    .is_some_and(|at| at < step || (at == step && (measured || !is_measure)))
            };
            let kept: String = text.lines().filter(stays).flat_map(|line| [line, "\n"]).collect();
            files::write_bytes(&path, kept.as_bytes())?;
        }
        let file =
            fs::OpenOptions::new().create(true).append(true).open(&path).map_err(|e| Error::io("write", &path, e))?;
        Ok(Metrics { path, file })
    }
}

/// `metrics.jsonl`: one JSON object a line.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: fs::File,
}

impl Metrics {
    /// Appends a line.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn line(&mut self, value: &serde_json::Value) -> Result<()> {
        writeln!(self.file, "{value}").map_err(|e| Error::io("write", &self.path, e))
    }

    /// Waits until all lines are on the disk: a checkpoint must not be there without the lines before it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::io("write", &self.path, e))
    }
}

/// The part of a recipe that a resumed run must share: all but how often things are written.
fn fixed_part(recipe: &toml::Table) -> toml::Table {
    let mut fixed = recipe.clone();
    for free in ["logging", "evaluation", "checkpoint"] {
        fixed.remove(free);
    }
    fixed
}

/// A recipe of an earlier version with the names of today.
fn renamed(mut recipe: toml::Table) -> toml::Table {
    let loss = recipe.get_mut("task").and_then(|task| task.get_mut("loss"));
    let adversarial = loss.and_then(|loss| loss.get_mut("adversarial")).and_then(toml::Value::as_table_mut);
    if let Some(adversarial) = adversarial
        && let Some(discriminator) = adversarial.remove("critic")
    {
        adversarial.insert("discriminator".into(), discriminator);
    }
    recipe
}

fn first_difference(old: &toml::Table, new: &toml::Table, inside: &str) -> Option<String> {
    let keys: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    keys.into_iter().find_map(|key| {
        let path = if inside.is_empty() { key.clone() } else { format!("{inside}.{key}") };
        match (old.get(key), new.get(key)) {
            (Some(toml::Value::Table(a)), Some(toml::Value::Table(b))) => first_difference(a, b, &path),
            (a, b) if a == b => None,
            _ => Some(path),
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Earlier recipes called the discriminator a critic.
    #[test]
    fn a_run_is_known_by_the_names_of_its_time() {
        let place = tempfile::tempdir().unwrap();
        let recipe = |key: &str, ndf: u32| -> toml::Table {
            let text = format!(
                "name = 'a'\n[task]\nkind = 'tokenizer'\n[task.loss.adversarial]\nndf = {ndf}\n{key} = {{ kind = 'patch' }}\n"
            );
            text.parse().unwrap()
        };
        RunFolder::open(place.path(), &recipe("critic", 64)).unwrap();
        RunFolder::open(place.path(), &recipe("discriminator", 64)).unwrap();
        let written: toml::Table = std::fs::read_to_string(place.path().join("recipe.toml")).unwrap().parse().unwrap();
        assert_eq!(written, recipe("discriminator", 64));
        let refused = RunFolder::open(place.path(), &recipe("discriminator", 32)).unwrap_err().to_string();
        assert!(refused.contains("task.loss.adversarial.ndf"), "{refused}");
    }
}
