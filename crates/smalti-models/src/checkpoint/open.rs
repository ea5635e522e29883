//! Weights of any format: a file, a folder of files, or an index of files.

use super::pytorch::PytorchFile;
use super::tensors::{Source, Stored, WeightsFile};
use serde::Deserialize;
use smalti_base::{Error, Result, config, files};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Component, Path, PathBuf};

/// What files of weights end in, the preferred first.
pub const WEIGHTS_ENDINGS: [&str; 6] = ["safetensors", "ckpt", "pth", "pt", "bin", "pkl"];
/// How the indices of weights in several files end, the preferred first.
const INDICES: [&str; 2] = [".safetensors.index.json", ".bin.index.json"];
/// What the hub's libraries name the weights of a folder, the preferred first.
const STANDARD: [&str; 4] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
];
/// The same among files that end in `.bin`.
const STANDARD_BIN: [&str; 4] = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
];

/// Whether a file of this name is an index of weights in several files.
pub fn is_index(name: &str) -> bool {
    INDICES.iter().any(|ending| name.ends_with(ending))
}

/// Opens weights: a safetensors file, a PyTorch file, an index of such files, or a folder that holds one of them. The kind of a file is
/// seen by its content.
///
/// # Errors
/// [`Error::Io`], or [`Error::Invalid`] if there are none, several to choose from, or they are damaged.
pub fn open_weights(path: &Path) -> Result<Box<dyn Source>> {
    if path.is_dir() {
        return open_weights(&in_folder(path)?);
    }
    if is_index(&path.to_string_lossy()) {
        return Ok(Box::new(Indexed::open(path)?));
    }
    open_file(path)
}

/// A safetensors or PyTorch file.
fn open_file(path: &Path) -> Result<Box<dyn Source>> {
    let named = path.extension().is_some_and(|ending| ending == WEIGHTS_ENDINGS[0]);
    Ok(match content(path)? {
        Content::Safetensors => Box::new(WeightsFile::open(path)?),
        Content::Unknown if named => Box::new(WeightsFile::open(path)?),
        Content::Pytorch | Content::Unknown => Box::new(PytorchFile::open(path)?),
    })
}

/// What a file begins like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Safetensors,
    Pytorch,
    Unknown,
}

/// Sees by its first bytes what a file is.
///
/// # Errors
/// [`Error::Io`]; [`Error::Invalid`] for what people take for weights that were not fetched whole: a pointer of Git LFS, a web page.
pub(super) fn content(path: &Path) -> Result<Content> {
    let mut start = Vec::new();
    let file = files::open(path)?;
    file.take(64).read_to_end(&mut start).map_err(|e| Error::io("read", path, e))?;
    let place = path.display();
    if start.is_empty() {
        return Err(Error::invalid_hint(place, "is empty", "fetch or copy it again"));
    }
    if start.starts_with(b"version https://git-lfs") {
        let hint = "run `git lfs pull` in its folder, or fetch the file itself, for example with hf://ORG/NAME/PATH";
        return Err(Error::invalid_hint(place, "is a pointer of Git LFS, not the weights that it stands for", hint));
    }
    let text = String::from_utf8_lossy(&start).to_lowercase();
    if ["<!doctype", "<html", "<?xml"].iter().any(|tag| text.trim_start().starts_with(tag)) {
        let problem = "is a web page, not weights";
        return Err(Error::invalid_hint(place, problem, "it was fetched from the page about the file: fetch the file"));
    }
    // The length of a header, which is JSON.
    if start.len() >= 9 && start[8] == b'{' && start[5..8] == [0; 3] {
        return Ok(Content::Safetensors);
    }
    let pytorch =
        start.starts_with(b"PK\x03\x04") || start[0] == 0x80 && start.get(1).is_some_and(|version| *version < 6);
    Ok(if pytorch { Content::Pytorch } else { Content::Unknown })
}

/// The weights in a folder.
fn in_folder(folder: &Path) -> Result<PathBuf> {
    let failed = |e| Error::io("read folder", folder, e);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.path().is_file() {
            names.extend(entry.file_name().into_string());
        }
    }
    names.sort();
    match choose_weights(&names) {
        Ok(Some(name)) => Ok(folder.join(name)),
        Ok(None) => {
            let endings = WEIGHTS_ENDINGS.join(", .");
            Err(Error::file(folder, format!("holds no weights; expected a file that ends in .{endings}")))
        }
        Err(several) => {
            let names: Vec<String> = several.iter().map(|name| folder.join(name).display().to_string()).collect();
            let problem = format!("holds several weights files: {}", names.join(", "));
            Err(Error::invalid_hint(folder.display(), problem, "name one of them"))
        }
    }
}

/// Which of a folder's files holds its weights: one with a standard name, else the one index of safetensors or PyTorch files, else the one
/// file with the ending that is preferred among those that are there. `None` if there are no weights.
///
/// # Errors
/// The files, if none of several is preferred.
pub fn choose_weights(names: &[String]) -> std::result::Result<Option<&str>, Vec<&str>> {
    let standard = |known: [&str; 4]| known.into_iter().find_map(|known| names.iter().find(|name| *name == known));
    if let Some(name) = standard(STANDARD) {
        return Ok(Some(name));
    }
    let all = |fits: &dyn Fn(&Path) -> bool| -> Vec<&str> {
        names.iter().map(String::as_str).filter(|name| fits(Path::new(name))).collect()
    };
    let index = |ending: &str| match all(&|path| path.to_string_lossy().ends_with(ending))[..] {
        [index] => Some(index),
        _ => None,
    };
    if let Some(index) = index(INDICES[0]) {
        return Ok(Some(index));
    }
    for ending in WEIGHTS_ENDINGS {
        let shards = || standard(STANDARD_BIN).map(String::as_str).or_else(|| index(INDICES[1]));
        if let Some(name) = (ending == "bin").then(shards).flatten() {
            return Ok(Some(name));
        }
        match all(&|path| path.extension().is_some_and(|other| other == ending)) {
            found if found.is_empty() => {}
            found if found.len() == 1 => return Ok(found.first().copied()),
            found => return Err(found),
        }
    }
    Ok(None)
}

/// The files that an index names, relative to its folder.
///
/// # Errors
/// [`Error::Io`], or [`Error::Invalid`] if it is damaged or leads out of its folder.
pub fn indexed_files(index: &Path) -> Result<Vec<String>> {
    let files: BTreeSet<String> = Index::read(index)?.weight_map.into_values().collect();
    Ok(files.into_iter().collect())
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Index {
    fn read(path: &Path) -> Result<Self> {
        let index: Self = config::read_json(path)?;
        let plain = |name: &str| Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
        match index.weight_map.iter().find(|(_, name)| !plain(name)) {
            Some((tensor, name)) => {
                Err(Error::file(path, format!("the file `{name}` of `{tensor}` leads out of the folder")))
            }
            None => Ok(index),
        }
    }
}

/// Tensors in several files.
struct Indexed {
    path: PathBuf,
    files: BTreeMap<String, Box<dyn Source>>,
    /// The file of each tensor.
    homes: BTreeMap<String, String>,
}

impl Indexed {
    fn open(path: &Path) -> Result<Self> {
        let Index { weight_map: homes } = Index::read(path)?;
        let folder = path.parent().unwrap_or(Path::new("."));
        let names: BTreeSet<&String> = homes.values().collect();
        if let Some(lost) = names.iter().find(|name| !folder.join(name).exists()) {
            let lost_count = names.iter().filter(|name| !folder.join(name).exists()).count();
            let problem = format!("`{lost}` is not beside it; {lost_count} of its {} files are missing", names.len());
            return Err(Error::invalid_hint(path.display(), problem, "fetch all files that the index names"));
        }
        let mut files = BTreeMap::new();
        for name in names {
            let file = open_file(&folder.join(name))?;
            let there = file.shapes();
            if let Some((tensor, _)) = homes.iter().find(|(tensor, home)| *home == name && !there.contains_key(*tensor))
            {
                return Err(Error::file(path, format!("`{tensor}` is not in {name}")));
            }
            files.insert(name.clone(), file);
        }
        Ok(Self { path: path.to_path_buf(), files, homes })
    }
}

impl Source for Indexed {
    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let all = self.files.values().flat_map(|file| file.shapes());
        all.filter(|(name, _)| self.homes.contains_key(name)).collect()
    }

    fn read(&self, name: &str) -> Result<Stored> {
        match self.homes.get(name).and_then(|home| self.files.get(home)) {
            Some(file) => file.read(name),
            None => Err(Error::unknown(self.place(), "tensor", name, self.homes.keys())),
        }
    }
}

/// The tensors of a source whose names begin with a key and a dot, named without it.
pub struct Below<'a> {
    source: &'a dyn Source,
    prefix: String,
}

impl<'a> Below<'a> {
    /// All tensors, as they are named.
    pub fn all(source: &'a dyn Source) -> Self {
        Self { source, prefix: String::new() }
    }

    /// The tensors below `key`; `None` if there are none.
    pub fn new(source: &'a dyn Source, key: &str) -> Option<Self> {
        let prefix = format!("{key}.");
        source.shapes().keys().any(|name| name.starts_with(&prefix)).then_some(Self { source, prefix })
    }
}

impl Source for Below<'_> {
    fn place(&self) -> String {
        if self.prefix.is_empty() {
            return self.source.place();
        }
        format!("{}: {}", self.source.place(), self.prefix.trim_end_matches('.'))
    }

    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let shapes = self.source.shapes().into_iter();
        shapes.filter_map(|(name, shape)| Some((name.strip_prefix(&self.prefix)?.to_string(), shape))).collect()
    }

    fn read(&self, name: &str) -> Result<Stored> {
        self.source.read(&format!("{}{name}", self.prefix))
    }
}
