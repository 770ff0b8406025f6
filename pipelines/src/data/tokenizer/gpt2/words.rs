//! Where GPT-2's pattern cuts a text into words, without a regular expression at run time.
//!
//! The pattern, as published with GPT-2's encoder:
//! `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`. Its look-ahead leaves the last
//! space of a run to the word behind it.

use regex_syntax::hir::{Class, HirKind};

/// What the pattern tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Other,
    Letter,
    Number,
    Space,
}

/// Beyond this code point there are neither letters nor numbers nor spaces; a test checks it.
const LIMIT: usize = 0x33480;

/// The kind of every character.
#[derive(Debug)]
pub(super) struct Words {
    kinds: Vec<Kind>,
}

impl Words {
    pub(super) fn new() -> Words {
        let mut kinds = vec![Kind::Other; LIMIT];
        for (pattern, kind) in [(r"\p{L}", Kind::Letter), (r"\p{N}", Kind::Number), (r"\s", Kind::Space)] {
            for (first, last) in ranges(pattern) {
                let end = (last as usize + 1).min(LIMIT);
                kinds[(first as usize).min(end)..end].fill(kind);
            }
        }
        Words { kinds }
    }

    /// The end of the word that starts at byte `start`, which is a boundary of characters before the end of `text`.
    #[inline]
    pub(super) fn end(&self, text: &str, start: usize) -> usize {
        let bytes = text.as_bytes();
        let first = bytes[start];
        if first == b'\''
            && let Some(length) = contraction(&bytes[start + 1..])
        {
            return start + 1 + length;
        }
        // a space joins the word behind it
        let body = start + usize::from(first == b' ');
        if body < bytes.len() {
            let (kind, next) = self.at(text, body);
            if kind != Kind::Space {
                return self.run(text, next, kind);
            }
        }
        self.spaces(text, start)
    }

    /// The end of a word of white space: of a run before a word, all but its last character.
    #[inline]
    fn spaces(&self, text: &str, start: usize) -> usize {
        let mut last = start;
        let mut at = start;
        while at < text.len() {
            let (kind, next) = self.at(text, at);
            if kind != Kind::Space {
                return if last == start { at } else { last };
            }
            (last, at) = (at, next);
        }
        at
    }

    /// The end of the characters of a kind from `at` on.
    #[inline]
    fn run(&self, text: &str, mut at: usize, kind: Kind) -> usize {
        let bytes = text.as_bytes();
        while at < bytes.len() {
            if bytes[at] < 0x80 {
                if self.kinds[usize::from(bytes[at])] != kind {
                    break;
                }
                at += 1;
            } else {
                let (found, next) = self.at(text, at);
                if found != kind {
                    break;
                }
                at = next;
            }
        }
        at
    }

    /// The kind of the character at `at`, and where the next one starts.
    #[inline]
    fn at(&self, text: &str, at: usize) -> (Kind, usize) {
        let byte = text.as_bytes()[at];
        if byte < 0x80 {
            return (self.kinds[usize::from(byte)], at + 1);
        }
        match text[at..].chars().next() {
            Some(c) => (self.kinds.get(c as usize).copied().unwrap_or(Kind::Other), at + c.len_utf8()),
            None => (Kind::Other, text.len()),
        }
    }
}

/// The length of what follows an apostrophe in `'s`, `'t`, `'m`, `'d`, `'ll`, `'ve`, `'re`.
#[inline]
fn contraction(after: &[u8]) -> Option<usize> {
    match after {
        [b's' | b't' | b'm' | b'd', ..] => Some(1),
        [b'l', b'l', ..] | [b'v', b'e', ..] | [b'r', b'e', ..] => Some(2),
        _ => None,
    }
}

/// The characters that a class matches.
fn ranges(pattern: &str) -> Vec<(u32, u32)> {
    let class = regex_syntax::parse(pattern).map(regex_syntax::hir::Hir::into_kind);
    match class {
        Ok(HirKind::Class(Class::Unicode(class))) => {
            class.iter().map(|range| (range.start() as u32, range.end() as u32)).collect()
        }
        other => unreachable!("{pattern} is a class of characters: {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &str) -> Vec<&str> {
        let words = Words::new();
        let (mut at, mut found) = (0, Vec::new());
        while at < text.len() {
            let end = words.end(text, at);
            found.push(&text[at..end]);
            at = end;
        }
        found
    }

    #[test]
    fn as_the_pattern_says() {
        assert_eq!(cut("Hello world"), ["Hello", " world"]);
        assert_eq!(cut("it's they'll 'tis I'D"), ["it", "'s", " they", "'ll", " '", "tis", " I", "'", "D"]);
        assert_eq!(cut("a  b\n\nc \n d  "), ["a", " ", " b", "\n", "\n", "c", " \n", " d", "  "]);
        assert_eq!(cut("x1½²y_z-- ..."), ["x", "1½²", "y", "_", "z", "--", " ..."]);
        assert_eq!(cut("été 日本 ٣\u{a0}\u{3000}x"), ["été", " 日本", " ٣", "\u{a0}", "\u{3000}", "x"]);
        assert_eq!(cut("'sta''ll"), ["'s", "ta", "''", "ll"]);
        assert_eq!(cut(" \u{300}e\u{301}😀!"), [" \u{300}", "e", "\u{301}😀!"]);
    }

    #[test]
    fn nothing_beyond_the_table() {
        for pattern in [r"\p{L}", r"\p{N}", r"\s"] {
            assert!(ranges(pattern).iter().all(|&(_, last)| (last as usize) < LIMIT), "{pattern}");
        }
    }
}
