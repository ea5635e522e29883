//! TensorBoard event files: TFRecord framing around protobuf `Event` messages, enough for scalars, pictures and histograms.

use smalti_base::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Appends events to one file in a folder.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// A new event file in `folder`. A resumed run adds a file; TensorBoard reads all of a folder.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(folder: &Path) -> Result<Self> {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map(|d| d.as_secs()).unwrap_or(0);
        let path = folder.join(format!("events.out.tfevents.{seconds}.smalti.{}", std::process::id()));
        let file =
            OpenOptions::new().create(true).append(true).open(&path).map_err(|e| Error::io("create", &path, e))?;
        let mut writer = Self { path, file };
        let mut event = event(0);
        put_bytes(&mut event, 3, b"brain.Event:2");
        writer.record(&event)?;
        Ok(writer)
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
        let length = (event.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(event.len() + 16);
        record.extend(length);
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(event);
        record.extend(masked_crc(event).to_le_bytes());
        self.file.write_all(&record).map_err(|e| Error::io("write", &self.path, e))
    }
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

    #[test]
    fn records_are_framed_as_tensorboard_reads_them() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(folder.path()).unwrap();
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
