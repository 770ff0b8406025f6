//! Rows: `("name", Op(attributes), ["inputs"])`, the common form of models and pipelines.
//!
//! Each row is kept as raw text first and parsed on its own, so that one wrong row does not hide the errors
//! of the others. The address of a raw slice inside of the file's text gives its place.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use ron::value::RawValue;
use serde::de::DeserializeOwned;

use super::brackets::{Unbalanced, unbalanced};
use crate::diagnostic::{Diagnostic, Errors, Source, Span, nearest};
use crate::registry::Table;

/// A string and where it stands.
#[derive(Clone, Debug)]
pub struct Spanned {
    /// The string.
    pub text: String,
    /// Its place.
    pub bytes: Range<usize>,
}

/// A row of a file.
#[derive(Clone, Debug)]
pub struct Row {
    /// Names of the outputs; the first one is also the row's name.
    pub names: Vec<Spanned>,
    /// The op's name, before `(`.
    pub op: Spanned,
    /// The attributes with their parentheses; `()` where the row has none.
    pub attributes: Spanned,
    /// Names of the inputs.
    pub inputs: Vec<Spanned>,
}

impl Row {
    /// The row's name: its first output.
    pub fn name(&self) -> &str {
        &self.names[0].text
    }
}

/// Reads a file of text.
///
/// # Errors
/// If it cannot be read or is not UTF-8, with the place of the first wrong byte.
pub fn read_source(path: &Path) -> Result<Arc<Source>, Diagnostic> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path)
        .map_err(|e| Diagnostic::new(format!("cannot read `{name}`: {e}")).help("give the path of a .ron file"))?;
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Arc::new(Source { name, text })),
        Err(e) => {
            let offset = e.utf8_error().valid_up_to();
            let line = e.as_bytes()[..offset].iter().filter(|b| **b == b'\n').count() + 1;
            let message = format!(
                "`{name}` is not valid UTF-8: byte 0x{:02x} at offset {offset} (line {line})",
                e.as_bytes()[offset]
            );
            Err(Diagnostic::new(message).help("save the file as UTF-8"))
        }
    }
}

/// How all texts are read: an optional attribute is written without `Some(…)`.
pub fn options() -> ron::Options {
    ron::Options::default().with_default_extension(ron::extensions::Extensions::IMPLICIT_SOME)
}

/// Parses a whole file into its top-level struct; `form` is what such a file looks like.
///
/// # Errors
/// The first syntax error, or the first wrong field of the struct.
pub fn parse_file<'a, T: serde::Deserialize<'a>>(source: &'a Arc<Source>, form: &str) -> Result<T, Diagnostic> {
    if source.text.trim().is_empty() {
        let whole = Span { source: source.clone(), bytes: 0..source.text.len() };
        return Err(Diagnostic::new("the file is empty").at(whole).help(format!("it should be {form}")));
    }
    options().from_str(&source.text).map_err(|e| {
        let place = |byte| {
            let (line, column) = source.line_column(byte);
            format!("line {line}, column {column}")
        };
        if is_syntax(&e.code)
            && let Some(Unbalanced { what, bytes }) = unbalanced(&source.text, place)
        {
            return Diagnostic::new(what).at(Span { source: source.clone(), bytes });
        }
        let diagnostic = ron_error(source, &source.text, 0, &e);
        match e.code {
            ron::Error::ExpectedNamedStructLike(_) | ron::Error::ExpectedDifferentStructName { .. } => {
                diagnostic.help(format!("the file should be {form}"))
            }
            _ => diagnostic,
        }
    })
}

/// Whether the text is no RON at all; otherwise it is, but not what was expected.
fn is_syntax(error: &ron::Error) -> bool {
    use ron::Error::*;
    !matches!(
        error,
        ExpectedNamedStructLike(_)
            | ExpectedDifferentStructName { .. }
            | NoSuchStructField { .. }
            | NoSuchEnumVariant { .. }
            | MissingStructField { .. }
            | DuplicateStructField { .. }
            | InvalidValueForType { .. }
            | Message(_)
    )
}

/// A ron error about `text`, which starts at byte `base` of the file.
pub fn ron_error(source: &Arc<Source>, text: &str, base: usize, error: &ron::error::SpannedError) -> Diagnostic {
    let byte = |position: &ron::error::Position| {
        let line_start: usize = text.split_inclusive('\n').take(position.line.saturating_sub(1)).map(str::len).sum();
        let line = &text[line_start..];
        line_start + line.chars().take(position.col.saturating_sub(1)).map(char::len_utf8).sum::<usize>()
    };
    let start = byte(&error.span.start).min(text.len());
    let end = byte(&error.span.end).clamp(start, text.len());
    let diagnostic =
        Diagnostic::new(error.code.to_string()).at(Span { source: source.clone(), bytes: base + start..base + end });
    match &error.code {
        ron::Error::NoSuchStructField { expected, found, .. }
        | ron::Error::NoSuchEnumVariant { expected, found, .. } => {
            let what = if matches!(error.code, ron::Error::NoSuchStructField { .. }) { "attribute" } else { "value" };
            let known = if expected.is_empty() {
                "there are none".to_string()
            } else {
                format!("expected one of: {}", expected.join(", "))
            };
            Diagnostic { message: format!("unknown {what} `{found}`, {known}"), ..diagnostic }
                .nearest(found, expected.iter().copied())
        }
        // a word without quotes: ron takes it for the name of a struct, and points behind it
        ron::Error::InvalidValueForType { expected, found } if found == "a unit value" => {
            let word = text[..start].rfind(|c: char| !(c.is_alphanumeric() || c == '_')).map_or(0, |i| i + 1);
            let message = format!("expected {expected}, found `{}`", &text[word..start]);
            Diagnostic { message, ..diagnostic }.at(Span { source: source.clone(), bytes: base + word..base + start })
        }
        ron::Error::InvalidIdentifier(found) | ron::Error::SuggestRawIdentifier(found) => {
            Diagnostic { message: format!("expected a name, found `{found}`"), ..diagnostic }
        }
        ron::Error::InvalidValueForType { expected, found } => {
            Diagnostic { message: format!("expected {expected}, found {found}"), ..diagnostic }
        }
        ron::Error::MissingStructField { field, .. } => {
            Diagnostic { message: format!("the attribute `{field}` is missing"), ..diagnostic }
        }
        _ => diagnostic,
    }
}

/// The place of a slice of the file's text.
fn place(source: &Source, slice: &str) -> Range<usize> {
    let start = slice.as_ptr() as usize - source.text.as_ptr() as usize;
    start..start + slice.len()
}

fn trimmed(raw: &RawValue) -> &str {
    raw.get_ron().trim()
}

/// Parses the rows of a list; wrong ones are reported and left out.
pub fn parse_rows(source: &Arc<Source>, rows: &[&RawValue], errors: &mut Errors) -> Vec<Row> {
    rows.iter().filter_map(|raw| parse_row(source, raw).map_err(|e| errors.push(e)).ok()).collect()
}

fn sub_parse<'a, T: serde::Deserialize<'a>>(source: &Arc<Source>, text: &'a str) -> Result<T, Diagnostic> {
    options().from_str(text).map_err(|e| ron_error(source, text, place(source, text).start, &e))
}

fn strings(source: &Arc<Source>, text: &str) -> Result<Vec<Spanned>, Diagnostic> {
    let items: Vec<&RawValue> = sub_parse(source, text)?;
    items
        .into_iter()
        .map(|raw| {
            let text = trimmed(raw);
            Ok(Spanned { text: sub_parse(source, text)?, bytes: place(source, text) })
        })
        .collect()
}

fn parse_row(source: &Arc<Source>, raw: &RawValue) -> Result<Row, Diagnostic> {
    let text = trimmed(raw);
    let whole = Span { source: source.clone(), bytes: place(source, text) };
    let (names, op, inputs): (&RawValue, &RawValue, &RawValue) = sub_parse(source, text).map_err(|e| {
        let help = "a row is (\"name\", Op(attributes), [\"inputs\"])";
        if e.help.is_some() { e } else { e.help(help) }
    })?;
    let names = trimmed(names);
    let names = if names.starts_with('[') {
        strings(source, names)?
    } else {
        vec![Spanned { text: sub_parse(source, names)?, bytes: place(source, names) }]
    };
    if names.is_empty() {
        return Err(Diagnostic::new("a row needs at least one name").at(whole));
    }
    for name in &names {
        if !valid_name(&name.text) {
            return Err(Diagnostic::new(format!("`{}` is not a name", name.text))
                .at(Span { source: source.clone(), bytes: name.bytes.clone() })
                .help("names are letters, digits, `_` and `.` between them"));
        }
    }
    let op_text = trimmed(op);
    let end = op_text.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(op_text.len());
    let bytes = place(source, op_text);
    let attributes = op_text[end..].trim();
    let attributes = if attributes.is_empty() {
        Spanned { text: "()".into(), bytes: bytes.end..bytes.end }
    } else {
        Spanned { text: attributes.to_string(), bytes: place(source, attributes) }
    };
    if end == 0 || !attributes.text.starts_with('(') {
        return Err(Diagnostic::new(format!("expected an op such as `Linear(out: 8)`, found `{op_text}`"))
            .at(Span { source: source.clone(), bytes })
            .row(&names[0].text));
    }
    let op = Spanned { text: op_text[..end].to_string(), bytes: bytes.start..bytes.start + end };
    let inputs = strings(source, trimmed(inputs)).map_err(|e| {
        let help = "inputs are a list of names in quotes: [\"a\", \"b\"]";
        e.row(&names[0].text).help(help)
    })?;
    Ok(Row { names, op, attributes, inputs })
}

fn valid_name(name: &str) -> bool {
    !name.is_empty()
        && name.split('.').all(|part| !part.is_empty() && part.chars().all(|c| c.is_alphanumeric() || c == '_'))
}

impl Row {
    fn wrong(&self, source: &Arc<Source>, at: &Spanned, message: impl Into<String>) -> Diagnostic {
        Diagnostic::new(message).at(Span { source: source.clone(), bytes: at.bytes.clone() }).row(self.name())
    }

    /// The registered op or stage that the row names, with its attributes.
    ///
    /// # Errors
    /// An unknown name or a wrong attribute.
    pub fn parse<K: ?Sized>(
        &self,
        source: &Arc<Source>,
        table: Option<&Table<K>>,
        kind: &str,
    ) -> Result<Arc<K>, Diagnostic> {
        let Some(entry) = table.and_then(|t| t.get(&self.op.text)) else {
            return Err(self
                .wrong(source, &self.op, format!("unknown {kind} `{}`", self.op.text))
                .nearest(&self.op.text, table.iter().flat_map(|t| t.names())));
        };
        entry.parse(&self.attributes.text).map_err(|e| self.attribute_error(source, &e))
    }

    /// The attributes as a struct of the format itself, such as `Repeat`'s.
    ///
    /// # Errors
    /// A wrong attribute.
    pub fn parse_as<T: DeserializeOwned>(&self, source: &Arc<Source>) -> Result<T, Diagnostic> {
        options().from_str(&self.attributes.text).map_err(|e| self.attribute_error(source, &e))
    }

    fn attribute_error(&self, source: &Arc<Source>, error: &ron::error::SpannedError) -> Diagnostic {
        let mut diagnostic =
            ron_error(source, &self.attributes.text, self.attributes.bytes.start, error).row(self.name());
        diagnostic.message = format!("`{}`: {}", self.op.text, diagnostic.message);
        // `Repeat` belongs to the format itself and is in no table
        if diagnostic.help.is_none() && self.op.text != "Repeat" {
            diagnostic.help = Some(format!("`dataflow ops {}` shows the attributes", self.op.text));
        }
        diagnostic
    }

    /// The place of the row's op.
    pub fn span(&self, source: &Arc<Source>) -> Span {
        Span { source: source.clone(), bytes: self.op.bytes.clone() }
    }
}

/// The rows so that each comes after those that it reads; rows may be written in any order. `outer` are names
/// that the rows may use without making them.
///
/// Also everything that is wrong: names used twice, names that nothing makes, cycles. The order holds every row even
/// so, in order that the rows' other errors can be found: a row with an unknown input counts it for nothing, and rows
/// of a cycle come before something that they read.
pub fn order_rows(source: &Arc<Source>, rows: &[Row], outer: &[&str]) -> (Vec<usize>, Errors) {
    let mut errors = Errors::default();
    let span = |at: &Spanned| Span { source: source.clone(), bytes: at.bytes.clone() };
    let mut makers: HashMap<&str, usize> = HashMap::new();
    for (i, row) in rows.iter().enumerate() {
        for name in &row.names {
            if outer.contains(&name.text.as_str()) || makers.contains_key(name.text.as_str()) {
                let message = format!("the name `{}` is used twice", name.text);
                let help = "give the row another name";
                errors.push(Diagnostic::new(message).at(span(name)).row(row.name()).help(help));
            } else {
                makers.insert(&name.text, i);
            }
        }
    }
    let mut reads = vec![BTreeSet::new(); rows.len()];
    for (i, row) in rows.iter().enumerate() {
        for input in &row.inputs {
            if let Some(&maker) = makers.get(input.text.as_str()) {
                reads[i].insert(maker);
            } else if !outer.contains(&input.text.as_str()) {
                let help = match nearest(&input.text, makers.keys().copied().chain(outer.iter().copied())) {
                    Some(best) => format!("did you mean `{best}`?"),
                    None => "an input is the name of another row, or an input of the block or model".into(),
                };
                let message = format!("there is no row or input named `{}`", input.text);
                errors.push(Diagnostic::new(message).at(span(input)).row(row.name()).help(help));
            }
        }
    }
    let mut order = Vec::with_capacity(rows.len());
    let mut done = vec![false; rows.len()];
    while order.len() < rows.len() {
        let Some(next) = (0..rows.len()).find(|&i| !done[i] && reads[i].iter().all(|&r| done[r])) else {
            let cycle = find_cycle(&reads, &done);
            let list: Vec<_> = cycle.iter().map(|&i| format!("`{}`", rows[i].name())).collect();
            let row = &rows[cycle[0]];
            let message = format!("these rows form a cycle: {} -> {}", list.join(" -> "), list[0]);
            let help = "a row cannot read what depends on it; a recurrence over time is one op, such as Longhorn";
            errors.push(Diagnostic::new(message).at(span(&row.names[0])).row(row.name()).help(help));
            for i in cycle {
                done[i] = true;
                order.push(i);
            }
            continue;
        };
        done[next] = true;
        order.push(next);
    }
    (order, errors)
}

/// A cycle among the rows that are not done; there is one, since each of them waits for another.
fn find_cycle(reads: &[BTreeSet<usize>], done: &[bool]) -> Vec<usize> {
    let mut path: Vec<usize> = vec![(0..done.len()).find(|&i| !done[i]).expect("some row is not done")];
    loop {
        let at = path[path.len() - 1];
        let next = *reads[at].iter().find(|&&r| !done[r]).expect("a waiting row reads a waiting row");
        if let Some(start) = path.iter().position(|&p| p == next) {
            let mut cycle = path.split_off(start);
            cycle.reverse(); // in the direction in which data would flow
            return cycle;
        }
        path.push(next);
    }
}
