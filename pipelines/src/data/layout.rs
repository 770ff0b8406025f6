//! How tokens lie in a file.

use serde::{Deserialize, Serialize};

/// The header of llm.c: 256 numbers of four bytes, the first three of which are a magic number, a version and the number
/// of tokens.
const HEADER: usize = 1024;

/// Magic number and version of llm.c's files, for two (GPT-2) and four bytes (Llama 3) a token.
const LLM_C: [(u32, u32); 2] = [(20_240_520, 1), (20_240_801, 7)];

/// How tokens lie in a file, all little-endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Layout {
    /// Two bytes a token: nanoGPT's files.
    #[default]
    #[serde(rename = "u16")]
    U16,
    /// Four bytes a token.
    #[serde(rename = "u32")]
    U32,
    /// llm.c's header, then two bytes a token.
    #[serde(rename = "llm.c u16")]
    LlmC16,
    /// llm.c's header, then four bytes a token.
    #[serde(rename = "llm.c u32")]
    LlmC32,
}

/// The programs whose files are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Files {
    /// Tokens and nothing else, as nanoGPT's.
    #[default]
    Raw,
    /// With the header of llm.c.
    LlmC,
}

impl Layout {
    /// The layout for a vocabulary: two bytes a token where they suffice.
    pub fn new(files: Files, vocabulary: usize) -> Layout {
        match (files, vocabulary <= 1 << 16) {
            (Files::Raw, true) => Layout::U16,
            (Files::Raw, false) => Layout::U32,
            (Files::LlmC, true) => Layout::LlmC16,
            (Files::LlmC, false) => Layout::LlmC32,
        }
    }

    /// The layout of a file by its start, and the number of tokens that its header tells.
    pub fn of(bytes: &[u8], vocabulary: usize) -> (Layout, Option<usize>) {
        let number = |at: usize| bytes.get(4 * at..4 * at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        if let (Some(magic), Some(version), Some(tokens)) = (number(0), number(1), number(2))
            && bytes.len() >= HEADER
            && let Some(which) = LLM_C.iter().position(|&known| known == (magic, version))
        {
            return ([Layout::LlmC16, Layout::LlmC32][which], Some(tokens as usize));
        }
        (Layout::new(Files::Raw, vocabulary), None)
    }

    /// The bytes of a token.
    pub fn width(self) -> usize {
        match self {
            Layout::U16 | Layout::LlmC16 => 2,
            Layout::U32 | Layout::LlmC32 => 4,
        }
    }

    /// The bytes of a file of so many tokens: where the next token would lie.
    pub fn bytes(self, tokens: usize) -> usize {
        self.header_bytes() + self.width() * tokens
    }

    fn header_bytes(self) -> usize {
        match self {
            Layout::U16 | Layout::U32 => 0,
            Layout::LlmC16 | Layout::LlmC32 => HEADER,
        }
    }

    /// The most tokens that the header can tell.
    pub fn most_tokens(self) -> usize {
        match self.header_bytes() {
            0 => usize::MAX,
            _ => i32::MAX as usize,
        }
    }

    /// What a file of so many tokens begins with.
    pub fn header(self, tokens: usize) -> Vec<u8> {
        let mut header = vec![0; self.header_bytes()];
        if !header.is_empty() {
            let (magic, version) = LLM_C[usize::from(self.width() == 4)];
            for (at, number) in [magic, version, tokens as u32].into_iter().enumerate() {
                header[4 * at..4 * at + 4].copy_from_slice(&number.to_le_bytes());
            }
        }
        header
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_of_llm_c() {
        let header = Layout::LlmC16.header(0x0102_0304);
        assert_eq!(header.len(), 1024);
        assert_eq!(header[..12], [0x88, 0xd8, 0x34, 0x01, 1, 0, 0, 0, 4, 3, 2, 1]);
        assert!(header[12..].iter().all(|&byte| byte == 0));
        assert_eq!(Layout::of(&header, 50_257), (Layout::LlmC16, Some(0x0102_0304)));
        assert_eq!(Layout::of(&header[..1000], 50_257), (Layout::U16, None));
        assert_eq!(Layout::of(&Layout::LlmC32.header(7), 128_256), (Layout::LlmC32, Some(7)));
    }
}
