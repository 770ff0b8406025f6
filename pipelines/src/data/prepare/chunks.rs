//! The stream of documents in chunks that threads can take.

use crossbeam::channel::{Receiver, Sender};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::super::batch::Split;
use super::super::documents::{Progress, ReadError, Sink};
use super::super::tokenizer::EncodeError;
use super::output::Counts;

/// A chunk is sent when it has so many bytes.
const CHUNK: usize = 1 << 20;

/// A document is cut when so much of it is in a chunk.
const LARGE: usize = 4 << 20;

/// The part of a document that its split follows from.
const HASHED: usize = 1 << 20;

/// Some documents, or a part of one, and then their tokens.
#[derive(Default)]
pub(super) struct Chunk {
    /// Its place among the chunks.
    pub sequence: u64,
    /// The documents, one after the other.
    pub bytes: Vec<u8>,
    /// Where they end.
    pub pieces: Vec<Piece>,
    /// The hashes of the files that end in this chunk.
    pub file_ends: Vec<String>,
    /// How many documents of the file that is open behind this chunk have been read.
    pub documents: u64,
    /// Whether the chunk ends with a document.
    pub whole: bool,
    /// The bytes of source files read so far.
    pub read: u64,
    /// The tokens of both splits, as they are written.
    pub tokens: [Vec<u8>; 2],
    /// What the chunk adds.
    pub counts: Counts,
    /// Why it could not be encoded.
    pub error: Option<EncodeError>,
}

/// A document or a part of it.
pub(super) struct Piece {
    /// Where its bytes end.
    pub end: usize,
    /// Where its tokens go.
    pub split: Split,
    /// Whether the document ends here.
    pub last: bool,
}

impl Chunk {
    fn clear(&mut self) {
        self.bytes.clear();
        // what one very long document needed is given back
        self.bytes.shrink_to(2 * LARGE);
        self.pieces.clear();
        self.file_ends.clear();
        self.tokens.iter_mut().for_each(Vec::clear);
        self.counts = Counts::default();
        self.error = None;
    }
}

/// Where chunks come from and go to. The number of chunks that go around bounds the memory.
pub(super) struct Chunker {
    pub empty: Receiver<Chunk>,
    pub full: Sender<Chunk>,
    pub seed: u64,
    /// Documents with a smaller hash are held out.
    pub threshold: u64,
    /// Whether documents may be cut.
    pub cut: bool,
    /// Of the open file.
    pub progress: Progress,
    /// The bytes of the files before.
    pub read_before: u64,
    /// Documents to pass over.
    pub skip: u64,
    /// Documents of the open file.
    pub documents: u64,
    chunk: Chunk,
    /// Where the document starts.
    start: usize,
    /// The split of a document that was cut.
    split: Option<Split>,
    /// The length at which a document is cut.
    cut_at: usize,
    sequence: u64,
}

impl Chunker {
    pub(super) fn new(empty: Receiver<Chunk>, full: Sender<Chunk>, seed: u64, threshold: u64, cut: bool) -> Chunker {
        Chunker {
            empty,
            full,
            seed,
            threshold,
            cut,
            progress: Progress::default(),
            read_before: 0,
            skip: 0,
            documents: 0,
            chunk: Chunk::default(),
            start: 0,
            split: None,
            cut_at: LARGE,
            sequence: 0,
        }
    }

    /// The open file has ended.
    pub(super) fn end_file(&mut self, sha256: String) -> Result<(), ReadError> {
        self.chunk.file_ends.push(sha256);
        self.documents = 0;
        self.skip = 0;
        // small files share a chunk; the end of a large one is a place to go back to
        let full = self.chunk.bytes.len() >= CHUNK / 4 || self.chunk.file_ends.len() >= 1024;
        if full { self.send(true) } else { Ok(()) }
    }

    /// The last file has ended.
    pub(super) fn finish(&mut self) -> Result<(), ReadError> {
        self.send(true)
    }

    /// The split of the open document.
    fn decide(&mut self) -> Split {
        let document = &self.chunk.bytes[self.start..];
        let hash = xxh3_64_with_seed(&document[..document.len().min(HASHED)], self.seed);
        self.chunk.counts.smallest = self.chunk.counts.smallest.min(hash);
        if hash < self.threshold { Split::Validation } else { Split::Train }
    }

    fn send(&mut self, whole: bool) -> Result<(), ReadError> {
        let mut next = self.empty.recv().map_err(|_| ReadError::Stopped)?;
        next.clear();
        let mut chunk = std::mem::replace(&mut self.chunk, next);
        chunk.sequence = self.sequence;
        chunk.documents = self.documents;
        chunk.whole = whole;
        chunk.read = self.read_before + self.progress.bytes();
        self.sequence += 1;
        self.start = 0;
        self.full.send(chunk).map_err(|_| ReadError::Stopped)
    }

    /// Sends the first part of a long document.
    fn cut(&mut self) -> Result<(), ReadError> {
        let cuts = |pair: &[u8]| pair[0].is_ascii_graphic() && matches!(pair[1], b' ' | b'\n');
        let Some(at) = self.chunk.bytes[self.start..].windows(2).rposition(cuts) else {
            self.cut_at *= 2;
            return Ok(());
        };
        let split = match self.split {
            Some(split) => split,
            None => self.decide(),
        };
        self.split = Some(split);
        self.cut_at = LARGE;
        let end = self.start + at + 1;
        let rest = self.chunk.bytes.split_off(end);
        self.chunk.pieces.push(Piece { end, split, last: false });
        self.send(false)?;
        self.chunk.bytes.extend_from_slice(&rest);
        Ok(())
    }
}

impl Sink for Chunker {
    fn text(&mut self, bytes: &[u8]) -> Result<(), ReadError> {
        if self.skip > 0 {
            return Ok(());
        }
        // a long text comes in parts, so that no chunk grows with it
        for part in bytes.chunks(CHUNK) {
            self.chunk.bytes.extend_from_slice(part);
            if self.cut && self.chunk.bytes.len() - self.start >= self.cut_at {
                self.cut()?;
            }
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), ReadError> {
        self.documents += 1;
        if self.skip > 0 {
            self.skip -= 1;
            return Ok(());
        }
        let split = match self.split.take() {
            Some(split) => split,
            None => self.decide(),
        };
        self.cut_at = LARGE;
        self.chunk.pieces.push(Piece { end: self.chunk.bytes.len(), split, last: true });
        self.start = self.chunk.bytes.len();
        if self.start >= CHUNK { self.send(true) } else { Ok(()) }
    }
}
