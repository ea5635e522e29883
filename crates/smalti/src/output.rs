//! Where pictures are written.

use serde::Serialize;
use smalti_base::{Error, Result, files};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Endings of pictures that are not written here.
const PICTURES: [&str; 12] = ["jpg", "jpeg", "jpe", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "jxl", "pdf"];

/// Where pictures go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Output {
    /// One PNG file.
    File(PathBuf),
    /// A folder with a PNG file for each picture.
    Folder(PathBuf),
}

impl Output {
    /// A name that ends in `.png` is a file; one with a slash at its end, or of a folder that is there, and any other name is a
    /// folder.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a name with the ending of another kind of picture, an empty name, and `-`.
    pub fn of(path: &Path) -> Result<Self> {
        must_be_a_name(path)?;
        let is_folder = path.is_dir() || path.as_os_str().to_string_lossy().ends_with(std::path::is_separator);
        let ending = path.extension().map(|ending| ending.to_string_lossy().to_lowercase());
        match ending.as_deref() {
            _ if is_folder => Ok(Self::Folder(path.into())),
            Some("png") => Ok(Self::File(path.into())),
            Some(ending) if PICTURES.contains(&ending) => Err(Error::invalid_hint(
                path.display(),
                format!("pictures are not written as .{ending}"),
                "give a name that ends in .png, or a folder",
            )),
            _ => Ok(Self::Folder(path.into())),
        }
    }

    /// As [`Output::of`], but it must be a file.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn file(path: &Path) -> Result<PathBuf> {
        match Self::of(path)? {
            Self::File(path) => Ok(path),
            Self::Folder(path) => Err(Error::invalid_hint(
                path.display(),
                "the picture needs a file, and this is a folder",
                "give a file name that ends in .png",
            )),
        }
    }

    /// Makes the folder and tries to write in it, so that a long computation does not end in an error.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn prepare(&self) -> Result<()> {
        match self {
            Self::File(path) => prepare_folder(path.parent().unwrap_or(Path::new(""))),
            Self::Folder(path) => prepare_folder(path),
        }
    }
}

/// # Errors
/// [`Error::Invalid`] for an empty name, and for `-`, by which others mean standard output.
pub fn must_be_a_name(path: &Path) -> Result<()> {
    match path.as_os_str().to_str() {
        Some("") => Err(Error::invalid("--out", "is empty; expected a file or a folder")),
        Some("-") => Err(Error::invalid_hint(
            "--out",
            "`-` would be standard output, and nothing is written there",
            "give a file or a folder; ./- is one that is called so",
        )),
        _ => Ok(()),
    }
}

/// The path with its links followed, as far as it is there.
fn real(path: &Path) -> PathBuf {
    let mut missing = Vec::new();
    let mut at = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    loop {
        if let Ok(found) = at.canonicalize() {
            return missing.iter().rev().fold(found, |path: PathBuf, name| path.join(name));
        }
        match (at.parent(), at.file_name()) {
            (Some(parent), Some(name)) => {
                missing.push(name.to_os_string());
                at = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            }
            _ => return path.to_path_buf(),
        }
    }
}

/// Whether two paths lead to one file or folder.
pub fn is_same(a: &Path, b: &Path) -> bool {
    real(a) == real(b)
}

/// Whether a path is a folder or leads into it.
pub fn is_inside(path: &Path, folder: &Path) -> bool {
    real(path).starts_with(real(folder))
}

/// A file that is to be written must not be one that is read.
///
/// # Errors
/// [`Error::Invalid`] that names both.
pub fn must_not_overwrite<'a>(out: &Path, read: impl IntoIterator<Item = (&'a str, &'a Path)>) -> Result<()> {
    match read.into_iter().find(|(_, path)| is_same(out, path)) {
        Some((what, path)) => Err(Error::invalid_hint(
            out.display(),
            format!("would be written over {what}, {}", path.display()),
            "choose another name with --out",
        )),
        None => Ok(()),
    }
}

/// Makes a folder and tries to write in it.
///
/// # Errors
/// [`Error::Io`].
pub fn prepare_folder(folder: &Path) -> Result<()> {
    files::create_folder(folder)?;
    files::must_be_writable(folder)
}

/// Most bytes of a name made from a key: file systems allow 255, and an ending follows.
const LONGEST_STEM: usize = 200;

/// A name for a file made from a picture's key: folders become part of the name, the ending is replaced. A long one is cut, and ends in
/// a hash of the whole.
pub fn file_stem(key: &str) -> String {
    let path = Path::new(key).with_extension("");
    let clean = |c: char| if c.is_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '_' };
    let mut name: String = path.to_string_lossy().chars().map(clean).collect();
    if name.len() > LONGEST_STEM {
        name.truncate(name.floor_char_boundary(LONGEST_STEM));
        name += "-";
        name += &files::sha256_bytes(key.as_bytes())[..16];
    }
    if name.is_empty() { "picture".into() } else { name }
}

/// Names of files, each only once: one that is taken gets a number.
#[derive(Debug, Default)]
pub struct Names(HashMap<String, usize>);

impl Names {
    /// With names that are taken.
    pub fn without<'a>(taken: impl IntoIterator<Item = &'a str>) -> Self {
        Self(taken.into_iter().map(|name| (name.to_string(), 1)).collect())
    }

    /// The name, or the name with a number. Upper and lower case count as one: not every file system tells them apart.
    pub fn take(&mut self, stem: &str) -> String {
        let mut name = stem.to_string();
        while self.0.contains_key(&name.to_lowercase()) {
            let tried = self.0.entry(stem.to_lowercase()).or_insert(1);
            *tried += 1;
            name = format!("{stem}-{tried}");
        }
        self.0.insert(name.to_lowercase(), 1);
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_they_are() {
        assert_eq!(Output::of(Path::new("a/b.PNG")).unwrap(), Output::File("a/b.PNG".into()));
        assert_eq!(Output::of(Path::new("a/b")).unwrap(), Output::Folder("a/b".into()));
        assert!(Output::of(Path::new("b.jpg")).unwrap_err().to_string().contains("ends in .png"));
        for folder in ["v1.0", "b.png/", "b.JPG/", "run.2"] {
            assert_eq!(Output::of(Path::new(folder)).unwrap(), Output::Folder(folder.into()));
        }
        assert!(Output::of(Path::new("-")).unwrap_err().to_string().contains("standard output"));
        assert!(Output::of(Path::new("")).is_err() && Output::of(Path::new("./-")).is_ok());
        assert!(Output::file(Path::new("b")).is_err());
        assert_eq!(file_stem("cats/my cat.jpeg"), "cats_my_cat");
    }

    #[test]
    fn every_picture_gets_a_name_of_its_own() {
        let long = ["a".repeat(251) + ".png", "a".repeat(251) + "b.png", "\u{e4}".repeat(127) + ".png"];
        let stems = long.each_ref().map(|key| file_stem(key));
        assert!(stems.iter().all(|stem| stem.len() <= 230) && stems[0] != stems[1], "{stems:?}");
        let mut names = Names::without(["grid"]);
        let taken = ["grid", "a", "a", "A", "a-2", "a"].map(|stem| names.take(stem));
        assert_eq!(taken, ["grid-2", "a", "a-2", "A-3", "a-2-2", "a-4"]);
    }

    #[test]
    fn paths_are_compared_by_where_they_lead() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("photos")).unwrap();
        std::fs::write(at("photos/a.png"), b"").unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(at("photos"), at("linked")).unwrap();
        #[cfg(unix)]
        assert!(
            is_same(&at("photos/a.png"), &at("linked/../photos/a.png"))
                && is_inside(&at("linked/new/x"), &at("photos"))
        );
        assert!(is_inside(&at("photos"), &at("photos/.")) && !is_inside(&at("photos2"), &at("photos")));
        let refused = must_not_overwrite(&at("photos/../photos/a.png"), [("the image", at("photos/a.png").as_path())]);
        assert!(refused.unwrap_err().to_string().contains("would be written over the image"));
        assert!(must_not_overwrite(&at("b.png"), [("the image", at("photos/a.png").as_path())]).is_ok());
    }
}
