//! Named tensors in safetensors files.
//!
//! The header is read when a file is opened, a tensor when it is asked for, so that no more than one tensor is held twice. Plain
//! positioned reads are used instead of a memory map: a file that shrinks under a map kills the process, here it is an error.

use super::open::{Content, content};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use smalti_base::{Error, Result, files};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The longest header that is read, as in the reference implementation.
const MAX_HEADER: u64 = 100_000_000;

/// The values of a tensor in row-major order. All floats are widened or narrowed to `f32`, all integers to `i64`.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// F16, BF16, F32 and F64 tensors.
    Floats(Vec<f32>),
    /// Integer tensors.
    Ints(Vec<i64>),
    /// Truth values.
    Bools(Vec<bool>),
}

impl Values {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::Floats(v) => v.len(),
            Self::Ints(v) => v.len(),
            Self::Bools(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the values are, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Floats(_) => "floats",
            Self::Ints(_) => "integers",
            Self::Bools(_) => "booleans",
        }
    }
}

/// A tensor on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// Length of each axis; empty for a single value.
    pub shape: Vec<usize>,
    /// The values, row-major; as many as the product of the shape.
    pub values: Values,
}

impl Stored {
    /// The values if they are floats.
    pub fn floats(&self) -> Option<&[f32]> {
        match &self.values {
            Values::Floats(v) => Some(v),
            _ => None,
        }
    }

    /// The values if they are integers.
    pub fn ints(&self) -> Option<&[i64]> {
        match &self.values {
            Values::Ints(v) => Some(v),
            _ => None,
        }
    }
}

/// Something that tensors are read from by name.
pub trait Source {
    /// Where the tensors come from, for messages.
    fn place(&self) -> String;

    /// The shape of each tensor.
    fn shapes(&self) -> BTreeMap<String, Vec<usize>>;

    /// Reads one tensor.
    ///
    /// # Errors
    /// [`Error::Unknown`] if there is none of this name, [`Error::Io`] or [`Error::Invalid`] if it cannot be read.
    fn read(&self, name: &str) -> Result<Stored>;
}

impl Source for BTreeMap<String, Stored> {
    fn place(&self) -> String {
        "tensors in memory".into()
    }

    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.iter().map(|(name, tensor)| (name.clone(), tensor.shape.clone())).collect()
    }

    fn read(&self, name: &str) -> Result<Stored> {
        self.get(name).cloned().ok_or_else(|| Error::unknown(Source::place(self), "tensor", name, self.keys()))
    }
}

/// An open safetensors file.
#[derive(Debug)]
pub struct WeightsFile {
    path: PathBuf,
    file: Mutex<File>,
    data_start: u64,
    infos: BTreeMap<String, TensorInfo>,
    metadata: BTreeMap<String, String>,
}

impl WeightsFile {
    /// Opens a file and reads its header. Offsets, sizes and the file's length are checked here.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] if it is not a whole safetensors file.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |e| Error::io("read", path, e);
        let kind = content(path)?;
        let mut file = files::open(path)?;
        let length = file.metadata().map_err(io)?.len();
        let mut size = [0u8; 8];
        if length < 8 {
            return Err(Error::file(
                path,
                format!("not a safetensors file: {length} bytes are fewer than its 8-byte length"),
            ));
        }
        file.read_exact(&mut size).map_err(io)?;
        let header_len = u64::from_le_bytes(size);
        if kind == Content::Pytorch {
            let hint = "give it an ending such as .ckpt, or import it into a bundle";
            return Err(Error::invalid_hint(path.display(), "is a file of PyTorch, not of safetensors", hint));
        }
        if kind == Content::Unknown && header_len > MAX_HEADER {
            let problem = "not a whole safetensors file: it does not begin with the length of a header";
            return Err(Error::file(path, problem));
        }
        if header_len > MAX_HEADER || header_len > length - 8 {
            return Err(Error::file(
                path,
                format!(
                    "not a whole safetensors file: a header of {header_len} bytes is announced, the file has {length} bytes"
                ),
            ));
        }
        let mut header = vec![0u8; header_len as usize];
        file.read_exact(&mut header).map_err(io)?;
        let header: Metadata = serde_json::from_slice(&header)
            .map_err(|e| Error::file(path, format!("not a valid safetensors header: {e}")))?;
        let (data_start, data_len) = (8 + header_len, header.data_len() as u64);
        if length - data_start != data_len {
            return Err(Error::file(
                path,
                format!(
                    "{data_len} bytes of tensors are announced, {} are there: the file is truncated or damaged",
                    length - data_start
                ),
            ));
        }
        let infos = header.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        Ok(Self { path: path.to_path_buf(), file: Mutex::new(file), data_start, infos, metadata })
    }

    /// The text entries of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.infos.keys().map(String::as_str)
    }

    /// The SHA-256 of the whole file as it is open, as 64 hexadecimal digits.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sha256(&self) -> Result<String> {
        let mut at = 0;
        files::sha256(|block| {
            let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            file.seek(SeekFrom::Start(at))?;
            let read = file.read(block)?;
            at += read as u64;
            Ok(read)
        })
        .map_err(|e| Error::io("read", &self.path, e))
    }

    /// The type in which a tensor is stored, as safetensors spells it (`F16`, `I64`, ...).
    pub fn dtype(&self, name: &str) -> Option<String> {
        self.infos.get(name).map(|info| format!("{:?}", info.dtype))
    }
}

impl Source for WeightsFile {
    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.infos.iter().map(|(name, info)| (name.clone(), info.shape.clone())).collect()
    }

    fn read(&self, name: &str) -> Result<Stored> {
        let Some(info) = self.infos.get(name) else {
            return Err(Error::unknown(self.place(), "tensor", name, self.infos.keys()));
        };
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0u8; end - start];
        let read = (|| {
            let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            file.seek(SeekFrom::Start(self.data_start + start as u64))?;
            file.read_exact(&mut bytes)
        })();
        read.map_err(|e| Error::io("read", &self.path, e))?;
        let values = decode(info.dtype, &bytes).ok_or_else(|| {
            Error::unsupported(
                format!("tensor `{name}` of type {:?} in {}", info.dtype, self.path.display()),
                "store it as F32, F16, BF16, F64, BOOL or an integer type",
            )
        })?;
        Ok(Stored { shape: info.shape.clone(), values })
    }
}

/// Reads all tensors of a safetensors file.
///
/// # Errors
/// As [`WeightsFile::open`] and [`Source::read`].
pub fn read_tensors(path: &Path) -> Result<BTreeMap<String, Stored>> {
    let file = WeightsFile::open(path)?;
    file.names().map(|name| Ok((name.to_string(), file.read(name)?))).collect()
}

/// How floats are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32 bits, lossless.
    F32,
    /// 16 bits. A tensor with a finite value outside this type's range stays at 32 bits.
    F16,
}

/// Writes tensors and text entries to a safetensors file, whole or not at all. Equal input gives equal bytes.
///
/// # Errors
/// [`Error::Io`].
pub fn write_tensors(
    path: &Path,
    tensors: &BTreeMap<String, Stored>,
    precision: Precision,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    // Wide types first keep every tensor aligned.
    let mut order: Vec<(Dtype, &String, &Stored)> =
        tensors.iter().map(|(name, tensor)| (stored_dtype(&tensor.values, precision), name, tensor)).collect();
    order.sort_by_key(|(dtype, name, _)| (std::cmp::Reverse(dtype.bitsize()), *name));
    let header = header(order.iter().map(|(dtype, name, tensor)| (*dtype, *name, tensor.shape.as_slice())), metadata);
    files::write_atomic(path, |writer| {
        writer.write_all(&(header.len() as u64).to_le_bytes())?;
        writer.write_all(&header)?;
        for (dtype, _, tensor) in &order {
            encode(writer, *dtype, &tensor.values)?;
        }
        Ok(())
    })
}

/// Writes all tensors of a source to a safetensors file, whole or not at all. Each is read twice, and only one is in memory.
///
/// # Errors
/// [`Error::Io`], and what reading the source returns.
pub fn copy_tensors(
    path: &Path,
    source: &dyn Source,
    precision: Precision,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let kind =
        |(name, shape): (String, Vec<usize>)| Ok((stored_dtype(&source.read(&name)?.values, precision), name, shape));
    let mut order: Vec<(Dtype, String, Vec<usize>)> = source.shapes().into_iter().map(kind).collect::<Result<_>>()?;
    order.sort_by(|a, b| (b.0.bitsize(), &a.1).cmp(&(a.0.bitsize(), &b.1)));
    let header = header(order.iter().map(|(dtype, name, shape)| (*dtype, name, shape.as_slice())), metadata);
    let mut failed = None;
    let written = files::write_atomic(path, |writer| {
        writer.write_all(&(header.len() as u64).to_le_bytes())?;
        writer.write_all(&header)?;
        for (dtype, name, _) in &order {
            match source.read(name) {
                Ok(stored) => encode(writer, *dtype, &stored.values)?,
                Err(error) => {
                    failed = Some(error);
                    return Err(std::io::Error::other("the source failed"));
                }
            }
        }
        Ok(())
    });
    failed.map_or(written, Err)
}

fn header<'a>(
    order: impl Iterator<Item = (Dtype, &'a String, &'a [usize])>,
    metadata: &BTreeMap<String, String>,
) -> Vec<u8> {
    // Built by hand: the reference implementation writes text entries in the random order of a hash map.
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), serde_json::json!(metadata));
    }
    let mut offset = 0;
    for (dtype, name, shape) in order {
        let end = offset + shape.iter().product::<usize>() * dtype.bitsize() / 8;
        header.insert(
            name.clone(),
            serde_json::json!({ "dtype": format!("{dtype:?}"), "shape": shape, "data_offsets": [offset, end] }),
        );
        offset = end;
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    header
}

fn stored_dtype(values: &Values, precision: Precision) -> Dtype {
    match values {
        Values::Ints(_) => Dtype::I64,
        Values::Bools(_) => Dtype::BOOL,
        Values::Floats(v) => match precision {
            Precision::F16 if v.iter().all(|x| !x.is_finite() || f16::from_f32(*x).is_finite()) => Dtype::F16,
            _ => Dtype::F32,
        },
    }
}

fn encode(writer: &mut impl Write, dtype: Dtype, values: &Values) -> std::io::Result<()> {
    const BLOCK: usize = 1 << 14;
    let mut bytes = Vec::with_capacity(BLOCK * 8);
    let mut flush = |bytes: &mut Vec<u8>| {
        let written = writer.write_all(bytes);
        bytes.clear();
        written
    };
    match values {
        Values::Floats(v) => {
            for block in v.chunks(BLOCK) {
                match dtype {
                    Dtype::F16 => block.iter().for_each(|x| bytes.extend(f16::from_f32(*x).to_le_bytes())),
                    _ => block.iter().for_each(|x| bytes.extend(x.to_le_bytes())),
                }
                flush(&mut bytes)?;
            }
        }
        Values::Ints(v) => {
            for block in v.chunks(BLOCK) {
                block.iter().for_each(|x| bytes.extend(x.to_le_bytes()));
                flush(&mut bytes)?;
            }
        }
        Values::Bools(v) => {
            bytes.extend(v.iter().map(|x| u8::from(*x)));
            flush(&mut bytes)?;
        }
    }
    Ok(())
}

pub(super) fn decode(dtype: Dtype, bytes: &[u8]) -> Option<Values> {
    fn each<const N: usize, T>(bytes: &[u8], value: impl Fn([u8; N]) -> T) -> Vec<T> {
        bytes.as_chunks::<N>().0.iter().map(|chunk| value(*chunk)).collect()
    }
    Some(match dtype {
        Dtype::F32 => Values::Floats(each(bytes, f32::from_le_bytes)),
        Dtype::F16 => Values::Floats(each(bytes, |b| f16::from_le_bytes(b).to_f32())),
        Dtype::BF16 => Values::Floats(each(bytes, |b| bf16::from_le_bytes(b).to_f32())),
        Dtype::F64 => Values::Floats(each(bytes, |b| f64::from_le_bytes(b) as f32)),
        Dtype::I64 => Values::Ints(each(bytes, i64::from_le_bytes)),
        Dtype::I32 => Values::Ints(each(bytes, |b| i32::from_le_bytes(b).into())),
        Dtype::I16 => Values::Ints(each(bytes, |b| i16::from_le_bytes(b).into())),
        Dtype::I8 => Values::Ints(each(bytes, |b| i8::from_le_bytes(b).into())),
        Dtype::U32 => Values::Ints(each(bytes, |b| u32::from_le_bytes(b).into())),
        Dtype::U16 => Values::Ints(each(bytes, |b| u16::from_le_bytes(b).into())),
        Dtype::U8 => Values::Ints(each(bytes, |b: [u8; 1]| b[0].into())),
        Dtype::BOOL => Values::Bools(each(bytes, |b: [u8; 1]| b[0] != 0)),
        _ => return None,
    })
}
