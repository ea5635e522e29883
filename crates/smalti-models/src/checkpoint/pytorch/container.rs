//! The containers of `torch.save`: a zip, and the two forms before it, which are pickles with the storages behind them, and a tar.

use super::pickle::{Ids, Value, Values, read};
use super::rebuild::{key, shown};
use super::tarred::tarred;
use flate2::Crc;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read, Seek, SeekFrom};
use std::sync::{Arc, Mutex, PoisonError};
use zip::{CompressionMethod, ZipArchive};

/// A pickle that is longer does not come from a checkpoint.
const LONGEST_PICKLE: u64 = 256 << 20;
/// How often a compressed entry may be longer than what is stored, beyond what any entry may have.
const RATIO: (u64, u64) = (64, 1 << 20);

/// A file that several readers read, each from a place of its own.
#[derive(Clone)]
pub(super) struct Shared {
    file: Arc<Mutex<File>>,
    at: u64,
    pub length: u64,
}

impl Shared {
    pub fn new(file: File) -> std::io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self { file: Arc::new(Mutex::new(file)), at: 0, length })
    }

    /// # Errors
    /// What the system says, also if the file ends before.
    pub fn piece(&self, at: u64, length: usize) -> Result<Vec<u8>, String> {
        let end = at.checked_add(length as u64).filter(|end| *end <= self.length);
        if end.is_none() {
            return Err(format!("the file ends at byte {}, and {length} bytes from {at} on are needed", self.length));
        }
        let mut bytes = vec![0; length];
        let mut reader = Self { at, ..self.clone() };
        reader.read_exact(&mut bytes).map_err(|error| error.to_string())?;
        Ok(bytes)
    }

    /// The bytes `at..at + length` as a reader.
    pub fn section(&self, at: u64, length: u64) -> BufReader<std::io::Take<Self>> {
        BufReader::new(Self { at, ..self.clone() }.take(length))
    }
}

impl Read for Shared {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(self.at))?;
        let read = file.read(buffer)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl Seek for Shared {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.length.checked_add_signed(by),
        };
        self.at = at.ok_or(std::io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

/// Where the bytes of storages are.
pub(super) enum Storages {
    Zip {
        file: Shared,
        archive: Mutex<Box<ZipArchive<Shared>>>,
        root: String,
    },
    /// Where each storage begins, and how many bytes it has.
    Places {
        file: Shared,
        places: HashMap<String, (u64, usize)>,
    },
}

/// Opens a container: its pickle's values, and its storages.
///
/// # Errors
/// What is wrong with it.
pub(super) fn open(file: Shared) -> Result<(Values, Storages), String> {
    let start = file.piece(0, file.length.min(512) as usize)?;
    let begins = |text: &[u8]| start.starts_with(text);
    if begins(b"PK\x03\x04") || begins(b"PK\x05\x06") {
        return zipped(file);
    }
    if start.get(257..262) == Some(b"ustar") {
        return tarred(file);
    }
    // Twenty digits in decimal or ten bytes: the number that every file of the second form begins with.
    let magic: [&[u8]; 2] = [b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", b"119547037146038801333356"];
    let has = |magic: &[u8]| start[..start.len().min(64)].windows(magic.len()).any(|bytes| bytes == magic);
    if magic.into_iter().any(has) {
        return in_a_row(file);
    }
    match start.first() {
        Some(0x80 | b'(' | b'}' | b']' | b'c') => {
            let values = read(&mut file.section(0, file.length), file.length, &Ids::Unknown)?;
            Ok((values, Storages::Places { file, places: HashMap::new() }))
        }
        _ => Err("it begins like no file of torch.save: neither a zip nor a pickle".into()),
    }
}

fn zipped(file: Shared) -> Result<(Values, Storages), String> {
    let failed = |error: zip::result::ZipError| {
        format!("its zip directory cannot be read ({error}): it is cut short or damaged")
    };
    let mut archive = ZipArchive::new(file.clone()).map_err(failed)?;
    let names: Vec<String> = archive
        .file_names()
        .map(|name| name.map(|name| name.into_owned()))
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    let roots = names.iter().filter_map(|name| name.strip_suffix("data.pkl"));
    let root = roots.filter(|root| root.is_empty() || root.ends_with('/')).min_by_key(|root| root.len());
    let root = root.ok_or("it is a zip without a data.pkl, so not one of torch.save")?.to_string();
    if names.contains(&format!("{root}byteorder")) {
        let order = entry(&mut archive, &format!("{root}byteorder"), 64)?;
        if order.trim_ascii() != b"little" {
            return Err("it was saved on a machine with the other byte order".into());
        }
    }
    let pickle = entry(&mut archive, &format!("{root}data.pkl"), LONGEST_PICKLE)?;
    let length = pickle.len() as u64;
    let values = read(&mut Cursor::new(pickle), length, &Ids::Storages)?;
    Ok((values, Storages::Zip { file, archive: Mutex::new(Box::new(archive)), root }))
}

/// A whole entry of a zip.
fn entry(archive: &mut ZipArchive<Shared>, name: &str, most: u64) -> Result<Vec<u8>, String> {
    let failed = |error: &dyn std::fmt::Display| format!("its entry {} cannot be read: {error}", shown(name));
    let mut found = archive.by_name(name).map_err(|error| failed(&error))?;
    let length = found.size();
    if length > most || length > expected(found.compressed_size()) {
        return Err(failed(&format!("{length} bytes of {} compressed ones are too many", found.compressed_size())));
    }
    let mut bytes = Vec::new();
    (&mut found).take(length + 1).read_to_end(&mut bytes).map_err(|error| failed(&error))?;
    match bytes.len() as u64 == length {
        true => Ok(bytes),
        false => Err(failed(&format!("its length is not {length}, as announced"))),
    }
}

/// The most bytes that so many compressed ones may become.
fn expected(compressed: u64) -> u64 {
    compressed.saturating_mul(RATIO.0).saturating_add(RATIO.1)
}

/// The second form: a number, a version, facts of the machine, the values, the names of the storages, and these one after the other.
fn in_a_row(file: Shared) -> Result<(Values, Storages), String> {
    let mut reader = file.section(0, file.length);
    let mut at = 0;
    let mut next = |ids: &Ids<'_>| {
        let mut counted = Counted { inner: &mut reader, read: &mut at };
        read(&mut counted, file.length, ids)
    };
    next(&Ids::Unknown)?;
    let version = next(&Ids::Unknown)?;
    if !matches!(version.root(), Value::Int(1001)) {
        return Err("its version is not 1001".into());
    }
    must_be_little(&next(&Ids::Unknown)?)?;
    let values = next(&Ids::Storages)?;
    let keys = next(&Ids::Unknown)?;
    let Value::List(keys_at) = keys.root() else { return Err("it has no list of storages".into()) };
    let mut declared = HashMap::new();
    for value in &values.all {
        if let Value::Storage(storage) = value {
            declared.insert(storage.key.clone(), (storage.elements, storage.element.size));
        }
    }
    let mut places = HashMap::new();
    for name in keys_at {
        let name = key(&keys.all[*name as usize]).ok_or("its list of storages has one without a name")?;
        let (elements, size) =
            *declared.get(&name).ok_or_else(|| format!("nothing says what its storage {} is", shown(&name)))?;
        let bytes = elements * size;
        let short = || format!("it is cut short: {bytes} bytes of its storage {} are not there", shown(&name));
        let head = file.piece(at, 8).map_err(|_| short())?;
        let there = u64::from_le_bytes(head.try_into().map_err(|_| short())?);
        if there != elements as u64 {
            let name = shown(&name);
            return Err(format!("its storage {name} has {there} elements, and its pickle says {elements}"));
        }
        let end = (at + 8).checked_add(bytes as u64).filter(|end| *end <= file.length).ok_or_else(short)?;
        places.insert(name, (at + 8, bytes));
        at = end;
    }
    Ok((values, Storages::Places { file, places }))
}

/// Counts what is taken from a buffered reader.
pub(super) struct Counted<'a, R> {
    pub inner: &'a mut R,
    pub read: &'a mut u64,
}

impl<R: BufRead> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        *self.read += read as u64;
        Ok(read)
    }
}

impl<R: BufRead> BufRead for Counted<'_, R> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        self.inner.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        *self.read += amount as u64;
        self.inner.consume(amount);
    }
}

/// # Errors
/// Unless the facts of a machine say that it puts the lowest byte first.
pub(super) fn must_be_little(machine: &Values) -> Result<(), String> {
    let Value::Dict(entries) = machine.root() else {
        return Err("it does not say on what machine it was saved".into());
    };
    let little = entries
        .iter()
        .find(|(name, _)| matches!(&machine.all[*name as usize], Value::Text(text) if **text == *"little_endian"));
    match little.map(|(_, value)| &machine.all[*value as usize]) {
        Some(Value::Bool(true)) => Ok(()),
        Some(Value::Bool(false)) => Err("it was saved on a machine with the other byte order".into()),
        _ => Err("it does not say in what byte order it was saved".into()),
    }
}

impl Storages {
    /// Bytes of a storage: so many from a place on.
    ///
    /// # Errors
    /// If they are not there, or not what was written.
    pub fn read(&self, name: &str, (start, length): (usize, usize)) -> Result<Vec<u8>, String> {
        let short =
            |there: u64| format!("needs {} bytes of the storage {}, which has {there}", start + length, shown(name));
        match self {
            Self::Places { file, places } => {
                let (at, there) = *places.get(name).ok_or_else(|| short(0))?;
                if start + length > there {
                    return Err(short(there as u64));
                }
                file.piece(at + start as u64, length)
            }
            Self::Zip { file, archive, root } => {
                let path = format!("{root}data/{name}");
                let mut archive = archive.lock().unwrap_or_else(PoisonError::into_inner);
                let mut found = archive.by_name(&path).map_err(|error| error.to_string())?;
                let there = found.size();
                if (start + length) as u64 > there {
                    return Err(short(there));
                }
                if found.compression() == CompressionMethod::Stored {
                    let at = found.data_start().ok_or("has a storage that begins nowhere")?;
                    let sum = found.crc32();
                    drop(found);
                    let bytes = file.piece(at + start as u64, length)?;
                    // Only a whole storage can be compared; a sum of nothing was not computed.
                    if length as u64 == there && sum != 0 && checksum(&bytes) != sum {
                        return Err(format!("has a storage {} with another checksum than written", shown(name)));
                    }
                    return Ok(bytes);
                }
                if there > expected(found.compressed_size()).max(64 << 20) {
                    return Err(format!("has a storage of {there} bytes in {}", found.compressed_size()));
                }
                let mut bytes = Vec::new();
                let skipped = std::io::copy(&mut (&mut found).take(start as u64), &mut std::io::sink());
                let read = skipped.and_then(|_| (&mut found).take(length as u64).read_to_end(&mut bytes));
                read.map_err(|error| error.to_string())?;
                if bytes.len() == length { Ok(bytes) } else { Err(short((start + bytes.len()) as u64)) }
            }
        }
    }
}

fn checksum(bytes: &[u8]) -> u32 {
    let mut sum = Crc::new();
    sum.update(bytes);
    sum.sum()
}
