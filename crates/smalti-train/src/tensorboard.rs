//! TensorBoard event files: TFRecord framing around protobuf `Event` messages, enough for scalars, pictures and histograms.

use smalti_base::{Error, Result, files};
use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Begins the names of event files.
const PREFIX: &str = "events.out.tfevents.";
/// Begins the tags of what evaluations found.
const MEASURE: &[u8] = b"validation/";

/// Appends events to one file in a folder.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: Option<File>,
    /// A file begins with these.
    first: Vec<Vec<u8>>,
}

impl EventWriter {
    /// A new event file in `folder`, which is there once it has an event. A run that goes on from step `resumed` takes over what
    /// earlier files say up to that step, and those files go; `measured` says whether the evaluation at that step was done.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(folder: &Path, resumed: Option<u64>, measured: bool) -> Result<Self> {
        let mut version = event(0);
        put_bytes(&mut version, 3, b"brain.Event:2");
        let old = files_of(folder)?;
        let mut writer = Self { path: unused_name(folder, &old), file: None, first: vec![version] };
        if old.is_empty() {
            return Ok(writer);
        }
        // Whoever is showing the old files forgets what it knows.
        let mut start = event(0);
        let mut session = Vec::new();
        put_varint_field(&mut session, 1, 1);
        put_bytes(&mut start, 7, &session);
        writer.first.push(start);
        let last = resumed.unwrap_or(0);
        let stays =
            |at: &Place| at.step < last || (at.step == last && resumed.is_some() && (measured || !at.is_measure));
        let mut kept: Vec<Place> = Vec::new();
        for path in &old {
            let places = places(path)?;
            // A file goes on where the run did: steps of earlier files from there on were done again.
            if let Some(first) = places.iter().map(|place| place.step).min() {
                kept.retain(|place| place.step < first);
            }
            kept.extend(places);
        }
        kept.retain(stays);
        if !kept.is_empty() {
            writer.take_over(&kept)?;
        }
        for path in &old {
            std::fs::remove_file(path).map_err(|e| Error::io("remove", path, e))?;
        }
        Ok(writer)
    }

    /// Writes the kept records of other files, whole or not at all, and goes on after them.
    fn take_over(&mut self, kept: &[Place]) -> Result<()> {
        let first = std::mem::take(&mut self.first);
        files::write_atomic(&self.path, |out| {
            for event in &first {
                out.write_all(&framed(event))?;
            }
            let mut open: Option<(&PathBuf, File)> = None;
            for place in kept {
                let mut file = match open.take() {
                    Some((path, file)) if *path == place.path => file,
                    _ => File::open(&place.path)?,
                };
                let mut record = vec![0; place.bytes];
                file.seek(SeekFrom::Start(place.at))?;
                file.read_exact(&mut record)?;
                out.write_all(&record)?;
                open = Some((&place.path, file));
            }
            Ok(())
        })
    }

    /// A named value at a step.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn scalar(&mut self, tag: &str, step: u64, value: f64) -> Result<()> {
        let mut item = tagged(tag);
        put_tag(&mut item, 2, 5);
        item.extend((value as f32).to_le_bytes());
        self.summary(step, &item)
    }

    /// A picture of 1 or 3 channels, given as the bytes of a PNG file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn picture(&mut self, tag: &str, step: u64, [channels, height, width]: [usize; 3], png: &[u8]) -> Result<()> {
        let mut image = Vec::new();
        put_varint_field(&mut image, 1, height as u64);
        put_varint_field(&mut image, 2, width as u64);
        put_varint_field(&mut image, 3, channels as u64);
        put_bytes(&mut image, 4, png);
        let mut item = tagged(tag);
        put_bytes(&mut item, 4, &image);
        self.summary(step, &item)
    }

    /// Counts in buckets: `counts[i]` values lie below `limits[i]` and not below the limit before it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn histogram(&mut self, tag: &str, step: u64, limits: &[f64], counts: &[f64]) -> Result<()> {
        let total: f64 = counts.iter().sum();
        let middle = |i: usize| limits[i] - 0.5;
        let sum: f64 = counts.iter().enumerate().map(|(i, c)| c * middle(i)).sum();
        let squares: f64 = counts.iter().enumerate().map(|(i, c)| c * middle(i) * middle(i)).sum();
        let (low, high) = (limits.first().copied().unwrap_or(0.0) - 1.0, limits.last().copied().unwrap_or(0.0));
        let mut histogram = Vec::new();
        for (field, value) in [(1, low), (2, high), (3, total), (4, sum), (5, squares)] {
            put_tag(&mut histogram, field, 1);
            histogram.extend(value.to_le_bytes());
        }
        for (field, values) in [(6, limits), (7, counts)] {
            let packed: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            put_bytes(&mut histogram, field, &packed);
        }
        let mut item = tagged(tag);
        put_bytes(&mut item, 5, &histogram);
        self.summary(step, &item)
    }

    fn summary(&mut self, step: u64, item: &[u8]) -> Result<()> {
        let mut summary = Vec::new();
        put_bytes(&mut summary, 1, item);
        let mut event = event(step);
        put_bytes(&mut event, 5, &summary);
        self.record(&event)
    }

    fn record(&mut self, event: &[u8]) -> Result<()> {
        let failed = |e| Error::io("write", &self.path, e);
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(OpenOptions::new().create(true).append(true).open(&self.path).map_err(failed)?),
        };
        for event in self.first.drain(..) {
            file.write_all(&framed(&event)).map_err(failed)?;
        }
        file.write_all(&framed(event)).map_err(failed)
    }
}

/// An event as it stands in a file: its length, a checksum of that, the event, and a checksum.
fn framed(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(event.len() + 16);
    record.extend(length);
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(event);
    record.extend(masked_crc(event).to_le_bytes());
    record
}

/// Where a value or picture is.
#[derive(Clone, Debug)]
struct Place {
    path: PathBuf,
    at: u64,
    bytes: usize,
    step: u64,
    /// Whether it is of an evaluation.
    is_measure: bool,
}

/// The event files of a folder, oldest first.
fn files_of(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e| Error::io("read folder", folder, e);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().map(|name| name.display().to_string()).unwrap_or_default();
        if name.starts_with(PREFIX) && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// A name that comes after those of the files that are there, whatever the clock says.
fn unused_name(folder: &Path, old: &[PathBuf]) -> PathBuf {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map(|d| d.as_secs()).unwrap_or(0);
    let name = |seconds: u64| format!("{PREFIX}{seconds:010}.smalti.{}", std::process::id());
    let Some(last) = old.last().and_then(|path| path.file_name()).map(|name| name.display().to_string()) else {
        return folder.join(name(seconds));
    };
    let number = last[PREFIX.len()..].split('.').next().and_then(|number| number.parse::<u64>().ok());
    let later = [seconds, number.unwrap_or(0).saturating_add(1)].map(name).into_iter().find(|name| *name > last);
    folder.join(later.unwrap_or_else(|| format!("{last}.1")))
}

/// What an event file holds, up to where it is damaged or a killed process left it.
fn places(path: &Path) -> Result<Vec<Place>> {
    let failed = |e| Error::io("read", path, e);
    let mut file = BufReader::new(files::open(path)?);
    let length = file.get_ref().metadata().map_err(failed)?.len();
    let (mut at, mut found) = (0, Vec::new());
    let mut head = [0; 12];
    while length - at >= 16 {
        file.read_exact(&mut head).map_err(failed)?;
        let (size, sum) = head.split_at(8);
        let event = u64::from_le_bytes(size.try_into().unwrap_or_default());
        if masked_crc(size).to_le_bytes() != *sum || event > length - at - 16 {
            break;
        }
        let mut bytes = vec![0; event as usize + 4];
        file.read_exact(&mut bytes).map_err(failed)?;
        let sum = bytes.split_off(event as usize);
        if masked_crc(&bytes).to_le_bytes() != *sum {
            break;
        }
        if let Some((step, is_measure)) = value_of(&bytes) {
            found.push(Place { path: path.into(), at, bytes: event as usize + 16, step, is_measure });
        }
        at += event + 16;
    }
    Ok(found)
}

/// Step of an event that holds a value or picture, and whether it is of an evaluation.
fn value_of(event: &[u8]) -> Option<(u64, bool)> {
    let fields = fields(event)?;
    let summary =
        fields.iter().find_map(|field| if let (5, Field::Bytes(bytes)) = field { Some(*bytes) } else { None })?;
    let step = fields.iter().find_map(|field| if let (2, Field::Number(step)) = field { Some(*step) } else { None });
    let is_measure = summary.windows(MEASURE.len()).any(|part| part == MEASURE);
    Some((step.unwrap_or(0), is_measure))
}

enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Fixed,
}

/// The fields of a protobuf message; none if it is not one.
fn fields(mut message: &[u8]) -> Option<Vec<(u64, Field<'_>)>> {
    let mut found = Vec::new();
    while !message.is_empty() {
        let tag = varint(&mut message)?;
        let field = match tag & 7 {
            0 => Field::Number(varint(&mut message)?),
            1 => message.split_off(..8).map(|_| Field::Fixed)?,
            2 => {
                let length = usize::try_from(varint(&mut message)?).ok()?;
                Field::Bytes(message.split_off(..length)?)
            }
            5 => message.split_off(..4).map(|_| Field::Fixed)?,
            _ => return None,
        };
        found.push((tag >> 3, field));
    }
    Some(found)
}

fn varint(message: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = *message.split_off_first()?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn event(step: u64) -> Vec<u8> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map(|d| d.as_secs_f64()).unwrap_or(0.0);
    let mut event = Vec::new();
    put_tag(&mut event, 1, 1);
    event.extend(seconds.to_le_bytes());
    put_varint_field(&mut event, 2, step);
    event
}

fn tagged(tag: &str) -> Vec<u8> {
    let mut item = Vec::new();
    put_bytes(&mut item, 1, tag.as_bytes());
    item
}

fn put_tag(out: &mut Vec<u8>, field: u64, wire: u64) {
    put_varint(out, field << 3 | wire);
}

fn put_varint_field(out: &mut Vec<u8>, field: u64, value: u64) {
    put_tag(out, field, 0);
    put_varint(out, value);
}

fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_tag(out, field, 2);
    put_varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tags and steps of all events of a folder, read apart from what the writer knows.
    fn shown(folder: &Path) -> Vec<(String, u64)> {
        let mut shown = Vec::new();
        for path in files_of(folder).unwrap() {
            let bytes = std::fs::read(path).unwrap();
            let mut at = 0;
            while at + 16 <= bytes.len() {
                let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
                let Some(event) = bytes.get(at + 12..at + 12 + length) else { break };
                let text = String::from_utf8_lossy(event);
                let tag = ["train/loss", "validation/psnr"].into_iter().find(|tag| text.contains(tag));
                // After the time, nine bytes, the step is field 2.
                shown.extend(tag.map(|tag| (tag.to_string(), u64::from(event[10]))));
                at += 16 + length;
            }
        }
        shown
    }

    #[test]
    fn a_resumed_run_says_each_step_once() {
        let folder = tempfile::tempdir().unwrap();
        let write = |writer: &mut EventWriter, steps: std::ops::RangeInclusive<u64>| {
            for step in steps {
                writer.scalar("train/loss", step, 0.5).unwrap();
                if step % 2 == 0 {
                    writer.scalar("validation/psnr", step, 20.0).unwrap();
                }
            }
        };
        let open = |resumed, measured| EventWriter::open(folder.path(), resumed, measured).unwrap();
        let steps = |steps: &[(&str, u64)]| -> Vec<(String, u64)> {
            steps.iter().map(|(kind, step)| ((*kind).to_string(), *step)).collect()
        };
        let mut writer = open(None, false);
        assert!(files_of(folder.path()).unwrap().is_empty(), "no file before there is something to say");
        write(&mut writer, 1..=5);
        // A killed process leaves half a record.
        let mut file = OpenOptions::new().append(true).open(&writer.path).unwrap();
        file.write_all(&framed(&event(9))[..20]).unwrap();
        write(&mut open(Some(4), false), 5..=6);
        let (loss, psnr) = ("train/loss", "validation/psnr");
        let all = [(loss, 1), (loss, 2), (psnr, 2), (loss, 3), (loss, 4), (loss, 5), (loss, 6), (psnr, 6)];
        assert_eq!(shown(folder.path()), steps(&all));
        assert_eq!(files_of(folder.path()).unwrap().len(), 1);
        open(Some(2), true);
        assert_eq!(shown(folder.path()), steps(&all[..3]));
        open(None, false);
        assert!(shown(folder.path()).is_empty());
    }

    /// Earlier versions added a file and left the steps that were done again in both.
    #[test]
    fn earlier_overlaps_are_mended() {
        let folder = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        for (place, steps) in [(folder.path(), 1..=5), (other.path(), 3..=6)] {
            let mut writer = EventWriter::open(place, None, false).unwrap();
            steps.for_each(|step| writer.scalar("train/loss", step, 0.5).unwrap());
        }
        let added = files_of(other.path()).unwrap().remove(0);
        std::fs::copy(added, folder.path().join(format!("{PREFIX}9999999999.smalti.1"))).unwrap();
        let writer = EventWriter::open(folder.path(), Some(6), true).unwrap();
        let steps: Vec<u64> = shown(folder.path()).into_iter().map(|(_, step)| step).collect();
        assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
        assert!(writer.path.is_file());
    }

    #[test]
    fn records_are_framed_as_tensorboard_reads_them() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::open(folder.path(), None, false).unwrap();
        writer.scalar("loss", 300, 0.5).unwrap();
        let bytes = std::fs::read(&writer.path).unwrap();
        let mut at = 0;
        let mut events = Vec::new();
        while at < bytes.len() {
            let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            let event = &bytes[at + 12..at + 12 + length];
            let crc = u32::from_le_bytes(bytes[at + 12 + length..at + 16 + length].try_into().unwrap());
            assert_eq!(crc, masked_crc(event));
            events.push(event.to_vec());
            at += 16 + length;
        }
        assert_eq!(events.len(), 2);
        // Field 2 (step) is the varint 300 = AC 02, and the value is the float at the end.
        assert_eq!(&events[1][9..12], &[0x10, 0xAC, 0x02]);
        assert_eq!(&events[1][events[1].len() - 4..], &0.5f32.to_le_bytes());
        // Known value: CRC-32C of "123456789" is E3069283.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xE306_9283);
    }
}
