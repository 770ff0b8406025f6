//! Raw bytes as tokens.

use super::{Codec, EncodeError, Encoder};

/// A token for each byte; 256 ends a document.
pub struct Bytes;

impl Codec for Bytes {
    fn vocabulary(&self) -> usize {
        257
    }
    fn end_of_text(&self) -> u32 {
        256
    }
    fn encoder(&self) -> Box<dyn Encoder + '_> {
        Box::new(Bytes)
    }
    fn may_be_cut_before_spaces(&self) -> bool {
        true
    }
    fn decode(&self, tokens: &[u32]) -> Vec<u8> {
        tokens.iter().filter_map(|&token| u8::try_from(token).ok()).collect()
    }
}

impl Encoder for Bytes {
    fn encode(&mut self, text: &[u8], tokens: &mut Vec<u32>) -> Result<(), EncodeError> {
        tokens.extend(text.iter().map(|&byte| u32::from(byte)));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stay() {
        let mut tokens = Vec::new();
        Bytes.encode(b"a\xff\0", &mut tokens).unwrap();
        assert_eq!(tokens, [97, 255, 0]);
        tokens.push(Bytes.end_of_text());
        assert_eq!(Bytes.decode(&tokens), b"a\xff\0");
    }
}
