//! Token files: raw little-endian `u16` numbers, as nanoGPT's `.bin` files, with a JSON file beside each
//! that says what the numbers mean.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dataflow_kernels::mapped_file::MappedFile;
use serde::{Deserialize, Serialize};

use super::chars::Chars;
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
    pub source_sha256: Option<String>,
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
        "{} has {bytes} bytes, an odd number, so it is no file of 2-byte tokens or was cut off; \
         delete it and run again to make it anew",
        path.display()
    )]
    OddLength {
        /// The token file.
        path: PathBuf,
        /// Its length.
        bytes: usize,
    },
    /// The file and its sidecar disagree.
    #[error(
        "{} is damaged: {found} tokens ({} bytes) where {} tells {expected} ({} bytes); \
         delete it and run again to make it anew",
        path.display(), 2 * found, sidecar.display(), 2 * expected
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
    },
    /// There are no tokens.
    #[error("{} holds no tokens", .0.display())]
    Empty(PathBuf),
    /// A number that no token has.
    #[error(
        "{} is damaged or was made for another vocabulary: token {token} at index {index} (byte {}), \
         but the vocabulary has {vocabulary}",
        path.display(), 2 * index
    )]
    UnknownToken {
        /// The token file.
        path: PathBuf,
        /// Which token.
        index: usize,
        /// Its number.
        token: u16,
        /// All numbers must be below this.
        vocabulary: usize,
    },
    /// More kinds of tokens than a `u16` can number.
    #[error("a vocabulary of {0} does not fit a token file, which holds 65536 different tokens at most")]
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
        numbers: impl IntoIterator<Item = u16>,
    ) -> Result<TokenFile, TokenFileError> {
        // Tokens must never lie beside the description of others: it goes first and comes back last.
        let sidecar = sidecar_of(path);
        match fs::remove_file(&sidecar) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(FileError { action: "replace", path: sidecar, source: error }.into());
            }
            _ => {}
        }
        files::write_atomically(path, |file| {
            numbers.into_iter().try_for_each(|number| file.write_all(&number.to_le_bytes()))
        })?;
        files::write_atomically(&sidecar, |file| {
            serde_json::to_writer_pretty(&mut *file, &description)?;
            file.write_all(b"\n")
        })?;
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
        let found = count(path, &bytes)?;
        if found != description.tokens {
            let expected = description.tokens;
            return Err(TokenFileError::WrongLength { path: path.into(), sidecar, expected, found });
        }
        TokenFile::checked(path, bytes, description)
    }

    /// Opens a bare `.bin` file, as nanoGPT's `prepare.py` writes it.
    pub fn open_bare(path: &Path, vocabulary: usize) -> Result<TokenFile, TokenFileError> {
        let bytes = map(path)?;
        let tokens = count(path, &bytes)?;
        let tokenizer = Tokenizer::Unknown;
        TokenFile::checked(path, bytes, Description { tokens, vocabulary, tokenizer, source_sha256: None })
    }

    fn checked(path: &Path, bytes: MappedFile, description: Description) -> Result<TokenFile, TokenFileError> {
        if description.tokens == 0 {
            return Err(TokenFileError::Empty(path.into()));
        }
        if description.vocabulary > 1 << 16 {
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
        let bytes = &self.bytes[2 * start..2 * (start + into.len())];
        let mut largest = 0;
        for (to, from) in into.iter_mut().zip(bytes.chunks_exact(2)) {
            let token = u16::from_le_bytes([from[0], from[1]]);
            largest = largest.max(token);
            *to = token.into();
        }
        if usize::from(largest) < self.vocabulary() {
            return Ok(());
        }
        let offset = into.iter().position(|&token| token == i32::from(largest)).unwrap_or_default();
        Err(TokenFileError::UnknownToken {
            path: self.path.clone(),
            index: start + offset,
            token: largest,
            vocabulary: self.vocabulary(),
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

    /// How many different tokens there may be.
    pub fn vocabulary(&self) -> usize {
        self.description.vocabulary
    }
}

/// `train.bin` is described by `train.json`.
fn sidecar_of(path: &Path) -> PathBuf {
    path.with_extension("json")
}

fn map(path: &Path) -> Result<MappedFile, FileError> {
    MappedFile::open(path).map_err(FileError::on("read", path))
}

fn count(path: &Path, bytes: &[u8]) -> Result<usize, TokenFileError> {
    match bytes.len() {
        0 => Err(TokenFileError::Empty(path.into())),
        odd if odd % 2 == 1 => Err(TokenFileError::OddLength { path: path.into(), bytes: odd }),
        even => Ok(even / 2),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A token file of its own folder, which must be kept for as long as the file is used.
    pub(crate) fn token_file(numbers: &[u16], vocabulary: usize) -> (tempfile::TempDir, Arc<TokenFile>) {
        let folder = tempfile::tempdir().unwrap();
        let description =
            Description { tokens: numbers.len(), vocabulary, tokenizer: Tokenizer::Unknown, source_sha256: None };
        let file = TokenFile::create(&folder.path().join("train.bin"), description, numbers.iter().copied()).unwrap();
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
        let bare = TokenFile::open_bare(&folder.path().join("train.bin"), 65536).unwrap();
        assert_eq!((bare.len(), bare.vocabulary()), (1000, 65536));
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
        let huge = TokenFile::open_bare(&path, 100_000).unwrap_err().to_string();
        assert!(huge.contains("100000"), "{huge}");
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_an_error() {
        let (_folder, file) = token_file(&[1, 2, 9, 4], 5);
        let mut tokens = [0; 3];
        let text = file.read(1, &mut tokens).unwrap_err().to_string();
        assert!(text.contains("token 9 at index 2 (byte 4), but the vocabulary has 5"), "{text}");
    }
}
