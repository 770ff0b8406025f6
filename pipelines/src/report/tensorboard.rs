//! Event files for TensorBoard: scalars only, written without its libraries.
//!
//! A file is a sequence of TFRecords: the length of the data (u64), the masked CRC-32C of the length, the
//! data, and its masked CRC-32C, all little-endian. The data is a `tensorflow.Event` of protocol buffers,
//! of which we need:
//! ```text
//! Event   { double wall_time = 1; int64 step = 2; string file_version = 3; Summary summary = 5;
//!           SessionLog session_log = 7; }
//! Summary { repeated Value value = 1; }    Value { string tag = 1; float simple_value = 2; }
//! SessionLog { enum status = 1 (START = 1); }
//! ```

use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use super::append::AppendFile;
use super::{ReportError, Row, Sink};
use crate::files;

/// An event file, open for more scalars.
#[derive(Debug)]
pub struct EventFile {
    file: AppendFile,
    /// The event under construction.
    event: Vec<u8>,
    /// The summary under construction.
    summary: Vec<u8>,
}

impl EventFile {
    /// A new event file in the folder. TensorBoard joins it with those that are there; when a run resumes,
    /// `first_step` makes it forget what they say about this step and later ones.
    pub fn create(folder: &Path, first_step: u64) -> Result<EventFile, ReportError> {
        files::create_folder(folder)?;
        let seconds = now() as u64;
        let name = format!("events.out.tfevents.{seconds:010}.dataflow.{}", std::process::id());
        let mut count = 0;
        let file = loop {
            match AppendFile::create_new(&folder.join(format!("{name}.{count}"))) {
                Ok(file) => break file,
                Err(error) if error.source.kind() == io::ErrorKind::AlreadyExists => count += 1,
                Err(error) => return Err(error.into()),
            }
        };
        let mut new = EventFile { file, event: Vec::new(), summary: Vec::new() };
        new.write(0, |event| bytes_field(event, 3, b"brain.Event:2"));
        if first_step > 0 {
            const START: [u8; 2] = [1 << 3, 1];
            new.write(first_step, |event| bytes_field(event, 7, &START));
        }
        Ok(new)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    fn scalars(&mut self, step: u64, scalars: &[(&str, f32)]) {
        let mut summary = std::mem::take(&mut self.summary);
        summary.clear();
        for (tag, value) in scalars {
            // A value is two fields: the tag, and five bytes of number.
            let length = 2 + tag.len() + 5;
            summary.push(1 << 3 | LENGTH_DELIMITED);
            varint(&mut summary, length as u64);
            bytes_field(&mut summary, 1, tag.as_bytes());
            summary.push(2 << 3 | FIXED_32);
            summary.extend(value.to_le_bytes());
        }
        self.write(step, |event| bytes_field(event, 5, &summary));
        self.summary = summary;
    }

    /// Writes an event of the time, the step, and the field that `content` appends.
    fn write(&mut self, step: u64, content: impl FnOnce(&mut Vec<u8>)) {
        let event = &mut self.event;
        event.clear();
        event.push(1 << 3 | FIXED_64);
        event.extend(now().to_le_bytes());
        event.push(2 << 3);
        varint(event, step);
        content(event);
        let length = (event.len() as u64).to_le_bytes();
        let frame = [&length[..], &masked_crc(&length), event, &masked_crc(event)];
        frame.iter().for_each(|part| self.file.push(part));
    }
}

impl Sink for EventFile {
    fn record(&mut self, row: &Row) -> Result<(), ReportError> {
        match row {
            Row::Step(row) => {
                let scalars = [
                    ("train/loss", row.loss),
                    ("train/grad_norm", row.grad_norm),
                    ("train/lr", row.lr),
                    ("train/tokens_per_s", row.tokens_per_s as f32),
                    ("train/mfu", row.mfu.unwrap_or_default() as f32),
                ];
                let known = if row.mfu.is_some() { 5 } else { 4 };
                self.scalars(row.step, &scalars[..known]);
            }
            Row::Evaluation(row) => {
                let scalars = [
                    ("eval/train_loss", row.eval.train as f32),
                    ("eval/val_loss", row.eval.val as f32),
                    ("eval/accuracy", row.accuracy.unwrap_or_default() as f32),
                ];
                let known = if row.accuracy.is_some() { 3 } else { 2 };
                self.scalars(row.step, &scalars[..known]);
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), ReportError> {
        Ok(self.file.flush()?)
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

// Wire types of protocol buffers; a field starts with its number, times 8, plus its wire type.
const FIXED_64: u8 = 1;
const LENGTH_DELIMITED: u8 = 2;
const FIXED_32: u8 = 5;

fn varint(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn bytes_field(bytes: &mut Vec<u8>, field: u8, content: &[u8]) {
    bytes.push(field << 3 | LENGTH_DELIMITED);
    varint(bytes, content.len() as u64);
    bytes.extend(content);
}

/// The checksum of a TFRecord: rotated and offset, since data that holds checksums weakens a plain one.
fn masked_crc(bytes: &[u8]) -> [u8; 4] {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// CRC-32C (Castagnoli), a byte at a time.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            let mut crc = byte as u32;
            let mut bit = 0;
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
                bit += 1;
            }
            table[byte] = crc;
            byte += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc, &byte| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ byte)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::metrics::tests::{evaluation, step};
    use crate::report::{EvaluationRow, Losses};

    /// CRC-32C from its definition: division of polynomials, bit by bit, most significant bit first.
    fn crc_by_division(bytes: &[u8]) -> u32 {
        let mut remainder = u32::MAX;
        for byte in bytes {
            remainder ^= u32::from(byte.reverse_bits()) << 24;
            for _ in 0..8 {
                let carry = remainder >> 31 == 1;
                remainder = (remainder << 1) ^ if carry { 0x1edc_6f41 } else { 0 };
            }
        }
        !remainder.reverse_bits()
    }

    #[derive(Debug, Default, PartialEq)]
    struct Event {
        time: f64,
        step: u64,
        version: String,
        scalars: Vec<(String, f32)>,
        restart: bool,
    }

    /// The fields of a message: number, and value as bytes.
    fn fields(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
        fn take(bytes: &mut &[u8], count: usize) -> Vec<u8> {
            let (taken, rest) = bytes.split_at(count);
            *bytes = rest;
            taken.to_vec()
        }
        fn number(bytes: &mut &[u8]) -> u64 {
            let mut number = 0;
            for shift in (0..).step_by(7) {
                let byte = take(bytes, 1)[0];
                number |= u64::from(byte & 0x7f) << shift;
                if byte < 0x80 {
                    break;
                }
            }
            number
        }
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = number(&mut bytes);
            let value = match key & 7 {
                0 => number(&mut bytes).to_le_bytes().to_vec(),
                1 => take(&mut bytes, 8),
                2 => {
                    let length = number(&mut bytes);
                    take(&mut bytes, length as usize)
                }
                5 => take(&mut bytes, 4),
                other => panic!("wire type {other}"),
            };
            fields.push((key >> 3, value));
        }
        fields
    }

    fn read(path: &Path) -> Vec<Event> {
        let file = std::fs::read(path).unwrap();
        let mut rest = &file[..];
        let mut events = Vec::new();
        let check = |data: &[u8], stored: &[u8]| {
            let unmasked = u32::from_le_bytes(stored.try_into().unwrap()).wrapping_sub(0xa282_ead8).rotate_left(15);
            assert_eq!(unmasked, crc_by_division(data));
        };
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            check(&rest[..8], &rest[8..12]);
            let data = &rest[12..12 + length];
            check(data, &rest[12 + length..16 + length]);
            rest = &rest[16 + length..];
            let mut event = Event::default();
            for (number, value) in fields(data) {
                match number {
                    1 => event.time = f64::from_le_bytes(value.try_into().unwrap()),
                    2 => event.step = u64::from_le_bytes(value.try_into().unwrap()),
                    3 => event.version = String::from_utf8(value).unwrap(),
                    5 => event.scalars = fields(&value).into_iter().map(|(_, value)| scalar(&value)).collect(),
                    7 => event.restart = fields(&value) == [(1, 1_u64.to_le_bytes().to_vec())],
                    other => panic!("field {other}"),
                }
            }
            events.push(event);
        }
        events
    }

    fn scalar(value: &[u8]) -> (String, f32) {
        let parts = fields(value);
        assert_eq!((parts.len(), parts[0].0, parts[1].0), (2, 1, 2));
        let number = f32::from_le_bytes(parts[1].1[..].try_into().unwrap());
        (String::from_utf8(parts[0].1.clone()).unwrap(), number)
    }

    #[test]
    fn the_published_checksum() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc_by_division(b"123456789"), 0xe306_9283);
        // RFC 3720, B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn another_reader_reads_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(folder.path(), 0).unwrap();
        file.record(&step(0, 2.5)).unwrap();
        file.record(&evaluation(1_000_000, 1.5, 1.75)).unwrap();
        let losses = Losses { train: 0.5, val: f64::NAN };
        file.record(&Row::Evaluation(EvaluationRow { step: 300, eval: losses, accuracy: Some(0.75) })).unwrap();
        file.finish().unwrap();
        let events = read(file.path());
        assert_eq!(events.len(), 4);
        assert_eq!(events[0].version, "brain.Event:2");
        assert!(events[0].time > 1.6e9);
        let tags: Vec<&str> = events[1].scalars.iter().map(|(tag, _)| tag.as_str()).collect();
        assert_eq!(tags, ["train/loss", "train/grad_norm", "train/lr", "train/tokens_per_s"]);
        assert_eq!(events[1].scalars[0].1, 2.5);
        assert_eq!(events[2].step, 1_000_000);
        assert_eq!(events[2].scalars, [("eval/train_loss".into(), 1.5), ("eval/val_loss".into(), 1.75)]);
        assert!(events[3].scalars[1].1.is_nan());
        assert_eq!(events[3].scalars[2], ("eval/accuracy".into(), 0.75));
    }

    #[test]
    fn a_resumed_run_gets_a_file_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let first = EventFile::create(folder.path(), 0).unwrap();
        let mut second = EventFile::create(folder.path(), 500).unwrap();
        assert_ne!(first.path(), second.path());
        second.finish().unwrap();
        let events = read(second.path());
        assert!(events[1].restart && events[1].step == 500);
    }
}
