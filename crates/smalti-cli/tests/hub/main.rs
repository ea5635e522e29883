//! Weights of the hub, from a server on loopback that plays it, by the program.

#![allow(clippy::unwrap_used)]

mod server;
#[path = "../stage/mod.rs"]
mod stage;

use server::{Asked, Hub, Repo};
use smalti::base::files::sha256_bytes;
use smalti::models::checkpoint::{Precision, Source, Stored, WeightsFile, write_tensors};
use stage::{official, text};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use tempfile::TempDir;

const FIRST: &str = "1111111111111111111111111111111111111111";
const SECOND: &str = "2222222222222222222222222222222222222222";

/// The demo's tokenizer under official names, as bytes.
fn weights() -> Vec<u8> {
    static WEIGHTS: OnceLock<Vec<u8>> = OnceLock::new();
    let make = || {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        official(&path, |_| {});
        fs::read(path).unwrap()
    };
    WEIGHTS.get_or_init(make).clone()
}

/// A folder with a cache and bundles.
struct Place {
    folder: TempDir,
    endpoint: String,
}

/// How a run of the program ended.
struct Ended {
    code: Option<i32>,
    said: String,
}

impl Place {
    fn new(hub: &Hub) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), endpoint: hub.endpoint() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The repository's part of the cache.
    fn repo(&self, name: &str) -> PathBuf {
        self.path("home/hub").join(format!("models--org--{name}"))
    }

    /// The program with this place's environment and nothing else of the hub's.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin("smalti"));
        command.args(["--device", "cpu", "--threads", "1"]);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HF_") || name.ends_with("_PROXY")) {
            command.env_remove(name);
        }
        for name in ["http_proxy", "https_proxy", "all_proxy", "XDG_CACHE_HOME"] {
            command.env_remove(name);
        }
        command.env("HF_ENDPOINT", &self.endpoint).env("HF_HOME", self.path("home")).args(args);
        command
    }

    fn end(&self, args: &[&str], environment: &[(&str, &str)]) -> Ended {
        let output = self.command(args).envs(environment.iter().copied()).output().unwrap();
        Ended { code: output.status.code(), said: String::from_utf8(output.stderr).unwrap() }
    }

    /// Imports into a bundle of this name.
    fn import(&self, source: &str, bundle: &str, more: &[&str], environment: &[(&str, &str)]) -> Ended {
        let bundle = self.path(bundle);
        self.end(&[&["import", source, "--system", "vqgan", "-o", text(&bundle)], more].concat(), environment)
    }

    /// The same, and it must succeed.
    fn imported(&self, source: &str, bundle: &str, more: &[&str], environment: &[(&str, &str)]) -> String {
        let Ended { code, said } = self.import(source, bundle, more, environment);
        assert_eq!(code, Some(0), "{said}");
        said
    }

    /// Fetches without importing, which must fail; no bundle may be there.
    fn refused(&self, source: &str, more: &[&str], environment: &[(&str, &str)]) -> String {
        let Ended { code, said } = self.import(source, "refused", more, environment);
        assert_eq!(code, Some(1), "{said}");
        assert!(!self.path("refused").exists());
        said
    }
}

/// The requests for files, as `hub:PATH` and `storage`.
fn files_of(asked: &[Asked]) -> Vec<String> {
    let files = asked.iter().filter(|asked| !asked.path.starts_with("/api/"));
    files.map(|asked| if asked.of_storage { "storage".into() } else { format!("hub:{}", asked.path) }).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect(),
        Err(_) => Vec::new(),
    };
    names.sort();
    names
}

fn manifest(bundle: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(bundle.join("bundle.json")).unwrap()).unwrap()
}

#[test]
fn a_file_of_the_hub_gives_the_bundle_of_the_local_file() {
    let hub = Hub::start([(
        "org/vqgan",
        Repo::new(FIRST, [("vae/model.safetensors", weights()), ("README.md", b"# a".to_vec())]),
    )]);
    let place = Place::new(&hub);
    let local = place.path("model.safetensors");
    fs::write(&local, weights()).unwrap();
    place.imported(text(&local), "local", &[], &[]);
    assert!(hub.asked().is_empty());

    place.imported("hf://org/vqgan/vae/model.safetensors", "first", &["-v"], &[]);
    let resolve = format!("hub:/org/vqgan/resolve/{FIRST}/vae/model.safetensors");
    assert_eq!(files_of(&hub.asked()), [resolve.clone(), resolve, "storage".into()]);
    for file in ["tokenizer/model.safetensors", "tokenizer/config.json"] {
        let [first, local] = ["first", "local"].map(|bundle| fs::read(place.path(bundle).join(file)).unwrap());
        assert!(first == local, "{file}");
    }
    let [mut first, local] = ["first", "local"].map(|bundle| manifest(&place.path(bundle)));
    let origin = first["training"]["tokenizer"]["imported_from"].take();
    assert_eq!(origin, format!("hf://org/vqgan@{FIRST}/vae/model.safetensors"));
    first["training"]["tokenizer"]["imported_from"] = local["training"]["tokenizer"]["imported_from"].clone();
    assert_eq!(first, local);

    // The layout that the hub's own programs read.
    let repo = place.repo("vqgan");
    let sha256 = sha256_bytes(&weights());
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), FIRST);
    assert_eq!(names(&repo.join("blobs")), [sha256.as_str()]);
    let file = repo.join("snapshots").join(FIRST).join("vae/model.safetensors");
    assert!(fs::read(&file).unwrap() == weights());
    if cfg!(unix) {
        assert_eq!(fs::read_link(&file).unwrap(), Path::new("../../../blobs").join(sha256));
    }

    // Again: the branch is looked at, nothing is downloaded. The folder is enough.
    place.imported("hf://org/vqgan/vae", "second", &[], &[]);
    let asked = hub.asked();
    assert_eq!((asked.len(), files_of(&asked).len()), (1, 0), "{asked:?}");
    assert_eq!(manifest(&place.path("second"))["training"], manifest(&place.path("first"))["training"]);
    // Offline, or with the commit's name, nobody is asked.
    place.imported("hf://org/vqgan/vae/model.safetensors", "third", &["--offline"], &[]);
    place.imported("hf://org/vqgan/vae/model.safetensors", "fourth", &[], &[("HF_HUB_OFFLINE", "1")]);
    place.imported(&format!("hf://org/vqgan@{FIRST}/vae/model.safetensors"), "fifth", &[], &[]);
    assert!(hub.asked().is_empty());
    // A hub that is gone is said, and the cache is used.
    drop(hub);
    let said = place.imported("hf://org/vqgan/vae", "sixth", &[], &[]);
    assert!(said.contains("warning: the hub cannot be reached") && said.contains(FIRST), "{said}");
}

#[test]
fn the_files_of_an_index_come_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole.safetensors");
    fs::write(&whole, weights()).unwrap();
    let whole = WeightsFile::open(&whole).unwrap();
    let mut parts: [BTreeMap<String, Stored>; 2] = Default::default();
    let mut map = serde_json::Map::new();
    let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    for (i, name) in whole.names().enumerate() {
        parts[i % 2].insert(name.to_string(), whole.read(name).unwrap());
        map.insert(name.to_string(), shards[i % 2].into());
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map }).to_string().into_bytes();
    let bytes = |i: usize| {
        let path = folder.path().join(shards[i]);
        write_tensors(&path, &parts[i], Precision::F32, &BTreeMap::new()).unwrap();
        fs::read(path).unwrap()
    };
    let files = [("model.safetensors.index.json", index.clone()), (shards[0], bytes(0)), (shards[1], bytes(1))];
    let lacking = [("model.safetensors.index.json", index), (shards[0], bytes(0))];
    let hub = Hub::start([("org/sharded", Repo::new(FIRST, files)), ("org/lacking", Repo::new(SECOND, lacking))]);
    let place = Place::new(&hub);
    place.imported("hf://org/sharded", "sharded", &[], &[]);
    let local = folder.path().join("whole.safetensors");
    place.imported(text(&local), "local", &[], &[]);
    let [sharded, local] =
        ["sharded", "local"].map(|name| fs::read(place.path(name).join("tokenizer/model.safetensors")).unwrap());
    assert!(sharded == local);
    let origin = &manifest(&place.path("sharded"))["training"]["tokenizer"]["imported_from"];
    assert_eq!(*origin, format!("hf://org/sharded@{FIRST}/model.safetensors.index.json"));
    let said = place.refused("hf://org/lacking", &[], &[]);
    assert!(said.contains(&format!("unknown file `{}`", shards[1])), "{said}");
}

#[test]
fn a_revision_is_the_one_that_is_named() {
    let other = {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        official(&path, |tensors| drop(tensors.remove("loss.logvar")));
        fs::read(path).unwrap()
    };
    let repo =
        Repo::new(SECOND, [("model.safetensors", weights())]).with("v1", FIRST, [("model.safetensors", other.clone())]);
    let hub = Hub::start([("org/vqgan", repo)]);
    let place = Place::new(&hub);
    let origin_of = |bundle: &str| manifest(&place.path(bundle))["training"]["tokenizer"].clone();
    place.imported("hf://org/vqgan@v1", "v1", &[], &[]);
    place.imported("hf://org/vqgan", "main", &[], &[]);
    for (bundle, commit, bytes) in [("v1", FIRST, other), ("main", SECOND, weights())] {
        let facts = origin_of(bundle);
        assert_eq!(facts["imported_from"], format!("hf://org/vqgan@{commit}/model.safetensors"));
        assert_eq!(facts["sha256"], sha256_bytes(&bytes));
    }
    assert_eq!(fs::read_to_string(place.repo("vqgan").join("refs/v1")).unwrap(), FIRST);
    let said = place.refused("hf://org/vqgan@v2/model.safetensors", &[], &[]);
    assert!(said.contains("the repository has no branch, tag or commit `v2`"), "{said}");
}

#[test]
fn a_private_repository_needs_a_token() {
    let mut private = Repo::new(FIRST, [("model.safetensors", weights())]);
    private.token = Some("hf_secret");
    let hub = Hub::start([("org/private", private)]);
    let place = Place::new(&hub);
    let source = "hf://org/private/model.safetensors";
    let said = place.refused(source, &[], &[]);
    assert!(said.contains("answers 401") && said.contains("set HF_TOKEN") && said.contains("licence"), "{said}");
    let said = place.refused(source, &[], &[("HF_TOKEN", "hf_wrong")]);
    assert!(said.contains("a token was sent") && !said.contains("hf_wrong"), "{said}");
    assert!(names(&place.repo("private").join("blobs")).is_empty());
    hub.asked();
    place.imported(source, "bundle", &["--dry-run"], &[("HF_TOKEN", "hf_secret")]);
    let asked = hub.asked();
    assert!(asked.iter().any(|asked| asked.of_storage));
    for asked in &asked {
        // The token is for the hub alone.
        let token = asked.headers.get("authorization").map(String::as_str);
        assert_eq!(token, (!asked.of_storage).then_some("Bearer hf_secret"), "{asked:?}");
    }
    // From the file that logging in leaves.
    let place = Place::new(&hub);
    fs::create_dir(place.path("home")).unwrap();
    fs::write(place.path("home/token"), "hf_secret\n").unwrap();
    place.imported(source, "bundle", &["--dry-run"], &[]);
    // Another cache.
    let elsewhere = place.path("elsewhere");
    place.imported(source, "bundle", &["--dry-run"], &[("HF_HUB_CACHE", text(&elsewhere))]);
    assert!(elsewhere.join("models--org--private/refs/main").is_file());
}

#[test]
fn what_is_not_there_is_said() {
    let files = [("vae/a.safetensors", weights()), ("vae/b.safetensors", weights()), ("unet/c.bin", b"c".to_vec())];
    let hub = Hub::start([("org/vqgan", Repo::new(FIRST, files))]);
    let mut place = Place::new(&hub);
    for (source, parts) in [
        ("hf://org/vqgn/vae/a.safetensors", ["there is no repository `org/vqgn`", "answers 404"]),
        (
            "hf://org/vqgan/vae/aa.safetensors",
            ["unknown file `vae/aa.safetensors`", "did you mean `vae/a.safetensors`?"],
        ),
        ("hf://org/vqgan/vae", ["several weights files: a.safetensors, b.safetensors", "name one file"]),
        ("hf://org/vqgan", ["holds no weights itself", "name one file: unet/c.bin, vae/a.safetensors"]),
        ("hf://vqgan", ["names no repository", "expected hf://ORG/NAME[@REVISION][/PATH]"]),
        ("hf:/org/vqgan", ["does not begin with hf://", "expected hf://ORG/NAME"]),
        ("hf://org/vqgan/../../x", ["is not a path in a repository", "expected hf://ORG/NAME"]),
    ] {
        let said = place.refused(source, &[], &[]);
        assert!(parts.iter().all(|part| said.contains(part)) && said.contains(source), "{said}");
    }
    let source = "hf://org/vqgan/vae/a.safetensors";
    hub.asked();
    for (more, environment) in [(&["--offline"][..], &[][..]), (&[], &[("HF_HUB_OFFLINE", "1")])] {
        let said = place.refused(source, more, environment);
        assert!(said.contains("offline, and the cache does not have") && said.contains("run once without"), "{said}");
    }
    // One file of the revision is there, this one is not.
    place.import("hf://org/vqgan/unet/c.bin", "refused", &[], &[]);
    assert_eq!(names(&place.repo("vqgan").join("blobs")).len(), 1);
    let said = place.refused(source, &["--offline"], &[]);
    assert!(said.contains("the cache does not have `vae/a.safetensors`"), "{said}");
    let said = place.refused(source, &[], &[("HF_ENDPOINT", "ftp://x")]);
    assert!(said.contains("HF_ENDPOINT: `ftp://x` is not an address"), "{said}");
    drop(hub);
    place.folder = tempfile::tempdir().unwrap();
    let said = place.refused(source, &[], &[]);
    assert!(said.contains("the hub cannot be reached at http://127.0.0.1:") && said.contains("--offline"), "{said}");
}

#[test]
fn a_broken_download_goes_on() {
    let hub = Hub::start([("org/vqgan", Repo::new(FIRST, [("model.safetensors", weights())]))]);
    let place = Place::new(&hub);
    let source = "hf://org/vqgan/model.safetensors";
    let (blobs, sha256, size) = (place.repo("vqgan").join("blobs"), sha256_bytes(&weights()), weights().len());
    let part = blobs.join(format!("{sha256}.incomplete"));
    hub.cut(1_000_000);
    let said = place.refused(source, &[], &[]);
    assert!(said.contains(&format!("after 1000000 of {size} bytes")) && said.contains("run it again"), "{said}");
    assert_eq!(names(&blobs), [format!("{sha256}.incomplete")]);
    assert!(names(&place.repo("vqgan").join("snapshots")).is_empty());
    assert_eq!(fs::metadata(&part).unwrap().len(), 1_000_000);

    hub.cut(0);
    hub.asked();
    place.imported(source, "bundle", &["--dry-run"], &[]);
    let asked = hub.asked();
    let ranges: Vec<_> = asked.iter().filter(|asked| asked.of_storage).map(|asked| &asked.headers["range"]).collect();
    assert_eq!(ranges, ["bytes=1000000-"]);
    assert_eq!(names(&blobs), [sha256.as_str()]);
    assert_eq!(sha256_bytes(&fs::read(blobs.join(&sha256)).unwrap()), sha256);

    // A server that gives all of it; bytes that are damaged; bytes that are more than all.
    let again = |bytes: &[u8]| {
        fs::remove_dir_all(place.repo("vqgan")).unwrap();
        fs::create_dir_all(&blobs).unwrap();
        fs::write(&part, bytes).unwrap();
    };
    hub.ignore_ranges(true);
    again(&[1; 1000]);
    place.imported(source, "bundle", &["--dry-run"], &[]);
    hub.ignore_ranges(false);
    again(&vec![0; size + 1]);
    place.imported(source, "bundle", &["--dry-run"], &[]);
    assert_eq!(names(&blobs), [sha256.as_str()]);
    again(&weights()[..10]);
    hub.damage(true);
    let said = place.refused(source, &[], &[]);
    assert!(said.contains("was damaged in transit: it has the SHA-256") && said.contains(&sha256), "{said}");
    assert!(names(&blobs).is_empty());
    hub.damage(false);
    again(&weights());
    hub.asked();
    place.imported(source, "bundle", &["--dry-run"], &[]);
    assert!(hub.asked().iter().all(|asked| !asked.of_storage), "all of it was there");
}

#[cfg(unix)]
#[test]
fn an_interrupt_keeps_what_came() {
    let hub = Hub::start([("org/vqgan", Repo::new(FIRST, [("model.safetensors", weights())]))]);
    let place = Place::new(&hub);
    let blobs = place.repo("vqgan").join("blobs");
    let sha256 = sha256_bytes(&weights());
    let part = blobs.join(format!("{sha256}.incomplete"));
    hub.slow(true);
    let child = place
        .command(&["import", "hf://org/vqgan", "--system", "vqgan", "-o", text(&place.path("bundle"))])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let begun = std::time::Instant::now();
    while fs::metadata(&part).map_or(0, |file| file.len()) == 0 {
        assert!(begun.elapsed().as_secs() < 60, "nothing was downloaded");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{said}");
    assert!(said.contains("error: interrupted") && said.contains("are kept"), "{said}");
    assert_eq!(names(&blobs), [format!("{sha256}.incomplete")]);
    assert!(!place.path("bundle").exists());
    hub.slow(false);
    place.imported("hf://org/vqgan", "bundle", &["--dry-run"], &[]);
    assert_eq!(names(&blobs), [sha256]);
}
