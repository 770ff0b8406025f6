//! Token files in the making: under hidden names, with a note of how far they are.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::super::chars::Chars;
use super::super::documents::{Corpus, SourceFile};
use super::super::layout::Layout;
use super::super::token_file::{Description, sidecar_of};
use super::{FileRecord, PrepareError, Recipe, TRAIN, VALIDATION};
use crate::files::{self, FileError};

const NOTE: &str = ".preparation.json";
const LOCK: &str = ".preparation.lock";

/// What a split has so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Count {
    pub documents: u64,
    pub tokens: u64,
    pub text_bytes: u64,
}

/// What both splits have so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counts {
    pub train: Count,
    pub validation: Count,
    /// The smallest hash of a document.
    pub smallest: u64,
}

impl Default for Counts {
    fn default() -> Self {
        Counts { train: Count::default(), validation: Count::default(), smallest: u64::MAX }
    }
}

impl Counts {
    pub(super) fn add(&mut self, more: &Counts) {
        for (to, from) in [(&mut self.train, &more.train), (&mut self.validation, &more.validation)] {
            to.documents += from.documents;
            to.tokens += from.tokens;
            to.text_bytes += from.text_bytes;
        }
        self.smallest = self.smallest.min(more.smallest);
    }

    pub(super) fn text_bytes(&self) -> u64 {
        self.train.text_bytes + self.validation.text_bytes
    }
}

/// A source file that has been read to its end.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Seen {
    #[serde(flatten)]
    pub record: FileRecord,
    pub modified: u64,
}

/// How far a preparation is. It is written when the tokens it counts are on the disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct State {
    pub recipe: Recipe,
    /// Documents with a smaller hash are held out.
    pub threshold: u64,
    /// The vocabulary, where it is of the documents.
    pub symbols: Option<Chars>,
    pub vocabulary: usize,
    pub end_of_text: u32,
    pub layout: Layout,
    /// The files that are done.
    pub files: Vec<Seen>,
    /// Documents of the next file that are done.
    pub documents: u64,
    /// The length of that file, and when it was changed.
    pub open: Option<(u64, u64)>,
    pub counts: Counts,
    /// The last place between two files: how many were done, and what they had.
    pub boundary: (usize, Counts),
    /// All documents are done; what is left is to give the files their names.
    pub complete: bool,
}

impl State {
    /// Nothing is done.
    pub(super) fn new(recipe: &Recipe) -> State {
        State {
            recipe: recipe.clone(),
            // a hash is 64 bits, all alike likely
            threshold: (recipe.validation * 2f64.powi(64)) as u64,
            symbols: None,
            vocabulary: 0,
            end_of_text: 0,
            layout: Layout::default(),
            files: Vec::new(),
            documents: 0,
            open: None,
            counts: Counts::default(),
            boundary: (0, Counts::default()),
            complete: false,
        }
    }

    fn tokens(&self) -> [usize; 2] {
        [self.counts.train.tokens as usize, self.counts.validation.tokens as usize]
    }

    /// Whether the files that are done are those of the corpus, as they were; goes back to the last one that is.
    fn fits(&mut self, corpus: &Corpus) -> bool {
        let same = |seen: &Seen, file: &SourceFile| {
            seen.record.name == file.name && seen.record.bytes == file.bytes && seen.modified == file.modified
        };
        if self.files.len() > corpus.files.len()
            || !self.files.iter().zip(&corpus.files).all(|(seen, file)| same(seen, file))
        {
            return false;
        }
        if self.complete {
            return self.files.len() == corpus.files.len();
        }
        let next = corpus.files.get(self.files.len()).map(|file| (file.bytes, file.modified));
        if self.documents > 0 && self.open != next {
            let (files, counts) = self.boundary;
            self.files.truncate(files);
            (self.counts, self.documents, self.open) = (counts, 0, None);
        }
        true
    }
}

/// Whether there is a preparation to go on with.
pub(super) fn in_progress(folder: &Path) -> bool {
    folder.join(NOTE).exists()
}

/// The two files that are written. Only one run at a time has them.
pub(super) struct Output {
    folder: PathBuf,
    parts: [(PathBuf, File); 2],
    /// The state that the note tells.
    noted: Option<State>,
    _lock: File,
}

/// The files have hidden names until they are whole.
fn part(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!(".{name}.part"))
}

impl Output {
    /// Opens the files in the making, and tells how far they are.
    pub(super) fn open(folder: &Path, recipe: &Recipe, corpus: &Corpus) -> Result<(Output, State), PrepareError> {
        files::create_folder(folder)?;
        let lock_path = folder.join(LOCK);
        let lock = File::create(&lock_path).map_err(FileError::on("write", &lock_path))?;
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(PrepareError::Busy(folder.into())),
            // a file system without locks has nobody to wait for
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        remove_leftovers(folder);
        let open = |name: &str| {
            let path = part(folder, name);
            let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
            file.map_err(FileError::on("write", &path)).map(|file| (path, file))
        };
        let note = fs::read(folder.join(NOTE)).ok().and_then(|bytes| serde_json::from_slice::<State>(&bytes).ok());
        let mut noted = note.filter(|state| state.recipe == *recipe);
        if !noted.as_mut().is_none_or(|state| state.fits(corpus)) {
            noted = None;
        }
        // a complete preparation may have given its files their names already
        if noted.as_ref().is_some_and(|state| state.complete) {
            let parts = [TRAIN, VALIDATION].map(|name| (part(folder, name), lock.try_clone()));
            let [(train, a), (validation, b)] = parts;
            let clone = |file: io::Result<File>| file.map_err(FileError::on("open", &lock_path));
            let parts = [(train, clone(a)?), (validation, clone(b)?)];
            let state = noted.clone().unwrap_or_else(|| State::new(recipe));
            return Ok((Output { folder: folder.into(), parts, noted, _lock: lock }, state));
        }
        let parts = [open(TRAIN)?, open(VALIDATION)?];
        let long_enough = |state: &State| {
            parts.iter().zip(state.tokens()).all(|((_, file), tokens)| {
                file.metadata().is_ok_and(|metadata| metadata.len() >= state.layout.bytes(tokens) as u64)
            })
        };
        let noted = noted.filter(long_enough);
        let state = noted.clone().unwrap_or_else(|| State::new(recipe));
        Ok((Output { folder: folder.into(), parts, noted, _lock: lock }, state))
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Cuts the files to what the state counts.
    pub(super) fn rewind(&mut self, state: &State) -> Result<(), FileError> {
        let header = state.layout.header(0);
        for ((path, file), tokens) in self.parts.iter_mut().zip(state.tokens()) {
            let result = file.set_len(state.layout.bytes(tokens) as u64).and_then(|()| {
                file.seek(SeekFrom::Start(0))?;
                file.write_all(&header)?;
                file.seek(SeekFrom::End(0))
            });
            result.map_err(FileError::on("write", path))?;
        }
        Ok(())
    }

    /// Appends tokens of both splits.
    pub(super) fn write(&mut self, tokens: &[Vec<u8>; 2]) -> Result<(), FileError> {
        for ((path, file), tokens) in self.parts.iter_mut().zip(tokens) {
            file.write_all(tokens).map_err(FileError::on("write", path))?;
        }
        Ok(())
    }

    /// Makes sure that what was written outlives this process and this machine.
    pub(super) fn checkpoint(&mut self, state: &State) -> Result<(), FileError> {
        for (path, file) in &self.parts {
            file.sync_data().map_err(FileError::on("write", path))?;
        }
        self.note(state)
    }

    fn note(&mut self, state: &State) -> Result<(), FileError> {
        files::write_atomically(&self.folder.join(NOTE), |file| Ok(serde_json::to_writer(file, state)?))?;
        self.noted = Some(state.clone());
        Ok(())
    }

    /// After an error: keeps what is of use the next time.
    pub(super) fn abandon(&mut self) {
        match self.noted.take() {
            // it was as long as this before, so that nothing is in the way
            Some(noted) if self.rewind(&noted).is_ok() => {}
            _ => self.discard(),
        }
    }

    /// Removes everything.
    pub(super) fn discard(&mut self) {
        for (path, _) in &self.parts {
            let _ = fs::remove_file(path);
        }
        let _ = fs::remove_file(self.folder.join(NOTE));
        let _ = fs::remove_file(self.folder.join(LOCK));
    }

    /// Gives the files their names. May be repeated when it was interrupted.
    pub(super) fn finish(mut self, state: &State, descriptions: &[Description; 2]) -> Result<(), PrepareError> {
        let names = [TRAIN, VALIDATION].map(|name| self.folder.join(name));
        if !self.noted.as_ref().is_some_and(|noted| noted.complete) {
            for ((path, file), tokens) in self.parts.iter_mut().zip(state.tokens()) {
                let header = state.layout.header(tokens);
                let result = file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(&header));
                result.and_then(|()| file.sync_all()).map_err(FileError::on("write", path))?;
            }
            self.note(state)?;
        }
        // tokens must never lie beside the description of others
        for name in &names {
            remove(&sidecar_of(name))?;
        }
        for ((path, _), name) in self.parts.iter().zip(&names) {
            match fs::rename(path, name) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && name.exists() => {}
                result => result.map_err(FileError::on("write", name))?,
            }
        }
        for (name, description) in names.iter().zip(descriptions) {
            description.write(name)?;
        }
        remove(&self.folder.join(NOTE))?;
        remove(&self.folder.join(LOCK))?;
        Ok(())
    }
}

/// Removes the temporary files of a run that was killed while it wrote a note or a sidecar.
fn remove_leftovers(folder: &Path) {
    let ours = |name: &str| {
        let starts = ["..preparation.json.", ".train.json.", ".val.json.", ".tokenizer.json."];
        name.ends_with(".tmp") && starts.iter().any(|start| name.starts_with(start))
    };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if ours(&entry.file_name().to_string_lossy()) {
            // in nobody's way if it stays
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn remove(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(FileError { action: "remove", path: path.into(), source: error })
        }
        _ => Ok(()),
    }
}
