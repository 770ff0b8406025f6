//! From documents to token files: exact, on all cores, and resumable at any moment.
//!
//! A reader cuts the stream of documents into chunks, threads encode them, and the caller writes them in order
//! ([`engine`]). What is written lies under temporary names beside a note of how far it is ([`output`]); a preparation
//! that was interrupted goes on from that note. Which split a document belongs to follows from its content and the
//! seed alone, and so the files are the same whatever the number of threads and interruptions.

mod chunks;
mod engine;
mod output;
mod progress;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::chars::Chars;
use super::documents::{self, Corpus, DocumentError, Format};
use super::layout::{Files, Layout};
use super::text::hexadecimal;
use super::token_file::{Description, TokenFile, TokenFileError, TokenSplits, Tokenizer, sidecar_of};
use super::tokenizer::characters::Characters;
use super::tokenizer::{Choice, Codec, EncodeError, Encoder};
use crate::files::FileError;
use output::{Output, State};
use progress::Meter;

/// All that the token files follow from, besides the documents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The sources, as the pipeline names them.
    pub sources: Vec<String>,
    /// How documents are found in them.
    pub documents: Format,
    /// What turns them into tokens.
    pub tokenizer: Choice,
    /// The SHA-256 of the tokenizer's file, if it has one; filled in by [`prepare`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer_sha256: Option<String>,
    /// The part of the documents that is held out.
    pub validation: f64,
    /// Which ones are.
    pub seed: u64,
    /// The kind of files.
    pub files: Files,
}

/// A source file that was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its name in the corpus.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Its hash.
    pub sha256: String,
}

/// What a sidecar tells about the documents of a token file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Preparation {
    /// How many documents the file has.
    pub documents: u64,
    /// Their length, in bytes.
    pub text_bytes: u64,
    /// The token after each document.
    pub end_of_text: u32,
    /// How the tokens were made.
    pub recipe: Recipe,
    /// The files of both splits.
    pub files: Vec<FileRecord>,
}

/// Why there are no token files.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The documents cannot be read.
    #[error("{0}")]
    Documents(#[from] DocumentError),
    /// The tokenizer cannot be had or fails.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The token files cannot be opened.
    #[error(transparent)]
    TokenFile(#[from] TokenFileError),
    /// The part to hold out is none.
    #[error("validation: {0} is not a part of the documents; it must be between 0 and 1, for example 0.0005")]
    Fraction(f64),
    /// A split would have no documents.
    #[error(
        "the corpus has {documents} documents, of which {train} are for training and {validation} for validation; \
         both need some: give more documents, a `separator` between those of a text file, or another `validation`"
    )]
    TooFew {
        /// All.
        documents: u64,
        /// For training.
        train: u64,
        /// Held out.
        validation: u64,
    },
    /// The files are of somebody else.
    #[error(
        "{} is there and no {} beside it says that this program made it; train on it with \
         TokenFiles(train: …, validation: …, vocabulary: …), or choose another `folder`",
        path.display(), sidecar_of(path).display()
    )]
    Foreign {
        /// The token file.
        path: PathBuf,
    },
    /// The files were made in another way.
    #[error("the token files in {} were made with {what}; delete them, or choose another `folder`", folder.display())]
    Other {
        /// Where they are.
        folder: PathBuf,
        /// What is different.
        what: String,
    },
    /// Somebody else is at it.
    #[error("another run is preparing the token files in {}; wait for it, or choose another `folder`", .0.display())]
    Busy(PathBuf),
    /// More tokens than the header of llm.c can tell.
    #[error("the corpus has more than {0} tokens, the most that llm.c's header can tell; use `files: Raw`")]
    TooManyTokens(usize),
    /// A thread ended by a bug.
    #[error("a thread that prepares tokens panicked: {0}; this is a bug, please report it")]
    Panicked(String),
}

/// The token files of a corpus, in `folder`: those that are there if they are of the same recipe and documents, else
/// made anew on `threads` threads. Downloads are kept in `cache`.
///
/// # Errors
/// Wrong sources, a disk that is full, files in the folder that were made in another way. No token file is left behind
/// then; what was prepared so far is kept under a hidden name, and used the next time.
pub fn prepare(recipe: &Recipe, folder: &Path, cache: &Path, threads: usize) -> Result<TokenSplits, PrepareError> {
    if !(recipe.validation > 0.0 && recipe.validation < 1.0) {
        return Err(PrepareError::Fraction(recipe.validation));
    }
    let mut recipe = recipe.clone();
    if let Choice::Json { file, .. } = &recipe.tokenizer {
        let bytes = fs::read(file).map_err(FileError::on("read", file))?;
        recipe.tokenizer_sha256 = Some(hexadecimal(&Sha256::digest(&bytes)));
    }
    let recipe = &recipe;
    if let Some(splits) = at_hand(recipe, folder, cache)? {
        return Ok(splits);
    }
    let corpus = Corpus::find(&recipe.sources, cache)?;
    let (output, mut state) = Output::open(folder, recipe, &corpus)?;
    if !state.complete {
        let codec = match recipe.tokenizer.open()? {
            Some(codec) => codec,
            None => {
                if state.symbols.is_none() {
                    state.symbols = Some(symbols_of(recipe, &corpus, threads)?);
                }
                Arc::new(Characters::new(state.symbols.clone().unwrap_or_else(|| Chars::of(""))))
            }
        };
        make(recipe, &corpus, &*codec, threads, output, state)?;
    } else {
        output.finish(&state, &descriptions(recipe, &state, folder)?)?;
    }
    let open = |name: &str| TokenFile::open(&folder.join(name)).map(Arc::new);
    Ok(TokenSplits { train: open(TRAIN)?, validation: open(VALIDATION)? })
}

/// The names of the files, as nanoGPT calls them.
const TRAIN: &str = "train.bin";
const VALIDATION: &str = "val.bin";

fn make(
    recipe: &Recipe,
    corpus: &Corpus,
    codec: &dyn Codec,
    threads: usize,
    mut output: Output,
    mut state: State,
) -> Result<(), PrepareError> {
    loop {
        state.vocabulary = codec.vocabulary();
        state.end_of_text = codec.end_of_text();
        state.layout = Layout::new(recipe.files, state.vocabulary);
        output.rewind(&state)?;
        let mut meter = Meter::start(corpus.bytes(), &state);
        let job = engine::Job { recipe, corpus, codec, threads };
        let ran = engine::run(&job, &mut state, Some(&mut output), &mut meter);
        meter.finish(&state, ran.is_ok());
        if let Err(error) = ran {
            output.abandon();
            return Err(error);
        }
        let (train, validation) = (state.counts.train.documents, state.counts.validation.documents);
        let documents = train + validation;
        if validation == 0 && documents > 1 {
            // too few documents for the fraction: then one is held out, that of the smallest hash
            let threshold = state.counts.smallest.saturating_add(1);
            state = State { threshold, symbols: state.symbols, ..State::new(recipe) };
            continue;
        }
        if train == 0 || validation == 0 {
            output.discard();
            return Err(PrepareError::TooFew { documents, train, validation });
        }
        state.complete = true;
        let descriptions = descriptions(recipe, &state, output.folder())?;
        return output.finish(&state, &descriptions);
    }
}

/// What the sidecars of both splits say.
fn descriptions(recipe: &Recipe, state: &State, folder: &Path) -> Result<[Description; 2], PrepareError> {
    let tokenizer = match &recipe.tokenizer {
        Choice::Gpt2 => Tokenizer::Gpt2,
        Choice::Bytes => Tokenizer::Bytes,
        Choice::Chars => Tokenizer::Chars { symbols: state.symbols.clone().unwrap_or_else(|| Chars::of("")) },
        Choice::Json { file, .. } => {
            let bytes = fs::read(file).map_err(FileError::on("read", file))?;
            let copy = folder.join("tokenizer.json");
            crate::files::write_atomically(&copy, |to| std::io::Write::write_all(to, &bytes))?;
            let sha256 = hexadecimal(&Sha256::digest(&bytes));
            Tokenizer::Json { file: "tokenizer.json".into(), sha256, end_of_text: state.end_of_text }
        }
    };
    let files: Vec<FileRecord> = state.files.iter().map(|seen| seen.record.clone()).collect();
    Ok([&state.counts.train, &state.counts.validation].map(|count| Description {
        tokens: count.tokens as usize,
        vocabulary: state.vocabulary,
        tokenizer: tokenizer.clone(),
        source_sha256: None,
        layout: state.layout,
        preparation: Some(Preparation {
            documents: count.documents,
            text_bytes: count.text_bytes,
            end_of_text: state.end_of_text,
            recipe: recipe.clone(),
            files: files.clone(),
        }),
    }))
}

/// The token files of an earlier preparation.
fn at_hand(recipe: &Recipe, folder: &Path, cache: &Path) -> Result<Option<TokenSplits>, PrepareError> {
    let (train, validation) = (folder.join(TRAIN), folder.join(VALIDATION));
    if output::in_progress(folder) {
        return Ok(None);
    }
    for path in [&train, &validation] {
        if path.exists() && !sidecar_of(path).exists() {
            return Err(PrepareError::Foreign { path: path.clone() });
        }
    }
    if !train.exists() || !validation.exists() {
        return Ok(None);
    }
    let splits =
        TokenSplits { train: Arc::new(TokenFile::open(&train)?), validation: Arc::new(TokenFile::open(&validation)?) };
    let other = |what: String| PrepareError::Other { folder: folder.into(), what };
    for file in [&splits.train, &splits.validation] {
        let Some(preparation) = &file.description().preparation else {
            return Err(PrepareError::Foreign { path: file.path().into() });
        };
        if let Some(what) = difference(&preparation.recipe, recipe) {
            return Err(other(what));
        }
    }
    let Some(preparation) = &splits.train.description().preparation else { return Ok(None) };
    // a dataset of the web is not asked for again, and documents that were taken away are not needed
    let local = |source: &&String| !source.contains("://");
    if recipe.sources.iter().all(|source| local(&source) && Path::new(source).exists()) {
        let corpus = Corpus::find(&recipe.sources, cache)?;
        if let Some(what) = changed(&corpus, &preparation.files, &sidecar_of(&train))? {
            return Err(other(what));
        }
    }
    Ok(Some(splits))
}

/// The first attribute that differs, in words.
fn difference(made: &Recipe, wanted: &Recipe) -> Option<String> {
    let shown = |recipe: &Recipe| {
        let json = serde_json::to_value(recipe).unwrap_or_default();
        json.as_object().cloned().unwrap_or_default()
    };
    let (made, wanted) = (shown(made), shown(wanted));
    made.iter()
        .find(|(name, value)| wanted.get(*name) != Some(value))
        .map(|(name, value)| format!("`{name}`: {value}, and the pipeline says {}", wanted[name]))
}

/// What is different about the documents, if they are not those that the token files were made of.
fn changed(corpus: &Corpus, records: &[FileRecord], sidecar: &Path) -> Result<Option<String>, PrepareError> {
    if corpus.files.len() != records.len() {
        return Ok(Some(format!("{} source files, and now there are {}", records.len(), corpus.files.len())));
    }
    let written = fs::metadata(sidecar).and_then(|metadata| metadata.modified()).ok();
    for (file, record) in corpus.files.iter().zip(records) {
        if file.name != record.name || file.bytes != record.bytes {
            let what = format!("{} of {} bytes, and now there is {} of", record.name, record.bytes, file.name);
            return Ok(Some(format!("{what} {} bytes", file.bytes)));
        }
        let modified = fs::metadata(&file.path).and_then(|metadata| metadata.modified()).ok();
        if modified > written && documents::hash_of(file)? != record.sha256 {
            return Ok(Some(format!("another {}", file.name)));
        }
    }
    Ok(None)
}

/// All characters of the documents.
fn symbols_of(recipe: &Recipe, corpus: &Corpus, threads: usize) -> Result<Chars, PrepareError> {
    let collector = Collector { found: Mutex::default() };
    let mut state = State::new(recipe);
    let mut meter = Meter::start(corpus.bytes(), &state);
    let job = engine::Job { recipe, corpus, codec: &collector, threads };
    let ran = engine::run(&job, &mut state, None, &mut meter);
    meter.clear();
    ran?;
    let found = collector.found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let symbols: String = (0..).zip(found).filter_map(|(code, met)| char::from_u32(code).filter(|_| met)).collect();
    Ok(Chars::of(&symbols))
}

/// Makes no tokens, but remembers the characters.
struct Collector {
    /// Of each code point, whether it was met.
    found: Mutex<Vec<bool>>,
}

impl Codec for Collector {
    fn vocabulary(&self) -> usize {
        0
    }
    fn end_of_text(&self) -> u32 {
        0
    }
    fn encoder(&self) -> Box<dyn Encoder + '_> {
        Box::new(Collecting { found: vec![false; char::MAX as usize + 1], collector: self })
    }
    fn may_be_cut_before_spaces(&self) -> bool {
        true
    }
    fn decode(&self, _: &[u32]) -> Vec<u8> {
        Vec::new()
    }
}

struct Collecting<'a> {
    found: Vec<bool>,
    collector: &'a Collector,
}

impl Encoder for Collecting<'_> {
    fn encode(&mut self, text: &[u8], _: &mut Vec<u32>) -> Result<(), EncodeError> {
        String::from_utf8_lossy(text).chars().for_each(|c| self.found[c as usize] = true);
        Ok(())
    }
}

impl Drop for Collecting<'_> {
    fn drop(&mut self) {
        let mut all = self.collector.found.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        all.resize(self.found.len(), false);
        all.iter_mut().zip(&self.found).for_each(|(all, found)| *all |= found);
    }
}

#[cfg(test)]
mod tests;
