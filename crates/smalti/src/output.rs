//! Where pictures are written.

use serde::Serialize;
use smalti_base::{Error, Result, files};
use std::path::{Path, PathBuf};

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
    /// A name that ends in `.png` is a file; a name without an ending, or of a folder that is there, is a folder.
    ///
    /// # Errors
    /// [`Error::Invalid`] for any other name.
    pub fn of(path: &Path) -> Result<Self> {
        match path.extension().map(|ending| ending.to_ascii_lowercase()) {
            _ if path.is_dir() => Ok(Self::Folder(path.into())),
            Some(ending) if ending == "png" => Ok(Self::File(path.into())),
            None => Ok(Self::Folder(path.into())),
            Some(ending) => Err(Error::invalid_hint(
                path.display(),
                format!("pictures are not written as .{}", ending.display()),
                "give a name that ends in .png, or a folder",
            )),
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

/// Makes a folder and tries to write in it.
///
/// # Errors
/// [`Error::Io`].
pub fn prepare_folder(folder: &Path) -> Result<()> {
    files::create_folder(folder)?;
    files::must_be_writable(folder)
}

/// A name for a file made from a picture's key: folders become part of the name, the ending is replaced.
pub fn file_stem(key: &str) -> String {
    let path = Path::new(key).with_extension("");
    let clean = |c: char| if c.is_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '_' };
    let name: String = path.to_string_lossy().chars().map(clean).collect();
    if name.is_empty() { "picture".into() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_they_are() {
        assert_eq!(Output::of(Path::new("a/b.PNG")).unwrap(), Output::File("a/b.PNG".into()));
        assert_eq!(Output::of(Path::new("a/b")).unwrap(), Output::Folder("a/b".into()));
        assert!(Output::of(Path::new("b.jpg")).unwrap_err().to_string().contains("ends in .png"));
        assert!(Output::file(Path::new("b")).is_err());
        assert_eq!(file_stem("cats/my cat.jpeg"), "cats_my_cat");
    }
}
