//! What changed between two RON texts, but for comments and spaces.

use similar::{ChangeTag, TextDiff};

/// The lines that went and came, `- ` and `+ ` before them; none if the texts mean the same.
pub(crate) fn changes(was: &str, now: &str) -> Vec<String> {
    let (was, now) = (plain(was), plain(now));
    if solid(&was) == solid(&now) {
        return Vec::new();
    }
    let diff = TextDiff::from_lines(&was, &now);
    let shown = diff.iter_all_changes().filter_map(|change| {
        let sign = match change.tag() {
            ChangeTag::Delete => '-',
            ChangeTag::Insert => '+',
            ChangeTag::Equal => return None,
        };
        Some(format!("  {sign} {}", change.value().trim_end()))
    });
    shown.collect()
}

/// Without comments and empty lines, and with single spaces.
fn plain(text: &str) -> String {
    let mut out = String::new();
    scan(text, |piece| match piece {
        Piece::Char(c) if c.is_whitespace() => {
            let last = out.chars().last().unwrap_or('\n');
            if c == '\n' && last != '\n' {
                out.truncate(out.trim_end_matches(' ').len());
                out.push('\n');
            } else if !last.is_whitespace() {
                out.push(' ');
            }
        }
        Piece::Char(c) => out.push(c),
        Piece::String(text) => out.push_str(text),
    });
    out
}

/// Without any space outside of strings.
fn solid(text: &str) -> String {
    let mut out = String::new();
    scan(text, |piece| match piece {
        Piece::Char(c) if c.is_whitespace() => {}
        Piece::Char(c) => out.push(c),
        Piece::String(text) => out.push_str(text),
    });
    // a comma behind the last entry means nothing
    [")", "]", "}"].iter().fold(out, |out, close| out.replace(&format!(",{close}"), close))
}

enum Piece<'a> {
    Char(char),
    String(&'a str),
}

/// Walks over a text, without its comments and with its strings in one piece.
fn scan<'a>(text: &'a str, mut take: impl FnMut(Piece<'a>)) {
    let mut at = 0;
    while let Some(c) = text[at..].chars().next() {
        let rest = &text[at..];
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if c == '"' {
            let length = string(rest);
            take(Piece::String(&rest[..length]));
            length
        } else {
            take(Piece::Char(c));
            c.len_utf8()
        };
        at += length;
    }
}

/// The length of the string that a text starts with.
fn string(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "// a\nPipeline(\n  seed: 7, // why\n  stages: [\n    (\"t\",  Text(from: \"a  // b\"), []),\n  ],\n)\n";

    #[test]
    fn layout_is_no_change() {
        for same in [
            TEXT.replace("// why", ""),
            TEXT.replace("  ", " ").replace("\"a // b", "\"a  // b"),
            TEXT.replace("[\n", "["),
            TEXT.replace("],\n)", "])").replace("/*", ""),
            format!("/* new\n */{TEXT}"),
        ] {
            assert_eq!(changes(TEXT, &same), Vec::<String>::new(), "{same}");
        }
    }

    #[test]
    fn changes_are_listed() {
        let now = TEXT.replace("7", "8").replace("a  // b", "a // b");
        let listed = changes(TEXT, &now);
        let expected = [
            "  - seed: 7,",
            "  + seed: 8,",
            "  - (\"t\", Text(from: \"a  // b\"), []),",
            "  + (\"t\", Text(from: \"a // b\"), []),",
        ];
        assert_eq!(listed, expected);
        assert_eq!(changes("a\n", "a\nb\n"), ["  + b"]);
    }
}
