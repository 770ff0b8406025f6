//! Tokenizers as the Hugging Face library `tokenizers` writes them.

use std::collections::HashMap;
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
    pieces: Pieces,
}

/// How the text of a token is written in a file.
enum Pieces {
    /// Each character stands for a byte, as in GPT-2's vocabulary.
    Bytes(HashMap<char, u8>),
    /// Words, and `<0x..>` for single bytes. What a token adds shows behind another one, which may be needed for the space
    /// between them.
    Words { before: Vec<u32> },
}

impl Pieces {
    fn of(tokenizer: &Tokenizer) -> Self {
        let decoder = tokenizer.get_decoder().and_then(|d| serde_json::to_string(d).ok()).unwrap_or_default();
        if decoder.contains("\"ByteLevel\"") {
            return Self::Bytes(byte_characters());
        }
        let before = ["a", "▁a", "e", "▁e", "0", "▁0"].iter().find_map(|text| tokenizer.token_to_id(text));
        Self::Words { before: before.into_iter().collect() }
    }
}

/// The characters that stand for bytes: those that print stand for themselves, others for U+0100 and what follows
/// (`bytes_to_unicode` of GPT-2's published code).
fn byte_characters() -> HashMap<char, u8> {
    let prints = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let others = (0..=255u8).filter(|b| !prints(b)).zip(0x100u32..);
    let others = others.filter_map(|(byte, code)| char::from_u32(code).map(|c| (c, byte)));
    (0..=255u8).filter(prints).map(|byte| (char::from(byte), byte)).chain(others).collect()
}

/// `<0x0A>` as the byte that it is.
fn single_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

impl Json {
    /// Reads a file. `end_of_text` names the token that ends a document; without it the usual names are tried.
    ///
    /// # Errors
    /// If the file cannot be read, is no tokenizer, or has no such token.
    pub fn open(path: &Path, end_of_text: Option<&str>) -> Result<Json, EncodeError> {
        let tokenizer = read(path)?;
        let names: Vec<&str> = end_of_text.map_or(USUAL.to_vec(), |name| vec![name]);
        let found = names.iter().find_map(|name| tokenizer.token_to_id(name));
        let end_of_text = found.ok_or_else(|| {
            let tried = names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
            let reason = format!(
                "it has no token {tried} to end a document with; name it: \
                 tokenizer: Json(file: {path:?}, end_of_text: Some(\"…\"))"
            );
            EncodeError::Json { path: PathBuf::from(path), reason }
        })?;
        Ok(Json { pieces: Pieces::of(&tokenizer), tokenizer, end_of_text })
    }

    /// Reads a file of which it is known which token ends a document.
    ///
    /// # Errors
    /// If the file cannot be read, or is no tokenizer.
    pub fn with_end(path: &Path, end_of_text: u32) -> Result<Json, EncodeError> {
        let tokenizer = read(path)?;
        Ok(Json { pieces: Pieces::of(&tokenizer), tokenizer, end_of_text })
    }
}

/// Documents are never cut off nor filled up.
fn read(path: &Path) -> Result<Tokenizer, EncodeError> {
    let error = |reason: String| EncodeError::Json { path: PathBuf::from(path), reason };
    let bytes = fs::read(path).map_err(|source| error(source.to_string()))?;
    let mut tokenizer = Tokenizer::from_bytes(&bytes).map_err(|source| error(source.to_string()))?;
    tokenizer.with_truncation(None).map_err(|source| error(source.to_string()))?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
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
    fn bytes(&self, token: u32) -> Vec<u8> {
        let Some(text) = self.tokenizer.id_to_token(token) else { return Vec::new() };
        // `<|endoftext|>` and the like
        if self.tokenizer.get_added_tokens_decoder().contains_key(&token) {
            return text.into_bytes();
        }
        match &self.pieces {
            Pieces::Bytes(known) => {
                let bytes: Option<Vec<u8>> = text.chars().map(|c| known.get(&c).copied()).collect();
                bytes.unwrap_or(text.into_bytes())
            }
            Pieces::Words { before } => {
                if let Some(byte) = single_byte(&text) {
                    return vec![byte];
                }
                let alone = self.decode(before);
                let both = self.decode(&[&before[..], &[token]].concat());
                both.strip_prefix(&alone[..]).map_or(both.clone(), <[u8]>::to_vec)
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer(vocabulary: &str, decoder: &str) -> Json {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        let text = format!(
            r#"{{"version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
                "added_tokens": [{{"id": 0, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true}}],
                "post_processor": null, "decoder": {decoder},
                "model": {{"type": "WordLevel", "vocab": {{"</s>": 0, {vocabulary}}}, "unk_token": "</s>"}}}}"#
        );
        fs::write(&path, text).unwrap();
        Json::open(&path, None).unwrap()
    }

    #[test]
    fn a_token_adds_what_it_adds_behind_others() {
        let texts = |json: &Json, tokens: &[u32]| -> Vec<u8> { tokens.iter().flat_map(|t| json.bytes(*t)).collect() };
        // an é in two tokens
        let byte_level = r#"{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}"#;
        let json = tokenizer(r#""Ġcaf": 1, "Ã": 2, "©": 3"#, byte_level);
        assert_eq!(texts(&json, &[1, 2, 3, 0]), " café</s>".as_bytes());
        assert_eq!(json.bytes(2), [0xc3]);
        let metaspace = r#"{"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"},
            "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}"#;
        let json = tokenizer(r#""▁a": 1, "▁word": 2, "s": 3, "<0xC3>": 4, "<0xA9>": 5"#, metaspace);
        assert_eq!(texts(&json, &[2, 3, 4, 5, 2]), " words\u{e9} word".as_bytes());
        let word_piece = r###"{"type": "WordPiece", "prefix": "##", "cleanup": false}"###;
        let json = tokenizer(r###""a": 1, "play": 2, "##ed": 3"###, word_piece);
        assert_eq!(texts(&json, &[2, 3, 2]), b" played play");
        assert!(json.bytes(77).is_empty());
    }
}
