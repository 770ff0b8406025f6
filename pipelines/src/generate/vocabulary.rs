//! From text to tokens and back.

use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::data::Tokenizer;
use crate::data::chars::Chars;
use crate::data::text::hexadecimal;
use crate::data::tokenizer::json::Json;
use crate::data::tokenizer::{Choice, Codec};

/// What turns text into tokens for a trained model.
#[derive(Clone)]
pub struct Vocabulary(Kind);

#[derive(Clone)]
enum Kind {
    Chars(Chars),
    Codec(Arc<dyn Codec>),
}

impl Vocabulary {
    /// That of a tokenizer, if it is known how it works.
    pub fn new(tokenizer: &Tokenizer) -> Option<Self> {
        let codec = |choice: Choice| choice.open().ok().flatten().map(|codec| Self(Kind::Codec(codec)));
        match tokenizer {
            Tokenizer::Chars { symbols } => Some(Self(Kind::Chars(symbols.clone()))),
            Tokenizer::Gpt2 => codec(Choice::Gpt2),
            Tokenizer::Bytes => codec(Choice::Bytes),
            // needs its file: see `of_file`
            Tokenizer::Json { .. } | Tokenizer::Unknown => None,
        }
    }

    /// That of a tokenizer's file.
    ///
    /// # Errors
    /// A file that cannot be read, or whose SHA-256 is not the one given.
    pub fn of_file(path: &Path, sha256: &str, end_of_text: u32) -> Result<Self, String> {
        let bytes = std::fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        if hexadecimal(&Sha256::digest(&bytes)) != sha256 {
            return Err(format!("{} is not the file that made the tokens of training", path.display()));
        }
        let json = Json::with_end(path, end_of_text).map_err(|e| e.to_string())?;
        Ok(Self(Kind::Codec(Arc::new(json))))
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        match &self.0 {
            Kind::Chars(chars) => chars.vocabulary(),
            Kind::Codec(codec) => codec.vocabulary(),
        }
    }

    /// The token that ends a document, where there is one.
    pub fn end_of_text(&self) -> Option<u32> {
        match &self.0 {
            Kind::Chars(_) => None,
            Kind::Codec(codec) => Some(codec.end_of_text()),
        }
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tokens of a text.
    ///
    /// # Errors
    /// What the vocabulary does not have, in words for the user.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        match &self.0 {
            Kind::Chars(chars) => chars.encode(text).map_err(|e| e.to_string()),
            Kind::Codec(codec) => {
                let mut tokens = Vec::new();
                codec.encoder().encode(text.as_bytes(), &mut tokens).map_err(|e| e.to_string())?;
                Ok(tokens)
            }
        }
    }

    /// The bytes of a token, which need not be whole characters.
    ///
    /// # Errors
    /// A token that is none.
    pub fn bytes(&self, token: u32) -> Result<Vec<u8>, String> {
        match &self.0 {
            Kind::Chars(chars) => chars.decode([token]).map(String::into_bytes).map_err(|e| e.to_string()),
            Kind::Codec(codec) if (token as usize) < codec.vocabulary() => Ok(codec.bytes(token)),
            Kind::Codec(codec) => Err(format!("token {token} is none of the {}", codec.vocabulary())),
        }
    }
}

/// Puts the bytes of tokens together and gives whole characters as soon as they are there.
#[derive(Clone, Debug, Default)]
pub struct Characters {
    pending: Vec<u8>,
}

impl Characters {
    /// The characters that are complete with these bytes; what can never become one turns into U+FFFD.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(whole) => {
                    text.push_str(whole);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[..valid]));
                    let Some(wrong) = error.error_len() else {
                        self.pending.drain(..valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending.drain(..valid + wrong);
                }
            }
        }
    }

    /// What is left at the end: a character that was cut off.
    pub fn finish(&mut self) -> String {
        let left = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_appear_when_they_are_whole() {
        let mut characters = Characters::default();
        let bytes = "aé€😀".as_bytes();
        let mut pieces = Vec::new();
        for byte in bytes {
            pieces.push(characters.push(&[*byte]));
        }
        assert_eq!(pieces, ["a", "", "é", "", "", "€", "", "", "", "😀"]);
        assert_eq!(characters.push(&[b'x', 0xff, b'y', 0xe2]), "x\u{fffd}y");
        assert_eq!(characters.push(b"z"), "\u{fffd}z");
        characters.push(&[0xe2, 0x82]);
        assert_eq!(characters.finish(), "\u{fffd}");
        assert_eq!(characters.finish(), "");
    }

    #[test]
    fn text_and_tokens() {
        let vocabulary = Vocabulary::new(&Tokenizer::Chars { symbols: Chars::of("hello") }).unwrap();
        assert_eq!((vocabulary.len(), vocabulary.encode("hole").unwrap()), (4, vec![1, 3, 2, 0]));
        assert_eq!(vocabulary.bytes(1).unwrap(), b"h");
        assert!(vocabulary.encode("x").unwrap_err().contains("'x'") && vocabulary.bytes(4).is_err());
        assert!(Vocabulary::new(&Tokenizer::Unknown).is_none());
        let gpt2 = Vocabulary::new(&Tokenizer::Gpt2).unwrap();
        let tokens = gpt2.encode("Hello, wörld").unwrap();
        let bytes: Vec<u8> = tokens.iter().flat_map(|t| gpt2.bytes(*t).unwrap()).collect();
        assert_eq!((tokens[0], bytes), (15496, "Hello, wörld".into()));
        assert!(gpt2.bytes(1 << 20).is_err());
    }
}
