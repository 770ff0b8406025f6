//! `--set row.attribute=value`: a change to the text of a file, so that what runs can be saved and read.

use std::ops::Range;
use std::sync::Arc;

use super::rows::{Row, options};
use crate::diagnostic::{Diagnostic, Source, nearest};

/// The text with an attribute of a row replaced or added. `path` is `row.attribute`, or `row.attribute.key` for an
/// entry of a map; `value` is RON, and what is no RON value (a path, a word with a slash) is taken as a string.
///
/// # Errors
/// A path that names no row, or one without an attribute.
pub fn set(source: &Arc<Source>, rows: &[Row], path: &str, value: &str) -> Result<Arc<Source>, Diagnostic> {
    let wrong = |message: String| Diagnostic::new(format!("--set {path}={value}: {message}"));
    let row = rows
        .iter()
        .filter(|r| path.strip_prefix(r.name()).is_some_and(|rest| rest.starts_with('.')))
        .max_by_key(|r| r.name().len());
    let Some(row) = row else {
        let first = path.split('.').next().unwrap_or_default();
        let names: Vec<&str> = rows.iter().map(Row::name).collect();
        let message = format!("there is no row `{first}`; write row.attribute=value (rows: {})", names.join(", "));
        let diagnostic = wrong(message);
        return Err(match nearest(first, names) {
            Some(best) => diagnostic.help(format!("did you mean `{best}`?")),
            None => diagnostic,
        });
    };
    let keys: Vec<&str> = path[row.name().len() + 1..].split('.').collect();
    if keys.len() > 2 || keys.iter().any(|k| k.is_empty()) {
        return Err(wrong("write row.attribute=value, or row.attribute.key=value for an entry of a map".into()));
    }
    let value = as_ron(value);
    let attributes = &row.attributes;
    let text = match keys[..] {
        [attribute] => edit(&attributes.text, attribute, &value),
        [attribute, key] => {
            let inner = fields(&attributes.text).into_iter().find(|f| f.0 == attribute).map(|f| f.1);
            let map = inner.map_or("{}", |range| attributes.text[range].trim());
            if !map.starts_with('{') {
                return Err(wrong(format!("`{attribute}` is no map")));
            }
            edit(&attributes.text, attribute, &edit(map, &format!("\"{key}\""), &value))
        }
        _ => unreachable!("checked above"),
    };
    let mut whole = source.text.clone();
    whole.replace_range(attributes.bytes.clone(), &text);
    Ok(Arc::new(Source { name: source.name.clone(), text: whole }))
}

/// The value if it is RON, else as a quoted string.
fn as_ron(value: &str) -> String {
    let value = value.trim();
    if options().from_str::<&ron::value::RawValue>(value).is_ok() { value.to_string() } else { format!("{value:?}") }
}

/// The list or map `text`, with its parentheses, with one entry replaced or added.
fn edit(text: &str, key: &str, value: &str) -> String {
    let fields = fields(text);
    if let Some((_, range)) = fields.iter().find(|f| f.0 == key) {
        return format!("{}{value}{}", &text[..range.start], &text[range.end..]);
    }
    let close = text.len() - 1; // the closing parenthesis
    let body = text[..close].trim_end();
    let comma = if fields.is_empty() || body.ends_with(',') { "" } else { "," };
    let space = if fields.is_empty() { "" } else { " " };
    format!("{body}{comma}{space}{key}: {value}{}", &text[close..])
}

/// The entries `key: value` between the outer parentheses: each key and the place of its value.
fn fields(text: &str) -> Vec<(&str, Range<usize>)> {
    let mut found = Vec::new();
    let (mut depth, mut start, mut colon) = (0usize, 1, None);
    let mut add = |start: usize, colon: Option<usize>, end: usize| {
        if let Some(colon) = colon {
            let value = &text[colon + 1..end];
            let from = colon + 1 + value.len() - value.trim_start().len();
            found.push((text[start..colon].trim(), from..from + value.trim().len()));
        }
    };
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => {
                while let Some((_, c)) = chars.next() {
                    match c {
                        '\\' => drop(chars.next()),
                        '"' => break,
                        _ => {}
                    }
                }
            }
            '/' if chars.peek().is_some_and(|n| n.1 == '/') => {
                while chars.next_if(|n| n.1 != '\n').is_some() {}
                if depth == 1 && colon.is_none() {
                    start = chars.peek().map_or(text.len(), |n| n.0);
                }
            }
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    add(start, colon, at);
                }
            }
            ',' if depth == 1 => {
                add(start, colon, at);
                (start, colon) = (at + 1, None);
            }
            ':' if depth == 1 && colon.is_none() => colon = Some(at),
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostic::Errors;
    use crate::format::rows::parse_rows;

    fn apply(text: &str, path: &str, value: &str) -> Result<String, String> {
        let source = Arc::new(Source { name: "p.ron".into(), text: text.into() });
        let raw: Vec<&ron::value::RawValue> = options().from_str(&source.text).unwrap();
        let rows = parse_rows(&source, &raw, &mut Errors::default());
        set(&source, &rows, path, value).map(|s| s.text.clone()).map_err(|e| e.message)
    }

    #[test]
    fn attributes_are_replaced_or_added() {
        let text = r#"[("a", Windows(batch: 64, block: "x, y"), []), ("m", Model(file: "a.ron", config: {"n": 1}), ["a"]), ("t", Train, [])]"#;
        for (path, value, expected) in [
            ("a.batch", "1", r#"Windows(batch: 1, block: "x, y")"#),
            ("a.block", "2", r#"Windows(batch: 64, block: 2)"#),
            ("a.seed", "2", r#"Windows(batch: 64, block: "x, y", seed: 2)"#),
            ("m.file", "models/b.ron", r#"Model(file: "models/b.ron", config: {"n": 1})"#),
            ("m.config.n", "3", r#"config: {"n": 3})"#),
            ("m.config.d", "3", r#"config: {"n": 1, "d": 3})"#),
            ("t.steps", "5", r#"Train(steps: 5)"#),
            ("t.from", r#"[File("x")]"#, r#"Train(from: [File("x")])"#),
            ("t.keep", "Best", "Train(keep: Best)"),
        ] {
            let text = apply(text, path, value).unwrap();
            assert!(text.contains(expected), "{path}: {text}");
        }
        assert!(apply(text, "b.batch", "1").unwrap_err().contains("no row `b`"));
        assert!(apply(text, "a", "1").unwrap_err().contains("no row `a`; write row.attribute=value"));
        assert!(apply(text, "a.batch.x", "1").unwrap_err().contains("no map"));
    }

    #[test]
    fn comments_and_trailing_commas_do_not_matter() {
        let text = "[(\"a\", Windows(\n  // how many, or: more\n  batch: 64, // rows\n  block: 2,\n), [])]";
        assert!(apply(text, "a.batch", "7").unwrap().contains("batch: 7, // rows"));
        assert!(apply(text, "a.c", "7").unwrap().contains("block: 2, c: 7)"));
    }
}
