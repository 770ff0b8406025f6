//! Text files: one document, or several with something between them.

use std::io::{self, Read};

use memchr::memmem;

use super::{ReadError, Sink};

/// How much is read at a time.
const PIECE: usize = 1 << 18;

/// Why a stream of text ended early.
pub(super) enum TextError {
    Io(io::Error),
    Sink(ReadError),
}

impl From<ReadError> for TextError {
    fn from(error: ReadError) -> Self {
        TextError::Sink(error)
    }
}

/// Reads a text. What is between two separators is a document, unless it is nothing but white space.
pub(super) fn read(
    mut reader: impl Read,
    separator: Option<&str>,
    read: &mut u64,
    sink: &mut dyn Sink,
) -> Result<(), TextError> {
    let mut buffer = vec![0; PIECE];
    let Some(separator) = separator.filter(|separator| !separator.is_empty()) else {
        loop {
            match next(&mut reader, &mut buffer, read)? {
                0 => return Ok(sink.end()?),
                count => sink.text(&buffer[..count])?,
            }
        }
    };
    let finder = memmem::Finder::new(separator);
    let mut document = |bytes: &[u8]| match bytes.trim_ascii() {
        [] => Ok(()),
        _ => sink.text(bytes).and_then(|()| sink.end()),
    };
    let mut pending = Vec::new();
    loop {
        let count = next(&mut reader, &mut buffer, read)?;
        if count == 0 {
            return Ok(document(&pending)?);
        }
        // a separator may lie across the end of what was there
        let mut from = pending.len().saturating_sub(separator.len() - 1);
        pending.extend_from_slice(&buffer[..count]);
        let mut start = 0;
        while let Some(at) = finder.find(&pending[from..]) {
            document(&pending[start..from + at])?;
            start = from + at + separator.len();
            from = start;
        }
        pending.drain(..start);
    }
}

fn next(reader: &mut impl Read, buffer: &mut [u8], read: &mut u64) -> Result<usize, TextError> {
    loop {
        match reader.read(buffer) {
            Ok(count) => {
                *read += count as u64;
                return Ok(count);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(TextError::Io(error)),
        }
    }
}
