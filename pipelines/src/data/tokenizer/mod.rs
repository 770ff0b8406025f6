//! Tokenizers: what turns documents into token files, and tokens back into text.

pub mod bytes;
pub mod characters;
pub mod gpt2;
pub mod json;

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Why a text cannot be made tokens, or a tokenizer cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// A character that the vocabulary does not have.
    #[error("the character {0:?} is not in the vocabulary of characters; the corpus changed while it was read")]
    UnknownChar(char),
    /// The tokenizer file cannot be used.
    #[error("{} is no tokenizer that this program can use: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The tokenizer of a file failed.
    #[error("the tokenizer cannot encode a text: {0}")]
    Failed(String),
}

/// A tokenizer that is shared by all threads.
pub trait Codec: Send + Sync {
    /// Every token is below this.
    fn vocabulary(&self) -> usize;

    /// The token that is written after each document.
    fn end_of_text(&self) -> u32;

    /// What encodes texts on one thread; it may remember what it met.
    fn encoder(&self) -> Box<dyn Encoder + '_>;

    /// Whether a text that is cut before white space which follows an ASCII character that is none has the same tokens
    /// in parts as in one piece. Long documents are then read and encoded in parts.
    fn may_be_cut_before_spaces(&self) -> bool;

    /// The bytes that tokens stand for; a character may be spread over several tokens. Numbers that no token has are
    /// left out.
    fn decode(&self, tokens: &[u32]) -> Vec<u8>;

    /// What one token adds to a text that is there already.
    fn bytes(&self, token: u32) -> Vec<u8> {
        self.decode(&[token])
    }
}

/// A tokenizer at work on one thread.
pub trait Encoder {
    /// Appends the tokens of a text. What is not UTF-8 in it counts as U+FFFD, one for each wrong sequence, as Python's
    /// `errors="replace"` does; only [`bytes::Bytes`] keeps the bytes.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    fn encode(&mut self, text: &[u8], tokens: &mut Vec<u32>) -> Result<(), EncodeError>;
}

/// The tokenizers that a pipeline may name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Choice {
    /// `Gpt2`: GPT-2's byte-pair encoding.
    Gpt2,
    /// `Json(file: "tokenizer.json")`: a tokenizer file of the Hugging Face library.
    Json {
        /// The file.
        file: PathBuf,
        /// The token to write after each document, such as `"</s>"`; found by its usual names if it is left out.
        #[serde(default)]
        end_of_text: Option<String>,
    },
    /// `Chars`: one token for each character that the corpus has, sorted.
    Chars,
    /// `Bytes`: one token for each byte.
    Bytes,
}

impl Choice {
    /// The tokenizer, unless it depends on the documents ([`Choice::Chars`]).
    ///
    /// # Errors
    /// If the tokenizer's file cannot be read.
    pub fn open(&self) -> Result<Option<Arc<dyn Codec>>, EncodeError> {
        Ok(match self {
            Choice::Gpt2 => Some(Arc::new(gpt2::Gpt2::new())),
            Choice::Json { file, end_of_text } => Some(Arc::new(json::Json::open(file, end_of_text.as_deref())?)),
            Choice::Chars => None,
            Choice::Bytes => Some(Arc::new(bytes::Bytes)),
        })
    }
}
