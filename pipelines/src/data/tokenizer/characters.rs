//! The characters of a corpus as tokens.

use super::{Codec, EncodeError, Encoder};
use crate::data::chars::Chars;

/// A token for each character of a vocabulary; the number after the last one ends a document.
pub struct Characters {
    symbols: Chars,
    /// From code points to tokens; `u32::MAX` where there is none.
    table: Vec<u32>,
}

impl Characters {
    /// The tokenizer of these characters.
    pub fn new(symbols: Chars) -> Characters {
        let text = String::from(symbols.clone());
        let largest = text.chars().last().map_or(0, |c| c as usize);
        let mut table = vec![u32::MAX; largest + 1];
        text.chars().enumerate().for_each(|(token, c)| table[c as usize] = token as u32);
        Characters { symbols, table }
    }
}

impl Codec for Characters {
    fn vocabulary(&self) -> usize {
        self.symbols.vocabulary() + 1
    }
    fn end_of_text(&self) -> u32 {
        self.symbols.vocabulary() as u32
    }
    fn encoder(&self) -> Box<dyn Encoder + '_> {
        Box::new(CharacterEncoder(self))
    }
    fn may_be_cut_before_spaces(&self) -> bool {
        true
    }
    fn decode(&self, tokens: &[u32]) -> Vec<u8> {
        let known = tokens.iter().copied().filter(|&token| token < self.end_of_text());
        self.symbols.decode(known).unwrap_or_default().into_bytes()
    }
}

struct CharacterEncoder<'a>(&'a Characters);

impl Encoder for CharacterEncoder<'_> {
    fn encode(&mut self, text: &[u8], tokens: &mut Vec<u32>) -> Result<(), EncodeError> {
        for c in String::from_utf8_lossy(text).chars() {
            match self.0.table.get(c as usize) {
                Some(&token) if token != u32::MAX => tokens.push(token),
                _ => return Err(EncodeError::UnknownChar(c)),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorted_characters() {
        let characters = Characters::new(Chars::of("héllo😀"));
        let mut tokens = Vec::new();
        characters.encoder().encode("hello".as_bytes(), &mut tokens).unwrap_err();
        tokens.clear();
        characters.encoder().encode("oh😀".as_bytes(), &mut tokens).unwrap();
        assert_eq!(tokens, [2, 0, 4]);
        assert_eq!((characters.vocabulary(), characters.end_of_text()), (6, 5));
        assert_eq!(characters.decode(&[2, 5, 0, 9]), b"oh");
    }
}
