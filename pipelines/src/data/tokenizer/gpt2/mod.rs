//! GPT-2's byte-pair encoding: the ids of `tiktoken`'s `gpt2`, several times as fast.
//!
//! The vocabulary comes with the crate `tiktoken`. A word of up to 16 bytes is looked up in a small table of words met
//! before, which holds nearly all of a text; the rest is merged.

mod merge;
mod words;

use merge::Ranks;
use words::Words;

use super::{Codec, EncodeError, Encoder};

/// How many tokens there are, with the end-of-text token.
pub const VOCABULARY: usize = 50257;

/// The token `<|endoftext|>`, which is written after each document.
pub const END_OF_TEXT: u32 = 50256;

/// Words of up to this many bytes are remembered.
const REMEMBERED: usize = 16;

/// Tokens that a remembered word may have.
const TOKENS: usize = 7;

/// Remembered words: 2 to this power. All of them fit into the cache of a core.
const MEMORY: u32 = 15;

/// GPT-2's tokens.
pub struct Gpt2 {
    ranks: Ranks,
    words: Words,
    /// The bytes of each token, one after the other.
    bytes: Vec<u8>,
    /// Where each token's bytes start; one more than there are tokens.
    starts: Vec<u32>,
}

/// The bytes of the tokens, with the number of each.
fn ranks() -> Ranks {
    let published = tiktoken::encoding::r50k_base();
    (0..END_OF_TEXT).map(|id| (published.decode(&[id]).into_boxed_slice(), id)).collect()
}

impl Gpt2 {
    /// The published vocabulary.
    pub fn new() -> Gpt2 {
        let ranks = ranks();
        let mut sorted: Vec<(&[u8], u32)> = ranks.iter().map(|(bytes, id)| (&**bytes, *id)).collect();
        sorted.sort_unstable_by_key(|&(_, id)| id);
        let (mut bytes, mut starts) = (Vec::new(), vec![0]);
        for (token, _) in sorted {
            bytes.extend_from_slice(token);
            starts.push(bytes.len() as u32);
        }
        Gpt2 { words: Words::new(), bytes, starts, ranks }
    }
}

impl Default for Gpt2 {
    fn default() -> Self {
        Self::new()
    }
}

impl Codec for Gpt2 {
    fn vocabulary(&self) -> usize {
        VOCABULARY
    }
    fn end_of_text(&self) -> u32 {
        END_OF_TEXT
    }
    fn encoder(&self) -> Box<dyn Encoder + '_> {
        Box::new(Gpt2Encoder { gpt2: self, memory: vec![Remembered::default(); 1 << MEMORY] })
    }
    /// A word never goes on behind white space.
    fn may_be_cut_before_spaces(&self) -> bool {
        true
    }
    fn decode(&self, tokens: &[u32]) -> Vec<u8> {
        let mut text = Vec::new();
        for &token in tokens {
            let at = token as usize;
            if let [start, end] = self.starts[at.min(self.starts.len())..][..].get(..2).unwrap_or(&[]) {
                text.extend_from_slice(&self.bytes[*start as usize..*end as usize]);
            } else if token == END_OF_TEXT {
                text.extend_from_slice(b"<|endoftext|>");
            }
        }
        text
    }
}

/// A word and its tokens.
#[derive(Clone, Copy, Default)]
struct Remembered {
    /// The bytes, padded with zeros.
    word: u128,
    length: u8,
    count: u8,
    tokens: [u16; TOKENS],
}

struct Gpt2Encoder<'a> {
    gpt2: &'a Gpt2,
    memory: Vec<Remembered>,
}

impl Encoder for Gpt2Encoder<'_> {
    fn encode(&mut self, text: &[u8], tokens: &mut Vec<u32>) -> Result<(), EncodeError> {
        let text = String::from_utf8_lossy(text);
        let mut start = 0;
        while start < text.len() {
            let end = self.gpt2.words.end(&text, start);
            self.word(text.as_bytes(), start, end, tokens);
            start = end;
        }
        Ok(())
    }
}

impl Gpt2Encoder<'_> {
    #[inline]
    fn word(&mut self, text: &[u8], start: usize, end: usize, tokens: &mut Vec<u32>) {
        let length = end - start;
        if length > REMEMBERED {
            return merge::encode(&text[start..end], &self.gpt2.ranks, tokens);
        }
        let word = load(text, start, length);
        let slot = &mut self.memory[slot_of(word)];
        if slot.word != word || usize::from(slot.length) != length {
            let before = tokens.len();
            merge::encode(&text[start..end], &self.gpt2.ranks, tokens);
            let found = &tokens[before..];
            if found.len() <= TOKENS {
                *slot = Remembered { word, length: length as u8, count: found.len() as u8, tokens: [0; TOKENS] };
                slot.tokens.iter_mut().zip(found).for_each(|(to, from)| *to = *from as u16);
            }
        } else if slot.count == 1 {
            tokens.push(u32::from(slot.tokens[0]));
        } else {
            tokens.extend(slot.tokens[..usize::from(slot.count)].iter().map(|&token| u32::from(token)));
        }
    }
}

/// Up to 16 bytes as a number.
#[inline]
fn load(text: &[u8], start: usize, length: usize) -> u128 {
    match text[start..].first_chunk::<REMEMBERED>() {
        // the shift is below 128, for a word is never empty
        Some(bytes) => u128::from_le_bytes(*bytes) << (128 - 8 * length) >> (128 - 8 * length),
        None => {
            let mut bytes = [0; REMEMBERED];
            bytes[..length].copy_from_slice(&text[start..start + length]);
            u128::from_le_bytes(bytes)
        }
    }
}

#[inline]
fn slot_of(word: u128) -> usize {
    let (low, high) = (word as u64, (word >> 64) as u64);
    let mixed = low.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ high.wrapping_mul(0xc2b2_ae3d_27d4_eb4f).rotate_left(31);
    ((mixed ^ (mixed >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - MEMORY)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(text: &[u8]) -> Vec<u32> {
        let gpt2 = Gpt2::new();
        let mut tokens = Vec::new();
        let mut encoder = gpt2.encoder();
        encoder.encode(text, &mut tokens).unwrap();
        // again, with what is remembered
        let mut again = Vec::new();
        encoder.encode(text, &mut again).unwrap();
        assert_eq!(tokens, again);
        tokens
    }

    #[test]
    fn decodes_what_it_encodes() {
        let gpt2 = Gpt2::new();
        assert_eq!(gpt2.ranks.len(), VOCABULARY - 1);
        let text = "Hello, world! It's 日本 😀\u{0}\t  \n\n naïve antidisestablishmentarianism";
        assert_eq!(gpt2.decode(&encode(text.as_bytes())), text.as_bytes());
        assert_eq!(gpt2.decode(&[15496, END_OF_TEXT, 99_999, u32::MAX]), b"Hello<|endoftext|>");
        assert_eq!(encode(b""), [0u32; 0]);
    }

    #[test]
    fn known_ids() {
        assert_eq!(encode(b"Hello world"), [15496, 995]);
        assert_eq!(encode(b"<|endoftext|>"), [27, 91, 437, 1659, 5239, 91, 29], "text is never a special token");
    }

    /// Ids that `tiktoken` 0.14 gives for texts with emoji, CJK, control characters, runs of spaces, and bytes that are
    /// not UTF-8, which it was given with `errors="replace"`.
    #[test]
    fn the_ids_of_tiktoken() {
        #[derive(serde::Deserialize)]
        struct Case {
            hex: String,
            ids: Vec<u32>,
        }
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/gpt2_ids.json");
        let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
        assert!(cases.len() > 30);
        for case in cases {
            let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
            let text: Vec<u8> = case.hex.as_bytes().chunks(2).map(byte).collect();
            assert!(encode(&text) == case.ids, "{:?}", String::from_utf8_lossy(&text));
        }
    }

    /// A text may be cut before white space and encoded in parts.
    #[test]
    fn parts_have_the_tokens_of_the_whole() {
        let text = "One two  three\n\nfour\tfive 'll  six\u{a0} seven   \n eight's  ";
        let whole = encode(text.as_bytes());
        for at in 1..text.len() {
            let cuts =
                text.as_bytes()[at - 1].is_ascii_graphic() && matches!(text.as_bytes()[at], b' ' | b'\n' | b'\t');
            if cuts {
                let parts = [encode(&text.as_bytes()[..at]), encode(&text.as_bytes()[at..])].concat();
                assert_eq!(parts, whole, "cut at {at}");
            }
        }
    }
}
