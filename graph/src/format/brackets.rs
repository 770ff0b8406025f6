//! Finds the bracket or quote that is to blame for a syntax error.
//!
//! A parser notices a missing bracket only where something cannot go on, often far behind the place. Counting finds the
//! bracket that was left open.

use std::ops::Range;

/// A bracket or quote without its partner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unbalanced {
    /// What is wrong.
    pub what: String,
    /// Where, in bytes.
    pub bytes: Range<usize>,
}

/// The first bracket or quote of a RON text that has no partner. `place` turns a byte into words, such as a line and
/// column. For texts that could not be parsed: a string that goes over a line is taken for one that was not closed.
pub fn unbalanced(text: &str, place: impl Fn(usize) -> String) -> Option<Unbalanced> {
    let mut open: Vec<(usize, char)> = Vec::new();
    let mut at = 0;
    while let Some(c) = text[at..].chars().next() {
        let rest = &text[at..];
        let end = at + c.len_utf8();
        at = match c {
            '/' if rest.starts_with("//") => at + rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => match comment(rest) {
                Some(length) => at + length,
                None => return Some(Unbalanced { what: "the comment is not closed".into(), bytes: at..at + 2 }),
            },
            '"' => match string(rest) {
                Some(length) => at + length,
                None => {
                    let what = "the string is not closed: a `\"` is missing at its end".into();
                    let line = rest.find('\n').unwrap_or(rest.len());
                    return Some(Unbalanced { what, bytes: at..at + rest[..line].trim_end().len() });
                }
            },
            // a character such as '"'
            '\'' if rest.chars().nth(2) == Some('\'') => at + rest.chars().take(3).map(char::len_utf8).sum::<usize>(),
            '(' | '[' | '{' => {
                open.push((at, c));
                end
            }
            ')' | ']' | '}' => {
                match open.pop() {
                    Some((_, bracket)) if partner(bracket) == c => {}
                    Some((start, bracket)) => {
                        let what =
                            format!("`{bracket}` is not closed: {} has `{c}`, not `{}`", place(at), partner(bracket));
                        return Some(Unbalanced { what, bytes: start..start + 1 });
                    }
                    None => {
                        return Some(Unbalanced { what: format!("`{c}` closes nothing"), bytes: at..end });
                    }
                }
                end
            }
            _ => end,
        };
    }
    let (start, bracket) = open.pop()?;
    let what = format!("`{bracket}` is not closed: a `{}` is missing", partner(bracket));
    Some(Unbalanced { what, bytes: start..start + 1 })
}

fn partner(bracket: char) -> char {
    match bracket {
        '(' => ')',
        '[' => ']',
        _ => '}',
    }
}

/// The length of the string at the start of a text, with its quotes; `None` if it does not end on its line.
fn string(text: &str) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            '\n' => return None,
            '"' if !escaped => return Some(at + 1),
            _ => escaped = c == '\\' && !escaped,
        }
    }
    None
}

/// The length of the comment at the start of a text. Comments nest.
fn comment(text: &str) -> Option<usize> {
    let (mut depth, mut at) = (0, 0);
    loop {
        let rest = &text.as_bytes()[at..];
        (depth, at) = match rest {
            [b'/', b'*', ..] => (depth + 1, at + 2),
            [b'*', b'/', ..] => (depth - 1, at + 2),
            [_, ..] => (depth, at + 1),
            [] => return None,
        };
        if depth == 0 {
            return Some(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Option<(String, Range<usize>)> {
        unbalanced(text, |byte| format!("byte {byte}")).map(|u| (u.what, u.bytes))
    }

    #[test]
    fn whole_texts_are_fine() {
        for text in ["", "a(b: [1], c: {\"x}\": '\"'})", "// (\n()", "/* ( /* [ */ */ ()", r#"("\"(", "\\")"#] {
            assert_eq!(found(text), None, "{text}");
        }
    }

    #[test]
    fn what_was_left_open_is_named() {
        for (text, what, bytes) in [
            ("M(c: {1, n: [2])", "`{` is not closed: byte 15 has `)`, not `}`", 5..6),
            ("M(n: [1, (2)", "`[` is not closed: a `]` is missing", 5..6),
            ("M(n: [1]))", "`)` closes nothing", 9..10),
            ("M(n: \"é, 1)\n)", "the string is not closed: a `\"` is missing at its end", 5..12),
            ("M( /* x", "the comment is not closed", 3..5),
        ] {
            assert_eq!(found(text), Some((what.to_string(), bytes)), "{text}");
        }
    }
}
