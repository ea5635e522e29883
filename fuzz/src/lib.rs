//! Readers of this project over arbitrary bytes. Whatever they say, they must not panic, hang or pass their memory: the fuzzer looks at
//! nothing else.

use burn::tensor::Device;
use smalti::base::{Planes, files};
use smalti::data::datasets::{self, Dataset};
use smalti::data::image::{Limits, decode_as, decode_mask, parameters};
use smalti::data::{Shards, TextTokenizer};
use smalti::inspect::{InspectArgs, run};
use smalti::model::ModelPlan;
use smalti::models::checkpoint::{Source, WeightsFile, open_weights};
use smalti::training::Recipe;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Once, OnceLock};

/// Of images here: a mutant may be large in few bytes, and millions are read.
const LIMITS: Limits = Limits { pixels: 1 << 20, bytes: 1 << 24, memory: 1 << 26 };
/// Most images or rows of a data set that are read.
const ROWS: usize = 64;

/// A folder of this process in memory, if there is one.
fn place() -> &'static Path {
    static PLACE: OnceLock<tempfile::TempDir> = OnceLock::new();
    let make = || {
        let memory = Path::new("/dev/shm");
        let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        made.expect("a temporary folder can be made")
    };
    PLACE.get_or_init(make).path()
}

fn put(name: &str, data: &[u8]) -> PathBuf {
    let path = place().join(name);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).expect("a folder can be made");
    }
    fs::write(&path, data).expect("a file can be written");
    path
}

/// The first byte as a choice of so many, and the rest.
fn choice(data: &[u8], of: u8) -> Option<(u8, &[u8])> {
    let (first, rest) = data.split_first()?;
    Some((first % of, rest))
}

/// A bundle or token folder of the repository's tests, copied once.
fn copied(from: &str) -> PathBuf {
    fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            let to = to.join(entry.file_name());
            match entry.file_type()?.is_dir() {
                true => copy(&entry.path(), &to)?,
                false => drop(fs::copy(entry.path(), to)?),
            }
        }
        Ok(())
    }
    let to = place().join(from);
    if !to.is_dir() {
        let written = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/smalti-cli/tests/written");
        copy(&written.join(from), &to).expect("the repository is whole");
    }
    to
}

fn read_all(dataset: &dyn Dataset) {
    let _ = (dataset.warnings().len(), dataset.classes().len(), dataset.describe());
    for index in 0..dataset.len().min(ROWS) {
        let Ok(record) = dataset.read(index) else { continue };
        let _ = record.decode(Planes::Colour, [255; 3], &LIMITS);
    }
}

/// Image files of all formats as images, label maps and masks, and the text in them.
pub fn images(data: &[u8]) {
    let Some((kind, data)) = choice(data, 4) else { return };
    let labels = Planes::Labels { classes: 8, shift: 0 };
    let _ = match kind {
        0 => decode_as(Planes::Colour, data, "image", [255; 3], &LIMITS).map(drop),
        1 => decode_as(labels, data, "image", [255; 3], &LIMITS).map(drop),
        2 => decode_mask(data, "image", &LIMITS, None, None).map(drop),
        _ => parameters(data, "image").map(drop),
    };
}

/// IDX files, plain and gzipped, as images and as labels beside images.
pub fn idx(data: &[u8]) {
    let Some((kind, data)) = choice(data, 3) else { return };
    let path = match kind {
        0 => put("idx/x-images-idx3-ubyte", data),
        1 => put("idxz/x-images-idx3-ubyte.gz", data),
        _ => {
            put("idxl/x-labels-idx1-ubyte", data);
            put("idxl/x-images-idx3-ubyte", &[&[0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1][..], &[7, 9]].concat())
        }
    };
    if let Ok(dataset) = datasets::open(&path, None, None) {
        read_all(&*dataset);
    }
}

/// WebDataset tars.
pub fn tar(data: &[u8]) {
    if let Ok(dataset) = datasets::open(&put("tar/x.tar", data), None, None) {
        read_all(&*dataset);
    }
}

/// The metadata files of folders of images.
pub fn metadata(data: &[u8]) {
    let Some((kind, data)) = choice(data, 2) else { return };
    let path = put(if kind == 0 { "lines/metadata.jsonl" } else { "cells/metadata.csv" }, data);
    if let Some(Ok(dataset)) = path.parent().map(|folder| datasets::open(folder, None, None)) {
        read_all(&*dataset);
    }
}

/// Recipes.
pub fn recipe(data: &[u8]) {
    if let Ok(recipe) = Recipe::read(&put("recipe/x.toml", data), &[]) {
        let _ = recipe.table();
    }
}

/// The text files of a bundle, and what is opened by them.
pub fn bundle(data: &[u8]) {
    let Some((kind, data)) = choice(data, 4) else { return };
    let (folder, file) = match kind {
        0 => ("runs/vqgan/bundle", "bundle.json"),
        1 => ("runs/vqgan/bundle", "tokenizer/config.json"),
        2 => ("runs/kl/bundle", "tokenizer/config.json"),
        _ => ("runs/scales/bundle", "tokenizer/config.json"),
    };
    let bundle = copied(folder);
    let own = fs::read(bundle.join(file)).expect("the bundle is whole");
    fs::write(bundle.join(file), data).expect("a file can be written");
    if let Ok(plan) = ModelPlan::find(Some(&bundle)) {
        let _ = plan.open_tokenizer(&Device::flex());
    }
    fs::write(bundle.join(file), own).expect("a file can be written");
}

/// Safetensors files.
pub fn safetensors(data: &[u8]) {
    if let Ok(file) = WeightsFile::open(&put("weights/x.safetensors", data)) {
        file.names().for_each(|name| drop(file.read(name)));
    }
}

/// PyTorch's files: zip, legacy and tar.
pub fn pytorch(data: &[u8]) {
    if let Ok(source) = open_weights(&put("pytorch/x.pth", data)) {
        source.shapes().keys().take(ROWS).for_each(|name| drop(source.read(name)));
    }
}

/// Text tokenizers.
pub fn text_tokenizer(data: &[u8]) {
    // Panics of the library are caught by design; the fuzzer's hook would end the process before. What is not caught still does.
    static QUIET: Once = Once::new();
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    let path = put("text/tokenizer.json", data);
    if let Ok(text) = TextTokenizer::load(&path) {
        for caption in ["a red heart", "", "\u{e4}\u{fb01}\u{1f600} \u{5bd2}  9x"] {
            if let Ok(ids) = text.encode(caption) {
                let _ = text.decode(&ids);
            }
        }
    }
}

/// Token shards: the manifest, or a shard of which the manifest tells the right checksum.
pub fn shards(data: &[u8]) {
    let Some((kind, data)) = choice(data, 2) else { return };
    let folder = copied("tokens/vqgan");
    let (manifest, shard) = (folder.join("manifest.json"), folder.join("tokens-00000.safetensors"));
    let own = [&manifest, &shard].map(|path| fs::read(path).expect("the tokens are whole"));
    match kind {
        0 => fs::write(&manifest, data).expect("a file can be written"),
        _ => {
            fs::write(&shard, data).expect("a file can be written");
            let told =
                String::from_utf8_lossy(&own[0]).replace(&files::sha256_bytes(&own[1]), &files::sha256_bytes(data));
            let told = told.replace(&format!("\"bytes\": {}", own[1].len()), &format!("\"bytes\": {}", data.len()));
            fs::write(&manifest, told).expect("a file can be written");
        }
    }
    if let Ok(shards) = Shards::open(&folder) {
        let _ = shards.verify();
        for index in 0..shards.len().min(ROWS) {
            let _ = (shards.row(index), shards.tokens(index));
        }
    }
    for (path, own) in [manifest, shard].iter().zip(own) {
        fs::write(path, own).expect("a file can be written");
    }
}

/// Golden cases.
pub fn case(data: &[u8]) {
    put("case/case.json", data);
    let folder = place().join("case");
    for file in
        ["io.safetensors", "weights.safetensors"].map(Path::new).into_iter().filter(|file| !folder.join(file).is_file())
    {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden/fsq/vqp_proj_image");
        fs::copy(golden.join(file), folder.join(file)).expect("the repository is whole");
    }
    let _ = smalti_parity::run(&folder, &Device::flex());
}

/// What `inspect` makes of a file of any name.
pub fn inspect(data: &[u8]) {
    let Some((kind, data)) = choice(data, 4) else { return };
    let name = ["any/x.png", "any/x.safetensors", "any/x.toml", "any/x.tar"][usize::from(kind)];
    let _ = run(&InspectArgs { path: put(name, data), verify: true, ..InspectArgs::default() });
}
