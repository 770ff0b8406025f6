//! Tokenizers as the Hugging Face library `tokenizers` writes them.

use std::fs;
use std::path::{Path, PathBuf};

use tokenizers::Tokenizer;

use super::{Codec, EncodeError, Encoder};

/// Names of the token that ends a document, as published models call it.
const USUAL: [&str; 8] =
    ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>", "<｜end▁of▁sentence｜>", "[SEP]"];

/// A tokenizer of a file `tokenizer.json`.
pub struct Json {
    tokenizer: Tokenizer,
    end_of_text: u32,
}

impl Json {
    /// Reads a file. `end_of_text` names the token that ends a document; without it the usual names are tried.
    ///
    /// # Errors
    /// If the file cannot be read, is no tokenizer, or has no such token.
    pub fn open(path: &Path, end_of_text: Option<&str>) -> Result<Json, EncodeError> {
        let error = |reason: String| EncodeError::Json { path: PathBuf::from(path), reason };
        let bytes = fs::read(path).map_err(|source| error(source.to_string()))?;
        let mut tokenizer = Tokenizer::from_bytes(&bytes).map_err(|source| error(source.to_string()))?;
        // documents are never cut off nor filled up
        tokenizer.with_truncation(None).map_err(|source| error(source.to_string()))?;
        tokenizer.with_padding(None);
        let names: Vec<&str> = end_of_text.map_or(USUAL.to_vec(), |name| vec![name]);
        let found = names.iter().find_map(|name| tokenizer.token_to_id(name));
        let end_of_text = found.ok_or_else(|| {
            let tried = names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
            error(format!(
                "it has no token {tried} to end a document with; name it: \
                 tokenizer: Json(file: {path:?}, end_of_text: Some(\"…\"))"
            ))
        })?;
        Ok(Json { tokenizer, end_of_text })
    }
}

impl Codec for Json {
    fn vocabulary(&self) -> usize {
        let numbers = self.tokenizer.get_vocab(true).into_values();
        numbers.max().map_or(0, |largest| largest as usize + 1)
    }
    fn end_of_text(&self) -> u32 {
        self.end_of_text
    }
    fn encoder(&self) -> Box<dyn Encoder + '_> {
        Box::new(JsonEncoder(&self.tokenizer))
    }
    /// A file may say anything about spaces.
    fn may_be_cut_before_spaces(&self) -> bool {
        false
    }
    fn decode(&self, tokens: &[u32]) -> Vec<u8> {
        self.tokenizer.decode(tokens, false).map(String::into_bytes).unwrap_or_default()
    }
}

struct JsonEncoder<'a>(&'a Tokenizer);

impl Encoder for JsonEncoder<'_> {
    fn encode(&mut self, text: &[u8], tokens: &mut Vec<u32>) -> Result<(), EncodeError> {
        let text = String::from_utf8_lossy(text);
        let encoding = self.0.encode_fast(&*text, false).map_err(|error| EncodeError::Failed(error.to_string()))?;
        tokens.extend_from_slice(encoding.get_ids());
        Ok(())
    }
}
