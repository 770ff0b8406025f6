//! Errors of files, all at once, each with its place and what to do.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// The text of a file and its name.
#[derive(Debug, PartialEq, Eq)]
pub struct Source {
    /// As the user gave it.
    pub name: String,
    /// Its text.
    pub text: String,
}

impl Source {
    /// Line and column of a byte, counted from 1; the column counts characters.
    pub fn line_column(&self, byte: usize) -> (usize, usize) {
        let mut end = byte.min(self.text.len());
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        let before = &self.text[..end];
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
    }
}

/// Where something stands in a file.
#[derive(Clone, Debug)]
pub struct Span {
    /// The file.
    pub source: Arc<Source>,
    /// Bytes of its text.
    pub bytes: Range<usize>,
}

/// One thing that is wrong with a file.
#[derive(Clone, Debug, Default)]
pub struct Diagnostic {
    /// What is wrong and what was expected.
    pub message: String,
    /// Where.
    pub span: Option<Span>,
    /// The row it belongs to: the path of row names.
    pub row: Option<String>,
    /// What to do.
    pub help: Option<String>,
}

impl Diagnostic {
    /// A message without a place.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), ..Self::default() }
    }

    /// With its place.
    pub fn at(mut self, span: Span) -> Self {
        self.span = Some(span);
        self
    }

    /// With the row it belongs to.
    pub fn row(mut self, row: impl Into<String>) -> Self {
        self.row = Some(row.into());
        self
    }

    /// With what to do.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// With a hint at the known name that is nearest to `name`, if one is near.
    pub fn nearest<'a>(self, name: &str, known: impl IntoIterator<Item = &'a str>) -> Self {
        match nearest(name, known) {
            Some(best) => self.help(format!("did you mean `{best}`?")),
            None => self,
        }
    }
}

/// The known name nearest to `name`, if it is near enough to be meant.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|k| (similarity(&name.to_lowercase(), &k.to_lowercase()), k))
        .filter(|(similarity, _)| *similarity > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k)
}

/// From 0 to 1. One slip of a finger is near however short the name is, for which Jaro-Winkler is too strict.
fn similarity(a: &str, b: &str) -> f64 {
    let slip = a.len().min(b.len()) > 1 && strsim::osa_distance(a, b) <= 1;
    strsim::jaro_winkler(a, b).max(if slip { 0.8 } else { 0.0 })
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(span) = &self.span {
            let (line, column) = span.source.line_column(span.bytes.start);
            write!(f, "{}:{line}:{column}: ", span.source.name)?;
        }
        if let Some(row) = &self.row {
            write!(f, "row `{row}`: ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for Diagnostic {}

impl miette::SourceCode for Source {
    fn read_span<'a>(
        &'a self,
        span: &miette::SourceSpan,
        before: usize,
        after: usize,
    ) -> Result<Box<dyn miette::SpanContents<'a> + 'a>, miette::MietteError> {
        let inner = self.text.read_span(span, before, after)?;
        Ok(Box::new(miette::MietteSpanContents::new_named(
            self.name.clone(),
            inner.data(),
            *inner.span(),
            inner.line(),
            inner.column(),
            inner.line_count(),
        )))
    }
}

impl miette::Diagnostic for Diagnostic {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.help.as_ref().map(|h| Box::new(h) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn miette::SourceCode> {
        self.span.as_ref().map(|s| &*s.source as &dyn miette::SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = miette::LabeledSpan> + '_>> {
        let span = self.span.as_ref()?;
        let label = miette::LabeledSpan::new(None, span.bytes.start, span.bytes.len());
        Some(Box::new(std::iter::once(label)))
    }
}

/// Everything that is wrong, in file order.
#[derive(Clone, Debug, Default)]
pub struct Errors(pub Vec<Diagnostic>);

impl Errors {
    /// Adds one.
    pub fn push(&mut self, diagnostic: Diagnostic) {
        self.0.push(diagnostic);
    }

    /// Adds those of another list.
    pub fn extend(&mut self, others: Errors) {
        self.0.extend(others.0);
    }

    /// `Ok` if nothing is wrong.
    ///
    /// # Errors
    /// Itself, sorted by place, if anything is.
    pub fn into_result(self) -> Result<(), Errors> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(self.sorted())
    }

    /// In the order of the file.
    pub fn sorted(mut self) -> Self {
        self.0.sort_by_key(|d| d.span.as_ref().map(|s| s.bytes.start));
        self
    }
}

impl From<Diagnostic> for Errors {
    fn from(diagnostic: Diagnostic) -> Self {
        Errors(vec![diagnostic])
    }
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, diagnostic) in self.0.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{diagnostic}")?;
            if let Some(help) = &diagnostic.help {
                write!(f, "\n  help: {help}")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Errors {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_line_and_a_column() {
        let source = Arc::new(Source { name: "m.ron".into(), text: "äb\ncd".into() });
        assert_eq!(source.line_column(0), (1, 1));
        assert_eq!(source.line_column(2), (1, 2));
        assert_eq!(source.line_column(5), (2, 2));
        let d = Diagnostic::new("no such op").at(Span { source, bytes: 4..5 }).row("h.x").nearest("Liner", ["Linear"]);
        assert_eq!(Errors::from(d).to_string(), "m.ron:2:1: row `h.x`: no such op\n  help: did you mean `Linear`?");
    }
}
