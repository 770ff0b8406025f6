//! The bytes of a file on their way to the documents: counted and hashed.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use super::super::text::hexadecimal;

/// How many bytes of a file were read; another thread may watch it.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<AtomicU64>);

impl Progress {
    /// The bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn set(&self, bytes: u64) {
        self.0.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn add(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// A file read from its start to its end.
pub(super) struct Raw {
    file: File,
    hash: Sha256,
    progress: Progress,
}

impl Raw {
    pub(super) fn new(file: File, progress: &Progress) -> Raw {
        progress.set(0);
        Raw { file, hash: Sha256::new(), progress: progress.clone() }
    }

    /// Reads what is left and returns the SHA-256 of all.
    pub(super) fn finish(mut self) -> io::Result<String> {
        let mut buffer = vec![0; 1 << 18];
        while self.read(&mut buffer)? > 0 {}
        Ok(hexadecimal(&self.hash.finalize()))
    }
}

impl Read for Raw {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.progress.add(count as u64);
        Ok(count)
    }
}

/// The SHA-256 of a file that will be read out of order.
pub(super) fn hash_of(file: &File) -> io::Result<String> {
    let mut again = file.try_clone()?;
    let hash = Raw::new(file.try_clone()?, &Progress::default()).finish()?;
    again.seek(SeekFrom::Start(0))?;
    Ok(hash)
}

/// A buffer that decompressors like.
pub(super) fn buffered<R: Read>(reader: R) -> BufReader<R> {
    BufReader::with_capacity(1 << 18, reader)
}
