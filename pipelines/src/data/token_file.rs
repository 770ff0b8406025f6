//! Token files: little-endian numbers of two bytes, as nanoGPT's `.bin` files, or of four, with or without the header
//! of llm.c, and a JSON file beside each that says what the numbers mean.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dataflow_kernels::mapped_file::MappedFile;
use serde::{Deserialize, Serialize};

use super::chars::Chars;
use super::layout::Layout;
use super::prepare::Preparation;
use crate::files::{self, FileError};

/// What turned the text into tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Tokenizer {
    /// One token per character; token n is the n-th of the symbols.
    Chars {
        /// All characters, sorted.
        symbols: Chars,
    },
    /// GPT-2's byte-pair encoding.
    Gpt2,
    /// A tokenizer file, of which a copy lies beside the token files.
    Json {
        /// The copy's name.
        file: String,
        /// Its SHA-256.
        sha256: String,
        /// The token after each document.
        end_of_text: u32,
    },
    /// One token per byte.
    Bytes,
    /// Something else: a file without a sidecar.
    Unknown,
}

/// The sidecar: what a token file holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// How many tokens there are.
    pub tokens: usize,
    /// Every token is below this.
    pub vocabulary: usize,
    /// What turned the text into tokens.
    pub tokenizer: Tokenizer,
    /// The SHA-256 of the text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_sha256: Option<String>,
    /// How tokens lie in the file.
    #[serde(default)]
    pub layout: Layout,
    /// The documents that the tokens are of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preparation: Option<Preparation>,
}

impl Description {
    /// Tokens of which nothing else is known.
    pub fn bare(tokens: usize, vocabulary: usize, layout: Layout) -> Description {
        Description {
            tokens,
            vocabulary,
            tokenizer: Tokenizer::Unknown,
            source_sha256: None,
            layout,
            preparation: None,
        }
    }
}

/// Why a token file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// The token file or its sidecar cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// There are tokens and nothing says what they mean.
    #[error(
        "{} has no {} beside it, which says what its tokens mean; delete it and run again to make both anew",
        path.display(), sidecar.display()
    )]
    NoSidecar {
        /// The token file.
        path: PathBuf,
        /// The missing file.
        sidecar: PathBuf,
    },
    /// The sidecar is not what it should be.
    #[error("{} does not describe a token file: {source}; delete it and run again to make it anew", path.display())]
    Sidecar {
        /// The sidecar.
        path: PathBuf,
        /// What is wrong, with line and column.
        source: serde_json::Error,
    },
    /// The file ends within a token.
    #[error(
        "{} has {bytes} bytes, {}, so it is no file of {width}-byte tokens or was cut off; \
         delete it and run again to make it anew",
        path.display(), if *width == 2 { "an odd number" } else { "which is no multiple of 4" }
    )]
    OddLength {
        /// The token file.
        path: PathBuf,
        /// Its length.
        bytes: usize,
        /// The bytes of a token.
        width: usize,
    },
    /// The header of a file tells another number of tokens than there are.
    #[error(
        "{} is damaged: its llm.c header tells {expected} tokens, but {found} follow; delete it and make it anew",
        path.display()
    )]
    WrongHeader {
        /// The token file.
        path: PathBuf,
        /// How many tokens it should have.
        expected: usize,
        /// How many it has.
        found: usize,
    },
    /// The file and its sidecar disagree.
    #[error(
        "{} is damaged: {found} tokens ({} bytes) where {} tells {expected} ({} bytes); \
         delete it and run again to make it anew",
        path.display(), layout.bytes(*found), sidecar.display(), layout.bytes(*expected)
    )]
    WrongLength {
        /// The token file.
        path: PathBuf,
        /// Its sidecar.
        sidecar: PathBuf,
        /// How many tokens it should have.
        expected: usize,
        /// How many it has.
        found: usize,
        /// How tokens lie in it.
        layout: Layout,
    },
    /// There are no tokens.
    #[error("{} holds no tokens", .0.display())]
    Empty(PathBuf),
    /// A number that no token has.
    #[error(
        "{} is damaged or was made for another vocabulary: token {token} at index {index} (byte {}), \
         but the vocabulary has {vocabulary}",
        path.display(), layout.bytes(*index)
    )]
    UnknownToken {
        /// The token file.
        path: PathBuf,
        /// Which token.
        index: usize,
        /// Its number.
        token: u32,
        /// All numbers must be below this.
        vocabulary: usize,
        /// How tokens lie in it.
        layout: Layout,
    },
    /// The file was made with more kinds of tokens than the pipeline says.
    #[error(
        "{} has tokens of a vocabulary of {found}, but the pipeline says `vocabulary: {given}`; raise it",
        path.display()
    )]
    OtherVocabulary {
        /// The token file.
        path: PathBuf,
        /// What its sidecar says.
        found: usize,
        /// What the pipeline says.
        given: usize,
    },
    /// More kinds of tokens than can be numbered.
    #[error("a vocabulary of {0} does not fit a token file, which numbers tokens up to {max}", max = i32::MAX)]
    VocabularyTooLarge(usize),
}

/// The tokens of one split of a text, memory-mapped.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    bytes: MappedFile,
    description: Description,
}

/// The two parts of a text.
#[derive(Clone, Debug)]
pub struct TokenSplits {
    /// What is learned from.
    pub train: Arc<TokenFile>,
    /// What is held out.
    pub validation: Arc<TokenFile>,
}

impl TokenFile {
    /// Writes `path` and its sidecar and opens them. `tokens` and `vocabulary` say what `numbers` holds,
    /// and are checked when the file is opened and read.
    pub fn create(
        path: &Path,
        description: Description,
        numbers: impl IntoIterator<Item = u32>,
    ) -> Result<TokenFile, TokenFileError> {
        // Tokens must never lie beside the description of others: it goes first and comes back last.
        let sidecar = sidecar_of(path);
        match fs::remove_file(&sidecar) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(FileError { action: "replace", path: sidecar, source: error }.into());
            }
            _ => {}
        }
        let layout = description.layout;
        files::write_atomically(path, |file| {
            file.write_all(&layout.header(description.tokens))?;
            numbers.into_iter().try_for_each(|number| file.write_all(&number.to_le_bytes()[..layout.width()]))
        })?;
        description.write(path)?;
        TokenFile::open(path)
    }

    /// Opens a file that [`TokenFile::create`] wrote.
    pub fn open(path: &Path) -> Result<TokenFile, TokenFileError> {
        let sidecar = sidecar_of(path);
        let bytes = map(path)?;
        let text = match fs::read(&sidecar) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(TokenFileError::NoSidecar { path: path.into(), sidecar });
            }
            other => other.map_err(FileError::on("read", &sidecar))?,
        };
        let description: Description = serde_json::from_slice(&text)
            .map_err(|source| TokenFileError::Sidecar { path: sidecar.clone(), source })?;
        let layout = description.layout;
        let found = count(path, &bytes, layout)?;
        if found != description.tokens {
            let expected = description.tokens;
            return Err(TokenFileError::WrongLength { path: path.into(), sidecar, expected, found, layout });
        }
        TokenFile::checked(path, bytes, description)
    }

    /// Opens a `.bin` file of another program: raw, as nanoGPT's `prepare.py` writes it, or with llm.c's header. If it
    /// has a sidecar it must fit the vocabulary.
    pub fn open_bare(path: &Path, vocabulary: usize) -> Result<TokenFile, TokenFileError> {
        if sidecar_of(path).exists() {
            let mut file = TokenFile::open(path)?;
            let found = file.vocabulary();
            if found > vocabulary {
                return Err(TokenFileError::OtherVocabulary { path: path.into(), found, given: vocabulary });
            }
            file.description.vocabulary = vocabulary;
            return Ok(file);
        }
        let bytes = map(path)?;
        let (layout, expected) = Layout::of(&bytes, vocabulary);
        let tokens = count(path, &bytes, layout)?;
        if let Some(expected) = expected.filter(|&expected| expected != tokens) {
            return Err(TokenFileError::WrongHeader { path: path.into(), expected, found: tokens });
        }
        TokenFile::checked(path, bytes, Description::bare(tokens, vocabulary, layout))
    }

    fn checked(path: &Path, bytes: MappedFile, description: Description) -> Result<TokenFile, TokenFileError> {
        if description.tokens == 0 {
            return Err(TokenFileError::Empty(path.into()));
        }
        if description.vocabulary > i32::MAX as usize {
            return Err(TokenFileError::VocabularyTooLarge(description.vocabulary));
        }
        Ok(TokenFile { path: path.into(), bytes, description })
    }

    /// Copies `into.len()` tokens from index `start` on. They are checked here and not when the file is
    /// opened, which would read all of a file that may be larger than the memory.
    ///
    /// # Panics
    /// If there are not that many tokens after `start`.
    pub fn read(&self, start: usize, into: &mut [i32]) -> Result<(), TokenFileError> {
        let layout = self.description.layout;
        let bytes = &self.bytes[layout.bytes(start)..layout.bytes(start + into.len())];
        let mut largest = 0;
        let tokens = into.iter_mut();
        if layout.width() == 2 {
            for (to, from) in tokens.zip(bytes.as_chunks::<2>().0) {
                let token = u32::from(u16::from_le_bytes(*from));
                largest = largest.max(token);
                *to = token as i32;
            }
        } else {
            for (to, from) in tokens.zip(bytes.as_chunks::<4>().0) {
                let token = u32::from_le_bytes(*from);
                largest = largest.max(token);
                *to = token as i32;
            }
        }
        if (largest as usize) < self.vocabulary() {
            return Ok(());
        }
        let offset = into.iter().position(|&token| token == largest as i32).unwrap_or_default();
        Err(TokenFileError::UnknownToken {
            path: self.path.clone(),
            index: start + offset,
            token: largest,
            vocabulary: self.vocabulary(),
            layout,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the sidecar says.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// How many tokens there are; at least one.
    #[allow(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.description.tokens
    }

    /// The token after each document, where the file is known to have one.
    pub fn end_of_text(&self) -> Option<u32> {
        self.description.preparation.as_ref().map(|preparation| preparation.end_of_text)
    }

    /// How many different tokens there may be.
    pub fn vocabulary(&self) -> usize {
        self.description.vocabulary
    }
}

impl Description {
    /// Writes the sidecar of a token file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), FileError> {
        files::write_atomically(&sidecar_of(path), |file| {
            serde_json::to_writer_pretty(&mut *file, self)?;
            file.write_all(b"\n")
        })
    }
}

/// `train.bin` is described by `train.json`.
pub(crate) fn sidecar_of(path: &Path) -> PathBuf {
    path.with_extension("json")
}

fn map(path: &Path) -> Result<MappedFile, FileError> {
    MappedFile::open(path).map_err(FileError::on("read", path))
}

fn count(path: &Path, bytes: &[u8], layout: Layout) -> Result<usize, TokenFileError> {
    let width = layout.width();
    match bytes.len().saturating_sub(layout.bytes(0)) {
        0 => Err(TokenFileError::Empty(path.into())),
        odd if odd % width != 0 => Err(TokenFileError::OddLength { path: path.into(), bytes: bytes.len(), width }),
        even => Ok(even / width),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A token file of its own folder, which must be kept for as long as the file is used.
    pub(crate) fn token_file(numbers: &[u16], vocabulary: usize) -> (tempfile::TempDir, Arc<TokenFile>) {
        let folder = tempfile::tempdir().unwrap();
        let description = Description::bare(numbers.len(), vocabulary, Layout::U16);
        let numbers = numbers.iter().map(|&number| number.into());
        let file = TokenFile::create(&folder.path().join("train.bin"), description, numbers).unwrap();
        (folder, Arc::new(file))
    }

    #[test]
    fn what_is_written_is_read() {
        let numbers: Vec<u16> = (0..1000).map(|n| n * 65).collect();
        let (folder, file) = token_file(&numbers, 65536);
        assert_eq!(file.len(), 1000);
        let raw = fs::read(folder.path().join("train.bin")).unwrap();
        assert_eq!(&raw[2..6], [65, 0, 130, 0]);
        let mut some = [0; 10];
        file.read(990, &mut some).unwrap();
        assert_eq!(some[9], 999 * 65);
        let path = folder.path().join("train.bin");
        let bare = TokenFile::open_bare(&path, 70_000).unwrap();
        assert_eq!((bare.len(), bare.vocabulary()), (1000, 70_000));
        let text = TokenFile::open_bare(&path, 50_304).unwrap_err().to_string();
        assert!(text.contains("a vocabulary of 65536") && text.contains("`vocabulary: 50304`; raise it"), "{text}");
        fs::remove_file(folder.path().join("train.json")).unwrap();
        let bare = TokenFile::open_bare(&path, 65536).unwrap();
        assert_eq!((bare.len(), bare.vocabulary()), (1000, 65536));
    }

    #[test]
    fn every_layout_is_read_with_and_without_a_sidecar() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("val.bin");
        for layout in [Layout::U16, Layout::U32, Layout::LlmC16, Layout::LlmC32] {
            let vocabulary = if layout.width() == 2 { 50_257 } else { 128_256 };
            let numbers: Vec<u32> = (0..300).map(|n| n * (vocabulary as u32 / 300)).collect();
            let check = |file: TokenFile| {
                let mut found = vec![0; 299];
                file.read(1, &mut found).unwrap();
                assert_eq!((file.len(), file.description().layout), (300, layout));
                assert!(found.iter().zip(&numbers[1..]).all(|(found, number)| *found == *number as i32));
            };
            let description = Description::bare(300, vocabulary, layout);
            check(TokenFile::create(&path, description, numbers.iter().copied()).unwrap());
            fs::remove_file(folder.path().join("val.json")).unwrap();
            check(TokenFile::open_bare(&path, vocabulary).unwrap());
            if layout.header(300).is_empty() {
                continue;
            }
            let bytes = fs::read(&path).unwrap();
            fs::remove_file(&path).unwrap();
            fs::write(&path, &bytes[..bytes.len() - layout.width()]).unwrap();
            let text = TokenFile::open_bare(&path, vocabulary).unwrap_err().to_string();
            assert!(text.contains("val.bin is damaged: its llm.c header tells 300 tokens, but 299 follow"), "{text}");
        }
    }

    #[test]
    fn damage_is_an_error() {
        let (folder, file) = token_file(&[1, 2, 3, 4], 5);
        let path = folder.path().join("train.bin");
        let message = |bytes: &[u8]| {
            // A new file: the open mapping keeps the old one.
            fs::remove_file(&path).unwrap();
            fs::write(&path, bytes).unwrap();
            TokenFile::open(&path).unwrap_err().to_string()
        };
        let text = message(&[1, 0, 2, 0]);
        assert!(text.contains("train.bin is damaged: 2 tokens (4 bytes) where"), "{text}");
        assert!(text.contains("train.json tells 4 (8 bytes); delete it and run again"), "{text}");
        assert!(message(&[1, 0, 2]).contains("has 3 bytes, an odd number"));
        assert!(message(&[]).contains("holds no tokens"));
        fs::remove_file(&path).unwrap();
        assert!(TokenFile::open(&path).unwrap_err().to_string().contains("cannot read"));
        assert_eq!(file.len(), 4);
    }

    #[test]
    fn a_missing_or_wrong_sidecar_is_an_error() {
        let (folder, _file) = token_file(&[1, 2, 3, 4], 5);
        let path = folder.path().join("train.bin");
        let sidecar = folder.path().join("train.json");
        fs::write(&sidecar, "{\"tokens\": 4,\n \"vocabularies\": 5}").unwrap();
        let text = TokenFile::open(&path).unwrap_err().to_string();
        assert!(text.contains("vocabularies") && text.contains("line 2"), "{text}");
        fs::remove_file(&sidecar).unwrap();
        let text = TokenFile::open(&path).unwrap_err().to_string();
        assert!(text.contains("has no") && text.contains("train.json beside it"), "{text}");
        let huge = TokenFile::open_bare(&path, 1 << 32).unwrap_err().to_string();
        assert!(huge.contains("4294967296"), "{huge}");
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_an_error() {
        let (_folder, file) = token_file(&[1, 2, 9, 4], 5);
        let mut tokens = [0; 3];
        let text = file.read(1, &mut tokens).unwrap_err().to_string();
        assert!(text.contains("token 9 at index 2 (byte 4), but the vocabulary has 5"), "{text}");
    }
}
