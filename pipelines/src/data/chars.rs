//! A vocabulary of characters, and the two token files of a text, as nanoGPT's `prepare.py` makes them.

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::layout::{Files, Layout};
use super::text::Text;
use super::token_file::{Description, TokenFile, TokenFileError, TokenSplits, Tokenizer};

/// Why a text cannot be cut into characters.
#[derive(Debug, thiserror::Error)]
pub enum CharsError {
    /// The part to hold out is none.
    #[error("validation: {0} is not a part of the text; it must be between 0 and 1, for example 0.1")]
    Fraction(f64),
    /// A split would have no characters.
    #[error(
        "{origin} is too short: of its {chars} characters, {train} are for training and {validation} for validation \
         (validation: {fraction}); both need some"
    )]
    TooShort {
        /// Where the text came from.
        origin: String,
        /// Its length.
        chars: usize,
        /// The length of the first part.
        train: usize,
        /// The length of the second part.
        validation: usize,
        /// The part to hold out.
        fraction: f64,
    },
    /// A character that the text did not have.
    #[error(
        "the character {character:?} (number {index} of the text) is not in the vocabulary of {vocabulary} characters"
    )]
    UnknownChar {
        /// The character.
        character: char,
        /// Its place, counted from zero.
        index: usize,
        /// How many there are.
        vocabulary: usize,
    },
    /// A token that stands for no character.
    #[error("token {token} stands for no character; the vocabulary has {vocabulary}")]
    UnknownToken {
        /// The token.
        token: u32,
        /// How many there are.
        vocabulary: usize,
    },
    /// The token files cannot be written or read.
    #[error(transparent)]
    TokenFile(#[from] TokenFileError),
}

/// The characters of a text, sorted by code point; a character's token is its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct Chars {
    symbols: Vec<char>,
}

impl Chars {
    /// All characters of a text.
    pub fn of(text: &str) -> Chars {
        let mut present = vec![false; char::MAX as usize + 1];
        text.chars().for_each(|c| present[c as usize] = true);
        let symbols =
            (0..=char::MAX as u32).filter(|&code| present[code as usize]).filter_map(char::from_u32).collect();
        Chars { symbols }
    }

    /// How many characters there are.
    pub fn vocabulary(&self) -> usize {
        self.symbols.len()
    }

    /// The token of every character.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, CharsError> {
        text.chars()
            .enumerate()
            .map(|(index, character)| match self.symbols.binary_search(&character) {
                Ok(token) => Ok(token as u32),
                Err(_) => Err(CharsError::UnknownChar { character, index, vocabulary: self.vocabulary() }),
            })
            .collect()
    }

    /// The character of every token.
    pub fn decode(&self, tokens: impl IntoIterator<Item = u32>) -> Result<String, CharsError> {
        tokens
            .into_iter()
            .map(|token| match self.symbols.get(token as usize) {
                Some(&symbol) => Ok(symbol),
                None => Err(CharsError::UnknownToken { token, vocabulary: self.vocabulary() }),
            })
            .collect()
    }

    /// A table from code points to tokens, for texts whose characters are all in the vocabulary.
    fn table(&self) -> Vec<u32> {
        let largest = self.symbols.last().map_or(0, |&c| c as usize);
        let mut table = vec![0; largest + 1];
        for (token, &symbol) in self.symbols.iter().enumerate() {
            table[symbol as usize] = token as u32;
        }
        table
    }
}

impl From<String> for Chars {
    fn from(symbols: String) -> Chars {
        Chars { symbols: symbols.chars().collect() }
    }
}

impl From<Chars> for String {
    fn from(chars: Chars) -> String {
        chars.symbols.iter().collect()
    }
}

/// Cuts a text into its characters: the vocabulary is that of the whole text, the first part is for
/// training and the last `validation` of it (0.1 for upstream's split) is held out. The two token files
/// are kept in a folder of `cache` that is named after text and split, and found there the next time.
pub fn prepare(text: &Text, validation: f64, cache: &Path) -> Result<TokenSplits, CharsError> {
    if !(validation > 0.0 && validation < 1.0) {
        return Err(CharsError::Fraction(validation));
    }
    let folder = cache.join(format!("chars-{}-{validation}", &text.sha256[..16]));
    let (train_path, validation_path) = (folder.join("train.bin"), folder.join("val.bin"));
    // The folder's name says what is in it, so what is there is right or, when it cannot be opened,
    // damaged: then the user should know, rather than train on.
    if train_path.exists() && validation_path.with_extension("json").exists() {
        let train = Arc::new(TokenFile::open(&train_path)?);
        return Ok(TokenSplits { train, validation: Arc::new(TokenFile::open(&validation_path)?) });
    }
    let chars = text.text.chars().count();
    // In Python: data[:int(n * 0.9)]
    let train = (chars as f64 * (1.0 - validation)) as usize;
    if train == 0 || train >= chars {
        let (origin, fraction) = (text.origin.clone(), validation);
        return Err(CharsError::TooShort { origin, chars, train, validation: chars - train, fraction });
    }
    let symbols = Chars::of(&text.text);
    let vocabulary = symbols.vocabulary();
    let layout = Layout::new(Files::Raw, vocabulary);
    let table = symbols.table();
    let create = |path: &Path, tokens: usize, skip: usize| {
        let tokenizer = Tokenizer::Chars { symbols: symbols.clone() };
        let source_sha256 = Some(text.sha256.clone());
        let description = Description { tokens, vocabulary, tokenizer, source_sha256, layout, preparation: None };
        let numbers = text.text.chars().skip(skip).take(tokens).map(|c| table[c as usize]);
        TokenFile::create(path, description, numbers).map(Arc::new)
    };
    // The validation sidecar is the last file to appear: its presence means that all are there.
    let train_file = create(&train_path, train, 0)?;
    Ok(TokenSplits { train: train_file, validation: create(&validation_path, chars - train, train)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn text(content: &str) -> Text {
        use sha2::Digest;
        let sha256 = crate::data::text::hexadecimal(&sha2::Sha256::digest(content));
        Text { text: content.into(), origin: "a.txt".into(), sha256 }
    }

    #[test]
    fn sorted_characters() {
        let chars = Chars::of("hello é\nworld€😀");
        assert_eq!(String::from(chars.clone()), "\n dehlorwé€😀");
        let tokens = chars.encode("hé€l\n").unwrap();
        assert_eq!(tokens, [4, 9, 10, 5, 0]);
        assert_eq!(chars.decode(tokens).unwrap(), "hé€l\n");
        let message = chars.encode("hex").unwrap_err().to_string();
        assert!(message.contains("'x' (number 2 of the text)"), "{message}");
        assert!(chars.decode([12]).unwrap_err().to_string().contains("token 12"));
    }

    #[test]
    fn splits_and_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let text = text(&"abcdefghij\n".repeat(10));
        let splits = prepare(&text, 0.1, folder.path()).unwrap();
        assert_eq!((splits.train.len(), splits.validation.len()), (99, 11));
        assert_eq!(splits.train.vocabulary(), 11);
        let mut tokens = vec![0; 11];
        splits.validation.read(0, &mut tokens).unwrap();
        assert_eq!(tokens, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0]);
        let Tokenizer::Chars { symbols } = &splits.train.description().tokenizer else { panic!() };
        assert_eq!(symbols, &Chars::of(&text.text));
        let path = splits.train.path().to_path_buf();
        let written = fs::metadata(&path).unwrap().modified().unwrap();
        prepare(&text, 0.1, folder.path()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), written);
        assert_ne!(prepare(&text, 0.2, folder.path()).unwrap().train.path(), path);
    }

    #[test]
    fn a_cut_token_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let text = text("to be or not to be\n");
        let path = prepare(&text, 0.1, folder.path()).unwrap().train.path().to_path_buf();
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..10]).unwrap();
        let message = prepare(&text, 0.1, folder.path()).unwrap_err().to_string();
        assert!(message.contains("5 tokens (10 bytes)") && message.contains("17 (34 bytes)"), "{message}");
        fs::remove_file(&path).unwrap();
        assert_eq!(prepare(&text, 0.1, folder.path()).unwrap().train.len(), 17);
    }

    #[test]
    fn impossible_splits_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        for fraction in [0.0, 1.0, -0.5, f64::NAN, f64::INFINITY] {
            assert!(matches!(prepare(&text("abc"), fraction, folder.path()), Err(CharsError::Fraction(_))));
        }
        let message = prepare(&text("a"), 0.1, folder.path()).unwrap_err().to_string();
        assert!(message.contains("a.txt is too short: of its 1 characters, 0 are for training"), "{message}");
    }

    #[test]
    fn the_length_of_the_shakespeare_splits() {
        // nanoGPT's README prints these for its 1,115,394 characters.
        assert_eq!((1_115_394.0_f64 * (1.0 - 0.1)) as usize, 1_003_854);
    }
}
