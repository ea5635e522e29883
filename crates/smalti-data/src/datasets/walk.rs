//! The image files below a folder. Each real folder is visited once, whatever links lead to it.

use super::extension;
use super::notes::Notes;
use crate::image::EXTENSIONS;
use smalti_base::{Error, Result};
use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::OsStr;
use std::fs::FileType;
use std::path::{Path, PathBuf};

/// Deepest nesting of folders that is followed.
const DEEPEST: usize = 64;
/// Most files and folders below a data set's folder.
const MOST: usize = 50_000_000;

/// An image file below a folder.
#[derive(Debug)]
pub(super) struct Entry {
    /// Its path within the folder, with `/` between the parts. Bytes that are no UTF-8 are written as `\xff`.
    pub(super) key: String,
    /// Its path in the file system, where the key is another.
    pub(super) path: Option<PathBuf>,
}

/// What is below a folder.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Sorted by the parts of their keys.
    pub(super) images: Vec<Entry>,
    /// Bytes of each text file, by its key without the ending.
    pub(super) texts: HashMap<String, u64>,
    pub(super) notes: Notes,
}

/// A folder that is to be looked into.
struct Folder {
    path: PathBuf,
    prefix: String,
    depth: usize,
}

struct Walk {
    seen: HashSet<PathBuf>,
    /// Links wait until all real folders are visited, so that these keep their own names.
    links: VecDeque<Folder>,
    entries: usize,
    found: Found,
}

/// Looks for images below `root`.
///
/// # Errors
/// [`Error::Io`] if `root` itself cannot be read; [`Error::Invalid`] for more entries than there can be.
pub(super) fn walk(root: &Path) -> Result<Found> {
    std::fs::read_dir(root).map_err(|e| Error::io("read folder", root, e))?;
    let mut walk = Walk { seen: HashSet::new(), links: VecDeque::new(), entries: 0, found: Found::default() };
    walk.links.push_back(Folder { path: root.to_path_buf(), prefix: String::new(), depth: 0 });
    while let Some(folder) = walk.links.pop_front() {
        let mut folders = vec![folder];
        while let Some(folder) = folders.pop() {
            walk.visit(folder, &mut folders)?;
        }
    }
    walk.found.images.sort_by(|a, b| a.key.split('/').cmp(b.key.split('/')));
    Ok(walk.found)
}

impl Walk {
    fn visit(&mut self, folder: Folder, folders: &mut Vec<Folder>) -> Result<()> {
        let name = if folder.prefix.is_empty() { "." } else { &folder.prefix };
        let read = std::fs::canonicalize(&folder.path).and_then(|real| Ok((real, std::fs::read_dir(&folder.path)?)));
        let (real, entries) = match read {
            Ok(read) => read,
            Err(error) => {
                self.found.notes.add("folders that cannot be read", format!("{name} ({error})"));
                return Ok(());
            }
        };
        if folder.depth > DEEPEST {
            self.found.notes.add("folders that are nested too deeply", name);
            return Ok(());
        }
        if !self.seen.insert(real) {
            self.found.notes.add("links to folders that are read by another name", name);
            return Ok(());
        }
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    self.found.notes.add("entries that cannot be read", format!("{name} ({error})"));
                    break;
                }
            };
            self.entries += 1;
            if self.entries > MOST {
                return Err(Error::file(&folder.path, format!("more than {MOST} files and folders to look through")));
            }
            self.entry(&folder, &entry, folders);
        }
        Ok(())
    }

    fn entry(&mut self, folder: &Folder, entry: &std::fs::DirEntry, folders: &mut Vec<Folder>) {
        let (name, path) = (entry.file_name(), entry.path());
        let (written, is_text) = readable(&name);
        let key = format!("{}{written}", folder.prefix);
        let is_image = EXTENSIONS.contains(&extension(&path).as_str());
        if written.starts_with('.') {
            // `._a.png` is what macOS keeps beside `a.png`.
            if is_image && !written.starts_with("._") {
                self.found.notes.add("hidden images", key);
            }
            return;
        }
        let own = entry.file_type();
        let is_link = own.as_ref().is_ok_and(FileType::is_symlink);
        // Links are followed to what they lead to.
        let kind = if is_link { std::fs::metadata(&path).map(|found| found.file_type()) } else { own };
        match kind {
            Ok(kind) if kind.is_dir() => {
                let below = Folder { path, prefix: format!("{key}/"), depth: folder.depth + 1 };
                if is_link { self.links.push_back(below) } else { folders.push(below) }
            }
            Ok(kind) if kind.is_file() => self.file(key, path, is_image, is_text && folder.is_readable()),
            Ok(_) if is_image => self.found.notes.add("images that are no regular files", key),
            Err(error) if is_image => {
                self.found.notes.add("images that cannot be read", format!("{key} ({error})"));
            }
            Err(error) if is_link => {
                self.found.notes.add("links that lead nowhere", format!("{key} ({error})"));
            }
            _ => {}
        }
    }

    fn file(&mut self, key: String, path: PathBuf, is_image: bool, is_readable: bool) {
        let ending = extension(&path);
        if is_image {
            self.found.images.push(Entry { key, path: (!is_readable).then_some(path) });
            return;
        }
        if ending == "txt"
            && let Some(stem) = key.get(..key.len() - 4)
        {
            let length = std::fs::metadata(&path).map_or(0, |found| found.len());
            self.found.texts.insert(stem.to_string(), length);
        }
        self.found.notes.other(&ending);
    }
}

impl Folder {
    /// Whether the keys of what is in it are paths.
    fn is_readable(&self) -> bool {
        self.path.ends_with(Path::new(self.prefix.trim_end_matches('/')))
    }
}

/// A file's name as text, and whether it is text.
fn readable(name: &OsStr) -> (String, bool) {
    if let Some(text) = name.to_str() {
        return (text.to_string(), true);
    }
    let mut text = String::new();
    for chunk in name.as_encoded_bytes().utf8_chunks() {
        text.push_str(chunk.valid());
        chunk.invalid().iter().for_each(|byte| text.push_str(&format!("\\x{byte:02x}")));
    }
    (text, false)
}
